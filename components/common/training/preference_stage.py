"""What dpo and orpo share, which differ in the loss alone: the data's own pairs, trained on with TRL."""

from collections.abc import Sequence
from typing import ClassVar, TypeVar

from transformers import PreTrainedModel

from components.common.core.conversations import Row
from components.common.models.loading import load_model
from components.common.training.distributed import launch
from components.common.training.preference import (
    DPOSettings,
    EncodedPair,
    Loss,
    ORPOSettings,
    encode_pairs,
    preference_trainer,
)
from components.common.training.steps import steps_of_run
from components.common.training.trainer import InterruptibleTrainer
from components.common.training.trainer_stage import TrainerStage

Settings = TypeVar("Settings", DPOSettings, ORPOSettings)


class PreferenceStage(TrainerStage[Settings, EncodedPair]):
    """Trains on chosen and rejected responses.

    Attributes:
        loss: which of TRL's trainers.
    """

    loss: ClassVar[Loss]
    published: ClassVar[Sequence[str]] = (
        "train_loss",
        "train_runtime",
        "eval_loss",
        "eval_rewards/margins",
        "eval_rewards/accuracies",
    )

    def encoded(self, rows: list[Row]) -> tuple[list[EncodedPair], int]:
        window = self.settings.max_length
        assert window is not None  # the settings refuse it
        return encode_pairs(self.tokenizer, rows, min(self.config.max_prompt_length, window), window)

    def planned(self) -> list[str]:
        args, processes = self.settings, launch.process_count(self.config.num_processes)
        steps, per_epoch = steps_of_run(len(self.train_rows), args, processes)
        pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        tokens = sum(
            2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])
            for pair in self.train_rows
        )
        return [
            f"rows: {len(self.train_rows):,} ({self.dropped:,} dropped: prompt too long), {tokens:,} tokens an epoch",
            f"steps: {steps:,} ({per_epoch:,} an epoch) of {pairs} pairs, on {processes} process(es)",
        ]

    def load_reference(self) -> PreTrainedModel | None:
        """The frozen model that the loss compares with; None for a loss without one."""
        return None

    def make_trainer(self, args: Settings) -> InterruptibleTrainer:
        trainer = preference_trainer(
            self.loss,
            load_model(self.config.start_model, "float32"),
            self.load_reference(),
            args,
            self.train_rows,
            self.held_out,
            self.tokenizer,
        )
        trainer.clock = self.clock
        return trainer
