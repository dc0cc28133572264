"""Some of the pairs of each iteration as text, for the report: `pairs.jsonl` in the training log."""

import json
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from components.common.training.preference import EncodedPair
from components.spin.inputs import SPINInputs


def write_pairs(inputs: SPINInputs, newest: int, first_steps: Sequence[int]) -> None:
    """Writes the file anew, with `pairs_per_log` pairs of each iteration up to the newest.

    Args:
        first_steps: optimizer steps of the run before each iteration.
    """
    lines = []
    for index in range(newest + 1):
        for pair in _sampled(inputs, index):
            line = _line(inputs.tokenizer, pair, index, first_steps[index])
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")

    inputs.log_directory.mkdir(parents=True, exist_ok=True)
    (inputs.log_directory / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")


def _sampled(inputs: SPINInputs, index: int) -> list[EncodedPair]:
    """The pairs of an iteration that are shown: the same ones whenever they are asked for."""
    pairs = inputs.pairs(index)
    random = np.random.default_rng((inputs.settings.seed, index))
    count = min(inputs.settings.pairs_per_log, len(pairs))
    return [pairs[i] for i in sorted(random.choice(len(pairs), count, replace=False).tolist())]


def _line(tokenizer: PreTrainedTokenizerBase, pair: EncodedPair, index: int, step: int) -> dict[str, object]:
    """A pair in the form of sapo's, which names the segments A, B and C of a response: here all of it is B."""
    return {
        "step": step,
        "row_id": pair.get("id"),
        "split": "train",
        "prompt": tokenizer.decode(pair["prompt_ids"]),
        "a": "",
        "b": tokenizer.decode(pair["chosen_ids"]),
        "b_prime": tokenizer.decode(pair["rejected_ids"]),
        "c": "",
        "c_kept": False,
        "generated_at_step": step,
        "iteration": index,
    }
