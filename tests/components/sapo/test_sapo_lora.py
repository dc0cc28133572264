"""LoRA: the base stays as it is, the EMA and the reference are adapters, and what is written is a plain model."""

import pytest
import torch
from small_run import SMALL
from transformers import LlamaConfig, LlamaForCausalLM

from components.common.core.conversations import read_rows
from components.common.core.errors import UserError
from components.common.generation.hf import HFSampler
from components.common.kernels.pair_logps import response_logps
from components.common.kernels.pair_packing import PairIds, collate
from components.common.models.loading import load_model
from components.sapo.config import SAPOConfig
from components.sapo.lora import merged_weights
from components.sapo.trainer import SAPOTrainer

SETTINGS = SMALL | {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "reference_interval": 3}


@pytest.fixture
def trainer(micro_model, chat_data, tmp_path):
    def build(output=None, **settings) -> SAPOTrainer:
        args = SAPOConfig(output_dir=str(output or tmp_path), **(SETTINGS | settings))
        return SAPOTrainer(str(micro_model), args, read_rows(chat_data, "train"))

    return build


def base_weights(run: SAPOTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in run.policy.named_parameters() if ".lora_" not in n}


def clones(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [part.clone() for part in parts]


def test_the_ema_follows_the_adapter_and_the_base_stays(trainer):
    """EMA after updates at steps 2, 4, 6 with alpha 0.5, by hand from the adapter's weights."""
    run = trainer()
    before, seen = base_weights(run), []
    after_step = run.after_step

    def remember() -> None:
        seen.append(clones(run.weights.layout.parts()))
        after_step()

    run.after_step = remember
    run.train()
    assert all(".lora_" in name for name in run.weights.layout.names)
    start = [
        torch.zeros_like(p) if ".lora_B" in n else None for n, p in zip(run.weights.layout.names, seen[0], strict=True)
    ]
    for i, name in enumerate(run.weights.layout.names):
        if start[i] is None:
            continue  # A starts at random; B at zero
        expected = start[i]
        for step in (2, 4, 6):
            expected = 0.5 * expected + 0.5 * seen[step - 1][i]
        torch.testing.assert_close(run.weights.ema.average[i], expected, atol=1e-7, rtol=1e-6, msg=name)
    assert any(part.abs().max() > 0.01 for part in run.weights.ema.average)
    after = base_weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_new_adapter_follows_from_the_seed(trainer):
    one, same, other = trainer(), trainer(), trainer(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.weights.layout.parts(), same.weights.layout.parts(), strict=True))
    assert not all(
        torch.equal(a, b) for a, b in zip(one.weights.layout.parts(), other.weights.layout.parts(), strict=True)
    )


