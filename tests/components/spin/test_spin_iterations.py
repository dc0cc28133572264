"""Each iteration starts from and references the model before it; an interrupted run ends as an uninterrupted one."""

import json
import time

import pytest
import torch
from spin_runs import equal_weights, weights

from components.common.training.stop import StoppedError
from components.spin import generation, iterations
from components.spin.files import newest_checkpoint
from components.spin.results import summarise

pytestmark = pytest.mark.slow


@pytest.fixture
def started(monkeypatch):
    """What each trainer was given, noted before it trains."""
    calls = []
    real = iterations.preference_trainer

    def record(loss, model, reference, args, train, evaluation, tokenizer):
        def copy(m):
            return None if m is None else {name: tensor.clone() for name, tensor in m.state_dict().items()}

        calls.append({"model": copy(model), "reference": copy(reference), "args": args, "pairs": train})
        trainer = real(loss, model, reference, args, train, evaluation, tokenizer)
        calls[-1]["trainer"] = trainer
        return trainer

    monkeypatch.setattr(iterations, "preference_trainer", record)
    return calls


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_each_iteration_starts_from_the_last_and_trains_on_its_window(loss, build, tmp_path, started, micro_model):
    values = {"learning_rates": [1e-3, 5e-4, 2e-4], "betas": [0.1, 0.5, 5.0], "orpo_lambdas": [0.1, 0.2, 0.3]}
    run = build(tmp_path, loss_type=loss, iterations=3, epochs_per_iteration=1.0, **values)
    run.run()
    starts = [micro_model, run.inputs.files.model(0), run.inputs.files.model(1)]
    for index, (call, start) in enumerate(zip(started, starts, strict=True)):
        assert same(call["model"], weights(start))
        assert call["reference"] is None if loss == "orpo" else same(call["reference"], weights(start))
        assert call["args"].learning_rate == values["learning_rates"][index]
        assert call["args"].beta == values["betas" if loss == "dpo" else "orpo_lambdas"][index]
        assert call["trainer"].beta == call["args"].beta
    assert not equal_weights(run.inputs.files.model(1), run.inputs.files.model(2))
    first, second, third = (run.inputs.pairs(i) for i in range(3))
    assert [call["pairs"] for call in started] == [first, first + second, second + third]
    if loss == "dpo":  # the reference stood still while the policy learned from it
        assert same(dict(started[2]["trainer"].ref_model.state_dict()), weights(run.inputs.files.model(1)))


def test_responses_are_drawn_from_the_model_before(build, tmp_path):
    run = build(tmp_path, epochs_per_iteration=1.0)
    run.run()
    with iterations.open_sampler(str(run.inputs.files.model(0)), run.inputs.tokenizer, run.inputs.settings) as sampler:
        generation.generate(sampler, run.inputs.train_rows, tmp_path / "again.jsonl", 1, run.inputs.settings)
    assert (tmp_path / "again.jsonl").read_text() == run.inputs.files.generated(1).read_text()


def stop_while_generating(run, batches: int) -> None:
    after_batch = run.after_batch
    left = iter(range(batches))

    def count() -> None:
        run.stop.requested = next(left, None) is None
        after_batch()

    run.after_batch = count


def stop_while_training(run, iteration: int, step: int) -> None:
    make_trainer = run.make_trainer

    def make(of):
        trainer = make_trainer(of)
        train_step = trainer.training_step

        def count(*args, **kwargs):
            run.stop.requested = of.index == iteration and trainer.state.global_step + 1 == step
            return train_step(*args, **kwargs)

        trainer.training_step = count
        return trainer

    run.make_trainer = make


def summary_of(run) -> dict[str, float]:
    return summarise(run.inputs, run.clock.summary())[1]


def history_of(run) -> list[dict]:
    return summarise(run.inputs, run.clock.summary())[0].log_history


