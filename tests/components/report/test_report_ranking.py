"""Ranked plots: order, intervals, and names that are anything but plain."""

import re

from components.report.artifacts import Evaluation, Measurement
from components.report.comparison import build_table
from components.report.ranking import rankings


def evaluation(name: str, **values: float) -> Evaluation:
    results = [
        Measurement(benchmark="b", metric=m, value=v, stderr=0.1, n=9, higher_is_better=m == "accuracy")
        for m, v in values.items()
    ]
    return Evaluation(name=name, results=results)


def heights(svg: str) -> dict[str, float]:
    """Where each label stands, in points from the top."""
    return {text: float(y) for y, text in re.findall(r'<text[^>]* y="([-\d.]+)"[^>]*>([^<]*)<', svg)}


def test_the_best_model_is_on_top():
    table = build_table([evaluation("x", accuracy=1.0, loss=1.0), evaluation("y", accuracy=2.0, loss=2.0)], "x")
    accuracy, loss = rankings(table)
    assert (accuracy.title, loss.title) == ("b: accuracy ↑", "b: loss ↓")
    assert heights(accuracy.svg)["y"] < heights(accuracy.svg)["x"]
    assert heights(loss.svg)["x"] < heights(loss.svg)["y"]


def test_metrics_of_one_model_are_not_ranked():
    table = build_table([evaluation("x", accuracy=1.0), evaluation("y", loss=2.0)], "x")
    assert rankings(table) == []


def test_names_are_text():
    table = build_table([evaluation("<script>$x^$", accuracy=1.0), evaluation("y", accuracy=200.0)], "y")
    (plot,) = rankings(table)
    assert "&lt;script&gt;$x^$" in plot.svg and "<script" not in plot.svg
    assert {"1", "100", "200"} <= heights(plot.svg).keys()  # the logarithmic axis
