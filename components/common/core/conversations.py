"""The data format between stages: TRL's conversational preference rows, as JSON Lines.

    {"id": "capybara-17", "prompt": [{"role": "user", "content": "..."}, ...],
     "chosen": [{"role": "assistant", "content": "..."}], "rejected": [...] (only where the source is paired),
     "conversation": "..." (only where several rows are cut from one)}

Prompts alternate user / assistant after an optional system message and end with the user. `data` writes
`train.jsonl` and `test.jsonl`; every later stage reads them through `read_rows`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from components.common.core.errors import UserError


class Message(TypedDict):
    role: str
    content: str


class Row(TypedDict):
    id: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: NotRequired[list[Message]]
    conversation: NotRequired[str]


def check_messages(messages: Any, field: str) -> list[Message]:
    """Checks one list of messages and returns it with contents stripped of surrounding white space.

    Raises:
        ValueError: what is wrong, in words that fit a report of rejected rows.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{field} is not a list of messages")
    checked: list[Message] = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{field} has a message without a role")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{field} has a message without text content")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"{field} has an unknown role {message['role']!r}")
        if not (content := message["content"].strip()):
            raise ValueError(f"{field} has an empty message")
        checked.append({"role": message["role"], "content": content})
    return checked


def check_row(row: dict[str, Any]) -> Row:
    """Checks a row of the format above; raises ValueError with the reason."""
    if "id" not in row:
        raise ValueError("missing field 'id'")
    for field in ("prompt", "chosen"):
        if field not in row:
            raise ValueError(f"missing field {field!r}")
    checked: Row = {
        "id": str(row["id"]),
        "prompt": check_messages(row["prompt"], "prompt"),
        "chosen": _check_response(row["chosen"], "chosen"),
    }
    turns = checked["prompt"][checked["prompt"][0]["role"] == "system" :]
    roles = [message["role"] for message in turns]
    if len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError("wrong role order: a prompt alternates user / assistant and ends with the user")
    if row.get("rejected") is not None:
        checked["rejected"] = _check_response(row["rejected"], "rejected")
    if row.get("conversation") is not None:
        checked["conversation"] = str(row["conversation"])
    return checked


def _check_response(messages: Any, field: str) -> list[Message]:
    response = check_messages(messages, field)
    if len(response) != 1 or response[0]["role"] != "assistant":
        raise ValueError(f"{field} is not exactly one assistant message")
    return response


def read_rows(data: str | Path, split: str) -> list[Row]:
    """Reads `<data>/<split>.jsonl` as the data stage wrote it.

    Raises:
        UserError: the directory or file is missing, there is no training row, or a line is not a row of the format;
            names the line.
    """
    path = Path(data) / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --data must be a directory that the data stage wrote")
    rows: list[Row] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(check_row(json.loads(line)))
            except ValueError as error:  # json.JSONDecodeError is one
                raise UserError(f"{path}, line {number}: {error}") from error
    if not rows and split != "test":  # a data stage with test_rows: 0 holds none out
        raise UserError(f"{path}: holds no row")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows as JSON Lines, in order."""
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
