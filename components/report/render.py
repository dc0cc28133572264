"""Renders a report as one HTML page, as Markdown, and its table as plain text."""

import re
import textwrap
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from components.report.comparison import Cell, Column, TableRow
from components.report.content import PairCard, Report, shares
from components.report.paper import PaperTable

TEXT_WIDTH = 120
MARKDOWN_PAIRS = 4
B_PRIME = "B\N{PRIME}"

SIGNIFICANCE = (
    "* marks a delta that is significant at the 95% level: |delta| > 1.96 sqrt(se1² + se2²). The models answer the "
    "same samples, which this formula ignores, so it is conservative: a small but steady difference can go unmarked."
)
WALL_CLOCK = (
    "Generating and training may overlap. The first step is counted from the start of the stage, loading included; the "
    "wall-clock of all but SPIN from the start of training. A dash: the stage does not log it, or does not do it."
)
SPIN_PAIRS = "In SPIN the whole response is B, and the model of the iteration before wrote its replacement."
PAPER = (
    "Left the paper's figures, right this run's. In Tables 1 and 2 both are of the same benchmarks: our value, its 95% "
    "interval in brackets, and the difference to the paper. In the ablations this run's are on its own benchmarks, and only "
    "their order can be compared. Either way only where model, data and steps are the paper's."
)


def to_html(report: Report) -> str:
    """One page with all styles and drawings inside. Every text from the artifacts is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["line_ends"] = _with_line_ends
    environment.filters["svg"] = Markup  # our own drawings; run names are not in them
    return environment.get_template("report.html").render(
        report=report, significance=SIGNIFICANCE, wall_clock=WALL_CLOCK, paper=PAPER, spin_pairs=SPIN_PAIRS
    )


def to_markdown(report: Report) -> str:
    """The short form: results, trainings, what is missing, and a few pairs."""
    parts = [f"# {_markdown(report.title)}"]
    if report.table.rows:
        parts += ["## Results", _results_in_markdown(report)]
    if report.training_rows:
        parts += ["## Training", _markdown_table([report.training_header, *report.training_rows])]
        parts += ["Losses, margins and accuracies are the last logged ones."]
    if report.wall_clock_rows:
        parts += ["## Where the time went", _markdown_table([report.wall_clock_header, *report.wall_clock_rows])]
        parts += [WALL_CLOCK]
    if report.paper_tables:
        parts += ["## Beside the paper", PAPER, *(_paper_table_in_markdown(table) for table in report.paper_tables)]
    if report.missing:
        parts += ["## Missing", "\n".join(f"- {_markdown(note)}" for note in report.missing)]
    if report.pairs:
        intro = (
            f"The chosen response is A + B + C; the rejected one has {B_PRIME}, sampled from the EMA model, for B. "
            "More pairs are in report.html."
        )
        intro += f" {SPIN_PAIRS}" if report.has_spin_pairs else ""
        parts += ["## Sampled pairs", intro, *_pairs_in_markdown(report)]
    return "\n\n".join(parts) + "\n"


def to_text(report: Report) -> str:
    """The results as aligned plain text, in blocks of columns that fit a terminal."""
    columns, rows = report.table.columns, report.table.rows
    if not rows:
        return "no evaluations: no table of results"
    names = _padded(["", "", *(row.name for row in rows)])
    blocks: list[list[str]] = []
    for index, column in enumerate(columns):
        head = [f"{column.benchmark}: {column.label} {column.arrow}", column.n]
        cells = _padded([*head, *(row.cells[index].text for row in rows)])
        if not blocks or len(blocks[-1][0]) + len(cells[0]) + 3 > TEXT_WIDTH:
            blocks.append(names)
        blocks[-1] = [f"{left}   {right}" for left, right in zip(blocks[-1], cells, strict=True)]
    text = "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks or [names])
    if not report.table.compared_with:
        return text
    legend = f"In brackets: delta to {report.table.compared_with}. {SIGNIFICANCE}"
    return f"{text}\n\n{textwrap.fill(legend, TEXT_WIDTH)}"


def _padded(lines: list[str]) -> list[str]:
    width = max(len(line) for line in lines)
    return [line.ljust(width) for line in lines]


def _with_line_ends(text: str) -> Markup:
    """Escapes a segment and makes its line ends, and its being empty, visible."""
    if not text:
        return Markup('<span class="ghost">(empty)</span>')
    return escape(text).replace("\n", Markup('<span class="ghost">↵</span>\n'))


def _results_in_markdown(report: Report) -> str:
    table = report.table
    heading = ["model", *(_markdown_heading(column) for column in table.columns)]
    lines = [heading, *([_markdown_name(row), *map(_markdown_cell, row.cells)] for row in table.rows)]
    legend = "Value ± standard error. ↑ higher is better, ↓ lower is better; **bold**: the best model."
    if table.compared_with:
        legend += f" In brackets: delta to {_markdown(table.compared_with)}. " + _markdown(SIGNIFICANCE)
    return _markdown_table(lines, escaped=True) + "\n\n" + legend


def _paper_table_in_markdown(table: PaperTable) -> str:
    heading = ["", *(f"paper: {column}" for column in table.paper_columns), "model here", *table.our_columns]
    note = f"\n\n{_markdown(table.note)}" if table.note else ""
    return f"### {_markdown(table.title)}\n\n{_markdown_table([heading, *table.rows])}{note}"


def _markdown_heading(column: Column) -> str:
    count = f" ({column.n})" if column.n else ""
    return _markdown(f"{column.benchmark}: {column.label} {column.arrow}{count}")


def _markdown_name(row: TableRow) -> str:
    return f"*{_markdown(row.name)}*" if row.trivial else _markdown(row.name)


def _markdown_cell(cell: Cell) -> str:
    value = " ".join(part for part in (cell.value_text, cell.stderr_text) if part)
    delta = f" ({_markdown(cell.delta_text)})" if cell.delta_text else ""
    return (f"**{value}**" if cell.best else value) + delta


def _markdown_table(lines: list[list[str]], escaped: bool = False) -> str:
    """A GitHub table; the first column is text, the others are aligned to the right."""
    cells = [[cell if escaped else _markdown(cell) for cell in line] for line in lines]
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))


def _markdown(text: str) -> str:
    """Text on one line that Markdown takes as it is."""
    return re.sub(r"([\\`*\[\]<>|]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def _pairs_in_markdown(report: Report) -> list[str]:
    parts = []
    for group, count in zip(report.pairs, shares(MARKDOWN_PAIRS, len(report.pairs)), strict=True):
        late = group.late[len(group.late) - count // 2 :]
        parts += [_pair_in_markdown(group.name, card) for card in group.early[: count - len(late)] + late]
    return parts


def _pair_in_markdown(name: str, card: PairCard) -> str:
    pair = card.pair
    role, last_turn = card.turns[-1] if card.turns else ("", "")
    kept = "C" if pair.c_kept else "C (dropped from the rejected response)"
    texts = {f"Prompt, last turn ({role or 'as rendered'})": last_turn, "A": card.a, "B (chosen)": card.b}
    texts |= {f"{B_PRIME} (rejected)": card.b_prime, kept: card.c}
    version = "" if pair.ema_version is None else f", EMA version {pair.ema_version}"
    heading = (
        f"### {_markdown(name)}, step {pair.step}, row {_markdown(pair.row_id)} ({_markdown(pair.split)}{version})"
    )
    return "\n\n".join([heading, *(f"{label}:\n\n{_fenced(text)}" for label, text in texts.items() if text)])


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any in the text, so that the text cannot close it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
