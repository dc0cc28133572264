"""MT-Bench by category as a radar plot: inline SVG that takes its text and grid colours from the page."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from components.report.curves import _GRID, _INK, COLOURS, _svg

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
        axes.tick_params(colors=_INK)
        axes.tick_params(axis="x", pad=9)  # the labels stay clear of the rim
        axes.grid(color=_GRID, linewidth=0.8)
        axes.spines["polar"].set_color(_GRID)
        return _svg(figure)
