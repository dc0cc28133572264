"""sft: supervised fine-tuning on response tokens, with TRL's SFTTrainer.

The tokens are those of every other stage: the prompt under the chat template, then the response and one end-of-turn token.
Only response tokens carry loss.

    python -m components.sft --config tiny --data runs/data --model runs/model --output runs/sft
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from components.common.cli import ConfigParser, check_output, run_stage
from components.common.conversations import read_rows
from components.common.kfp_outputs import publish

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    from components.common.models import load_model, load_tokenizer
    from components.common.processes import is_first, leave, prepare_output_once
    from components.common.training import HIDDEN, TrainingStageConfig, stage_arguments
    from components.sft.config import SFTSettings

    parser = ConfigParser("sft", [TrainingStageConfig, SFTSettings], hidden=HIDDEN)
    if {"-h", "--help"} & set(argv):
        print(parser.help(__doc__ or ""))
        return
    stage, args = parser.parse(argv)

    check_output(stage.output, stage.overwrite)
    tokenizer = load_tokenizer(stage.model)
    train, dropped = _dataset(tokenizer, stage, args, "train", limit=None)
    evaluation = _dataset(tokenizer, stage, args, "test", stage.eval_rows)[0] if stage.eval_rows else None
    tokens = sum(len(ids) for ids in train["input_ids"])
    steps = _steps(_sequences(train, args), args)
    plan = f"{len(train)} rows ({dropped} dropped: prompt too long), {tokens:,} tokens an epoch, {steps} steps"
    if is_first():
        print(f"plan: {plan}; writes {stage.output}") if stage.dry_run else logger.info(plan)
    if stage.dry_run:
        return

    output = prepare_output_once(stage.output, stage.overwrite)
    args = dataclasses.replace(args, **stage_arguments(stage.log_directory()))
    attention = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    model = load_model(stage.model, "float32", **attention)
    trainer, summary = _train(model, tokenizer, train, evaluation, args)
    _write(stage, args, trainer, summary, output)
    leave()


def _dataset(tokenizer: Any, stage: Any, args: Any, split: str, limit: int | None) -> tuple[Any, int]:
    """Rows as (`input_ids`, `completion_mask`), 1 on response tokens; and how many were dropped."""
    from datasets import Dataset, disable_progress_bars

    from components.common.chat_templates import encode_rows

    disable_progress_bars()  # of what TRL maps over the rows; training has its own
    rows = read_rows(stage.data, split)[:limit]
    encoded, dropped = encode_rows(tokenizer, rows, min(stage.max_prompt_length, args.max_length), args.max_length)
    columns = {
        "input_ids": [row["prompt_ids"] + row["chosen_ids"] for row in encoded],
        "completion_mask": [[0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]) for row in encoded],
    }
    return Dataset.from_dict(columns), dropped


def _sequences(train: Any, args: Any) -> int:
    """How many rows the trainer will see: packed ones hold several samples."""
    if not args.packing:
        return len(train)
    from trl import pack_dataset

    return len(pack_dataset(train.select_columns(["input_ids"]), args.max_length, args.packing_strategy))


def _steps(rows: int, args: Any) -> int:
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return math.ceil(rows / per_step) * math.ceil(args.num_train_epochs)


def _train(model: Any, tokenizer: Any, train: Any, evaluation: Any, args: Any) -> tuple[Any, dict[str, float]]:
    from trl import SFTTrainer

    from components.common.processes import show_progress_once
    from components.common.training import final_evaluation

    trainer = SFTTrainer(model, args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer)
    show_progress_once(trainer, "sft")
    summary = trainer.train().metrics
    if evaluation is not None:
        summary |= final_evaluation(trainer)
    return trainer, summary


def _write(stage: Any, args: Any, trainer: Any, summary: dict[str, float], output: Any) -> None:
    from components.common.processes import is_first, save_model_once
    from components.common.training import write_training_log

    save_model_once(trainer, output)
    if not is_first():
        return
    settings = dataclasses.asdict(stage) | args.to_dict()
    write_training_log(stage.log_directory(), "sft", stage.name or "sft", trainer, settings, summary)
    logger.info("trained %d steps in %.0f s, wrote %s", trainer.state.global_step, summary["train_runtime"], output)
    published = {k: v for k, v in summary.items() if k in ("train_loss", "eval_loss", "train_runtime")}
    publish(stage.executor_input, {"metrics": published})


if __name__ == "__main__":
    run_stage(main)
