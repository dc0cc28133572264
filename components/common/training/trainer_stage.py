"""A training stage around one `transformers.Trainer`, whose checkpoints are in OUTPUT/checkpoints: sft, dpo, orpo and sapo."""

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from transformers import Trainer, TrainingArguments

from components.common.core.conversations import Row, read_rows
from components.common.models.loading import load_tokenizer
from components.common.training.config import HIDDEN, settle_process
from components.common.training.distributed.processes import is_main_process, prepare_output_on_main_process
from components.common.training.log import final_evaluation, show_progress, write_training_log
from components.common.training.resume import (
    ResumableStageConfig,
    RunRecord,
    check_identity,
    checkpoint_to_resume,
    remove_checkpoints,
    run_identity,
)
from components.common.training.saving import save_model
from components.common.training.skeleton import TrainingStage
from components.common.training.stop import StopCallback, StoppedError

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments", bound=TrainingArguments)
Encoded = TypeVar("Encoded", bound=Mapping[str, Any])


class TrainerStage(TrainingStage[ResumableStageConfig, Arguments], Generic[Arguments, Encoded]):
    """What such a stage has to say: how rows become tokens, what is planned, and what trains on them.

    Attributes:
        tokenizer: of the start model.
        train_rows: as tokens.
        held_out: the same of held-out rows; None where there are none.
        dropped: training rows that are left out because their prompt is too long.
        trainer: from `load` on.
    """

    hidden: ClassVar[Sequence[str]] = HIDDEN
    trainer: Trainer

    @abstractmethod
    def encoded(self, rows: list[Row]) -> tuple[Sequence[Encoded], int]:
        """Rows as tokens, and how many were dropped."""

    def sequences(self) -> int:
        """How many the trainer sees of `train_rows`: fewer where it packs several rows into one."""
        return len(self.train_rows)

    @abstractmethod
    def planned(self) -> list[str]:
        """The lines of the plan."""

    @abstractmethod
    def make_trainer(self, args: Arguments) -> Trainer:
        """Loads the model and makes what trains it on `train_rows`.

        Args:
            args: the settings, with the places to write to.
        """

    # ---- The steps of a training stage ----------------------------------------------------------------------------

    def find_checkpoint(self) -> Path | None:
        return checkpoint_to_resume(self.config)

    def encode(self) -> None:
        held_out = self.config.held_out_rows(self.settings.eval_strategy)
        self.tokenizer = load_tokenizer(self.config.start_model)
        self.train_rows, self.dropped = self.encoded(read_rows(self.config.data, "train"))
        self.held_out = self.encoded(held_out)[0] if held_out else None

    def check_identity(self, checkpoint: Path | None) -> None:
        self.identity = run_identity(self.config, self.settings, self.train_rows, self.held_out, self.sequences())
        if checkpoint:
            check_identity(checkpoint, self.identity)

    def plan(self, checkpoint: Path | None) -> list[str]:
        return [*self.planned(), *([f"resumes from {checkpoint}"] if checkpoint else [])]

    def prepare_output(self, checkpoint: Path | None) -> None:
        if not checkpoint:
            prepare_output_on_main_process(self.config.output, overwrite=True)

    def load(self) -> None:
        settle_process(self.config.log_directory())
        checkpoints = Path(self.config.output) / "checkpoints"
        args = dataclasses.replace(self.settings, output_dir=str(checkpoints), disable_tqdm=True)
        self.trainer = self.make_trainer(args)
        show_progress(self.trainer, self.title)

    def train(self, checkpoint: Path | None) -> dict[str, float]:
        record = RunRecord(self.trainer, self.clock, self.identity)
        self.trainer.add_callback(record)
        with self.clock.timed("train"):
            metrics = self.run_trainer(checkpoint)

        clock = self.clock.summary()
        # Trainer's own are those of this process.
        of_run = {"train_loss": record.train_loss(metrics), "train_runtime": clock["seconds/train"]}
        return metrics | clock | of_run

    def run_trainer(self, checkpoint: Path | None) -> dict[str, float]:
        """`Trainer.train` up to the end or to a request to stop; returns its metrics, which are those of this process."""
        stop = StopCallback(self.stop)
        self.trainer.add_callback(stop)
        result = self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.stopped:
            raise StoppedError(f"after step {self.trainer.state.global_step}")
        return result.metrics

    def evaluate(self) -> dict[str, float]:
        return {} if self.held_out is None else final_evaluation(self.trainer)

    def write(self, summary: dict[str, float]) -> None:
        output, state = Path(self.config.output), self.trainer.state
        self.save_model(output)
        if not is_main_process():
            return

        settings = dataclasses.asdict(self.config) | self.settings.to_dict()
        write_training_log(self.config.log_directory(), self.name, self.run_name, state, settings, summary)
        remove_checkpoints(self.config)
        logger.info("trained %d steps in %.0f s, wrote %s", state.global_step, summary["train_runtime"], output)
        self.publish(summary)

    def save_model(self, output: Path) -> None:
        """Writes the trained model; all processes call this."""
        save_model(self.trainer, output)
