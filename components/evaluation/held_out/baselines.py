"""What the held-out numbers are to be read against: guessing, and a model that knows only how often tokens occur."""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from components.common.core.conversations import Row
from components.evaluation.held_out.task import CHOICES, TASK, reply, utf8_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def baselines(
    train: list[Row], documents: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> list[dict[str, Any]]:
    """The baselines section of results.json, from the replies of the train split and the true ones of the documents."""
    held_out = [document["choices"][document["target"]] for document in documents]
    log_likelihood, tokens = unigram_log_likelihood([reply(row) for row in train], held_out, tokenizer)
    size = sum(utf8_bytes(text) for text in held_out)
    about = "token frequencies of the train split's replies, add-one smoothed over the vocabulary"
    values = [
        ("unigram", "perplexity_per_token", math.exp(-log_likelihood / tokens), about),
        ("unigram", "perplexity_per_byte", math.exp(-log_likelihood / size), about),
        ("chance", "next_reply_accuracy", 1 / CHOICES, "picking at random"),
    ]
    return [
        {"benchmark": TASK, "name": name, "metric": metric, "value": value, "description": description}
        for name, metric, value, description in values
    ]


def unigram_log_likelihood(
    train: list[str], held_out: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[float, int]:
    """Log-likelihood (nats) and number of the held-out replies' tokens, each reply with its end-of-turn token."""
    seen = _count_tokens(train, tokenizer)
    scored = _count_tokens(held_out, tokenizer)
    total = math.log(seen.total() + len(tokenizer))
    return sum(n * (math.log(seen[token] + 1) - total) for token, n in scored.items()), scored.total()


def _count_tokens(replies: list[str], tokenizer: "PreTrainedTokenizerBase") -> Counter[int]:
    """How often each token occurs; `encode_response` on many texts at once, which is ten times as fast."""
    counts: Counter[int] = Counter()
    for ids in tokenizer(replies, add_special_tokens=False)["input_ids"]:
        counts.update(ids)
    counts[tokenizer.eos_token_id] += len(replies)
    return counts
