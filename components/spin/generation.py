"""Rejected responses of a whole data set, written batch by batch to a file that an interrupted run goes on with.

Several processes share each batch, row by row in turn, and the first one writes.

Batches are the same however often a run was interrupted: rows in order of prompt length, longest first (so that the
largest batch fails at once if it does not fit), and every request with a seed of its own. A batch that was not written
whole is generated again.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from components.common.core.errors import UserError
from components.common.core.progress import progress
from components.common.generation.protocol import Sampler, request_seed
from components.common.models.chat_templates import EncodedRow
from components.common.training.distributed.processes import gather, on_main_process, process_count, process_index
from components.common.training.preference import EncodedPair
from components.spin.config import SPINSettings


def generation_order(rows: Sequence[EncodedRow]) -> list[int]:
    """Row indices, longest prompt first."""
    return sorted(range(len(rows)), key=lambda i: (-len(rows[i]["prompt_ids"]), i))


def is_complete(path: Path, rows: Sequence[EncodedRow]) -> bool:
    """Whether the file has a response for every row."""
    return len(_read_lines(path)) == len(rows)


def generate(
    sampler: Sampler,
    rows: Sequence[EncodedRow],
    path: Path,
    iteration: int,
    settings: SPINSettings,
    after_batch: Callable[[], None] = lambda: None,
    description: str = "generate",
) -> None:
    """Completes the file with the responses that it lacks.

    Args:
        rows: the data set.
        path: the file; what an earlier run wrote there is kept, up to its last whole batch.
        iteration: part of each request's seed, so that no iteration repeats another's draws.
        after_batch: called when a batch is safely written; may raise to stop.
    """
    count, mine = process_count(), process_index()
    order, size = generation_order(rows), settings.sampler_batch_size * count
    done = on_main_process(_keep_whole_batches, path, len(rows), size)
    bar = progress(total=len(rows), initial=done, desc=description, unit="responses", disable=mine > 0)
    for low in range(done, len(rows), size):
        batch = [rows[i] for i in order[low : low + size]]
        responses = _responses(sampler, batch[mine::count], iteration, settings) if len(batch) > mine else []
        found = dict(gather([*zip(range(mine, len(batch), count), responses, strict=True)]))
        on_main_process(_append, path, [(row["id"], found[i]) for i, row in enumerate(batch)])
        bar.update(len(batch))
        after_batch()
    bar.close()


def _append(path: Path, responses: Sequence[tuple[str, list[int]]]) -> None:
    """Adds the responses of a batch, by row id, so that they are on the disk."""
    with path.open("a", encoding="utf-8") as file:
        for row_id, tokens in responses:
            file.write(json.dumps({"id": row_id, "rejected_ids": tokens}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _responses(
    sampler: Sampler, batch: Sequence[EncodedRow], iteration: int, settings: SPINSettings
) -> list[list[int]]:
    prompts = [row["prompt_ids"] for row in batch]
    limits = [min(settings.max_new_tokens, settings.max_length - len(prompt)) for prompt in prompts]
    seeds = [request_seed(settings.seed, iteration, row["id"]) for row in batch]
    return sampler.generate(prompts, limits, seeds)


def _keep_whole_batches(path: Path, rows: int, size: int) -> int:
    """Cuts the file after its last whole batch; returns the responses that are left."""
    lines = _read_lines(path)
    kept = rows if len(lines) == rows else len(lines) // size * size
    with path.open("a+b") as file:
        file.truncate(sum(len(line) for line in lines[:kept]))
    return kept


def _read_lines(path: Path) -> list[bytes]:
    """Lines that were written whole."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


def read_pairs(path: Path, rows: Sequence[EncodedRow]) -> list[EncodedPair]:
    """Each row with its generated response, in the order of the rows.

    Raises:
        UserError: the file is not what `generate` wrote for these rows.
    """
    try:
        written = [json.loads(line) for line in _read_lines(path)]
        ordered = [rows[i] for i in generation_order(rows)]
        if [line["id"] for line in written] != [row["id"] for row in ordered]:
            raise ValueError("its ids are not those of the rows")
        by_index = dict(zip(generation_order(rows), (line["rejected_ids"] for line in written), strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); remove it to have its responses generated again") from error
    return [{**row, "rejected_ids": by_index[i]} for i, row in enumerate(rows)]


def statistics(pairs: Sequence[EncodedPair], stop_ids: frozenset[int]) -> dict[str, float]:
    """Tokens generated, and the responses that are equal to the chosen one (kept all the same) or end their turn."""
    tokens = sum(len(pair["rejected_ids"]) for pair in pairs)
    return {
        "tokens/generated": tokens,
        "generated/mean_length": tokens / len(pairs),
        "generated/identical": sum(pair["rejected_ids"] == pair["chosen_ids"] for pair in pairs),
        "generated/ended_share": sum(not stop_ids.isdisjoint(pair["rejected_ids"]) for pair in pairs) / len(pairs),
    }
