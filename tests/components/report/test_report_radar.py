"""The radar plot shows each model's ratings at their distance from the centre."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from components.report.curves import COLOURS
from components.report.radar import CATEGORIES, radar


def curve(svg: str, colour: str) -> np.ndarray:
    """The points of the line of a colour, in the drawing's units."""
    path = re.search(rf'<path d="([^"]*)"[^>]*stroke: {colour}; stroke-width: 1.6', svg)
    assert path, "no such line"
    return np.array([[float(x) for x in point] for point in re.findall(r"[ML] ?([-\d.]+) ([-\d.]+)", path[1])])


def test_ratings_are_the_distances_from_the_centre():
    good = dict.fromkeys(CATEGORIES, 8.0)
    mixed = {category: 1.0 + i for i, category in enumerate(CATEGORIES)}
    svg = radar({"a": good, "b": mixed})
    assert svg is not None
    ElementTree.fromstring(svg)
    for category in CATEGORIES:
        assert f">{category}<" in svg
    circle = curve(svg, COLOURS[0])
    centre = (circle[0] + circle[len(circle) // 2]) / 2  # opposite spokes of equal length
    unit = np.linalg.norm(circle[0] - centre) / 8
    distances = np.linalg.norm(curve(svg, COLOURS[1]) - centre, axis=1) / unit
    for rating in mixed.values():
        assert np.isclose(distances, rating, atol=0.05).any()
    assert distances.max() == pytest.approx(8, abs=0.05) and distances[0] == pytest.approx(1, abs=0.05)
    first = curve(svg, COLOURS[1])[0]
    assert first[0] == pytest.approx(centre[0], abs=0.5) and first[1] < centre[1]  # the first category points up


def test_nothing_to_draw():
    assert radar({}) is None
    assert radar({"a": {"writing": 5.0, "math": 4.0}}) is None
    partial = {"writing": 5.0, "math": 4.0}
    svg = radar({"whole": dict.fromkeys(CATEGORIES, 5.0), "partial": partial})
    assert svg is not None and COLOURS[0] in svg and COLOURS[1] not in svg