@pytest.mark.parametrize("reference", ["ema", "policy", "fixed", "base"])
def test_the_reference_is_what_was_set(trainer, micro_model, reference):
    """Refreshed at steps 3 and 6; the base's log-probs are those of the model as it lies on disk."""
    run = trainer(reference=reference)
    run.train()
    batch = collate([PairIds([5, 6, 7], [8, 9, 10], [8, 11])], pad_id=0, share=True)
    with run.weights.reference_model() as (_, model), torch.no_grad():
        found = response_logps(model, batch)
    adapter = {"ema": run.weights.ema.average, "policy": run.weights.layout.parts()}
    if reference in adapter:
        with run.weights.layout.swapped_in(adapter[reference]), torch.no_grad():
            expected = response_logps(run.policy, batch)
        assert not torch.allclose(found, response_logps(load_model(str(micro_model), torch.float32), batch))
    else:
        expected = response_logps(load_model(str(micro_model), torch.float32), batch).detach()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_adapter_is_back_after_the_reference_was_swapped_in(trainer):
    run = trainer()
    run.train()
    before = clones(run.weights.layout.parts())
    with run.weights.reference_model():
        assert not all(torch.equal(a, b) for a, b in zip(before, run.weights.layout.parts(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights.layout.parts(), strict=True))


def test_b_prime_is_written_by_the_ema(trainer, micro_model):
    """Greedy, against a plain model with the EMA's adapter merged in."""
    run = trainer(temperature=0.0, ema_decay=0.9)
    run.train()
    plain = load_model(str(micro_model), torch.float32)
    with run.weights.layout.swapped_in(run.weights.ema.serving), torch.no_grad():
        plain.load_state_dict({name: weight.clone() for name, weight in merged_weights(run.policy)}, strict=False)
    found = run.sampling.generate(0, 0)
    run.sampler.model, run.args.use_peft = plain, False  # the same rows, by the plain model
    expected = run.sampling.generate(0, 0)
    assert [e.replacement.tolist() for e in found] == [e.replacement.tolist() for e in expected]
    run.sampling.sampler = HFSampler(run.policy, run.sampler.settings, run.scorer.pad_id)
    of_policy = run.sampling.generate(0, 0)
    assert [e.replacement.tolist() for e in found] != [e.replacement.tolist() for e in of_policy]


def test_what_is_written_is_a_plain_model(trainer, tmp_path):
    run = trainer()
    run.train()
    run.save_trained(tmp_path / "merged")
    ids = torch.arange(5, 25).unsqueeze(0)
    plain = load_model(str(tmp_path / "merged"), torch.float32)
    torch.testing.assert_close(plain(ids).logits, run.policy(ids).logits, atol=1e-5, rtol=1e-4)
    assert not any(".lora_" in name for name, _ in plain.named_parameters())


def test_an_adapter_alone_is_written_and_taken_up(trainer, tmp_path):
    run = trainer(merge_adapter=False)
    run.train()
    run.save_trained(tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = trainer(lora_adapter=str(tmp_path / "adapter"), reference="base")
    assert all(torch.equal(a, b) for a, b in zip(run.weights.layout.parts(), again.weights.layout.parts(), strict=True))


@pytest.mark.slow
def test_resumed_equals_uninterrupted(trainer, tmp_path):
    whole, saving = trainer(tmp_path / "whole"), {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    whole.train()
    trainer(tmp_path / "cut", max_steps=6, **saving).train()
    resumed = trainer(tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for mine, theirs in (
        (resumed.weights.layout.parts(), whole.weights.layout.parts()),
        (resumed.weights.ema.average, whole.weights.ema.average),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    saved = {p.name: p.stat().st_size for p in (tmp_path / "cut" / "checkpoint-3").glob("*.safetensors")}
    assert saved["policy.safetensors"] < 100_000  # the adapter's weights only


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "overlap"}, "schedule = 'overlap': hf and training share the base in turns"),
        ({"use_peft": False, "reference": "base"}, "reference = 'base': `base` is for use_peft"),
        ({"use_peft": False, "load_in_4bit": True}, "load_in_4bit = True: 4 bits cannot be trained"),
        ({"lora_r": 0}, "lora_r = 0: must be 1 or more"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        SAPOConfig(output_dir=str(tmp_path), **(SETTINGS | settings))


def test_a_missing_adapter_is_refused(trainer, tmp_path):
    with pytest.raises(UserError, match=r"lora_adapter = .*nowhere: has no adapter_config\.json"):
        trainer(lora_adapter=str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_memory_of_optimizer_ema_and_reference_at_the_size_of_smollm2(trainer, tmp_path, micro_model):
    """At least 3x less than full training; what tensors take, at SmolLM2-135M's shape with 4 of its 30 layers."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    taken = {}
    for use_peft in (False, True):
        model = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True))
        args = SAPOConfig(output_dir=str(tmp_path), **(SETTINGS | {"use_peft": use_peft, "lora_r": 16, "max_steps": 1}))
        run = SAPOTrainer(model, args, trainer().train_dataset, processing_class=trainer().processing_class)
        run.train()
        state = [value for value in run.weights.layout.optimizer_state().values() if isinstance(value, torch.Tensor)]
        kept = [*state, *run.weights.ema.average, *run.weights.reference_parts]
        taken[use_peft] = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    assert taken[False] > 3 * taken[True], taken
