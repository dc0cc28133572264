"""What of a trainer a checkpoint holds: enough that a resumed run equals an uninterrupted one, bit for bit.

Nothing is saved that follows from seed and step: rows, cuts and draws come from generators made for each step.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from components.common.core.errors import UserError
from components.common.training.distributed.processes import gather, is_main_process
from components.common.training.log import library_versions
from components.common.training.resume import refuse_other_run
from components.sapo import checkpoint
from components.sapo.checkpoint import CheckpointReader, CheckpointWriter
from components.sapo.ema import copy_weights
from components.sapo.replay_buffer import pack, unpack
from components.sapo.sharding import Replicated

if TYPE_CHECKING:
    from components.sapo.trainer import SAPOTrainer

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


def save(trainer: "SAPOTrainer", writer: CheckpointWriter) -> None:
    """Writes the trainer's state after a whole optimizer step."""
    layout = trainer.layout
    weights = {"policy": layout.parts(), "ema": trainer.ema.average}
    if trainer.preference.reference:
        weights["reference"] = trainer.reference_weights
        writer.tensors("reference_cache", _to_tensors(trainer.reference_cache.state_dict()))
    if trainer.args.push_interval > 1:
        weights["served"] = trainer.ema.serving
    for name, parts in weights.items():
        writer.parts(name, *_named_parts(layout, parts))
    _save_optimizer(trainer, writer)
    writer.tensors("buffer", _to_tensors(trainer.buffer.state_dict()))
    ahead = None if trainer.schedule.ahead is None else gather(trainer.schedule.ahead)
    if ahead is not None:
        writer.tensors("ahead", _to_tensors(pack(ahead)))
    if trainer.held_out is not None:
        entries = _to_tensors(pack([pair.entry for pair in trainer.held_out.pairs]))
        writer.tensors("held_out", {**entries, "start_logps": trainer.held_out.start_logps})
    writer.own("random", *checkpoint.random_states())
    versions = {"version": trainer.ema.version, "served_version": trainer.ema.served_version}
    writer.json("trainer", {**versions, "ahead": ahead is not None, **trainer.unlogged()})
    if is_main_process():
        trainer.state.save_to_json(str(writer.add("trainer_state.json")))
    writer.json("settings", identity(trainer))
    writer.finish(trainer.state.global_step)


def _named_parts(layout: Replicated, parts: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, int] | None]:
    """Parts by name, without padding, and where they begin."""
    spans = [layout.span(index) for index in range(len(parts))]
    named = {name: part[:length] for name, part, (_, length) in zip(layout.names, parts, spans, strict=True)}
    starts = {name: start for name, (start, _) in zip(layout.names, spans, strict=True)}
    return named, starts if layout.sharded else None


def _save_optimizer(trainer: "SAPOTrainer", writer: CheckpointWriter) -> None:
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None  # a step was taken
    layout, tensors, plain, starts = trainer.layout, {}, {}, {}
    spans = {name: layout.span(index) for index, name in enumerate(layout.names)}
    for key, value in layout.optimizer_state().items():
        if isinstance(value, Tensor):
            start, length = spans[key.rsplit("/", 1)[0]]
            tensors[key], starts[key] = (value[:length] if layout.sharded else value), start
        else:
            plain[key] = value
    writer.parts("optimizer", tensors, starts if layout.sharded else None)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in layout.optimizer.param_groups]
    writer.json("optimizer", {"state": plain, "param_groups": groups})
    writer.json("scheduler", trainer.lr_scheduler.state_dict())


