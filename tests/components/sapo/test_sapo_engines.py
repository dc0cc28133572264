"""An engine is an entry: SAPO trains with one that it has never heard of, and asks for what it can do."""

import pytest
import torch
from small_run import SMALL

from components.common.core.conversations import read_rows
from components.common.generation.engines import ENGINES
from components.sapo.config import SAPOConfig
from components.sapo.trainer import SAPOTrainer

SETTINGS = SMALL | {"max_steps": 4, "learning_rate": 1e-3, "ema_interval": 1}


@pytest.fixture
def trainer(tmp_path, micro_model, chat_data):
    def build(**settings) -> SAPOTrainer:
        args = SAPOConfig(output_dir=str(tmp_path / "log"), **(SETTINGS | settings))
        return SAPOTrainer(str(micro_model), args, read_rows(chat_data, "train"), read_rows(chat_data, "test")[:4])

    return build


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("settings", [{}, {"on_policy": True}, {"push_interval": 2}, {"use_peft": True}])
def test_a_third_engine_trains_as_the_first_does(trainer, third_engine, settings):
    theirs, ours = trainer(sampler="third", **settings), trainer(**settings)
    for run in (theirs, ours):
        run.train()

    (engine,) = third_engine
    assert theirs.sampler is engine
    b_prime = [[entry.replacement.tolist() for entry in run.buffer._entries] for run in (theirs, ours)]
    assert b_prime[0] == b_prime[1]
    torch.testing.assert_close(weights(theirs.model), weights(ours.model), atol=1e-5, rtol=1e-4)

    # What it read from the directory is proven once, and then every push.
    pushes = 4 // settings.get("push_interval", 1)
    assert engine.proofs == 1 + pushes


def test_what_an_engine_can_do_decides_what_is_refused(tmp_path, third_engine):
    def config(**settings) -> SAPOConfig:
        return SAPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)

    # It has weights of its own, so it may sample while the policy trains; it has no base in 4 bits.
    assert config(sampler="third", on_policy=True, schedule="overlap").engine is ENGINES["third"]
    with pytest.raises(ValueError, match="sampler = 'third': third has no 4-bit base to put an adapter on: use hf"):
        config(sampler="third", use_peft=True, load_in_4bit=True)
