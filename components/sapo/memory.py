"""Memory of one GPU (or one process on a CPU) in a SAPO run, from sizes alone: pure functions, nothing is loaded.

With P parameters, T of them trained (T = P without an adapter), W processes and n values of optimizer state for each, in bytes:

                     one process, ddp      zero2                  zero3              fsdp2
    weights          4 P                   P c                    P c / W            4 P / W
    gradients        4 T (+ 4 T, ddp's     T c / W + bucket       T c / W + bucket   4 T / W
                     buckets)
    masters          -                     4 T / W if bf16        4 T / W if bf16    -
    optimizer        4 n T                 4 n T / W              4 n T / W          4 n T / W
    EMA              4 T                   4 T / W                4 T / W            4 T / W
    reference        4 P                   2 c' T / W             2 c' T / W         2 c' T / W

c is 2 in bfloat16 and 4 in float32. A sharded reference is this process's parts, which swap places with the policy's while they
are scored (the 2). With an adapter the base is frozen (2 bytes a parameter in bfloat16, 0.516 in 4 bits: NF4 with an 8-bit
scale for 64 weights and a float32 one for 256 scales; embeddings, head and norms not, and one layer at a time is whole), the
reference costs an adapter at most. An engine with weights of its own takes the share of the GPU that it is told to. Activations
and logits are those of `common/kernels`: see `layer_bytes` and `logits_bytes`.

What lives at once differs from moment to moment, so the peak is what lives all the time plus the largest of: forward and
backward, the optimizer's step, generation.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from components.common.generation.engines import ENGINES, Engine, EngineName
from components.common.kernels.vocabulary_head import block_width
from components.common.models.loading import whole_models

GIB = 2**30
# Values of optimizer state for each trained parameter, by the beginning of its name; 2 (Adam's) where none fits.
OPTIMIZER_STATES = {"rmsprop": 1, "sgd": 0, "adafactor": 0}
STATES_OF_8BIT = 0.5  # Adam's two values in one byte each, in units of float32
ZERO_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in values
ZERO_LIVE = 1_000_000_000  # its stage3_max_live_parameters
BITS4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight in NF4 with double quantisation
PROMPTS_24GB = 16  # that generate has at once in a `*-24gb` recipe
CUDA_CONTEXT = 1.5 * GIB  # an allowance for CUDA, NCCL and cuBLAS; not measured
FRAGMENTATION = 0.05  # an allowance, as a share of what is allocated on a GPU

Parallelism = Literal["ddp", "zero2", "zero3", "fsdp2"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder, from its config.json.

    Attributes:
        parameters: of the whole model; tied ones once.
        layer: of one decoder layer.
        head: of the output embeddings, vocabulary x hidden.
        largest: of the largest parameter.
        attention, key_value: heads x size of a head.
        linears: (name, inputs, outputs) of every linear layer inside the decoder layers.
    """

    parameters: int
    layer: int
    head: int
    largest: int
    layers: int
    hidden: int
    attention: int
    key_value: int
    intermediate: int
    vocabulary: int
    linears: tuple[tuple[str, int, int], ...]

    @property
    def in_linears(self) -> int:
        return sum(inputs * outputs for _, inputs, outputs in self.linears)


