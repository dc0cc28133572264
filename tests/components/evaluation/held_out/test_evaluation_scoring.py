"""Tokens and log-likelihoods against training's encoding, plain torch, and lm-eval's own HFLM."""

from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from components.common.core.conversations import read_rows
from components.common.models.chat_templates import encode_prompt, encode_response
from components.common.models.loading import load_model, load_tokenizer
from components.evaluation.held_out.benchmark import count_truncated, fitting_rows
from components.evaluation.held_out.scoring import ConversationLM, pack, tree_mask
from components.evaluation.held_out.task import add_texts, choose_replies

WINDOW = 512


@pytest.fixture(scope="module")
def lm(micro_model: Path) -> ConversationLM:
    model = load_model(str(micro_model), torch.float32, attn_implementation="sdpa").eval()
    # Random weights hardly tell positions or tokens apart; larger ones make a wrong mask or order visible.
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 8 * (parameter.ndim == 2))
    return ConversationLM(model, load_tokenizer(str(micro_model)), batch_size=3, max_length=WINDOW)


@pytest.fixture(scope="module")
def requests(lm: ConversationLM, chat_data: Path) -> list:
    """Requests as HFLM makes them; prompts of different lengths, the last with a single reply."""
    rows = read_rows(chat_data, "test")
    for number, row in enumerate(rows):
        row["prompt"][0]["content"] += " and more" * (number % 5)
    documents = add_texts(choose_replies(rows, 6, seed=1), lm.tokenizer)
    pairs = [(document["context"], choice) for document in documents for choice in document["choices"]]
    return [(pair, *lm._encode_pair(*pair)) for pair in [*pairs, ("Another prompt", "and one reply")]]


def direct(lm: ConversationLM, context: list[int], reply: list[int]) -> float:
    """Log-likelihood of one reply, by torch alone."""
    with torch.no_grad():
        log_probs = lm.model(torch.tensor([context + reply])).logits[0].log_softmax(-1)
    return sum(log_probs[len(context) + i - 1, token].item() for i, token in enumerate(reply))


def test_tokens_are_those_of_training(lm: ConversationLM, chat_data: Path):
    rows = read_rows(chat_data, "test")
    (document,) = add_texts(choose_replies(rows, 1, seed=1), lm.tokenizer)
    reply = document["choices"][document["target"]]
    prompt_ids, reply_ids = lm._encode_pair(document["context"], reply)
    assert prompt_ids == encode_prompt(lm.tokenizer, rows[0]["prompt"])
    assert reply_ids == encode_response(lm.tokenizer, rows[0]["chosen"][0]["content"])
    assert lm.tokenizer.decode(prompt_ids).endswith("<|im_start|>assistant\n")
    assert reply_ids.count(lm.tokenizer.eos_token_id) == 1 and reply_ids[-1] == lm.tokenizer.eos_token_id
    assert document["n_tokens"] == len(reply_ids)


def test_log_likelihoods_are_those_of_plain_torch(lm: ConversationLM, requests: list):
    for (_, context, reply), (log_likelihood, _) in zip(requests, lm._loglikelihood_tokens(requests), strict=True):
        assert log_likelihood == pytest.approx(direct(lm, context, reply), rel=1e-5)


def test_scores_are_those_of_hflm(lm: ConversationLM, requests: list):
    ours, theirs = lm._loglikelihood_tokens(requests), HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)
    assert len({round(log_likelihood, 1) for log_likelihood, _ in theirs}) > 20  # replies that a mix-up would show in
    assert [a for a, _ in ours] == pytest.approx([a for a, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_a_greedy_reply_is_told(lm: ConversationLM):
    context = lm.tokenizer("a prompt")["input_ids"]
    with torch.no_grad():
        best = lm.model(torch.tensor([context])).logits[0, -1].argmax().item()
    replies = [[best], [(best + 1) % len(lm.tokenizer)]]
    answers = lm._loglikelihood_tokens([(("", ""), context, reply) for reply in replies])
    assert [greedy for _, greedy in answers] == [True, False]


def test_pack_and_mask_by_hand():
    ids, positions, segments = pack([1, 2, 3], [[7, 8, 9], [5, 9]], max_length=10)
    assert ids == [1, 2, 3, 7, 8, 3, 5]
    assert positions == [0, 1, 2, 3, 4, 2, 3]
    assert segments == [0, 0, 1, 1, 1, 2, 2]
    mask = tree_mask(torch.tensor([[-1, *segments]]))[0, 0].int().tolist()
    assert mask[0] == [1, 0, 0, 0, 0, 0, 0, 0]  # padding sees itself, so that no softmax is empty
    assert mask[2] == [0, 1, 1, 0, 0, 0, 0, 0]
    assert mask[5] == [0, 1, 1, 1, 1, 1, 0, 0]
    assert mask[7] == [0, 1, 1, 0, 0, 0, 1, 1]


def test_a_long_prompt_keeps_its_end(lm: ConversationLM):
    # Window 5 = 3 of the prompt + 2 of the reply of three; the reply's last token is no input.
    ids, _, _ = pack([1, 2, 3, 4, 5, 6], [[7, 8, 9], [5, 9]], max_length=5)
    assert ids == [4, 5, 6, 7, 8, 6, 5]
    context, reply = list(range(10, 30)), [5, 6, 7]
    short = ConversationLM(lm.model, lm.tokenizer, batch_size=2, max_length=12)
    ((log_likelihood, _),) = short._loglikelihood_tokens([(("", ""), context, reply)])
    assert log_likelihood == pytest.approx(direct(lm, context[-10:], reply), rel=1e-5)


def test_truncated_prompts_and_long_replies_are_counted(lm: ConversationLM, chat_data: Path):
    rows = read_rows(chat_data, "test")
    (document,) = add_texts(choose_replies(rows, 1, seed=1), lm.tokenizer)
    longest = max(len(encode_response(lm.tokenizer, choice)) for choice in document["choices"])
    whole = len(encode_prompt(lm.tokenizer, rows[0]["prompt"])) + longest - 1
    assert count_truncated([document], lm.tokenizer, whole) == 0
    assert count_truncated([document], lm.tokenizer, whole - 1) == 1
    length = len(encode_response(lm.tokenizer, rows[0]["chosen"][0]["content"]))
    assert rows[0] in fitting_rows(rows, lm.tokenizer, length)
    assert rows[0] not in fitting_rows(rows, lm.tokenizer, length - 1)
