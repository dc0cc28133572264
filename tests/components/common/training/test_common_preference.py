"""Pairs are tokenised like every other stage's rows, and TRL is fed exactly these tokens."""

import pytest
import torch

from components.common.core.errors import UserError
from components.common.models.chat_templates import encode_rows
from components.common.models.loading import load_model, load_tokenizer
from components.common.training.preference import DPOSettings, ORPOSettings, encode_pairs, preference_trainer
from tests.conftest import chat_rows

LOSSES = {"dpo": DPOSettings, "orpo": ORPOSettings}


@pytest.fixture
def tokenizer(micro_model):
    return load_tokenizer(str(micro_model))


def paired_rows(count: int) -> list[dict]:
    """Rows whose rejected response is another row's, longer by some words."""
    rows = chat_rows(count)
    for i, row in enumerate(rows):
        other = rows[(i + 5) % count]["chosen"][0]["content"]
        row["rejected"] = [{"role": "assistant", "content": f"{other} That is all I can say about it."}]
    return rows


def make_trainer(loss, micro_model, tokenizer, tmp_path, pairs, **settings):
    options = {"bf16": False, "use_cpu": True, "report_to": "none", "max_length": 96} | settings
    args = LOSSES[loss](output_dir=str(tmp_path), **options)
    model = load_model(str(micro_model), torch.float32)
    reference = load_model(str(micro_model), torch.float32) if loss == "dpo" else None
    return preference_trainer(loss, model, reference, args, pairs, None, tokenizer)


def test_tokens_are_those_of_encode_rows(tokenizer):
    rows = paired_rows(8)
    pairs, dropped = encode_pairs(tokenizer, rows, 64, 96)
    chosen, _ = encode_rows(tokenizer, rows, 64, 96)
    assert dropped == 0
    assert [{k: v for k, v in pair.items() if k != "rejected_ids"} for pair in pairs] == chosen
    for row, pair in zip(rows, pairs, strict=True):
        assert tokenizer.decode(pair["rejected_ids"]) == row["rejected"][0]["content"] + tokenizer.eos_token
        for ids in (pair["chosen_ids"], pair["rejected_ids"]):
            assert ids.count(tokenizer.eos_token_id) == 1


def test_only_what_exceeds_the_window_is_cut(tokenizer):
    rows = paired_rows(4)
    whole, _ = encode_pairs(tokenizer, rows, 64, 512)
    window = len(whole[0]["prompt_ids"]) + len(whole[0]["chosen_ids"])
    cut = encode_pairs(tokenizer, rows, 64, window)[0][0]
    assert cut["chosen_ids"] == whole[0]["chosen_ids"]  # fits to the token
    assert cut["rejected_ids"] == whole[0]["rejected_ids"][: len(cut["chosen_ids"])]
    assert tokenizer.eos_token_id not in cut["rejected_ids"]  # it did not end


def test_rows_with_long_prompts_are_dropped_whole(tokenizer):
    rows = paired_rows(6)
    rows[2]["prompt"][0]["content"] *= 20
    pairs, dropped = encode_pairs(tokenizer, rows, 64, 96)
    assert dropped == 1
    assert [pair["id"] for pair in pairs] == ["row-0", "row-1", "row-3", "row-4", "row-5"]


def test_a_row_without_rejected_is_named(tokenizer):
    rows = paired_rows(4)
    del rows[2]["rejected"]
    with pytest.raises(UserError, match=r"row row-2: has no `rejected` response; .*--rejected other_conversation"):
        encode_pairs(tokenizer, rows, 64, 96)


@pytest.mark.parametrize("loss", LOSSES)
def test_trl_sees_our_tokens_and_nothing_else(loss, micro_model, tokenizer, tmp_path):
    pairs, _ = encode_pairs(tokenizer, paired_rows(4), 64, 96)
    trainer = make_trainer(loss, micro_model, tokenizer, tmp_path, pairs, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    if loss == "orpo":
        batch = trainer.concatenated_inputs(batch, padding_value=tokenizer.pad_token_id)
        batch = {k.removeprefix("concatenated_"): v for k, v in batch.items()}
        batch["completion_mask"] = (batch["labels"] != -100).long()
    seen = set()
    for ids, real, response in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        tokens = ids[real.bool()].tolist()
        seen.add((tuple(tokens), tuple(ids[response.bool()].tolist())))
    expected = {(tuple(p["prompt_ids"] + p[k]), tuple(p[k])) for p in pairs for k in ("chosen_ids", "rejected_ids")}
    assert seen == expected


@pytest.mark.parametrize("loss", LOSSES)
def test_a_pair_longer_than_the_window_is_refused_not_cut(loss, micro_model, tokenizer, tmp_path):
    pairs, _ = encode_pairs(tokenizer, paired_rows(2), 64, 96)
    with pytest.raises(ValueError, match=r"pair row-0: \d+ tokens, max_length is 20"):
        make_trainer(loss, micro_model, tokenizer, tmp_path, pairs, max_length=20)


@pytest.mark.parametrize("loss", LOSSES)
def test_tokens_are_counted_without_padding(loss, micro_model, tokenizer, tmp_path):
    pairs, _ = encode_pairs(tokenizer, paired_rows(6), 64, 96)
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}
    trainer = make_trainer(loss, micro_model, tokenizer, tmp_path, pairs, **settings)
    trainer.train()
    lengths = (2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
    assert trainer.clock.summary() == {"tokens/trained": 2 * sum(lengths)}


def test_dpo_needs_a_reference_and_orpo_has_none(micro_model, tokenizer, tmp_path):
    model = load_model(str(micro_model), torch.float32)
    for loss, reference in (("dpo", None), ("orpo", model)):
        args = LOSSES[loss](output_dir=str(tmp_path), bf16=False, report_to="none")
        with pytest.raises(ValueError, match="DPO needs a reference model, ORPO has none"):
            preference_trainer(loss, model, reference, args, [], None, tokenizer)


@pytest.mark.parametrize("settings", LOSSES.values())
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta = 0.0: must be above 0"),
        ({"max_length": None}, "max_length = None: must be 2 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps = 0: must be 1 or more"),
        ({"save_total_limit": 0}, "save_total_limit = 0: must be 1 or more, or none"),
    ],
)
def test_values_that_cannot_work_are_refused(settings, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings(output_dir=str(tmp_path), report_to="none", **change)


def test_defaults_are_ours_where_trl_differs_from_transformers(tmp_path):
    for settings in LOSSES.values():
        args = settings(output_dir=str(tmp_path), bf16=False, report_to="none")
        assert (args.gradient_checkpointing, args.bf16, args.max_length, args.seed) == (False, False, 2048, 42)
        assert args.disable_dropout and args.remove_unused_columns is (settings is DPOSettings)