def architecture(model_config: Any) -> Architecture:
    """The sizes of a model that a Hugging Face config describes, without memory for it."""
    with whole_models(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    text = model_config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers: Any = model.base_model.layers
    linears = [(n, m.in_features, m.out_features) for n, m in layers.named_modules() if isinstance(m, nn.Linear)]
    return Architecture(
        parameters=model.num_parameters(),
        layer=sum(p.numel() for p in layers[0].parameters()),
        head=model.get_output_embeddings().weight.numel(),
        largest=max(p.numel() for p in model.parameters()),
        layers=len(layers),
        hidden=text.hidden_size,
        attention=text.num_attention_heads * size,
        key_value=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * size,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        linears=tuple(linears),
    )


@dataclass(frozen=True)
class Adapter:
    """LoRA on a frozen base.

    Args:
        rank: LoRA's r.
        targets: ends of the names of the layers that get one, such as "q_proj"; "all-linear" for every one.
        in_4bit: the base's linear layers are quantised.
    """

    rank: int = 16
    targets: tuple[str, ...] = ("all-linear",)
    in_4bit: bool = False

    def parameters(self, model: Architecture) -> int:
        """A layer of (inputs, outputs) gets (inputs + outputs) r."""
        everywhere = "all-linear" in self.targets
        chosen = [(i, o) for name, i, o in model.linears if everywhere or name.endswith(self.targets)]
        return self.rank * sum(inputs + outputs for inputs, outputs in chosen)


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of one micro-batch of pairs.

    Args:
        pairs: how many.
        tokens: that the model computes: prompt and A once, then the rest of both responses.
        scored: that reach the vocabulary.
    """

    pairs: int
    tokens: int
    scored: int


def micro_batch(pairs: int, prompt: int, response: int, shared: int, from_divergence: bool, packed: bool) -> MicroBatch:
    """Of pairs of equal size.

    Args:
        prompt, response: tokens; both responses are as long.
        shared: tokens that the two responses have in common at the beginning.
        from_divergence: those are not scored (DPO).
        packed: pairs are packed, else padded.
    """
    own = 2 * (response - shared)
    if not packed:
        return MicroBatch(pairs, 2 * pairs * (prompt + response), pairs * (own + 2 * shared * (not from_divergence)))
    prefix = prompt + shared
    scored = own + (0 if from_divergence else shared)
    return MicroBatch(pairs, pairs * (prefix + own), pairs * scored)


@dataclass(frozen=True)
class Setup:
    """What of a run's settings decides about memory.

    Args:
        processes: one a GPU.
        optimizer: transformers' name.
        accumulates: gradients of an earlier micro-batch are there while the next one's are computed.
        sampler: the engine that generates; None where nothing does.
        served_bytes: for each parameter, of a copy of the EMA for the sampler; 0 where there is none.
        utilization: share of the GPU that the engine takes, if it takes one.
        sleeps: it gives that back while the learner works.
        overlaps: generation runs beside training.
        cached_prompts, cached_length: that an engine in this process's memory has at once, and their tokens with what is
            generated.
        adapter: None trains every parameter.
    """

    processes: int = 1
    parallelism: Parallelism = "ddp"
    bf16: bool = True
    optimizer: str = "rmsprop"
    reference: bool = True
    checkpointing: bool = False
    accumulates: bool = False
    sampler: EngineName | None = "hf"
    served_bytes: int = 0
    engine_bytes: int = 2
    utilization: float = 0.25
    sleeps: bool = False
    overlaps: bool = False
    cached_prompts: int = 0
    cached_length: int = 0
    adapter: Adapter | None = None
    on_cpu: bool = False

    @property
    def engine(self) -> Engine | None:
        return None if self.sampler is None else ENGINES[self.sampler]

    @property
    def serves_in_place(self) -> bool:
        """Generation takes this process's memory, as it needs it."""
        return self.engine is not None and self.engine.serves_in_place

    @property
    def engine_share(self) -> float:
        """Share of the GPU that the engine takes for itself."""
        return self.utilization if self.engine is not None and self.engine.takes_gpu_share else 0.0

    @property
    def engine_sleeps(self) -> bool:
        """The engine gives its share back while the learner works."""
        return self.sleeps and self.engine is not None and self.engine.can_sleep

    @property
    def cached_tokens(self) -> int:
        return self.cached_prompts * self.cached_length

    @property
    def shards(self) -> bool:
        return self.processes > 1 and self.parallelism != "ddp"

    @property
    def shards_weights(self) -> bool:
        return self.processes > 1 and self.parallelism in ("zero3", "fsdp2")

    @property
    def is_zero(self) -> bool:
        return self.processes > 1 and self.parallelism.startswith("zero")

    @property
    def weight_bytes(self) -> int:
        """Of a trained weight as forward reads it from memory: ZeRO casts the model, the others cast in forward."""
        return 2 if self.bf16 and self.is_zero else 4

    @property
    def compute_bytes(self) -> int:
        return 2 if self.bf16 else 4

    @property
    def optimizer_states(self) -> float:
        if "8bit" in self.optimizer:
            return STATES_OF_8BIT
        return next((n for name, n in OPTIMIZER_STATES.items() if self.optimizer.startswith(name)), 2)


@dataclass(frozen=True)
class Plan:
    """Bytes of one GPU.

    Attributes:
        always: what lives all the time, by name.
        train, step, generate: what lives besides in each of these, by name.
        capacity: what the GPU has.
    """

    always: dict[str, float]
    train: dict[str, float]
    step: dict[str, float]
    generate: dict[str, float]
    on_cpu: bool
    overlaps: bool
    capacity: float

    @property
    def peak(self) -> float:
        moments = [sum(self.train.values()), sum(self.step.values())]
        generate = sum(self.generate.values())
        most = max(moments) + generate if self.overlaps else max(*moments, generate)
        allocated = sum(self.always.values()) + most
        return allocated if self.on_cpu else allocated * (1 + FRAGMENTATION) + CUDA_CONTEXT

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity


def plan(model: Architecture, batch: MicroBatch, setup: Setup, capacity: float) -> Plan:
    """Memory of one GPU with `capacity` bytes."""
    always = _weights(model, setup) | ({} if setup.engine_sleeps else _engine_share(setup, capacity))
    return Plan(
        always={name: size for name, size in always.items() if size},
        train=_training(model, batch, setup),
        step=_stepping(model, setup),
        generate=_generating(model, setup, capacity),
        on_cpu=setup.on_cpu,
        overlaps=setup.overlaps,
        capacity=capacity,
    )


def trained(model: Architecture, setup: Setup) -> int:
    return model.parameters if setup.adapter is None else setup.adapter.parameters(model)


def _weights(model: Architecture, setup: Setup) -> dict[str, float]:
    """What lives from the first step to the last."""
    values, w = trained(model, setup), setup.processes
    share = 1 / w if setup.shards else 1.0
    share_of_weights = 1 / w if setup.shards_weights else 1.0
    adapter = setup.adapter
    base = 0.0 if adapter is None else _frozen_base(model, adapter, setup) * share_of_weights
    found = {"weights": base + setup.weight_bytes * values * share_of_weights}
    found["float32 masters"] = 4 * values / w if setup.is_zero and setup.bf16 else 0.0
    found["optimizer"] = 4 * setup.optimizer_states * values * share
    found["EMA"] = 4 * values * share
    if setup.reference:
        in_parts = setup.shards or adapter is not None
        found["reference"] = values * share * (2 * setup.compute_bytes if in_parts else 4)
    found["served copy"] = setup.served_bytes * (model.parameters if setup.shards else values)
    return found


def _frozen_base(model: Architecture, adapter: Adapter, setup: Setup) -> float:
    rest = setup.compute_bytes * (model.parameters - model.in_linears)
    return rest + (BITS4 if adapter.in_4bit else setup.compute_bytes) * model.in_linears


def gradient_bytes(model: Architecture, setup: Setup) -> float:
    """Gradients once backward is through."""
    values, w = trained(model, setup), setup.processes
    if setup.is_zero:
        return setup.compute_bytes * values / w + setup.compute_bytes * min(ZERO_BUCKET, values)
    if setup.shards:
        return 4 * values / w
    return 4 * values * (2 if w > 1 else 1)  # DDP keeps buckets of the same size


def layer_bytes(model: Architecture, batch: MicroBatch, setup: Setup) -> float:
    """What one decoder layer keeps for backward, with the lean layers of `lean_layers.py`.

    For each token: the residual stream before each of the two norms (float32 where the norm computes) and the norms' outputs;
    query, key and value; what attention gives (on a GPU also as the output projection reads it); gate and up. A layer whose
    weights are sharded or have adapters is not lean: it keeps the MLP's product and activation too, and, sharded, the norms'
    quotients.
    """
    c = setup.compute_bytes
    quotient = (2 if setup.is_zero and setup.bf16 else 4) if setup.shards_weights else 0
    norms = 2 * model.hidden * (4 + quotient + c)
    attention = c * ((2 if setup.on_cpu else 3) * model.attention + 2 * model.key_value)
    lean = setup.adapter is None and not setup.shards_weights
    mlp = c * model.intermediate * (2 if lean else 4)
    return batch.tokens * (norms + attention + mlp)


def logits_bytes(model: Architecture, batch: MicroBatch, setup: Setup) -> float:
    """Of one block of the vocabulary: logits as multiplied, in float32, and their gradient. And the gradient of the head."""
    block = batch.scored * block_width(batch.scored, model.vocabulary, not setup.on_cpu)
    values = 4 * block if not setup.bf16 else (2 + 4 + 2) * block
    return values + (setup.weight_bytes * model.head if setup.adapter is None else 0)


def _training(model: Architecture, batch: MicroBatch, setup: Setup) -> dict[str, float]:
    """Forward and backward. Activations go as gradients come, so without accumulation the larger of the two counts; but not on
    a CPU, where the heap keeps what is freed in pieces that do not fit what comes next."""
    one = layer_bytes(model, batch, setup)
    kept = model.layers * batch.tokens * model.hidden * (4 if setup.weight_bytes == 4 else 2) + one
    activations = kept if setup.checkpointing else model.layers * one
    gradients = gradient_bytes(model, setup)
    found = {"activations": activations, "logits": logits_bytes(model, batch, setup)}
    if setup.accumulates or setup.on_cpu:
        found["gradients"] = gradients
    else:
        found["gradients beyond activations"] = max(0.0, gradients - activations)
    if setup.shards_weights:
        found["gathered weights"] = setup.compute_bytes * _gathered(model, setup)
    elif setup.bf16 and not setup.is_zero and setup.adapter is None:
        found["bfloat16 casts"] = 2 * model.in_linears  # autocast keeps them until backward is through
    found["a layer out of 4 bits"] = _unpacked(model, setup)
    return {name: size for name, size in found.items() if size}


def _unpacked(model: Architecture, setup: Setup) -> float:
    """The weights of the linear layer at work, which a product reads whole where the base is in 4 bits."""
    in_4bit = setup.adapter is not None and setup.adapter.in_4bit
    return setup.compute_bytes * max(inputs * outputs for _, inputs, outputs in model.linears) if in_4bit else 0.0


def _gathered(model: Architecture, setup: Setup) -> int:
    """Parameters that are whole at once. FSDP2: embeddings and head, the layer at work and the next one."""
    if setup.parallelism == "zero3":
        return min(ZERO_LIVE, model.parameters)
    return model.parameters - model.layers * model.layer + 2 * model.layer


def _stepping(model: Architecture, setup: Setup) -> dict[str, float]:
    """The optimizer's step: gradients in float32 and temporaries, of one parameter at a time on a CPU, of all on a GPU."""
    values, w = trained(model, setup), setup.processes
    gradients = gradient_bytes(model, setup)
    if setup.is_zero and setup.bf16:
        gradients += 4 * values / w
    share = values / w if setup.shards else values
    together = min(model.largest, share) * 2 if setup.on_cpu or "fused" in setup.optimizer else share
    return {"gradients": gradients, "optimizer's temporaries": 4 * together}


def _generating(model: Architecture, setup: Setup, capacity: float) -> dict[str, float]:
    """What generating holds in this process's memory, or an engine that was asleep."""
    if setup.serves_in_place:
        cache = 2 * model.layers * model.key_value * setup.engine_bytes * setup.cached_tokens
        found = {
            "key-value cache": cache,
            "prompts": _prefill(model, setup),
            "a layer out of 4 bits": _unpacked(model, setup),
            "weights laid out for a CPU": _laid_out(model, setup),
        }
        return {name: size for name, size in found.items() if size}
    return _engine_share(setup, capacity) if setup.engine_sleeps else {}


def _engine_share(setup: Setup, capacity: float) -> dict[str, float]:
    """What an engine takes of the GPU for itself, by its title; empty where it takes no share."""
    return {setup.engine.title: setup.engine_share * capacity} if setup.engine and setup.engine_share else {}


def _prefill(model: Architecture, setup: Setup) -> float:
    """Of one layer's MLP while generate reads all prompts at once: its three products, or, outside of autocast, the one before
    with the base's and the adapter's in float32, before and after it is scaled."""
    c = setup.engine_bytes
    return setup.cached_tokens * model.intermediate * (3 * c if setup.adapter is None else 2 * c + 8)


def _laid_out(model: Architecture, setup: Setup) -> float:
    """A second copy of the linear layers' weights for generate on a CPU; those in 4 bits stay as they are."""
    in_4bit = setup.adapter is not None and setup.adapter.in_4bit
    weights = model.head + (0 if in_4bit else model.in_linears)
    return setup.engine_bytes * weights if setup.on_cpu else 0.0


def engine_needs(model: Architecture, setup: Setup, length: int) -> float:
    """The least that an engine's share of the GPU has to be: weights, its workspace, and the cache of one sequence.

    Args:
        length: tokens of the sequence.

    Returns:
        bytes; 0 where the engine takes no share.
    """
    if setup.engine is None or not setup.engine.takes_gpu_share:
        return 0.0
    cache = 2 * model.layers * model.key_value * setup.engine_bytes * length
    return setup.engine_bytes * model.parameters + cache + setup.engine.workspace


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
