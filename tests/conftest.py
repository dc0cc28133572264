"""Fixtures that several stages' tests share: a chat data set and a model small enough for seconds."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import third_engine as third
import torch

from components.common.core.conversations import Row
from components.common.generation.engines import ENGINES

# Tests use models of a few thousand parameters: one thread is fastest, and does not fight other processes for cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

gc.disable()  # until every module is imported


def pytest_collection_finish() -> None:
    """What is imported stays, so collections need not walk over it: accelerate does a full one at the start of each
    training, which took 0.4 s, half of the time of a test that trains."""
    gc.freeze()
    gc.enable()


SUBJECTS = ["my dog", "the cat", "our teacher", "her brother", "a friend", "the neighbour", "his boss", "the doctor"]
VERBS = ["likes", "wants", "found", "lost", "painted", "bought", "forgot", "cleaned"]
OBJECTS = [
    "the old car",
    "a red ball",
    "some books",
    "the garden",
    "new shoes",
    "a big house",
    "the piano",
    "fresh bread",
]


def chat_rows(count: int) -> list[Row]:
    """Distinct rows in the project's format, from word lists."""
    rows: list[Row] = []
    for i in range(count):
        subject, verb, thing = SUBJECTS[i % 8], VERBS[(i // 8) % 8], OBJECTS[(i // 3) % 8]
        rows.append(
            {
                "id": f"row-{i}",
                "prompt": [{"role": "user", "content": f"What about {subject} number {i}?"}],
                "chosen": [{"role": "assistant", "content": f"I heard that {subject} {verb} {thing}, and we laughed."}],
            }
        )
    return rows


@pytest.fixture(autouse=True)
def float32_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The precision that a config takes by itself depends on the processor; what tests compare must not."""
    monkeypatch.setattr("components.common.training.config.has_fast_bfloat16", lambda: False)


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data stage's output: 48 training and 16 held-out rows."""
    from components.common.core.conversations import write_rows

    directory = tmp_path_factory.mktemp("data")
    rows = chat_rows(64)
    write_rows(directory / "train.jsonl", rows[:48])
    write_rows(directory / "test.jsonl", rows[48:])
    return directory


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory, chat_data: Path) -> Path:
    """A model stage's output: a Llama of about 60 thousand random parameters with a ChatML tokenizer."""
    from components.model.__main__ import main

    directory = tmp_path_factory.mktemp("model")
    architecture = directory / "micro.yaml"
    architecture.write_text(
        "model: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,\n"
        "        num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 512, tie_word_embeddings: true}\n"
        "tokenizer: {vocab_size: 400}\n"
    )
    output = directory / "micro"
    main(["--source", f"scratch://{architecture}", "--data", str(chat_data), "--output", str(output)])
    return output


@pytest.fixture(autouse=True)
def no_stray_tensorboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stages set this variable; a test must not leave it to the next."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    yield


@pytest.fixture
def third_engine(monkeypatch: pytest.MonkeyPatch) -> list["third.ThirdSampler"]:
    """Enters an engine named "third" into the table; gives every one that is started, the newest last."""
    monkeypatch.setitem(ENGINES, "third", third.ENTRY)
    monkeypatch.setattr(third, "STARTED", [])
    return third.STARTED
