"""MT-Bench by category as a radar plot: inline SVG that takes its text and grid colours from the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from components.report.artifacts import Evaluation
from components.report.curves import COLOURS, GRID, INK, to_svg

CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)  # FastChat's order
HIGHEST = 10


@dataclass(frozen=True)
class Radar:
    """The plot, and the models in it with their colours."""

    svg: str
    models: list[tuple[str, str]]


def mt_bench_radar(evaluations: list[Evaluation]) -> Radar | None:
    """MT-Bench of the first models that have it, as many as there are colours; None where none has."""
    ratings = {
        e.name: {
            r.metric: r.value
            for r in e.results
            if r.benchmark == "mt_bench" and r.metric in CATEGORIES and r.value is not None
        }
        for e in evaluations
    }
    rated = dict([(name, values) for name, values in ratings.items() if values][: len(COLOURS)])
    svg = radar(rated)
    return Radar(svg, list(zip(rated, COLOURS, strict=False))) if svg else None


def radar(models: Mapping[str, Mapping[str, float]], colours: Sequence[str] = COLOURS) -> str | None:
    """An `<svg>` of each model's mean rating (1 to 10) in each category, one colour a model in their order.

    A model without all the categories is left out. None when no model has them, or there are fewer than three.
    """
    known = {category for ratings in models.values() for category in ratings}
    spokes = [category for category in CATEGORIES if category in known]
    drawn = [
        ([ratings[spoke] for spoke in spokes], colour)
        for ratings, colour in zip(models.values(), colours, strict=False)
        if ratings.keys() >= set(spokes)
    ]
    if len(spokes) < 3 or not drawn:
        return None
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "radar", "font.size": 9}):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        axes = figure.add_subplot(projection="polar")
        for values, colour in drawn:
            axes.plot([*angles, angles[0]], [*values, values[0]], color=colour, lw=1.6, marker="o", ms=2.5)
            axes.fill(angles, values, color=colour, alpha=0.08)
        axes.set_theta_offset(np.pi / 2)  # type: ignore[attr-defined]
        axes.set_theta_direction(-1)  # type: ignore[attr-defined]
        axes.set_ylim(0, HIGHEST)
        axes.set_yticks(range(2, HIGHEST + 1, 2))
        axes.set_xticks(angles, spokes)
        axes.tick_params(colors=INK)
        axes.tick_params(axis="x", pad=9)  # the labels stay clear of the rim
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines["polar"].set_color(GRID)
        return to_svg(figure)
