"""The loss that the stage trains with: on response tokens only, and packed samples do not see each other."""

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

from components.common.models.loading import load_model, load_tokenizer
from components.common.training.steps import steps_of_run
from components.sft.config import SFTSettings
from components.sft.stage import ResponseSFTTrainer, count_sequences

LENGTHS = [(3, 9), (5, 4), (2, 17), (6, 6), (4, 12)]  # prompt, response


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 300, (p + r,), generator=generator).tolist() for p, r in LENGTHS]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": [[0] * p + [1] * r for p, r in LENGTHS]})


def settings(tmp_path, **changes):
    options = {"max_length": 32, "packing": True, "per_device_train_batch_size": 2, "bf16": False, "use_cpu": True}
    return SFTSettings(output_dir=str(tmp_path), report_to="none", **(options | changes))


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradients_equal_those_of_the_responses_one_by_one(packing, rows, micro_model, tmp_path):
    tokenizer = load_tokenizer(str(micro_model))
    model = load_model(str(micro_model), torch.float32, attn_implementation="sdpa")
    args = settings(tmp_path, packing=packing, per_device_train_batch_size=8)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    (batch,) = trainer.get_train_dataloader()
    if packing:
        assert batch["input_ids"].shape == (1, sum(p + r for p, r in LENGTHS))  # no padding
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    packed = torch.cat([p.grad.flatten() for p in model.parameters()])

    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        mask = torch.tensor(row["completion_mask"])[1:].bool()
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        total = total - logps[mask].sum()
    mean = total / sum(r for _, r in LENGTHS)
    mean.backward()
    assert loss.item() == pytest.approx(mean.item(), abs=1e-5)
    alone = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=1e-4)


def test_the_plan_counts_packed_rows(rows, tmp_path):
    args = settings(tmp_path, num_train_epochs=3)
    tokens = sum(p + r for p, r in LENGTHS)
    assert tokens / args.max_length <= (sequences := count_sequences(rows, args)) < len(rows)
    assert steps_of_run(sequences, args, processes=1)[0] == 3 * -(-sequences // 2)
    assert count_sequences(rows, settings(tmp_path, packing=False)) == len(rows)


@pytest.mark.parametrize("packing", [True, False])
def test_tokens_are_counted_as_trl_counts_them(packing, rows, micro_model, tmp_path):
    """Without padding, packed or not; a clock adds them up over interruptions, which TRL's counter does not."""
    args = settings(tmp_path, packing=packing, num_train_epochs=1)
    model, tokenizer = load_model(str(micro_model), torch.float32), load_tokenizer(str(micro_model))
    trainer = ResponseSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.clock.summary()["tokens/trained"] == sum(p + r for p, r in LENGTHS)
    assert trainer._total_train_tokens == sum(p + r for p, r in LENGTHS)


def test_packing_that_mixes_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="packing_strategy = wrapped: lets samples see and cut each other; use bfd"):
        settings(tmp_path, packing_strategy="wrapped")
