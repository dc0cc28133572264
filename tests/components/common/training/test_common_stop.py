"""SIGTERM while a stage trains: noted, told once, and answered by all processes after the same step."""

import logging
import signal
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

import components
from components.common.training import stop as stop_module
from components.common.training.stop import StopCallback, StopRequest

HANDLERS = {
    "common/training/stop.py",  # while a stage trains
    "common/stage/session.py",  # else, where a lease is held in a bucket
    "common/training/distributed/supervisor.py",  # in the launcher of several processes
}


def end_step(stop: StopRequest, step: int = 3) -> tuple[StopCallback, TrainerControl]:
    callback, control = StopCallback(stop), TrainerControl()
    callback.on_step_end(None, TrainerState(global_step=step, max_steps=5), control)
    return callback, control


def test_within_the_block_sigterm_is_a_request_and_after_it_what_it_was_before():
    before, stop = signal.getsignal(signal.SIGTERM), StopRequest()
    with stop.listening():
        assert not stop.agreed()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_is_told_once_and_by_one_process(caplog, monkeypatch):
    for speaks, lines in ((True, 1), (False, 0)):
        monkeypatch.setattr(stop_module, "is_main_process", lambda speaks=speaks: speaks)
        caplog.clear()
        with caplog.at_level(logging.INFO), StopRequest().listening():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        assert [record.message for record in caplog.records] == [
            "SIGTERM: finishing what is under way, then saving"
        ] * lines


def test_a_log_that_cannot_be_written_at_this_moment_does_not_end_training(monkeypatch):
    """Python refuses a write within a write to the same stream, which the signal may have interrupted."""

    def refuse(*_: object) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(stop_module.logger, "info", refuse)
    stop = StopRequest()
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested


@pytest.mark.parametrize("step", [3, 5])
def test_training_ends_with_a_checkpoint_after_the_step_also_the_last(step):
    stop = StopRequest()
    callback, control = end_step(stop, step)
    assert not (callback.stopped or control.should_save or control.should_training_stop)
    stop.requested = True
    callback, control = end_step(stop, step)
    assert callback.stopped and control.should_save and control.should_training_stop


def test_all_processes_stop_when_one_was_told(monkeypatch):
    monkeypatch.setattr(stop_module, "any_process", lambda mine: True)
    stop = StopRequest()
    callback, control = end_step(stop)
    assert callback.stopped and control.should_save and stop.requested


def test_nothing_else_handles_sigterm():
    root = Path(components.__file__).parent
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if "signal.signal(" in path.read_text(encoding="utf-8")
    }
    assert found == HANDLERS
