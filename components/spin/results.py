"""What a run hands on: one training log over all iterations, sampled pairs for the report, the last model."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerState

from components.common.training.log import write_training_log

if TYPE_CHECKING:
    from components.spin.iterations import SPINRun

# Of every iteration's summary, what is summed over the run; the rest is the last iteration's.
SUMMED = ("tokens/generated", "tokens/trained", "generated/identical")


def write_pairs(run: "SPINRun", newest: int) -> None:
    """Writes `pairs.jsonl` anew: some pairs of each iteration so far, in the form of sapo's, all of the response being B."""
    count = min(run.settings.pairs_per_log, len(run.train_rows))
    lines = []
    for index in range(newest + 1):
        pairs = run.pairs(index)
        random = np.random.default_rng((run.settings.seed, index))
        for chosen in sorted(random.choice(len(pairs), count, replace=False).tolist()):
            pair, decode = pairs[chosen], run.tokenizer.decode
            line = {
                "step": run.first_steps[index],
                "row_id": pair.get("id"),
                "split": "train",
                "prompt": decode(pair["prompt_ids"]),
                "a": "",
                "b": decode(pair["chosen_ids"]),
                "b_prime": decode(pair["rejected_ids"]),
                "c": "",
                "c_kept": False,
                "generated_at_step": run.first_steps[index],
                "iteration": index,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    run.log_directory.mkdir(parents=True, exist_ok=True)
    (run.log_directory / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")


def summarise(run: "SPINRun") -> tuple[list[dict[str, Any]], int, dict[str, float]]:
    """The log entries of all iterations with one count of steps, the steps in all, and the summary."""
    history: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    steps, epochs = 0, 0.0
    for index in range(run.settings.iterations):
        result = run.files.result(index)
        assert result is not None  # the run is complete
        generated = {k: v for k, v in result["summary"].items() if k.startswith(("generated/", "tokens/generated"))}
        seconds = run.clock.seconds.get(f"iteration-{index}/seconds/generate", 0.0)
        history.append({"step": steps, "iteration": index, "epoch": epochs, "seconds/generate": seconds, **generated})
        for entry in result["history"]:
            shifted = {"step": entry["step"] + steps, "iteration": index, "epoch": entry.get("epoch", 0.0) + epochs}
            history.append(entry | shifted)
        for name, value in result["summary"].items():
            summary[f"iteration-{index}/{name}"] = value
            summary[name] = value + (summary.get(name, 0) if name in SUMMED else 0)
        steps += result["steps"]
        epochs += run.settings.epochs_per_iteration
    return history, steps, summary | _seconds(run)


def _seconds(run: "SPINRun") -> dict[str, float]:
    """Wall-clock seconds: of each part of each iteration, of each part in all, until the first step, and of the run."""
    clock = dict(run.clock.seconds)
    seconds = {"train_runtime": clock.pop("run")}
    for name, value in clock.items():
        seconds[name] = value
        if name.startswith("iteration-"):
            part = name.partition("/")[2]
            seconds[part] = seconds.get(part, 0.0) + value
    return seconds


def write_results(run: "SPINRun", name: str, settings: dict[str, Any]) -> dict[str, float]:
    """Writes the model and, last, the training log; returns the summary."""
    copy_model(run.files.model(run.settings.iterations - 1), run.files.output)
    run.clock.save()
    history, steps, summary = summarise(run)
    # As a trainer of all iterations would have left its state.
    trainer: Any = SimpleNamespace(state=TrainerState(log_history=history, global_step=steps))
    write_training_log(run.log_directory, "spin", name, trainer, settings, summary)
    return summary


def copy_model(source: Path, target: Path) -> None:
    """Puts a model's files into a directory, as links where the file system can."""
    for path in sorted(source.iterdir()):
        unfinished = target / f"{path.name}.unfinished"
        unfinished.unlink(missing_ok=True)
        try:
            os.link(path, unfinished)
        except OSError:
            shutil.copyfile(path, unfinished)
        unfinished.replace(target / path.name)
