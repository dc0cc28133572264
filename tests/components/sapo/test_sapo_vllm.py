"""SAPO with vLLM as its sampler: pushes that are proven, overlap that is exact, resume. Skipped where vLLM is not installed."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from small_run import SMALL
from transformers import LlamaConfig, LlamaForCausalLM

from components.common.core.conversations import read_rows
from components.common.generation.hf import HFSampler
from components.common.generation.protocol import SamplingSettings
from components.common.generation.vllm import WrongWeights
from components.common.models.loading import load_tokenizer
from components.common.training.stop import StopCallback, StopRequest
from components.sapo.config import SAPOConfig
from components.sapo.schedule import Sync
from components.sapo.trainer import SAPOTrainer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")]

SETTINGS = SMALL | {"sampler": "vllm", "learning_rate": 3e-3, "ema_interval": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, micro_model):
    """The micro model with heads of 32, which vLLM's CPU kernels have."""
    path, tokenizer = tmp_path_factory.mktemp("vllm") / "model", load_tokenizer(str(micro_model))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def trainer(directory, chat_data):
    def build(output, **settings) -> SAPOTrainer:
        args = SAPOConfig(output_dir=str(output), **(SETTINGS | settings))
        return SAPOTrainer(str(directory), args, read_rows(chat_data, "train"))

    return build


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def entries(run: SAPOTrainer) -> list[tuple]:
    return [(e.row, e.segment, e.replacement.tolist(), e.step, e.version) for e in run.buffer._entries]


def test_the_engine_serves_the_ema_after_training(trainer, tmp_path):
    run = trainer(tmp_path, temperature=0.0)
    before = weights(run.weights.ema_model).clone()
    run.train()
    assert run.sampler.version == run.weights.ema.version == 6
    assert (weights(run.weights.ema_model) - before).norm() > 0.01 * before.norm()
    prompts = [run.train_dataset[i]["prompt_ids"] for i in range(4)]
    greedy = SamplingSettings(0.0, 0, 1.0, run.stop_ids)
    expected = HFSampler(run.weights.ema_model, greedy, run.scorer.pad_id).generate(prompts, [8] * 4, [0] * 4)
    assert run.sampler.generate(prompts, [8] * 4, [0] * 4) == expected


def test_a_push_of_other_weights_stops_the_run(trainer, tmp_path, monkeypatch):
    run = trainer(tmp_path)
    load = run.sampler._load
    run.sampler._load = lambda pushed: load((name, 1.5 * tensor) for name, tensor in pushed)
    with pytest.raises(WrongWeights, match="the log-prob of canary token"):
        run.train()
    assert run.state.global_step == 1


class OneStepEarly(Sync):
    def entries(self, step):
        now = self.generate(step, step) if self.ahead is None else self.ahead
        self.ahead = self.generate(step + 1, step)
        return now


def test_overlap_is_sync_shifted_by_one_step(trainer, tmp_path):
    overlap, by_hand = trainer(tmp_path / "a", schedule="overlap"), trainer(tmp_path / "b")
    by_hand.sampling.schedule = OneStepEarly(by_hand.sampling.generate, by_hand.clock)
    for run in (overlap, by_hand):
        run.train()
    assert entries(overlap) == entries(by_hand)
    assert torch.equal(weights(overlap.model), weights(by_hand.model))


def test_overlap_resumes_to_the_same_weights(trainer, tmp_path):
    whole = trainer(tmp_path / "whole", schedule="overlap")
    whole.train()
    cut = trainer(tmp_path / "cut", schedule="overlap", save_strategy="steps", save_steps=4)
    request, after_step = StopRequest(), cut.after_step
    cut.add_callback(StopCallback(request))

    def stop_at_four():
        after_step()
        request.requested = cut.state.global_step == 4

    cut.after_step = stop_at_four
    cut.train()
    resumed = trainer(tmp_path / "cut", schedule="overlap", save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert entries(resumed) == entries(whole)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert torch.equal(weights(resumed.weights.ema_model), weights(whole.weights.ema_model))


def test_a_request_does_not_depend_on_its_batch(trainer, tmp_path):
    run = trainer(tmp_path)
    together = run.sampling.generate(0, 0)
    apart = [entry for entry in together if entry.row == together[0].row]
    rows = run.sampling.order
    run.sampling.order = type("One", (), {"at": lambda self, step: rows.at(0)[:1], "epoch_of": lambda self, step: 0})()
    alone = run.sampler.generate
    prompts = []
    run.sampler.generate = lambda *arguments: prompts.append(arguments) or alone(*arguments)
    again = run.sampling.generate(0, 0)
    assert len(prompts[0][0]) == len(again) == 1
    assert np.array_equal(again[0].replacement, apart[0].replacement)
