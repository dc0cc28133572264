"""The row format: what is accepted, and the words for what is not."""

import json

import pytest

from components.common.core.conversations import check_row, read_rows, write_rows
from components.common.core.errors import UserError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}


def row(prompt, chosen=(ASSISTANT,), **more) -> dict:
    return {"id": "1", "prompt": list(prompt), "chosen": list(chosen), **more}


@pytest.mark.parametrize("prompt", [[USER], [USER, ASSISTANT, USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, USER]])
def test_prompts_that_alternate_are_accepted(prompt):
    assert check_row(row(prompt))["prompt"] == prompt


def test_contents_are_stripped():
    assert check_row(row([{"role": "user", "content": "  Hi \n"}]))["prompt"] == [USER]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"prompt": [USER], "chosen": [ASSISTANT]}, "missing field 'id'"),
        ({"id": "1", "chosen": [ASSISTANT]}, "missing field 'prompt'"),
        (row([]), "prompt is not a list of messages"),
        (row([ASSISTANT]), "wrong role order"),
        (row([USER, USER]), "wrong role order"),
        (row([USER, ASSISTANT]), "wrong role order"),
        (row([SYSTEM]), "wrong role order"),
        (row([{"role": "user", "content": " "}]), "prompt has an empty message"),
        (row([{"role": "user"}]), "without text content"),
        (row([{"content": "Hi"}]), "without a role"),
        (row([{"role": "bot", "content": "Hi"}]), "unknown role 'bot'"),
        (row([USER], [USER]), "chosen is not exactly one assistant message"),
        (row([USER], rejected=[ASSISTANT, ASSISTANT]), "rejected is not exactly one assistant message"),
    ],
)
def test_what_is_wrong_is_said(broken, reason):
    with pytest.raises(ValueError, match=reason):
        check_row(broken)


def test_round_trip(tmp_path):
    rows = [check_row(row([USER], rejected=[{"role": "assistant", "content": "Ciao — 你好"}]))]
    write_rows(tmp_path / "train.jsonl", rows)
    assert read_rows(tmp_path, "train") == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(row([USER])) + "\n{\n", r"train.jsonl, line 2: "),
        (json.dumps(row([ASSISTANT])) + "\n", r"train.jsonl, line 1: wrong role order"),
        ("", r"train.jsonl: holds no row"),
    ],
)
def test_a_damaged_file_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path, "train")


def test_a_missing_file_says_what_data_must_be(tmp_path):
    with pytest.raises(UserError, match="must be a directory that the data stage wrote"):
        read_rows(tmp_path, "train")
