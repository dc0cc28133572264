"""AlpacaEval 2.0 (arXiv 2404.04475): a judge compares each answer with GPT-4 Turbo's.

The package alpaca_eval does the comparison: its annotator weighted_alpaca_eval_gpt4_turbo makes the prompts (which answer
comes first is drawn from the instruction) and reads the log-probabilities, its functions compute the win rates. Only
the requests are sent by our judge, which saves every reply; and the data may come from a directory.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from components.common.core.errors import UserError
from components.common.storage.locations import existing_path, fetch_hub, scheme
from components.evaluation.benchmark import Metric, Outcome
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context
from components.evaluation.judged import generation
from components.evaluation.judged.generation import Answer, Request
from components.evaluation.judged.journal import digest
from components.evaluation.judged.judge import Grading, Judge, Judgement, Reply

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
OPTIONS = {"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": 5, "top_p": 1.0}  # of the annotator
PROMPTS = 805
REFERENCES, GAMED = "alpaca_eval_gpt4_baseline.json", "df_gamed.csv"
JUDGEMENTS, ANNOTATIONS = "judgements.jsonl", "annotations.json"


def check(name: str, config: EvaluationConfig) -> str:
    references, _ = load_data(config)
    _import()
    if config.alpaca_eval_answers:
        generation.read_answers(config.alpaca_eval_answers, "alpaca_eval_answers", _keys(references))
    else:
        generation.check_generation(config)
    reply = Judge(config.alpaca_eval_judge, config, OPTIONS).check()
    if not top_logprobs(reply):
        raise UserError(
            f"the judge {config.alpaca_eval_judge} gives no log-probabilities, from which {ANNOTATOR} reads its verdict; "
            "choose another --alpaca_eval_judge"
        )
    return f"{len(references)} prompts, compared with {references[0]['generator']} by {config.alpaca_eval_judge}"


def run(name: str, config: EvaluationConfig, context: Context) -> Outcome:
    references, gamed = load_data(config)
    judge = Judge(config.alpaca_eval_judge, config, OPTIONS)
    answers, facts = _answers(references, config, context)
    annotations, judgements = annotate(references, answers, context, judge)
    judged = judge.facts(judgements) if judgements else {}
    details = {
        "prompts": len(references),
        "reference": references[0]["generator"],
        "data_digest": digest(references),
        "annotator": ANNOTATOR,
        "generation": facts,
        "judge": judged,
    }
    return Outcome(metrics(annotations, answers, gamed), details, versions=_versions())


def load_data(config: EvaluationConfig) -> tuple[list[dict[str, Any]], Path]:
    """The reference answers (the first `limit`) and the file that the length-controlled win rate is regularised with.

    Raises:
        UserError: a file is missing or not of the format.
    """
    location = config.alpaca_eval_data
    if scheme(location) == "hf":
        folder = fetch_hub(location, "dataset", [REFERENCES, GAMED])
    else:
        folder = existing_path(location, "alpaca_eval_data")
    for file in (REFERENCES, GAMED):
        if not (folder / file).is_file():
            raise UserError(
                f"--alpaca_eval_data {location}: has no {file}; it is in the data set tatsu-lab/alpaca_eval"
            )
    try:
        references = json.loads((folder / REFERENCES).read_text(encoding="utf-8"))[: config.limit]
        kept = [{key: entry[key] for key in ("instruction", "output", "generator")} for entry in references]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / REFERENCES}: is not a list of instruction, output, generator ({error})") from error
    if config.limit is None and len(kept) != PROMPTS:
        raise UserError(
            f"{folder / REFERENCES}: {len(kept)} prompts, AlpacaEval has {PROMPTS}; --limit N runs on fewer"
        )
    if len(kept) < 2:
        raise UserError(f"{folder / REFERENCES}: {len(kept)} prompts; the length-controlled win rate needs 2 or more")
    return kept, folder / GAMED


def _answers(
    references: list[dict[str, Any]], config: EvaluationConfig, context: Context
) -> tuple[list[Answer], dict[str, Any]]:
    if config.alpaca_eval_answers:
        answers = generation.read_answers(config.alpaca_eval_answers, "alpaca_eval_answers", _keys(references))
        return answers, generation.answer_facts(answers) | {"read_from": config.alpaca_eval_answers}
    requests = [
        Request(identity, turn, [{"role": "user", "content": entry["instruction"]}], config.alpaca_eval_temperature)
        for (identity, turn), entry in zip(_keys(references), references, strict=True)
    ]
    with generation.open_generator(config, context, config.alpaca_eval_max_new_tokens) as generator:
        answers = generator.answer(requests, "AlpacaEval answers")
        return answers, generator.facts(answers)


def _keys(references: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(str(number), 1) for number in range(len(references))]


def annotate(
    references: list[dict[str, Any]], answers: Sequence[Answer], context: Context, judge: Judge
) -> tuple[list[dict[str, Any]], list[Judgement]]:
    """alpaca_eval's annotations, one a prompt, and the judgements behind them.

    `preference` goes from 1 (the reference is better) to 2 (the model is); 1.5 for equal answers, which are not judged;
    None for an error.
    """
    _import()
    from alpaca_eval.annotators import PairwiseAnnotator

    outputs = [
        {"instruction": entry["instruction"], "output": answer["output"], "generator": context.name}
        for entry, answer in zip(references, answers, strict=True)
    ]
    judgements: list[Judgement] = []

    def complete(prompts: list[str], **_: Any) -> dict[str, list[Any]]:
        gradings = [Grading(digest(prompt), 1, messages(prompt)) for prompt in prompts]
        judgements.extend(judge.ask(gradings, check_reply, context.folder / JUDGEMENTS, "AlpacaEval judgements"))
        return {"completions_all": [judgement.reply or {} for judgement in judgements]}

    with _quiet():
        annotator = PairwiseAnnotator(annotators_config=ANNOTATOR, caching_path=None, is_avoid_reannotations=False)
        annotator.annotators[ANNOTATOR].fn_completions = complete
        annotations = annotator.annotate_head2head(
            outputs_1=references, outputs_2=outputs, is_ordered=True, chunksize=None
        )
    for annotation in annotations:  # what the package leaves as NaN is an error of the judgement
        preference = annotation["preference"]
        annotation["preference"] = None if preference is None or np.isnan(preference) else float(preference)
    text = json.dumps(annotations, ensure_ascii=False, indent=1, default=str)
    (context.folder / ANNOTATIONS).write_text(text, encoding="utf-8")
    return annotations, judgements


def messages(prompt: str) -> list[dict[str, str]]:
    """The annotator's ChatML prompt as messages: a system's and a user's.

    The package's own function looks for ChatML's markers in the answers too, and fails on a model that wrote some.
    """
    system, _, user = prompt.strip().removeprefix("<|im_start|>system\n").partition("<|im_end|>\n<|im_start|>user\n")
    user = user.removesuffix("<|im_end|>")
    return [{"role": "system", "content": system.strip()}, {"role": "user", "content": user.strip()}]


def top_logprobs(reply: Reply) -> list[dict[str, Any]]:
    """The likeliest first tokens with their log-probabilities; none where the judge does not give them."""
    content = (reply.get("logprobs") or {}).get("content") or []
    return content[0].get("top_logprobs") or [] if content else []


def check_reply(reply: Reply) -> float:
    """The probability of m against M, as alpaca_eval's parser will read it.

    Raises:
        ValueError: neither is among the likeliest tokens.
    """
    weights = {entry["token"]: np.exp(entry["logprob"]) for entry in top_logprobs(reply)}
    if not {"m", "M"} & weights.keys():
        raise ValueError(f"neither m nor M among the likeliest tokens {sorted(weights)}")
    return float(weights.get("m", 0.0) / (weights.get("m", 0.0) + weights.get("M", 0.0)))


def metrics(annotations: list[dict[str, Any]], answers: Sequence[Answer], gamed: Path) -> list[Metric]:
    """Win rates in percent with alpaca_eval's standard errors, and the mean length of the answers in characters."""
    _import()
    import pandas as pd
    from alpaca_eval.metrics import get_length_controlled_winrate

    with _quiet(), _local_gamed(gamed):
        found = get_length_controlled_winrate(pd.DataFrame(annotations), save_weights_dir=None)
    lengths = np.array([len(answer["output"]) for answer in answers])
    n = int(found["n_total"])
    return [
        _metric(
            "length_controlled_win_rate",
            found["length_controlled_winrate"],
            found["lc_standard_error"],
            *(n, "win rate against the reference were the answers of its length, in percent"),
        ),
        _metric(
            "win_rate", found["win_rate"], found["standard_error"], n, "win rate against the reference, in percent"
        ),
        _metric(
            "average_length",
            lengths.mean(),
            lengths.std(ddof=1) / np.sqrt(len(lengths)),
            *(len(lengths), "mean length of the answers in characters; neither more nor less is better"),
        ),
    ]


def _metric(name: str, value: float, stderr: float, n: int, description: str) -> Metric:
    return Metric(
        benchmark="alpaca_eval",
        metric=name,
        value=float(value),
        stderr=float(stderr),
        interval=None,
        n=n,
        higher_is_better=True,
        description=description,
    )


@contextmanager
def _local_gamed(path: Path) -> Iterator[None]:
    """alpaca_eval downloads df_gamed.csv where it computes; within the block it gets this file."""
    from alpaca_eval.metrics import glm_winrate

    download = glm_winrate.hf_hub_download
    glm_winrate.hf_hub_download = lambda **_: str(path)
    try:
        yield
    finally:
        glm_winrate.hf_hub_download = download


@contextmanager
def _quiet() -> Iterator[None]:
    """alpaca_eval logs every step at the root logger, and sklearn warns of the arguments it is called with."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)


def _import() -> None:
    """Raises UserError where alpaca_eval cannot be imported."""
    try:
        with _quiet():  # it also sets the root logger's level
            import alpaca_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"alpaca_eval cannot be imported ({error}); install the extra `evaluation` (it needs setuptools below 81)"
        ) from error


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("alpaca_eval", "openai", "scikit-learn")}
