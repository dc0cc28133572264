"""What a stage on `transformers.Trainer` needs to be interrupted: checkpoints that are complete, a stop on SIGTERM, and a
record that travels with the checkpoint: what the run is, and the seconds and tokens it took so far.

The checkpoints are Trainer's own; it writes `trainer_state.json` last, so a directory without a readable one is an
interrupted save.
"""

import dataclasses
import json
import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from components.common.core.errors import TERMINATED, UserError
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
from components.common.training.config import TrainingStageConfig
from components.common.training.log import library_versions
from components.common.training.roles import rows_per_epoch, sharded_checkpoint, spread

logger = logging.getLogger(__name__)

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
    sequences: int | None = None,
) -> Identity:
    """What must be equal for a checkpoint to be of this run: settings, rows, start model; and versions, for the record.

    Args:
        args: the settings of the trainer.
        train: its rows, as tokens.
        held_out: those that are scored, in the same form.
        sequences: what the trainer sees of `train`, where it packs several rows into one.
    """
    processes = stage.processes()
    inputs = {
        "training rows": digest_of_rows(train),
        "held-out rows": digest_of_rows(held_out or []),
        "start model": model_digest(Path(str(stage.model))),
        **contents(vars(args), roles_of(type(args))),
    }
    derived = spread(args, processes) | {
        "rows_per_epoch": rows_per_epoch(sequences or len(train), args, processes),
        "sharded_checkpoint": sharded_checkpoint(stage.parallelism, processes),
    }
    return identity_of([stage, args], inputs, derived, versions=library_versions())


def check_identity(checkpoint: Path, mine: Identity) -> None:
    """Raises UserError when a checkpoint is of another run, naming every setting that differs."""
    callbacks = (_state(checkpoint) or {}).get("stateful_callbacks", {})
    saved = callbacks.get(RunRecord.__name__, {}).get("attributes", {}).get("identity")
    refuse_other_run(checkpoint, saved, mine)


class RunRecord(TrainerCallback, ExportableState):
    """Seconds and tokens of a run over all its interruptions; kept in each checkpoint's `trainer_state.json`.

    Args:
        started: `time.perf_counter()` of the stage's start.
        identity: from `run_identity`.
        trainer: counts the tokens in `tokens_trained` (of this process) or in TRL's `_total_train_tokens` (of all).
    """

    def __init__(self, started: float, identity: Identity, trainer: Trainer) -> None:
        self.started, self.identity, self.trainer = started, identity, trainer
        self.begun: float | None = None
        self.seconds_before, self.tokens_before = 0.0, 0
        self.tokens = 0
        self.first_step: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.seconds_before, self.tokens_before = saved.get("seconds", 0.0), saved.get("tokens", 0)
        self.first_step = saved.get("first_step")
        self.begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.tokens = self._tokens()
        if self.first_step is None:
            self.first_step = time.perf_counter() - self.started

    def _tokens(self) -> int:
        if (total := getattr(self.trainer, "_total_train_tokens", None)) is not None:
            return int(total)
        return _over_processes(self.trainer, getattr(self.trainer, "tokens_trained", 0))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds_before, self.begun = self._seconds(), None

    def _seconds(self) -> float:
        return self.seconds_before + (time.perf_counter() - self.begun if self.begun is not None else 0.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        attributes = {"identity": self.identity, "seconds": self._seconds(), "first_step": self.first_step}
        return {"args": {}, "attributes": {**attributes, "tokens": self.tokens_before + self.tokens}}

    def summary(self) -> dict[str, float]:
        """For the training log. `seconds/train` is the training loop with its evaluations and saves; `seconds/first_step`
        runs from the stage's start (imports, loading, tokenising) to the end of the first optimizer step."""
        values = {"seconds/train": self._seconds(), "tokens/trained": float(self.tokens_before + self.tokens)}
        return values | ({} if self.first_step is None else {"seconds/first_step": self.first_step})


class StopOnSigterm(TrainerCallback):
    """Ends training after the step in which any process got SIGTERM, with a checkpoint of it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.requested = False
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if _over_processes(self.trainer, int(self.requested)):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens for SIGTERM within the block."""

        def request(*_: object) -> None:
            self.requested = True

        before = signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def train_to_end(trainer: Trainer, record: RunRecord, checkpoint: Path | None) -> dict[str, float]:
    """Trains from the start or a checkpoint; returns the metrics with the record's. SIGTERM saves and exits with 143."""
    stop = StopOnSigterm(trainer)
    for callback in (record, stop):
        trainer.add_callback(callback)
    with stop.listening():
        summary = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    if stop.stopped:
        logger.info("stopped after step %d and saved; the same command goes on from there", trainer.state.global_step)
        sys.exit(TERMINATED)
    return summary | record.summary()


def _over_processes(trainer: Trainer, value: int) -> int:
    """The sum of a number over all processes; the number itself where there is one."""
    if trainer.args.world_size == 1:
        return value
    return int(trainer.accelerator.reduce(torch.tensor(value, device=trainer.args.device)))
