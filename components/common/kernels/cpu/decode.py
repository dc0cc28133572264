"""What makes transformers' generate quick on a CPU, where it spends much of its time on other things than arithmetic.

Its key-value cache is copied for each token, repeated for each query head; prompts of unlike lengths are padded; and a linear
layer of a few rows runs at a third of the speed of memory. The tokens are the same.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from components.common.kernels.cpu import onednn

GROUPED = "sapo_grouped"
# Prompt tokens, padding too, that are computed together: enough for products at full speed, few enough to pad little.
PREFILL_TOKENS = 1024
FEWEST_TOKENS = 8  # by arithmetic, 5 tokens pay for laying out the weights


@contextmanager
def quick_decoding(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Attention and linear layers that are made for a step of one token a row; on a GPU the model stays as it is.

    Args:
        tokens: how many are going to be generated. With few, the linear layers stay as they are.
    """
    if model.device.type != "cpu":
        yield
        return
    config: Any = model.config
    attention = config._attn_implementation
    plain: list[Any] = [module for module in model.modules() if tokens >= FEWEST_TOKENS and _can_be_packed(module)]
    config._attn_implementation = GROUPED if attention == "sdpa" else attention
    for module in plain:
        module.forward = functools.partial(_packed_linear, module, onednn.pack(module.weight))
    try:
        yield
    finally:
        config._attn_implementation = attention
        for module in plain:
            del module.forward  # the class's own again


def prefill(model: PreTrainedModel, prompts: list[list[int]], more_tokens: int) -> DynamicCache | None:
    """Keys and values of all but the last token of each prompt, computed in groups of like lengths.

    Args:
        model: on the CPU.
        prompts: token ids. The shortest come first, or much is padding.
        more_tokens: how many are going to be generated; there is room for them.

    Returns:
        The cache as if the prompts had been padded on the left to the longest, or None for a model that keeps
        something else than all keys and values (a sliding window, a recurrent state).
    """
    cache = DynamicCache(config=model.config)
    if model.device.type != "cpu" or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    heads = [prompt[:-1] for prompt in prompts]
    longest = max(map(len, heads))
    if longest == 0:
        return None
    room = longest + 1 + more_tokens
    layers: list[_RoomyLayer] = []
    for low, high in _groups([len(head) for head in heads]):
        parts = _keys_and_values(model, heads[low:high])
        layers = layers or [_RoomyLayer(*part, rows=len(prompts), length=longest, room=room) for part in parts]
        for layer, part in zip(layers, parts, strict=True):
            layer.place(*part, low, [len(head) for head in heads[low:high]])
    cache.layers = list(layers)
    return cache


def _groups(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Ends of runs of rows that have at most PREFILL_TOKENS tokens when padded to their longest."""
    low = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or (i + 1 - low) * max(lengths[low : i + 1]) > PREFILL_TOKENS:
            yield low, i
            low = i


def _keys_and_values(model: PreTrainedModel, prompts: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """Each layer's, (rows, heads, tokens, size); rows are padded on the right, where nothing that is real sees it."""
    longest = max(1, *map(len, prompts))
    input_ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    layers: list[Any] = model.base_model(input_ids=input_ids, use_cache=True).past_key_values.layers
    return [(layer.keys, layer.values) for layer in layers]


class _RoomyLayer(DynamicLayer):
    """Keys and values that grow in place; transformers' own layer copies all of them for each token.

    Args:
        keys, values: (any, heads, any, size), of the type to keep.
        rows: prompts of the batch.
        length: tokens of the longest; shorter rows begin with zeros, which are to be masked.
        room: most tokens of a row.
    """

    keys: Any  # (rows, heads, tokens, size)
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, *, rows: int, length: int, room: int) -> None:
        super().__init__()
        self.dtype = keys.dtype
        self.device = keys.device
        self.is_initialized = True
        self._buffers = [like.new_zeros(rows, like.shape[1], room, like.shape[3]) for like in (keys, values)]
        self._grow_to(length)

    def _grow_to(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def place(self, keys: Tensor, values: Tensor, low: int, lengths: list[int]) -> None:
        """Writes the first tokens of each row to the end of the rows from `low` on."""
        for whole, part in ((self.keys, keys), (self.values, values)):
            for i, length in enumerate(lengths):
                whole[low + i, :, whole.shape[2] - length :] = part[i, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (rows, heads, new tokens, size); returns all."""
        before = self.keys.shape[2]
        self._grow_to(before + key_states.shape[2])
        self.keys[:, :, before:], self.values[:, :, before:] = key_states, value_states
        return self.keys, self.values


def _can_be_packed(module: nn.Module) -> bool:
    """Whether this is a plain linear layer of a type that oneDNN multiplies here."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or "forward" in vars(module):
        return False
    return onednn.multiplies(module.weight.dtype)


def _packed_linear(module: Any, packed: Tensor, x: Tensor) -> Tensor:
    """The layer on weights as oneDNN wants them, which it would otherwise lay out anew in each call.

    At 8 rows 1.3 to 2.3 times as fast in bfloat16, 1.5 to 4 times in float32 (where the peer is MKL), two threads.
    """
    if x.dtype != module.weight.dtype:  # under autocast
        return F.linear(x, module.weight, module.bias)
    return onednn.packed_linear(x, packed, module.bias)


def _attend_grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, but a single query's heads that share a key-value head are that head's queries.

    transformers repeats keys and values for every query head first, which at each token costs several times the attention.

    Args:
        query: (batch, heads, queries, size); key and value: (batch, key-value heads, keys, size).
        attention_mask: (batch, 1, queries, keys), or None where all is seen.

    Returns:
        (batch, queries, heads, size).
    """
    if query.shape[2] > 1 or options.keys() & {"position_bias", "cache"}:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    mixed = F.scaled_dot_product_attention(groups, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return mixed.reshape(len(query), 1, -1, value.shape[3]), None


AttentionInterface.register(GROUPED, _attend_grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
