"""The vLLM sampler on a micro Llama: the same tokens as Hugging Face before and after pushes, proofs, time limits."""

import random
import time
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from components.common.core.errors import UserError
from components.common.generation.hf import HFSampler
from components.common.generation.protocol import Canary, SamplingSettings, make_canary
from components.common.generation.vllm import VLLMSampler, WrongWeights, last_engine_cleans_up
from components.common.generation.worker import SamplerTimeout, Worker

needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [5, 6, 7, 8, 9, 10, 11, 12, 13], [40, 41, 42]]
SEEDS = [3, 4, 5, 6]
GREEDY = SamplingSettings(0.0, 0, 1.0, frozenset({1}))
DRAWN = SamplingSettings(1.0, 0, 1.0, frozenset({1}))


def micro_llama(seed: int, tied: bool) -> LlamaForCausalLM:
    """Heads of 32, which vLLM's CPU kernels have; weights wide enough that greedy choices are clear."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=400,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).float().eval()


def make_sampler(directory: Path, tied: bool) -> VLLMSampler:
    micro_llama(0, tied).save_pretrained(directory)
    return VLLMSampler(str(directory), GREEDY, max_model_len=128, timeout=120)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """An engine for tied and one for untied embeddings."""
    made = {tied: make_sampler(tmp_path_factory.mktemp("vllm"), tied) for tied in (True, False)}
    yield made
    for sampler in made.values():
        sampler.close()


@pytest.fixture
def engine(engines):
    """The tied engine, greedy, with the weights it started with."""
    sampler = engines[True]
    sampler.settings = GREEDY
    sampler.load(micro_llama(0, True).named_parameters(), version=0)
    return sampler


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_greedy_tokens_are_those_of_hugging_face_before_and_after_pushes(engines, tied):
    sampler, limits = engines[tied], [12, 5, 9, 1]
    sampler.settings = GREEDY
    seen = []
    for version in range(3):
        model = micro_llama(version, tied)
        if version:
            sampler.load(model.named_parameters(), version, make_canary(model, list(range(20, 36))))
        tokens = sampler.generate(PROMPTS, limits, SEEDS)
        assert tokens == HFSampler(model, GREEDY, pad_id=0).generate(PROMPTS, limits, SEEDS)
        assert all(len(row) == limit or row[-1] == 1 for row, limit in zip(tokens, limits, strict=True))
        assert sampler.version == version
        seen.append(tokens)
    assert seen[0] != seen[1] != seen[2]


@needs_vllm
@pytest.mark.slow
def test_seeded_draws_depend_on_the_seed_alone(engine):
    engine.settings = DRAWN
    together = engine.generate(PROMPTS, [12] * 4, SEEDS)
    backwards = engine.generate(PROMPTS[::-1], [12] * 4, SEEDS[::-1])
    apart = [engine.generate([p], [12], [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    other = engine.generate(PROMPTS, [12] * 4, [13, 4, 5, 6])
    assert together == backwards[::-1] == apart
    assert other[0] != together[0] and other[1:] == together[1:]


@needs_vllm
@pytest.mark.slow
def test_more_prompt_tokens_than_fit_one_pass_draw_the_same(engine):
    """60 prompts of 100 tokens: vLLM would compute some in parts, and draw from their seeds for each part."""
    engine.settings = DRAWN
    prompts = [[5 + (7 * i + j) % 300 for j in range(100)] for i in range(60)]
    together = engine.generate(prompts, [3] * 60, list(range(60)))
    assert together[::12] == [engine.generate([prompts[i]], [3], [i])[0] for i in range(0, 60, 12)]


@needs_vllm
@pytest.mark.slow
def test_draws_follow_the_models_distribution(engine):
    """3,000 first tokens against the softmax: the ten likeliest tokens' shares within 4 sigma."""
    engine.settings = DRAWN
    count = 3000
    drawn = engine.generate([PROMPTS[0]] * count, [1] * count, list(range(count)))
    shares = torch.tensor([row[0] for row in drawn]).bincount(minlength=400) / count
    with torch.no_grad():
        expected = micro_llama(0, True)(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(dim=-1)
    top = expected.topk(10).indices
    sigma = (expected[top] * (1 - expected[top]) / count).sqrt()
    assert ((shares[top] - expected[top]).abs() < 4 * sigma).all()


@needs_vllm
@pytest.mark.slow
def test_a_stop_token_ends_a_continuation_and_is_kept(engine):
    everything = engine.generate(PROMPTS, [12] * 4, SEEDS)
    stop = everything[1][4]
    engine.settings = SamplingSettings(0.0, 0, 1.0, frozenset({stop}))
    stopped = engine.generate(PROMPTS, [12] * 4, SEEDS)
    assert stopped[1] == everything[1][: everything[1].index(stop) + 1]
    assert stopped[1][-1] == stop


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]


def seed_all() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


