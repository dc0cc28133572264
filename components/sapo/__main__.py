"""sapo: Self-Augmented Preference Optimization (arXiv 2405.20830).

An EMA copy of the policy rewrites a random segment of each chosen response; the pairs enter a replay buffer; the policy
trains on draws from it with a DPO or ORPO loss. "paper" values are those of its LLaMA-3-8B and Mistral-7B runs.

    python -m components.sapo --config tiny-dpo --data runs/data --model runs/sft --output runs/sapo-dpo
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from components.common.cli import ConfigParser, check_output, prepare_output, run_stage
from components.common.conversations import read_rows
from components.common.kfp_outputs import publish

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    from components.common.chat_templates import encode_rows
    from components.common.models import load_config, load_model, load_tokenizer
    from components.common.training import HIDDEN, TrainingStageConfig, stage_arguments
    from components.sapo.config import SAPOConfig
    from components.sapo.plan import describe

    parser = ConfigParser("sapo", [TrainingStageConfig, SAPOConfig], hidden=HIDDEN)
    if {"-h", "--help"} & set(argv):
        print(parser.help(__doc__ or ""))
        return
    stage, args = parser.parse(argv)

    check_output(stage.output, stage.overwrite)
    tokenizer = load_tokenizer(stage.model)
    max_prompt_length = min(stage.max_prompt_length, args.max_length)
    train, dropped = encode_rows(tokenizer, read_rows(stage.data, "train"), max_prompt_length, args.max_length)
    held_out = read_rows(stage.data, "test")[: stage.eval_rows]
    evaluation = encode_rows(tokenizer, held_out, max_prompt_length, args.max_length)[0] if held_out else None
    for line in describe(train, dropped, load_config(stage.model), args):
        print(line) if stage.dry_run else logger.info(line)
    if stage.dry_run:
        return

    output = prepare_output(stage.output, stage.overwrite)
    args = dataclasses.replace(args, **stage_arguments(stage.log_directory()))
    model = load_model(stage.model, "float32")
    trainer, summary = _train(model, tokenizer, train, evaluation, args)
    _write(stage, args, trainer, summary, output)


def _train(model: Any, tokenizer: Any, train: Any, evaluation: Any, args: Any) -> tuple[Any, dict[str, float]]:
    from components.common.training import final_evaluation, show_progress
    from components.sapo.trainer import SAPOTrainer

    trainer = SAPOTrainer(model, args, train, evaluation, processing_class=tokenizer)
    show_progress(trainer, f"sapo-{args.loss_type}")
    summary = trainer.train().metrics
    if evaluation is not None:
        summary |= final_evaluation(trainer)
    return trainer, summary


def _write(stage: Any, args: Any, trainer: Any, summary: dict[str, float], output: Any) -> None:
    from components.common.training import save_model, write_training_log

    save_model(trainer, output)
    name = stage.name or f"sapo-{args.loss_type}"
    settings = dataclasses.asdict(stage) | args.to_dict()
    write_training_log(stage.log_directory(), "sapo", name, trainer, settings, summary)
    if (margin := summary.get("eval_rewards/margins")) is not None:
        logger.info("margin on held-out pairs since the start: %+.4f", margin)
    logger.info("trained %d steps in %.0f s, wrote %s", trainer.state.global_step, summary["train_runtime"], output)
    shown = ("train_loss", "train_runtime", "eval_rewards/margins", "eval_rewards/accuracies")
    publish(stage.executor_input, {"metrics": {k: v for k, v in summary.items() if k in shown}})


if __name__ == "__main__":
    run_stage(main)
