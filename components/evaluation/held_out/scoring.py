"""Runs lm-eval's evaluator on a local model with the tokens of training."""

import contextlib
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

from components.common.core.errors import UserError
from components.common.core.progress import progress
from components.common.models.chat_templates import encode_response
from components.evaluation.held_out.task import CHOICES, task_config

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
        return context_ids(self.tokenizer, context), encode_response(self.tokenizer, continuation)

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


def context_ids(tokenizer: PreTrainedTokenizerBase, context: str) -> list[int]:
    """`encode_prompt` of an already rendered prompt."""
    return tokenizer(context, add_special_tokens=False)["input_ids"]


def score_documents(
    documents: list[dict[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int,
) -> dict[str, Any]:
    """Scores the documents of `task.add_texts` and returns lm-eval's `results` and `samples`.

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
