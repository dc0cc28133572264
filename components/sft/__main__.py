"""sft: supervised fine-tuning on response tokens, with TRL's SFTTrainer.

The tokens are those of every other stage: the prompt under the chat template, then the response and one end-of-turn token.
Only response tokens carry loss.

    python -m components.sft --config tiny --data runs/data --model runs/model --output runs/sft

A run that was interrupted (SIGTERM saves first and exits with 143) goes on when the same command is given again.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.core.conversations import Row, read_rows
from components.common.stage.kfp import publish
from components.common.stage.parser import ConfigParser
from components.common.stage.run import run_stage
from components.common.training.distributed import launch

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    started = time.perf_counter()
    from components.common.models.loading import load_tokenizer
    from components.common.training.config import HIDDEN
    from components.common.training.distributed.processes import (
        destroy_process_group,
        is_main_process,
        prepare_output_on_main_process,
    )
    from components.common.training.resume import (
        ResumableStageConfig,
        RunRecord,
        check_identity,
        checkpoint_to_resume,
        run_identity,
    )
    from components.sft.config import SFTSettings

    parser = ConfigParser("sft", [ResumableStageConfig, SFTSettings], hidden=HIDDEN)
    if {"-h", "--help"} & set(argv):
        print(parser.help(__doc__ or ""))
        return
    launch.start(parser, argv)
    stage, args = parser.parse(argv)

    held_out = stage.held_out_rows(args.eval_strategy)
    checkpoint = checkpoint_to_resume(stage)
    tokenizer = load_tokenizer(stage.model)
    train, dropped = _dataset(tokenizer, stage, args, read_rows(stage.data, "train"))
    evaluation = _dataset(tokenizer, stage, args, held_out)[0] if held_out else None
    identity = run_identity(stage, args, train, evaluation, _sequences(train, args))
    if checkpoint:
        check_identity(checkpoint, identity)
    if is_main_process():
        for line in _plan(train, dropped, args, checkpoint, stage.output):
            print(line) if stage.dry_run else logger.info(line)
    if stage.dry_run:
        return

    if not checkpoint:
        prepare_output_on_main_process(stage.output, overwrite=True)
    trainer = _trainer(stage, args, tokenizer, train, evaluation)
    summary = _train(trainer, RunRecord(started, identity, trainer), checkpoint)
    _write(stage, args, trainer, summary)
    destroy_process_group()


def _dataset(tokenizer: Any, stage: Any, args: Any, rows: list[Row]) -> tuple[Any, int]:
    """Rows as (`input_ids`, `completion_mask`), 1 on response tokens; and how many were dropped."""
    from datasets import Dataset, disable_progress_bars

    from components.common.models.chat_templates import encode_rows

    disable_progress_bars()  # of what TRL maps over the rows; training has its own
    encoded, dropped = encode_rows(tokenizer, rows, min(stage.max_prompt_length, args.max_length), args.max_length)
    columns = {
        "input_ids": [row["prompt_ids"] + row["chosen_ids"] for row in encoded],
        "completion_mask": [[0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]) for row in encoded],
    }
    return Dataset.from_dict(columns), dropped


def _plan(train: Any, dropped: int, args: Any, checkpoint: Path | None, output: str) -> list[str]:
    """What will be done: the text of `--dry_run`."""
    tokens, steps = sum(len(ids) for ids in train["input_ids"]), _steps(_sequences(train, args), args)
    rows = f"{len(train)} rows ({dropped} dropped: prompt too long), {tokens:,} tokens an epoch, {steps} steps"
    return [f"plan: {rows}; writes {output}", *([f"resumes from {checkpoint}"] if checkpoint else [])]


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


def _trainer(stage: Any, args: Any, tokenizer: Any, train: Any, evaluation: Any) -> Any:
    from trl import SFTTrainer

    from components.common.models.loading import load_model
    from components.common.training.config import stage_arguments
    from components.common.training.log import show_progress_on_main_process

    places = stage_arguments(stage.log_directory()) | {"output_dir": str(Path(stage.output) / "checkpoints")}
    args = dataclasses.replace(args, **places)
    attention = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    model = load_model(stage.model, "float32", **attention)
    trainer = SFTTrainer(model, args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer)
    show_progress_on_main_process(trainer, "sft")
    return trainer


def _train(trainer: Any, record: Any, checkpoint: Path | None) -> dict[str, float]:
    from components.common.training.log import final_evaluation
    from components.common.training.resume import train_to_end

    summary = train_to_end(trainer, record, checkpoint)
    return summary | (final_evaluation(trainer) if trainer.eval_dataset is not None else {})


def _write(stage: Any, args: Any, trainer: Any, summary: dict[str, float]) -> None:
    from components.common.training.distributed.processes import is_main_process
    from components.common.training.log import write_training_log
    from components.common.training.resume import remove_checkpoints
    from components.common.training.saving import save_model_on_main_process

    save_model_on_main_process(trainer, Path(stage.output))
    if not is_main_process():
        return
    settings = dataclasses.asdict(stage) | args.to_dict()
    write_training_log(stage.log_directory(), "sft", stage.name or "sft", trainer, settings, summary)
    remove_checkpoints(stage)
    logger.info(
        "trained %d steps in %.0f s, wrote %s", trainer.state.global_step, summary["seconds/train"], stage.output
    )
    published = {k: v for k, v in summary.items() if k in ("train_loss", "eval_loss", "train_runtime")}
    publish(stage.executor_input, {"metrics": published})


if __name__ == "__main__":
    run_stage(main)
