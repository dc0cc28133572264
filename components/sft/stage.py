"""What of the training stage is sft's own: rows with a mask over response tokens, packing, TRL's SFTTrainer."""

from collections.abc import Sequence
from typing import ClassVar, TypedDict

from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer, pack_dataset

from components.common.core.conversations import Row
from components.common.models.chat_templates import encode_rows
from components.common.models.loading import load_model
from components.common.training.distributed import launch
from components.common.training.resume import ResumableStageConfig
from components.common.training.steps import steps_of_run
from components.common.training.trainer import InterruptibleTrainer
from components.common.training.trainer_stage import TrainerStage
from components.sft.config import SFTSettings


class MaskedRow(TypedDict):
    """A row as TRL takes it: prompt and response as token ids, and 1 for each token of the response."""

    input_ids: list[int]
    completion_mask: list[int]


class ResponseSFTTrainer(InterruptibleTrainer, SFTTrainer):
    """TRL's SFTTrainer."""


class SFTStage(TrainerStage[SFTSettings, MaskedRow]):
    """Supervised fine-tuning on response tokens."""

    name: ClassVar[str] = "sft"
    config_classes: ClassVar[Sequence[type]] = (ResumableStageConfig, SFTSettings)
    published: ClassVar[Sequence[str]] = ("train_loss", "eval_loss", "train_runtime")

    def encoded(self, rows: list[Row]) -> tuple[list[MaskedRow], int]:
        window = self.settings.max_length
        assert window is not None  # the settings refuse it
        return masked_rows(self.tokenizer, rows, self.config.max_prompt_length, window)

    def sequences(self) -> int:
        return count_sequences(self.train_rows, self.settings)

    def planned(self) -> list[str]:
        processes = launch.process_count(self.config.num_processes)
        tokens = sum(len(row["input_ids"]) for row in self.train_rows)
        steps, _ = steps_of_run(self.sequences(), self.settings, processes)
        rows = f"{len(self.train_rows)} rows ({self.dropped} dropped: prompt too long)"
        return [f"plan: {rows}, {tokens:,} tokens an epoch, {steps} steps; writes {self.config.output}"]

    def make_trainer(self, args: SFTSettings) -> ResponseSFTTrainer:
        disable_progress_bars()  # of what TRL maps over the rows; training has its own
        attention = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
        trainer = ResponseSFTTrainer(
            load_model(self.config.start_model, "float32", **attention),
            args,
            train_dataset=Dataset.from_list(self.train_rows),
            eval_dataset=Dataset.from_list(self.held_out) if self.held_out else None,
            processing_class=self.tokenizer,
        )
        trainer.clock = self.clock
        return trainer


def masked_rows(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_prompt_length: int, max_length: int
) -> tuple[list[MaskedRow], int]:
    """Rows as tokens, and how many were dropped because their prompt is too long."""
    encoded, dropped = encode_rows(tokenizer, rows, min(max_prompt_length, max_length), max_length)
    masked: list[MaskedRow] = [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]),
        }
        for row in encoded
    ]
    return masked, dropped


def count_sequences(rows: Sequence[MaskedRow], args: SFTSettings) -> int:
    """How many rows the trainer will see: a packed one holds several."""
    if not args.packing:
        return len(rows)
    assert args.max_length is not None  # the settings refuse it
    ids = Dataset.from_dict({"input_ids": [row["input_ids"] for row in rows]})
    return len(pack_dataset(ids, args.max_length, args.packing_strategy))
