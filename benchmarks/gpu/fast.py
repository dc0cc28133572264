"""Speed: attention alone, the learner's step, the EMA, the sampler, a whole iteration."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback

from benchmarks.gpu import peers, planned
from benchmarks.gpu.record import Context, Value
from benchmarks.gpu.right import attention, away, flat, kernels
from benchmarks.gpu.shapes import batch_of, flops, pairs_of, random_model, sizes, visible_pairs
from benchmarks.gpu.there import H100_DENSE, has
from benchmarks.gpu.timing import best_seconds, graphs, host_waits, peak_memory, profiled, seconds_of, synchronize
from benchmarks.gpu.trainer import make_trainer
from benchmarks.preference import mean_loss
from components.common.generation.hf import HFSampler
from components.common.generation.protocol import SamplingSettings
from components.common.kernels import gpu_fusion, pair_attention
from components.common.kernels.pair_attention import PairLayout, attend_pairs
from components.common.kernels.pair_logps import response_logps, shared_prefix_attention
from components.common.kernels.pair_packing import PairIds
from components.common.kernels.vocabulary_head import chunked_logps
from components.sapo.ema import EMA, copy_weights
from components.sapo.planning.sizes import Adapter, Setup

BF16 = torch.bfloat16
LR = 1e-6


def attention_alone(context: Context) -> None:
    """Forward and backward of one layer's attention over packed pairs, whose kernels must agree; the faster one is used in what
    follows."""
    total: dict[Any, float] = {}
    for name, tokens in (("1B", 8192), ("8B", 8192), ("8B", 16384)):
        of = sizes(context, name)
        pairs = pairs_of(context, tokens, 1000, seed=0)
        for form in ("shared", "unshared"):
            batch = batch_of(pairs, form, "dpo")
            assert batch.spans is not None
            count = batch.real_tokens()
            heads = (of["num_attention_heads"], of["num_key_value_heads"], of["num_key_value_heads"])
            inputs = [
                torch.randn(1, count, h, of["head_dim"], device=context.device, dtype=BF16)
                .transpose(1, 2)
                .requires_grad_()
                for h in heads
            ]
            work = 12 * visible_pairs(batch.spans) * of["num_attention_heads"] * of["head_dim"]
            found: dict[Any, torch.Tensor] = {}
            for kernel in kernels(context, BF16):
                layout = PairLayout(batch.spans)

                def both(layout: PairLayout = layout, inputs: Any = inputs, size: int = of["head_dim"]) -> Any:
                    query, key, value = inputs
                    mixed, _ = attend_pairs(None, query, key, value, None, size**-0.5, layout)
                    return mixed, *torch.autograd.grad(mixed, inputs, mixed.detach())

                before = graphs()
                try:
                    with attention(kernel):
                        first = seconds_of(context, both)
                        found[kernel] = flat(both())
                        seconds = best_seconds(context, both)
                except Exception as error:  # the other one may work
                    context.failed[f"attention: {kernel}, {name}, {form}"] = (
                        f"{type(error).__name__}: {str(error)[:600]}"
                    )
                    total[kernel] = float("inf")
                    continue
                total[kernel] = total.get(kernel, 0.0) + seconds * (form == "shared")
                values = {
                    "ms": 1000 * seconds,
                    "tflops": work / seconds / 1e12,
                    "first_s": first,
                    "graphs": graphs() - before,
                }
                setting = f"{kernel}, {name}, {form}, {count:,} tokens"
                context.add("fast", "attention of a layer", setting, **values)
            if len(found) == 2:
                apart = away(*found.values())
                what = f"{name}, {form}, {count:,} tokens"
                context.add("right", "flex = varlen, forward and backward", what, apart < 0.02, error=apart)
    pair_attention.ON_GPU = min(total, key=lambda kernel: total[kernel])
    context.there["attention used"] = pair_attention.ON_GPU


def head_alone(context: Context) -> None:
    """Forward and backward of the fused head, and its part of a step."""
    for name, scored in (("1B", 256), ("8B", 256)) if context.tiny else (("1B", 4096), ("8B", 4096)):
        of = sizes(context, name)
        size, vocabulary = of["hidden_size"], of["vocab_size"]
        layer = torch.nn.Linear(size, vocabulary, bias=False, device=context.device)
        hidden = torch.randn(scored, size, device=context.device, requires_grad=True)
        targets = torch.randint(vocabulary, (scored,), device=context.device)

        def both(hidden: Any = hidden, layer: Any = layer, targets: Any = targets) -> None:
            with torch.autocast(context.device.type, BF16):
                logps = chunked_logps(hidden, layer, targets)
            torch.autograd.grad(logps.sum(), [hidden, layer.weight])

        with peak_memory(context) as peak:
            seconds = best_seconds(context, both)
        work = 6 * scored * size * vocabulary
        extra: dict[str, Any] = {"peak_gib": peak["allocated"] / 2**30} if peak else {}
        profile = profiled(context, both)
        context.add(
            "fast",
            "vocabulary head",
            f"{name}, {scored:,} scored tokens, {vocabulary:,} entries",
            ms=1000 * seconds,
            tflops=work / seconds / 1e12,
            **extra,
            _profile=profile,
        )


class Learner:
    """A model with its optimizer, and one step on pairs, as SAPOTrainer does it: reference log-probs are given."""

    def __init__(self, context: Context, model: PreTrainedModel, loss: str) -> None:
        self.context = context
        self.model = model.train()
        self.loss = loss
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.RMSprop(self.trained, lr=LR, foreach=True)

    def step(self, pairs: list[PairIds], form: str = "shared") -> None:
        # Open around backward too: checkpointed layers look the attention up again there.
        with shared_prefix_attention(self.model):
            self._forward_and_backward(pairs, form)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _forward_and_backward(self, pairs: list[PairIds], form: str) -> None:
        batch = batch_of(pairs, form, self.loss).to(self.context.device)
        with torch.autocast(self.context.device.type, BF16):
            logps = response_logps(self.model, batch)
        sums, tokens = logps.sum(dim=1), batch.response_mask.sum(dim=1)
        if self.loss == "dpo":
            reference = torch.full((len(pairs),), peers.REFERENCE, device=self.context.device)
            loss = mean_loss("dpo", sums, tokens, (reference, reference))
        else:
            loss = mean_loss("orpo", sums, tokens)
        loss.backward()


def timed_steps(
    context: Context,
    case: str,
    setting: str,
    batches: list[list[PairIds]],
    step: Callable[[list[PairIds]], None],
    work: Callable[[list[PairIds]], float] | None,
    raw: Callable[[list[PairIds]], float] | None,
) -> tuple[float, dict[str, float]]:
    """Adds a row of steps on batches of unlike lengths. Returns pairs a second, and the peak memory."""
    before = graphs()
    with peak_memory(context) as peak:
        first = seconds_of(context, lambda: step(batches[0]))
        later = seconds_of(context, lambda: step(batches[1 % len(batches)]))
        compiled = graphs() - before
        seconds = seconds_of(context, lambda: _each(step, batches))
    pairs = sum(map(len, batches))
    tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for batch in batches for p in batch)
    values: dict[str, Value] = {
        "pairs_per_s": pairs / seconds,
        "raw_tokens_per_s": tokens / seconds,
        "step_ms": 1000 * seconds / len(batches),
    }
    if work is not None and raw is not None:
        values["mfu"] = sum(map(work, batches)) / seconds / H100_DENSE
        values["mfu_as_if_nothing_was_shared"] = sum(map(raw, batches)) / seconds / H100_DENSE
    if peak:
        values["peak_gib"] = peak["allocated"] / 2**30
    values |= {"first_s": first, "second_s": later, "graphs": compiled, "graphs_later": graphs() - before - compiled}
    ok = None if work is None else values["graphs_later"] == 0  # no new length compiles anew
    context.add("fast", case, setting, ok, **values)
    return pairs / seconds, peak


def _learner_case(
    context: Context,
    name: str,
    loss: str,
    layers: int | None,
    tokens: tuple[int, ...],
    forms: tuple[str, ...] = ("shared", "unshared"),
    adapter: bool = False,
    checkpointing: bool = False,
) -> None:
    of = sizes(context, name, **({} if layers is None else {"num_hidden_layers": layers}))
    model = random_model(context.device, of, dtype=BF16 if adapter else torch.float32)
    if adapter:
        _add_adapter(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()  # the embeddings are frozen, and checkpointing wants an input with a gradient
    learner = Learner(context, model, loss)
    what = (
        f"{name}, {'LoRA, ' if adapter else ''}{of['num_hidden_layers']} layers, {context.there.get('attention used')}"
    )
    for packed in tokens[: 1 if context.tiny else None]:
        batches = [pairs_of(context, packed, 1000, seed) for seed in range(2 if context.tiny else 5)]

        def work(pairs: list[PairIds], form: str) -> float:
            return flops(model, batch_of(pairs, form, loss), trains_base=not adapter).all

        speeds: dict[str, float] = {}
        for form in forms:
            setting = f"{what}, {packed:,} tokens, {form}"
            speeds[form], peak = timed_steps(
                context,
                f"{loss.upper()} step",
                setting,
                batches,
                lambda pairs, form=form: learner.step(pairs, form),  # type: ignore[misc]
                lambda pairs, form=form: work(pairs, form),  # type: ignore[misc]
                lambda pairs: work(pairs, "unshared"),
            )
            largest = max((batch_of(b, form, loss) for b in batches), key=lambda batch: batch.real_tokens())
            setup = Setup(
                reference=False,
                checkpointing=checkpointing,
                sampler=None,
                adapter=Adapter(16) if adapter else None,
            )
            batch = planned.micro_batch(largest)
            planned.compare(context, f"{loss.upper()} step, {setting}", model.config, batch, setup, peak, ("EMA",))
            context.forget()
        if packed == tokens[0] and gpu_fusion.ENABLED and not adapter:
            _without_fusion(context, learner, batches, f"{what}, {packed:,} tokens")
        if len(speeds) == 2:
            ratio = speeds["shared"] / speeds["unshared"]
            context.add(
                "fast", f"{loss.upper()} step", f"{what}, {packed:,} tokens, shared / unshared", ratio=ratio, goal=1.34
            )
        _look_closer(context, learner, batches, f"{loss.upper()} step", f"{what}, {packed:,} tokens")


def _without_fusion(context: Context, learner: Learner, batches: list[list[PairIds]], setting: str) -> None:
    """The same steps with each elementwise operation by itself."""
    gpu_fusion.ENABLED = False
    try:
        timed_steps(
            context, "step without fused chains", f"{setting}, shared", batches, learner.step, work=None, raw=None
        )
    finally:
        gpu_fusion.ENABLED = True


def _each(step: Callable[[list[PairIds]], None], batches: list[list[PairIds]]) -> None:
    for pairs in batches:
        step(pairs)


def _look_closer(context: Context, learner: Learner, batches: list[list[PairIds]], case: str, setting: str) -> None:
    """What a step spends its time on, and where the host waits in it."""
    waits = host_waits(context, lambda: learner.step(batches[0]))
    profile = profiled(context, lambda: _each(learner.step, batches[: 1 if context.tiny else 2]))
    shares = {name.replace(" ", "_"): share for name, share in profile["shares"].items()}
    optimizer = best_seconds(context, lambda: _only_optimizer(learner), repeats=3)
    context.add(
        "fast",
        f"{case}: shares of the wall clock",
        setting,
        host=profile["host"],
        **shares,
        optimizer_ms=1000 * optimizer,
        waits=len(waits),
        _waits=list(waits),
        _profile=profile,
    )


def _only_optimizer(learner: Learner) -> None:
    for parameter in learner.trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()


def _add_adapter(model: PreTrainedModel) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"), "default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def dpo_1b(context: Context) -> None:
    _learner_case(context, "1B", "dpo", None, (8192, 16384))


def orpo_1b(context: Context) -> None:
    _learner_case(context, "1B", "orpo", None, (8192,))


def dpo_8b(context: Context) -> None:
    """As many layers as fit with optimizer state for all of them."""
    _learner_case(context, "8B", "dpo", 10, (8192,))


def lora_8b(context: Context) -> None:
    """All of 8B, with gradient checkpointing where it does not fit without."""
    try:
        _learner_case(context, "8B", "dpo", None, (8192,), forms=("shared",), adapter=True)
        return
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
    context.add(
        "planned", "peak memory", "8B with LoRA at 8,192 tokens, without checkpointing", allocated="does not fit"
    )
    context.forget()
    _learner_case(context, "8B", "dpo", None, (8192,), forms=("shared",), adapter=True, checkpointing=True)


def against_others(context: Context) -> None:
    """The 1B step of TRL's trainers and of a plain loop, two pairs at a time (all logits of more do not fit)."""
    of = sizes(context, "1B")
    batches = [pairs_of(context, 8192, 1000, seed) for seed in range(2)]
    for loss, of_trl in (("dpo", peers.trl_dpo), ("orpo", peers.trl_orpo)):
        sides: list[tuple[str, Any]] = [("plain loop", peers.plain)]
        if has("trl") and has("datasets"):
            sides.insert(0, ("TRL", (lambda context, model, loss, make=of_trl: make(context, model))))
        for name, make in sides:
            if context.left() < 15 and not context.tiny:
                context.not_run[f"{name}, {loss}"] = "no time"
                continue
            try:
                _peer(context, name, loss, make, of, batches)
            except Exception as error:  # one peer that is broken does not hide the others
                context.failed[f"{name}, {loss}"] = f"{type(error).__name__}: {str(error)[:400]}"
            context.forget()


