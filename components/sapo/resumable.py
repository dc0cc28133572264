"""`transformers.Trainer` with checkpoints that are made of parts, each of which saves and restores itself."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from components.common.core.errors import UserError
from components.common.core.identity import Identity
from components.common.training.clock import Clock
from components.common.training.distributed.processes import gather, is_main_process
from components.sapo import checkpoint
from components.sapo.checkpoint import CheckpointReader, CheckpointWriter, Stateful
from components.sapo.state import check_identity


class ResumableTrainer(Trainer):
    """Saves what `parts` names after a step, and goes on from there as if it had never stopped, bit for bit.

    A subclass answers the questions at the end, and calls `restore_running_loss` when its training begins.

    Attributes:
        clock: of the run.
    """

    clock: Clock
    _resumed: CheckpointReader | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, from a checkpoint of this run if one is given.

        Args:
            resume_from_checkpoint: a checkpoint's directory, or True for the newest complete one in `output_dir`.

        Raises:
            UserError: there is none, it is damaged, or it is of a run with other settings or rows.
        """
        if not resume_from_checkpoint:
            self.forget_after(0)
            return super().train(None, *args, **kwargs)

        reader = CheckpointReader(self._checkpoint_directory(resume_from_checkpoint))
        check_identity(reader, self.identity())
        self._resumed = reader
        self.forget_after(reader.step)

        if reader.step >= self.total_steps():
            return self._nothing_left(reader)
        return super().train(str(reader.directory), *args, **kwargs)

    def _checkpoint_directory(self, given: str | bool) -> Path:
        if given is not True:
            return Path(str(given))
        if found := checkpoint.complete_checkpoints(Path(str(self.args.output_dir))):
            return found[-1]
        raise UserError(f"{self.args.output_dir}: holds no complete checkpoint to resume from")

    def _nothing_left(self, reader: CheckpointReader) -> TrainOutput:
        """The run had ended when it was interrupted: only the trained weights and the log are needed."""
        self._prepare_for_training(self.total_steps(), self.get_train_dataloader(), None)
        self.state = TrainerState.load_from_json(str(reader.directory / "trainer_state.json"))
        return TrainOutput(self.state.global_step, math.nan, {"train_runtime": 0.0})

    def restore_running_loss(self) -> bool:
        """Goes on with the sums that `Trainer` resets when training begins; whether this run was resumed."""
        if self._resumed is None:
            return False

        checkpoint.load(self._resumed, {"trainer": RunningLoss(self)})
        return True

    # `Trainer` calls these. By itself it would look for files that are not there.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(str(self.args.output_dir))
        step = self.state.global_step

        with self.clock.timed("save"):
            writer = CheckpointWriter(directory / f"{checkpoint.PREFIX}{step}")
            checkpoint.save(writer, {**self.parts(), "random": checkpoint.RandomStates(), "trainer": RunningLoss(self)})
            if is_main_process():
                self.state.save_to_json(str(writer.add("trainer_state.json")))
            writer.json("settings", self.identity())
            writer.finish(step)

        if self.args.save_total_limit is not None and is_main_process():
            checkpoint.remove_old(directory, self.args.save_total_limit)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[Any, DataLoader]:
        """Wraps the model and makes the optimizer; then puts back what a checkpoint holds."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.model_is_prepared()

        if self._resumed is not None:
            checkpoint.load(self._resumed, self.parts())
            self.parts_are_restored()
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """All is put back once the model is prepared."""

    def _load_rng_state(self, checkpoint_directory: str | None) -> None:
        if self._resumed is not None:
            checkpoint.load(self._resumed, {"random": checkpoint.RandomStates()})

    # What a subclass answers.

    def parts(self) -> Mapping[str, Stateful]:
        """What a checkpoint holds, by name."""
        raise NotImplementedError

    def identity(self) -> Identity:
        """Which run this is: a checkpoint of another one is refused."""
        raise NotImplementedError

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        raise NotImplementedError

    def model_is_prepared(self) -> None:
        """The model is wrapped, and has its optimizer."""

    def parts_are_restored(self) -> None:
        """`parts` are those of the checkpoint."""

    def forget_after(self, step: int) -> None:
        """Drops what was written down of later steps, which the run takes again; of step 0 on, all of it."""


class RunningLoss:
    """`Trainer`'s sums for the next log entry, as a part of a checkpoint."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """The mean over processes of the loss since the last entry, and that of the whole run."""
        trainer = self.trainer
        return {
            "loss": float(np.mean(gather([float(trainer._tr_loss)]))),
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
        }

    def load_state_dict(self, state: Any) -> None:
        """Restores `state_dict`."""
        trainer = self.trainer
        trainer._tr_loss += state["loss"]
        trainer._total_loss_scalar = state["total_loss"]
        trainer._globalstep_last_logged = state["last_logged"]
