"""sapo: Self-Augmented Preference Optimization (arXiv 2405.20830).

An EMA copy of the policy rewrites a random segment of each chosen response; the pairs enter a replay buffer; the policy
trains on draws from it with a DPO, ORPO or IPO loss. "paper" values are those of its LLaMA-3-8B and Mistral-7B runs.

    python -m components.sapo --config tiny-dpo --data runs/data --model runs/sft --output runs/sapo-dpo

A run that was interrupted (SIGTERM saves first and exits with 143) goes on when the same command is given again.
"""

import dataclasses
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.core.conversations import read_rows
from components.common.core.errors import TERMINATED
from components.common.stage.kfp import publish
from components.common.stage.parser import ConfigParser
from components.common.stage.run import run_stage
from components.common.training.clock import Clock
from components.common.training.distributed import launch

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    clock = Clock()
    from components.common.models.chat_templates import encode_rows
    from components.common.models.loading import load_config, load_tokenizer
    from components.common.training.config import HIDDEN
    from components.common.training.distributed.processes import (
        destroy_process_group,
        is_main_process,
        prepare_output_on_main_process,
    )
    from components.common.training.resume import ResumableStageConfig, checkpoint_to_resume
    from components.sapo.checkpoint import complete_checkpoints, require_complete
    from components.sapo.config import SAPOConfig
    from components.sapo.lora import load_policy
    from components.sapo.plan import Node, describe

    parser = ConfigParser("sapo", [ResumableStageConfig, SAPOConfig], hidden=(*HIDDEN, "log_dir"))
    if {"-h", "--help"} & set(argv):
        print(parser.help(__doc__ or ""))
        return
    launch.start(parser, argv)
    stage, args = parser.parse(argv)

    held_out = stage.held_out_rows(args.eval_strategy)
    checkpoint = checkpoint_to_resume(stage, complete_checkpoints, require_complete)
    tokenizer = load_tokenizer(stage.model)
    max_prompt_length = min(stage.max_prompt_length, args.max_length)
    train, dropped = encode_rows(tokenizer, read_rows(stage.data, "train"), max_prompt_length, args.max_length)
    evaluation = encode_rows(tokenizer, held_out, max_prompt_length, args.max_length)[0] if held_out else None
    processes = launch.process_count(stage.num_processes)
    node = Node(processes, stage.parallelism, stage.gpu_memory, parser.settings(argv)["use_cpu"])
    plan = describe(train, dropped, load_config(stage.model), args, node)
    if checkpoint:
        plan.append(f"resumes from {checkpoint}")
    for line in plan if stage.dry_run or is_main_process() else []:
        print(line) if stage.dry_run else logger.info(line)
    if stage.dry_run:
        return

    output = Path(stage.output) if checkpoint else prepare_output_on_main_process(stage.output, overwrite=True)
    trainer, summary = _train(
        load_policy(stage.model, args), tokenizer, train, evaluation, stage, args, checkpoint, clock
    )
    if trainer.stop_requested:
        if is_main_process():
            logger.info(
                "stopped after step %d and saved; the same command goes on from there", trainer.state.global_step
            )
        destroy_process_group()
        sys.exit(TERMINATED)
    _write(stage, args, trainer, summary, output)
    destroy_process_group()


def _train(
    model: Any,
    tokenizer: Any,
    train: Any,
    evaluation: Any,
    stage: Any,
    args: Any,
    checkpoint: Path | None,
    clock: Clock,
) -> tuple[Any, dict[str, float]]:
    from components.common.training.config import stage_arguments
    from components.common.training.distributed.processes import is_main_process
    from components.common.training.log import final_evaluation, show_progress_on_main_process
    from components.sapo.trainer import SAPOTrainer

    places = stage_arguments(stage.log_directory())
    places |= {"output_dir": str(Path(stage.output) / "checkpoints"), "log_dir": str(stage.log_directory())}
    trainer = SAPOTrainer(
        model, dataclasses.replace(args, **places), train, evaluation, processing_class=tokenizer, clock=clock
    )
    show_progress_on_main_process(trainer, f"sapo-{args.loss_type}")

    def stop(*_: object) -> None:
        if is_main_process():
            logger.info("SIGTERM: finishing the step, then saving")
        trainer.stop_requested = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        summary = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        summary |= trainer.wall_clock()
    finally:
        signal.signal(signal.SIGTERM, before)
        if close := getattr(trainer.sampler, "close", None):
            close()
    if evaluation is not None and not trainer.stop_requested:
        summary |= final_evaluation(trainer)
    return trainer, summary


def _write(stage: Any, args: Any, trainer: Any, summary: dict[str, float], output: Path) -> None:
    from components.common.training.distributed.processes import is_main_process
    from components.common.training.log import write_training_log
    from components.common.training.resume import remove_checkpoints

    trainer.save_trained(output)
    if not is_main_process():
        return
    name = stage.name or f"sapo-{args.loss_type}"
    settings = dataclasses.asdict(stage) | args.to_dict()
    write_training_log(stage.log_directory(), "sapo", name, trainer, settings, summary)
    remove_checkpoints(stage)
    if (margin := summary.get("eval_rewards/margins")) is not None:
        logger.info("margin on held-out pairs since the start: %+.4f", margin)
    logger.info("trained %d steps in %.0f s, wrote %s", trainer.state.global_step, summary["train_runtime"], output)
    shown = ("train_loss", "train_runtime", "eval_rewards/margins", "eval_rewards/accuracies")
    publish(stage.executor_input, {"metrics": {k: v for k, v in summary.items() if k in shown}})


if __name__ == "__main__":
    run_stage(main)
