"""Which run a checkpoint is of: its settings, its data, and the versions that made it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from components.common.models.chat_templates import EncodedRow
from components.common.training.log import library_versions
from components.common.training.resume import refuse_other_run
from components.sapo.checkpoint import CheckpointReader
from components.sapo.config import SAPOConfig
from components.sapo.sampling import pairs_per_step

# Settings that may differ after a resume, by prefix: they say where things go and how often, not what is computed.
FREE = (
    *("output_dir", "log_dir", "logging_", "log_", "report_to", "run_name", "project", "trackio_", "disable_"),
    *("save_", "eval_", "per_device_eval", "pairs_per_log", "resume_", "hub_", "push_to_", "dataloader_"),
    *("use_cpu", "do_", "local_rank", "sampler_timeout", "gpu_memory_utilization", "sleep_level"),
    # How the work is spread over processes; `pairs_per_step` is what must be equal.
    *(
        "per_device_train",
        "gradient_accumulation",
        "num_processes",
        "parallelism",
        "deepspeed",
        "fsdp",
        "ddp_",
        "accelerator_",
    ),
)


def identity(args: SAPOConfig, rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """What must be equal for a checkpoint to be of this run: settings, data; and versions, for the record."""
    settings = {name: value for name, value in args.to_dict().items() if not name.startswith(FREE)}
    settings["pairs_per_step"] = pairs_per_step(args)
    return {
        "settings": json.loads(json.dumps(settings, default=str)),
        "data": _digest(rows),
        "versions": library_versions(),
    }


def check_identity(reader: CheckpointReader, mine: dict[str, Any]) -> None:
    """Raises UserError when the checkpoint is of another run, naming every setting that differs."""
    refuse_other_run(reader.directory, reader.json("settings"), mine)


def _digest(rows: Sequence[EncodedRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["prompt_ids"], row["chosen_ids"]]).encode())
    return digest.hexdigest()
