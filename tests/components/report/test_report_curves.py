"""Curves: what is drawn, how long ones are thinned and smoothed, and that the SVG fits into a page."""

import re
from pathlib import Path
from typing import Any

from components.report.artifacts import Training
from components.report.curves import curve_groups, running_mean, thin


def training(name: str, stage: str, history: list[dict[str, Any]]) -> Training:
    return Training(name=name, stage=stage, folder=Path(), history=history)


def test_thinning_keeps_the_ends() -> None:
    points = [(float(i), 0.0) for i in range(1001)]
    assert thin(points, 5) == [(0.0, 0.0), (250.0, 0.0), (500.0, 0.0), (750.0, 0.0), (1000.0, 0.0)]
    assert thin(points[:5], 5) == points[:5]


def test_running_mean_is_over_neighbours() -> None:
    smoothed = running_mean([(1, 3.0), (2, 6.0), (3, 0.0), (4, 9.0)])
    assert smoothed == [(1, 4.5), (2, 3.0), (3, 5.0), (4, 4.5)]


def test_only_logged_panels_are_drawn() -> None:
    sft = training("sft", "sft", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    sapo = training("sapo", "sapo", [{"step": 1, "rewards/margins": 0.1, "buffer/age_steps": 3.0, "unknown": 1.0}])
    groups = curve_groups([sft, sapo])
    assert [(group.stage, [drawing.title for drawing in group.drawings]) for group in groups] == [
        ("sft", ["Loss"]),
        ("sapo", ["Reward margin", "Sample age (steps)"]),
    ]
    assert (groups[0].drawings[0].solid, groups[0].drawings[0].dashed) == ("train", None)


def test_runs_without_history_are_left_out_and_many_runs_are_split() -> None:
    history = [{"step": 1, "loss": 1.0}]
    runs = [training(f"run{i}", "sapo", history) for i in range(5)] + [training("empty", "sapo", [])]
    assert [[name for name, _ in group.runs] for group in curve_groups(runs)] == [
        ["run0", "run1", "run2", "run3"],
        ["run4"],
    ]
    assert curve_groups([training("empty", "sapo", [])]) == []


def test_svg_scales_and_takes_the_page_colours() -> None:
    group = curve_groups([training("sft", "sft", [{"step": i, "loss": 1.0 / i} for i in range(1, 100)])])[0]
    svg = group.drawings[0].svg
    head = svg[: svg.index(">")]
    assert svg.startswith("<svg") and "viewBox" in head
    assert "width=" not in head and "height=" not in head
    assert "currentColor" in svg and "var(--grid)" in svg and group.runs[0][1] in svg
    assert "<text" in svg and "<metadata" not in svg


def test_drawings_of_one_page_do_not_share_ids() -> None:
    history = [{"step": i, "loss": float(i), "rewards/margins": float(i)} for i in range(3)]
    drawings = curve_groups([training("sapo", "sapo", history)])[0].drawings
    ids = [identifier for drawing in drawings for identifier in set(re.findall(r' id="([^"]+)"', drawing.svg))]
    assert len(drawings) == 2 and ids and len(ids) == len(set(ids))
