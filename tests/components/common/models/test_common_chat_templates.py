"""Rendering as in appendix B of the paper, and tokens that split where prompt and response meet."""

import pytest

from components.common.core.conversations import read_rows
from components.common.core.errors import UserError
from components.common.models.chat_templates import encode_prompt, encode_response, encode_rows
from components.common.models.loading import load_tokenizer

PROMPT = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Great."},
    {"role": "user", "content": "Good."},
]


@pytest.fixture(scope="module")
def tokenizer(micro_model):
    return load_tokenizer(str(micro_model))


def test_chatml_is_the_papers(tokenizer):
    assert tokenizer.decode(encode_prompt(tokenizer, PROMPT)) == (
        "<|im_start|>user\nHow are you?<|im_end|>\n"
        "<|im_start|>assistant\nGreat.<|im_end|>\n"
        "<|im_start|>user\nGood.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_zephyr_is_the_papers(tokenizer):
    from components.common.models.chat_templates import chat_template

    text = tokenizer.apply_chat_template(
        PROMPT[:1], chat_template=chat_template("zephyr", with_bos=False), add_generation_prompt=True, tokenize=False
    )
    assert text == "<|user|>\nHow are you?" + tokenizer.eos_token + "\n<|assistant|>\n"


def test_response_ends_with_exactly_one_end_token(tokenizer):
    ids = encode_response(tokenizer, "I heard.")
    assert tokenizer.decode(ids) == "I heard.<|im_end|>"
    assert ids.count(tokenizer.eos_token_id) == 1


def test_window_cuts_responses_and_drops_prompts(tokenizer, chat_data):
    rows = read_rows(chat_data, "train")
    lengths = [len(encode_prompt(tokenizer, row["prompt"])) for row in rows]
    limit = sorted(lengths)[len(lengths) // 2]
    encoded, dropped = encode_rows(tokenizer, rows, max_prompt_length=limit, max_length=limit + 5)
    assert dropped == sum(length >= limit for length in lengths)  # a prompt that reaches the limit is dropped
    assert len(encoded) == len(rows) - dropped
    assert all(len(row["prompt_ids"]) < limit for row in encoded)
    assert all(len(row["prompt_ids"]) + len(row["chosen_ids"]) <= limit + 5 for row in encoded)


def test_no_row_left_is_an_error(tokenizer, chat_data):
    with pytest.raises(UserError, match="every prompt has 2 tokens or more; raise max_prompt_length"):
        encode_rows(tokenizer, read_rows(chat_data, "train"), 2, 100)
