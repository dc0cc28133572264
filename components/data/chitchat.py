"""The conversations of `pypi://chitchat-dataset`: two people chatting, cut into prompts and responses.

`dataset.json` maps a conversation's id to {"messages": [[{"text": "...", "sender": "..."}, ...], ...], ...}; an inner
list is what one person said in a row, here one turn. Every turn long enough to be a response ends a window: it is the
assistant's, and the turns before it alternate back from there. Windows of a conversation may share prompt turns, never
a response.
"""

from collections.abc import Iterator
from typing import Any

from components.common.core.conversations import Message
from components.common.core.errors import UserError
from components.data.layout import Fields, FilteredError, Limits, Notes
from components.data.sources import Record, Source, load_json


def read_chitchat(source: Source) -> Iterator[Record]:
    """One record for each conversation; `line` is its place in the file, from 1."""
    for path in source.files:
        if not path.is_file():
            raise UserError(f"{path}: no such file; this is not the data set's package")
        conversations = load_json(path)
        if not isinstance(conversations, dict):
            raise UserError(f"{path}: must map conversation ids to conversations, is {type(conversations).__name__}")
        for number, (identity, value) in enumerate(conversations.items(), start=1):
            if isinstance(value, dict):
                yield Record(
                    source.name(path), number, {"conversation_id": identity, "messages": value.get("messages")}
                )
            else:
                yield Record(source.name(path), number, None, f"not a JSON object but {type(value).__name__}")


def windows(conversation: Fields, limits: Limits, notes: Notes) -> Iterator[Fields]:
    """Fields of a row for every response in a conversation; between two responses lies at least one turn.

    Raises:
        ValueError: a turn is not a list of utterances with a text.
        FilteredError: the conversation has fewer than two turns, or no response.
    """
    turns = _turns(conversation["messages"])
    if len(turns) < 2:
        raise FilteredError("conversation with fewer than two turns")
    ends = _response_positions(turns, limits, notes)
    if not ends:
        raise FilteredError("conversation without a turn that could be a response")
    for end in ends:
        yield {
            "id": f"{conversation['conversation_id']}-{end}",
            "conversation": conversation["conversation_id"],
            "prompt": _prompt(turns[:end], limits),
            "chosen": [{"role": "assistant", "content": turns[end]}],
        }


def _turns(messages: Any) -> list[str]:
    if not isinstance(messages, list):
        raise ValueError("missing field 'messages'")
    return [" ".join(_text(utterance) for utterance in _utterances(turn)).strip() for turn in messages]


def _utterances(turn: Any) -> list[Any]:
    if not isinstance(turn, list):
        raise ValueError("a turn is not a list of utterances")
    return turn


def _text(utterance: Any) -> str:
    if not isinstance(utterance, dict) or not isinstance(utterance.get("text"), str):
        raise ValueError("an utterance has no text")
    return utterance["text"].strip()


def _response_positions(turns: list[str], limits: Limits, notes: Notes) -> list[int]:
    ends: list[int] = []
    for position, turn in enumerate(turns[1:], start=1):
        if len(turn) < limits.min_response_characters:
            notes["turns too short to be a response"] += 1
        elif limits.max_response_characters is not None and len(turn) > limits.max_response_characters:
            notes["turns too long to be a response"] += 1
        elif ends and position - ends[-1] < 2:
            notes["turns directly after a response, used as prompt only"] += 1
        else:
            ends.append(position)
    return ends


def _prompt(before: list[str], limits: Limits) -> list[Message]:
    """The turns before a response: as many as the limits allow, and an odd number, so that the user speaks first."""
    count = min(len(before), limits.max_turns or len(before))
    count -= 1 - count % 2
    while count > 1 and sum(map(len, before[-count:])) > (limits.max_prompt_characters or float("inf")):
        count -= 2
    # Counted back from the response: the turn right before it is the user's.
    return [
        {"role": "user" if (count - index) % 2 else "assistant", "content": turn}
        for index, turn in enumerate(before[-count:])
    ]
