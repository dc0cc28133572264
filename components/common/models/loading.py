"""Loading what the model stage (or a training stage) wrote. Needs torch and transformers."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from components.common.core.errors import UserError
from components.common.models.chat_templates import require_chat_template
from components.common.storage.locations import existing_path


def quiet_bars() -> None:
    """Switches the bars of transformers off where they would fill a log line by line."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def check_model_directory(model: str) -> Path:
    """The directory of a Hugging Face model.

    Raises:
        UserError: it is missing, or has no config.json.
    """
    path = existing_path(model, "model")
    if not (path / "config.json").is_file():
        raise UserError(f"--model {model}: has no config.json; give a directory that the model stage wrote")
    return path


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, which must have a chat template."""
    path = check_model_directory(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {model}: its tokenizer cannot be loaded: {_one_line(error)}") from error
    require_chat_template(tokenizer, f"--model {model}")
    return tokenizer


def load_config(model: str) -> Any:
    """The model's Hugging Face configuration."""
    path = check_model_directory(model)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: its config.json cannot be read: {_one_line(error)}") from error


def load_model(model: str, dtype: torch.dtype | str = "auto", **options: Any) -> PreTrainedModel:
    """The causal language model of a directory, from safetensors only.

    Raises:
        UserError: weights are missing, truncated or of another architecture.
    """
    path = check_model_directory(model)
    quiet_bars()
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise UserError(f"--model {model}: its weights cannot be loaded: {_one_line(error)}") from error


@contextmanager
def whole_models() -> Iterator[None]:
    """Models made within the block are whole where ZeRO-3 would shard each as it is made."""
    from transformers.integrations import deepspeed

    sharding = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def stop_ids(model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a turn: the tokenizer's, and the generation config's of a model or a model directory."""
    if isinstance(model, str):
        try:
            config: GenerationConfig | None = GenerationConfig.from_pretrained(model)
        except OSError:  # a model directory may do without
            config = None
    else:
        config = model.generation_config
    configured = config.eos_token_id if config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in [tokenizer.eos_token_id, *listed] if i is not None)


def model_digest(model: Path, piece: int = 2**20) -> str | None:
    """Tells models apart by their configuration and, of each file of weights, its size and its two ends.

    Returns:
        None where there are no weights: it is no directory, or one that was fetched for a dry run.
    """
    weights = sorted(model.glob("*.safetensors"))
    if not weights or not (model / "config.json").is_file():
        return None
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(piece))
            file.seek(max(0, size - piece))
            digest.update(file.read(piece))
    return digest.hexdigest()
