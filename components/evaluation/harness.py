"""The held-out benchmark: runs lm-eval on a local model with the tokens of training."""

import contextlib
import functools
import io
import logging
from itertools import groupby
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.common.core.conversations import Row, read_rows
from components.common.core.errors import UserError
from components.common.core.progress import progress
from components.common.models.chat_templates import encode_response
from components.common.models.loading import load_config, load_tokenizer
from components.evaluation.baselines import baselines
from components.evaluation.benchmarks import Context, Outcome
from components.evaluation.config import EvaluationConfig
from components.evaluation.held_out import CHOICES, add_texts, choose_replies, metrics, reply, samples, task_config
from components.evaluation.results import write_lines

Tree = tuple[list[int], list[list[int]]]  # ids of a context, and of the replies to it
PADDING = -1
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about how it is called, not about the run


class ConversationLM(HFLM):
    """HFLM with the tokens of training, each prompt computed once for all its replies, and this project's progress bar.

    HFLM tokenises context + continuation as one text, after moving the context's trailing white space into the
    continuation: the newline after the assistant's header would be scored as part of the reply, and no reply would ever
    have to end. Here the ids are `encode_prompt` + `encode_response`. HFLM also runs a prompt again for each of its
    replies; prompts being long and replies short, sharing it is about three times as fast.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int,
        bar: "tqdm[Any] | None" = None,
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length
        )
        self.bar = bar

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return _context_ids(self.tokenizer, context), encode_response(self.tokenizer, continuation)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is greedy) of each (texts, context ids, reply ids), in order.

        Neighbours with the same context are scored together; `batch_size` contexts make a batch, longest first.
        """
        groups = [list(places) for _, places in groupby(range(len(requests)), key=lambda place: requests[place][1])]
        trees = [(requests[places[0]][1], [requests[place][2] for place in places]) for places in groups]
        order = sorted(range(len(trees)), key=lambda i: -len(trees[i][0]) - sum(map(len, trees[i][1])))
        answers: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, scores in zip(batch, self._score([trees[i] for i in batch]), strict=True):
                answers |= zip(groups[i], scores, strict=True)
                if self.bar is not None:
                    self.bar.update(len(scores))
        return [answers[place] for place in range(len(requests))]

    @torch.inference_mode()
    def _score(self, trees: list[Tree]) -> list[list[tuple[float, bool]]]:
        """Scores all replies of some contexts in one forward pass."""
        packed = [pack(context, replies, self.max_length) for context, replies in trees]
        ids, positions, segments = (
            pad_sequence([torch.tensor(row) for row in rows], True, padding, "left").to(self.device)
            for rows, padding in zip(zip(*packed, strict=True), (0, 0, PADDING), strict=True)
        )
        logits = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=tree_mask(segments),
            use_cache=False,
            logits_to_keep=max(sum(map(len, replies)) for _, replies in trees),
        ).logits
        return [_read_scores(row, replies) for row, (_, replies) in zip(logits, trees, strict=True)]


def pack(context: list[int], replies: list[list[int]], max_length: int) -> tuple[list[int], list[int], list[int]]:
    """A context and the replies to it as one sequence: ids, positions, and the segment (0 context, 1.. replies).

    Each reply starts with a copy of the context's last token, which predicts its first, and lacks its own last token,
    which predicts nothing. The context keeps what the window leaves of its end beside the longest reply.
    """
    context = context[-(max_length + 1 - max(map(len, replies))) :]
    prefix = len(context) - 1
    ids, positions, segments = context[:-1], list(range(prefix)), [0] * prefix
    for segment, reply_ids in enumerate(replies, start=1):
        ids += [context[-1], *reply_ids[:-1]]
        positions += range(prefix, prefix + len(reply_ids))
        segments += [segment] * len(reply_ids)
    return ids, positions, segments


def tree_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who attends to whom, [batch, 1, query, key]: every token to the context and its own reply, as far as itself."""
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    return ((query == key) | (key == 0)).tril()


def _read_scores(logits: torch.Tensor, replies: list[list[int]]) -> list[tuple[float, bool]]:
    """Scores of the replies that end a row of logits [positions, vocabulary]."""
    targets = torch.tensor([token for reply_ids in replies for token in reply_ids], device=logits.device)
    log_probs = logits[-len(targets) :].float().log_softmax(dim=-1)
    chosen = log_probs.gather(1, targets[:, None])[:, 0]
    greedy = log_probs.argmax(dim=-1) == targets
    lengths = [len(reply_ids) for reply_ids in replies]
    return [(float(c.sum()), bool(g.all())) for c, g in zip(chosen.split(lengths), greedy.split(lengths), strict=True)]


def _context_ids(tokenizer: PreTrainedTokenizerBase, context: str) -> list[int]:
    """`encode_prompt` of an already rendered prompt."""
    return tokenizer(context, add_special_tokens=False)["input_ids"]


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
    outcome = run_harness(documents, context.model(config.model), tokenizer, config.batch_size, max_length)
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


def window(config: EvaluationConfig) -> int:
    """Tokens that fit a prompt and a reply.

    Raises:
        UserError: neither the settings nor the model's config.json say.
    """
    own = getattr(load_config(config.model).get_text_config(), "max_position_embeddings", None)
    windows = [length for length in (config.max_length, own) if length]
    if not windows:
        raise UserError(f"--model {config.model}: its config.json names no context length; give --max_length")
    return min(windows)


def pick_device(config: EvaluationConfig) -> tuple[str, str]:
    """The device and the type of the weights, with `auto` resolved."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here; use auto or cpu")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    dtype = ("float32" if device == "cpu" else "bfloat16") if config.dtype == "auto" else config.dtype
    return device, dtype


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
        truncated += len(_context_ids(tokenizer, document["context"])) + longest > max_length + 1
    return truncated


def token_facts(tokenizer: PreTrainedTokenizerBase, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """What shows whether two evaluations saw the same tokens."""
    return {
        "end_of_turn": tokenizer.eos_token,
        "end_of_turn_id": tokenizer.eos_token_id,
        "vocabulary": len(tokenizer),
        "first_prompt_ids": _context_ids(tokenizer, documents[0]["context"])[:16],
    }


def run_harness(
    documents: list[dict[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int,
) -> dict[str, Any]:
    """Scores the documents of `held_out.add_texts` and returns lm-eval's `results` and `samples`.

    Raises:
        UserError: the device has too little memory for a batch.
    """
    tasks = TaskManager(include_defaults=False).load([task_config(documents)])
    with progress(total=CHOICES * len(documents), desc="scoring", unit="replies") as bar:
        lm = ConversationLM(model, tokenizer, batch_size, max_length, bar)
        try:
            # lm-eval draws bars of its own; ours was made before and keeps the real stream.
            with contextlib.redirect_stderr(io.StringIO()):
                return evaluate(lm, tasks)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory with batch_size = {batch_size}; give a smaller --batch_size") from error
