"""What a run would do and need, worked out before any weight is loaded: the text of `--dry_run`."""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from components.common.generation.engines import ENGINES
from components.common.kernels.pair_logps import SUPPORTED
from components.common.models.chat_templates import EncodedRow
from components.sapo.config import SAPOConfig
from components.sapo.losses import LOSSES
from components.sapo.planning import memory, remedies, sizes
from components.sapo.planning.sizes import GIB

H100 = 80e9  # bytes; planned for where no GPU is visible
PERCENTILE = 0.95  # rows longer than this share of all are not planned for


@dataclass(frozen=True)
class Node:
    """Where the run is to be.

    Args:
        processes: of the whole run, one a GPU.
        parallelism: how they share out the model.
        gpu_memory: of one GPU in GB; None for what is visible, or 80 where nothing is.
        use_cpu: the processes run on this machine's CPU.
    """

    processes: int = 1
    parallelism: sizes.Parallelism = "ddp"
    gpu_memory: float | None = None
    use_cpu: bool = False

    def capacity(self) -> tuple[float, str, bool]:
        """Bytes of one process, what they are of, and whether that is a CPU."""
        if self.gpu_memory is not None:
            return self.gpu_memory * 1e9, f"a GPU of {self.gpu_memory:g} GB", False
        if torch.cuda.is_available() and not self.use_cpu:
            visible = torch.cuda.get_device_properties(0).total_memory
            return float(visible), torch.cuda.get_device_name(0), False
        if self.processes > 1 and not self.use_cpu:
            return H100, "a GPU of 80 GB (none is visible; --gpu_memory GB for another)", False
        whole = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return whole / self.processes, "this machine's memory" + (" for each" if self.processes > 1 else ""), True