def assert_equal_runs(mine, theirs) -> None:
    for index in range(2):
        assert mine.inputs.files.generated(index).read_text() == theirs.inputs.files.generated(index).read_text()
        assert equal_weights(mine.inputs.files.model(index), theirs.inputs.files.model(index))
    names = ("tokens/generated", "tokens/trained", "generated/identical", "eval_rewards/margins")
    a, b = (summary_of(run) for run in (mine, theirs))
    assert {n: a[n] for n in names} == {n: b[n] for n in names}
    for index in range(2):  # over all steps of an iteration, also those before it was interrupted
        assert a[f"iteration-{index}/train_loss"] == pytest.approx(b[f"iteration-{index}/train_loss"], rel=1e-6)
    losses = [[(e["step"], e["iteration"], e["loss"]) for e in history_of(r) if "loss" in e] for r in (mine, theirs)]
    assert losses[0] == losses[1]
    assert (mine.inputs.log_directory / "pairs.jsonl").read_text() == (
        theirs.inputs.log_directory / "pairs.jsonl"
    ).read_text()


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_interrupted_and_resumed_equals_uninterrupted(loss, build, tmp_path):
    """Stopped in the middle of generating and of training, in both iterations, on and off the checkpoint interval."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted = build(whole, held_out=6, loss_type=loss)
    uninterrupted.run()
    stops = [
        lambda run: stop_while_generating(run, 1),
        lambda run: stop_while_training(run, 0, 3),
        lambda run: stop_while_training(run, 0, 6),  # the last step: its iteration is completed, the next not begun
        lambda run: stop_while_generating(run, 0),
        lambda run: stop_while_training(run, 1, 8),
    ]
    for stop in stops:
        run = build(cut, held_out=6, loss_type=loss)
        stop(run)
        with pytest.raises(StoppedError):
            run.run()
    resumed = build(cut, held_out=6, loss_type=loss)
    resumed.run()
    assert_equal_runs(resumed, uninterrupted)


def test_killed_between_training_and_saving_and_with_half_a_checkpoint(build, tmp_path):
    uninterrupted = build(tmp_path / "whole", held_out=6)
    uninterrupted.run()
    killed = build(tmp_path / "cut", held_out=6)

    def die(*_):
        raise RuntimeError("killed")

    killed._save_model = die
    with pytest.raises(RuntimeError, match="killed"):
        killed.run()
    checkpoints = killed.inputs.files.checkpoints(0)
    assert newest_checkpoint(checkpoints).name == "checkpoint-6"
    (checkpoints / "checkpoint-7").mkdir()  # an interrupted save has no marker
    (checkpoints / "checkpoint-6" / "optimizer.pt").write_bytes(b"cut")  # and this one lost the end of a file
    resumed = build(tmp_path / "cut", held_out=6)
    resumed.run()
    assert_equal_runs(resumed, uninterrupted)


def test_log_counts_steps_over_the_run(build, tmp_path):
    run = build(tmp_path, held_out=6)
    run.run()
    state, summary = summarise(run.inputs, run.clock.summary())
    assert state.global_step == 18
    history = state.log_history
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, 19))
    assert [entry["iteration"] for entry in losses] == [0] * 6 + [1] * 12
    assert [entry["epoch"] for entry in losses] == sorted(entry["epoch"] for entry in losses)
    pairs = [run.inputs.pairs(i) for i in range(2)]
    assert summary["tokens/generated"] == sum(len(p["rejected_ids"]) for half in pairs for p in half)
    of_pairs = [
        sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in half) for half in pairs
    ]
    # Two epochs of each window: {0}, then {0, 1}.
    assert summary["iteration-0/tokens/trained"] == 2 * of_pairs[0]
    assert summary["tokens/trained"] == 2 * of_pairs[0] + 2 * (of_pairs[0] + of_pairs[1])


def test_summary_has_wall_clock_by_iteration(build, tmp_path):
    run = build(tmp_path, held_out=6)
    start = time.perf_counter()
    run.run()
    elapsed = time.perf_counter() - start
    summary = summary_of(run)
    for part in ("generate", "train"):
        of_iterations = [summary[f"iteration-{i}/seconds/{part}"] for i in range(2)]
        assert summary[f"seconds/{part}"] == pytest.approx(sum(of_iterations)) and min(of_iterations) > 0
    parts = sum(summary[f"seconds/{part}"] for part in ("load_sampler", "generate", "held_out", "train", "evaluate"))
    assert parts <= run.clock.run_seconds() == pytest.approx(elapsed, rel=0.2)
    assert summary["iteration-0/seconds/generate"] < summary["seconds/first_step"] < run.clock.run_seconds()


def test_the_clock_on_the_disk_is_the_runs(build, tmp_path):
    """What is written last, when a process is killed, is what the next one goes on from."""
    run = build(tmp_path)
    stop_while_training(run, 0, 3)
    with pytest.raises(StoppedError):
        run.run()
    saved = json.loads(run.inputs.files.clock.read_text())
    assert set(saved["seconds"]) >= {"seconds/generate", "iteration-0/seconds/generate", "seconds/train"}
    assert 0 < saved["first_step"] < saved["run"] <= run.clock.run_seconds()
    again = build(tmp_path)
    assert again.clock.summary() == saved["seconds"] | {"seconds/first_step": saved["first_step"]}


def test_sampled_pairs_are_read_by_the_report(build, tmp_path):
    from components.report.artifacts import Pair

    run = build(tmp_path, pairs_per_log=3)
    run.run()
    pairs = [Pair(**json.loads(line)) for line in (run.inputs.log_directory / "pairs.jsonl").read_text().splitlines()]
    assert [pair.step for pair in pairs] == [0, 0, 0, 6, 6, 6]
    of_row = {p["id"]: p for p in run.inputs.pairs(1)}
    for pair in pairs[3:]:
        assert pair.b == run.inputs.tokenizer.decode(of_row[pair.row_id]["chosen_ids"])
        assert pair.b_prime == run.inputs.tokenizer.decode(of_row[pair.row_id]["rejected_ids"])
        assert (pair.a, pair.c) == ("", "")
