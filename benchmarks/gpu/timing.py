"""Seconds, memory, and what a GPU spends its time on."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.record import Context

# Kinds of kernels by what is in their names, the first that fits.
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("flex", "flash", "fmha", "attention", "pytorch_flash", "triton_tem"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "addmm", "aten::mm", "aten::bmm", "splitk"),
    "optimizer": ("multi_tensor", "foreach", "rmsprop", "adam", "fused_adam"),
    "copies": ("memcpy", "memset", "copy", "cast"),
    "gathers": ("index", "gather", "scatter", "sort", "embedding", "radix"),
    "reductions": ("reduce", "softmax", "sum", "norm"),
    "elementwise": ("elementwise", "vectorized", "mul", "add", "pow", "silu", "triton_poi"),
}


def synchronize(context: Context) -> None:
    if context.on_gpu:
        torch.cuda.synchronize()


def seconds_of(context: Context, function: Callable[[], object]) -> float:
    synchronize(context)
    start = time.perf_counter()
    function()
    synchronize(context)
    return time.perf_counter() - start


def best_seconds(context: Context, function: Callable[[], object], repeats: int = 10) -> float:
    """The median, after calls that warm up."""
    for _ in range(1 if context.tiny else 3):
        function()
    return statistics.median(seconds_of(context, function) for _ in range(2 if context.tiny else repeats))


def graphs() -> int:
    """Graphs that were compiled so far."""
    return int(counters["stats"]["unique_graphs"])


@contextmanager
def peak_memory(context: Context) -> Any:
    """Fills a dictionary with the most that was allocated and reserved, in bytes; with nothing on a CPU."""
    found: dict[str, float] = {}
    if context.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if context.on_gpu:
        torch.cuda.synchronize()
        found["allocated"] = float(torch.cuda.max_memory_allocated())
        found["reserved"] = float(torch.cuda.max_memory_reserved())


def host_waits(context: Context, function: Callable[[], object]) -> list[str]:
    """Where the host waited for the GPU meanwhile, as torch tells it."""
    if not context.on_gpu:
        function()
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename.rsplit('/', 1)[-1]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def profiled(context: Context, function: Callable[[], object]) -> dict[str, Any]:
    """Shares of the wall clock by kind of kernel, that of no kernel at all (the host), and the longest kernels in ms.

    The wall clock is that of a run without the profiler, which slows the host down.
    """
    wall = seconds_of(context, function)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if context.on_gpu else [])
    with profile(activities=activities) as profiler:
        seconds_of(context, function)
    microseconds: dict[str, float] = {}
    for event in profiler.key_averages():
        is_kernel = str(event.device_type).endswith("CUDA")
        is_range = getattr(event, "is_user_annotation", False)  # of kernels that are listed themselves
        if is_kernel == context.on_gpu and not is_range:
            spent = event.self_device_time_total if context.on_gpu else event.self_cpu_time_total
            microseconds[event.key] = microseconds.get(event.key, 0.0) + spent
    busy = sum(microseconds.values())
    shares: dict[str, float] = {}
    for name, spent in microseconds.items():
        shares[kind_of(name)] = shares.get(kind_of(name), 0.0) + spent / 1e6 / wall
    longest = sorted(microseconds.items(), key=lambda item: -item[1])[:25]
    return {
        "wall_ms": 1000 * wall,
        "shares": {name: round(share, 4) for name, share in sorted(shares.items(), key=lambda item: -item[1])},
        "host": round(max(0.0, 1 - busy / 1e6 / wall), 4),
        "longest_ms": {name[:120]: round(spent / 1000, 3) for name, spent in longest},
    }


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