def _peer(context: Context, name: str, loss: str, make: Any, of: dict[str, Any], batches: list[list[PairIds]]) -> None:
    model = random_model(context.device, of).train()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=LR, foreach=True)
    loss_of = make(context, model, loss)

    def step(pairs: list[PairIds]) -> None:
        for low in range(0, len(pairs), 2):
            part = pairs[low : low + 2]
            with torch.autocast(context.device.type, BF16):
                value = loss_of(part)
            (value * len(part) / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    setting = f"1B, {of['num_hidden_layers']} layers, 2 pairs at a time, padded"
    timed_steps(context, f"{loss.upper()} step by {name}", setting, batches, step, None, None)


def ema(context: Context) -> None:
    """An update, which reads two numbers and writes one, against a copy, which reads one and writes one, by bytes moved."""
    of = sizes(context, "1B")
    model = random_model(context.device, of)
    weights = [p.data.view(-1) for p in model.parameters()]
    count = sum(w.numel() for w in weights)
    average = [w.clone() for w in weights]
    plain, served = EMA(average, 0.5), [w.to(BF16) for w in weights]
    with_copy = EMA(average, 0.5, served)
    copied = best_seconds(context, lambda: copy_weights(weights, average))
    updated = best_seconds(context, lambda: plain.update(weights))
    both = best_seconds(context, lambda: with_copy.update(weights))
    context.add(
        "fast",
        "EMA",
        f"{count / 1e6:,.0f}M parameters",
        ms=1000 * updated,
        tb_per_s=12 * count / updated / 1e12,
        copy_tb_per_s=8 * count / copied / 1e12,
        of_a_copy=(12 * count / updated) / (8 * count / copied),
        goal=0.9,
        with_bf16_copy_ms=1000 * both,
        with_bf16_copy_tb_per_s=14 * count / both / 1e12,
    )


def host_work(context: Context) -> None:
    """What the host does for each batch before the first kernel of its step."""
    pairs = pairs_of(context, 16384, 1000, seed=0)
    batch = batch_of(pairs, "shared", "dpo")
    assert batch.spans is not None
    spans, device = batch.spans, context.device
    parts: dict[str, Callable[[], object]] = {
        "collate_ms": lambda: batch_of(pairs, "shared", "dpo"),
        "to_device_ms": lambda: batch.to(device),
        "block_mask_ms": lambda: PairLayout(spans).block_mask(None, device),
        "segments_ms": lambda: PairLayout(spans).segments(device),
    }
    values: dict[str, Any] = {name: 1000 * best_seconds(context, part) for name, part in parts.items()}
    context.add("fast", "host work of a batch", f"{batch.real_tokens():,} packed tokens", **values)


def sampler(context: Context) -> None:
    """transformers' generate at SAPO's shape: N_seg tokens after prompts with A."""
    of = sizes(context, "1B")
    model = random_model(context.device, of, dtype=BF16).eval()
    settings = SamplingSettings(0.7, 50, 0.95, frozenset({1}))
    engine: Any = HFSampler(model, settings, pad_id=0)
    random = np.random.default_rng(0)
    scale, tokens = (32, 8) if context.tiny else (1, 256)
    for rows in (8, 64):
        if context.left() < 15 and not context.tiny:
            context.not_run[f"sampler, {rows} rows"] = "no time"
            continue
        lengths = random.integers(300 // scale, 1500 // scale, rows)
        prompts = [random.integers(5, 1000, int(n)).tolist() for n in lengths]
        engine.generate(prompts[:2], [2, 2], [0, 1])
        start = time.perf_counter()
        found = engine.generate(prompts, [tokens] * rows, list(range(rows)))
        synchronize(context)
        seconds = time.perf_counter() - start
        written = sum(map(len, found))
        context.add(
            "fast",
            "hf sampler",
            f"1B, {rows} prompts of 300-1500, {tokens} tokens each",
            tokens_per_s=written / seconds,
            s=seconds,
            ms_per_token_step=1000 * seconds / tokens,
        )


def iteration(context: Context) -> None:
    """SAPOTrainer itself: eight pairs a step, DPO; its own account of what takes how long."""
    of = sizes(context, "1B")
    model = random_model(context.device, of)
    steps, pairs = (2, 2) if context.tiny else (4, 8)
    with tempfile.TemporaryDirectory() as directory, peak_memory(context) as peak:
        options = {
            "max_steps": steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "ema_interval": 2,
            "bf16": context.on_gpu,
        }
        trainer = make_trainer(
            context, model, Path(directory), segment=256, pairs=pairs, rows=64, whole=1160, **options
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "pairs_per_second" in entry]
    last = entries[1:] or entries
    names = [name for name in last[0] if name.startswith("seconds/")] + ["pairs_per_second", "tokens_per_second"]
    values: dict[str, Any] = {name: float(np.mean([e.get(name, 0.0) for e in last])) for name in names}
    setting = f"1B, DPO, {pairs} pairs, the last {len(last)} of {steps} steps"
    context.add(
        "fast", "whole SAPO iteration", setting, **values, _log=[{k: float(v) for k, v in e.items()} for e in entries]
    )
    _plan_iteration(context, trainer, peak)


def _plan_iteration(context: Context, trainer: Any, peak: dict[str, float]) -> None:
    from components.sapo.planning import describe as plan

    rows, args = trainer.train_dataset, trainer.args
    setup = plan._setup(rows, args, plan.Node(use_cpu=not context.on_gpu), not context.on_gpu)
    batch = plan._batch(rows, args, packed=True)
    planned.compare(context, "whole SAPO iteration, 1B, DPO", trainer.policy.config, batch, setup, peak)
