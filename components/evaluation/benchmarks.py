"""How a benchmark plugs into the stage: a module with `check` and `run`, and its name in MODULES.

Modules are imported when their benchmark was asked for, so that `--help` and a mistake in the settings cost nothing.
"""

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from components.evaluation.config import EvaluationConfig

# The Open LLM Leaderboard (v1): its benchmarks, and the metric of each that its average is of.
HEADLINES = {
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "mmlu": "acc",
    "truthfulqa_mc2": "acc",
    "winogrande": "acc",
    "gsm8k": "exact_match",
}
LEADERBOARD = tuple(HEADLINES)
MODULES = {
    "held_out": "components.evaluation.harness",
    **dict.fromkeys([*LEADERBOARD, "ifeval"], "components.evaluation.leaderboard"),
    "mt_bench": "components.evaluation.mt_bench",
    "alpaca_eval": "components.evaluation.alpaca_eval",
}


class Metric(TypedDict):
    """One number, as results.json lists it. `n`: samples behind it; `stderr` (or a bootstrap `interval`) may be None."""

    benchmark: str
    metric: str
    value: float
    stderr: float | None
    interval: list[float] | None  # [low, high] at the 95% level, where the error is not symmetric
    n: int
    higher_is_better: bool
    description: str


@dataclass
class Outcome:
    """What a benchmark found. Everything goes into results.json as it is, so it must be JSON."""

    metrics: list[Metric]
    details: dict[str, Any] = field(
        default_factory=dict
    )  # what shows how it was run: tokens, task versions, judge, cost
    versions: dict[str, str] = field(default_factory=dict)  # of distributions beyond torch, transformers and lm_eval
    baselines: list[dict[str, Any]] = field(
        default_factory=list
    )  # what guessing reaches: name, metric, value, description


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


class Benchmark(Protocol):
    """What a module of MODULES offers. `name` is the benchmark's, since a module may serve several."""

    def check(self, name: str, config: "EvaluationConfig") -> str:
        """One line on what `run` will do, for --dry_run.

        Raises:
            UserError: what `run` needs is missing (key, endpoint, data, chat template), before any GPU time is spent.
        """
        ...

    def run(self, name: str, config: "EvaluationConfig", context: Context) -> Outcome:
        """Scores the model. What it writes to `context.folder` may be there already, from an interrupted run."""
        ...


def load_benchmark(name: str) -> Benchmark:
    return cast(Benchmark, importlib.import_module(MODULES[name]))
