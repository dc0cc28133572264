"""SIGTERM while a stage trains: it finishes what is under way, saves, and leaves with exit code 143.

Outside of training there is nothing to save; a stage that sends its output to a bucket leaves its lease there
(`components/common/stage/session.py`), any other simply ends.
"""

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from components.common.training.distributed.processes import any_process, is_main_process

logger = logging.getLogger(__name__)


class StoppedError(Exception):
    """Training was told to stop, and has saved what it had. The text says where, such as "after step 3"."""


class StopRequest:
    """Whether training has been told to stop.

    Attributes:
        requested: this process was told. A signal sets it; whoever else wants training to stop may do so too.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is a request within the block."""
        speaks = is_main_process()

        def request(number: int, frame: FrameType | None) -> None:
            told_before, self.requested = self.requested, True
            if speaks and not told_before:
                # The signal may come in the middle of a write to the same stream, which then refuses this one.
                with contextlib.suppress(RuntimeError):
                    logger.info("SIGTERM: finishing what is under way, then saving")

        before = signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def agreed(self) -> bool:
        """Whether any process was told. All processes must call this, and get the same answer, so that they stop together."""
        self.requested = any_process(self.requested)
        return self.requested


class StopCallback(TrainerCallback):
    """Ends the training of a `Trainer` with a checkpoint, after the step in which any process was told to stop.

    Attributes:
        stopped: it has; also where that step was the last one.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.agreed():
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
