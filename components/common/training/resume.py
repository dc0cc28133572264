"""From which checkpoint a run on `transformers.Trainer` goes on, and what travels with it: whose run it is, and what it took.

The checkpoints are Trainer's own; it writes `trainer_state.json` last, so a directory without a readable one is an
interrupted save.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from components.common.core.errors import UserError
from components.common.core.identity import (
    Identity,
    Role,
    digest_of_rows,
    identity_of,
    refuse_other_run,
    roles_of,
)
from components.common.models.loading import model_digest
from components.common.stage.config import Resumption, setting
from components.common.stage.inputs import contents
from components.common.stage.outputs import check_output
from components.common.stage.session import when_complete
from components.common.training.clock import Clock
from components.common.training.config import TrainingStageConfig
from components.common.training.log import library_versions
from components.common.training.roles import rows_per_epoch, sharded_checkpoint, spread

STATE = "trainer_state.json"


@dataclasses.dataclass(kw_only=True)
class ResumableStageConfig(TrainingStageConfig):
    """Where a training stage reads and writes, and how it resumes. OUTPUT with checkpoints in it is resumed by itself."""

    resumption: ClassVar = Resumption(marker=STATE, log=("training_log", "training"))

    resume_from: str | None = setting(
        None, "Checkpoint to go on from; default: the newest in OUTPUT/checkpoints.", role=Role.OPERATION
    )
    keep_checkpoints: bool = setting(
        False, "Leave OUTPUT/checkpoints in place when the run is complete.", role=Role.OPERATION
    )


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that Trainer finished writing, oldest step first."""
    found = [path for path in directory.glob("checkpoint-*") if _state(path) is not None]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def require_complete(directory: Path) -> Path:
    """The directory, if Trainer finished writing it; raises UserError otherwise."""
    if _state(directory) is None:
        raise UserError(
            f"{directory}: is not a complete checkpoint (no {STATE}); an older one may be: --resume_from DIR"
        )
    return directory


def checkpoint_to_resume(
    stage: ResumableStageConfig,
    complete: Callable[[Path], list[Path]] = complete_checkpoints,
    required: Callable[[Path], Path] = require_complete,
) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Args:
        complete: complete checkpoints in a directory, oldest first.
        required: gives a checkpoint back that is complete, and raises UserError for another.

    Raises:
        UserError: the output holds something else than an interrupted run.
    """
    output = Path(stage.output)
    if stage.resume_from:
        return required(Path(stage.resume_from))
    if stage.overwrite or not output.is_dir():
        check_output(stage.output, stage.overwrite)
        return None
    if found := complete(output / "checkpoints"):
        return found[-1]
    # A run that was killed before its first checkpoint leaves these two; anything else is not ours to touch.
    if not {path.name for path in output.iterdir()} <= {"checkpoints", "training"}:
        check_output(stage.output, overwrite=False)
    return None


def remove_checkpoints(stage: ResumableStageConfig) -> None:
    """Of a run that is complete, unless they are to be kept."""
    if not stage.keep_checkpoints:
        checkpoints = Path(stage.output) / "checkpoints"
        when_complete(lambda: shutil.rmtree(checkpoints, ignore_errors=True), checkpoints)


def _state(checkpoint: Path) -> dict[str, Any] | None:
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def run_identity(
    stage: ResumableStageConfig,
    args: TrainingArguments,
    train: Sequence[Any],
    held_out: Sequence[Any] | None,
    sequences: int,
) -> Identity:
    """What must be equal for a checkpoint to be of this run: settings, rows, start model; and versions, for the record.

    Args:
        args: the settings of the trainer.
        train: its rows, as tokens.
        held_out: those that are scored, in the same form.
        sequences: how many the trainer sees of `train`: fewer where it packs several rows into one.
    """
    processes = stage.processes()
    inputs = {
        "training rows": digest_of_rows(train),
        "held-out rows": digest_of_rows(held_out or []),
        "start model": model_digest(Path(str(stage.model))),
        **contents(vars(args), roles_of(type(args))),
    }
    derived = spread(args, processes) | {
        "rows_per_epoch": rows_per_epoch(sequences, args, processes),
        "sharded_checkpoint": sharded_checkpoint(stage.parallelism, processes),
    }
    return identity_of([stage, args], inputs, derived, versions=library_versions())


def check_identity(checkpoint: Path, mine: Identity) -> None:
    """Raises UserError when a checkpoint is of another run, naming every setting that differs."""
    callbacks = (_state(checkpoint) or {}).get("stateful_callbacks", {})
    saved = callbacks.get(RunRecord.__name__, {}).get("attributes", {}).get("identity")
    refuse_other_run(checkpoint, saved, mine)


class RunRecord(TrainerCallback, ExportableState):
    """What each `trainer_state.json` keeps besides Trainer's own state: whose run it is, its clock and its loss so far.

    Args:
        identity: from `run_identity`; none where something else says whose run it is.
    """

    def __init__(self, trainer: Trainer, clock: Clock, identity: Identity | None = None) -> None:
        self.trainer = trainer
        self.clock = clock
        self.identity = identity
        self.clock_state = clock.state_dict()
        self.loss_before = 0.0  # summed over the steps of earlier processes
        self.steps_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.global_step:
            return
        saved = _record(state.stateful_callbacks)
        self.clock.load_state_dict(saved["clock"])
        self.loss_before = saved["loss"]
        self.steps_before = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.first_step()
        # Here, as all processes have part in it; `state` is asked of the first one alone.
        self.clock_state = self.clock.state_dict()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {},
            "attributes": {"identity": self.identity, "clock": self.clock_state, "loss": self._loss_so_far()},
        }

    def _loss_so_far(self) -> float:
        """Summed over all steps of the run. Trainer asks before it trains too, when it has no sum yet."""
        logged, newer = (getattr(self.trainer, name, 0.0) for name in ("_total_loss_scalar", "_tr_loss"))
        return self.loss_before + logged + float(newer)

    def train_loss(self, metrics: dict[str, float]) -> float:
        """The mean over all steps of the run, from that over the steps of this process, which `Trainer.train` gives."""
        if not self.steps_before:
            return metrics["train_loss"]
        steps = self.trainer.state.global_step
        return (self.loss_before + metrics["train_loss"] * (steps - self.steps_before)) / steps


def _record(stateful_callbacks: Any) -> dict[str, Any]:
    """What `RunRecord` has put among the callbacks of a `trainer_state.json`; empty where it was not there."""
    return (stateful_callbacks or {}).get(RunRecord.__name__, {}).get("attributes", {})
