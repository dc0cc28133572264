"""The trainer runs Algorithm 1: what enters the buffer, when the EMA and the reference move, what is learned."""

import json
import math

import numpy as np
import pytest
import torch
from small_run import SMALL

from components.common.core.conversations import read_rows
from components.common.models.loading import load_model, load_tokenizer
from components.sapo.config import SAPOConfig
from components.sapo.reference import ReferenceCache
from components.sapo.sampling import RowOrder
from components.sapo.trainer import SAPOTrainer
from components.sapo.weights import reference_interval


def config(tmp_path, **settings) -> SAPOConfig:
    defaults = SMALL | {"max_steps": 4, "replay_buffer_size": 50, "learning_rate": 1e-3}
    return SAPOConfig(output_dir=str(tmp_path / "log"), **(defaults | settings))


@pytest.fixture
def trainer(tmp_path, micro_model, chat_data):
    def build(**settings) -> SAPOTrainer:
        rows, held_out = read_rows(chat_data, "train"), read_rows(chat_data, "test")
        return SAPOTrainer(str(micro_model), config(tmp_path, **settings), rows, held_out)

    return build


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_rows_of_an_epoch_are_a_permutation_and_differ_between_epochs():
    order = RowOrder(rows=10, rows_per_step=4, seed=0)
    assert order.steps_per_epoch == 3
    epochs = [[row for step in range(3) for row in order.at(3 * e + step)] for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert len(order.at(2)) == 2  # the rest of the epoch


def test_every_step_adds_its_rows_and_draws_its_pairs(trainer):
    run = trainer(responses_per_prompt=3)
    run.train()
    assert run.buffer.added == 4 * 4 * 3  # steps x rows x responses
    assert run.buffer.counts().sum() == 4 * 4  # steps x pairs


def test_accumulation_draws_from_one_sampling_stage(trainer):
    run = trainer(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3)
    run.train()
    assert (run.buffer.added, run.buffer.counts().sum()) == (12, 12)


def test_entries_record_step_and_ema_version(trainer):
    run = trainer(ema_interval=2)
    run.train()
    drawn = run.buffer.draw(500, np.random.default_rng(0))
    assert {(e.step, e.version) for _, e in drawn} == {(0, 0), (1, 0), (2, 1), (3, 1)}


def test_ema_follows_equation_6_through_training(trainer, micro_model):
    run = trainer(ema_decay=0.75, ema_interval=1, max_steps=1, warmup_steps=0)
    start = weights(load_model(str(micro_model), torch.float32))
    run.train()
    torch.testing.assert_close(
        weights(run.weights.ema_model), 0.75 * start + 0.25 * weights(run.model), atol=1e-7, rtol=1e-5
    )
    assert not torch.equal(weights(run.model), start)


@pytest.mark.parametrize("reference", ["ema", "policy", "fixed"])
def test_reference_is_refreshed_at_its_interval(trainer, micro_model, reference):
    run = trainer(reference=reference, reference_interval=2, max_steps=2)
    run.train()
    start = load_model(str(micro_model), torch.float32)
    expected = {"ema": run.weights.ema_model, "policy": run.model, "fixed": start}[reference]
    assert torch.equal(weights(run.weights.reference), weights(expected))


def test_reference_waits_for_its_interval(trainer, micro_model):
    run = trainer(reference="policy", reference_interval=3, max_steps=2)
    run.train()
    assert torch.equal(weights(run.weights.reference), weights(load_model(str(micro_model), torch.float32)))


def test_reference_interval_of_an_epoch(trainer):
    run = trainer(reference_interval="epoch", per_device_train_batch_size=16)
    assert reference_interval(run.args, run.sampling.order.steps_per_epoch) == 3  # 48 rows, 16 a step


def test_orpo_has_no_reference(trainer):
    run = trainer(loss_type="orpo")
    run.train()
    assert run.weights.reference is None


def test_on_policy_samples_with_the_policy(trainer):
    run = trainer(on_policy=True)
    assert run.sampler.model is run.model
    assert trainer().sampler.model is not run.model


def test_no_segment_regenerates_whole_responses(trainer):
    run = trainer(no_segment=True)
    run.train()
    for _, entry in run.buffer.draw(50, np.random.default_rng(0)):
        length = len(run.train_dataset[entry.row]["chosen_ids"])
        assert (entry.segment.start, entry.segment.end) == (0, length)


def test_first_dpo_loss_is_log_two(trainer):
    """Policy and reference start equal, so every margin is 0."""
    run = trainer(max_steps=1)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_loss_is_the_mean_over_micro_batches(trainer):
    """Accumulating 2 x 2 pairs gives the gradient, and so the weights, of 4 pairs at once: the draws are the same."""
    whole, parts = (
        trainer(max_steps=2),
        trainer(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    )
    # The same draws: one generator is consumed in order, and counts are only updated between micro-batches.
    for run in (whole, parts):
        run.buffer._update_weights = lambda slots, b=run.buffer: _flat_weights(b, slots)
        run.train()
    torch.testing.assert_close(weights(whole.model), weights(parts.model), atol=2e-5, rtol=1e-3)


def _flat_weights(buffer, slots):
    nodes = slots + buffer._leaves
    buffer._tree[nodes] = 1.0
    while nodes[0] > 1:
        nodes = np.unique(nodes >> 1)
        buffer._tree[nodes] = buffer._tree[2 * nodes] + buffer._tree[2 * nodes + 1]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dpo", "orpo", "ipo"])
def test_learns_to_prefer_the_chosen_response_on_held_out_pairs(trainer, loss_type):
    settings = {
        "dpo": {"learning_rate": 5e-4, "optim": "adamw_torch"},
        "orpo": {"learning_rate": 2e-3, "optim": "adamw_torch"},
        "ipo": {"learning_rate": 5e-4, "optim": "adamw_torch"},
    }
    run = trainer(
        loss_type=loss_type,
        max_steps=30,
        eval_strategy="steps",
        eval_steps=10,
        eval_on_start=True,
        **settings[loss_type],
    )
    run.train()
    margins = [entry["eval_rewards/margins"] for entry in run.state.log_history if "eval_rewards/margins" in entry]
    assert margins[0] == pytest.approx(0.0, abs=1e-6)
    assert margins[-1] > 0


def test_same_seed_gives_the_same_run_and_another_seed_another(trainer):
    runs = [trainer(seed=seed) for seed in (1, 1, 2)]
    for run in runs:
        run.train()
    first, again, other = (weights(run.model) for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_log_holds_rewards_sampling_buffer_and_times(trainer):
    run = trainer()
    run.train()
    logged = run.state.log_history[2]
    for name in (
        "rewards/margins",
        "logps/b",
        "logps/b_prime",
        "sampling/identical",
        "buffer/age_steps",
        "seconds/sample",
    ):
        assert math.isfinite(logged[name])
    assert logged["rewards/margins"] == pytest.approx(logged["rewards/chosen"] - logged["rewards/rejected"], abs=1e-6)
    assert logged["buffer/size"] == 12


def test_pairs_are_written_with_b_and_its_replacement(trainer, tmp_path):
    run = trainer(pairs_per_log=2)
    run.train()
    pairs = [json.loads(line) for line in (tmp_path / "log" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 2 * 4
    texts = {row["id"]: row["chosen"][0]["content"] + "<|im_end|>" for row in _rows(run)}
    assert all(pair["a"] + pair["b"] + pair["c"] == texts[pair["row_id"]] for pair in pairs)


def _rows(run):
    tokenizer = run.processing_class
    return [{"id": r["id"], "chosen": [{"content": tokenizer.decode(r["chosen_ids"][:-1])}]} for r in run.train_dataset]


def test_tokenised_rows_are_taken_as_they_are(tmp_path, micro_model):
    model, tokenizer = load_model(str(micro_model), torch.float32), load_tokenizer(str(micro_model))
    rows = [
        {"id": str(i), "prompt_ids": [5, 6, 7], "chosen_ids": [8 + i, 9, 10, tokenizer.eos_token_id]} for i in range(8)
    ]
    run = SAPOTrainer(model, config(tmp_path), rows, processing_class=tokenizer)
    run.train()
    assert run.train_dataset == rows
    assert run.buffer.added == 16


def test_dropout_is_off(tmp_path, micro_model, chat_data):
    """Two forward passes in training mode agree, though the model came with dropout in its attention."""
    model = load_model(str(micro_model), torch.float32, attention_dropout=0.5)
    rows, tokenizer = read_rows(chat_data, "train"), load_tokenizer(str(micro_model))
    ids = torch.arange(5, 25).unsqueeze(0)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    run = SAPOTrainer(model, config(tmp_path), rows, processing_class=tokenizer)
    assert torch.equal(run.model.train()(ids).logits, run.model(ids).logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.0),
        ("segment_length", 0),
        ("replay_buffer_size", 0),
        ("ema_decay", 1.5),
        ("ema_interval", 0),
        ("top_p", 0.0),
        ("temperature", -1.0),
        ("reference_interval", 0),
        ("max_length", 1),
        ("learning_rate", 0.0),
    ],
)
def test_settings_that_cannot_work_name_themselves(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name} = {value}: must be"):
        config(tmp_path, **{name: value})


def test_reused_reference_log_probs_change_nothing(trainer, monkeypatch):
    """A reference that is refreshed twice, with pairs drawn again in between: cached and fresh runs end alike."""
    settings = {"reference_interval": 3, "max_steps": 7, "replay_buffer_size": 8, "on_policy": True}
    reused = trainer(**settings)
    reused.train()
    shares = [entry["reference/reused"] for entry in reused.state.log_history if "reference/reused" in entry]
    assert 0 < sum(shares) < len(shares)

    monkeypatch.setattr(ReferenceCache, "missing", lambda self, ids: list(dict.fromkeys(ids)))
    monkeypatch.setattr(ReferenceCache, "get", lambda self, ids: torch.from_numpy(self._logps[np.array(ids) % 8].T))
    fresh = trainer(**settings)
    fresh.train()
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (reused, fresh)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(weights(reused.model), weights(fresh.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss_type", ["dpo", "orpo"])
def test_bfloat16_trains_and_samples_with_a_copy_of_the_average(trainer, loss_type):
    run = trainer(bf16=True, loss_type=loss_type, max_steps=3)
    run.train()
    assert {p.dtype for p in run.sampler.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.weights.ema_model.parameters()} == {torch.float32}
    served = [p.to(torch.bfloat16) for p in run.weights.ema_model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(run.sampler.model.parameters(), served, strict=True))
    assert all(math.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)


def test_sampling_with_the_policy_needs_no_copy(trainer):
    run = trainer(bf16=True, on_policy=True)
    assert run.sampler.model is run.model


def test_wall_clock_adds_up(trainer):
    run = trainer(responses_per_prompt=2)
    run.train()
    clock = run.wall_clock()
    assert clock["seconds/first_step"] > clock["seconds/train"] / 4
    assert (
        clock["seconds/wait"] == clock["seconds/generate"] > 0
    )  # `sync`: the learner waits whenever the sampler works
    assert clock["tokens/generated"] == sum(len(e.replacement) for e in run.buffer._entries)  # 32 entries, none evicted
    assert clock["tokens/trained"] > 0
