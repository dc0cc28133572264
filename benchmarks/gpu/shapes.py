"""Models that are made from their sizes on the device, and pairs as long as Capybara's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.gpu.record import Context
from components.common.kernels.pair_packing import PairBatch, PairIds, collate
from components.common.kernels.pair_spans import Span, sight

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1024,
}
SEGMENT = 256  # SAPO's N_seg
LONGEST, MEDIAN = 2048, 1160  # tokens of prompt and response


def sizes(context: Context, name: str, **more: Any) -> dict[str, Any]:
    """The sizes of "1B" or "8B"; tiny ones in a test."""
    whole = {"1B": LLAMA_1B, "8B": LLAMA_8B}[name]
    return (whole | more) if not context.tiny else whole | TINY


def config_of(family: str, of: dict[str, Any]) -> Any:
    return AutoConfig.for_model(family, **{"max_position_embeddings": 8192, "pad_token_id": 0} | of)


def random_model(
    device: torch.device, of: dict[str, Any], family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Random weights, made where they are to be."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(family, of), dtype=dtype)
    return model.to(device)


def _random_ids(random: np.random.Generator, vocabulary: int, count: int) -> list[int]:
    return random.integers(5, vocabulary, count).tolist()


def capybara_pair(random: np.random.Generator, vocabulary: int, scale: float = 1.0) -> PairIds:
    """A pair as self-play makes them: prompt + response log-normal with Capybara's median, at most 2,048 tokens; a segment of
    the response is another, and A before it is shared.

    Args:
        scale: of all lengths.
    """
    whole = int(np.clip(random.lognormal(np.log(MEDIAN), 0.5), 300, LONGEST) * scale)
    response = int(whole * random.uniform(0.3, 0.6))
    segment = min(max(int(SEGMENT * scale), 1), response - 1)
    chosen = _random_ids(random, vocabulary, response)
    start = int(random.integers(0, response - segment))
    rejected = chosen[:start] + _random_ids(random, vocabulary, segment) + chosen[start + segment :]
    return PairIds(_random_ids(random, vocabulary, whole - response), chosen, rejected)


def packed_tokens(pair: PairIds) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected) - pair.shared() - 2


def pairs_of(context: Context, tokens: int, vocabulary: int, seed: int) -> list[PairIds]:
    """As many pairs as fit into `tokens` when they are packed."""
    random = np.random.default_rng(seed)
    scale, tokens = (1 / 64, tokens // 64) if context.tiny else (1.0, tokens)
    pairs: list[PairIds] = []
    used = 0
    while True:
        pair = capybara_pair(random, vocabulary, scale)
        used += packed_tokens(pair)
        if used > tokens and pairs:
            return pairs
        pairs.append(pair)


def unshared(pairs: list[PairIds]) -> PairBatch:
    """Every response in one row after a prompt of its own: packed, and nothing shared."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    predictors: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    columns: list[int] = []
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    for row, response in enumerate(responses):
        sequence = (pairs[row % len(pairs)].prompt + response)[:-1]
        first = len(ids) + len(sequence) - len(response)
        spans.append(Span(len(ids), len(sequence), 0, 0))
        predictors += range(first, first + len(response))
        targets += response
        rows += [row] * len(response)
        columns += range(len(response))
        ids += sequence
        positions += range(len(sequence))
    longest = max(map(len, responses))
    return PairBatch(
        model_inputs={"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])},
        spans=spans,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        sources=torch.arange(len(targets)),
        response_mask=torch.arange(longest) < torch.tensor([len(r) for r in responses]).unsqueeze(1),
        tokens=torch.tensor([2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]),
    )


def batch_of(pairs: list[PairIds], form: str, loss: str) -> PairBatch:
    """Pairs as `shared`, `unshared` or `padded` rows."""
    if form == "unshared":
        return unshared(pairs)
    return collate(pairs, 0, share=form == "shared", from_divergence=form == "shared" and loss == "dpo")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward and backward pass that computes nothing twice.

    2 for each weight and token forward, twice that backward, where it is trained; 4 a visible query-key pair, head and size of
    a head in attention, twice that backward. The head counts for scored tokens alone; embeddings, norms, softmax not at all.
    """

    trunk: float
    head: float
    attention: float

    @property
    def all(self) -> float:
        return self.trunk + self.head + self.attention


def flops(model: PreTrainedModel, batch: PairBatch, trains_base: bool = True) -> Flops:
    """Of what a packed batch computes."""
    config: Any = model.config
    layers: Any = model.base_model.layers
    weights = sum(p.numel() for n, p in layers.named_parameters() if ".lora_" not in n and p.dim() == 2)
    adapters = sum(p.numel() for n, p in layers.named_parameters() if ".lora_" in n)
    tokens, scored = batch.real_tokens(), len(batch.targets)
    factor = 6 if trains_base else 4  # a frozen weight has no gradient of its own
    size = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    head: Tensor = model.get_output_embeddings().weight
    return Flops(
        trunk=(factor * weights + 6 * adapters) * tokens,
        head=factor * head.numel() * scored,
        attention=12 * size * visible_pairs(batch.spans or []),
    )


def visible_pairs(spans: list[Span]) -> float:
    """Queries with each key that they see."""
    seen = sight(spans, None)
    own = np.arange(len(seen.low)) - seen.low.astype(np.int64) + 1
    return float((own - (seen.gap_end - seen.gap_start)).sum())
