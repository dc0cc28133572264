"""Sampling while learning: the same pairs as sampling one step early by hand, and errors that reach the learner."""

import threading
import time
import traceback

import pytest
import torch
from small_run import SMALL

from components.common.core.conversations import read_rows
from components.common.generation.worker import SamplerTimeout
from components.sapo.config import SAPOConfig
from components.sapo.schedule import Overlap, Sync
from components.sapo.trainer import SAPOTrainer

SETTINGS = SMALL | {"max_steps": 8, "learning_rate": 1e-3, "ema_interval": 1}


@pytest.fixture
def trainer(tmp_path, micro_model, chat_data):
    def build(**settings) -> SAPOTrainer:
        args = SAPOConfig(output_dir=str(tmp_path / "log"), **(SETTINGS | settings))
        return SAPOTrainer(str(micro_model), args, read_rows(chat_data, "train"))

    return build


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def entries(run: SAPOTrainer) -> list[tuple]:
    return [(e.row, e.segment, e.replacement.tolist(), e.step, e.version) for e in run.buffer._entries]


class OneStepEarly(Sync):
    """What `Overlap` does, without a thread: the next step's rows are sampled before this step trains."""

    def entries(self, step):
        now = self.generate(step, step) if self.ahead is None else self.ahead
        self.ahead = self.generate(step + 1, step)
        return now


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"loss_type": "orpo"}, {"push_interval": 2}, {"gradient_accumulation_steps": 2}]
)
def test_overlap_is_sync_shifted_by_one_step(trainer, settings):
    overlap, by_hand = trainer(schedule="overlap", **settings), trainer(**settings)
    by_hand.sampling.schedule = OneStepEarly(by_hand.sampling.generate, by_hand.metrics.clock)
    for run in (overlap, by_hand):
        run.train()
    assert isinstance(overlap.sampling.schedule, Overlap)
    assert entries(overlap) == entries(by_hand)
    assert torch.equal(weights(overlap.model), weights(by_hand.model))
    assert torch.equal(weights(overlap.weights.ema_model), weights(by_hand.weights.ema_model))


def test_weights_of_overlap_are_one_step_older(trainer):
    runs = [trainer(schedule=schedule, replay_buffer_size=50) for schedule in ("sync", "overlap")]
    for run in runs:
        run.train()
    sync, overlap = ({(e.row, e.version) for e in run.buffer._entries} for run in runs)
    versions = [sorted({version for _, version in pairs}) for pairs in (sync, overlap)]
    assert versions == [list(range(8)), list(range(7))]  # the first two steps of `overlap` share the start weights
    assert {row for row, _ in sync} == {row for row, _ in overlap}


def test_sampler_really_runs_beside_the_learner(trainer, monkeypatch):
    run = trainer(schedule="overlap")
    threads, training = [], threading.Event()
    generate, step = run.sampler.generate, SAPOTrainer.training_step

    def watched(*args):
        threads.append((threading.current_thread().name, training.wait(5)))
        return generate(*args)

    def slow_step(self, *args, **kwargs):
        training.set()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SAPOTrainer, "training_step", slow_step)
    run.sampling.schedule.ahead = run.sampling.generate(0, 0)
    run.sampler.generate = watched
    run.train()
    assert {name for name, _ in threads} == {"self-play"}
    assert threads[0][1]  # it saw the step of before begin while it worked
    assert len(threads) == 7  # nothing is sampled for a ninth step


@pytest.mark.parametrize("schedule", ["sync", "overlap"])
def test_waiting_and_sampling_times_are_logged(trainer, schedule):
    run = trainer(schedule=schedule)
    run.train()
    entry = run.state.log_history[3]
    assert entry["seconds/wait"] >= 0 and entry["seconds/sample"] > 0


def test_an_error_of_the_sampler_stops_the_learner_with_its_traceback(trainer):
    run = trainer(schedule="overlap")
    generate = run.sampler.generate

    def breaks_at_the_third_call(*args, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError("the engine fell over")
        return generate(*args)

    run.sampler.generate = breaks_at_the_third_call
    with pytest.raises(ArithmeticError, match="fell over") as caught:
        run.train()
    assert run.state.global_step == 2
    assert "breaks_at_the_third_call" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_a_sampler_that_hangs_is_named(trainer):
    run = trainer(schedule="overlap", sampler_timeout=1.0)
    release = threading.Event()
    generate = run.sampler.generate

    def hangs_later(*args, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 2:
            release.wait(30)
        return generate(*args)

    run.sampler.generate = hangs_later
    start = time.perf_counter()
    with pytest.raises(SamplerTimeout, match="sampling for step 2 took longer than 1 s"):
        run.train()
    release.set()
    assert time.perf_counter() - start < 25


@pytest.mark.parametrize("schedule", ["sync", "overlap"])
def test_empty_segments_are_pairs_too(trainer, schedule):
    run = trainer(schedule=schedule)
    run.sampler.generate = lambda prompts, limits, seeds: [[] for _ in prompts]
    run.train()
    assert run.state.global_step == 8
    assert torch.isfinite(weights(run.model)).all()


def test_pushes_follow_their_interval(trainer):
    run = trainer(push_interval=3)
    pushed = []
    load = run.sampler.load

    def watched(weights_, version, canary=None):
        pushed.append((run.state.global_step, version))
        load(weights_, version, canary)

    run.sampler.load = watched
    run.train()
    assert pushed == [(3, 3), (6, 6)]
    assert run.weights.served_model is not run.weights.ema_model
    versions = [e.version for e in run.buffer._entries]
    assert set(versions) <= {0, 3, 6}


def test_what_is_served_is_the_ema_of_the_last_push(trainer):
    """With a sampler that ignores its weights, the EMA after two steps is the same in both runs; one stops there."""
    late, always = trainer(push_interval=2, max_steps=3), trainer(max_steps=2)
    for run in (late, always):
        run.sampler.generate = lambda prompts, limits, seeds: [[7] * limit for limit in limits]  # whatever the weights
        run.train()
    torch.testing.assert_close(weights(late.weights.served_model), weights(always.weights.ema_model), atol=1e-5, rtol=0)
    assert late.weights.ema.served_version == 2 and late.weights.ema.version == 3


def test_the_push_interval_is_part_of_a_run_and_the_time_out_is_not(trainer):
    plain, other, patient = (
        run.identity()["settings"] for run in (trainer(**s) for s in ({}, {"push_interval": 2}, {"sampler_timeout": 9}))
    )
    assert plain == patient != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy": True, "schedule": "overlap"}, "schedule = 'overlap': hf reads the policy"),
        ({"on_policy": True, "push_interval": 2}, "push_interval = 2: must be 1"),
        ({"push_interval": 0}, "push_interval = 0"),
        ({"sampler_timeout": 0}, "sampler_timeout = 0"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SAPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
