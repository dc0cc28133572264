"""The paper's ablation tables beside the same variants of this run. Figures in `paper.yaml`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.report.comparison import MISSING, Table, number


@dataclass
class PaperTable:
    """One table, all cells as text. A row: label, the paper's figures, name of the model here, its figures."""

    title: str
    paper_columns: list[str]
    our_columns: list[str]
    rows: list[list[str]]


def paper_tables(table: Table) -> list[PaperTable]:
    """The tables that this run has a variant of, beyond the method's defaults."""
    content = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))
    return [_paper_table(entry, table) for entry in content if _is_shown(entry, _names(table))]


def figures(entry: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """A row's figures by column, with its averages computed from theirs."""
    given = dict(zip(entry["columns"], row["figures"], strict=True))
    averages = entry.get("averages", {})
    return given | {name: sum(given[part] for part in parts) / len(parts) for name, parts in averages.items()}


def _is_shown(entry: dict[str, Any], names: set[str]) -> bool:
    return any(names & set(row["runs"]) for row in entry["rows"] if not row.get("shared"))


def _paper_table(entry: dict[str, Any], table: Table) -> PaperTable:
    columns = [*entry["columns"], *entry.get("averages", {})]
    ours = [f"{column.benchmark}: {column.label} {column.arrow}" for column in table.columns]
    cells_of = {row.name: [cell.value_text for cell in row.cells] for row in table.rows if not row.trivial}
    rows = []
    for row in entry["rows"]:
        name = next((run for run in row["runs"] if run in cells_of), None)
        theirs = [number(value, 2 if value < 1000 else 0) for value in figures(entry, row).values()]
        rows.append([row["label"], *theirs, name or MISSING, *(cells_of[name] if name else [MISSING] * len(ours))])
    return PaperTable(entry["title"], columns, ours, rows)


def _names(table: Table) -> set[str]:
    return {row.name for row in table.rows if not row.trivial}
