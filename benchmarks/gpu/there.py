"""What is there: the card, the versions, and its two limits (matrix products and memory)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from benchmarks.gpu.record import Context, Value
from benchmarks.gpu.timing import best_seconds
from components.common.kernels import gpu_attention

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "flash-attn",
    "pydantic",
    "numpy",
)
H100_DENSE = 989e12  # bfloat16 operations a second of an H100 (SXM) without sparsity, from its data sheet


def look(context: Context) -> None:
    """Fills in `context.there`."""
    found: dict[str, Value] = {"python": platform.python_version(), "cpus": os.cpu_count()}
    for name in PACKAGES:
        found[name] = _version(name)
    varlen = gpu_attention.installed_varlen()
    found["varlen attention"] = varlen is not None and context.on_gpu
    found["device"] = torch.cuda.get_device_name() if context.on_gpu else platform.processor() or "cpu"
    if context.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        free, whole = torch.cuda.mem_get_info()
        found["memory_gib"] = round(properties.total_memory / 2**30, 2)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
        found["context_gib"] = round((whole - free - torch.cuda.memory_reserved()) / 2**30, 2)
    context.there = found
    for name, value in found.items():
        print(f"{name}: {'not there' if value is None else value}")


def limits(context: Context) -> None:
    """The two ceilings on this card, which the other numbers are held against."""
    size, count = (256, 2**16) if context.tiny else (8192, 2**30)
    a, b = (torch.randn(size, size, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(count, device=context.device).normal_() for _ in range(2))
    matrices = 2 * size**3 / best_seconds(context, lambda: a @ b)
    copied = 8 * count / best_seconds(context, lambda: target.copy_(source))
    context.there["matmul_tflops"] = round(matrices / 1e12, 1)
    context.there["copy_tb_per_s"] = round(copied / 1e12, 3)
    context.add("fast", "limits", "of this card", tflops=matrices / 1e12, copy_tb_per_s=copied / 1e12)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has(name: str) -> bool:
    """Whether a package can be imported; nothing is imported."""
    return importlib.util.find_spec(name) is not None
