"""Every variant of the method runs, and its pairs hold what the paper says of them."""

import numpy as np
import pytest
from small_run import SMALL

from components.common.core.conversations import read_rows
from components.sapo import sampling
from components.sapo.config import SAPOConfig
from components.sapo.trainer import SAPOTrainer

SETTINGS = SMALL | {"max_length": 64, "segment_length": 5, "max_new_tokens": 5}


class Watched(SAPOTrainer):
    """Keeps every batch that was trained on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("batches", []).append(inputs["micro_batch"])
        return super().compute_loss(model, inputs, *args, **kwargs)


class LoudSampler:
    """Ends every other B' at once, so that both ends of the splice are met."""

    def __init__(self, end: int) -> None:
        self.end, self.version = end, 0

    def generate(self, prompts, max_new_tokens, seeds):
        rows = [list(range(10, 10 + limit)) for limit in max_new_tokens]
        return [row if i % 2 else [*row[: len(row) // 2], self.end] for i, row in enumerate(rows)]

    def load(self, weights, version, canary=None):
        self.version = version


@pytest.fixture
def run(tmp_path, micro_model, chat_data):
    def go(sampler=None, **settings) -> Watched:
        args = SAPOConfig(output_dir=str(tmp_path), **(SETTINGS | settings))
        trainer = Watched(str(micro_model), args, read_rows(chat_data, "train"))
        if sampler:
            trainer.sampling.sampler = sampler(trainer.processing_class.eos_token_id)
        trainer.train()
        return trainer

    return go


def assert_pairs_hold(trainer: Watched) -> None:
    for micro_batch in trainer.batches:
        pairs, inputs = micro_batch.pairs, micro_batch.batch
        for i, pair in enumerate(pairs):
            assert pair.rejected[: pair.b.start] == pair.chosen[: pair.b.start]  # A is shared
            if pair.c_kept:
                kept = pair.rejected[pair.b_prime.end :]
                assert kept == pair.chosen[pair.b.end :][: len(kept)]
            else:
                assert pair.rejected[pair.b_prime.end :] == []
            assert len(pair.prompt) + len(pair.rejected) <= trainer.args.max_length
            for half, response in ((i, pair.chosen), (len(pairs) + i, pair.rejected)):
                assert inputs.response_mask[half].sum() == len(response)  # only response tokens are scored
                scored = response[pair.shared() if trainer.args.loss_type == "dpo" else 0 :]
                assert inputs.targets[inputs.sources[inputs.rows == half]].tolist() == scored


VARIANTS = {
    "responses_per_prompt": {"responses_per_prompt": 4},
    "on_policy": {"on_policy": True},
    "no_segment": {"no_segment": True},
    "anywhere": {"segment_start": "anywhere"},
    "reference_ema": {"reference": "ema", "reference_interval": 2},
    "reference_policy": {"reference": "policy", "reference_interval": 2},
    "reference_fixed": {"reference": "fixed"},
    "orpo": {"loss_type": "orpo"},
    "orpo_sequence": {"loss_type": "orpo", "nll_scope": "sequence"},
    "truncate": {"on_eos": "truncate"},
    "keep_tail": {"on_eos": "keep_tail"},
    "greedy": {"temperature": 0.0},
    "window": {"max_length": 40},  # most responses are cut
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampler", [None, LoudSampler], ids=["hf", "loud"])
def test_variant(run, variant, sampler):
    trainer = run(sampler, **VARIANTS[variant])
    assert trainer.state.global_step == 6
    assert_pairs_hold(trainer)


@pytest.mark.parametrize(("on_eos", "kept"), [("truncate", False), ("keep_tail", True)])
def test_c_is_dropped_or_kept_after_an_end_of_turn(run, on_eos, kept):
    trainer = run(LoudSampler, on_eos=on_eos, segment_length=3, replay_buffer_size=100)
    end = trainer.processing_class.eos_token_id
    pairs = [pair for micro_batch in trainer.batches for pair in micro_batch.pairs]
    ids = {
        entry_id for entry_id, entry in enumerate(trainer.buffer._entries) if end in entry.replacement
    }  # none evicted
    ended = [pair for pair in pairs if pair.entry_id in ids and pair.b.end < len(pair.chosen)]
    assert ended
    assert {pair.c_kept for pair in ended} == {kept}


@pytest.mark.slow
def test_buffer_in_the_trainer_matches_an_independent_simulation(run):
    """300 steps of 4 in and 4 out, capacity 50: ages, counts and evictions of a plain list with a cumulative sum."""
    steps, capacity = 300, 50
    trainer = run(LoudSampler, max_steps=steps, replay_buffer_size=capacity, num_train_epochs=100)
    plain: list[list[int]] = []  # [id, count, step]
    ages = []
    for step in range(steps):
        added = len(trainer.sampling.order.at(step))
        first = plain[-1][0] + 1 if plain else 0
        plain = [*plain, *([first + i, 0, step] for i in range(added))][-capacity:]
        by_slot = sorted(plain, key=lambda entry: entry[0] % capacity)
        edges = np.cumsum([1 / (count + 1) for _, count, _ in by_slot])
        numbers = sampling.generator(trainer.args.seed, sampling.DRAWS, step).random(4) * edges[-1]
        drawn = [by_slot[int(np.searchsorted(edges, number, side="right"))] for number in numbers]
        ages.append(float(np.mean([step - entry[2] for entry in drawn])))
        for entry in drawn:
            entry[1] += 1
    logged = [entry["buffer/age_steps"] for entry in trainer.state.log_history if "buffer/age_steps" in entry]
    assert logged == ages
    assert {i: trainer.buffer.count(i) for i, _, _ in plain} == {i: count for i, count, _ in plain}
    assert trainer.buffer.evicted == 4 * steps - capacity
