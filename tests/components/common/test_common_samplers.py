"""The Hugging Face sampler: limits, stops, order, reproducibility."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from components.common.models import load_model
from components.common.samplers import SamplingSettings, hf, request_seed
from components.common.samplers.hf import HFSampler, _SeededDraw

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [5, 6, 7, 8, 9, 10, 11, 12, 13]]
SEEDS = [3, 4, 5]


@pytest.fixture(scope="module")
def model(micro_model):
    return load_model(str(micro_model), torch.float32)


def sampler(model, temperature=1.0, stop_ids=frozenset({1}), **options) -> HFSampler:
    return HFSampler(model, SamplingSettings(temperature, 0, 1.0, stop_ids), pad_id=0, **options)


def test_each_prompt_has_its_own_limit(model):
    results = sampler(model).generate(PROMPTS, [3, 7, 1], SEEDS)
    assert [len(tokens) for tokens in results] == [3, 7, 1]


def test_a_stop_token_ends_a_continuation_and_is_kept(model):
    everything = sampler(model).generate(PROMPTS, [12] * 3, SEEDS)
    stop = everything[1][4]
    stopped = sampler(model, stop_ids=frozenset({stop})).generate(PROMPTS, [12] * 3, SEEDS)
    assert stopped[1] == everything[1][: everything[1].index(stop) + 1]
    assert stopped[1][-1] == stop


def test_same_seed_same_tokens_other_seed_other_tokens(model):
    first, again = (sampler(model).generate(PROMPTS, [12] * 3, SEEDS) for _ in range(2))
    other = sampler(model).generate(PROMPTS, [12] * 3, [3, 4, 6])
    assert first == again
    assert first[:2] == other[:2] and first[2] != other[2]


def test_a_draw_does_not_depend_on_the_batch(model):
    together = sampler(model).generate(PROMPTS, [12] * 3, SEEDS)
    backwards = sampler(model).generate(PROMPTS[::-1], [12] * 3, SEEDS[::-1])
    apart = sampler(model, batch_size=1).generate(PROMPTS, [12] * 3, SEEDS)
    assert together == apart == backwards[::-1]


def test_draws_follow_the_filtered_distribution():
    """2,000 draws of p = (1/2, 1/4, 1/8, 1/16) at temperature 1 with top_k 3: (4/7, 2/7, 1/7), each within 4 sigma."""
    scores = torch.tensor([0.5, 0.25, 0.125, 0.0625]).log().repeat(2000, 1)
    settings = SamplingSettings(1.0, 3, 1.0, frozenset())
    drawn = _SeededDraw(settings, list(range(2000)), steps=1)(torch.zeros(2000, 1), scores).argmax(dim=1)
    shares = drawn.bincount(minlength=4) / 2000
    expected = torch.tensor([4 / 7, 2 / 7, 1 / 7, 0])
    assert (shares - expected).abs().max() < 4 * 0.011
    assert shares[3] == 0


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("top_k", [0, 5, 500])
def test_filters_are_those_of_generate(top_k, top_p):
    """The same draws as from the whole vocabulary after transformers' own filters."""
    torch.manual_seed(0)
    scores, seeds = 3 * torch.randn(64, 100), list(range(64))
    filtered = TemperatureLogitsWarper(0.7)(None, scores)
    filtered = TopKLogitsWarper(top_k)(None, filtered) if top_k else filtered
    filtered = TopPLogitsWarper(top_p)(None, filtered) if top_p < 1 else filtered
    unfiltered = SamplingSettings(1.0, 0, 1.0, frozenset())
    expected = _SeededDraw(unfiltered, seeds, 1)(None, filtered)
    ours = _SeededDraw(SamplingSettings(0.7, top_k, top_p, frozenset()), seeds, 1)(None, scores)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_attention_by_groups_generates_what_transformers_does(family, monkeypatch):
    """Three query heads to a key-value head, prompts of several lengths, continuations beyond the sliding window."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    more = {"sliding_window": 4} if family == "mistral" else {}
    config = AutoConfig.for_model(family, num_attention_heads=6, num_key_value_heads=2, **sizes, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    calls = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(a), attend(*a, **k))[1])
    ours = sampler(model).generate(PROMPTS, [12] * 3, SEEDS)
    assert any(query.shape[1:3] == (2, 3) for query, *_ in calls)  # queries of a step, grouped
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(hf, "_grouped_attention", lambda model: nullcontext())
    assert ours == sampler(model).generate(PROMPTS, [12] * 3, SEEDS)


def test_request_seeds_differ_by_every_part():
    seeds = {
        request_seed(run, row, epoch, i)
        for run in range(3)
        for row in ("1", "11")
        for epoch in range(3)
        for i in (0, 1)
    }
    assert len(seeds) == 36
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_process_random_state_is_left_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sampler(model).generate(PROMPTS, [4] * 3, SEEDS)
    assert torch.equal(torch.rand(1), expected)


def test_greedy_does_not_depend_on_the_batch(model):
    together = sampler(model, temperature=0).generate(PROMPTS, [8] * 3, SEEDS)
    apart = sampler(model, temperature=0, batch_size=1).generate(PROMPTS, [8] * 3, SEEDS)
    assert together == apart


def test_greedy_takes_the_most_likely_token(model):
    (tokens,) = sampler(model, temperature=0).generate(PROMPTS[:1], [1], SEEDS[:1])
    assert tokens == [int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())]


def test_load_records_the_version(model):
    engine = sampler(model)
    engine.load(model.named_parameters(), version=4)
    assert engine.version == 4
