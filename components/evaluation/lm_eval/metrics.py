"""From lm-eval's outcome to the benchmark's metrics, with standard errors."""

from typing import Any

from components.evaluation.benchmark import Metric
from components.evaluation.standard_errors import influence_stderr, influences

IFEVAL = {
    f"{level}_level_{kind}_acc": f"{level}_level_{kind}_acc,none"
    for kind in ("strict", "loose")
    for level in ("prompt", "inst")
}


def plain_metrics(name: str, metrics: dict[str, str], description: str, outcome: dict[str, Any]) -> list[Metric]:
    """lm-eval's values with its standard errors.

    Args:
        metrics: our name -> lm-eval's metric and filter.
    """
    values, documents = outcome["results"][name], sum(n["effective"] for n in outcome["n-samples"].values())
    found = []
    for ours, theirs in metrics.items():
        metric, chosen_filter = theirs.split(",")
        stderr = values[f"{metric}_stderr,{chosen_filter}"]
        stderr = stderr if isinstance(stderr, float) else None  # "N/A" for a single document
        found.append(_metric(name, ours, values[theirs], stderr, documents, description))
    return found


def ifeval_metrics(name: str, metrics: dict[str, str], description: str, outcome: dict[str, Any]) -> list[Metric]:
    """Accuracies over prompts, and over their instructions; their mean first.

    All come from the same answers, so the mean's error follows from the prompts'.
    """
    documents = outcome["samples"][name]
    found, together = [], [0.0] * len(documents)
    for metric, theirs in metrics.items():
        answers = [d[metric] if isinstance(d[metric], list) else [d[metric]] for d in documents]
        pairs = [(float(sum(answer)), len(answer)) for answer in answers]
        shares = influences(pairs)
        together = [total + share / len(metrics) for total, share in zip(together, shares, strict=True)]
        value, count = outcome["results"][name][theirs], sum(n for _, n in pairs)
        found.append(_metric(name, metric, value, influence_stderr(shares), count, description))

    mean = sum(entry["value"] for entry in found) / len(found)
    return [_metric(name, "average", mean, influence_stderr(together), len(documents), description), *found]


def _metric(benchmark: str, metric: str, value: float, stderr: float | None, n: int, description: str) -> Metric:
    return {
        "benchmark": benchmark,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "interval": None,
        "n": n,
        "higher_is_better": True,
        "description": description,
    }
