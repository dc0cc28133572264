"""Models and pairs that are measured, and the arithmetic they need."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from components.common.kernels.pair_packing import PairIds
from components.common.training.config import has_fast_bfloat16


@dataclass(frozen=True)
class Shape:
    """Pairs of one batch, in tokens; a pair of numbers is a range to draw from."""

    pairs: int = 2
    prompt: tuple[int, int] = (200, 400)
    response: tuple[int, int] = (150, 300)
    segment: tuple[int, int] = (64, 128)

    def __str__(self) -> str:
        def tokens(ends: tuple[int, int]) -> str:
            return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"

        lengths = f"prompt {tokens(self.prompt)}, response {tokens(self.response)}, segment {tokens(self.segment)}"
        return f"{self.pairs} pairs, {lengths}"


def precisions(quick: bool) -> list[torch.dtype]:
    """What is worth timing on this machine; in a quick run only the fastest."""
    dtypes = [torch.float32, torch.bfloat16] if has_fast_bfloat16() else [torch.float32]
    return dtypes[-1:] if quick else dtypes


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_dtype(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model itself with its weights in another type. By torch's own `to`: that of transformers is wrapped and untyped."""
    torch.nn.Module.to(model, dtype)
    return model


def smollm2_shape(layers: int = 30, vocabulary: int = 49152) -> LlamaForCausalLM:
    """Random weights in the shape of SmolLM2-135M."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )

    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, directory: str) -> None:
    """The model with a tokenizer of numbers: text plays no part here."""
    model.save_pretrained(directory)
    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, 1000)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    wrapped.chat_template = "{{ messages }}"  # never used: rows are ids already
    wrapped.save_pretrained(directory)


def make_pairs(shape: Shape, seed: int = 0) -> list[PairIds]:
    """Pairs of random tokens as self-play makes them: B' in the middle, A shared, C kept."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(shape.pairs):
        prompt, response, segment = (
            int(random.integers(a, b + 1)) for a, b in (shape.prompt, shape.response, shape.segment)
        )
        chosen = random.integers(5, 1000, response).tolist()
        start = int(random.integers(0, response - segment + 1))
        replacement = random.integers(5, 1000, segment).tolist()
        rejected = chosen[:start] + replacement + chosen[start + segment :]
        pairs.append(PairIds(random.integers(5, 1000, prompt).tolist(), chosen, rejected))
    return pairs


def learner_flops(model: LlamaForCausalLM, pairs: list[PairIds], scored_from_divergence: bool) -> float:
    """Multiplications and additions of one forward and backward that computes nothing twice: 6 a parameter and token."""
    head = model.lm_head.weight.numel()
    trunk = sum(p.numel() for p in model.model.layers.parameters())
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) - p.shared() - 2 for p in pairs)
    scored = sum(len(p.chosen) + len(p.rejected) - (2 if scored_from_divergence else 1) * p.shared() for p in pairs)
    return 6.0 * (trunk * tokens + head * scored)


def matrix_speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of this machine's matrix products, at the model's sizes."""
    a, b = torch.randn(1024, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    best = 1e9
    for _ in range(200):  # enough to ride out a moment in which the machine is slow
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2.0 * a.shape[0] * b.shape[0] * b.shape[1] / best
