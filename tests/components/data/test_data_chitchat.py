"""Chats of two people, cut into windows."""

import json

import pytest

from components.common.core.errors import UserError


def chat(*turns):
    """A conversation of the package: a turn is a text, or a list of utterances."""
    utterances = [turn if isinstance(turn, list) else [turn] for turn in turns]
    return {"messages": [[{"text": text, "sender": str(n % 2)} for text in turn] for n, turn in enumerate(utterances)]}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Stands in for the package from PyPI."""

    def write(conversations):
        (tmp_path / "chitchat_dataset").mkdir()
        content = conversations if isinstance(conversations, str) else json.dumps(conversations)
        (tmp_path / "chitchat_dataset" / "dataset.json").write_text(content)
        return "pypi://chitchat-dataset"

    monkeypatch.setattr("components.data.sources.package_directory", lambda uri: tmp_path / "chitchat_dataset")
    return write


def contents(row):
    return [f"{message['role'][0]}:{message['content']}" for message in row["prompt"] + row["chosen"]]


def test_windows_end_at_long_turns_and_start_with_the_user(run, package):
    talk = chat("hi", "hello", ["how", "are you"], "I am doing well", "LONG ENOUGH TOO", "and you?", "fine, thank you")
    run(package({"talk": talk}), min_response_characters=9, max_turns=4)
    assert {row["id"]: contents(row) for row in run.train} == {
        # Turn 2, "how are you", is a response; turn 3 comes directly after it and is prompt only.
        "talk-2": ["u:hello", "a:how are you"],
        "talk-4": ["u:hello", "a:how are you", "u:I am doing well", "a:LONG ENOUGH TOO"],
        "talk-6": ["u:I am doing well", "a:LONG ENOUGH TOO", "u:and you?", "a:fine, thank you"],
    }
    assert run.statistics["notes"] == {
        "turns directly after a response, used as prompt only": 1,
        "turns too short to be a response": 2,
    }


def test_window_drops_oldest_turns_to_fit_the_prompt_limit(run, package):
    talk = chat("a" * 30, "b" * 10, "c" * 10, "the response")
    run(package({"talk": talk}), min_response_characters=12, max_prompt_characters=40)
    assert contents(run.train[0]) == ["u:" + "c" * 10, "a:the response"]


def test_conversations_without_a_row_are_counted(run, package):
    conversations = {
        "empty": chat(),
        "alone": chat("is somebody there?"),
        "short": chat("hi", "yo"),
        "long": chat("hi", "x" * 50),
        "odd": {"ratings": 1},
        "good": chat("hi", "good to hear from you"),
    }
    run(package(conversations), min_response_characters=10, max_response_characters=30, max_rejected_share=0.2)
    assert [row["id"] for row in run.train] == ["good-1"]
    assert [(row["line"], row["id"], row["kind"], row["reason"]) for row in run.rejected] == [
        (1, "empty", "filtered", "conversation with fewer than two turns"),
        (2, "alone", "filtered", "conversation with fewer than two turns"),
        (3, "short", "filtered", "conversation without a turn that could be a response"),
        (4, "long", "filtered", "conversation without a turn that could be a response"),
        (5, "odd", "broken", "missing field 'messages'"),
    ]
    assert run.statistics["notes"]["turns too long to be a response"] == 1


def test_turn_without_text_breaks_only_its_windows(run, package):
    conversations = {"talk": chat("hi", "first reply", " ", "second reply"), "other": chat("hey", "third reply")}
    run(package(conversations), min_response_characters=5, max_turns=1, max_rejected_share=0.5)
    assert {row["id"] for row in run.train} == {"talk-1", "other-1"}
    assert [(row["id"], row["reason"]) for row in run.rejected] == [("talk-3", "prompt has an empty message")]


def test_windows_of_a_conversation_stay_in_one_split(run, package):
    conversations = {f"c{n}": chat(*(f"conversation {n} turn {turn}" for turn in range(7))) for n in range(30)}
    run(package(conversations), test_rows=10)
    # Responses at turns 1, 3 and 5: three rows each, so that ten test rows hold three whole conversations.
    assert len(run.test) == 9 and len(run.train) == 81
    in_test = {row["id"].split("-")[0] for row in run.test}
    assert len(in_test) == 3
    assert not in_test & {row["id"].split("-")[0] for row in run.train}


def test_rejected_is_a_reply_of_similar_length_from_another_conversation_of_the_split(run, package):
    lengths = [10, 11, 40, 42, 90, 95]
    conversations = {f"c{n}": chat("hi " + str(n), "abcdef"[n] * length) for n, length in enumerate(lengths)}
    run(package(conversations), rejected="other_conversation")
    pairs = {len(row["chosen"][0]["content"]): len(row["rejected"][0]["content"]) for row in run.train}
    assert pairs == {
        10: 11,
        11: 40,
        40: 42,
        42: 90,
        90: 95,
        95: 90,
    }  # the next longer one, the last takes the one before
    assert run.statistics["splits"]["train"]["paired_rows"] == 6


def test_rejected_is_never_from_the_same_conversation(run, package):
    conversations = {
        "a": chat("q", "a" * 10, "q", "a" * 11, "q", "a" * 12),
        "b": chat("q", "b" * 50),
    }
    run(package(conversations), rejected="other_conversation", min_response_characters=10)
    assert {(row["id"][0], row["rejected"][0]["content"][0]) for row in run.train} == {("a", "b"), ("b", "a")}


def test_rejected_needs_two_conversations(run, package):
    with pytest.raises(UserError, match="needs two conversations or more among the train rows"):
        run(package({"a": chat("hi", "hello")}), rejected="other_conversation")
    assert not run.output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "must map conversation ids to conversations, is list"), ("{", "dataset.json: broken JSON")],
)
def test_package_that_is_not_what_it_should_be(run, package, content, message):
    with pytest.raises(UserError, match=message):
        run(package(content))
