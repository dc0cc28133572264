"""The Hugging Face sampler: limits, stops, order, reproducibility."""

import pytest
import torch

from components.common.models import load_model
from components.sapo.samplers import SamplingSettings
from components.sapo.samplers.hf import HFSampler

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [5, 6, 7, 8, 9, 10, 11, 12, 13]]


@pytest.fixture(scope="module")
def model(micro_model):
    return load_model(str(micro_model), torch.float32)


def sampler(model, temperature=1.0, stop_ids=frozenset({1}), **options) -> HFSampler:
    return HFSampler(model, SamplingSettings(temperature, 0, 1.0, stop_ids), pad_id=0, **options)


def test_each_prompt_has_its_own_limit(model):
    results = sampler(model).generate(PROMPTS, [3, 7, 1], seed=0)
    assert [len(tokens) for tokens in results] == [3, 7, 1]


def test_a_stop_token_ends_a_continuation_and_is_kept(model):
    everything = sampler(model).generate(PROMPTS, [12] * 3, seed=0)
    stop = everything[1][4]
    stopped = sampler(model, stop_ids=frozenset({stop})).generate(PROMPTS, [12] * 3, seed=0)
    assert stopped[1] == everything[1][: everything[1].index(stop) + 1]
    assert stopped[1][-1] == stop


def test_same_seed_same_tokens_other_seed_other_tokens(model):
    first, again, other = (sampler(model).generate(PROMPTS, [12] * 3, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_the_process_random_state_is_left_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sampler(model).generate(PROMPTS, [4] * 3, seed=9)
    assert torch.equal(torch.rand(1), expected)


def test_greedy_does_not_depend_on_the_batch(model):
    together = sampler(model, temperature=0).generate(PROMPTS, [8] * 3, seed=0)
    apart = sampler(model, temperature=0, batch_size=1).generate(PROMPTS, [8] * 3, seed=0)
    assert together == apart


def test_greedy_takes_the_most_likely_token(model):
    (tokens,) = sampler(model, temperature=0).generate([PROMPTS[0]], [1], seed=0)
    assert tokens == [int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())]


def test_load_records_the_version(model):
    engine = sampler(model)
    engine.load(model.named_parameters(), version=4)
    assert engine.version == 4
