"""What every training stage does, from its arguments to its output. A stage says what is its own in a `TrainingStage`.

def main(argv):         # of a stage's __main__.py
    clock = Clock()     # before torch is imported: that counts too
    from components.common.training.skeleton import run_training
    from components.dpo.stage import DPOStage

    run_training(DPOStage, __doc__, argv, clock)
"""

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from components.common.core.errors import TERMINATED
from components.common.stage.kfp import publish
from components.common.stage.parser import ConfigParser
from components.common.training.clock import Clock
from components.common.training.config import TrainingStageConfig
from components.common.training.distributed import launch
from components.common.training.distributed.processes import destroy_process_group, is_main_process
from components.common.training.stop import StoppedError, StopRequest

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainingStageConfig)
Settings = TypeVar("Settings")


def run_training(
    stage_class: "type[TrainingStage[Any, Any]]", description: str, argv: Sequence[str], clock: Clock
) -> None:
    """Runs a training stage.

    Args:
        description: the text that opens `--help`.
        clock: made when the stage started.

    Raises:
        UserError: wrong input; nothing has been written then.
        SystemExit: with 143 after a SIGTERM that came while it trained; the same command goes on. In the supervisor of several
            processes, with their exit code.
    """
    parser = ConfigParser(stage_class.name, stage_class.config_classes, stage_class.hidden)
    if {"-h", "--help"} & set(argv):
        print(parser.help(description))
        return

    # With `--num_processes 8` this process becomes the supervisor of eight that run the same command, and stays here.
    launch.start(parser, argv)
    config, settings = parser.parse(argv)
    stage = stage_class(config, settings, parser.settings(argv), clock)

    # An output that is in the way is told before rows are read, and a checkpoint of another run before a model is loaded.
    checkpoint = stage.find_checkpoint()
    stage.encode()
    stage.check_identity(checkpoint)

    _show(stage.plan(checkpoint), config.dry_run)
    if config.dry_run:
        return

    stage.prepare_output(checkpoint)
    stage.load()
    try:
        with stage.stop.listening():
            summary = stage.train(checkpoint)
    except StoppedError as place:
        _say("stopped %s and saved; the same command goes on from there", place)
        destroy_process_group()
        sys.exit(TERMINATED)

    summary |= stage.evaluate()
    stage.write(summary)
    destroy_process_group()


def _show(plan: list[str], dry_run: bool) -> None:
    for line in plan if dry_run or is_main_process() else []:
        print(line) if dry_run else logger.info(line)


def _say(message: str, *values: object) -> None:
    if is_main_process():
        logger.info(message, *values)


class TrainingStage(ABC, Generic[Config, Settings]):
    """What is a stage's own. `run_training` calls the methods in the order in which they stand here.

    Attributes:
        name: as in `python -m components.NAME`.
        config_classes: of `config` and `settings`.
        hidden: inherited settings that the stage sets itself.
        published: names in the summary that Kubeflow Pipelines is told.
        given: every setting by name as it was given, before what depends on the machine was settled.
        stop: whether SIGTERM has come; `train` answers it.
    """

    name: ClassVar[str]
    config_classes: ClassVar[Sequence[type]]
    hidden: ClassVar[Sequence[str]] = ()
    published: ClassVar[Sequence[str]] = ()

    def __init__(self, config: Config, settings: Settings, given: Mapping[str, Any], clock: Clock) -> None:
        self.config = config
        self.settings = settings
        self.given = given
        self.clock = clock
        self.stop = StopRequest()

    @abstractmethod
    def find_checkpoint(self) -> Path | None:
        """What an interrupted run has left, to go on from; None for a new run.

        Raises:
            UserError: the output holds something else.
        """

    @abstractmethod
    def encode(self) -> None:
        """Reads the rows and makes tokens of them."""

    @abstractmethod
    def check_identity(self, checkpoint: Path | None) -> None:
        """Raises UserError where the checkpoint is of a run with other settings or rows."""

    @abstractmethod
    def plan(self, checkpoint: Path | None) -> list[str]:
        """Lines that say what will be done: the text of `--dry_run`."""

    @abstractmethod
    def prepare_output(self, checkpoint: Path | None) -> None:
        """Makes the output directory, or empties it, for a new run."""

    @abstractmethod
    def load(self) -> None:
        """Loads what is trained."""

    @abstractmethod
    def train(self, checkpoint: Path | None) -> dict[str, float]:
        """Trains to the end; returns the metrics by name.

        Raises:
            StoppedError: `stop` was requested, and what is needed to go on is saved.
        """

    def evaluate(self) -> dict[str, float]:
        """Metrics of held-out rows at the end, by name."""
        return {}

    @abstractmethod
    def write(self, summary: dict[str, float]) -> None:
        """Writes the model and the training log, tells Kubeflow Pipelines, and removes what the run needed meanwhile."""

    @property
    def title(self) -> str:
        """What the stage trains, in a word."""
        return self.name

    @property
    def run_name(self) -> str:
        """What the report calls the run."""
        return self.config.name or self.title

    def publish(self, summary: dict[str, float]) -> None:
        """Tells Kubeflow Pipelines the `published` metrics."""
        metrics = {name: value for name, value in summary.items() if name in self.published}
        publish(self.config.executor_input, {"metrics": metrics})
