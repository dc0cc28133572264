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

from dataclasses import dataclass

from components.common.kernels.vocabulary_head import block_width
from components.sapo.planning.sizes import GIB, Adapter, Architecture, MicroBatch, Setup

ZERO_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in values
ZERO_LIVE = 1_000_000_000  # its stage3_max_live_parameters
BITS4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight in NF4 with double quantisation
CUDA_CONTEXT = 1.5 * GIB  # an allowance for CUDA, NCCL and cuBLAS; not measured
FRAGMENTATION = 0.05  # an allowance, as a share of what is allocated on a GPU


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
