"""What a run hands on: the last iteration's model, and one training log over all iterations."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState

from components.common.training.log import write_training_log
from components.spin.inputs import SPINInputs

# Of every iteration's summary, what is summed over the run; the rest is the last iteration's.
SUMMED = ("tokens/generated", "tokens/trained", "generated/identical")


def write_results(
    inputs: SPINInputs, clock: Mapping[str, float], name: str, settings: dict[str, Any]
) -> dict[str, float]:
    """Writes the model and, last, the training log; returns the summary.

    Args:
        clock: seconds by name.
        name: what the report calls the run.
        settings: all of them, for the record.
    """
    link_model(inputs.files.model(inputs.settings.iterations - 1), inputs.files.output)
    state, summary = summarise(inputs, clock)
    write_training_log(inputs.log_directory, "spin", name, state, settings, summary)
    return summary


def summarise(inputs: SPINInputs, clock: Mapping[str, float]) -> tuple[TrainerState, dict[str, float]]:
    """The state that one trainer of all iterations would have left, with one count of steps and epochs, and the summary."""
    state = TrainerState(log_history=[], global_step=0)
    summary: dict[str, float] = {}
    epochs = 0.0
    for index in range(inputs.settings.iterations):
        result = inputs.files.result(index)
        assert result is not None  # the run is complete

        begins = {"step": state.global_step, "iteration": index, "epoch": epochs}
        generated = {k: v for k, v in result["summary"].items() if k.startswith(("generated/", "tokens/generated"))}
        seconds = clock.get(f"iteration-{index}/seconds/generate", 0.0)
        state.log_history.append({**begins, "seconds/generate": seconds, **generated})
        for entry in result["history"]:
            shifted = {"step": entry["step"] + begins["step"], "epoch": entry.get("epoch", 0.0) + epochs}
            state.log_history.append(entry | shifted | {"iteration": index})

        for name, value in result["summary"].items():
            summary[f"iteration-{index}/{name}"] = value
            summary[name] = value + (summary.get(name, 0) if name in SUMMED else 0)
        state.global_step += result["steps"]
        epochs += inputs.settings.epochs_per_iteration
    return state, summary | dict(clock)


def link_model(source: Path, target: Path) -> None:
    """Puts a model's files into a directory, as links where the file system can."""
    for path in sorted(source.iterdir()):
        unfinished = target / f"{path.name}.unfinished"
        unfinished.unlink(missing_ok=True)
        try:
            os.link(path, unfinished)
        except OSError:
            shutil.copyfile(path, unfinished)
        unfinished.replace(target / path.name)
