"""The dpo and orpo stages, which differ in the loss alone: read pairs, train with TRL, write model and training log.

A run that was interrupted (SIGTERM saves first and exits with 143) goes on when the same command is given again. Runs in one
process, or in several under `accelerate launch`: then the first one writes.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.core.conversations import Row, read_rows
from components.common.models.loading import load_model, load_tokenizer
from components.common.stage.kfp import publish
from components.common.stage.parser import ConfigParser
from components.common.training.config import HIDDEN, stage_arguments
from components.common.training.distributed import launch
from components.common.training.distributed.processes import (
    destroy_process_group,
    is_main_process,
    prepare_output_on_main_process,
)
from components.common.training.log import final_evaluation, show_progress_on_main_process, write_training_log
from components.common.training.preference import EncodedPair, Loss, encode_pairs, preference_trainer
from components.common.training.resume import (
    ResumableStageConfig,
    RunRecord,
    check_identity,
    checkpoint_to_resume,
    remove_checkpoints,
    run_identity,
    train_to_end,
)
from components.common.training.saving import save_model_on_main_process

logger = logging.getLogger(__name__)


def run(loss: Loss, settings: type, description: str, argv: Sequence[str], started: float) -> None:
    """Runs the stage.

    Args:
        settings: `DPOSettings` or `ORPOSettings`.
        description: the text that opens `--help`.
        started: `time.perf_counter()` of the stage's start.
    """
    parser = ConfigParser(loss, [ResumableStageConfig, settings], hidden=HIDDEN)
    if {"-h", "--help"} & set(argv):
        print(parser.help(description))
        return
    launch.start(parser, argv)
    stage, args = parser.parse(argv)

    held_out = stage.held_out_rows(args.eval_strategy)
    checkpoint = checkpoint_to_resume(stage)
    tokenizer = load_tokenizer(stage.model)
    train, dropped = _pairs(tokenizer, stage, args, read_rows(stage.data, "train"))
    evaluation = _pairs(tokenizer, stage, args, held_out)[0] if held_out else None
    identity = run_identity(stage, args, train, evaluation)
    if checkpoint:
        check_identity(checkpoint, identity)
    if is_main_process():
        for line in _plan(train, dropped, args, checkpoint):
            print(line) if stage.dry_run else logger.info(line)
    if stage.dry_run:
        return

    if not checkpoint:
        prepare_output_on_main_process(stage.output, overwrite=True)
    trainer = _trainer(loss, stage, args, train, evaluation, tokenizer)
    record = RunRecord(started, identity, trainer)
    summary = train_to_end(trainer, record, checkpoint)
    if evaluation is not None:
        summary |= final_evaluation(trainer)
    _write(loss, stage, args, trainer, summary)


def _pairs(tokenizer: Any, stage: Any, args: Any, rows: list[Row]) -> tuple[list[EncodedPair], int]:
    return encode_pairs(tokenizer, rows, min(stage.max_prompt_length, args.max_length), args.max_length)


def _plan(train: list[EncodedPair], dropped: int, args: Any, checkpoint: Path | None) -> list[str]:
    """Lines about rows, steps and tokens: the text of `--dry_run`."""
    micro_batches = math.ceil(len(train) / args.per_device_train_batch_size / args.world_size)
    steps_per_epoch = math.ceil(micro_batches / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in train)
    plan = [
        f"rows: {len(train):,} ({dropped:,} dropped: prompt too long), {tokens:,} tokens an epoch",
        f"steps: {steps:,} ({steps_per_epoch:,} an epoch) of {per_step} pairs, on {args.world_size} process(es)",
    ]
    return plan + ([f"resumes from {checkpoint}"] if checkpoint else [])


def _trainer(loss: Loss, stage: Any, args: Any, train: Any, evaluation: Any, tokenizer: Any) -> Any:
    places = stage_arguments(stage.log_directory()) | {"output_dir": str(Path(stage.output) / "checkpoints")}
    args = dataclasses.replace(args, **places)
    model = load_model(stage.model, "float32")
    reference = load_model(stage.model, "float32") if loss == "dpo" else None
    trainer = preference_trainer(loss, model, reference, args, train, evaluation, tokenizer)
    show_progress_on_main_process(trainer, loss)
    return trainer


def _write(loss: Loss, stage: Any, args: Any, trainer: Any, summary: dict[str, float]) -> None:
    output = Path(stage.output)
    save_model_on_main_process(trainer, output)
    if is_main_process():
        settings = dataclasses.asdict(stage) | args.to_dict()
        write_training_log(stage.log_directory(), loss, stage.name or loss, trainer, settings, summary)
        remove_checkpoints(stage)
        logger.info("trained %d steps in %.0f s, wrote %s", trainer.state.global_step, summary["seconds/train"], output)
        shown = ("train_loss", "train_runtime", "eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
        publish(stage.executor_input, {"metrics": {k: v for k, v in summary.items() if k in shown}})
    destroy_process_group()
