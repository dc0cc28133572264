"""Compares models: one self-contained HTML page and Markdown from the artifacts of evaluations and trainings.

The page has a table of models x metrics with standard errors and deltas to the SFT model, training curves, sampled
pairs with B and its replacement B' marked, and where each figure comes from. What was not given is listed as missing.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from components.common.core.errors import UserError
from components.common.stage.kfp import publish
from components.common.stage.outputs import check_output, prepare_output
from components.common.stage.parser import ConfigParser
from components.common.stage.run import run_stage
from components.report.artifacts import read_evaluations, read_trainings
from components.report.comparison import Table
from components.report.config import ReportConfig
from components.report.content import Report, build_report
from components.report.render import to_html, to_markdown, to_text

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Reads the artifacts, then writes report.html and report.md."""
    parser = ConfigParser("report", [ReportConfig])
    if "--help" in argv or "-h" in argv:
        print(parser.help(__doc__ or ""))
        return
    (config,) = parser.parse(argv)
    check_output(config.output, config.overwrite)
    report = build_report(config, read_evaluations(config.evaluations), read_trainings(config.trainings))
    if config.dry_run:
        print(_plan(report, config))
        return
    page, markdown = to_html(report), to_markdown(report)
    output = prepare_output(config.output, config.overwrite)
    for path, text in _files(output, config, page, markdown):
        _write(path, text)
    for note in report.missing:
        logger.warning("%s", note)
    publish(config.executor_input, {"metrics": metrics(report.table)})
    print(f"{to_text(report)}\n\n{output / 'report.html'}")


def metrics(table: Table) -> dict[str, float]:
    """`<model>/<metric>` for KFP; the benchmark goes in between where two benchmarks share a metric's name."""
    names = [column.metric for column in table.columns]
    values = {}
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            label = column.metric if names.count(column.metric) == 1 else f"{column.benchmark}/{column.metric}"
            if cell.value is not None and not row.trivial:
                values[f"{row.name}/{label}"] = cell.value
    return values


def _files(output: Path, config: ReportConfig, page: str, markdown: str) -> list[tuple[Path, str]]:
    files = [(output / "report.html", page), (output / "report.md", markdown)]
    files += [(Path(config.html_file), page)] if config.html_file else []
    return files + ([(Path(config.markdown_file), markdown)] if config.markdown_file else [])


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _plan(report: Report, config: ReportConfig) -> str:
    lines = [f"would write {path}" for path, _ in _files(Path(config.output), config, "", "")]
    models = [row.name for row in report.table.rows if not row.trivial]
    lines.append(f"models: {', '.join(models) or 'none'}; metrics: {len(report.table.columns)}")
    lines.append(f"figures: {sum(len(g.drawings) for g in report.curves)}")
    lines.append(f"sampled pairs: {sum(len(g.early) + len(g.late) for g in report.pairs)}")
    return "\n".join(lines + [f"missing: {note}" for note in report.missing])


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # the table has ± and arrows; a pod may have LANG=C
    run_stage(main)
