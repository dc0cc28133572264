"""LoRA on a base in 4 bits: it stays byte for byte, gradients pass it, and what is written is exact again."""

import pytest
import torch
from small_run import SMALL

from components.common.core.conversations import read_rows
from components.common.kernels.pair_logps import response_logps
from components.common.kernels.pair_packing import PairIds, collate
from components.common.models.loading import load_model
from components.sapo.config import SAPOConfig
from components.sapo.lora import load_policy
from components.sapo.planning import memory
from components.sapo.trainer import SAPOTrainer

functional = pytest.importorskip("bitsandbytes.functional")
nn = pytest.importorskip("bitsandbytes.nn")

SETTINGS = SMALL | {"use_peft": True, "load_in_4bit": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2}
SETTINGS |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "reference_interval": 3}
PAIRS = [PairIds([5, 6, 7], [8, 9, 10, 11], [8, 9, 12]), PairIds([20, 21], [22, 23], [24, 25, 26, 27])]


@pytest.fixture
def trainer(micro_model, chat_data, tmp_path):
    def build(output=None, **settings) -> SAPOTrainer:
        args = SAPOConfig(output_dir=str(output or tmp_path), **(SETTINGS | settings))
        return SAPOTrainer(str(micro_model), args, read_rows(chat_data, "train"), read_rows(chat_data, "test")[:4])

    return build


def quantised(model) -> dict[str, nn.Linear4bit]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear4bit)}


def stored(model) -> dict[str, torch.Tensor]:
    """Everything of the base that lies in memory: packed weights with their scales, embeddings and norms."""
    found = {name: weight for name, weight in model.named_parameters() if ".lora_" not in name}
    for name, layer in quantised(model).items():
        state = layer.weight.quant_state
        scales = {"absmax": state.absmax, "scales_of_absmax": state.state2.absmax, "offset": state.offset}
        found |= {f"{name}.{kind}": tensor for kind, tensor in scales.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def clones(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [part.clone() for part in parts]


@pytest.mark.parametrize(("loss", "bf16"), [("dpo", False), ("orpo", True)])
def test_the_adapter_is_trained_and_averaged_and_the_base_stays(trainer, loss, bf16):
    """EMA after updates at steps 2, 4, 6 with alpha 0.5, by hand from the adapter's weights."""
    run = trainer(loss_type=loss, bf16=bf16, gradient_checkpointing=bf16)
    assert len(quantised(run.policy)) == 2 * 7
    before, seen = stored(run.policy), [clones(run.weights.layout.parts())]
    after_step = run.after_step

    def remember() -> None:
        seen.append(clones(run.weights.layout.parts()))
        after_step()

    run.after_step = remember
    run.train()
    after = stored(run.policy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for i, name in enumerate(run.weights.layout.names):
        expected = seen[0][i]
        for step in (2, 4, 6):
            expected = 0.5 * expected + 0.5 * seen[step][i]
        torch.testing.assert_close(run.weights.ema.average[i], expected, atol=1e-7, rtol=1e-6, msg=name)
        assert not torch.equal(seen[0][i], seen[-1][i]), name  # every layer got a gradient


def test_packed_pairs_are_the_padded_ones_and_generating_changes_nothing(trainer):
    """Log-probs and gradients, before and after the model has generated in eval mode."""
    run = trainer()
    run.train()
    with torch.no_grad():
        for part in run.weights.layout.parts():
            part.normal_(std=0.1)
    padded = scored(run, share=False)
    packed = scored(run, share=True)
    run.sampling.generate(0, 0)
    again = scored(run, share=True)
    for name in padded:
        torch.testing.assert_close(packed[name], padded[name], atol=2e-6, rtol=1e-5, msg=name)
        assert torch.equal(packed[name], again[name]), name
    assert all(packed[name].abs().max() > 0 for name in packed)


def scored(run: SAPOTrainer, share: bool) -> dict[str, torch.Tensor]:
    """Log-probs of two pairs, and the gradient of their weighted sum with respect to each part of the adapter."""
    run.policy.zero_grad()
    logps = response_logps(run.policy, collate(PAIRS, 0, share=share))
    (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in run.policy.named_parameters() if p.requires_grad}
    return {"logps": logps.detach(), **gradients}


@pytest.mark.slow
def test_resumed_equals_uninterrupted(trainer, tmp_path):
    whole, saving = trainer(tmp_path / "whole"), {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    whole.train()
    trainer(tmp_path / "cut", **saving).train()
    resumed = trainer(tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for mine, theirs in (
        (resumed.weights.layout.parts(), whole.weights.layout.parts()),
        (resumed.weights.ema.average, whole.weights.ema.average),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_what_is_written_is_the_exact_base_with_the_adapter(trainer, micro_model, tmp_path):
    """Not the base as it was rounded to 4 bits."""
    run = trainer()
    run.train()
    run.save_trained(tmp_path / "merged")
    merged, base = (load_model(str(place), torch.float32) for place in (tmp_path / "merged", micro_model))
    assert not hasattr(merged.config, "quantization_config")
    weights, deltas = dict(base.named_parameters()), 0
    for name, weight in merged.named_parameters():
        layer = run.policy.get_submodule(name.rpartition(".")[0])
        delta = layer.get_delta_weight("default") if hasattr(layer, "get_delta_weight") else 0.0
        deltas += hasattr(layer, "get_delta_weight")
        torch.testing.assert_close(weight, weights[name] + delta, atol=1e-6, rtol=1e-5, msg=name)
    assert deltas == len(quantised(run.policy))


def test_an_adapter_alone_is_written_and_taken_up(trainer, micro_model, tmp_path):
    run = trainer(merge_adapter=False)
    run.train()
    run.save_trained(tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = trainer(lora_adapter=str(tmp_path / "adapter"))
    assert all(torch.equal(a, b) for a, b in zip(run.weights.layout.parts(), again.weights.layout.parts(), strict=True))
    torch.testing.assert_close(scored(again, share=True)["logps"], scored(run, share=True)["logps"])


def test_a_base_that_is_not_in_4_bits_is_refused(trainer, micro_model, chat_data, tmp_path):
    args = SAPOConfig(output_dir=str(tmp_path), **SETTINGS)
    tokenizer = trainer().processing_class
    with pytest.raises(ValueError, match="load_in_4bit: the model is not in 4 bits; give its directory"):
        SAPOTrainer(load_model(str(micro_model)), args, read_rows(chat_data, "train"), processing_class=tokenizer)
    load_policy(str(micro_model), args)


def test_planned_bytes_are_what_a_layer_takes():
    layer = nn.Params4bit(torch.randn(4096, 1024), quant_type="nf4", compress_statistics=True).to("cpu")
    state = layer.quant_state
    taken = sum(t.numel() * t.element_size() for t in (layer.data, state.absmax, state.state2.absmax))
    assert taken / (4096 * 1024) == pytest.approx(memory.BITS4, rel=1e-6)
    assert functional.dequantize_4bit(layer.data, state).shape == (4096, 1024)
