"""What the paired baselines share (dpo, orpo, and spin's training): pairs as tokens, settings, trainers, the whole stage.

TRL's trainers are fed token ids that are made here, so that every stage trains on the same tokens: the prompt under the
chat template, then each response and one end-of-turn token. TRL tokenises, adds and cuts nothing.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO lives in trl.experimental; the version is pinned

from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from components.common.core.conversations import Row
from components.common.core.errors import UserError
from components.common.models.chat_templates import encode_rows
from components.common.stage.config import setting
from components.common.training.config import settle_device
from components.common.training.roles import TrainerSettings
from components.common.training.trainer import InterruptibleTrainer

Loss = Literal["dpo", "orpo"]


class EncodedPair(TypedDict):
    """A row as token ids: the prompt with the assistant's header, and both responses with their end-of-turn token."""

    id: NotRequired[str]
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_prompt_length: int, max_length: int
) -> tuple[list[EncodedPair], int]:
    """Tokenises chosen and rejected responses exactly as `encode_rows` does chosen ones.

    Returns:
        the pairs, and how many rows were dropped because their prompt is too long.

    Raises:
        UserError: a row has no rejected response, or no row is left.
    """
    as_chosen: list[Row] = []
    for row in rows:
        if not row.get("rejected"):
            raise UserError(
                f"row {row['id']}: has no `rejected` response; take paired data (such as capybara), or give it one with "
                "the data stage's --rejected other_conversation"
            )
        as_chosen.append({**row, "chosen": row["rejected"]})
    chosen, dropped = encode_rows(tokenizer, list(rows), max_prompt_length, max_length)
    rejected, _ = encode_rows(tokenizer, as_chosen, max_prompt_length, max_length)
    pairs: list[EncodedPair] = [
        {**better, "rejected_ids": worse["chosen_ids"]} for better, worse in zip(chosen, rejected, strict=True)
    ]
    return pairs, dropped


@dataclasses.dataclass(kw_only=True)
class PreferenceSettings(TrainerSettings):
    """Settings that both losses share, with values of our own; goes in front of TRL's config in the order of classes."""

    max_length: int | None = setting(2048, "Tokens of prompt + response; a longer response is cut.", "2048")
    num_train_epochs: float = setting(3.0, "Passes over the rows.", "3; 4 for ORPO on LLaMA")
    per_device_train_batch_size: int = setting(8, "Pairs of a micro-batch on each device.", "not given; 8 on 8 GPUs")
    bf16: bool | None = setting(None, "Mixed precision in bfloat16; `none` means where the GPU or CPU is fast at it.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in backward: less memory, more time.")
    save_strategy: str = setting("steps", "When to save checkpoints: steps, epoch or no.")
    save_steps: float = setting(50, "Optimizer steps between checkpoints.")
    save_total_limit: int | None = setting(2, "Checkpoints kept; older ones are removed.")
    report_to: str | list[str] = setting("tensorboard", "Where curves go: tensorboard, wandb, mlflow, none.")
    logging_steps: float = setting(10, "Optimizer steps between log entries.")
    seed: int = setting(42, "Seed of everything random.", "not given; 42")

    def __post_init__(self) -> None:
        """Checks values, and settles defaults that depend on the machine, before TRL and transformers see them."""
        args: Any = self
        for name in ("beta", "learning_rate", "num_train_epochs"):
            self._require(name, getattr(args, name) > 0, "must be above 0")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            self._require(name, getattr(args, name) >= 1, "must be 1 or more")
        window = args.max_length
        self._require("max_length", window is not None and window >= 2, "must be 2 or more (a prompt and a response)")
        limit = args.save_total_limit
        self._require("save_total_limit", limit is None or limit >= 1, "must be 1 or more, or none to keep all")
        settle_device(args)
        args.dataloader_pin_memory = args.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()  # type: ignore[misc]  # TRL's

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)!r}: {allowed}")


