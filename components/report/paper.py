"""The paper's tables beside this run's figures. The paper's are in `paper.yaml`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.report.artifacts import Evaluation, Measurement
from components.report.comparison import MISSING, Z_95, Table, number


@dataclass
class PaperTable:
    """One table, all cells as text. A row: label, the paper's figures, name of the model here, its figures."""

    title: str
    paper_columns: list[str]
    our_columns: list[str]
    rows: list[list[str]]
    note: str = ""
    missing: str = ""  # what of the paper's benchmarks this run has not


def paper_tables(table: Table, evaluations: list[Evaluation]) -> list[PaperTable]:
    """Tables 1 and 2 where this run measured one of their metrics; of the ablations those it has a variant of."""
    content = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))
    found = []
    for entry in content:
        if "metrics" in entry:
            found += [_same_metrics(entry, evaluations)] if _is_measured(entry, evaluations) else []
        elif any(_names(table) & set(row["runs"]) for row in entry["rows"] if not row.get("shared")):
            found.append(_ablation(entry, table))
    return found


def figures(entry: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """A row's figures by column, with its averages computed from theirs."""
    given = dict(zip(entry["columns"], row["figures"], strict=True))
    averages = entry.get("averages", {})
    return given | {name: sum(given[part] for part in parts) / len(parts) for name, parts in averages.items()}


def _is_measured(entry: dict[str, Any], evaluations: list[Evaluation]) -> bool:
    """Whether a model that has a row was measured on one of the table's metrics."""
    return any(_ours(entry, row, evaluations)[1] for row in entry["rows"])


def _same_metrics(entry: dict[str, Any], evaluations: list[Evaluation]) -> PaperTable:
    """A table whose columns this run has too, as `value [95% interval] delta to the paper`."""
    columns = [*entry["columns"], *entry.get("averages", {})]
    rows, seen = [], set()
    for row in entry["rows"]:
        theirs, (name, ours) = figures(entry, row), _ours(entry, row, evaluations)
        seen |= set(ours)
        scales = {column: entry["metrics"][column].get("scale", 1) for column in columns}
        cells = [_beside(ours.get(column), theirs[column], scales[column]) for column in columns]
        rows.append([row["label"], *(_paper_number(value) for value in theirs.values()), name, *cells])
    absent = [column for column in columns if column not in seen]
    missing = f"{entry['title'].partition(' (')[0]}: no model of this run has {', '.join(absent)}." if absent else ""
    return PaperTable(entry["title"], columns, columns, rows, entry.get("note", ""), missing)


def _ours(
    entry: dict[str, Any], row: dict[str, Any], evaluations: list[Evaluation]
) -> tuple[str, dict[str, Measurement]]:
    """The name of a row's model here, and its measurements by column."""
    by_name = {evaluation.name: evaluation for evaluation in evaluations}
    name = next((run for run in row["runs"] if run in by_name), None)
    if name is None:
        return MISSING, {}
    measured = {f"{m.benchmark}/{m.metric}": m for m in by_name[name].results if m.value is not None}
    wanted = {column: source["metric"] for column, source in entry["metrics"].items()}
    return name, {column: measured[metric] for column, metric in wanted.items() if metric in measured}


def _beside(ours: Measurement | None, theirs: float, scale: float) -> str:
    """`61.95 [59.13, 64.77] +0.12`: our value in the paper's unit, its 95% interval, and the delta to the paper's."""
    if ours is None or ours.value is None:
        return MISSING
    bounds = interval(ours)
    between = "" if bounds is None else f" [{', '.join(_paper_number(bound * scale) for bound in bounds)}]"
    delta = number(ours.value * scale - theirs, 2 if theirs < 1000 else 0, sign=True)
    return f"{_paper_number(ours.value * scale)}{between} {delta}"


def interval(measurement: Measurement) -> tuple[float, float] | None:
    """The 95% interval of a measurement: its own, or from its standard error."""
    if measurement.interval is not None:
        return measurement.interval
    if measurement.value is None or measurement.stderr is None:
        return None
    return measurement.value - Z_95 * measurement.stderr, measurement.value + Z_95 * measurement.stderr


def _paper_number(value: float) -> str:
    return number(value, 2 if abs(value) < 1000 else 0)


def _ablation(entry: dict[str, Any], table: Table) -> PaperTable:
    columns = [*entry["columns"], *entry.get("averages", {})]
    ours = [f"{column.benchmark}: {column.label} {column.arrow}" for column in table.columns]
    cells_of = {row.name: [cell.value_text for cell in row.cells] for row in table.rows if not row.trivial}
    rows = []
    for row in entry["rows"]:
        name = next((run for run in row["runs"] if run in cells_of), None)
        theirs = [_paper_number(value) for value in figures(entry, row).values()]
        rows.append([row["label"], *theirs, name or MISSING, *(cells_of[name] if name else [MISSING] * len(ours))])
    return PaperTable(entry["title"], columns, ours, rows)


def _names(table: Table) -> set[str]:
    return {row.name for row in table.rows if not row.trivial}
