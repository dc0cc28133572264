"""The Open LLM Leaderboard (v1) and IFEval through lm-eval."""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import torch
from lm_eval.evaluator import evaluate
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from components.common.core.errors import UserError
from components.common.core.progress import progress
from components.common.models.loading import load_tokenizer, stop_ids
from components.evaluation.benchmark import Outcome
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context, window
from components.evaluation.lm_eval.backends import check_backend, find_backend, open_lm
from components.evaluation.lm_eval.loading import FEWSHOT_SEED, load_tasks, stop_at
from components.evaluation.lm_eval.tasks import TASKS
from components.evaluation.registry import BENCHMARKS
from components.evaluation.results import write_lines


def check(name: str, config: EvaluationConfig) -> str:
    """Loads the tokenizer, the task and its data."""
    load_tokenizer(config.model)
    check_backend(config.engine)
    tasks = load_tasks(name, config)["tasks"]
    documents = sum(min(len(task.eval_docs), config.limit or len(task.eval_docs)) for task in tasks.values())
    return f"{documents} documents, {TASKS[name].shots} shots, with {config.engine}"


def run(name: str, config: EvaluationConfig, context: Context) -> Outcome:
    """Scores the model and writes samples.jsonl: per document its metrics and, where one was generated, the answer."""
    tasks, tokenizer, length = load_tasks(name, config), load_tokenizer(config.model), window(config)
    generation = stop_at(tasks["tasks"], sorted(stop_ids(config.model, tokenizer)), tokenizer, length)
    lm = open_lm(config, context, tokenizer, length)
    chat = TASKS[name].chat_template if config.apply_chat_template is None else config.apply_chat_template
    outcome = _evaluate(lm, tasks, config, chat)
    write_lines(context.folder / "samples.jsonl", _samples(outcome))
    details = {
        "shots": TASKS[name].shots,
        "chat_template": chat,
        "fewshot_as_multiturn": chat and config.fewshot_as_multiturn,
        "engine": config.engine,
        "window": length,
        "task_versions": {task: outcome["versions"][task] for task in (name, *tasks["tasks"])},
        "fewshot_seed": FEWSHOT_SEED,
        **generation,
        "tokens": token_facts(lm, outcome, tokenizer),
    }
    versions = {package: importlib.metadata.version(package) for package in ("datasets", *TASKS[name].packages)}
    versions |= backend.versions() if (backend := find_backend(config.engine)) else {}
    description = f"{BENCHMARKS[name].about}; {TASKS[name].shots} shots"
    metrics = TASKS[name].read(name, TASKS[name].metrics, description, outcome)
    return Outcome(metrics, details, versions)


def _evaluate(lm: Any, tasks: dict[str, Any], config: EvaluationConfig, chat: bool) -> dict[str, Any]:
    try:
        with _quiet(config.engine):
            return evaluate(
                lm,
                tasks,
                limit=config.limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat and config.fewshot_as_multiturn,
            )
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory with batch_size = {config.batch_size}; give a smaller --batch_size") from error


@contextlib.contextmanager
def _quiet(engine: str) -> Iterator[None]:
    """This project's progress in place of transformers' bar; lm-eval's others and the engine's stay off a log."""
    silent = functools.partial(tqdm, disable=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(lm_eval.models.huggingface, "tqdm", progress))
        for module in (lm_eval.api.task, lm_eval.api.model):
            stack.enter_context(mock.patch.object(module, "tqdm", silent))
        if (backend := find_backend(engine)) and backend.is_noisy and not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def token_facts(lm: Any, outcome: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What shows whether two evaluations saw the same tokens, from the first prompt as the engine encodes it."""
    first = next(iter(outcome["samples"].values()))[0]["arguments"][0][0]
    ids = list(lm.tok_encode(first))
    template = str(tokenizer.chat_template)
    return {
        "first_prompt_ids": ids[:16],
        "first_prompt_length": len(ids),
        "starts_with_bos": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "end_of_turn": tokenizer.eos_token,
        "vocabulary": len(tokenizer),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest()[:12],
    }


def _samples(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per document and filter."""
    return [
        {
            "task": task,
            "document": sample["doc_id"],
            "filter": sample["filter"],
            "answers": sample["filtered_resps"],
            **{metric: sample[metric] for metric in sample["metrics"]},
        }
        for task, found in outcome["samples"].items()
        for sample in found
    ]
