"""What a benchmark is, and what it gives. The benchmarks there are stand in `registry.py`."""

from dataclasses import dataclass, field
from typing import Any, TypedDict


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """An entry of the registry.

    Attributes:
        module: has `check` and `run`, see `context.BenchmarkModule`. Imported when the benchmark was asked for, so that
            `--help` and a mistake in the settings cost nothing.
        about: one line of help.
        leaderboard_metric: of a benchmark of the Open LLM Leaderboard (v1): the metric that its average is of.
        needs_hub: data come from the hub where none are given; without such a benchmark the libraries stay offline.
        bare_metrics: its metrics are named without the benchmark, being unmistakable by themselves.
    """

    module: str
    about: str
    leaderboard_metric: str | None = None
    needs_hub: bool = True
    bare_metrics: bool = False


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
