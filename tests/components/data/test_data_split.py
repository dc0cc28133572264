"""The split: whole conversations, the same for the same text and seed, whatever the order of the rows."""

import json
import random

import pytest

from components.common.core.errors import UserError

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(40)]


def texts(rows):
    return [(row["prompt"][0]["content"], row["chosen"][0]["content"]) for row in rows]


def test_split_holds_out_exactly_test_rows_and_keeps_the_rest(run, jsonl):
    run(jsonl(*ROWS), test_rows=7)
    assert len(run.test) == 7
    assert sorted(texts(run.test + run.train)) == sorted((f"question {n}", f"answer {n}") for n in range(40))


def test_split_and_order_do_not_depend_on_the_order_of_rows(run, jsonl):
    run(jsonl(*ROWS), test_rows=7, max_rows=20)
    first = texts(run.train), texts(run.test)
    run(jsonl(*random.Random(1).sample(ROWS, len(ROWS))), test_rows=7, max_rows=20, overwrite=True)
    assert (texts(run.train), texts(run.test)) == first


def test_rows_with_ids_of_their_own_give_the_same_bytes_in_any_order(run, jsonl):
    rows = [{"id": n, **row} for n, row in enumerate(ROWS)]
    run(jsonl(*rows), test_rows=7, rejected="other_conversation")
    first = run.statistics["splits"]
    run(jsonl(*reversed(rows)), test_rows=7, rejected="other_conversation", overwrite=True)
    assert run.statistics["splits"] == first


def test_seed_changes_split_and_order(run, jsonl):
    run(jsonl(*ROWS), test_rows=7)
    first = texts(run.train), texts(run.test)
    run(jsonl(*ROWS), test_rows=7, seed=43, overwrite=True)
    assert set(texts(run.test)) != set(first[1])
    assert texts(run.train) != first[0]


def test_order_is_shuffled(run, jsonl):
    run(jsonl(*ROWS))
    assert texts(run.train) != [(row["prompt"], row["completion"]) for row in ROWS]


def test_a_smaller_max_rows_gives_the_beginning_of_the_same_order(run, jsonl):
    run(jsonl(*ROWS), test_rows=7)
    whole = texts(run.train)
    run(jsonl(*ROWS), test_rows=7, max_rows=5, overwrite=True)
    assert texts(run.train) == whole[:5]
    assert run.statistics["notes"] == {"usable rows left out by max_rows": 28}


def test_answers_to_the_same_prompt_stay_together(run, jsonl):
    rows = [{"prompt": f"question {n % 10}", "completion": f"answer {n}"} for n in range(40)]
    run(jsonl(*rows), test_rows=8)
    assert len(run.test) == 8
    assert len({prompt for prompt, _ in texts(run.test)}) == 2
    assert not {prompt for prompt, _ in texts(run.test)} & {prompt for prompt, _ in texts(run.train)}


def test_test_rows_must_leave_something(run, jsonl):
    with pytest.raises(UserError, match="test_rows = 40 holds out all 40 usable rows; lower it"):
        run(jsonl(*ROWS), test_rows=40)
    assert not run.output.exists()


def test_test_source_is_held_out_and_its_prompts_are_not_trained_on(run, jsonl):
    held_out = jsonl(*ROWS[:4], name="held_out.jsonl")
    rephrased = {"prompt": "question 3", "completion": "another answer"}
    run(jsonl(rephrased, *ROWS[3:]), test_source=str(held_out), test_rows=3)
    assert len(run.test) == 3 and set(texts(run.test)) < {(f"question {n}", f"answer {n}") for n in range(4)}
    assert len(run.train) == 36
    assert [(row["line"], row["reason"]) for row in run.rejected] == [
        (1, "prompt is in the held-out source"),
        (2, "duplicate of held_out-4"),
    ]
    assert run.statistics["notes"] == {"usable rows left out by test_rows": 1}


def test_statistics_are_the_same_for_the_same_data(run, jsonl):
    source = jsonl(*ROWS)
    run(source, test_rows=7)
    first = run.statistics
    run(source, test_rows=7, overwrite=True)
    assert run.statistics == first
    assert json.dumps(first).count("sha256") == 2
