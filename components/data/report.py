"""What the stage says about its work: statistics.json, rejected_rows.jsonl and report.md."""

import dataclasses
import json
import statistics
from collections import Counter
from typing import Any

from components.common.core.conversations import Message, Row
from components.data.config import DataConfig
from components.data.rows import Collection, Example, Rejection, characters, turns
from components.data.sources import where

REASONS_IN_ERROR = 3
REASONS_SHOWN = 20
LINES_SHOWN = 20
# Settings of the run's surroundings: the same data has the same statistics wherever it is written.
_NOT_ABOUT_DATA = {"output", "overwrite", "dry_run", "executor_input", "report_file"}


def split_statistics(examples: list[Example], sha256: str) -> dict[str, Any]:
    """Sizes of one split; lengths in characters, turns in messages of the prompt without the system message."""
    rows = [example.row for example in examples]
    messages = [message for row in rows for message in [*row["prompt"], *row["chosen"]]]
    turn_counts = [turns(row["prompt"]) for row in rows]
    return {
        "rows": len(rows),
        "conversations": len({example.conversation for example in examples}),
        "paired_rows": sum("rejected" in row for row in rows),
        "prompt_characters": _summary([characters(row["prompt"]) for row in rows]),
        "response_characters": _summary([characters(row["chosen"]) for row in rows]),
        "turns": _summary(turn_counts),
        "turns_histogram": {str(count): number for count, number in sorted(Counter(turn_counts).items())},
        "roles": dict(sorted(Counter(message["role"] for message in messages).items())),
        "sha256": sha256,
    }


def _summary(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "mean": round(statistics.fmean(ordered), 1),
        "p95": ordered[max(0, -(-len(ordered) * 95 // 100) - 1)],  # nearest rank
        "max": ordered[-1],
    }


def make_statistics(
    config: DataConfig, layouts: list[str], splits: dict[str, Any], collection: Collection
) -> dict[str, Any]:
    """The content of statistics.json."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_ABOUT_DATA}
    return {
        "schema": 1,
        "source": config.source,
        "format": ", ".join(dict.fromkeys(layouts)),
        "splits": splits,
        "rejected": {
            "broken": len(collection.rejected("broken")),
            "filtered": len(collection.rejected("filtered")),
            "by_reason": by_reason(collection.rejections),
        },
        "notes": dict(sorted(collection.notes.items())),
        "settings": settings,
    }


def by_reason(rejections: list[Rejection]) -> list[dict[str, Any]]:
    """Counts of what was left out: broken before filtered, then the most frequent first."""
    counts = Counter((rejection.kind, rejection.group) for rejection in rejections)
    ordered = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
    return [{"kind": kind, "reason": reason, "rows": rows} for (kind, reason), rows in ordered]


def top_reasons(rejections: list[Rejection]) -> str:
    """The most frequent reasons with the first line of each, in one line of text."""
    first = {(rejection.kind, rejection.group): rejection for rejection in reversed(rejections)}
    entries = sorted(by_reason(rejections), key=lambda entry: -entry["rows"])[:REASONS_IN_ERROR]
    places = [first[entry["kind"], entry["reason"]] for entry in entries]
    return "; ".join(
        f"{entry['reason']} ({entry['rows']} x, first in {where(place.file, place.line)})"
        for entry, place in zip(entries, places, strict=True)
    )


def rejected_lines(rejections: list[Rejection]) -> str:
    """The content of rejected_rows.jsonl."""
    names = ("file", "line", "id", "kind", "reason")
    return "".join(json.dumps({name: getattr(rejection, name) for name in names}) + "\n" for rejection in rejections)


def make_report(result: dict[str, Any], collection: Collection, sample: Row | None) -> str:
    """The content of report.md."""
    lines = ["# Data", "", f"Source: `{result['source']}` (format: {result['format']})", ""]
    lines += _split_table(result["splits"])
    lines += _rejection_lines(result["rejected"], collection.rejections)
    if result["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}: {count}" for note, count in result["notes"].items())]
    if sample:
        lines += ["", f"## A training row: `{sample['id']}`", ""]
        lines += [_quoted(message) for message in [*sample["prompt"], *sample["chosen"]]]
        lines += [_quoted(message, "rejected ") for message in sample.get("rejected", [])]
    return "\n".join(lines) + "\n"


def _split_table(splits: dict[str, Any]) -> list[str]:
    lines = ["| split | rows | conversations | paired | median / p95 prompt | median / p95 response | turns |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for name, split in splits.items():
        if split["rows"]:
            prompt, response = split["prompt_characters"], split["response_characters"]
            sizes = f"{prompt['median']:g} / {prompt['p95']} | {response['median']:g} / {response['p95']}"
            turn_range = f"{split['turns']['min']} to {split['turns']['max']}"
            counts = f"{split['rows']} | {split['conversations']} | {split['paired_rows']}"
            lines += [f"| {name} | {counts} | {sizes} | {turn_range} |"]
    return [*lines, "", "Lengths in characters, turns in messages of the prompt."]


def _rejection_lines(rejected: dict[str, Any], rejections: list[Rejection]) -> list[str]:
    lines = ["", "## Rejected rows", "", f"{rejected['broken']} broken, {rejected['filtered']} filtered out."]
    if not rejections:
        return lines
    lines += ["", "| kind | reason | rows |", "|---|---|---:|"]
    reasons = rejected["by_reason"]
    lines += [f"| {entry['kind']} | {_cell(entry['reason'])} | {entry['rows']} |" for entry in reasons[:REASONS_SHOWN]]
    if rest := sum(entry["rows"] for entry in reasons[REASONS_SHOWN:]):
        lines += [f"| | {len(reasons) - REASONS_SHOWN} other reasons | {rest} |"]
    # Broken rows first: they are what somebody should look at.
    shown = sorted(rejections, key=lambda rejection: rejection.kind)[:LINES_SHOWN]
    lines += ["", f"The first {len(shown)} of {len(rejections)}; `rejected_rows.jsonl` has them all.", ""]
    lines += ["| file | line | id | reason |", "|---|---:|---|---|"]
    return lines + [f"| {_cell(r.file)} | {r.line} | {_cell(r.id)} | {_cell(r.reason)} |" for r in shown]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]


def _quoted(message: Message, prefix: str = "") -> str:
    content = message["content"] if len(message["content"]) <= 1000 else message["content"][:1000] + " ..."
    return f"> **{prefix}{message['role']}:** " + content.replace("\n", "\n> ") + "\n"
