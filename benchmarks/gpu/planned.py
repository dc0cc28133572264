"""The memory plan of `components/sapo/planning/memory.py` against what was allocated at most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.gpu.record import Context
from components.common.kernels.pair_packing import PairBatch
from components.sapo.planning import memory, sizes
from components.sapo.planning.sizes import GIB

CAPACITY = 80e9


def micro_batch(batch: PairBatch) -> sizes.MicroBatch:
    return sizes.MicroBatch(len(batch.tokens), batch.real_tokens(), len(batch.targets))


def compare(
    context: Context,
    what: str,
    config: Any,
    batch: sizes.MicroBatch,
    setup: sizes.Setup,
    measured: dict[str, float],
    without: tuple[str, ...] = (),
) -> None:
    """Adds a row: what is planned to be allocated, without the allowances for CUDA and fragmentation, and what was.

    Args:
        measured: bytes, as `timing.peak_memory` gives them; nothing on a CPU.
        without: parts of the plan that the measured program does not have.
    """
    setup = replace(setup, on_cpu=not context.on_gpu)
    plan = memory.plan(sizes.architecture(config), batch, setup, CAPACITY)
    always = {name: size for name, size in plan.always.items() if name not in without}
    moments = {
        "forward and backward": sum(plan.train.values()),
        "optimizer's step": sum(plan.step.values()),
        "generation": sum(plan.generate.values()),
    }
    largest = max(moments, key=lambda name: moments[name])
    planned = sum(always.values()) + moments[largest]
    parts: dict[str, Any] = {
        name: {key: round(size / GIB, 3) for key, size in of.items()}
        for name, of in (("always", always), ("train", plan.train), ("step", plan.step), ("generate", plan.generate))
    }
    values: dict[str, Any] = {"planned_gib": planned / GIB, "largest": largest, "_parts_gib": parts}
    if measured:
        values |= {
            "allocated_gib": measured["allocated"] / GIB,
            "reserved_gib": measured["reserved"] / GIB,
            "planned_over_allocated": planned / measured["allocated"],
            "reserved_over_allocated": measured["reserved"] / measured["allocated"],
        }
    context.add("planned", "peak memory", what, **values)
