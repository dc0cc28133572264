"""LoRA: an adapter is trained on a base that stays as it is. The EMA and the reference are lists of the adapter's weights.

The adapter is part of the model itself (transformers' own PEFT integration), so everything that runs the model runs it too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.common.core.errors import UserError
from components.common.models.loading import load_model
from components.sapo.config import SAPOConfig

ADAPTER = "default"


def load_policy(directory: str, args: SAPOConfig) -> PreTrainedModel:
    """The model to train, in float32; a base that only carries an adapter in bfloat16 where `bf16` is on, or in 4 bits."""
    dtype = torch.bfloat16 if args.use_peft and args.bf16 else torch.float32
    return load_model(directory, dtype, **_quantization(args))


def add_adapter(model: PreTrainedModel, args: SAPOConfig) -> None:
    """Freezes the model and gives it a float32 adapter to train: a new one, which changes nothing yet, or a given one.

    Raises:
        UserError: the given adapter is none.
        ValueError: the base was to be in 4 bits and is not.
    """
    from peft import LoraConfig

    if args.load_in_4bit and not getattr(model, "is_loaded_in_4bit", False):
        raise ValueError(
            "load_in_4bit: the model is not in 4 bits; give its directory, or load it with `lora.load_policy`"
        )
    _keep_as_quantised(model)
    if args.lora_adapter is not None:
        if not (Path(args.lora_adapter) / "adapter_config.json").is_file():
            raise UserError(f"lora_adapter = {args.lora_adapter}: has no adapter_config.json")
        model.load_adapter(args.lora_adapter, adapter_name=ADAPTER, is_trainable=True)
    else:
        targets: Any = args.lora_target_modules
        torch.manual_seed(args.seed)  # the first factor is random, and Trainer seeds only after this
        model.add_adapter(
            LoraConfig(
                r=args.lora_r,
                lora_alpha=args.lora_alpha,
                lora_dropout=0.0,  # both responses of a pair, and the reference, must see the same network
                target_modules=targets if isinstance(targets, str) else list(targets),
                task_type="CAUSAL_LM",
            ),
            adapter_name=ADAPTER,
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of base and adapter together, named as in the base, one at a time, in the type of the base."""
    from peft.tuners.lora import LoraLayer

    adapted: dict[str, Any] = {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}
    for name, weight in policy.named_parameters():
        if ".lora_" in name:
            continue
        layer, is_adapted, leaf = name.partition(".base_layer.")
        if is_adapted and leaf == "weight":
            yield (
                f"{layer}.{leaf}",
                (weight.float() + adapted[layer].get_delta_weight(ADAPTER).float()).to(weight.dtype),
            )
        else:
            yield f"{layer}.{leaf}" if is_adapted else name, weight


@torch.no_grad()
def merge_into(base: PreTrainedModel, policy: nn.Module) -> None:
    """Adds a policy's adapter to a base as it was loaded from disk, which may be more exact than the policy's (4 bits)."""
    from peft.tuners.lora import LoraLayer

    weights = dict(base.named_parameters())
    for name, module in policy.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            weight = weights[f"{name}.weight"]
            delta = layer.get_delta_weight(ADAPTER).to(weight.device, torch.float32)
            weight.copy_(weight.float() + delta)


def _quantization(args: SAPOConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the base: NF4 with 8-bit scales (QLoRA), made on this process's device."""
    if not args.load_in_4bit:
        return {}
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
    )
    return {"quantization_config": settings, "device_map": {"": str(args.device)}}


def _keep_as_quantised(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew in place, which it does on a CPU with AVX-512 BF16 when a model in
    eval mode generates: its scales are rounded to bfloat16 then, and its products pass no gradient on."""
    layers: Any = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
