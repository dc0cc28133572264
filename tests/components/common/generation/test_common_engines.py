"""The table of engines: what an entry decides, with a third engine that is a class and an entry."""

import dataclasses
import subprocess
import sys
import typing

import pytest
import torch

from components.common.core.errors import UserError
from components.common.generation.engines import (
    ENGINES,
    EngineName,
    EngineSettings,
    check_engine,
    open_engine,
    start_engine,
)
from components.common.generation.protocol import SamplingSettings, make_canary
from components.common.models.loading import load_model, load_tokenizer

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [5, 6, 7, 8, 9, 10, 11, 12, 13]]
SEEDS = [3, 4, 5]
DRAWING = SamplingSettings(1.0, 0, 1.0, frozenset({1}))


def settings(name: str, **more) -> EngineSettings:
    return EngineSettings(name=name, dtype="float32", max_length=64, batch_size=2, use_cpu=True, **more)


@pytest.fixture(params=["hf", "third"])
def name(request, third_engine):
    return request.param


@pytest.fixture
def opened(name, micro_model):
    with open_engine(str(micro_model), load_tokenizer(str(micro_model)), settings(name), DRAWING) as sampler:
        yield sampler


def test_an_engine_keeps_limits_and_order_and_does_not_depend_on_the_batch(opened):
    together = opened.generate(PROMPTS, [3, 7, 12], SEEDS)
    assert [len(tokens) for tokens in together] == [3, 7, 12]
    assert opened.generate(PROMPTS[::-1], [12, 7, 3], SEEDS[::-1]) == together[::-1]
    assert opened.generate(PROMPTS[1:2], [7], SEEDS[1:2]) == together[1:2]
    assert opened.generate(PROMPTS, [3, 7, 12], [6, 7, 8]) != together


def test_an_engine_serves_what_is_pushed_and_leaves_the_random_state(opened, name, micro_model, third_engine):
    before = opened.generate(PROMPTS, [12] * 3, SEEDS)
    pushed = load_model(str(micro_model), torch.float32)
    torch.manual_seed(3)
    expected = torch.rand(1)
    with torch.no_grad():
        for parameter in pushed.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(3)
    opened.load(pushed.named_parameters(), 4, make_canary(pushed, PROMPTS[0]))
    after = opened.generate(PROMPTS, [12] * 3, SEEDS)
    assert torch.equal(torch.rand(1), expected)
    assert opened.version == 4 and after != before
    assert [e.proofs for e in third_engine] == ([1] if ENGINES[name].proves_weights else [])


def test_an_engine_in_place_takes_the_loaded_model_and_another_does_not(name, micro_model):
    loaded = load_model(str(micro_model), torch.float32)
    tokenizer = load_tokenizer(str(micro_model))
    sampler = start_engine(str(micro_model), tokenizer, settings(name), DRAWING, loaded)
    before = sampler.generate(PROMPTS, [12] * 3, SEEDS)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert (sampler.generate(PROMPTS, [12] * 3, SEEDS) != before) == ENGINES[name].serves_in_place


def test_an_engine_is_closed_also_after_an_error(micro_model, third_engine):
    with (
        pytest.raises(RuntimeError),
        open_engine(str(micro_model), load_tokenizer(str(micro_model)), settings("third"), DRAWING),
    ):
        raise RuntimeError
    assert third_engine[0].closed


def test_what_cannot_run_here_is_told_in_one_line(third_engine, monkeypatch):
    entry = ENGINES["third"]
    check_engine("third", "float32")
    with pytest.raises(UserError, match="engine third: Third computes in float32, not in bfloat16"):
        check_engine("third", "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(ENGINES, "third", dataclasses.replace(entry, needs_gpu=True))
    with pytest.raises(UserError, match="engine third: Third needs a GPU, and none is visible here"):
        check_engine("third")
    monkeypatch.setitem(ENGINES, "third", dataclasses.replace(entry, package="not_there"))
    with pytest.raises(UserError, match="Third is not installed here: it is part of the tests"):
        check_engine("third")


def test_the_version_is_that_of_the_distribution_or_the_title(third_engine):
    assert ENGINES["hf"].version().startswith("transformers ")
    assert ENGINES["third"].version() == "Third"


def test_settings_choose_among_the_table_and_the_table_imports_no_engine():
    assert typing.get_args(EngineName) == tuple(ENGINES)
    code = (
        "import components.common.generation.engines, sys; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
