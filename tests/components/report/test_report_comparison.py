"""The table's numbers, worked out by hand."""

from typing import Any

import pytest

from components.report.artifacts import Evaluation, Measurement
from components.report.comparison import build_table, compare, number


def measured(value: float | None, stderr: float | None = None, metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    entry = {"benchmark": "held_out", "metric": metric, "value": value, "stderr": stderr, "n": 100}
    return {**entry, "higher_is_better": True, **more}


def evaluation(name: str, *results: dict[str, Any], baselines: list[dict[str, Any]] | None = None) -> Evaluation:
    return Evaluation.model_validate({"name": name, "results": results, "baselines": baselines or []})


# Standard errors of 0.03 and 0.04 add to sqrt(0.0009 + 0.0016) = 0.05, so the threshold is 1.96 * 0.05 = 0.098.
@pytest.mark.parametrize(("value", "significant"), [(0.599, True), (0.597, False), (0.401, True), (0.403, False)])
def test_delta_is_significant_beyond_1_96_joint_standard_errors(value: float, significant: bool) -> None:
    model, baseline = Measurement(**measured(value, 0.03)), Measurement(**measured(0.5, 0.04))
    delta, is_significant = compare(model, baseline)
    assert delta == pytest.approx(value - 0.5)
    assert is_significant is significant


@pytest.mark.parametrize("errors", [(None, 0.01), (0.01, None), (None, None)])
def test_without_both_standard_errors_nothing_is_significant(errors: tuple[float | None, float | None]) -> None:
    model, baseline = Measurement(**measured(0.9, errors[0])), Measurement(**measured(0.1, errors[1]))
    assert compare(model, baseline) == (pytest.approx(0.8), False)


def test_cells_hold_value_error_delta_and_direction() -> None:
    lower = {"metric": "perplexity", "higher_is_better": False}
    sft = evaluation("sft", measured(0.38, 0.02), measured(212.0, 4.0, **lower))
    sapo = evaluation("sapo", measured(0.46, 0.02), measured(215.0, 4.0, **lower))
    table = build_table([sft, sapo], "sft")
    accuracy, perplexity = table.rows[1].cells
    assert (accuracy.text, accuracy.better, accuracy.best) == ("0.460 ± 0.020 (+0.080*)", True, True)
    assert (perplexity.text, perplexity.better, perplexity.best) == ("215.0 ± 4.0 (+3.0)", False, False)
    assert [cell.text for cell in table.rows[0].cells] == ["0.380 ± 0.020", "212.0 ± 4.0"]
    assert table.rows[0].cells[1].best
    assert [column.arrow for column in table.columns] == ["↑", "↓"]


def test_rows_keep_their_order_and_columns_that_of_first_appearance_by_benchmark() -> None:
    first = evaluation("z", measured(1.0), measured(2.0, benchmark="mt_bench", metric="score"))
    second = evaluation("a", measured(3.0, metric="late"), measured(1.0))
    table = build_table([first, second], "sft")
    assert [row.name for row in table.rows] == ["z", "a"]
    order = [(column.benchmark, column.metric) for column in table.columns]
    assert order == [("held_out", "accuracy"), ("held_out", "late"), ("mt_bench", "score")]
    assert table.benchmarks == [("held_out", 2), ("mt_bench", 1)]
    assert table.notes == ["z has no figure for held_out / late.", "a has no figure for mt_bench / score."]
    assert table.rows[1].cells[2].text == "—"


def test_without_the_baseline_model_there_are_no_deltas() -> None:
    table = build_table([evaluation("base", measured(0.1, 0.01)), evaluation("sapo", measured(0.9, 0.01))], "sft")
    assert table.compared_with is None
    assert all(cell.delta is None for row in table.rows for cell in row.cells)


def test_ties_are_all_best_and_one_model_alone_is_not() -> None:
    tied = build_table([evaluation(name, measured(0.5)) for name in ("sft", "dpo")], "sft")
    assert [row.cells[0].best for row in tied.rows] == [True, True]
    assert not build_table([evaluation("sft", measured(0.5))], "sft").rows[0].cells[0].best


def test_a_delta_of_zero_is_neither_signed_nor_better() -> None:
    cell = build_table([evaluation(name, measured(0.5, 0.01)) for name in ("sft", "dpo")], "sft").rows[1].cells[0]
    assert (cell.delta_text, cell.better, cell.significant) == ("0.000", False, False)


def test_values_that_are_not_finite_are_missing_and_never_best() -> None:
    lower = {"higher_is_better": False}
    diverged = evaluation("dpo", measured(float("-inf"), float("nan"), **lower))
    table = build_table(
        [evaluation("sft", measured(5.0, 0.1, **lower)), evaluation("base", measured(6.0)), diverged], "sft"
    )
    assert table.rows[2].cells[0].text == "—"
    assert [row.cells[0].best for row in table.rows] == [True, False, False]
    assert "dpo has no figure for held_out / accuracy." in table.notes


def test_trivial_baselines_come_last_without_delta_or_bold() -> None:
    chance = [{"name": "chance", "metric": "accuracy", "value": 0.25, "description": "Blind."}]
    table = build_table([evaluation(n, measured(0.2, 0.02), baselines=chance) for n in ("sft", "dpo")], "sft")
    assert [(row.name, row.trivial) for row in table.rows] == [("sft", False), ("dpo", False), ("chance", True)]
    cell = table.rows[2].cells[0]
    assert (cell.text, cell.best, cell.delta) == ("0.250", False, None)
    assert table.trivial_descriptions == {"chance": "Blind."}
    assert table.notes == []


def test_trivial_baselines_that_differ_or_fit_no_metric_are_noted() -> None:
    one = evaluation("sft", measured(0.2), baselines=[{"name": "chance", "metric": "accuracy", "value": 0.25}])
    other = evaluation(
        "dpo",
        measured(0.3),
        baselines=[{"name": "chance", "metric": "accuracy", "value": 0.5}, {"name": "x", "metric": "y", "value": 1.0}],
    )
    table = build_table([one, other], "sft")
    assert table.rows[2].cells[0].value == 0.25
    assert table.notes == [
        "Baseline chance of dpo differs: accuracy is 0.5000 there.",
        "Baseline x of dpo fits no single metric: y.",
    ]


def test_heading_counts_samples() -> None:
    def heading(*counts: int | None) -> str:
        return build_table([evaluation(f"m{i}", measured(1.0, n=n)) for i, n in enumerate(counts)], "sft").columns[0].n

    assert heading(500, 500) == "n = 500"
    assert heading(80, 1500) == "n = 80 to 1,500"
    assert heading(None) == ""


# The smallest standard error of a column gets two digits; without errors the largest value gets four.
@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.41, 0.02, "0.410 ± 0.020"),
        (3900.0, 78.0, "3,900 ± 78"),
        (411.04, 5.3, "411.0 ± 5.3"),
        (7.26, None, "7.260"),
        (0.5, 1e-9, "0.5000 ± 0.0000"),
        (0.0, None, "0.00"),
    ],
)
def test_digits_follow_the_standard_error(value: float, stderr: float | None, text: str) -> None:
    assert build_table([evaluation("m", measured(value, stderr))], "sft").rows[0].cells[0].text == text


@pytest.mark.parametrize(
    ("value", "decimals", "sign", "text"),
    [
        (-1.5, 1, False, "\N{MINUS SIGN}1.5"),
        (1.5, 1, True, "+1.5"),
        (-0.001, 2, True, "0.00"),
        (12345.6, 0, False, "12,346"),
    ],
)
def test_number(value: float, decimals: int, sign: bool, text: str) -> None:
    assert number(value, decimals, sign) == text
