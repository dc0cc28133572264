"""data: any source of conversations -> checked rows for training and held-out rows, with a report of what was left out.

Writes train.jsonl, test.jsonl, statistics.json, rejected_rows.jsonl and report.md.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.core.conversations import write_rows
from components.common.core.errors import UserError
from components.common.core.progress import progress
from components.common.stage.kfp import publish
from components.common.stage.outputs import check_output, prepare_output
from components.common.stage.parser import ConfigParser
from components.common.stage.run import run_stage
from components.common.storage.locations import existing_path, scheme
from components.data import report
from components.data.config import DataConfig
from components.data.rows import Collection, Example, Rejection, records_and_format
from components.data.sources import locate
from components.data.splits import shuffled, split, with_rejected

logger = logging.getLogger(__name__)

_BESIDES = ("statistics.json", "rejected_rows.jsonl", "report.md")


def main(argv: Sequence[str]) -> None:
    parser = ConfigParser("data", [DataConfig])
    if "--help" in argv or "-h" in argv:
        print(parser.help(__doc__ or ""))
        return
    (config,) = parser.parse(argv)
    check_output(config.output, config.overwrite)
    _check_paths(config)
    if config.dry_run:
        print(_plan(config))
        return
    collection = Collection(config)
    examples, layouts = _read(config, collection)
    _refuse_bad_sources(config, collection, examples)
    splits = _arrange(config, collection, examples)
    statistics = _write(config, collection, splits, layouts)
    _log(statistics, config.output, collection.rejected("broken"))
    publish(config.executor_input, {"data": _metadata(statistics)})


def _check_paths(config: DataConfig) -> None:
    output = Path(config.output).resolve()
    for name in ("source", "test_source"):
        uri = getattr(config, name)
        if uri and not scheme(uri) and existing_path(uri, name).resolve().is_relative_to(output):
            raise UserError(f"--{name} {uri}: lies in the output directory {config.output}; write somewhere else")


def _plan(config: DataConfig) -> str:
    """What a run would do. Looks into local sources, leaves remote ones where they are."""
    lines = []
    for name in ("source", "test_source"):
        if not (uri := getattr(config, name)):
            continue
        if scheme(uri):
            lines += [f"{name}: {uri}, fetched when the stage runs"]
            continue
        source = locate(uri, getattr(config, f"{name}_split"), name)
        _, layout = records_and_format(source, config.format)
        lines += [f"{name}: {uri}, format {layout}, files: {', '.join(map(source.name, source.files))}"]
    share = 0 < config.test_rows < 1
    lines += [
        f"held out: up to {f'{config.test_rows:.0%} of the' if share else config.test_rows} rows, seed {config.seed}"
    ]
    lines += [f"stops above {config.max_rejected_share:.1%} broken rows"]
    return "\n".join([*lines, f"would write train.jsonl, test.jsonl, {', '.join(_BESIDES)} to {config.output}"])


def _read(config: DataConfig, collection: Collection) -> tuple[dict[str, list[Example]], list[str]]:
    """Usable rows of both sources; the held-out one first, so that nothing in it is trained on."""
    examples: dict[str, list[Example]] = {"test": [], "train": []}
    layouts = []
    for name, setting in (("test", "test_source"), ("train", "source")):
        if uri := getattr(config, setting):
            records, layout = records_and_format(
                locate(uri, getattr(config, f"{setting}_split"), setting), config.format
            )
            examples[name] = collection.read(progress(records, desc=setting, unit="rows"), layout)
            layouts.append(layout)
        collection.held_out = {example.conversation for example in examples["test"]}
    return examples, layouts


def _refuse_bad_sources(config: DataConfig, collection: Collection, examples: dict[str, list[Example]]) -> None:
    """Stops when a source has no usable row or too many are broken; leaves the list of them in the output directory."""
    for name, uri in (("test", config.test_source), ("train", config.source)):
        if uri and not examples[name]:
            raise UserError(f"{uri}: no usable row: {_list_reasons(config, collection.rejections) or 'it is empty'}")
    broken = collection.rejected("broken")
    total = sum(map(len, examples.values())) + len(collection.rejections)
    if len(broken) > config.max_rejected_share * total:
        share = f"{len(broken) / total:.1%}, max_rejected_share = {config.max_rejected_share:.1%}"
        what = f"{config.source}: {len(broken)} of {total} rows are broken ({share})"
        raise UserError(f"{what}: {_list_reasons(config, broken)}")


def _list_reasons(config: DataConfig, rejections: list[Rejection]) -> str:
    """Writes the list of rejected rows; returns the most frequent reasons and where the list is, "" for none."""
    if not rejections:
        return ""
    kept = prepare_output(config.output, config.overwrite) / "rejected_rows.jsonl"
    kept.write_text(report.rejected_lines(rejections), encoding="utf-8")
    return f"{report.top_reasons(rejections)}; the whole list is in {kept}"


def _arrange(
    config: DataConfig, collection: Collection, examples: dict[str, list[Example]]
) -> dict[str, list[Example]]:
    """Splits, shuffles and cuts the rows, and gives them their counterparts."""
    train, test = examples["train"], examples["test"]
    held_out = config.rows_to_hold_out(len(train))
    if not config.test_source:
        train, test = split(train, held_out, config.seed)
    if not train:
        raise UserError(
            f"test_rows = {config.test_rows} holds out all {len(test)} usable rows; lower it, or give a share such as 0.1"
        )
    splits = {}
    for name, rows, setting, most in (
        ("train", train, "max_rows", config.max_rows),
        ("test", test, "test_rows", held_out),
    ):
        kept = shuffled(rows, config.seed)[:most]
        if len(kept) < len(rows):
            collection.notes[f"usable rows left out by {setting}"] = len(rows) - len(kept)
        splits[name] = with_rejected(kept, name) if config.rejected == "other_conversation" else kept
    return splits


def _write(
    config: DataConfig, collection: Collection, splits: dict[str, list[Example]], layouts: list[str]
) -> dict[str, Any]:
    """Writes every file under another name first, so that a run that fails leaves none that looks whole."""
    output = prepare_output(config.output, config.overwrite)
    with tempfile.TemporaryDirectory(dir=output, prefix=".unfinished-") as scratch:
        folder = Path(scratch)
        sizes = {}
        for name, examples in splits.items():
            write_rows(folder / f"{name}.jsonl", [example.row for example in examples])
            digest = hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest()
            sizes[name] = report.split_statistics(examples, digest)
        statistics = report.make_statistics(config, layouts, sizes, collection)
        text = report.make_report(statistics, collection, splits["train"][0].row)
        contents = (json.dumps(statistics, indent=2) + "\n", report.rejected_lines(collection.rejections), text)
        for name, content in zip(_BESIDES, contents, strict=True):
            (folder / name).write_text(content, encoding="utf-8", errors="replace")
        for path in folder.iterdir():
            path.rename(output / path.name)
    if config.report_file:
        _copy_report(config.report_file, text)
    return statistics


def _copy_report(file: str, text: str) -> None:
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--report_file {file}: cannot be written: {error.strerror}") from error


def _metadata(statistics: dict[str, Any]) -> dict[str, Any]:
    """Counts for the artifact in Kubeflow Pipelines."""
    train, test = statistics["splits"]["train"], statistics["splits"]["test"]
    return {
        "source": statistics["source"],
        "format": statistics["format"],
        "train_rows": train["rows"],
        "test_rows": test["rows"],
        "broken_rows": statistics["rejected"]["broken"],
        "filtered_rows": statistics["rejected"]["filtered"],
        "train_sha256": train["sha256"],
    }


def _log(statistics: dict[str, Any], output: str, broken: list[Rejection]) -> None:
    counts = _metadata(statistics)
    logger.info("%d training and %d held-out rows in %s", counts["train_rows"], counts["test_rows"], output)
    logger.info("%d rows broken, %d filtered out; see report.md", counts["broken_rows"], counts["filtered_rows"])
    if broken:
        logger.info("broken: %s", report.top_reasons(broken))


if __name__ == "__main__":
    run_stage(main)
