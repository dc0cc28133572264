"""From lm-eval's output to results.json, samples.jsonl and the table on stdout."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from components.evaluation.held_out import METRICS, TASK, perplexity_stderr, picked


def metrics(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of the held-out task with their standard errors: lm-eval's for means, our own for perplexities."""
    values, samples = outcome["results"][TASK], outcome["samples"][TASK]
    entries = []
    for metric, (higher_is_better, description) in METRICS.items():
        stderr = values[f"{metric}_stderr,none"]
        if metric.startswith("perplexity"):
            stderr = perplexity_stderr([sample[metric] for sample in samples])
        entries.append(
            {
                "benchmark": TASK,
                "metric": metric,
                "value": values[f"{metric},none"],
                "stderr": None if stderr == "N/A" else stderr,  # a single document has none
                "n": len(samples),
                "higher_is_better": higher_is_better,
                "description": description,
            }
        )
    return entries


def samples(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per document, in the order of the test split; log-likelihoods are in nats."""
    entries = []
    for sample in outcome["samples"][TASK]:
        document, answers = sample["doc"], sample["filtered_resps"]
        entries.append(
            {
                "id": document["id"],
                "true_choice": document["target"],
                "picked_choice": picked(document["choices"], answers),
                "log_likelihoods": [log_likelihood for log_likelihood, _ in answers],
                "nll": -answers[document["target"]][0],
                "n_tokens": document["n_tokens"],
                "n_bytes": document["n_bytes"],
                "choices": document["choices"],
            }
        )
    return entries


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lm_eval")}


def write(output: Path, results: dict[str, Any], sample_entries: list[dict[str, Any]]) -> None:
    """Writes samples.jsonl, then results.json, whose presence says that the evaluation is whole."""
    with (output / "samples.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in sample_entries)
    (output / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """The results and the baselines as aligned lines, each metric's baseline below it."""
    lines = [f"{'metric':<22}{'value':>12}{'std. error':>12}  model"]
    for entry in results["results"]:
        stderr = "" if entry["stderr"] is None else f"{entry['stderr']:.4g}"
        lines.append(f"{entry['metric']:<22}{entry['value']:>12.4g}{stderr:>12}  {results['name']} ({entry['n']} rows)")
        for baseline in results["baselines"]:
            if baseline["metric"] == entry["metric"]:
                lines.append(f"{'':<22}{baseline['value']:>12.4g}{'':>12}  {baseline['name']} baseline")
    return "\n".join(lines)


def flat_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The metrics as KFP shows them: one name, one number."""
    own = {entry["metric"]: entry["value"] for entry in results["results"]}
    return own | {f"{entry['name']}_{entry['metric']}": entry["value"] for entry in results["baselines"]}
