"""The stage from end to end: rejected rows, filters, statistics, the report, and how it fails."""

import hashlib
import json
import re
import subprocess
import sys

import pytest

from components.common.core.conversations import read_rows
from components.common.core.errors import UserError
from components.data.__main__ import main


def messages(*contents):
    """A conversation that the user opens."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


GOOD = [{"messages": messages(f"question {n}", f"answer {n}")} for n in range(20)]


def reasons(run):
    return [(row["line"], row["kind"], row["reason"]) for row in run.rejected]


def test_every_kind_of_broken_row_is_listed_with_its_line(run, jsonl):
    source = jsonl(
        *GOOD,
        '{"messages": [',
        "[1, 2]",
        {"text": "no messages"},
        {"messages": messages("only a question")},
        {"messages": [{"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}, *messages("", "x")[1:]]},
        {"messages": messages("Hi", "  ")},
        {"messages": [{"role": "robot", "content": "Hi"}]},
        '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "x"}]}',
        "[" * 100_000,
    )
    with source.open("ab") as file:
        file.write(b'{"messages": "\xff"}\n')
    run(source, max_rejected_share=0.5)
    order = "wrong role order: a prompt alternates user / assistant and ends with the user"
    assert reasons(run)[:9] == [
        (21, "broken", "broken JSON: Expecting value"),
        (22, "broken", "not a JSON object but list"),
        (23, "broken", "missing field 'messages'"),
        (24, "broken", "wrong role order: messages does not end with an assistant message"),
        (25, "broken", order),
        (26, "broken", order),
        (27, "broken", "messages has an empty message"),
        (28, "broken", "messages has an unknown role 'robot'"),
        (29, "broken", "text is not valid Unicode (half of a surrogate pair)"),
    ]
    assert reasons(run)[9][2].startswith("broken JSON") and reasons(run)[10] == (31, "broken", "not UTF-8")
    assert run.statistics["rejected"]["broken"] == 11
    assert len(read_rows(run.output, "train")) == 20
    assert (
        "| broken | wrong role order: a prompt alternates user / assistant and ends with the user | 2 |" in run.report
    )
    assert "| source.jsonl | 21 | source-21 | broken JSON: Expecting value |" in run.report


def test_filters_are_counted_apart_and_never_stop_the_run(run, jsonl):
    source = jsonl(
        {"messages": messages("four", "ok")},
        {"messages": messages("four", "far too long")},
        {"messages": messages("a long question", "fine")},
        {"messages": messages("?", "fine")},
        {"messages": [{"role": "system", "content": "s"}, *messages("one", "two", "six", "fine")]},
        {"messages": messages("a", "b", "c", "d", "e", "fine")},
        {"messages": messages("good", "fine")},
    )
    limits = {"min_response_characters": 3, "max_response_characters": 6}
    limits |= {"min_prompt_characters": 2, "max_prompt_characters": 10, "min_turns": 1, "max_turns": 3}
    run(source, max_rejected_share=0, **limits)
    assert reasons(run) == [
        (1, "filtered", "below min_response_characters = 3"),
        (2, "filtered", "above max_response_characters = 6"),
        (3, "filtered", "above max_prompt_characters = 10"),
        (4, "filtered", "below min_prompt_characters = 2"),
        (6, "filtered", "above max_turns = 3"),
    ]
    assert sorted(row["id"] for row in run.train) == ["source-5", "source-7"]
    assert run.statistics["rejected"]["filtered"] == 5


def test_min_turns(run, jsonl):
    run(jsonl({"messages": messages("a", "b")}, {"messages": messages("a", "b", "c", "d")}), min_turns=2)
    assert [row["id"] for row in run.train] == ["source-2"]


def test_ids_are_made_unique_and_duplicates_filtered(run, jsonl):
    rows = [{"id": "x", **GOOD[0]}, {"id": "x", **GOOD[1]}, {"id": 7, **GOOD[0]}, {"prompt_id": " p ", **GOOD[2]}]
    rows += [{"id": "x-3", **GOOD[3]}, {"id": "x", **GOOD[4]}]
    run(jsonl(*rows))
    assert sorted(row["id"] for row in run.train) == ["p", "x", "x-2", "x-3", "x-4"]
    assert reasons(run) == [(3, "filtered", "duplicate of x")]
    assert run.statistics["rejected"]["by_reason"] == [{"kind": "filtered", "reason": "duplicate", "rows": 1}]


def test_too_many_broken_rows_stop_the_run_and_leave_their_list(run, jsonl):
    source = jsonl(*GOOD[:17], {"messages": []}, "{", {"messages": []})
    with pytest.raises(UserError) as error:
        run(source, max_rejected_share=0.1)
    assert str(error.value) == (
        f"{source}: 3 of 20 rows are broken (15.0%, max_rejected_share = 10.0%): messages is not a list of messages "
        "(2 x, first in source.jsonl line 18); broken JSON: Expecting property name enclosed in double quotes "
        f"(1 x, first in source.jsonl line 19); the whole list is in {run.output}/rejected_rows.jsonl"
    )
    assert [path.name for path in run.output.iterdir()] == ["rejected_rows.jsonl"]
    assert [row["line"] for row in run.rejected] == [18, 19, 20]


def test_exactly_the_allowed_share_is_allowed(run, jsonl):
    run(jsonl(*GOOD[:19], "{"), max_rejected_share=0.05)
    assert len(run.train) == 19


def test_no_usable_row_left_by_filters(run, jsonl):
    with pytest.raises(
        UserError, match=r"no usable row: below min_response_characters = 99 \(20 x, first in .* line 1\)"
    ):
        run(jsonl(*GOOD), min_response_characters=99)


def test_no_usable_row_in_the_held_out_source(run, jsonl):
    held_out = jsonl({"messages": messages("only a question")}, name="held_out.jsonl")
    with pytest.raises(UserError, match=r"held_out.jsonl: no usable row: wrong role order"):
        run(jsonl(*GOOD), test_source=str(held_out))


def test_statistics(run, jsonl):
    source = jsonl(
        {"messages": messages("ab", "abc")},
        {"messages": messages("abcd", "a", "a", "abcde")},
        {"prompt": "abc", "chosen": "a", "rejected": "b"},
    )
    run(source, format="conversation")
    train = run.statistics["splits"]["train"]
    assert train.pop("sha256") == hashlib.sha256((run.output / "train.jsonl").read_bytes()).hexdigest()
    assert train == {
        "rows": 3,
        "conversations": 3,
        "paired_rows": 1,
        "prompt_characters": {"min": 2, "median": 3, "mean": 3.7, "p95": 6, "max": 6},
        "response_characters": {"min": 1, "median": 3, "mean": 3.0, "p95": 5, "max": 5},
        "turns": {"min": 1, "median": 1, "mean": 1.7, "p95": 3, "max": 3},
        "turns_histogram": {"1": 2, "3": 1},
        "roles": {"assistant": 4, "user": 4},
    }
    assert run.statistics["splits"]["test"]["rows"] == 0
    assert run.statistics["source"] == str(source)
    assert run.statistics["settings"]["max_rejected_share"] == 0.05
    assert "output" not in run.statistics["settings"]


def test_report_shows_a_row_and_escapes_tables(run, jsonl, tmp_path):
    rows = [{"id": "a|b", "messages": []}, {"id": "x", "messages": messages("two\nlines", "answer")}]
    run(jsonl(*rows), max_rejected_share=0.5, report_file=str(tmp_path / "kfp" / "report.md"))
    assert "| source.jsonl | 1 | a\\|b | messages is not a list of messages |" in run.report
    assert "> **user:** two\n> lines\n\n> **assistant:** answer" in run.report
    assert (tmp_path / "kfp" / "report.md").read_text() == run.report


def test_report_of_clean_data_says_so(run, jsonl):
    assert "0 broken, 0 filtered out." in run(jsonl(*GOOD)).report


def test_rows_are_what_later_stages_read(run, jsonl):
    run(jsonl(*GOOD), test_rows=5, rejected="other_conversation")
    assert len(read_rows(run.output, "train")) == 15
    assert all(row["rejected"] != row["chosen"] for row in read_rows(run.output, "test"))


def test_failed_write_leaves_no_file_that_looks_whole(run, jsonl, monkeypatch):
    monkeypatch.setattr("components.data.report.make_report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(jsonl(*GOOD))
    assert list(run.output.iterdir()) == []


def test_metadata_for_kubeflow(run, jsonl, tmp_path):
    executor_input = {
        "outputs": {
            "outputFile": str(tmp_path / "executor.json"),
            "artifacts": {"data": {"artifacts": [{"name": "data", "uri": "minio://x"}]}},
        }
    }
    run(jsonl(*GOOD, "{"), test_rows=5, executor_input=json.dumps(executor_input))
    (artifact,) = json.loads((tmp_path / "executor.json").read_text())["artifacts"]["data"]["artifacts"]
    counts = {name: artifact["metadata"][name] for name in ("train_rows", "test_rows", "broken_rows", "filtered_rows")}
    assert counts == {"train_rows": 15, "test_rows": 5, "broken_rows": 1, "filtered_rows": 0}


def test_dry_run_shows_the_plan_and_writes_nothing(run, jsonl, capsys):
    source = jsonl(*GOOD)
    run(source, dry_run=True, test_rows=5, test_source="hf://owner/name")
    plan = capsys.readouterr().out
    assert f"source: {source}, format conversation, files: source.jsonl" in plan
    assert "test_source: hf://owner/name, fetched when the stage runs" in plan
    assert "held out: up to 5 rows, seed 42" in plan
    assert not run.output.exists()


def test_dry_run_finds_a_wrong_source(run, jsonl):
    with pytest.raises(UserError, match="the first row has the fields 'text'"):
        run(jsonl({"text": "Hi"}), dry_run=True)


def test_output_must_be_empty_and_not_hold_the_source(run, jsonl, tmp_path):
    source = jsonl(*GOOD)
    run.output.mkdir()
    (run.output / "other.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run(source)
    with pytest.raises(UserError, match="lies in the output directory"):
        run(source, output=str(tmp_path), overwrite=True)
    assert source.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "s3://bucket/x"}, "source = 's3://bucket/x': s3:// is not read; give a path, hf://owner/name"),
        ({"source": "pypi://numpy"}, "the only package that can be read is pypi://chitchat-dataset"),
        ({"source": "hf://capybara"}, "hf://capybara: must be hf://owner/name"),
        ({"source": " "}, "source is empty"),
        ({"source": "pypi://chitchat-dataset", "format": "alpaca"}, "format = 'alpaca' does not fit source"),
        ({"format": "csv"}, "format = 'csv' is not valid"),
        ({"test_source_split": "test"}, "test_source_split = 'test' needs test_source"),
        ({"max_rejected_share": 5}, "max_rejected_share = 5.0 must be between 0 and 1"),
        ({"test_rows": -1}, "test_rows = -1 must be 0 or more"),
        ({"max_rows": 0}, "max_rows = 0 must be 1 or more"),
        ({"min_turns": 5, "max_turns": 3}, "max_turns = 3 must not be below min_turns = 5"),
        ({"min_response_characters": -2}, "min_response_characters = -2 must be 0 or more"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    values = {"source": "x.jsonl", "output": "y", **settings}
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--settings", json.dumps(values)])


@pytest.mark.parametrize("recipe", ["chitchat-tiny", "chitchat", "capybara", "deita"])
def test_recipes_are_valid(recipe, capsys, tmp_path):
    main(["--config", recipe, "--output", str(tmp_path / "output"), "--dry_run"])
    assert "fetched when the stage runs" in capsys.readouterr().out


def test_help_lists_settings_and_recipes(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert "--max_rejected_share float" in text and "capybara, chitchat, chitchat-tiny, deita" in text


def test_command_line_ends_with_one_line_and_code_2(tmp_path):
    command = [sys.executable, "-m", "components.data", "--source", "/nowhere.jsonl", "--output", str(tmp_path / "o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "data: error: --source /nowhere.jsonl: no such file or directory\n"


ALPACA = [{"instruction": f"Do {n}", "input": "", "output": f"Done {n}"} for n in range(30)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"Question {n}"}, {"from": "gpt", "value": f"Answer {n}"}]}
    for n in range(30)
]


@pytest.mark.parametrize("rows", [ALPACA, SHAREGPT])
def test_rows_of_ones_own_need_their_place_alone(tmp_path, jsonl, rows):
    """A tenth is held out, and both splits have a `rejected` for the paired methods."""
    main(["--config", "own", "--source", str(jsonl(*rows)), "--output", str(tmp_path / "out")])
    splits = {split: read_rows(tmp_path / "out", split) for split in ("train", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 27, "test": 3}
    assert all(row["rejected"] != row["chosen"] for split in splits.values() for row in split)


@pytest.mark.parametrize(("suffix", "word"), [("jsonl", "line"), ("json", "row")])
def test_a_few_broken_rows_are_told_with_their_place(tmp_path, caplog, suffix, word):
    rows = [*ALPACA, {"instruction": "x", "input": ""}]
    text = json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    source = tmp_path / f"mine.{suffix}"
    source.write_text(text)
    with caplog.at_level("INFO"):
        main(["--config", "own", "--source", str(source), "--output", str(tmp_path / "out")])
    assert f"broken: missing field 'output' (1 x, first in mine.{suffix} {word} 31)" in caplog.text


@pytest.mark.parametrize(("test_rows", "held_out"), [(0, 0), (0.05, 2), (0.5, 15), (7, 7)])
def test_rows_held_out_are_a_number_or_a_share(run, jsonl, test_rows, held_out):
    assert len(run(jsonl(*ALPACA), test_rows=test_rows).test) == held_out


@pytest.mark.parametrize("settings", [{"test_rows": 1.5}, {"test_rows": 0.1, "test_source": "other.jsonl"}])
def test_a_share_that_cannot_be_held_out_is_refused(run, jsonl, settings):
    with pytest.raises(UserError, match=r"test_rows = .* must be whole, or a share of `source` below 1"):
        run(jsonl(*ALPACA), **settings)


def test_holding_out_everything_is_refused(run, jsonl):
    with pytest.raises(UserError, match=r"holds out all 30 usable rows; lower it, or give a share such as 0\.1"):
        run(jsonl(*ALPACA), test_rows=500)
