"""Every layout, from the fields that the public data sets have to prompt and chosen."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.common.core.conversations import check_row
from components.data import layout
from components.data.__main__ import main
from components.data.config import DataConfig
from components.data.formats import LAYOUTS, detect_format, known_layouts
from components.data.layout import Layout, one_row
from components.data.rows import Collection
from components.data.sources import Record


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CAPYBARA = {
    "source": "Airoboros",
    "conversation": [{"input": "Hi", "output": "Hello"}, {"input": "Why?", "output": "Because."}],
    "original_response": "Because.",
    "prompt": "Hi",
    "chosen": [user("Hi"), assistant("Hello"), user("Why?"), assistant(" Because.")],
    "rejected": [user("Hi"), assistant("Hello"), user("Why?"), assistant("No idea.")],
    "rating_chosen": 5,
}
DEITA = {"prompt": "Hi", "prompt_id": "9a3f", "messages": [user("Hi"), assistant("Hello"), user("?"), assistant("!")]}
SHAREGPT = {
    "id": "QWJhYvA_0",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ],
}
ALPACA = {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"}
LIMITS = DataConfig(source="x", output="y")


def convert(format, row, notes=None):
    """The one row that a raw row becomes."""
    (fields,) = LAYOUTS[format].converts(row, LIMITS, Counter() if notes is None else notes)
    return fields


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (CAPYBARA, "capybara"),
        (DEITA, "deita"),
        (SHAREGPT, "sharegpt"),
        (ALPACA, "alpaca"),
        ({"instruction": "Go", "output": "ok"}, "alpaca"),
        ({"messages": [user("Hi"), assistant("Hello")]}, "conversation"),
        ({"prompt": "Hi", "completion": "Hello"}, "conversation"),
        ({"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("No")]}, "conversation"),
        ({"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello")]}, "capybara"),
        ({"prompt": "Hi", "chosen": "Hello", "messages": None, "conversations": None}, "conversation"),
        ({"text": "Hi"}, None),
        ({"instruction": "Go", "output": None}, None),
    ],
)
def test_format_is_detected_from_fields(row, format):
    assert detect_format([row]) == format


def test_detection_looks_past_a_row_that_misses_a_field():
    assert detect_format([{"instruction": "Go"}, ALPACA]) == "alpaca"


@pytest.mark.parametrize("row", [CAPYBARA, DEITA, SHAREGPT, ALPACA, {"prompt": "Hi", "completion": "Hello"}])
def test_the_order_of_the_fields_does_not_decide(row):
    assert detect_format([dict(reversed(row.items()))]) == detect_format([row])


def test_another_layout_is_an_entry(monkeypatch, run, jsonl):
    """Told by its fields, converted, counted and named in errors, with no other place touched."""

    def from_question(row, notes):
        return {"prompt": [user(row["question"])], "chosen": [assistant(row["answer"])]}

    told = Layout(
        "`question`, `answer`", "`answer`", one_row(from_question), lambda row: {"question", "answer"} <= row.keys()
    )
    monkeypatch.setitem(LAYOUTS, "questions", told)
    source = jsonl({"question": "Why?", "answer": "Because."}, {"question": "How?", "answer": ""})
    run(source, max_rejected_share=0.5)
    assert [row["chosen"] for row in run.train] == [[assistant("Because.")]]
    assert run.statistics["format"] == "questions"
    assert run.statistics["rejected"]["broken"] == 1
    assert "questions: question, answer" in known_layouts(told_by_fields=True)


def test_the_readme_has_the_table():
    lines = (Path(layout.__file__).parent / "README.md").read_text().splitlines()
    start = lines.index("| format | fields | response |") + 2
    rows = [f"| `{name}` | {entry.fields} | {entry.response} |" for name, entry in LAYOUTS.items()]
    assert lines[start : start + len(rows) + 1] == [*rows, ""]


def test_help_lists_every_layout(capsys):
    main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"--format auto|{'|'.join(LAYOUTS)}" in text
    assert known_layouts() in text


@pytest.mark.parametrize(
    ("format", "row", "prompt", "chosen"),
    [
        ("capybara", CAPYBARA, [user("Hi"), assistant("Hello"), user("Why?")], "Because."),
        ("deita", DEITA, [user("Hi"), assistant("Hello"), user("?")], "!"),
        ("sharegpt", SHAREGPT, [{"role": "system", "content": "Be brief."}, user("Hi")], "Hello"),
        ("alpaca", ALPACA, [user("Add the numbers.\n\n1, 2")], "3"),
        ("alpaca", {"instruction": "Go", "input": "", "output": "ok"}, [user("Go")], "ok"),
        ("alpaca", {"instruction": "Go", "input": None, "output": "ok"}, [user("Go")], "ok"),
        ("conversation", {"prompt": "Hi", "chosen": "Hello"}, [user("Hi")], "Hello"),
        ("conversation", {"prompt": [user("Hi")], "completion": [assistant("Hello")]}, [user("Hi")], "Hello"),
        ("conversation", {"messages": [user("Hi"), assistant("Hello")]}, [user("Hi")], "Hello"),
    ],
)
def test_row_becomes_prompt_and_chosen(format, row, prompt, chosen):
    fields = check_row({"id": "x", **convert(format, row)})
    assert fields["prompt"] == prompt
    assert fields["chosen"] == [assistant(chosen)]


def test_sharegpt_system_text_beside_the_conversation_comes_first():
    row = {"system": "Be brief.", "conversations": SHAREGPT["conversations"][1:]}
    assert convert("sharegpt", row)["prompt"] == [{"role": "system", "content": "Be brief."}, user("Hi")]


def test_capybara_keeps_rejected_of_the_same_prompt_only():
    notes = Counter()
    assert convert("capybara", CAPYBARA, notes)["rejected"] == [assistant("No idea.")]
    assert not notes
    other = {**CAPYBARA, "rejected": [user("Hi"), assistant("No idea.")]}
    assert "rejected" not in convert("capybara", other, notes)
    assert notes == {"rejected answers left out, because their prompt differs": 1}


def test_trailing_user_message_is_dropped_and_counted():
    notes = Counter()
    fields = convert("deita", {"messages": [user("Hi"), assistant("Hello"), user("Bye")]}, notes)
    assert fields == {"prompt": [user("Hi")], "chosen": [assistant("Hello")]}
    assert notes == {"trailing user messages dropped": 1}


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("deita", {"messages": None}, "missing field 'messages'"),
        ("deita", {"messages": []}, "messages is not a list of messages"),
        ("deita", {"messages": [assistant("Hello")]}, "wrong role order: messages has no user message before"),
        ("deita", {"messages": [user("Hi")]}, "wrong role order: messages does not end with an assistant message"),
        ("deita", {"messages": [user("Hi"), assistant(" ")]}, "messages has an empty message"),
        ("sharegpt", {"conversations": "Hi"}, "conversations is not a list of messages"),
        ("sharegpt", {"conversations": [{"from": "tool", "value": "x"}]}, "unknown role 'tool'"),
        ("sharegpt", {"conversations": [{"from": ["gpt"], "value": "x"}]}, "without a role"),
        ("sharegpt", {"conversations": [{"from": "gpt", "text": "x"}]}, "without text content"),
        ("alpaca", {"instruction": "Go"}, "missing field 'output'"),
        ("alpaca", {"instruction": "Go", "output": 3}, "instruction, input or output is not text"),
        ("conversation", {"chosen": "Hello"}, "missing field 'prompt'"),
        ("capybara", {"prompt": "Hi"}, "missing field 'chosen'"),
    ],
)
def test_broken_row_says_why(format, row, reason):
    with pytest.raises(ValueError, match=reason):
        convert(format, row)


_JSON = st.recursive(
    st.sampled_from([None, True, 7, "", "text", "user", "assistant", "human", "gpt", "\ud83d"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text"]), inner, max_size=3)
    ),
    max_leaves=8,
)
_FIELDS = ["id", "prompt", "chosen", "rejected", "completion", "messages", "conversations", "instruction", "output"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    row=st.dictionaries(st.sampled_from([*_FIELDS, "input", "system", "conversation_id"]), _JSON, max_size=5),
    format=st.sampled_from([*LAYOUTS]),
)
def test_any_json_object_is_either_used_or_rejected(row, format):
    if format == "chitchat":
        row = {"conversation_id": "c", "messages": row.get("messages")}
    collection = Collection(DataConfig(source="x", output="y"))
    examples = collection.read([Record("file.jsonl", 1, row)], format)
    assert bool(examples) != bool(collection.rejections)