def restore(trainer: "SAPOTrainer", reader: CheckpointReader) -> None:
    """Puts back all but the random states and the trainer's own state, which `Trainer` asks for itself."""
    saved, layout, ema = reader.json("trainer"), trainer.layout, trainer.ema
    layout.load(_read_parts(reader, "policy", layout, layout.parts()))
    copy_weights(_read_parts(reader, "ema", layout, ema.average), ema.average)
    if ema.served is not None:
        late = trainer.args.push_interval > 1
        copy_weights(_read_parts(reader, "served", layout, ema.served) if late else ema.average, ema.served)
    ema.version, ema.served_version = saved["version"], saved["served_version"]
    if trainer.preference.reference:
        reference = trainer.reference_weights
        copy_weights(_read_parts(reader, "reference", layout, reference), reference)
        trainer.reference_cache.load_state_dict(_to_arrays(reader.tensors("reference_cache")))
    _restore_optimizer(trainer, reader)
    trainer.buffer.load_state_dict(_to_arrays(reader.tensors("buffer")))
    if saved["ahead"]:
        ahead = unpack(_to_arrays(reader.tensors("ahead")))
        trainer.schedule.ahead = [ahead[i] for i in trainer.rank_slice.of(len(ahead))]
    if trainer.eval_dataset is not None:
        restore_held_out(trainer, reader)
    trainer.push()


def _read_parts(reader: CheckpointReader, group: str, layout: Replicated, like: Sequence[Tensor]) -> list[Tensor]:
    """This process's parts of saved weights, whichever processes wrote them."""
    saved, parts = reader.parts(group), []
    if extra := set(saved) - set(layout.names):
        raise UserError(f"{reader.directory}: is of another model: it has {sorted(extra)[0]}")
    for index, (name, mine) in enumerate(zip(layout.names, like, strict=True)):
        start, length = layout.span(index)
        part = torch.zeros_like(mine)
        part[:length] = saved.read(name, start, length)
        parts.append(part)
    return parts


def _restore_optimizer(trainer: "SAPOTrainer", reader: CheckpointReader) -> None:
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None  # Trainer has just made them
    layout, saved, plain = trainer.layout, reader.parts("optimizer"), reader.json("optimizer")
    places = {
        name: (layout.span(index), mine)
        for index, (name, mine) in enumerate(zip(layout.names, layout.parts(), strict=True))
    }
    state = dict(plain["state"])
    for key in saved:
        (start, length), mine = places[key.rsplit("/", 1)[0]]
        if saved.size(key) == layout.size(key.rsplit("/", 1)[0]):
            part = saved.read(key, start, length)
            state[key] = torch.nn.functional.pad(part, (0, len(mine) - length))
        else:
            state[key] = saved.read_whole(key)
    layout.load_optimizer_state(state)
    for group, values in zip(layout.optimizer.param_groups, plain["param_groups"], strict=True):
        group.update(values)
    trainer.lr_scheduler.load_state_dict(reader.json("scheduler"))


def restore_random_states(reader: CheckpointReader) -> None:
    """This process's; where another number of processes saved, nothing: what is random comes from seeds and steps."""
    if (states := reader.own("random")) is not None:
        checkpoint.restore_random_states(*states)


def restore_held_out(trainer: "SAPOTrainer", reader: CheckpointReader) -> None:
    """Puts back the held-out pairs; their rejected responses follow from the entries."""
    saved = reader.tensors("held_out")
    trainer.set_held_out(unpack(_to_arrays(saved)), saved["start_logps"])


def identity(trainer: "SAPOTrainer") -> dict[str, Any]:
    """What must be equal for a checkpoint to be of this run: settings, data; and versions, for the record."""
    settings = {name: value for name, value in trainer.args.to_dict().items() if not name.startswith(FREE)}
    settings["pairs_per_step"] = trainer.row_order.rows_per_step
    return {
        "settings": json.loads(json.dumps(settings, default=str)),
        "data": _digest(trainer.train_dataset),
        "versions": library_versions(),
    }


def check_identity(trainer: "SAPOTrainer", reader: CheckpointReader) -> None:
    """Raises UserError when the checkpoint is of another run, naming every setting that differs."""
    refuse_other_run(reader.directory, reader.json("settings"), identity(trainer))


def _digest(rows: Any) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["prompt_ids"], row["chosen_ids"]]).encode())
    return digest.hexdigest()


def _to_tensors(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _to_arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}
