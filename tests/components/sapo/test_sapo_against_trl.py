"""Losses and gradients equal TRL's DPOTrainer and ORPOTrainer on the same pairs."""

import os

import numpy as np
import pytest
import torch
from datasets import Dataset

from components.common.models.loading import load_model, load_tokenizer
from components.sapo.config import SAPOConfig
from components.sapo.replay_buffer import Entry
from components.sapo.segments import Rejected, Segment
from components.sapo.trainer import SAPOTrainer, _Pair

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

PROMPT, CHOSEN, REJECTED = [5, 6, 7, 8, 9], [30, 31, 32, 33], [30, 40, 41, 42, 43, 44]
COMMON = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}


@pytest.fixture
def models(micro_model):
    """Policy and a different reference, so that rewards are not all zero."""
    policy, reference = (load_model(str(micro_model), torch.float32) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy, reference


def our_loss(policy, reference, tmp_path, micro_model, **settings):
    """The loss that SAPOTrainer computes for the one pair."""
    tokenizer = load_tokenizer(str(micro_model))
    args = SAPOConfig(output_dir=str(tmp_path), save_strategy="no", report_to="none", use_cpu=True, **settings)
    row = {"id": "0", "prompt_ids": PROMPT, "chosen_ids": CHOSEN}
    trainer = SAPOTrainer(policy, args, [row], processing_class=tokenizer)
    if trainer.reference is not None:
        trainer.reference.load_state_dict(reference.state_dict())
    entry = Entry(0, Segment(1, 4), np.array(REJECTED[1:], dtype=np.int32), step=0, version=0)
    pairs = [_Pair(row, entry, Rejected(REJECTED, 1, 6, c_kept=False), 0)]  # type: ignore[arg-type]
    batch = trainer._collate_pairs(pairs)
    assert batch.spans is not None  # the packed form
    policy.zero_grad()
    loss, _ = trainer._pair_loss(policy, batch, pairs, [[0]])
    return loss.losses.mean()


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("loss_type", "theirs_type", "beta"), [("dpo", "sigmoid", 0.3), ("ipo", "ipo", 0.7)])
def test_dpo_and_ipo(models, tmp_path, micro_model, loss_type, theirs_type, beta):
    from trl import DPOConfig, DPOTrainer

    class Pretokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    policy, reference = models
    loss = our_loss(policy, reference, tmp_path, micro_model, loss_type=loss_type, beta=beta)
    loss.backward()
    ours = gradients(policy)

    rows = Dataset.from_list([{"prompt_ids": PROMPT, "chosen_ids": CHOSEN, "rejected_ids": REJECTED}])
    settings = {"loss_type": [theirs_type], "beta": beta, "max_length": None, "per_device_train_batch_size": 1}
    args = DPOConfig(output_dir=str(tmp_path), **settings, **COMMON)
    trainer = Pretokenised(
        policy, reference, args, train_dataset=rows, processing_class=load_tokenizer(str(micro_model))
    )
    batch = next(iter(trainer.get_train_dataloader()))
    policy.zero_grad()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    torch.testing.assert_close(ours, gradients(policy), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.05, 1.0])
def test_orpo(models, tmp_path, micro_model, weight):
    """TRL's L_SFT runs over prompt and response: `nll_scope: sequence`."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy, reference = models
    settings = {"loss_type": "orpo", "orpo_lambda": weight, "nll_scope": "sequence"}
    loss = our_loss(policy, reference, tmp_path, micro_model, **settings)
    loss.backward()
    ours = gradients(policy)

    tokenizer = load_tokenizer(str(micro_model))
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    args = ORPOConfig(output_dir=str(tmp_path), beta=weight, max_length=64, **COMMON)
    trainer = ORPOTrainer(policy, args, train_dataset=rows, processing_class=tokenizer)
    policy.zero_grad()
    theirs, _ = trainer.get_batch_loss_metrics(policy, _trl_orpo_batch(tokenizer.pad_token_id), train_eval="eval")
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    torch.testing.assert_close(ours, gradients(policy), atol=1e-5, rtol=1e-4)


def _trl_orpo_batch(pad_id: int) -> dict[str, torch.Tensor]:
    """The pair as TRL's collator gives it: padded on the right, prompt masked in the labels."""
    batch = {}
    for name, response in (("chosen", CHOSEN), ("rejected", REJECTED)):
        batch[f"{name}_input_ids"] = torch.tensor([PROMPT + response])
        batch[f"{name}_attention_mask"] = torch.ones_like(batch[f"{name}_input_ids"])
        batch[f"{name}_labels"] = torch.tensor([[-100] * len(PROMPT) + response])
    return batch
