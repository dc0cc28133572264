"""The Hugging Face sampler: limits, stops, order, reproducibility."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from components.common.generation import hf
from components.common.generation.hf import HFSampler, _SeededDraw
from components.common.generation.protocol import SamplingSettings, request_seed
from components.common.kernels.cpu import decode as cpu_decode
from components.common.models.loading import load_model

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


@pytest.fixture
def family(request):
    """Three query heads to a key-value head; Mistral's sliding window is shorter than what is generated."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    more = {"sliding_window": 4} if request.param == "mistral" else {}
    config = AutoConfig.for_model(request.param, num_attention_heads=6, num_key_value_heads=2, **sizes, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Qwen2's, which start at 0
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"], indirect=True)
@pytest.mark.parametrize("prompts", [PROMPTS, [[5], [6], [7]], [[5], [6, 7, 8]] * 5, [list(range(5, 20))]])
@pytest.mark.parametrize("group", [1, 12, 1024])
def test_quick_decoding_generates_what_transformers_does(family, prompts, group, monkeypatch):
    """Prompts of one token and of several, as many as are few rows and more; each in a group of its own, some, all in one."""
    seeds, limits = list(range(len(prompts))), [12] * len(prompts)
    monkeypatch.setattr(cpu_decode, "PREFILL_TOKENS", group)
    calls = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(a), attend(*a, **k))[1])
    ours = sampler(family).generate(prompts, limits, seeds)
    assert any(query.shape[1:3] == (2, 3) for query, *_ in calls)  # queries of a step, grouped
    assert family.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in family.modules())
    monkeypatch.setattr(hf, "quick_decoding", lambda *arguments: nullcontext())
    monkeypatch.setattr(hf, "prefill", lambda *arguments: None)
    assert ours == sampler(family).generate(prompts, limits, seeds)


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)  # with and without a bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_are_packed_for_as_long_as_it_generates(family, dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")
    family.to(dtype)
    layers = {m: m.weight for m in family.modules() if isinstance(m, nn.Linear)}
    inputs = {m: torch.randn(3, 2, m.in_features, dtype=dtype) for m in layers}
    expected = {m: m(x) for m, x in inputs.items()}
    with torch.no_grad(), cpu_decode.quick_decoding(family, tokens=8):
        for module, x in inputs.items():
            assert module.forward.func is cpu_decode._packed_linear
            torch.testing.assert_close(
                module(x), expected[module], atol=1e-6, rtol=0.01 if dtype.itemsize == 2 else 1e-5
            )
            with torch.autocast("cpu", torch.bfloat16):  # a layer before it gave bfloat16
                assert module(x.bfloat16()).dtype == torch.bfloat16
    assert all(m.weight is weight and "forward" not in vars(m) for m, weight in layers.items())
    with cpu_decode.quick_decoding(family, tokens=7):
        assert not any("forward" in vars(m) for m in layers)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_weights_that_changed_are_seen_by_the_next_generate(family):
    engine, limits = sampler(family), [12] * len(PROMPTS)
    before = engine.generate(PROMPTS, limits, [0] * len(PROMPTS))
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert engine.generate(PROMPTS, limits, [0] * len(PROMPTS)) != before


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_cache_is_what_the_prompts_alone_have_and_grows_in_place(family, monkeypatch):
    """Rows of 1 and 5 tokens (their last left out) in groups of their own, and 2 more: places 4 and 0 to 3 of 7."""
    monkeypatch.setattr(cpu_decode, "PREFILL_TOKENS", 1)
    prompts = [[7, 8], [5, 6, 7, 8, 9]]
    with torch.no_grad():
        cache = cpu_decode.prefill(family, prompts, more_tokens=2)
        alone = family(torch.tensor([prompts[1][:-1]]), use_cache=True).past_key_values
    assert cache.get_seq_length() == 4
    for layer, whole in zip(cache.layers, alone.layers, strict=True):
        assert torch.equal(layer.keys[1], whole.keys[0]) and torch.equal(layer.values[1], whole.values[0])
        assert not layer.keys[0, :, :3].any() and layer.keys[0, :, 3].any()
    layer, place = cache.layers[0], cache.layers[0].keys.data_ptr()
    keys, values = layer.update(torch.ones(2, 2, 1, 8), 2 * torch.ones(2, 2, 1, 8))
    assert keys.shape == (2, 2, 5, 8) and keys.data_ptr() == place
    assert (keys[:, :, 4] == 1).all() and (values[:, :, 4] == 2).all()
    assert torch.equal(keys[1, :, :4], alone.layers[0].keys[0])


@pytest.mark.parametrize("family", ["mistral"], indirect=True)
def test_a_sliding_window_keeps_the_cache_of_transformers(family):
    assert cpu_decode.prefill(family, PROMPTS, more_tokens=2) is None


@pytest.mark.parametrize(
    ("lengths", "groups"), [([3, 4, 5], [(0, 2), (2, 3)]), ([20], [(0, 1)]), ([0, 9], [(0, 1), (1, 2)])]
)
def test_groups_hold_their_padding(lengths, groups, monkeypatch):
    """At most 10 tokens: 2 x 4 fit and 3 x 5 do not; what is too long is alone."""
    monkeypatch.setattr(cpu_decode, "PREFILL_TOKENS", 10)
    assert list(cpu_decode._groups(lengths)) == groups


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
