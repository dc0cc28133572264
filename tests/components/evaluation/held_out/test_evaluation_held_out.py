"""The four choices, the scores and the baseline, on numbers worked by hand."""

import math
from typing import Any

import pytest

from components.common.core.conversations import Row
from components.common.core.errors import UserError
from components.evaluation.held_out.baselines import baselines, unigram_log_likelihood
from components.evaluation.held_out.task import choose_replies, perplexity_stderr, picked, score


def row(identity: str, reply: str, question: str | None = None, **fields: Any) -> Row:
    question = question or f"question of {identity}"
    return {
        "id": identity,
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": reply}],
        **fields,
    }


def rows_of_lengths(lengths: range) -> list[Row]:
    return [row(f"r{n}", f"{n:03d}" + "x" * (n - 3)) for n in lengths]


def test_every_row_gets_its_reply_and_three_different_ones():
    rows = rows_of_lengths(range(10, 60))
    for source, document in zip(rows, choose_replies(rows, None, seed=1), strict=True):
        assert document["choices"][document["target"]] == source["chosen"][0]["content"]
        assert len(set(document["choices"])) == 4
        assert document["id"] == source["id"]


def test_wrong_replies_are_among_the_twenty_nearest_in_bytes():
    rows = rows_of_lengths(range(10, 111))
    middle = next(d for d in choose_replies(rows, None, seed=1) if d["id"] == "r60")
    assert all(50 <= len(choice) <= 70 for choice in middle["choices"])


def test_choices_depend_on_the_id_and_the_seed_but_not_on_order_or_limit():
    rows = rows_of_lengths(range(10, 60))
    documents = {d["id"]: d for d in choose_replies(rows, None, seed=1)}
    assert {d["id"]: d for d in choose_replies(rows[::-1], None, seed=1)} == documents
    assert choose_replies(rows, 3, seed=1) == [documents["r10"], documents["r11"], documents["r12"]]
    other = {d["id"]: d for d in choose_replies(rows, None, seed=2)}
    assert sum(other[i]["choices"] != documents[i]["choices"] for i in documents) > 40


def test_the_true_reply_is_at_every_place():
    targets = [d["target"] for d in choose_replies(rows_of_lengths(range(10, 410)), None, seed=1)]
    assert all(70 < targets.count(place) < 130 for place in range(4))  # 100 expected, standard deviation 8.7


def test_wrong_replies_are_of_other_conversations_and_say_something_else():
    rows = [
        row("a", "yes, I do", conversation="c1"),
        row("b", "no, I don't", conversation="c1"),
        row("c", "the same prompt", question="question of a"),
        row("d", "YES, I do"),
        row("e", "fine one"),
        row("f", "fine two"),
        row("g", "fine three"),
    ]
    (document,) = choose_replies(rows, 1, seed=1)
    assert set(document["choices"]) == {"yes, I do", "fine one", "fine two", "fine three"}


def test_too_few_replies_are_refused():
    with pytest.raises(UserError) as error:
        choose_replies(rows_of_lengths(range(10, 13)), None, seed=1)
    assert str(error.value) == (
        "test.jsonl: row r10 finds 2 different replies in other conversations, "
        "and 4 choices need 3; --data needs a larger test split"
    )


def test_the_pick_is_the_likeliest_per_byte():
    answers = [(-8.0, False), (-9.0, False), (-10.0, False), (-11.0, False)]
    assert picked(["ab", "abc", "éé", "abc"], answers) == 2  # -4, -3, -10 / 4 bytes = -2.5, -3.7
    document = {"choices": ["ab", "abc", "éé", "abc"], "target": 1, "n_tokens": 2, "n_bytes": 3}
    assert score(document, answers) == {
        "next_reply_accuracy": 0.0,
        "perplexity_per_token": (-9.0, 2),
        "perplexity_per_byte": (-9.0, 3),
    }
    assert score(document | {"target": 2}, answers)["next_reply_accuracy"] == 1.0


def test_perplexity_stderr_by_hand():
    # Mean NLL = 6 / 4 = 1.5; residuals 2 - 3 = -1 and 4 - 3 = 1; sqrt(2 / 1 * 2) / 4 = 0.5.
    assert perplexity_stderr([(-2.0, 2), (-4.0, 2)]) == pytest.approx(math.exp(1.5) * 0.5)
    assert perplexity_stderr([(-2.0, 2), (-4.0, 4)]) == 0.0  # every token as likely as every other
    assert perplexity_stderr([(-2.0, 2)]) is None


class WordTokenizer:
    """Five tokens: four words and the end of a turn."""

    words = ("a", "b", "c", "d", "<end>")
    eos_token_id = 4

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[self.words.index(word) for word in text.split()] for text in texts]}


def test_unigram_baseline_by_hand():
    # Train: a 2, b 1, <end> 2 of 5 tokens; plus one over a vocabulary of 5: a 3/10, <end> 3/10, c 1/10.
    log_likelihood, tokens = unigram_log_likelihood(["a b", "a"], ["a c"], WordTokenizer())
    assert tokens == 3
    assert log_likelihood == pytest.approx(math.log(0.3 * 0.1 * 0.3))
    train, documents = [row("t1", "a b"), row("t2", "a")], [{"choices": ["b", "a c"], "target": 1}]
    values = {(b["name"], b["metric"]): b["value"] for b in baselines(train, documents, WordTokenizer())}
    assert values == {
        ("unigram", "perplexity_per_token"): pytest.approx(0.009 ** (-1 / 3)),
        ("unigram", "perplexity_per_byte"): pytest.approx(0.009 ** (-1 / 3)),  # "a c" has three bytes
        ("chance", "next_reply_accuracy"): 0.25,
    }
