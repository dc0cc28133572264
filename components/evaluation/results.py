"""results.json: its schema, the averages over benchmarks, and the table on stdout.

One file per model and set of benchmarks:

    {"schema": 2, "name": ..., "results": [Metric, ...], "baselines": [...],
     "benchmarks": {benchmark: {"seconds": ..., "details": {...}}},
     "settings": {...}, "provenance": {digests}, "versions": {...}, "seconds": ...}
"""

import dataclasses
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

from components.common.core.errors import UserError
from components.common.core.identity import Identity, identity_of, refuse_other_run, roles_of
from components.common.stage.inputs import contents
from components.evaluation.benchmark import Metric, Outcome
from components.evaluation.config import SETTINGS, EvaluationConfig
from components.evaluation.registry import BENCHMARKS, HEADLINES

SCHEMA = 2
OUTCOME = "outcome.json"
RESULTS = "results.json"


def assemble(
    name: str,
    outcomes: dict[str, tuple[Outcome, float]],
    settings: dict[str, Any],
    provenance: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        outcomes: by benchmark, its outcome and its wall-clock in seconds, also that of earlier runs it was resumed from.
    """
    found = [entry for outcome, _ in outcomes.values() for entry in outcome.metrics]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lm_eval")}
    for outcome, _ in outcomes.values():
        versions |= outcome.versions
    return {
        "schema": SCHEMA,
        "name": name,
        "results": [*leaderboard_average(found), *found],
        "baselines": [entry for outcome, _ in outcomes.values() for entry in outcome.baselines],
        "benchmarks": {
            benchmark: {"seconds": round(took, 3), "details": outcome.details}
            for benchmark, (outcome, took) in outcomes.items()
        },
        "settings": settings,
        "provenance": provenance,
        "versions": versions,
        "seconds": round(seconds, 1),
    }


def leaderboard_average(found: list[Metric]) -> list[Metric]:
    """The mean of the Open LLM Leaderboard's six headline metrics; nothing where one of them is missing."""
    six = [entry for entry in found if HEADLINES.get(entry["benchmark"]) == entry["metric"]]
    if len(six) < len(HEADLINES):
        return []
    errors = [entry["stderr"] for entry in six]
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors if error)) / len(six)
    return [
        {
            "benchmark": "leaderboard",
            "metric": "average",
            "value": sum(entry["value"] for entry in six) / len(six),
            "stderr": stderr,
            "interval": None,
            "n": sum(entry["n"] for entry in six),
            "higher_is_better": True,
            "description": "mean of " + ", ".join(f"{name} {metric}" for name, metric in HEADLINES.items()),
        }
    ]


def run_identity(config: EvaluationConfig, dtype: str) -> Identity:
    """What must be equal for an output to be of this run; `dtype` is the one that was settled on."""
    inputs = contents(vars(config), roles_of(EvaluationConfig))
    return identity_of([config], inputs, {"dtype": dtype})


def start(output: Path, config: EvaluationConfig, dtype: str) -> None:
    """Records the identity of a run, for a resume."""
    write_json(output / SETTINGS, dict(run_identity(config, dtype)))


def is_unfinished(config: EvaluationConfig) -> bool:
    """Whether the output directory is what an interrupted run left."""
    output = Path(config.output)
    return not config.overwrite and (output / SETTINGS).is_file() and not (output / RESULTS).is_file()


def check_resumable(config: EvaluationConfig, dtype: str) -> None:
    """Raises UserError when the output directory was started with other settings; names them."""
    path = Path(config.output) / SETTINGS
    if path.is_file():
        refuse_other_run(f"--output {config.output}", read_json(path), run_identity(config, dtype))


def save_outcome(folder: Path, outcome: Outcome, seconds: float) -> None:
    """Marks a benchmark as finished."""
    write_json(folder / OUTCOME, {"seconds": seconds, **dataclasses.asdict(outcome)})


def finished_outcome(folder: Path) -> tuple[Outcome, float] | None:
    """What an earlier run of the benchmark found; None where it did not finish."""
    if not (folder / OUTCOME).is_file():
        return None
    content = read_json(folder / OUTCOME)
    seconds = content.pop("seconds")
    return Outcome(**content), seconds


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); --overwrite starts anew") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is there as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def table(results: dict[str, Any]) -> str:
    """The results and the baselines as aligned lines, each metric's baseline below it."""
    names = {(entry["benchmark"], entry["metric"]): label(entry) for entry in results["results"]}
    width = max(map(len, names.values()), default=0) + 2
    lines = [f"{'metric':<{width}}{'value':>12}{'std. error':>12}  model"]
    for entry in results["results"]:
        stderr = "" if entry["stderr"] is None else f"{entry['stderr']:.4g}"
        value = f"{label(entry):<{width}}{entry['value']:>12.4g}{stderr:>12}"
        lines.append(f"{value}  {results['name']} ({entry['n']} samples)")
        for baseline in results["baselines"]:
            if (baseline["benchmark"], baseline["metric"]) == (entry["benchmark"], entry["metric"]):
                lines.append(f"{'':<{width}}{baseline['value']:>12.4g}{'':>12}  {baseline['name']} baseline")
    return "\n".join(lines)


def label(entry: dict[str, Any]) -> str:
    """One name for a benchmark's metric; those of some are unmistakable by themselves."""
    benchmark = BENCHMARKS.get(entry["benchmark"])
    return entry["metric"] if benchmark and benchmark.bare_metrics else f"{entry['benchmark']}/{entry['metric']}"


def flat_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The metrics as KFP shows them: one name, one number."""
    own = {label(entry): entry["value"] for entry in results["results"]}
    return own | {f"{entry['name']}_{label(entry)}": entry["value"] for entry in results["baselines"]}
