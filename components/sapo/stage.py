"""What of the training stage is sapo's own: its plan with the memory it takes, its trainer, its checkpoints."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from components.common.core.conversations import Row
from components.common.models.chat_templates import EncodedRow, encode_rows
from components.common.models.loading import load_config
from components.common.training.config import HIDDEN
from components.common.training.distributed import launch
from components.common.training.distributed.processes import is_main_process
from components.common.training.resume import ResumableStageConfig, checkpoint_to_resume
from components.common.training.trainer_stage import TrainerStage
from components.sapo.checkpoint import complete_checkpoints, require_complete
from components.sapo.config import SAPOConfig
from components.sapo.lora import load_policy
from components.sapo.planning.describe import Node, describe
from components.sapo.trainer import SAPOTrainer

logger = logging.getLogger(__name__)


class SAPOStage(TrainerStage[SAPOConfig, EncodedRow]):
    """Self-Augmented Preference Optimization."""

    name: ClassVar[str] = "sapo"
    config_classes: ClassVar[Sequence[type]] = (ResumableStageConfig, SAPOConfig)
    hidden: ClassVar[Sequence[str]] = (*HIDDEN, "log_dir")
    published: ClassVar[Sequence[str]] = (
        "train_loss",
        "train_runtime",
        "eval_rewards/margins",
        "eval_rewards/accuracies",
    )
    trainer: SAPOTrainer

    @property
    def title(self) -> str:
        return f"sapo-{self.settings.loss_type}"

    def find_checkpoint(self) -> Path | None:
        return checkpoint_to_resume(self.config, complete_checkpoints, require_complete)

    def encoded(self, rows: list[Row]) -> tuple[list[EncodedRow], int]:
        window = self.settings.max_length
        return encode_rows(self.tokenizer, rows, min(self.config.max_prompt_length, window), window)

    def check_identity(self, checkpoint: Path | None) -> None:
        """The trainer does, when it goes on from the checkpoint."""

    def planned(self) -> list[str]:
        config = self.config
        processes = launch.process_count(config.num_processes)
        node = Node(processes, config.parallelism, config.gpu_memory, self.given["use_cpu"])
        return describe(list(self.train_rows), self.dropped, load_config(config.start_model), self.settings, node)

    def make_trainer(self, args: SAPOConfig) -> SAPOTrainer:
        args.log_dir = str(self.config.log_directory())
        return SAPOTrainer(
            load_policy(self.config.start_model, args),
            args,
            self.train_rows,
            self.held_out,
            processing_class=self.tokenizer,
            clock=self.clock,
        )

    def train(self, checkpoint: Path | None) -> dict[str, float]:
        try:
            metrics = self.run_trainer(checkpoint)
            if checkpoint and "train_loss" in metrics:
                # The trainer goes on with the sum of the whole run; `Trainer` divides it by the steps of this process.
                metrics["train_loss"] = self.trainer._total_loss_scalar / self.trainer.state.global_step
            return metrics | self.trainer.wall_clock()
        finally:
            if close := getattr(self.trainer.sampler, "close", None):  # an engine in processes of its own
                close()

    def evaluate(self) -> dict[str, float]:
        metrics = super().evaluate()
        margin = metrics.get("eval_rewards/margins")
        if margin is not None and is_main_process():
            logger.info("margin on held-out pairs since the start: %+.4f", margin)
        return metrics

    def save_model(self, output: Path) -> None:
        self.trainer.save_trained(output)
