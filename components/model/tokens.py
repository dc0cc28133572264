"""Puts a chat template in place: its special tokens, resized embeddings, and generation that stops at every turn's end."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.common.models.chat_templates import chat_template, end_of_turn, new_tokens


def install_chat_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Changes both in place: template, special tokens, eos, pad, embeddings and generation config.

    After it `tokenizer.eos_token` is the token that ends a turn. With "keep" only padding and the stop tokens are set.
    """
    stop_ids = _ids(model.generation_config.eos_token_id) | _ids(tokenizer.eos_token_id)
    if name != "keep":
        with_bos = _adds_bos(tokenizer)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": new_tokens(name)}, replace_extra_special_tokens=False
        )
        if (token := end_of_turn(name)) is not None:
            tokenizer.eos_token = token
        tokenizer.chat_template = chat_template(name, with_bos)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _resize_embeddings(model, len(tokenizer))
    _set_stop_tokens(model, tokenizer, stop_ids)


def _ids(token_ids: int | list[int] | None) -> set[int]:
    if token_ids is None:
        return set()
    return {token_ids} if isinstance(token_ids, int) else set(token_ids)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer opens every text with BOS, as the model saw in pretraining; the template then does too."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _resize_embeddings(model: PreTrainedModel, size: int) -> None:
    """Grows the embeddings to `size` rows; new rows start at the mean of the old, so that no new token is an outlier."""
    old: int = _weight(model.get_input_embeddings()).shape[0]
    if size <= old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = _weight(layer)
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)


def _weight(layer: Any) -> torch.Tensor:
    return layer.weight


def _set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]) -> None:
    stop_ids = stop_ids | _ids(tokenizer.eos_token_id)
    model.generation_config.eos_token_id = sorted(stop_ids)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
