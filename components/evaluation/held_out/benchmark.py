"""The held-out benchmark: the true next reply among four, and the perplexity of the true replies."""

import functools
from typing import Any

from transformers import PreTrainedTokenizerBase

from components.common.core.conversations import Row, read_rows
from components.common.core.errors import UserError
from components.common.models.chat_templates import encode_response
from components.common.models.loading import load_tokenizer
from components.evaluation.benchmark import Outcome
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context, window
from components.evaluation.held_out.baselines import baselines
from components.evaluation.held_out.scoring import context_ids, score_documents
from components.evaluation.held_out.task import CHOICES, add_texts, choose_replies, metrics, reply, samples
from components.evaluation.results import write_lines


def check(name: str, config: EvaluationConfig) -> str:
    """Reads the data and the tokenizer and makes the documents."""
    if config.data is None:
        raise UserError(f"--data is required by the benchmark {name}: the output of the data stage")
    documents, counts = _documents(config.data, config.model, window(config), config.limit, config.seed)
    read_rows(config.data, "train")
    return f"score {len(documents)} rows x {CHOICES} replies with {config.model}; {counts}"


def run(name: str, config: EvaluationConfig, context: Context) -> Outcome:
    """Scores the documents and writes samples.jsonl."""
    data, tokenizer, max_length = config.data or "", load_tokenizer(config.model), window(config)
    documents, counts = _documents(data, config.model, max_length, config.limit, config.seed)
    outcome = score_documents(documents, context.model(config.model), tokenizer, config.batch_size, max_length)
    write_lines(context.folder / "samples.jsonl", samples(outcome))
    details = {"counts": counts, "tokens": token_facts(tokenizer, documents), "window": max_length}
    return Outcome(metrics(outcome), details, {}, baselines(read_rows(data, "train"), documents, tokenizer))


@functools.lru_cache(maxsize=1)
def _documents(
    data: str, model: str, max_length: int, limit: int | None, seed: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """`check` and `run` need the same documents, and tokenising all replies takes a while."""
    if not (rows := read_rows(data, "test")):
        raise UserError(f"{data}: the data stage held no row out (test_rows: 0), and held_out scores held-out rows")
    return make_documents(rows, load_tokenizer(model), max_length, limit, seed)


def make_documents(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None, seed: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The documents of the test split's rows, and how many there are, lost the start of a prompt, or do not fit.

    Raises:
        UserError: no reply fits in the window, or there are too few.
    """
    fitting = fitting_rows(rows, tokenizer, max_length)
    if not fitting:
        raise UserError(f"no reply of test.jsonl fits in {max_length} tokens; raise --max_length")
    documents = add_texts(choose_replies(fitting, limit, seed), tokenizer)
    counts = {
        "rows": len(documents),
        "truncated_prompts": count_truncated(documents, tokenizer, max_length),
        "replies_longer_than_window": len(rows) - len(fitting),
    }
    return documents, counts


def fitting_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """The rows whose reply fits in the window with its end-of-turn token; prompts are shortened, replies never."""
    replies = tokenizer([reply(row) for row in rows], add_special_tokens=False)["input_ids"]
    return [row for row, ids in zip(rows, replies, strict=True) if len(ids) < max_length]


def count_truncated(documents: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Documents whose prompt loses its first tokens beside the longest of its replies; see `pack`."""
    truncated = 0
    for document in documents:
        longest = max(len(encode_response(tokenizer, choice)) for choice in document["choices"])
        truncated += len(context_ids(tokenizer, document["context"])) + longest > max_length + 1
    return truncated


def token_facts(tokenizer: PreTrainedTokenizerBase, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """What shows whether two evaluations saw the same tokens."""
    return {
        "end_of_turn": tokenizer.eos_token,
        "end_of_turn_id": tokenizer.eos_token_id,
        "vocabulary": len(tokenizer),
        "first_prompt_ids": context_ids(tokenizer, documents[0]["context"])[:16],
    }
