"""The stage from its artifacts to the page, the Markdown, the printed table and KFP's metrics."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import WriteEvaluation, WriteTraining, measurement, pair

from components.common.core.errors import UserError
from components.report.__main__ import main
from components.report.content import chat_turns, duration, shares

ATTACK = '<script>alert("x")</script>&amp;<img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Tags, attributes, visible text, and the texts of `<mark>` and `<del>`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.marked: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("mark", "del"):
            name = dict(attrs).get("class") or tag
            self._open.append(name)
            self.marked.setdefault(name, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("mark", "del"):
            self._open.pop()
        elif tag in ("td", "th", "span") and not self._open:
            self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open:
            self.marked[self._open[-1]][-1] += data


def run(output: Path, evaluations: list[str], trainings: list[str], *more: str) -> tuple[Page, str]:
    lists = ["--evaluations", json.dumps(evaluations), "--trainings", json.dumps(trainings)]
    main([*lists, "--output", str(output), *more])
    return Page((output / "report.html").read_text()), (output / "report.md").read_text()


@pytest.fixture
def evaluations(write_evaluation: WriteEvaluation) -> list[str]:
    chance = [{"name": "chance", "metric": "accuracy", "value": 0.25, "description": "Blind choice."}]
    values = {"base": (0.25, 900.0), "sft": (0.38, 212.0), "sapo": (0.46, 215.0)}
    return [
        write_evaluation(
            name,
            [measurement("accuracy", accuracy, 0.02), measurement("perplexity", perplexity, 4.0, higher=False)],
            baselines=chance,
        )
        for name, (accuracy, perplexity) in values.items()
    ]


@pytest.fixture
def trainings(write_training: WriteTraining) -> list[str]:
    history = [{"step": 10, "loss": 0.69, "rewards/margins": 0.01}, {"step": 20, "eval_rewards/margins": 0.5}]
    sapo = write_training("sapo", history=history, pairs=[pair(step) for step in range(1, 9)])
    return [write_training("sft", "sft", [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.25}]), sapo]


def test_page_shows_the_comparison(evaluations: list[str], trainings: list[str], tmp_path: Path) -> None:
    page, _ = run(tmp_path / "out", evaluations, trainings, "--title", "A & B")
    text = " ".join(page.text.split())
    assert "A & B" in text
    assert "sapo 0.460 ± 0.020 +0.080* 215.0 ± 4.0 +3.0" in text
    assert "chance 0.250 —" in text
    assert "What accuracy means." in text and "Blind choice." in text
    assert "Without a training log" not in text  # of the base model there is none
    assert "sft sft 100 1 min 21 s" in text
    classes = [value for name, value in page.attributes if name == "class"]
    assert "delta better significant" in classes  # +0.080 of accuracy
    assert "delta worse" in classes  # +3.0 of perplexity, within the errors
    assert page.tags.count("svg") == 5  # two rankings; loss of sft; loss and margin of sapo


def test_page_shows_mt_bench_by_category(write_evaluation: WriteEvaluation, tmp_path: Path) -> None:
    rated = [measurement(c, 5.0 + i, 0.5, benchmark="mt_bench") for i, c in enumerate(("writing", "math", "stem"))]
    one, two = write_evaluation("rated", rated), write_evaluation("unrated", [measurement("accuracy", 0.4, 0.02)])
    page, _ = run(tmp_path / "out", [one, two], [])
    assert "MT-Bench by category" in page.text and page.tags.count("svg") == 1
    assert page.text.split("MT-Bench by category")[1].split()[0] == "rated"  # the legend
    without, _ = run(tmp_path / "without", [two], [])
    assert "MT-Bench by category" not in without.text


def test_page_is_self_contained(evaluations: list[str], trainings: list[str], tmp_path: Path) -> None:
    page, _ = run(tmp_path / "out", evaluations, trainings)
    links = [value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "srcset")]
    assert links and all(link.startswith("#") for link in links)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    html = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", html)


def test_untrusted_text_is_never_markup(
    write_evaluation: WriteEvaluation, write_training: WriteTraining, tmp_path: Path
) -> None:
    texts = dict.fromkeys(("prompt", "a", "b", "b_prime", "c", "row_id", "split"), ATTACK)
    training = write_training(ATTACK, folder="t", pairs=[pair(1, **texts), pair(2, **texts, c_kept=False)])
    entry = measurement(ATTACK, 0.5, 0.1, benchmark=ATTACK, description=ATTACK)
    evaluation = write_evaluation(ATTACK, [entry], folder="e", baselines=[], settings={"x": ATTACK})
    page, markdown = run(tmp_path / "out", [evaluation], [training], "--title", ATTACK, "--baseline_name", ATTACK)
    assert not {"script", "img"} & set(page.tags)
    assert page.marked["b"] == [f"B{ATTACK}"] * 2
    outside_code = re.sub(r"```text\n.*?\n```", "", markdown, flags=re.DOTALL)
    assert "alert" in outside_code and not re.search(r"(?<!\\)<", outside_code)


def test_pairs_mark_b_and_its_replacement(write_training: WriteTraining, tmp_path: Path) -> None:
    pairs = [pair(1, b=" two\nlines", c_kept=False), pair(2, b_prime="", generated_at_step=1)]
    page, _ = run(tmp_path / "out", [], [write_training("sapo", pairs=pairs)])
    assert page.marked["b"] == ["B two↵\nlines", "B fine"]
    assert page.marked["bp"] == ["B\N{PRIME} fish", "B\N{PRIME}(empty)"]
    assert page.marked["del"] == [", you?"]
    assert page.text.count("C (struck out) is not part of the rejected response.") == 1
    text = " ".join(page.text.split())
    assert "Chosen: A + B + C log p = \N{MINUS SIGN}31.2" in text
    assert "step 2 row row-2 training data sampled by EMA version 1 generated at step 1" in text


def test_early_and_late_pairs_are_shared_out_among_runs(write_training: WriteTraining, tmp_path: Path) -> None:
    runs = [write_training(name, pairs=[pair(step) for step in range(1, 31)]) for name in ("dpo", "orpo")]
    page, _ = run(tmp_path / "out", [], runs, "--pairs_per_report", "8")
    assert page.text.count("Early: steps 1 to 2") == page.text.count("Late: steps 29 to 30") == 2
    assert len(page.marked["b"]) == 8


def test_long_texts_are_cut_around_the_segment(write_training: WriteTraining, tmp_path: Path) -> None:
    long = pair(1, a="x" * 2000 + "END OF A", c="START OF C" + "y" * 2000)
    page, _ = run(tmp_path / "out", [], [write_training("sapo", pairs=[long])])
    assert "[1,108 characters] … xxx" in page.text and "END OF A" in page.text
    assert "START OF C" in page.text and "yyy … [1,110 characters]" in page.text


def test_markdown(evaluations: list[str], trainings: list[str], tmp_path: Path) -> None:
    _, markdown = run(tmp_path / "out", evaluations, trainings)
    assert "| model | held_out: accuracy ↑ (n = 500) | held_out: perplexity ↓ (n = 500) |" in markdown
    assert r"| sapo | **0.460 ± 0.020** (+0.080\*) | 215.0 ± 4.0 (+3.0) |" in markdown
    assert "| *chance* | 0.250 | — |" in markdown
    assert "| sft | sft | 100 | 1 min 21 s | 4.2500 | — |" in markdown
    assert re.findall(r"### sapo, step (\d+)", markdown) == ["1", "2", "7", "8"]
    assert "B\N{PRIME} (rejected):\n\n```text\n fish\n```" in markdown


def test_markdown_fence_is_longer_than_any_in_the_text(write_training: WriteTraining, tmp_path: Path) -> None:
    _, markdown = run(tmp_path / "out", [], [write_training("sapo", pairs=[pair(1, b="\n````\ncode\n````\n")])])
    assert "`````text\n\n````\ncode\n````\n\n`````" in markdown


def test_missing_parts_are_named(evaluations: list[str], write_training: WriteTraining, tmp_path: Path) -> None:
    trainings = [write_training("sft", "sft", []), write_training("orpo", history=[{"step": 1, "loss": 1.0}])]
    page, markdown = run(tmp_path / "out", [evaluations[0], evaluations[2]], trainings)
    for note in (
        "No evaluation is named 'sft', so there are no deltas.",
        "Without a training log, so without curves: sapo.",
        "Trained but not evaluated: sft, orpo.",
        "sft has an empty log_history.jsonl or none, so no curves.",
        "orpo logged no pairs.jsonl.",
    ):
        assert note in page.text and f"- {note}" in markdown
    assert "delta to" not in page.text and "delta to" not in markdown


def test_only_evaluations_and_only_trainings(evaluations: list[str], trainings: list[str], tmp_path: Path) -> None:
    page, _ = run(tmp_path / "one", evaluations, [])
    assert "No training log was given, so there are no curves and no sampled pairs." in page.text
    assert page.tags.count("svg") == 2 and "mark" not in page.tags  # the rankings: no curves, no pairs
    page, _ = run(tmp_path / "two", [], trainings)
    assert "No evaluation was given, so there is no table of results." in page.text
    assert "Sampled pairs" in page.text


def test_prints_the_table_and_then_the_path(
    evaluations: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "out", evaluations, [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "         held_out: accuracy ↑      held_out: perplexity ↓",
        "         n = 500                   n = 500",
        "base     0.250 ± 0.020 (−0.130*)   900.0 ± 4.0 (+688.0*)",  # noqa: RUF001
        "sft      0.380 ± 0.020             212.0 ± 4.0",
        "sapo     0.460 ± 0.020 (+0.080*)   215.0 ± 4.0 (+3.0)",
        "chance   0.250                     —",
    ]
    assert "In brackets: delta to sft. * marks" in "\n".join(lines)
    assert lines[-1] == str(tmp_path / "out" / "report.html")


def test_wide_tables_are_printed_in_blocks(
    write_evaluation: WriteEvaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [measurement(f"metric_{i}", 0.5, 0.02) for i in range(12)]
    run(tmp_path / "out", [write_evaluation("sft", results)], [])
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert max(len(line) for line in lines) <= 120
    assert sum(line.startswith("sft ") for line in lines) == 3
    assert all(f"metric {i} ↑" in "\n".join(lines) for i in range(12))


def test_publishes_metrics_and_copies_for_kfp(evaluations: list[str], tmp_path: Path) -> None:
    artifact = {"name": "metrics", "uri": "x", "metadata": {}}
    listed = {"metrics": {"artifacts": [artifact]}, "html": {"artifacts": [{"name": "html"}]}}
    executor = {"outputs": {"outputFile": str(tmp_path / "kfp.json"), "artifacts": listed}}
    copies = ["--html_file", str(tmp_path / "a" / "html"), "--markdown_file", str(tmp_path / "b" / "markdown")]
    run(tmp_path / "out", evaluations[1:], [], "--executor_input", json.dumps(executor), *copies)
    published = json.loads((tmp_path / "kfp.json").read_text())["artifacts"]
    assert published["metrics"]["artifacts"][0]["metadata"] == {
        "sft/accuracy": 0.38,
        "sft/perplexity": 212.0,
        "sapo/accuracy": 0.46,
        "sapo/perplexity": 215.0,
    }
    assert "html" in published
    assert (tmp_path / "a" / "html").read_text() == (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "b" / "markdown").read_text() == (tmp_path / "out" / "report.md").read_text()


def test_metrics_that_share_a_name_are_published_with_their_benchmark(
    write_evaluation: WriteEvaluation, tmp_path: Path
) -> None:
    results = [
        measurement("acc", value, None, benchmark=benchmark) for benchmark, value in (("arc", 0.1), ("mmlu", 0.2))
    ]
    artifacts = {"metrics": {"artifacts": [{"name": "metrics"}]}}
    executor = {"outputs": {"outputFile": str(tmp_path / "kfp.json"), "artifacts": artifacts}}
    run(tmp_path / "out", [write_evaluation("sft", results)], [], "--executor_input", json.dumps(executor))
    published = json.loads((tmp_path / "kfp.json").read_text())["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    assert published == {"sft/arc/acc": 0.1, "sft/mmlu/acc": 0.2}


def test_dry_run_plans_and_writes_nothing(
    evaluations: list[str], trainings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = ["--evaluations", json.dumps(evaluations), "--trainings", json.dumps(trainings)]
    main([*lists, "--output", str(tmp_path / "out"), "--dry_run"])
    plan = capsys.readouterr().out.splitlines()
    assert plan[0] == f"would write {tmp_path / 'out' / 'report.html'}"
    assert plan[2:5] == ["models: base, sft, sapo; metrics: 2", "figures: 3", "sampled pairs: 8"]
    assert not (tmp_path / "out").exists()


def test_the_same_artifacts_make_the_same_page(evaluations: list[str], trainings: list[str], tmp_path: Path) -> None:
    run(tmp_path / "one", evaluations, trainings)
    run(tmp_path / "two", evaluations, trainings)
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()


def test_wrong_settings_and_inputs_leave_old_output_alone(evaluations: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="evaluations and trainings are both empty"):
        main(["--output", str(out)])
    given = ["--evaluations", json.dumps(evaluations), "--output", str(out)]
    with pytest.raises(UserError, match="pairs_per_report = -1: must be 0 or more"):
        main([*given, "--pairs_per_report", "-1"])
    with pytest.raises(UserError, match="baseline_name is empty"):
        main([*given, "--baseline_name", " "])
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(UserError, match="is not empty"):
        main(given)
    with pytest.raises(UserError, match="no such file or directory"):
        main(["--evaluations", '["missing"]', "--output", str(out), "--overwrite"])
    assert (out / "old").exists()


def test_help_lists_settings(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "--pairs_per_report int" in capsys.readouterr().out


def test_chat_turns() -> None:
    chatml = (
        "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi\n\nthere<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_turns(chatml) == [("", "<s>"), ("system", "Be kind."), ("user", "Hi\n\nthere")]
    assert chat_turns("<|user|>\nHi</s>\n<|assistant|>\n") == [("user", "Hi")]
    assert chat_turns("just text") == [("", "just text")]


def test_durations_and_shares() -> None:
    times = [duration(seconds) for seconds in (None, 12.34, 59.96, 81.2, 3599.7, 7500.0)]
    assert times == ["—", "12.3 s", "1 min 00 s", "1 min 21 s", "1 h 00 min", "2 h 05 min"]
    assert shares(24, 5) == [5, 5, 5, 5, 4]
