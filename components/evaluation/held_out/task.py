"""The held-out benchmark as an lm-eval task: one document per test row, four replies to choose from.

One task gives all three metrics, because each needs the likelihood of the true reply: picking it among the four is the
accuracy, its likelihood per token and per byte are the perplexities.
"""

import math
import random
from collections.abc import Iterator
from heapq import merge
from typing import TYPE_CHECKING, Any

from components.common.core.conversations import Row
from components.common.core.errors import UserError
from components.evaluation.benchmark import Metric
from components.evaluation.standard_errors import influence_stderr, influences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK = "held_out"
CHOICES = 4
# Wrong replies are drawn among this many replies of the nearest length: few enough to match lengths closely, enough
# that the same few replies do not serve every row.
NEIGHBOURS = 20
METRICS = {
    "next_reply_accuracy": (
        True,
        f"share of rows where the true reply is the likeliest per byte among {CHOICES}, the others being replies of "
        "about its length from other conversations",
    ),
    "perplexity_per_token": (False, "exp of the mean NLL per token of the true replies, end-of-turn tokens included"),
    "perplexity_per_byte": (
        False,
        "exp of the total NLL of the true replies over their UTF-8 bytes; fit to compare tokenizers",
    ),
}


def reply(row: Row) -> str:
    return row["chosen"][0]["content"]


def utf8_bytes(text: str) -> int:
    return len(text.encode("utf-8"))


def choose_replies(rows: list[Row], limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Puts the true reply of each of the first `limit` rows among wrong ones; the same for every model.

    Wrong replies come from all `rows`, from other conversations, at random among the NEIGHBOURS of nearest length. A
    row's own id seeds its draw, so that it does not depend on other rows' order.

    Returns:
        per row `id`, `prompt`, `choices` (CHOICES texts) and `target` (index of the true one).

    Raises:
        UserError: too few replies for four choices.
    """
    by_length = sorted(rows, key=lambda row: (utf8_bytes(reply(row)), row["id"]))
    position = {id(row): place for place, row in enumerate(by_length)}
    documents = []
    for row in rows[:limit]:
        wrong = _nearest_replies(row, by_length, position[id(row)])
        if len(wrong) < CHOICES - 1:
            raise UserError(
                f"test.jsonl: row {row['id']} finds {len(wrong)} different replies in other conversations, "
                f"and {CHOICES} choices need {CHOICES - 1}; --data needs a larger test split"
            )
        generator = random.Random(f"{seed} {row['id']}")
        choices = [reply(row), *generator.sample(wrong, CHOICES - 1)]
        generator.shuffle(choices)
        documents.append(
            {"id": row["id"], "prompt": row["prompt"], "choices": choices, "target": choices.index(reply(row))}
        )
    return documents


def _nearest_replies(row: Row, by_length: list[Row], position: int) -> list[str]:
    """Up to NEIGHBOURS different replies that are not this row's, from other conversations, nearest length first."""
    own, seen, found = _marks(row), {reply(row).casefold()}, []
    for other in _outwards(by_length, position, utf8_bytes(reply(row))):
        text = reply(other)
        if text.casefold() not in seen and own.isdisjoint(_marks(other)):
            seen.add(text.casefold())
            found.append(text)
            if len(found) == NEIGHBOURS:
                break
    return found


def _marks(row: Row) -> set[str]:
    """What only rows of one conversation have in common: its id where rows carry it, and messages."""
    messages = {message["content"] for message in [*row["prompt"], *row["chosen"]] if message["role"] != "system"}
    return messages | {row.get("conversation", row["id"])}


def _outwards(by_length: list[Row], position: int, length: int) -> Iterator[Row]:
    """The rows around a position of the sorted list, nearest length first."""
    shorter, longer = reversed(by_length[:position]), by_length[position + 1 :]
    return merge(shorter, longer, key=lambda row: abs(utf8_bytes(reply(row)) - length))


def add_texts(documents: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    """Documents as lm-eval takes them: the rendered prompt as `context`, and the sizes of the true reply."""
    from components.common.models.chat_templates import encode_response

    return [
        {
            "id": document["id"],
            "context": tokenizer.apply_chat_template(document["prompt"], add_generation_prompt=True, tokenize=False),
            "choices": document["choices"],
            "target": document["target"],
            "n_tokens": len(encode_response(tokenizer, document["choices"][document["target"]])),
            "n_bytes": utf8_bytes(document["choices"][document["target"]]),
        }
        for document in documents
    ]


def task_config(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The lm-eval task over documents of `add_texts`."""
    import datasets

    aggregations = {"next_reply_accuracy": "mean"}
    return {
        "task": TASK,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "target",
        "target_delimiter": "",
        "num_fewshot": 0,
        "process_results": score,
        "metric_list": [
            {
                "metric": metric,
                "aggregation": aggregations.get(metric, "weighted_perplexity"),
                "higher_is_better": higher_is_better,
            }
            for metric, (higher_is_better, _) in METRICS.items()
        ],
    }


def score(document: dict[str, Any], answers: list[tuple[float, bool]]) -> dict[str, Any]:
    """One document's part of each metric, from lm-eval's (log-likelihood, is greedy) of each choice."""
    log_likelihood = answers[document["target"]][0]
    return {
        "next_reply_accuracy": float(picked(document["choices"], answers) == document["target"]),
        "perplexity_per_token": (log_likelihood, document["n_tokens"]),
        "perplexity_per_byte": (log_likelihood, document["n_bytes"]),
    }


def picked(choices: list[str], answers: list[tuple[float, bool]]) -> int:
    """Index of the choice with the highest log-likelihood per byte."""
    per_byte = [answer[0] / utf8_bytes(choice) for choice, answer in zip(choices, answers, strict=True)]
    return per_byte.index(max(per_byte))


def perplexity_stderr(pairs: list[tuple[float, int]]) -> float | None:
    """Standard error of exp(-sum(ll) / sum(size)) over documents, by the delta method.

    Args:
        pairs: per document its log-likelihood (nats) and size (tokens or bytes).

    Returns:
        None for a single document.
    """
    stderr = influence_stderr(influences(pairs))
    return None if stderr is None else math.exp(-sum(ll for ll, _ in pairs) / sum(n for _, n in pairs)) * stderr


def metrics(outcome: dict[str, Any]) -> list[Metric]:
    """The metrics of lm-eval's outcome with their standard errors: its own for means, ours for perplexities."""
    values, documents = outcome["results"][TASK], outcome["samples"][TASK]
    entries: list[Metric] = []
    for name, (higher_is_better, description) in METRICS.items():
        stderr = values[f"{name}_stderr,none"]
        if name.startswith("perplexity"):
            stderr = perplexity_stderr([document[name] for document in documents])
        entries.append(
            {
                "benchmark": TASK,
                "metric": name,
                "value": values[f"{name},none"],
                "stderr": None if stderr == "N/A" else stderr,  # a single document has none
                "interval": None,
                "n": len(documents),
                "higher_is_better": higher_is_better,
                "description": description,
            }
        )
    return entries


def samples(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per document, in the order of the test split; log-likelihoods are in nats."""
    entries = []
    for sample in outcome["samples"][TASK]:
        document, answers = sample["doc"], sample["filtered_resps"]
        entries.append(
            {
                "id": document["id"],
                "true_choice": document["target"],
                "picked_choice": picked(document["choices"], answers),
                "log_likelihoods": [log_likelihood for log_likelihood, _ in answers],
                "nll": -answers[document["target"]][0],
                "n_tokens": document["n_tokens"],
                "n_bytes": document["n_bytes"],
                "choices": document["choices"],
            }
        )
    return entries
