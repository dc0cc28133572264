"""What of a trainer a checkpoint holds: enough that a resumed run equals an uninterrupted one, bit for bit.

Nothing is saved that follows from seed and step: rows, cuts and draws come from generators made for each step.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from components.common.resume import refuse_other_run
from components.common.training import library_versions
from components.sapo import checkpoint
from components.sapo.checkpoint import CheckpointReader, CheckpointWriter
from components.sapo.replay_buffer import pack, unpack

if TYPE_CHECKING:
    from components.sapo.trainer import SAPOTrainer

# Settings that may differ after a resume, by prefix: they say where things go and how often, not what is computed.
FREE = (
    *("output_dir", "log_dir", "logging_", "log_", "report_to", "run_name", "project", "trackio_", "disable_"),
    *("save_", "eval_", "per_device_eval", "pairs_per_log", "resume_", "hub_", "push_to_", "dataloader_"),
    *("use_cpu", "do_", "local_rank", "sampler_timeout", "gpu_memory_utilization", "sleep_level"),
)


def save(trainer: "SAPOTrainer", writer: CheckpointWriter) -> None:
    """Writes the trainer's state after a whole optimizer step."""
    writer.tensors("policy", trainer.policy.state_dict())
    writer.tensors("ema", trainer.ema.model.state_dict())
    if trainer.reference is not None:
        writer.tensors("reference", trainer.reference.state_dict())
        writer.tensors("reference_cache", _to_tensors(trainer.reference_cache.state_dict()))
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None  # a step was taken
    optimizer_tensors, optimizer_rest = checkpoint.flatten_optimizer(trainer.optimizer.state_dict())
    writer.tensors("optimizer", optimizer_tensors)
    writer.json("optimizer", optimizer_rest)
    writer.json("scheduler", trainer.lr_scheduler.state_dict())
    writer.tensors("buffer", _to_tensors(trainer.buffer.state_dict()))
    if trainer.schedule.ahead is not None:
        writer.tensors("ahead", _to_tensors(pack(trainer.schedule.ahead)))
    if trainer.args.push_interval > 1:
        writer.tensors("served", trainer.ema.served.state_dict())
    if trainer.held_out is not None:
        entries = _to_tensors(pack([pair.entry for pair in trainer.held_out.pairs]))
        writer.tensors("held_out", {**entries, "start_logps": trainer.held_out.start_logps})
    random_tensors, random_rest = checkpoint.random_states()
    writer.tensors("random", random_tensors)
    writer.json("random", random_rest)
    versions = {"version": trainer.ema.version, "served_version": trainer.ema.served_version}
    writer.json("trainer", {**versions, "ahead": trainer.schedule.ahead is not None, **trainer.unlogged()})
    trainer.state.save_to_json(str(writer.directory / "trainer_state.json"))
    writer.json("settings", identity(trainer))
    writer.finish(trainer.state.global_step)


def restore(trainer: "SAPOTrainer", reader: CheckpointReader) -> None:
    """Puts back all but the policy, the random states and the trainer's own state, which `Trainer` asks for itself."""
    saved = reader.json("trainer")
    trainer.ema.load_state_dict(reader.tensors("ema"), saved["version"])
    if trainer.args.push_interval > 1:
        trainer.ema.served.load_state_dict(reader.tensors("served"))
        trainer.ema.served_version = saved["served_version"]
    trainer.push()
    if saved["ahead"]:
        trainer.schedule.ahead = unpack(_to_arrays(reader.tensors("ahead")))
    if trainer.reference is not None:
        trainer.reference.load_state_dict(reader.tensors("reference"))
        trainer.reference_cache.load_state_dict(_to_arrays(reader.tensors("reference_cache")))
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None  # Trainer has just made them
    flat = reader.tensors("optimizer"), reader.json("optimizer")
    trainer.optimizer.load_state_dict(checkpoint.unflatten_optimizer(*flat))
    trainer.lr_scheduler.load_state_dict(reader.json("scheduler"))
    trainer.buffer.load_state_dict(_to_arrays(reader.tensors("buffer")))


def restore_held_out(trainer: "SAPOTrainer", reader: CheckpointReader) -> None:
    """Puts back the held-out pairs; their rejected responses follow from the entries."""
    saved = reader.tensors("held_out")
    trainer.set_held_out(unpack(_to_arrays(saved)), saved["start_logps"])


def identity(trainer: "SAPOTrainer") -> dict[str, Any]:
    """What must be equal for a checkpoint to be of this run: settings, data; and versions, for the record."""
    settings = {name: value for name, value in trainer.args.to_dict().items() if not name.startswith(FREE)}
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
