"""Chat templates, and the one way in which conversations become tokens.

Every stage that trains or scores goes through `encode_prompt` and `encode_response`, so that SFT, SAPO and evaluation see
the same tokens: the prompt ends with the template's generation prompt, the response with exactly one end-of-turn token
(`tokenizer.eos_token`), and nothing follows it.
"""

from typing import TYPE_CHECKING, Any, TypedDict

from components.common.core.conversations import Message, Row
from components.common.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BODY = {
    # The paper's DPO-based and LLaMA runs (appendix B).
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The paper's ORPO-based Mistral runs: appendix B calls it Vicuna, its text is Zephyr's.
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}


class EncodedRow(TypedDict):
    """A row as token ids: the prompt with the assistant's header, and the response with its end-of-turn token."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]


def chat_template(name: str, with_bos: bool) -> str:
    """The Jinja text of a template; `with_bos` opens it with the tokenizer's beginning-of-sequence token."""
    return ("{{ bos_token }}" if with_bos else "") + _BODY[name]


def new_tokens(name: str) -> list[str]:
    """Special tokens that a template needs in the vocabulary."""
    return ["<|im_start|>", "<|im_end|>"] if name == "chatml" else []


def end_of_turn(name: str) -> str | None:
    """The token that ends a turn; None where it is the tokenizer's own end of sequence."""
    return "<|im_end|>" if name == "chatml" else None


def require_chat_template(tokenizer: "PreTrainedTokenizerBase", model: str) -> None:
    """Raises UserError when a tokenizer cannot render conversations."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{model}: its tokenizer has no chat template; run the model stage with --chat_template chatml")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model}: its tokenizer has no eos_token, so a response could never end")


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: list[Message]) -> list[int]:
    """Token ids of a prompt, ending with the header of the assistant's turn."""
    messages: list[Any] = list(prompt)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: "PreTrainedTokenizerBase", content: str) -> list[int]:
    """Token ids of a response, ending with exactly one end-of-turn token."""
    return [*tokenizer(content, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode_rows(
    tokenizer: "PreTrainedTokenizerBase", rows: list[Row], max_prompt_length: int, max_length: int
) -> tuple[list[EncodedRow], int]:
    """Tokenises rows within the window of the paper (section 5.1).

    A row whose prompt reaches `max_prompt_length` tokens is dropped; a response is cut to what the window leaves, and then
    has no end-of-turn token, because it did not end.

    Returns:
        the rows, and how many were dropped.

    Raises:
        UserError: no row is left.
    """
    encoded: list[EncodedRow] = []
    for row in rows:
        prompt_ids = encode_prompt(tokenizer, row["prompt"])
        if len(prompt_ids) < max_prompt_length:
            chosen_ids = encode_response(tokenizer, row["chosen"][0]["content"])[: max_length - len(prompt_ids)]
            encoded.append({"id": row["id"], "prompt_ids": prompt_ids, "chosen_ids": chosen_ids})
    if not encoded:
        raise UserError(f"every prompt has {max_prompt_length} tokens or more; raise max_prompt_length")
    return encoded, len(rows) - len(encoded)
