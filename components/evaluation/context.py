"""What the benchmarks of one run share, and how their modules are called."""

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from components.common.core.errors import UserError
from components.evaluation.benchmark import Outcome
from components.evaluation.config import EvaluationConfig
from components.evaluation.registry import BENCHMARKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Context:
    """What the benchmarks of one run share. `folder` is the benchmark's own, made before `run`, kept on --resume."""

    name: str  # what the report calls the model
    folder: Path
    device: str  # "cpu" or "cuda"
    dtype: str  # "float32" or "bfloat16"
    _held: dict[str, tuple[Any, Callable[[], None]]] = field(default_factory=dict)  # shared by the contexts of a run

    def hold(self, key: str, build: Callable[[], Any], close: Callable[[Any], None] | None = None) -> Any:
        """What `build` made under this key, for later benchmarks too; one model or engine is held at a time.

        Another one that is held is closed first: a device seldom has room for two.
        """
        if key not in self._held:
            self.free()
            made = build()
            self._held[key] = made, lambda: close(made) if close else None
        return self._held[key][0]

    def model(self, directory: str) -> "PreTrainedModel":
        """The Hugging Face model on its device, loaded once for neighbours that use it."""
        return cast("PreTrainedModel", self.hold(f"hf {directory}", lambda: self._load(directory)))

    def _load(self, directory: str) -> "PreTrainedModel":
        import torch

        from components.common.models.loading import load_model

        # The mask that shares a prompt among replies is a boolean one, which "sdpa" takes.
        model = load_model(directory, self.dtype, attn_implementation="sdpa").eval()
        return model.to(torch.device(self.device))

    def free(self) -> None:
        """Gives the held model's or engine's memory back, before another takes the device."""
        import torch

        while self._held:
            _, close = self._held.popitem()[1]
            close()
            del close
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class BenchmarkModule(Protocol):
    """What a benchmark's module offers. `name` is the benchmark's, since a module may serve several."""

    def check(self, name: str, config: EvaluationConfig) -> str:
        """One line on what `run` will do, for --dry_run.

        Raises:
            UserError: what `run` needs is missing (key, endpoint, data, chat template), before any GPU time is spent.
        """
        ...

    def run(self, name: str, config: EvaluationConfig, context: Context) -> Outcome:
        """Scores the model. What it writes to `context.folder` may be there already, from an interrupted run."""
        ...


def load_benchmark(name: str) -> BenchmarkModule:
    return cast(BenchmarkModule, importlib.import_module(BENCHMARKS[name].module))


def pick_device(config: EvaluationConfig) -> tuple[str, str]:
    """The device and the type of the weights, with `auto` resolved."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here; use auto or cpu")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    dtype = ("float32" if device == "cpu" else "bfloat16") if config.dtype == "auto" else config.dtype
    return device, dtype


def window(config: EvaluationConfig) -> int:
    """Tokens that a prompt and what follows it may have: the model's own, or fewer when asked for.

    Raises:
        UserError: neither the settings nor the model's config.json say.
    """
    from components.common.models.loading import load_config

    own = getattr(load_config(config.model).get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (own, config.max_length) if limit]
    if not limits:
        raise UserError(f"--model {config.model}: its config.json names no max_position_embeddings; give --max_length")
    return min(limits)
