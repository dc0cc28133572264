"""What of a trainer a checkpoint holds: enough that a resumed run equals an uninterrupted one, bit for bit.

Nothing is saved that follows from seed and step: rows, cuts and draws come from generators made for each step.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from components.common.errors import UserError
from components.common.training import library_versions
from components.sapo import checkpoint
from components.sapo.checkpoint import CheckpointReader, CheckpointWriter
from components.sapo.replay_buffer import pack, unpack

if TYPE_CHECKING:
    from components.sapo.trainer import SAPOTrainer

# Settings that may differ after a resume, by prefix: they say where things go and how often, not what is computed.
FREE = (
    *("output_dir", "log_dir", "logging_", "log_", "report_to", "run_name", "project", "trackio_", "disable_"),
    *("save_", "eval_", "per_device_eval", "pairs_per_log", "resume_", "hub_", "push_", "dataloader_"),
    *("use_cpu", "do_", "local_rank"),
)


def save(trainer: "SAPOTrainer", writer: CheckpointWriter) -> None:
    """Writes the trainer's state after a whole optimizer step."""
    writer.tensors("policy", trainer.policy.state_dict())
    writer.tensors("ema", trainer.ema.model.state_dict())
    if trainer.reference is not None:
        writer.tensors("reference", trainer.reference.state_dict())
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None  # a step was taken
    optimizer_tensors, optimizer_rest = checkpoint.flatten_optimizer(trainer.optimizer.state_dict())
    writer.tensors("optimizer", optimizer_tensors)
    writer.json("optimizer", optimizer_rest)
    writer.json("scheduler", trainer.lr_scheduler.state_dict())
    writer.tensors("buffer", _to_tensors(trainer.buffer.state_dict()))
    if trainer.held_out is not None:
        entries = _to_tensors(pack([pair.entry for pair in trainer.held_out.pairs]))
        writer.tensors("held_out", {**entries, "start_logps": trainer.held_out.start_logps})
    random_tensors, random_rest = checkpoint.random_states()
    writer.tensors("random", random_tensors)
    writer.json("random", random_rest)
    writer.json("trainer", {"version": trainer.ema.version, **trainer.unlogged()})
    trainer.state.save_to_json(str(writer.directory / "trainer_state.json"))
    writer.json("settings", identity(trainer))
    writer.finish(trainer.state.global_step)


def restore(trainer: "SAPOTrainer", reader: CheckpointReader) -> None:
    """Puts back all but the policy, the random states and the trainer's own state, which `Trainer` asks for itself."""
    trainer.ema.model.load_state_dict(reader.tensors("ema"))
    trainer.ema.version = reader.json("trainer")["version"]
    trainer.sampler.load(trainer.ema.model.named_parameters(), trainer.ema.version)
    if trainer.reference is not None:
        trainer.reference.load_state_dict(reader.tensors("reference"))
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
    saved, mine = reader.json("settings"), identity(trainer)
    names = sorted({*saved["settings"], *mine["settings"]})
    pairs = ((name, saved["settings"].get(name), mine["settings"].get(name)) for name in names)
    differing = [f"{name} was {before!r}, is {now!r}" for name, before, now in pairs if before != now]
    if saved["data"] != mine["data"]:
        differing.append("the training rows are others")
    if differing:
        advice = "give the settings it was made with, or --overwrite to start anew"
        raise UserError(f"{reader.directory}: is of another run: {'; '.join(differing)}; {advice}")


def _digest(rows: Any) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["prompt_ids"], row["chosen_ids"]]).encode())
    return digest.hexdigest()


def _to_tensors(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _to_arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}
