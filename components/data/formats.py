"""From a raw row to `prompt` and `chosen`, for each layout that conversations are published in.

A converter takes a raw row and a counter of notes (what it changed, for the statistics) and returns a row's fields.
It raises ValueError with the reason where the row is broken; roles and contents are checked afterwards, by `check_row`.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from components.common.core.conversations import Message, check_messages

Fields = dict[str, Any]
Notes = Counter[str]

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


CONVERTERS: dict[str, Callable[[Fields, Notes], Fields]] = {
    "conversation": from_conversation,
    "capybara": from_capybara,
    "deita": from_messages,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
}


def detect_format(rows: Iterable[Fields]) -> str | None:
    """The layout of the first row that fits one, or None."""
    return next((format for row in rows if (format := _format_of(row))), None)


def _format_of(row: Fields) -> str | None:
    fields = {name for name, value in row.items() if value is not None}
    # Capybara has a `prompt` of text too, so `chosen` decides: is it a conversation or an answer?
    if isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1:
        return "capybara"
    if {"messages", "prompt_id"} <= fields and not fields & {"chosen", "completion"}:
        return "deita"
    if "messages" in fields or ("prompt" in fields and fields & {"chosen", "completion"}):
        return "conversation"
    if "conversations" in fields:
        return "sharegpt"
    return "alpaca" if {"instruction", "output"} <= fields else None


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
