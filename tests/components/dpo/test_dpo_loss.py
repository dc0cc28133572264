"""The loss that the stage trains with equals ours, DPO's and IPO's, on log-probs from a plain forward pass."""

from types import SimpleNamespace

import pytest
import torch

from components.common.models.loading import load_model, load_tokenizer
from components.common.training.preference import DPOSettings, preference_trainer
from components.sapo.losses import LOSSES, PairLogps

PAIRS = [
    {"prompt_ids": [5, 6, 7, 8, 9], "chosen_ids": [30, 31, 32, 33], "rejected_ids": [40, 41, 42, 43, 44, 45]},
    {"prompt_ids": [11, 12], "chosen_ids": [50, 51, 52, 53, 54], "rejected_ids": [50, 60]},
]


@torch.no_grad()
def summed_logp(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """One unpadded sequence, full logits."""
    ids = torch.tensor([prompt + response])
    logps = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


@pytest.mark.parametrize(("loss_type", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_equals_our_loss(micro_model, tmp_path, loss_type, theirs):
    policy, reference = (load_model(str(micro_model), torch.float32) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    logps = {
        (model, name): torch.stack([summed_logp(model, p["prompt_ids"], p[f"{name}_ids"]) for p in PAIRS])
        for model in (policy, reference)
        for name in ("chosen", "rejected")
    }
    tokens = [torch.tensor([len(pair[f"{name}_ids"]) for pair in PAIRS]) for name in ("chosen", "rejected")]
    of_policy, of_reference = ([logps[model, name] for name in ("chosen", "rejected")] for model in (policy, reference))
    expected = LOSSES[loss_type].function(PairLogps(*of_policy, *tokens, *of_reference), SimpleNamespace(beta=0.3))

    settings = {"loss_type": [theirs], "bf16": False, "use_cpu": True, "report_to": "none"}
    args = DPOSettings(output_dir=str(tmp_path), beta=0.3, **settings)
    tokenizer = load_tokenizer(str(micro_model))
    trainer = preference_trainer("dpo", policy, reference, args, PAIRS, None, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected.losses.mean().item(), abs=1e-5)
    if loss_type == "ipo":
        return  # TRL's rewards are sums there too
    margin = (expected.chosen_rewards - expected.rejected_rewards).mean().item()
    assert trainer._metrics["eval"]["rewards/margins"][-1] == pytest.approx(margin, abs=1e-5)
    assert abs(margin) > 1e-3
