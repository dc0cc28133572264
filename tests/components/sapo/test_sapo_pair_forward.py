"""Padded, batched log-probs equal those of each sequence on its own, computed the plainest way."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from components.sapo.pair_forward import Sequence, collate, response_logps, token_logps

SEQUENCES = [
    Sequence([5, 6, 7], [8, 9]),
    Sequence([5], [8, 9, 10, 11, 12]),
    Sequence([5, 6, 7, 8, 9, 10, 11], [3]),
]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
}


def tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(family, **sizes, **heads, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).float().eval()


def test_collate_aligns_responses_in_the_last_columns():
    batch = collate(SEQUENCES[:2], pad_id=0)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7, 8, 9], [5, 8, 9, 10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert batch["response_mask"].int().tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]


def test_a_real_token_that_equals_the_padding_is_attended_to():
    """Pad and end of turn share an id in ChatML: masks go by position, never by id."""
    batch = collate([Sequence([5, 9], [8, 9]), Sequence([5], [9])], pad_id=9)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["response_mask"].int().tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_single_sequences(family):
    model = tiny(family)
    logps = response_logps(model, collate(SEQUENCES, pad_id=0))
    for row, sequence in zip(logps, SEQUENCES, strict=True):
        ids = torch.tensor([sequence.prompt_ids + sequence.response_ids])
        alone = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
        start = len(sequence.prompt_ids) - 1
        expected = [alone[start + i, token].item() for i, token in enumerate(sequence.response_ids)]
        assert row[-len(expected) :].tolist() == pytest.approx(expected, abs=2e-5)
        assert not row[: -len(expected)].any()


def test_log_probs_are_float32_even_of_bfloat16_logits():
    logits = torch.randn(3, 50, dtype=torch.bfloat16)
    logps = token_logps(logits, torch.tensor([1, 2, 3]))
    assert logps.dtype == torch.float32
    expected = torch.log_softmax(logits.double(), dim=-1)[torch.arange(3), [1, 2, 3]]
    torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=0)