@needs_vllm
@pytest.mark.slow
def test_random_states_are_left_as_they_were(engine):
    engine.settings = DRAWN
    model = micro_llama(1, True)
    seed_all()
    expected = draws()
    seed_all()
    engine.generate(PROMPTS, [4] * 4, SEEDS)
    engine.load(model.named_parameters(), 1, make_canary(model, [3, 4, 5]))
    assert draws() == expected


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_canary_of_other_weights_raises(engines, tied):
    sampler, pushed, meant = engines[tied], micro_llama(1, tied), micro_llama(2, tied)
    with pytest.raises(WrongWeights, match=r"is -\d+\.\d{5}, the pushed model's is -\d+\.\d{5}, .* float32 is 0.001"):
        sampler.load(pushed.named_parameters(), 7, make_canary(meant, [20, 21, 22, 23]))
    assert sampler.version != 7


@needs_vllm
@pytest.mark.slow
def test_a_push_that_forgets_the_tied_head_is_caught(engine, monkeypatch):
    monkeypatch.setattr("components.common.generation.vllm._repack_tied_head", lambda worker: None)
    model = micro_llama(3, True)
    with pytest.raises(WrongWeights):
        engine.load(model.named_parameters(), 8, make_canary(model, [20, 21, 22, 23]))


@needs_vllm
@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_the_engine_sees_it(engine):
    with pytest.raises(UserError, match="a prompt of 100 tokens and 29 new ones exceed max_model_len 128"):
        engine.generate([[5] * 100], [29], [1])
    assert engine.generate([], [], []) == []
    assert engine.generate(PROMPTS[:2], [0, 2], [1, 2])[0] == []


@needs_vllm
@pytest.mark.slow
def test_an_engines_exception_reaches_the_caller_with_its_traceback(engine, monkeypatch):
    def broken(*args, **options):
        raise ValueError("no memory left")

    monkeypatch.setattr(engine._llm, "generate", broken)
    with pytest.raises(ValueError, match="no memory left") as caught:
        engine.generate(PROMPTS, [4] * 4, SEEDS)
    assert "broken" in [entry.name for entry in caught.traceback]
    monkeypatch.undo()
    assert len(engine.generate(PROMPTS[:1], [4], [1])[0]) == 4  # still in service


@needs_vllm
@pytest.mark.slow  # starts an engine of its own
def test_a_call_that_hangs_is_named_and_the_sampler_refuses_further_ones(tmp_path, monkeypatch):
    sampler = make_sampler(tmp_path, tied=True)
    generate = sampler._llm.generate

    def slow(*args, **options):
        time.sleep(2)
        return generate(*args, **options)

    monkeypatch.setattr(sampler._llm, "generate", slow)
    sampler._worker.timeout = 0.2
    with pytest.raises(SamplerTimeout, match=r"vLLM generate took longer than 0\.2 s"):
        sampler.generate(PROMPTS, [4] * 4, SEEDS)
    with pytest.raises(RuntimeError, match=r"takes no calls: generate took longer than 0\.2 s"):
        sampler.load([], version=1)
    sampler.close()


def test_engines_that_are_never_closed_clean_up_once():
    """Taking the parallel state of the process down twice fails: "Invalid process group specified"."""

    class Client:
        def __init__(self):
            self._finalizer = weakref.finalize(self, ended.append, len(clients))

    ended, clients = [], []
    for _ in range(3):
        clients.append(Client())
        last_engine_cleans_up(clients[-1])
    for client in clients:
        client._finalizer()
    assert ended == [2]


def test_a_worker_names_the_call_that_hangs():
    worker = Worker("vLLM", timeout=0.05)
    assert worker.call("load", lambda: 3) == 3
    with pytest.raises(SamplerTimeout, match="vLLM load took longer"):
        worker.call("load", lambda: time.sleep(0.5))
    with pytest.raises(RuntimeError, match="takes no calls"):
        worker.call("generate", lambda: 3)


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(UserError, match="dtype 'int8'"):
        VLLMSampler(str(tmp_path), GREEDY, max_model_len=64, dtype="int8")
    with pytest.raises(UserError, match=r"no config\.json"):
        VLLMSampler(str(tmp_path), GREEDY, max_model_len=64)


def test_a_canary_holds_the_log_probs_of_the_next_tokens():
    model = micro_llama(0, tied=True)
    canary = make_canary(model, [5, 6, 7])
    logits = model(torch.tensor([[5, 6, 7]])).logits[0].detach().double()
    expected = [float(logits[i, t] - logits[i].logsumexp(0)) for i, t in enumerate((6, 7))]
    assert canary.token_ids == [5, 6, 7]
    assert canary.log_probs == pytest.approx(expected, abs=1e-5)
    assert isinstance(canary, Canary)


# Last: vLLM's parallel state is the process's, so that closing this engine ends the shared ones.
@needs_vllm
@pytest.mark.slow
def test_a_start_leaves_random_states_as_they_were(tmp_path):
    micro_llama(0, True).save_pretrained(tmp_path)
    seed_all()
    expected = draws()
    seed_all()
    sampler = VLLMSampler(str(tmp_path), GREEDY, max_model_len=64, timeout=120)
    assert draws() == expected
    sampler.close()
    with pytest.raises(RuntimeError, match="it is closed"):
        sampler.generate(PROMPTS[:1], [1], [1])
