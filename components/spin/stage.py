"""What of the training stage is spin's own: what it goes on from, and a loop of iterations in place of one trainer."""

import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from components.common.core.conversations import Row, read_rows
from components.common.core.errors import UserError
from components.common.models.chat_templates import EncodedRow, encode_rows
from components.common.models.loading import load_config, load_tokenizer
from components.common.stage.outputs import check_output
from components.common.stage.session import is_mirrored, when_complete
from components.common.training.clock import Clock
from components.common.training.config import settle_process
from components.common.training.distributed import launch
from components.common.training.distributed.processes import (
    is_main_process,
    on_main_process,
    prepare_output_on_main_process,
)
from components.common.training.skeleton import TrainingStage
from components.spin import snapshots
from components.spin.config import SPINSettings, SPINStageConfig
from components.spin.files import RunFiles, check_identity, identity, write_json
from components.spin.inputs import SPINInputs
from components.spin.iterations import SPINRun
from components.spin.results import write_results
from components.spin.schedule import describe, schedule, trainer_settings

logger = logging.getLogger(__name__)

# What a run that was killed before its first file leaves; anything else in the output is not ours to touch.
LEFTOVERS = {"spin", "training", "checkpoints"}


class SPINStage(TrainingStage[SPINStageConfig, SPINSettings]):
    """Self-Play Fine-Tuning."""

    name: ClassVar[str] = "spin"
    config_classes: ClassVar[Sequence[type]] = (SPINStageConfig, SPINSettings)
    published: ClassVar[Sequence[str]] = (
        "train_loss",
        "train_runtime",
        "eval_rewards/margins",
        "eval_rewards/accuracies",
        "seconds/first_step",
    )

    def __init__(self, config: SPINStageConfig, settings: SPINSettings, given: Mapping[str, Any], clock: Clock) -> None:
        super().__init__(config, settings, given, clock)
        self.files = RunFiles(Path(config.output))
        _check_settings(settings)

    @property
    def title(self) -> str:
        return f"spin-{self.settings.loss_type}"

    def find_checkpoint(self) -> Path | None:
        """The directory of a run under way, where there is one on this disk or in the bucket."""
        config, files = self.config, self.files
        if not (config.overwrite or config.dry_run):
            on_main_process(snapshots.adopt, files)
        if files.run.exists() and not config.overwrite:
            return files.root

        leftovers = files.output.is_dir() and {path.name for path in files.output.iterdir()} <= LEFTOVERS
        check_output(config.output, config.overwrite or leftovers)
        return None

    def encode(self) -> None:
        load_config(self.config.start_model)  # a model of an unknown kind is told first
        self.tokenizer = load_tokenizer(self.config.start_model)
        rows = read_rows(self.config.data, "train")[: self.settings.train_rows]
        self.train_rows, self.dropped = self._encoded(rows)
        held_out = self.config.held_out_rows()
        self.held_out = self._encoded(held_out)[0] if held_out else []

    def _encoded(self, rows: list[Row]) -> tuple[list[EncodedRow], int]:
        window = self.settings.max_length
        return encode_rows(self.tokenizer, rows, min(self.config.max_prompt_length, window), window)

    def check_identity(self, checkpoint: Path | None) -> None:
        self.identity = identity(self.config, self.settings, self.train_rows, self.held_out)
        if checkpoint:
            check_identity(self.files, self.identity)

    def plan(self, checkpoint: Path | None) -> list[str]:
        processes = launch.process_count(self.config.num_processes)
        plan = describe(len(self.train_rows), self.dropped, self.config.start_model, self.settings, processes)
        if checkpoint:
            plan.append(f"goes on with the run in {checkpoint}")
            complete = [str(i) for i in range(self.settings.iterations) if self.files.result(i) is not None]
            plan += [f"complete already: iterations {', '.join(complete)}"] if complete else []
        return plan

    def prepare_output(self, checkpoint: Path | None) -> None:
        if not checkpoint:
            prepare_output_on_main_process(self.config.output, overwrite=True)
            on_main_process(self._begin)

    def _begin(self) -> None:
        """Makes the directory one of this run."""
        self.files.root.mkdir()
        write_json(self.files.run, self.identity)

    def load(self) -> None:
        """Makes the run; each iteration loads its models itself."""
        settle_process(self.config.log_directory())
        inputs = SPINInputs(
            self.config.start_model,
            self.tokenizer,
            self.train_rows,
            self.held_out,
            self.settings,
            self.files,
            self.config.log_directory(),
        )
        if self.files.clock.exists():
            self.clock.load_state_dict(json.loads(self.files.clock.read_text(encoding="utf-8")))
        save = functools.partial(snapshots.save, self.files, self.config.keep_iterations)
        self.run = SPINRun(inputs, self.clock, self.stop, save if is_mirrored() else lambda: None)

    def train(self, checkpoint: Path | None) -> dict[str, float]:
        self.run.run()
        return self.clock.summary() | {"train_runtime": self.clock.run_seconds()}

    def write(self, summary: dict[str, float]) -> None:
        if not is_main_process():
            return
        settings = dataclasses.asdict(self.config) | dataclasses.asdict(self.settings)
        summary = write_results(self.run.inputs, summary, self.run_name, settings)
        if not self.config.keep_iterations:
            when_complete(self.files.remove, self.files.root)
        when_complete(lambda: shutil.rmtree(self.files.snapshots, ignore_errors=True), self.files.snapshots)
        logger.info(
            "generated for %.0f s, trained for %.0f s, first step after %.0f s; wrote %s",
            *(summary["seconds/generate"], summary["seconds/train"], summary["seconds/first_step"], self.config.output),
        )
        self.publish(summary)


def _check_settings(settings: SPINSettings) -> None:
    """Raises UserError for a value that transformers or TRL refuse, before anything is loaded."""
    try:
        for iteration in schedule(settings):
            trainer_settings(settings, iteration, "unused")
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error
