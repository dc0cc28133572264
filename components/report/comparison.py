"""The table of models x metrics: values, standard errors, deltas to the baseline model, and which are significant."""

import math
from collections import Counter
from dataclasses import dataclass, field

from components.report.artifacts import Evaluation, Measurement, TrivialBaseline

Z_95 = 1.96  # two-sided 95% of a normal distribution
MISSING = "—"


@dataclass
class Column:
    """A metric; `decimals` is common to its column so that figures line up."""

    benchmark: str
    metric: str
    higher_is_better: bool
    description: str
    counts: list[int] = field(default_factory=list)
    decimals: int = 0

    @property
    def arrow(self) -> str:
        return "↑" if self.higher_is_better else "↓"

    @property
    def label(self) -> str:
        return self.metric.replace("_", " ")

    @property
    def n(self) -> str:
        """How many samples are behind the figures: one number, a range, or nothing."""
        low, high = min(self.counts, default=0), max(self.counts, default=0)
        return "" if not self.counts else f"n = {low:,}" if low == high else f"n = {low:,} to {high:,}"


@dataclass
class Cell:
    """One figure. `delta` is None on the baseline's own row and wherever there is nothing to compare with."""

    value: float | None = None
    stderr: float | None = None
    delta: float | None = None
    significant: bool = False
    better: bool = False
    best: bool = False
    decimals: int = 0

    @property
    def value_text(self) -> str:
        return MISSING if self.value is None else number(self.value, self.decimals)

    @property
    def stderr_text(self) -> str:
        return "" if self.value is None or self.stderr is None else f"± {number(self.stderr, self.decimals)}"

    @property
    def delta_text(self) -> str:
        if self.delta is None:
            return ""
        return number(self.delta, self.decimals, sign=True) + ("*" if self.significant else "")

    @property
    def text(self) -> str:
        """The whole cell in one line: `0.410 ± 0.020 (+0.030*)`."""
        delta = f"({self.delta_text})" if self.delta_text else ""
        return " ".join(part for part in (self.value_text, self.stderr_text, delta) if part)


@dataclass
class TableRow:
    name: str
    cells: list[Cell]
    trivial: bool = False


@dataclass
class Table:
    """Rows of models, then rows of trivial baselines. `compared_with` is None when the baseline model is absent."""

    columns: list[Column]
    rows: list[TableRow]
    compared_with: str | None
    trivial_descriptions: dict[str, str]
    notes: list[str]

    @property
    def benchmarks(self) -> list[tuple[str, int]]:
        """(benchmark, how many columns it has), in order."""
        return list(Counter(column.benchmark for column in self.columns).items())


def number(value: float, decimals: int, sign: bool = False) -> str:
    """A figure with thousands separators and a true minus sign; zero has no sign."""
    text = f"{value:{'+' if sign else ''},.{decimals}f}"
    is_zero = not any(character in "123456789" for character in text)
    return text.lstrip("+-") if is_zero else text.replace("-", "\N{MINUS SIGN}")


def build_table(evaluations: list[Evaluation], baseline_name: str) -> Table:
    """Puts evaluations side by side; columns are in order of first appearance, grouped by benchmark."""
    columns = _columns(evaluations)
    baseline = next((e for e in evaluations if e.name == baseline_name), None)
    rows, notes = [], []
    for evaluation in evaluations:
        rows.append(TableRow(evaluation.name, [_cell(evaluation, baseline, column) for column in columns]))
        absent = [
            f"{c.benchmark} / {c.metric}" for c, cell in zip(columns, rows[-1].cells, strict=True) if cell.value is None
        ]
        if absent:
            notes.append(f"{evaluation.name} has no figure for {', '.join(absent)}.")
    _mark_best(columns, rows)
    trivial_rows, trivial_notes = _trivial_rows(evaluations, columns)
    descriptions = {b.name: b.description for e in evaluations for b in e.baselines}
    compared_with = baseline.name if baseline and len(evaluations) > 1 else None
    return Table(columns, rows + trivial_rows, compared_with, descriptions, notes + trivial_notes)


