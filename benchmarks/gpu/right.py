"""The same numbers as plain code on the same card, as far as the precision allows."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from benchmarks.gpu.record import Context
from benchmarks.gpu.shapes import batch_of, random_model
from benchmarks.gpu.timing import graphs
from benchmarks.gpu.trainer import make_trainer
from benchmarks.preference import mean_loss
from components.common.kernels import gpu_attention, gpu_fusion, lean_layers, pair_attention, vocabulary_head
from components.common.kernels.pair_logps import response_logps, shared_prefix_attention
from components.common.kernels.pair_packing import PairIds
from components.common.kernels.vocabulary_head import chunked_logps, token_logps
from components.common.training.stop import StopCallback, StopRequest
from components.sapo.ema import EMA

MEDIUM = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "initializer_range": 0.05,  # larger than usual: a wrong mask or order shows
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 150},
    "qwen2": {},
    "qwen3": {},
}
TOLERANCE = 2e-4  # of float32, relative, in the Euclidean norm
WORSE = 1.5  # how much further from float32 than plain bfloat16 ours may be


def model_of(context: Context, family: str = "llama", **more: Any) -> Any:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256, "head_dim": 16}
    of = MEDIUM | FAMILIES[family] | more
    if context.tiny:
        of |= small | {"num_attention_heads": 4, "num_key_value_heads": 2}
        of |= {"sliding_window": 10} if "sliding_window" in of else {}
    return random_model(context.device, of, family)


def pairs_of_step(context: Context, step: int, vocabulary: int) -> list[PairIds]:
    """Lengths differ from step to step; one pair has an empty A, and one an empty tail."""
    random = np.random.default_rng(step)
    scale = 16 if context.tiny else 1
    pairs = []

    def draw(tokens: int) -> list[int]:
        return [int(token) for token in random.integers(5, vocabulary, tokens)]

    for i in range(3):
        prompt, a, b, c = (int(n) // scale + 1 for n in random.integers(40, 400, 4))
        a, c = (0 if i == 0 else a), (0 if i == 1 else c)
        shared, tail = draw(a), draw(c)
        pairs.append(PairIds(draw(prompt), shared + draw(b) + tail, shared + draw(b) + tail))
    return pairs


def away(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|."""
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def run(
    context: Context, model: nn.Module, pairs: list[PairIds], form: str, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Log-probs of response tokens, and the gradients of a DPO loss on them."""
    batch = batch_of(pairs, form, "orpo").to(context.device)
    with torch.autocast(context.device.type, dtype, enabled=dtype != torch.float32):
        logps = response_logps(model, batch)
        sums = logps.sum(dim=1)
        chosen, rejected = sums.detach().chunk(2)
        loss = mean_loss("dpo", sums, batch.response_mask.sum(dim=1), (chosen - 1, rejected + 1))
    trained = [p for p in model.parameters() if p.requires_grad]
    # Checkpointed layers look the attention up again in backward.
    with shared_prefix_attention(model) if form != "padded" else _nothing():
        gradients = list(torch.autograd.grad(loss, trained))
    return logps.detach()[batch.response_mask], gradients


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().float() for gradient in gradients])


@contextmanager
def attention(kernel: gpu_attention.Kernel) -> Iterator[None]:
    before = pair_attention.ON_GPU
    pair_attention.ON_GPU = kernel
    try:
        yield
    finally:
        pair_attention.ON_GPU = before


def kernels(context: Context, dtype: torch.dtype) -> list[gpu_attention.Kernel]:
    if dtype == torch.float32 or not context.there.get("varlen attention"):
        return ["flex"]
    return ["flex", "varlen"]


def packed(context: Context, family: str, dtype: torch.dtype) -> None:
    """Packed pairs against padded rows, at three steps of unlike lengths."""
    model = model_of(context, family)
    vocabulary = model.config.vocab_size
    steps = [pairs_of_step(context, step, vocabulary) for step in range(3)]
    exact = [run(context, model, pairs, "padded", torch.float32) for pairs in steps]
    plain = [run(context, model, pairs, "padded", dtype) for pairs in steps] if dtype != torch.float32 else exact
    for kernel in kernels(context, dtype):
        seconds, compiled, errors = [], [], []
        with attention(kernel):
            for pairs, (logps, gradients) in zip(steps, exact, strict=True):
                before, start = graphs(), time.perf_counter()
                ours, mine = run(context, model, pairs, "shared", dtype)
                errors.append((away(ours, logps), away(flat(mine), flat(gradients))))
                seconds.append(round(time.perf_counter() - start, 2))
                compiled.append(graphs() - before)
        of_plain = [
            (away(p[0], e[0]), away(flat(p[1]), flat(e[1]))) if p is not e else (0.0, 0.0)
            for p, e in zip(plain, exact, strict=True)
        ]
        limits = [[max(TOLERANCE, WORSE * value) for value in pair] for pair in of_plain]
        ok = all(
            e <= most for pair, mosts in zip(errors, limits, strict=True) for e, most in zip(pair, mosts, strict=True)
        )
        context.add(
            "right",
            "packed = padded",
            f"{family}, {_name(dtype)}, {kernel if context.on_gpu else 'cpu'}",
            ok and not any(compiled[1:]),
            logps=max(e[0] for e in errors),
            gradients=max(e[1] for e in errors),
            plain_logps=max(e[0] for e in of_plain),
            plain_gradients=max(e[1] for e in of_plain),
            graphs=str(compiled),
            seconds=str(seconds),
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fused(context: Context) -> None:
    """What is compiled into one kernel, against its operations one by one; where it fails, what follows does without."""
    functions: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    torch.manual_seed(0)
    tokens, size = (40, 64) if context.tiny else (3000, 2048)
    x, gate, up = torch.randn(3, 1, tokens, size, device=context.device).unbind()
    weight, scale = torch.rand(size, device=context.device), torch.rand(1, tokens, 1, device=context.device)
    lse, gradient = torch.full((tokens, 1), 9.0, device=context.device), torch.randn(tokens, 1, device=context.device)
    targets = torch.randint(-size, 2 * size, (tokens, 1), device=context.device)
    functions["norm"] = lean_layers._norm_forward, (x, weight, 1e-6, torch.bfloat16)
    functions["norm backward"] = lean_layers._norm_backward, (x, weight, scale, gate)
    functions["gated MLP"] = lean_layers._gated, (gate.bfloat16(), up.bfloat16())
    functions["gated MLP backward"] = lean_layers._gated_backward, (gate.bfloat16(), up.bfloat16(), x.bfloat16())
    functions["log-sum-exp"] = vocabulary_head._lse, (x[0].bfloat16(),)
    functions["gradient of logits"] = vocabulary_head._d_logits, (x[0].bfloat16(), lse, gradient, targets)
    gpu_fusion.ENABLED = context.on_gpu  # a CPU never calls them, and its compiler takes long
    try:
        for name, (function, arguments) in functions.items():
            with torch.no_grad():
                start = time.perf_counter()
                ours, plain = function(*arguments), function.__wrapped__(*arguments)
                seconds = time.perf_counter() - start
            pairs = list(zip(ours, plain, strict=True)) if isinstance(ours, tuple) else [(ours, plain)]
            error = max(away(a, b) for a, b in pairs)
            context.add("right", "one kernel = its operations", name, error < 0.01, error=error, first_s=seconds)
    except Exception:
        gpu_fusion.ENABLED = False
        raise


def packed_llama(context: Context) -> None:
    packed(context, "llama", torch.bfloat16)
    packed(context, "llama", torch.float32)


def packed_others(context: Context) -> None:
    for family in ("mistral", "qwen2", "qwen3"):
        for dtype in (torch.bfloat16, torch.float32):
            packed(context, family, dtype)


def head(context: Context) -> None:
    """The fused head against all logits, and both against float64."""
    tokens, size, vocabulary = (64, 32, 3000) if context.tiny else (2000, 1024, 128256)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = nn.Linear(size, vocabulary, bias=False, device=context.device)
        hidden = torch.randn(tokens, size, device=context.device, requires_grad=True)
        targets = torch.randint(vocabulary, (tokens,), device=context.device)
        incoming = torch.randn(tokens, device=context.device)
        cast = torch.autocast(context.device.type, dtype, enabled=dtype != torch.float32)
        with cast:
            fused = chunked_logps(hidden, layer, targets)
            whole = token_logps(layer(hidden), targets)
        found = [(out.detach(), *torch.autograd.grad(out, [hidden, layer.weight], incoming)) for out in (fused, whole)]
        wide_hidden, wide_weight = hidden.detach().double().requires_grad_(), layer.weight.detach().double()
        wide_weight.requires_grad_()
        logits = wide_hidden @ wide_weight.t()
        exact = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
        reference = (exact.detach(), *torch.autograd.grad(exact, [wide_hidden, wide_weight], incoming.double()))
        ours, plain = ([away(a, b) for a, b in zip(result, reference, strict=True)] for result in found)
        ok = all(a <= max(TOLERANCE, WORSE * b) for a, b in zip(ours, plain, strict=True))
        names = ("logps", "d_hidden", "d_weight")
        values = dict(zip(names, ours, strict=True)) | {f"plain_{n}": v for n, v in zip(names, plain, strict=True)}
        context.add(
            "right", "fused head = all logits", f"{tokens} tokens, {vocabulary:,}, {_name(dtype)}", ok, **values
        )


def ema(context: Context) -> None:
    torch.manual_seed(0)
    count = 1000 if context.tiny else 10_000_000
    average, weight = torch.randn(2, count, device=context.device).unbind()
    expected = 0.5 * average.double() + 0.5 * weight.double()
    served = [torch.zeros(count, device=context.device, dtype=torch.bfloat16)]
    kept = EMA([average.clone()], 0.5, served)
    kept.update([weight])
    error = away(kept.average[0], expected)
    exact_copy = torch.equal(served[0], kept.average[0].bfloat16())
    context.add("right", "EMA = its equation", f"{count:,} values", error < 1e-6 and exact_copy, error=error)


def lora(context: Context) -> None:
    """An adapter's gradients, packed against padded."""
    from peft import LoraConfig

    model = model_of(context)
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"), "default")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    pairs = pairs_of_step(context, 0, model.config.vocab_size)
    _packed_against_padded(context, "LoRA: packed = padded", model, pairs)


def checkpointing(context: Context) -> None:
    """Layers that are run again in backward attend in the same way."""
    model = model_of(context).train()
    model.gradient_checkpointing_enable()
    pairs = pairs_of_step(context, 0, model.config.vocab_size)
    _packed_against_padded(context, "gradient checkpointing: packed = padded", model, pairs)


def _packed_against_padded(context: Context, case: str, model: Any, pairs: list[PairIds]) -> None:
    exact = run(context, model, pairs, "padded", torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        plain = run(context, model, pairs, "padded", dtype) if dtype != torch.float32 else exact
        for kernel in kernels(context, dtype):
            with attention(kernel):
                ours = run(context, model, pairs, "shared", dtype)
            errors = [away(ours[0], exact[0]), away(flat(ours[1]), flat(exact[1]))]
            of_plain = [away(plain[0], exact[0]), away(flat(plain[1]), flat(exact[1]))]
            ok = all(a <= max(TOLERANCE, WORSE * b) for a, b in zip(errors, of_plain, strict=True))
            setting = f"{_name(dtype)}, {kernel if context.on_gpu else 'cpu'}"
            context.add("right", case, setting, ok, logps=errors[0], gradients=errors[1], plain_gradients=of_plain[1])


def repeated(context: Context) -> None:
    """SAPOTrainer: two runs alike, and one that is interrupted and resumed, bit for bit or by how much not."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tempfile.TemporaryDirectory() as directory:
            _repeated(context, Path(directory))
    finally:
        torch.use_deterministic_algorithms(False)


def _repeated(context: Context, directory: Path) -> None:
    steps = 4
    base = model_of(context)

    def trained(name: str, stop: int | None = None, resume: bool = False) -> list[Tensor]:
        options: dict[str, Any] = {
            "max_steps": steps,
            "save_strategy": "steps",
            "save_steps": steps,
            "logging_steps": 2,
        }
        trainer = make_trainer(context, copy.deepcopy(base), directory / name, segment=32, pairs=2, rows=8, **options)
        trainer.remove_callback(PrinterCallback)
        request = StopRequest()
        trainer.add_callback(StopCallback(request))
        after_step = trainer.after_step

        def count() -> None:
            after_step()
            request.requested = trainer.state.global_step == stop

        trainer.after_step = count  # type: ignore[method-assign]
        trainer.train(resume_from_checkpoint=resume or None)
        assert trainer.weights.ema_model is not None
        models = (trainer.policy, trainer.weights.ema_model)
        return [parameter.detach().clone() for model in models for parameter in model.parameters()]

    start = [parameter.detach().clone() for parameter in base.parameters()]
    first = trained("first")
    moved = away(flat(first[: len(start)]), flat(start))
    again = trained("again")
    trained("cut", stop=steps // 2)
    resumed = trained("cut", resume=True)
    for case, others in (("two runs alike", again), ("resumed = uninterrupted", resumed)):
        equal = all(torch.equal(a, b) for a, b in zip(first, others, strict=True))
        setting = f"SAPOTrainer, DPO, {steps} steps, deterministic kernels"
        context.add("right", case, setting, equal, away=away(flat(others), flat(first)), moved_by_training=moved)