def describe(
    rows: list[EncodedRow], dropped: int, model_config: Any, args: SAPOConfig, node: Node | None = None
) -> list[str]:
    """Lines about steps, tokens and memory."""
    node = node or Node(use_cpu=args.use_cpu)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * node.processes
    steps_per_epoch = math.ceil(len(rows) / per_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    prompt = sum(len(row["prompt_ids"]) for row in rows) / len(rows)
    response = sum(len(row["chosen_ids"]) for row in rows) / len(rows)
    loss = ", ".join(f"{name} {getattr(args, name):g}" for name in LOSSES[args.loss_type].settings)
    generated = per_step * args.responses_per_prompt * args.max_new_tokens
    return [
        f"loss: {args.loss_type}, {loss}",
        f"rows: {len(rows):,} ({dropped:,} dropped: prompt too long), mean {prompt:.0f} + {response:.0f} tokens",
        f"steps: {steps:,} ({steps_per_epoch:,} an epoch), {per_step} rows in and {per_step} pairs out of each",
        f"tokens of a step: at most {generated:,} generated, about {2 * per_step * (prompt + response):,.0f} trained on",
        *memory_lines(rows, model_config, args, node),
    ]


def memory_lines(rows: list[EncodedRow], model_config: Any, args: SAPOConfig, node: Node) -> list[str]:
    """Memory of one GPU, whether it is enough, and what to change where it is not."""
    capacity, place, on_cpu = node.capacity()
    model, setup = sizes.architecture(model_config), _setup(rows, args, node, on_cpu)
    batch = _batch(rows, args, packed=getattr(model_config, "model_type", None) in SUPPORTED)
    planned = memory.plan(model, batch, setup, capacity)
    spread = f"{node.processes} processes, {node.parallelism}" if node.processes > 1 else "1 process"
    precision = "bfloat16" if setup.bf16 else "float32"
    of = f"{model.parameters / 1e6:,.1f}M parameters, {precision}, {spread}"
    lines = [
        f"memory of each process: {planned.peak / GIB:.2f} GiB ({of})",
        *(f"        {moment}: {_parts(parts)}" for moment, parts in _moments(planned) if parts),
    ]
    lines += _engine_lines(model, setup, args, capacity)
    verdict = f"{planned.peak / GIB:.1f} of {capacity / GIB:.1f} GiB of {place}"
    if planned.fits:
        return [*lines, f"        it fits: {verdict}"]
    change = remedies.advice(model, batch, setup, capacity)
    return [*lines, f"        NOT ENOUGH: {verdict}; it would fit with {change}"]


def _moments(planned: memory.Plan) -> list[tuple[str, dict[str, float]]]:
    return [
        ("always", planned.always),
        ("forward and backward", planned.train),
        ("or the optimizer's step", planned.step),
        ("and generation beside" if planned.overlaps else "or generation", planned.generate),
    ]


def _parts(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())


def _engine_lines(model: sizes.Architecture, setup: sizes.Setup, args: SAPOConfig, capacity: float) -> list[str]:
    """What is wrong with the engine's share of the GPU, if anything is."""
    needed = memory.engine_needs(model, setup, args.max_length)
    if setup.engine is None or setup.on_cpu or needed <= setup.engine_share * capacity:
        return []
    share = math.ceil(needed / capacity * 100) / 100
    return [
        f"        {setup.engine.title} has {setup.engine_share * capacity / GIB:.1f} GiB and needs {needed / GIB:.1f}: "
        f"--gpu_memory_utilization {share:.2f} or more"
    ]


def _longest(rows: list[EncodedRow]) -> tuple[int, int]:
    """Tokens of long prompts, and of long rows."""
    prompts = [len(row["prompt_ids"]) for row in rows]
    return _percentile(prompts), _percentile([len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows])


def _percentile(lengths: list[int]) -> int:
    return sorted(lengths)[int(PERCENTILE * (len(lengths) - 1))]


def _batch(rows: list[EncodedRow], args: SAPOConfig, packed: bool) -> sizes.MicroBatch:
    """A micro-batch of long rows. B begins, on average, in the middle of where it may."""
    prompt, whole = _longest(rows)
    response = max(whole - prompt, 2)
    last_start = max(0, response - args.segment_length)
    shared = 0 if args.no_segment else last_start // 2
    from_divergence = LOSSES[args.loss_type].shared_cancels
    return sizes.micro_batch(args.per_device_train_batch_size, prompt, response, shared, from_divergence, packed)


def _setup(rows: list[EncodedRow], args: SAPOConfig, node: Node, on_cpu: bool) -> sizes.Setup:
    sharded = node.processes > 1 and node.parallelism != "ddp"
    served = args.served_dtype()
    served_bytes = 0 if served is None else torch.finfo(served).bits // 8
    engine_bytes = 2 if args.engine_dtype() == "bfloat16" else 4
    if sharded and ENGINES[args.sampler].serves_in_place:
        served_bytes = engine_bytes  # it needs the whole model
    prompt, whole = _longest(rows)
    longest = prompt if args.no_segment else max(prompt, whole - args.segment_length)  # with A
    prompts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.responses_per_prompt
    return sizes.Setup(
        processes=node.processes,
        parallelism=node.parallelism,
        bf16=bool(args.bf16),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        reference=LOSSES[args.loss_type].reference,
        checkpointing=args.gradient_checkpointing,
        accumulates=args.gradient_accumulation_steps > 1,
        sampler=args.sampler,
        served_bytes=served_bytes,
        engine_bytes=engine_bytes,
        utilization=args.gpu_memory_utilization,
        sleeps=args.sleep_level > 0,
        overlaps=args.schedule == "overlap",
        cached_prompts=min(args.sampler_batch_size, prompts),
        cached_length=min(longest + args.max_new_tokens, args.max_length),
        adapter=_adapter(args),
        on_cpu=on_cpu,
    )


def _adapter(args: SAPOConfig) -> sizes.Adapter | None:
    """The adapter that is trained, if one is."""
    if not args.use_peft:
        return None
    targets = args.lora_target_modules
    return sizes.Adapter(args.lora_r, (targets,) if isinstance(targets, str) else tuple(targets), args.load_in_4bit)