def compare(value: Measurement, baseline: Measurement) -> tuple[float | None, bool]:
    """Delta to the baseline, and whether it is significant at 95%: |delta| > 1.96 sqrt(se1^2 + se2^2).

    This takes the two samples for independent. Models answer the same questions, so the test is conservative. Without
    both standard errors nothing is called significant.
    """
    if value.value is None or baseline.value is None:
        return None, False
    delta = value.value - baseline.value
    if value.stderr is None or baseline.stderr is None:
        return delta, False
    return delta, abs(delta) > Z_95 * math.hypot(value.stderr, baseline.stderr)


def _columns(evaluations: list[Evaluation]) -> list[Column]:
    columns: dict[tuple[str, str], Column] = {}
    measurements = [m for evaluation in evaluations for m in evaluation.results]
    for m in measurements:
        key = (m.benchmark, m.metric)
        column = columns.setdefault(key, Column(m.benchmark, m.metric, m.higher_is_better, m.description))
        column.counts += [m.n] if m.n is not None else []
    for key, column in columns.items():
        column.decimals = _decimals([m for m in measurements if (m.benchmark, m.metric) == key])
    benchmarks = list(dict.fromkeys(column.benchmark for column in columns.values()))
    return sorted(columns.values(), key=lambda column: benchmarks.index(column.benchmark))


def _decimals(measurements: list[Measurement]) -> int:
    """Two digits of the smallest standard error of a column; without errors, four of its largest value. At most 4."""
    errors = [m.stderr for m in measurements if m.stderr]
    values = [abs(m.value) for m in measurements if m.value]
    if not errors and not values:
        return 2
    digits = 1 - math.floor(math.log10(min(errors))) if errors else 3 - math.floor(math.log10(max(values)))
    return min(max(digits, 0), 4)


def _find(evaluation: Evaluation | None, column: Column) -> Measurement | None:
    results = evaluation.results if evaluation else []
    return next((m for m in results if (m.benchmark, m.metric) == (column.benchmark, column.metric)), None)


def _cell(evaluation: Evaluation, baseline: Evaluation | None, column: Column) -> Cell:
    measurement = _find(evaluation, column)
    if measurement is None:
        return Cell(decimals=column.decimals)
    cell = Cell(measurement.value, measurement.stderr, decimals=column.decimals)
    reference = _find(baseline, column) if evaluation is not baseline else None
    if reference is not None:
        cell.delta, cell.significant = compare(measurement, reference)
        cell.better = cell.delta is not None and cell.delta != 0 and (cell.delta > 0) == column.higher_is_better
    return cell


def _mark_best(columns: list[Column], rows: list[TableRow]) -> None:
    """Marks the best model of each column, all of them on a tie; one model alone is not the best of anything."""
    for index, column in enumerate(columns):
        cells = [row.cells[index] for row in rows]
        values = [cell.value for cell in cells if cell.value is not None]
        best = (max if column.higher_is_better else min)(values) if len(values) > 1 else None
        for cell in cells:
            cell.best = best is not None and cell.value == best


def _trivial_rows(evaluations: list[Evaluation], columns: list[Column]) -> tuple[list[TableRow], list[str]]:
    """One row per name of a trivial baseline, and notes on those that fit no column or differ between evaluations."""
    rows: dict[str, TableRow] = {}
    notes: list[str] = []
    for evaluation in evaluations:
        for baseline in evaluation.baselines:
            matching = [i for i, column in enumerate(columns) if _belongs(baseline, column)]
            if len(matching) != 1:
                notes.append(f"Baseline {baseline.name} of {evaluation.name} fits no single metric: {baseline.metric}.")
                continue
            empty = [Cell(decimals=column.decimals) for column in columns]
            cell = rows.setdefault(baseline.name, TableRow(baseline.name, empty, trivial=True)).cells[matching[0]]
            if cell.value is None:
                cell.value = baseline.value
            elif baseline.value is not None and not math.isclose(cell.value, baseline.value, rel_tol=1e-6):
                value = number(baseline.value, cell.decimals)
                notes.append(
                    f"Baseline {baseline.name} of {evaluation.name} differs: {baseline.metric} is {value} there."
                )
    return list(rows.values()), list(dict.fromkeys(notes))


def _belongs(baseline: TrivialBaseline, column: Column) -> bool:
    return baseline.metric == column.metric and baseline.benchmark in (None, column.benchmark)
