"""Models in the order of each metric, with 95% intervals: inline SVG that takes its text and grid colours from the page."""

from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from components.report.comparison import Z_95, Column, Table, TableRow
from components.report.curves import COLOURS, GRID, INK, to_svg

WIDE_RANGE = 5  # from this ratio of the largest to the smallest value on, the axis is logarithmic


@dataclass(frozen=True)
class Ranking:
    title: str
    svg: str


def rankings(table: Table) -> list[Ranking]:
    """A plot for every metric that at least two models have, the best model on top."""
    plots = [_ranking(table.rows, i, column, table.compared_with) for i, column in enumerate(table.columns)]
    return [plot for plot in plots if plot is not None]


def _ranking(rows: list[TableRow], index: int, column: Column, baseline: str | None) -> Ranking | None:
    cells = [(row.name, row.cells[index]) for row in rows if not row.trivial]
    known = [(name, cell.value, Z_95 * (cell.stderr or 0.0)) for name, cell in cells if cell.value is not None]
    if len(known) < 2:
        return None
    known.sort(key=lambda entry: entry[1], reverse=not column.higher_is_better)  # the last is drawn on top
    names, values, halves = zip(*known, strict=True)
    # Names are not formulas, whatever characters they have.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "ranking", "text.parse_math": False, "font.size": 9}
    ):
        figure = Figure(figsize=(4.6, 0.7 + 0.24 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        axes.errorbar(values, range(len(names)), xerr=halves, fmt="o", color=COLOURS[0], ms=4, lw=1.4)
        axes.set_yticks(range(len(names)), names)
        if min(values) > 0 and max(values) > WIDE_RANGE * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if baseline in names:
            axes.axvline(values[names.index(baseline)], color=INK, lw=0.8, ls=(0, (3, 2)))
        axes.tick_params(colors=INK, length=0)
        axes.grid(color=GRID, linewidth=0.8, axis="x")
        axes.spines[:].set_visible(False)
        svg = to_svg(figure)
    return Ranking(f"{column.benchmark}: {column.label} {column.arrow}", svg)
