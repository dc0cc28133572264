"""What to change where a run does not fit."""

import dataclasses
from collections.abc import Iterator

from components.common.generation.engines import ENGINES
from components.sapo.planning.memory import plan
from components.sapo.planning.sizes import GIB, Adapter, Architecture, MicroBatch, Setup

PROMPTS_24GB = 16  # that generate has at once in a `*-24gb` recipe


def remedies(batch: MicroBatch, setup: Setup) -> Iterator[tuple[str, MicroBatch, Setup]]:
    """Changes of settings that save memory, the cheapest first: fewer prompts together alone, others on top of those before."""
    prompts = setup.cached_prompts if setup.serves_in_place else 0
    while prompts > 1:
        prompts = (prompts + 1) // 2
        yield f"--sampler_batch_size {prompts}", batch, dataclasses.replace(setup, cached_prompts=prompts)
    texts: list[str] = []

    def with_(text: str) -> str:
        texts.append(text)
        return " ".join(f"--{t}" for t in texts)

    if not setup.checkpointing:
        setup = dataclasses.replace(setup, checkpointing=True)
        yield with_("gradient_checkpointing true"), batch, setup
    if setup.engine is not None and setup.engine.can_sleep and not setup.sleeps and not setup.overlaps:
        setup = dataclasses.replace(setup, sleeps=True)
        yield with_("sleep_level 1"), batch, setup
    if setup.processes > 1 and not setup.shards_weights and setup.adapter is None:
        setup = dataclasses.replace(setup, parallelism="zero3")
        yield with_("parallelism zero3"), batch, setup
    yield from _smaller(batch, setup, texts)


def _smaller(batch: MicroBatch, setup: Setup, texts: list[str]) -> Iterator[tuple[str, MicroBatch, Setup]]:
    before = " ".join(f"--{t}" for t in texts)
    pairs = batch.pairs
    setup = dataclasses.replace(setup, accumulates=setup.accumulates or pairs > 1)
    while pairs > 1:
        pairs = (pairs + 1) // 2
        part = MicroBatch(pairs, batch.tokens * pairs // batch.pairs, batch.scored * pairs // batch.pairs)
        yield f"{before} --per_device_train_batch_size {pairs} (and more accumulation)".strip(), part, setup
    if setup.adapter is None:
        setup = dataclasses.replace(setup, adapter=Adapter(), parallelism="ddp")  # it cannot be sharded
        yield "an adapter: a `*-lora` recipe", part if batch.pairs > 1 else batch, setup
    if not setup.adapter.in_4bit:  # type: ignore[union-attr]
        yield "an adapter on a base in 4 bits: a `*-24gb` recipe", part if batch.pairs > 1 else batch, _in_4bit(setup)


def _in_4bit(setup: Setup) -> Setup:
    """Of the same run with an adapter on a base in 4 bits, and an engine that can run one."""
    adapter = dataclasses.replace(setup.adapter, in_4bit=True)  # type: ignore[type-var]
    prompts = min(setup.cached_prompts, PROMPTS_24GB)
    able = [name for name, engine in ENGINES.items() if engine.serves_4bit]
    sampler = setup.sampler if setup.sampler in (None, *able) else able[0]
    return dataclasses.replace(
        setup, adapter=adapter, sampler=sampler, overlaps=False, sleeps=False, cached_prompts=prompts
    )


def advice(model: Architecture, batch: MicroBatch, setup: Setup, capacity: float) -> str:
    """The first change, or pile of changes, with which the run fits."""
    for text, smaller, changed in remedies(batch, setup):
        changed_plan = plan(model, smaller, changed, capacity)
        if changed_plan.fits:
            return f"{text}: {changed_plan.peak / GIB:.1f} GiB"
    return "more processes, GPUs with more memory, or a smaller model; no other setting is enough"
