"""A run of SPIN on the micro model, in memory: what the tests interrupt, resume and compare."""

import json
import random
from pathlib import Path

import pytest
import torch

from components.common.core.conversations import read_rows
from components.common.models.chat_templates import encode_rows
from components.common.models.loading import load_tokenizer
from components.common.training.clock import Clock
from components.common.training.stop import StopRequest
from components.spin.config import SPINSettings
from components.spin.files import RunFiles
from components.spin.inputs import SPINInputs
from components.spin.iterations import SPINRun

SMALL = {
    "iterations": 2,
    "learning_rates": [1e-3, 5e-4],
    "betas": [0.1, 0.5],
    "orpo_lambdas": [0.1, 0.2],
    "epochs_per_iteration": 2.0,
    "max_length": 96,
    "max_new_tokens": 8,
    "sampler_batch_size": 5,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
}
ROWS = 12  # 3 steps an epoch of the first iteration, 6 of the second: 6 and 12 steps


@pytest.fixture
def settings():
    def make(**changed) -> SPINSettings:
        return SPINSettings(**(SMALL | changed))

    return make


@pytest.fixture
def build(micro_model, chat_data, settings):
    """A run in a directory, as a process of the stage makes it."""

    def make(directory: Path, held_out: int = 0, **changed) -> SPINRun:
        torch.manual_seed(random.randrange(2**31))  # a new process would not start with equal random states
        config = settings(**changed)
        tokenizer = load_tokenizer(str(micro_model))
        rows = encode_rows(tokenizer, read_rows(chat_data, "train")[:ROWS], 64, config.max_length)[0]
        others = encode_rows(tokenizer, read_rows(chat_data, "test"), 64, config.max_length)[0][:held_out]
        files = RunFiles(directory)
        files.root.mkdir(parents=True, exist_ok=True)
        clock = Clock()
        if files.clock.exists():
            clock.load_state_dict(json.loads(files.clock.read_text()))
        inputs = SPINInputs(str(micro_model), tokenizer, rows, others, config, files, directory / "training")
        return SPINRun(inputs, clock, StopRequest())

    return make
