"""The sizes of a run that its memory follows from: the model's, the micro-batch's, and how it is set up."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from components.common.generation.engines import ENGINES, Engine, EngineName
from components.common.models.loading import whole_models

GIB = 2**30


# Values of optimizer state for each trained parameter, by the beginning of its name; 2 (Adam's) where none fits.
OPTIMIZER_STATES = {"rmsprop": 1, "sgd": 0, "adafactor": 0}


STATES_OF_8BIT = 0.5  # Adam's two values in one byte each, in units of float32


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
