"""The layouts that conversations are published in: from a raw row to `prompt` and `chosen`.

A new layout is an entry of `LAYOUTS` and the functions it names. The choices and the help of `--format`, the table of the
README and the error about an unknown layout follow from the entry.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from components.common.core.conversations import Message, check_messages
from components.data.chitchat import read_chitchat, windows
from components.data.layout import Fields, Layout, Notes, one_row

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def from_conversation(row: Fields, notes: Notes) -> Fields:
    """TRL's layouts: `prompt` with `chosen` (and `rejected`) or `completion`, or `messages`; text or message lists."""
    answer = next((field for field in ("chosen", "completion") if row.get(field) is not None), None)
    if answer is None:
        return from_messages(row, notes)
    prompt = _required(row, "prompt")
    fields = {
        "prompt": [_message("user", prompt)] if isinstance(prompt, str) else prompt,
        "chosen": _as_response(row[answer]),
    }
    if row.get("rejected") is not None:
        fields["rejected"] = _as_response(row["rejected"])
    return fields


def from_messages(row: Fields, notes: Notes) -> Fields:
    """Deita: `messages`, whose last assistant message is the response."""
    prompt, response = _split_conversation(_required(row, "messages"), "messages", notes)
    return {"prompt": prompt, "chosen": response}


def from_capybara(row: Fields, notes: Notes) -> Fields:
    """Capybara: `chosen` and `rejected` are whole conversations that differ in the last message."""
    prompt, chosen = _split_conversation(_required(row, "chosen"), "chosen", notes)
    fields: Fields = {"prompt": prompt, "chosen": chosen}
    if row.get("rejected") is not None:
        other_prompt, rejected = _split_conversation(row["rejected"], "rejected", notes)
        if other_prompt == prompt:
            fields["rejected"] = rejected
        else:
            notes["rejected answers left out, because their prompt differs"] += 1
    return fields


def from_sharegpt(row: Fields, notes: Notes) -> Fields:
    """ShareGPT: `conversations` of {from, value}, sometimes with a `system` text beside them."""
    conversations = _required(row, "conversations")
    if not isinstance(conversations, list):
        raise ValueError("conversations is not a list of messages")
    messages = [_from_sharegpt_message(message) for message in conversations]
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, _message("system", row["system"]))
    prompt, response = _split_conversation(messages, "conversations", notes)
    return {"prompt": prompt, "chosen": response}


def from_alpaca(row: Fields, notes: Notes) -> Fields:
    """Alpaca: `instruction`, `input` (may be empty or missing) and `output`."""
    texts = [_required(row, "instruction"), row.get("input") or "", _required(row, "output")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("instruction, input or output is not text")
    instruction, context, output = (text.strip() for text in texts)
    prompt = f"{instruction}\n\n{context}" if context else instruction
    return {"prompt": [_message("user", prompt)], "chosen": [_message("assistant", output)]}


def detect_format(rows: Iterable[Fields]) -> str | None:
    """The layout of the first row that fits one, or None."""
    return next((format for row in rows if (format := _format_of(row))), None)


def _format_of(row: Fields) -> str | None:
    present = {name: value for name, value in row.items() if value is not None}
    return next((name for name, layout in LAYOUTS.items() if layout.detects and layout.detects(present)), None)


def is_conversation(row: Fields) -> bool:
    return "messages" in row or ("prompt" in row and bool(row.keys() & {"chosen", "completion"}))


def is_deita(row: Fields) -> bool:
    return {"messages", "prompt_id"} <= row.keys() and not row.keys() & {"chosen", "completion"}


def is_capybara(row: Fields) -> bool:
    """It has a `prompt` of text too, as TRL's layout does, so `chosen` decides: is it a conversation or an answer?"""
    return isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1


def is_sharegpt(row: Fields) -> bool:
    return "conversations" in row


def is_alpaca(row: Fields) -> bool:
    return {"instruction", "output"} <= row.keys()


def _required(row: Fields, field: str) -> Any:
    if row.get(field) is None:
        raise ValueError(f"missing field {field!r}")
    return row[field]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _as_response(answer: Any) -> Any:
    return [_message("assistant", answer)] if isinstance(answer, str) else answer


def _from_sharegpt_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role = message.get("from")
    return {"role": _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else None, "content": message.get("value")}


def _split_conversation(messages: Any, field: str, notes: Notes) -> tuple[list[Message], list[Message]]:
    """A whole conversation as everything before its last assistant message, and that message."""
    checked = check_messages(messages, field)
    if len(checked) > 1 and checked[-1]["role"] == "user":
        checked.pop()
        notes["trailing user messages dropped"] += 1
    if checked[-1]["role"] != "assistant":
        raise ValueError(f"wrong role order: {field} does not end with an assistant message")
    if len(checked) == 1:
        raise ValueError(f"wrong role order: {field} has no user message before the assistant's")
    return checked[:-1], checked[-1:]


# By name, as `--format` takes it. `detects` gets the fields of a row that are not null; the first layout that says yes has it.
LAYOUTS: dict[str, Layout] = {
    "capybara": Layout(
        fields="`chosen` and `rejected` as whole conversations",
        response="last message of `chosen`; `rejected` stays where its prompt is the same",
        converts=one_row(from_capybara),
        detects=is_capybara,
    ),
    "deita": Layout(
        fields="`messages`, `prompt_id`",
        response="last assistant message; a user message after it is dropped and counted",
        converts=one_row(from_messages),
        detects=is_deita,
    ),
    "conversation": Layout(
        fields="`prompt` with `chosen` (and `rejected`) or `completion`, as text or message lists; or `messages`",
        response="`chosen`, `completion`, or the last assistant message",
        converts=one_row(from_conversation),
        detects=is_conversation,
    ),
    "sharegpt": Layout(
        fields="`conversations` of `{from: human or gpt or system, value}`, optional `system`",
        response="last `gpt` message",
        converts=one_row(from_sharegpt),
        detects=is_sharegpt,
    ),
    "alpaca": Layout(
        fields="`instruction`, `input` (may be empty or missing) and `output`",
        response="`output`",
        converts=one_row(from_alpaca),
        detects=is_alpaca,
    ),
    "chitchat": Layout(
        fields="`dataset.json` of the package; never told by `auto`, implied by `pypi://`",
        response="see below",
        converts=windows,
        package="pypi://chitchat-dataset",
        reads=read_chitchat,
    ),
}

# The layouts that come as a package, by its URI.
PACKAGES = {layout.package: name for name, layout in LAYOUTS.items() if layout.package}

# The type of the setting `format`: its choices are the names of the table.
if TYPE_CHECKING:
    FormatName: TypeAlias = str
else:
    FormatName = Literal[("auto", *LAYOUTS)]


def known_layouts(told_by_fields: bool = False) -> str:
    """The table's names and fields, for `--help` and messages.

    Args:
        told_by_fields: leave out the layouts that `auto` does not tell.
    """
    listed = {name: layout for name, layout in LAYOUTS.items() if layout.detects or not told_by_fields}
    return "; ".join(f"{name}: {layout.fields.replace('`', '')}" for name, layout in listed.items())
