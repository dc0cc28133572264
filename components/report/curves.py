"""Training curves as small inline SVG. Text and grid take their colours from the page, in light and dark."""

import io
import itertools
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from components.report.artifacts import Training

MAX_POINTS = 250  # of a raw curve: more cannot be seen at this size
SMOOTHED_FROM, SMOOTHED_POINTS = 60, 150
RUNS_PER_FIGURE = 4
# Mid-tones that stand out on white and on near-black; the dash, not the colour, tells two series of one run apart.
COLOURS = ("#2f7de1", "#e8702a", "#14a37f", "#b45fd6", "#d64570", "#8a8f2a", "#1fa3c4", "#9a6b4f")
PRIME = "\N{PRIME}"
INK, GRID = "#010203", "#040506"  # stand-ins, replaced by CSS after drawing


@dataclass(frozen=True)
class Series:
    key: str
    label: str


@dataclass(frozen=True)
class Panel:
    """One plot: the first series is solid, the second dashed. Drawn where a run of the group logged one of its keys."""

    title: str
    series: tuple[Series, ...]
    zero_line: bool = False


PANELS = (
    Panel("Loss", (Series("loss", "train"), Series("eval_loss", "held-out"))),
    Panel("Rewards", (Series("rewards/chosen", "chosen"), Series("rewards/rejected", "rejected")), zero_line=True),
    Panel(
        "Reward margin",
        (Series("rewards/margins", "train"), Series("eval_rewards/margins", "held-out")),
        zero_line=True,
    ),
    Panel("Log-probs, train", (Series("logps/chosen", "chosen"), Series("logps/rejected", "rejected"))),
    Panel("Log-probs, held-out", (Series("eval_logps/chosen", "chosen"), Series("eval_logps/rejected", "rejected"))),
    Panel("Reward accuracy", (Series("rewards/accuracies", "train"), Series("eval_rewards/accuracies", "held-out"))),
    Panel("Log-probs of segments", (Series("logps/b", "B"), Series("logps/b_prime", f"B{PRIME}"))),
    Panel(f"Share of sampled B{PRIME}", (Series("sampling/identical", "same as B"), Series("sampling/ended", "ends"))),
    Panel(f"Tokens in B{PRIME}", (Series("sampling/b_prime_length", "mean"),)),
    Panel("Sample age (steps)", (Series("buffer/age_steps", "mean"),)),
    Panel("Sample age (EMA versions)", (Series("buffer/age_versions", "mean"),)),
    Panel("Draws per sample", (Series("buffer/mean_count", "mean"),)),
    Panel("Distance of EMA and policy", (Series("ema/distance", "relative"),)),
    Panel("Seconds of a step", (Series("seconds/sample", "sampling"), Series("seconds/train", "training"))),
)


@dataclass
class Drawing:
    title: str
    svg: str
    solid: str | None
    dashed: str | None


@dataclass
class CurveGroup:
    """Runs of one stage, drawn together; `runs` are (name, colour)."""

    stage: str
    runs: list[tuple[str, str]]
    drawings: list[Drawing]


def curve_groups(trainings: list[Training]) -> list[CurveGroup]:
    """One group per stage, in order of first appearance; a stage with many runs gets several groups."""
    groups = []
    for stage in dict.fromkeys(training.stage for training in trainings):
        runs = [training for training in trainings if training.stage == stage and training.history]
        for start in range(0, len(runs), RUNS_PER_FIGURE):
            groups.append(_group(stage, runs[start : start + RUNS_PER_FIGURE], f"{stage}-{start}"))
    return [group for group in groups if group.drawings]


def thin(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, evenly spread, with the first and the last."""
    if len(points) <= limit:
        return points
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value averaged with its neighbours, 2.5% of the curve to either side and fewer at its ends."""
    reach = max(1, len(points) // 40)
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    smoothed = []
    for i, (step, _) in enumerate(points):
        low, high = max(0, i - reach), min(len(points), i + reach + 1)
        smoothed.append((step, (sums[high] - sums[low]) / (high - low)))
    return smoothed


def _group(stage: str, trainings: list[Training], identifier: str) -> CurveGroup:
    coloured = list(zip(trainings, COLOURS, strict=False))
    drawings = [_draw(panel, coloured, f"{identifier}-{i}") for i, panel in enumerate(PANELS)]
    runs = [(training.name, colour) for training, colour in coloured]
    return CurveGroup(stage, runs, [drawing for drawing in drawings if drawing])


def _draw(panel: Panel, coloured: list[tuple[Training, str]], identifier: str) -> Drawing | None:
    """Draws a panel, or returns None when no run logged any of its keys."""
    drawn: set[str] = set()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": identifier, "font.size": 9}):
        figure = Figure(figsize=(4.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for training, colour in coloured:
            for series, dash in zip(panel.series, ("-", (0, (3, 1.6))), strict=False):
                if points := training.curve(series.key):
                    drawn.add(series.label)
                    _plot(axes, points, colour, dash)
        if not drawn:
            return None
        _dress(axes, panel.zero_line)
        svg = to_svg(figure)
    labels = [series.label if series.label in drawn else None for series in panel.series] + [None]
    return Drawing(panel.title, svg, labels[0], labels[1])


def _plot(axes: Axes, points: list[tuple[float, float]], colour: str, dash: Any) -> None:
    """A short curve as it is; a long one, where noise would hide dashes, as its running mean over the faint raw one."""
    line = points
    if len(points) >= SMOOTHED_FROM:
        axes.plot(*zip(*thin(points), strict=True), color=colour, lw=0.7, alpha=0.25)
        line = thin(running_mean(points), SMOOTHED_POINTS)
    marker = "o" if len(points) <= 20 else ""
    axes.plot(*zip(*line, strict=True), color=colour, ls=dash, lw=1.6, marker=marker, ms=2.5)


def _dress(axes: Axes, zero_line: bool) -> None:
    axes.set_xlabel("step", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_color(INK)
    axes.locator_params(nbins=5)
    if zero_line:
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.55)


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element that scales with its box."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" ', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*" ', r"<svg \1", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # several drawings share a page, and nothing refers to these
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg
    )  # a hundredth of a point will do
    return svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")
