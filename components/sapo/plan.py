"""What a run would do and need, worked out before any weight is loaded: the text of `--dry_run`."""

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from components.common.chat_templates import EncodedRow
from components.sapo.config import SAPOConfig
from components.sapo.losses import LOSSES

GIB = 2**30
# Optimizer state per parameter, in float32 values.
OPTIMIZER_STATES = {"rmsprop": 1, "sgd": 0, "adafactor": 0}


def describe(rows: list[EncodedRow], dropped: int, model_config: Any, args: SAPOConfig) -> list[str]:
    """Lines about steps, tokens and memory of one device."""
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(rows) / per_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    prompt = sum(len(row["prompt_ids"]) for row in rows) / len(rows)
    response = sum(len(row["chosen_ids"]) for row in rows) / len(rows)
    generated = per_step * args.responses_per_prompt * args.max_new_tokens
    return [
        f"rows: {len(rows):,} ({dropped:,} dropped: prompt too long), mean {prompt:.0f} + {response:.0f} tokens",
        f"steps: {steps:,} ({steps_per_epoch:,} an epoch), {per_step} rows in and {per_step} pairs out of each",
        f"tokens of a step: at most {generated:,} generated, about {2 * per_step * (prompt + response):,.0f} trained on",
        *_memory_lines(rows, model_config, args),
    ]


def _memory_lines(rows: list[EncodedRow], model_config: Any, args: SAPOConfig) -> list[str]:
    parameters = _parameters(model_config)
    copies = {"policy": 1, "gradients": 1, "optimizer": OPTIMIZER_STATES.get(str(args.optim), 2), "EMA": 1}
    copies["reference"] = int(LOSSES[args.loss_type].reference)
    weights = 4 * parameters * sum(copies.values())
    parts = ", ".join(f"{name} {4 * parameters * n / GIB:.2f}" for name, n in copies.items() if n)
    # The vocabulary projection: logits, their float32 copy and the gradient live at once.
    longest = sorted(len(row["chosen_ids"]) for row in rows)[int(0.95 * (len(rows) - 1))]
    logits = 3 * 4 * 2 * args.per_device_train_batch_size * longest * model_config.get_text_config().vocab_size
    return [
        f"memory: {parameters / 1e6:,.1f}M parameters in float32: {weights / GIB:.2f} GiB ({parts})",
        f"        + about {logits / GIB:.2f} GiB for logits at the 95th percentile of response length, + activations",
    ]


def _parameters(model_config: Any) -> int:
    """Parameter count of an architecture, without memory for it."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config).num_parameters()
