"""The loss that the stage trains with equals Eq. 3 but for L_SFT, which TRL takes over prompt and response."""

from types import SimpleNamespace

import pytest
import torch

from components.common.models.loading import load_model, load_tokenizer
from components.common.training.preference import ORPOSettings, preference_trainer
from components.sapo.losses import PairLogps, orpo_loss

PAIRS = [
    {"prompt_ids": [5, 6, 7, 8, 9], "chosen_ids": [30, 31, 32, 33], "rejected_ids": [40, 41, 42, 43, 44, 45]},
    {"prompt_ids": [11, 12], "chosen_ids": [50, 51, 52, 53, 54], "rejected_ids": [50, 60]},
]


@torch.no_grad()
def token_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probs of tokens 2..n of one unpadded sequence, from full logits."""
    ids = torch.tensor([prompt + response])
    return model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)


@pytest.mark.parametrize("weight", [0.05, 1.0])
def test_equals_our_loss(weight, micro_model, tmp_path):
    policy = load_model(str(micro_model), torch.float32)
    logps = {n: [token_logps(policy, p["prompt_ids"], p[f"{n}_ids"]) for p in PAIRS] for n in ("chosen", "rejected")}
    means = [
        torch.stack([values[len(p["prompt_ids"]) - 1 :].mean() for values, p in zip(logps[n], PAIRS, strict=True)])
        for n in ("chosen", "rejected")
    ]
    over_the_batch = -torch.cat(logps["chosen"]).mean()
    ones, settings = torch.ones(len(PAIRS)), SimpleNamespace(orpo_lambda=weight)  # means, as of one token
    expected = orpo_loss(PairLogps(*means, ones, ones, sequence_nll=over_the_batch), settings).losses.mean()
    of_the_paper = orpo_loss(PairLogps(*means, ones, ones), settings).losses.mean()

    args = ORPOSettings(output_dir=str(tmp_path), beta=weight, bf16=False, use_cpu=True, report_to="none")
    trainer = preference_trainer("orpo", policy, None, args, PAIRS, None, load_tokenizer(str(micro_model)))
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(loss.item() - of_the_paper.item()) > 1e-4  # the documented difference