@dataclasses.dataclass(kw_only=True)
class DPOSettings(PreferenceSettings, DPOConfig):  # type: ignore[misc]
    """TRL's `DPOConfig` with the paper's values as defaults."""

    beta: float = setting(0.1, "Strength of the pull towards the reference.", "0.1")
    learning_rate: float = setting(5e-7, "Peak learning rate.", "5e-7")
    optim: str = setting("rmsprop", "Optimizer by transformers' name.", "RMSprop")
    lr_scheduler_type: str = setting("linear", "Learning rate schedule.", "not given; linear")
    warmup_steps: float = setting(0.1, "Steps of warm-up, or a share of all steps below 1.", "not given; 0.1")


@dataclasses.dataclass(kw_only=True)
class ORPOSettings(PreferenceSettings, ORPOConfig):  # type: ignore[misc]
    """TRL's `ORPOConfig` with the paper's values as defaults."""

    beta: float = setting(0.05, "Weight of the odds-ratio term: the paper's lambda.", "0.05")
    learning_rate: float = setting(5e-6, "Peak learning rate.", "5e-6")
    optim: str = setting("adamw_torch_fused", "Optimizer by transformers' name.", "AdamW")
    lr_scheduler_type: str = setting("inverse_sqrt", "Learning rate schedule.", "not given; inverse_sqrt")
    warmup_steps: float = setting(100, "Steps of warm-up, or a share of all steps below 1.", "not given; 100")
    remove_unused_columns: bool = setting(False, "Stays off: TRL's collator takes columns that the model does not.")


class PairDPOTrainer(InterruptibleTrainer, DPOTrainer):
    """TRL's DPOTrainer on pairs that are tokens already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class PairORPOTrainer(InterruptibleTrainer, ORPOTrainer):
    """TRL's ORPOTrainer on pairs that are tokens already, in the columns that its collator takes."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        return feature


def preference_trainer(
    loss: Loss,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    args: Any,
    train: Sequence[EncodedPair],
    evaluation: Sequence[EncodedPair] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> InterruptibleTrainer:
    """TRL's trainer of a loss on these pairs.

    Args:
        loss: "dpo" with `DPOSettings`, or "orpo" with `ORPOSettings`.
        reference: DPO's frozen model: loaded on its own, never a copy of a model that a trainer was given (TRL binds
            `forward` to the instance, so a copy would run the original's weights). None for ORPO.

    Raises:
        ValueError: a pair is longer than `args.max_length`, or the reference is missing or not needed.
    """
    if (loss == "dpo") != (reference is not None):
        raise ValueError(f"loss {loss}: DPO needs a reference model, ORPO has none")
    disable_progress_bars()  # of what TRL maps over the rows; training has its own
    to_columns = _dpo_columns if loss == "dpo" else _orpo_columns
    train_rows = _dataset(train, to_columns, args.max_length)
    evaluation_rows = _dataset(evaluation, to_columns, args.max_length) if evaluation else None
    options = {"train_dataset": train_rows, "eval_dataset": evaluation_rows, "processing_class": tokenizer}
    if reference is not None:
        return PairDPOTrainer(model, reference, args, **options)
    return PairORPOTrainer(model, args, **options)


def _dataset(pairs: Sequence[EncodedPair], to_columns: Any, max_length: int) -> Dataset:
    for pair in pairs:
        longest = len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        if longest > max_length:  # TRL would cut it without a word
            raise ValueError(f"pair {pair.get('id')}: {longest} tokens, max_length is {max_length}; use encode_pairs")
    return Dataset.from_list([to_columns(pair) for pair in pairs])


def _dpo_columns(pair: EncodedPair) -> dict[str, list[int]]:
    return {
        "prompt_ids": pair["prompt_ids"],
        "chosen_ids": pair["chosen_ids"],
        "rejected_ids": pair["rejected_ids"],
    }


def _orpo_columns(pair: EncodedPair) -> dict[str, list[int]]:
    """Whole sequences with their labels: the prompt is masked there (L_SFT does not look at labels; see orpo's README)."""
    columns = {}
    prompt = pair["prompt_ids"]
    for name, response in (("chosen", pair["chosen_ids"]), ("rejected", pair["rejected_ids"])):
        columns[f"{name}_input_ids"] = prompt + response
        columns[f"{name}_attention_mask"] = [1] * len(prompt + response)
        columns[f"{name}_labels"] = [-100] * len(prompt) + response
    return columns
