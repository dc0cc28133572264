"""Losses and gradients equal TRL's DPOTrainer and ORPOTrainer on the same pairs."""

import os

import pytest
import torch
from datasets import Dataset

from components.common.models.loading import load_model, load_tokenizer
from components.sapo.config import SAPOConfig
from components.sapo.pairs import MicroBatch, Pair
from components.sapo.segments import Segment
from components.sapo.trainer import SAPOTrainer

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
    if trainer.weights.reference is not None:
        trainer.weights.reference.load_state_dict(reference.state_dict())
    pair = Pair(PROMPT, CHOSEN, REJECTED, "0", 0, Segment(1, 4), Segment(1, 6), c_kept=False, step=0, version=0)
    micro_batch = MicroBatch([pair], trainer.scorer.collate([pair]), [[0]])
    assert micro_batch.batch.spans is not None  # the packed form
    policy.zero_grad()
    return trainer.compute_loss(policy, {"micro_batch": micro_batch})


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


EPS, ALPHA = 0.2, 0.7  # cDPO is 2 (1 - eps) sigmoid - (1 - 2 eps) robust


@pytest.mark.parametrize(
    ("loss_type", "ours", "theirs"),
    [
        ("dpo", {"beta": 0.3}, {"loss_type": ["sigmoid"]}),
        ("ipo", {"beta": 0.7}, {"loss_type": ["ipo"]}),
        ("rpo", {"beta": 0.3, "nll_weight": ALPHA}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, ALPHA]}),
        (
            "cdpo",
            {"beta": 0.3, "label_smoothing": EPS},
            {
                "loss_type": ["sigmoid", "robust"],
                "loss_weights": [2 * (1 - EPS), -(1 - 2 * EPS)],
                "label_smoothing": EPS,
            },
        ),
    ],
)
def test_losses_with_a_reference(models, tmp_path, micro_model, loss_type, ours, theirs):
    from trl import DPOConfig, DPOTrainer

    class Pretokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    policy, reference = models
    loss = our_loss(policy, reference, tmp_path, micro_model, loss_type=loss_type, **ours)
    loss.backward()
    our_gradients = gradients(policy)

    rows = Dataset.from_list([{"prompt_ids": PROMPT, "chosen_ids": CHOSEN, "rejected_ids": REJECTED}])
    settings = theirs | {"beta": ours["beta"], "max_length": None, "per_device_train_batch_size": 1}
    args = DPOConfig(output_dir=str(tmp_path), **settings, **COMMON)
    trainer = Pretokenised(
        policy, reference, args, train_dataset=rows, processing_class=load_tokenizer(str(micro_model))
    )
    batch = next(iter(trainer.get_train_dataloader()))
    policy.zero_grad()
    their_loss = trainer.compute_loss(trainer.model, batch)
    their_loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    torch.testing.assert_close(our_gradients, gradients(policy), atol=1e-5, rtol=1e-4)


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


def test_simpo(models, tmp_path, micro_model):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    policy, reference = models
    settings = {"beta": 2.0, "simpo_gamma": 0.7}
    loss = our_loss(policy, reference, tmp_path, micro_model, loss_type="simpo", **settings)
    loss.backward()
    ours = gradients(policy)

    tokenizer = load_tokenizer(str(micro_model))
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    args = CPOConfig(output_dir=str(tmp_path), loss_type="simpo", cpo_alpha=0.0, max_length=64, **settings, **COMMON)
    trainer = CPOTrainer(policy, args, train_dataset=rows, processing_class=tokenizer)
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
