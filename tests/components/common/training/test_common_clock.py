"""One clock over interruptions: time that a run is stopped does not count, what it did before does."""

import json
import threading

import pytest

from components.common.training.clock import Clock


@pytest.fixture
def now(monkeypatch):
    """The time, which passes when a test says so."""
    time = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: time[0])

    def pass_(seconds: float) -> None:
        time[0] += seconds

    return pass_


def saved(clock: Clock) -> dict:
    return json.loads(json.dumps(clock.state_dict()))


def test_seconds_by_part_and_counts(now):
    clock = Clock()
    for seconds in (2, 3):
        with clock.timed("train"):
            now(seconds)
            clock.add("tokens/trained", 100)
        now(10)  # of no part
    assert clock.summary() == {"seconds/train": 5, "tokens/trained": 200}
    assert clock.run_seconds() == 25


def test_the_first_step_counts_from_the_start_and_is_noted_once(now):
    clock = Clock()
    now(7)
    clock.first_step()
    now(7)
    clock.first_step()
    assert clock.summary() == {"seconds/first_step": 7}


def test_goes_on_after_an_interruption_and_the_time_between_is_not_counted(now):
    clock = Clock()
    with clock.timed("train"):
        now(4)
        clock.add("tokens/trained", 10)
        clock.first_step()
        state = saved(clock)  # in the middle of the block
        now(100)  # lost: the process is killed
    now(1000)

    later = Clock()
    now(2)
    later.load_state_dict(state)
    with later.timed("train"):
        now(3)
        later.add("tokens/trained", 5)
        later.first_step()
    assert later.summary() == {"seconds/train": 7, "seconds/first_step": 4, "tokens/trained": 15}
    assert later.run_seconds() == 4 + 2 + 3


def test_loaded_inside_a_block_what_the_block_took_comes_on_top(now):
    clock = Clock()
    with clock.timed("train"):
        now(1)
        clock.load_state_dict({"run": 50, "first_step": 20, "seconds": {"seconds/train": 30}, "counts": {}})
        now(1)
    assert clock.summary()["seconds/train"] == 32
    assert clock.run_seconds() == 52


def test_interrupted_before_its_first_step_that_step_counts_from_the_first_start(now):
    """SPIN generates for hours before it, and may be stopped meanwhile."""
    clock = Clock()
    now(60)
    later = Clock()
    later.load_state_dict(saved(clock))
    now(5)
    later.first_step()
    assert later.summary()["seconds/first_step"] == 65


def test_rounds_are_told_apart_and_added_up(now):
    clock = Clock()
    for index in range(2):
        with clock.timed("generate", of=f"iteration-{index}"):
            now(index + 1)
    each = {"iteration-0/seconds/generate": 1, "iteration-1/seconds/generate": 2}
    assert clock.summary() == {"seconds/generate": 3, **each}


def test_a_block_that_fails_has_taken_its_time(now):
    clock = Clock()
    with pytest.raises(RuntimeError), clock.timed("train"):
        now(3)
        raise RuntimeError
    assert clock.summary() == {"seconds/train": 3}


def test_laps_are_what_came_since_the_last_one_or_since_a_resume(now):
    clock = Clock()
    with clock.timed("train"):
        now(2)
        assert clock.lap() == {"seconds/train": 2}
        now(3)
    assert clock.lap() == {"seconds/train": 3}
    resumed = Clock()
    resumed.load_state_dict(saved(clock))
    assert resumed.lap() == {"seconds/train": 0}


def test_parts_nest_but_not_in_themselves():
    clock, twice = Clock(), pytest.raises(ValueError, match="seconds/train: is timed already")
    with clock.timed("train"), clock.timed("save"), twice, clock.timed("train"):
        pass


def test_a_thread_times_its_own_part(now):
    """The sampler's thread works while the learner waits or trains."""
    clock = Clock()
    begun, end = threading.Event(), threading.Event()

    def sample() -> None:
        with clock.timed("generate"):
            begun.set()
            end.wait(10)

    thread = threading.Thread(target=sample)
    thread.start()
    begun.wait(10)
    with clock.timed("train"):
        now(2)
    assert clock.state_dict()["seconds"] == {"seconds/train": 2, "seconds/generate": 2}
    now(1)
    end.set()
    thread.join()
    assert clock.summary() == {"seconds/train": 2, "seconds/generate": 3}


def test_counts_are_of_all_processes_and_one_goes_on_from_them(monkeypatch):
    monkeypatch.setattr(
        "components.common.training.distributed.processes.gather",
        lambda mine: [*mine, {"tokens/trained": 30, "tokens/generated": 4}],
    )
    clock = Clock()
    clock.add("tokens/trained", 10)
    assert clock.summary() == {"tokens/trained": 40, "tokens/generated": 4}
    state = saved(clock)
    monkeypatch.undo()
    for is_main, expected in ((True, {"tokens/trained": 40, "tokens/generated": 4}), (False, {})):
        monkeypatch.setattr(
            "components.common.training.distributed.processes.is_main_process", lambda is_main=is_main: is_main
        )
        later = Clock()
        later.load_state_dict(state)
        assert later.summary() == expected
