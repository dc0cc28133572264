"""What a GPU is told about packed pairs, checked without one: block masks, gathered keys, and that no length compiles anew."""

import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from components.common.kernels import gpu_attention, pair_attention
from components.common.kernels.gpu_attention import PlacedSegments, attend_varlen, block_mask
from components.common.kernels.pair_attention import PairLayout, attend_pairs
from components.common.kernels.pair_spans import Span, segments, sight

CPU = torch.device("cpu")
WINDOWS = [None, 1, 50, 200, 4096]


def random_spans(seed: int, pairs: int, longest: int) -> list[Span]:
    """Some parts of pairs are empty, but for the prefix, which has at least the prompt's last token."""
    random = np.random.default_rng(seed)
    spans, start = [], 0
    for _ in range(pairs):
        prefix, chosen, rejected = (int(n) for n in random.integers(0, longest, 3) * (random.random(3) > 0.2))
        spans.append(Span(start, max(prefix, 1), chosen, rejected))
        start = spans[-1].end
    return spans


def dense(spans: list[Span], window: int | None) -> torch.Tensor:
    """Which token (row) sees which, by definition: of its pair, before it, of the prefix or its own branch, in the window."""
    pair, branch, position = [], [], []
    for i, span in enumerate(spans):
        lengths = span.prefix, span.chosen, span.rejected
        pair += [i] * sum(lengths)
        branch += [kind for kind, n in enumerate(lengths) for _ in range(n)]
        position += [*range(span.prefix), *range(span.prefix, span.prefix + span.chosen)]
        position += range(span.prefix, span.prefix + span.rejected)
    of_pair, of_branch, at = (torch.tensor(values) for values in (pair, branch, position))
    token = torch.arange(len(pair))
    seen = (of_pair[:, None] == of_pair) & (token <= token[:, None])
    seen &= (of_branch == 0) | (of_branch == of_branch[:, None])
    return seen if window is None else seen & (at[:, None] - at < window)


def all_blocks(seed: int) -> list[Span]:
    return random_spans(seed, pairs=1 + seed % 5, longest=(40, 130, 400)[seed % 3])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seed", range(12))
def test_the_block_mask_is_that_of_the_dense_mask(seed, window):
    spans = all_blocks(seed)
    expected = dense(spans, window)
    tokens = len(expected)
    mask = block_mask(sight(spans, window), CPU)

    index = torch.arange(tokens)
    assert torch.equal(mask.mask_mod(None, None, index[:, None], index), expected)

    theirs = create_block_mask(lambda b, h, q, k: expected[q, k], None, None, tokens, tokens, device="cpu")
    assert mask.shape == theirs.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(m, f"{name}_num_blocks")[0, 0] for m in (mask, theirs)), f"{name}_indices"
        mine, other = counts
        assert torch.equal(mine, other), name
        for row, count in enumerate(mine.tolist()):
            columns = [getattr(m, indices)[0, 0, row, :count].tolist() for m in (mask, theirs)]
            assert columns[0] == columns[1], (name, row)


def test_a_block_mask_of_16k_tokens_takes_milliseconds():
    spans = [Span(i * 2048, 1000, 500, 548) for i in range(8)]
    PairLayout(spans).block_mask(None, CPU)
    start = time.perf_counter()
    PairLayout(spans).block_mask(None, CPU)
    assert time.perf_counter() - start < 0.1  # a mask of tokens x tokens takes seconds


def parts(spans: list[Span]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, spans[-1].end, 16, requires_grad=True) for heads in (4, 2, 2)]


def gradients(result: torch.Tensor, of: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad((result * torch.randn_like(result)).sum(), of)


@pytest.mark.parametrize("window", [None, 3, 60])
@pytest.mark.parametrize("seed", range(4))
def test_flex_attention_under_the_block_mask(seed, window):
    spans = all_blocks(seed)
    inputs = [tensor.detach() for tensor in parts(spans)]
    ours, _ = attend_pairs(None, *inputs, None, 0.25, PairLayout(spans), window)
    flex = flex_attention(*inputs, block_mask=block_mask(sight(spans, window), CPU), scale=0.25, enable_gqa=True)
    torch.testing.assert_close(flex.transpose(1, 2), ours)


def sdpa_varlen(query, key, value, query_ends, key_ends, longest_queries, longest_keys, scaling, window):
    """What FlashAttention's varlen does: causal from the last query and key back, and a window to the left."""
    results = []
    bounds = zip(query_ends[:-1], query_ends[1:], key_ends[:-1], key_ends[1:], strict=True)
    for q_low, q_high, k_low, k_high in bounds:
        queries, keys = int(q_high - q_low), int(k_high - k_low)
        assert queries <= longest_queries and keys <= longest_keys
        distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        heads = (t.transpose(0, 1) for t in (query[q_low:q_high], key[k_low:k_high], value[k_low:k_high]))
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scaling, enable_gqa=True)
        results.append(mixed.transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize("window", [None, 3, 60])
@pytest.mark.parametrize("seed", range(8))
def test_gathered_keys_give_what_attention_per_pair_gives(seed, window):
    spans = all_blocks(seed)
    inputs = parts(spans)
    ours, _ = attend_pairs(None, *inputs, None, 0.25, PairLayout(spans), window)
    varlen = attend_varlen(*inputs, PlacedSegments(segments(spans), CPU), 0.25, window, sdpa_varlen).transpose(1, 2)
    torch.testing.assert_close(varlen, ours)
    for mine, theirs in zip(gradients(varlen, inputs), gradients(ours, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_new_length_does_not_compile_anew(monkeypatch):
    """Dynamo's half of compilation: what it guards on. Lengths are such that some numbers of blocks equal other sizes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(gpu_attention, "_compiled_flex_attention", lambda: compiled)
    torch._dynamo.reset()
    for window in (None, 60):  # no new window either
        # 4 blocks, as many as query heads; 2, as key-value heads; 16, as the size of a head
        for tokens in (512, 300, 256, 700, 2048, 1111):
            spans = [Span(0, 100, 50, 30), Span(180, tokens - 220, 30, 10)]
            inputs = [tensor.detach() for tensor in parts(spans)]
            mask = block_mask(sight(spans, window), CPU)
            mixed = gpu_attention.attend_flex(*inputs, mask, 0.25)
            torch.testing.assert_close(
                mixed.transpose(1, 2), attend_pairs(None, *inputs, None, 0.25, PairLayout(spans), window)[0]
            )
    assert counter.frame_count == 1


def test_float32_is_never_given_to_flash_attention(monkeypatch):
    monkeypatch.setattr(pair_attention, "ON_GPU", "varlen")
    called = []
    monkeypatch.setattr(gpu_attention, "attend_flex", lambda *args: called.append("flex"))
    monkeypatch.setattr(gpu_attention, "attend_varlen", lambda *args: called.append("varlen"))
    layout = PairLayout([Span(0, 4, 2, 2)])
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.zeros(1, 2, 8, 16, dtype=dtype)
        pair_attention._attend_on_gpu(query, query, query, 0.25, layout, None)
    assert called == ["flex", "varlen"]
