"""Answers come out the same however often their generation was interrupted, and end where the template's turns end."""

import dataclasses
import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from components.common.core.errors import UserError
from components.common.models.chat_templates import encode_prompt
from components.common.models.loading import load_model, load_tokenizer
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context
from components.evaluation.judged import generation
from components.evaluation.judged.generation import GenerationSettings, Generator, Request, read_answers
from components.evaluation.lm_eval.backends import check_backend
from components.model.__main__ import main as make_model

SETTINGS = GenerationSettings(engine="hf", dtype="float32", max_new_tokens=6, max_length=512, seed=1)


def requests(count: int, temperature: float = 1.0) -> list[Request]:
    texts = [f"What about my dog{' and the cat' * (i % 4)} number {i}?" for i in range(count)]
    return [
        Request(f"q{i}", 1, [{"role": "user", "content": text}], temperature if i % 2 else 0.0)
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def model(micro_model: Path):
    model = load_model(str(micro_model), torch.float32).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # random weights hardly tell prompts apart; these do
        for parameter in model.parameters():
            parameter.mul_(1 + 8 * (parameter.ndim == 2))
    return model


@pytest.fixture
def generate(micro_model: Path, model):
    """Answers from the file at a path, as a new process would make them, and the sizes of the batches it ran."""

    def run(path: Path, asked: list[Request], batch_size: int = 3, **changed):
        batches: list[int] = []
        settings = dataclasses.replace(SETTINGS, **changed)
        with Generator(str(micro_model), settings, path, batch_size, lambda: model) as generator:
            write = generator._generate
            generator._generate = lambda batch: batches.append(len(batch)) or write(batch)
            return generator.answer(asked), batches

    return run


def test_answers_are_the_models_and_in_the_order_of_the_requests(generate, model, micro_model, tmp_path):
    asked = requests(7)
    answers, batches = generate(tmp_path / "a.jsonl", asked)
    assert len({answer["output"] for answer in answers}) > 4
    assert [answer["id"] for answer in answers] == [request.id for request in asked]
    assert batches == [3, 1, 3]  # four at temperature 0, then three at 1
    tokenizer = load_tokenizer(str(micro_model))
    ids = torch.tensor([encode_prompt(tokenizer, asked[2].messages)])
    for _ in range(6):  # greedy, by hand
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert answers[2]["output"] == tokenizer.decode(ids[0, -answers[2]["tokens"] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("cut", [1, 30, 200, 700])
def test_goes_on_after_an_interruption(cut, generate, tmp_path):
    asked = requests(9)
    whole, _ = generate(tmp_path / "whole.jsonl", asked)
    content = (tmp_path / "whole.jsonl").read_bytes()[:-cut]
    (tmp_path / "cut.jsonl").write_bytes(content)
    resumed, batches = generate(tmp_path / "cut.jsonl", asked, batch_size=2)
    assert resumed == whole
    assert sum(batches) == 9 - content.count(b"\n")
    assert len((tmp_path / "cut.jsonl").read_text().splitlines()) == 9


def test_no_engine_is_started_when_nothing_is_missing(generate, micro_model, tmp_path):
    whole, _ = generate(tmp_path / "a.jsonl", requests(4))

    def load():
        raise AssertionError("the model is not needed")

    with Generator(str(micro_model), SETTINGS, tmp_path / "a.jsonl", 2, load) as generator:
        assert generator.answer(requests(4)) == whole


@pytest.mark.parametrize("changed", [{"seed": 2}, {"max_new_tokens": 5}, {"max_length": 400}])
def test_other_settings_are_other_answers(changed, generate, tmp_path):
    first, _ = generate(tmp_path / "a.jsonl", requests(4))
    second, batches = generate(tmp_path / "a.jsonl", requests(4), **changed)
    assert sum(batches) == 4
    assert {answer["digest"] for answer in first}.isdisjoint(answer["digest"] for answer in second)
    assert generate(tmp_path / "a.jsonl", requests(4)) == (first, [])
    other = [dataclasses.replace(requests(1)[0], messages=[{"role": "user", "content": "something else"}])]
    assert generate(tmp_path / "a.jsonl", other)[1] == [1]


def test_a_damaged_line_is_named(generate, tmp_path):
    generate(tmp_path / "a.jsonl", requests(4))
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join([lines[0], '{"id": \n', *lines[2:]]))
    with pytest.raises(UserError, match=r"a\.jsonl:2: is damaged"):
        generate(tmp_path / "a.jsonl", requests(4))


def test_a_long_prompt_keeps_its_end_and_is_counted(generate, micro_model, model, tmp_path, caplog):
    long = [Request("long", 1, [{"role": "user", "content": "the cat and " * 60}], 0.0)]
    settings = dataclasses.replace(SETTINGS, max_length=40, max_new_tokens=30)
    assert generation.prompt_window(settings) == 20
    with Generator(str(micro_model), settings, tmp_path / "a.jsonl", 2, lambda: model) as generator:
        (answer,) = generator.answer(long)
        facts = generator.facts([answer])
    prompt = encode_prompt(generator.tokenizer, long[0].messages)
    assert answer["cut"] == len(prompt) - 20
    assert answer["tokens"] <= 20
    assert facts["cut_prompts"] == 1 and "1 prompts did not fit" in caplog.text


def test_many_answers_at_the_limit_are_warned_of(generate, micro_model, model, tmp_path, caplog):
    with Generator(str(micro_model), SETTINGS, tmp_path / "a.jsonl", 2, lambda: model) as generator:
        template = generator.answer(requests(1))[0]
        ends = [template | {"ended": i > 0} for i in range(20)]
        with caplog.at_level(logging.WARNING):
            assert generator.facts(ends)["at_limit"] == 0.05
            assert "hit the limit" not in caplog.text
            facts = generator.facts([*ends, template | {"ended": False}])
    assert "10% of the answers hit the limit of 6 tokens" in caplog.text and "<|im_end|>" in caplog.text
    assert "<|im_end|>" in facts["stop_tokens"]
    assert facts["first_token_ids"] == encode_prompt(generator.tokenizer, requests(1)[0].messages)[:8]
    with pytest.raises(UserError, match="all 2 answers are empty"):
        generator.facts([template | {"output": ""}] * 2)


def test_the_end_of_turn_of_the_template_stops_whatever_the_end_of_sequence_is(micro_model, model, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(micro_model, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.save_pretrained(other)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    generator = Generator(str(other), SETTINGS, tmp_path / "a.jsonl", 2, lambda: model)
    assert generator.stop_ids == {end_of_turn, tokenizer.eos_token_id}
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} and {% endfor %}"
    assert generation.template_stop_ids(tokenizer) == frozenset()


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")
def test_vllm_answers_as_transformers_does(chat_data, tmp_path):
    """Greedy answers of both engines, in batches of different sizes; heads of 32, which vLLM's CPU kernels have."""
    (tmp_path / "small.yaml").write_text(
        "model: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, initializer_range: 0.2,\n"
        "        num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, max_position_embeddings: 512}\n"
        "tokenizer: {vocab_size: 400}\n"
    )
    model = tmp_path / "model"
    make_model(["--source", f"scratch://{tmp_path / 'small.yaml'}", "--data", str(chat_data), "--output", str(model)])
    texts = {}
    for engine, batch_size in (("hf", 2), ("vllm", 5)):
        settings = dataclasses.replace(SETTINGS, engine=engine, max_length=128)
        with Generator(str(model), settings, tmp_path / f"{engine}.jsonl", batch_size) as generator:
            texts[engine] = [answer["output"] for answer in generator.answer([*requests(6, temperature=0.0)])]
    assert texts["vllm"] == texts["hf"] and len(set(texts["hf"])) > 2


def test_a_model_without_a_chat_template(micro_model, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(micro_model, other)
    (other / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        Generator(str(other), SETTINGS, tmp_path / "a.jsonl", 2)


def test_answers_of_another_run(generate, tmp_path):
    answers, _ = generate(tmp_path / "answers.jsonl", requests(3))
    wanted = [("q2", 1), ("q0", 1)]
    assert read_answers(str(tmp_path), "mt_bench_answers", wanted) == [answers[2], answers[0]]
    with pytest.raises(UserError, match=r"lacks 1 of 2 answers \(q9 turn 1"):
        read_answers(str(tmp_path / "answers.jsonl"), "mt_bench_answers", [("q9", 1), ("q0", 1)])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"--mt_bench_answers .*empty\.jsonl: holds no answers"):
        read_answers(str(tmp_path / "empty.jsonl"), "mt_bench_answers", wanted)
    (tmp_path / "other.jsonl").write_text('{"id": "q0"}\n')
    with pytest.raises(UserError, match="an entry has no 'turn'"):
        read_answers(str(tmp_path / "other.jsonl"), "mt_bench_answers", wanted)


def test_an_engine_that_is_an_entry_answers(generate, micro_model, tmp_path, third_engine):
    """It is handed batches as large as it wants, has its own weights, and is closed."""
    asked = requests(7)
    config = EvaluationConfig(model=str(micro_model), output="o", engine="third", max_length=512, batch_size=2, seed=1)
    context = Context("m", tmp_path, "cpu", "float32")
    with generation.open_generator(config, context, 6) as generator:
        answers = generator.answer(asked)
        assert generator.facts(answers)["engine_version"] == "Third"
    (engine,) = third_engine
    assert engine.closed and engine.batches == [4, 3]  # 6 at most; four at temperature 0, then three at 1
    untouched = load_model(str(micro_model), torch.float32).eval()
    with Generator(str(micro_model), SETTINGS, tmp_path / "hf.jsonl", 2, lambda: untouched) as generator:
        expected = generator.answer(asked)
    assert [answer["output"] for answer in answers] == [answer["output"] for answer in expected]


def test_lm_evals_benchmarks_refuse_an_engine_without_a_backend(third_engine):
    with pytest.raises(
        UserError, match=r"--engine third: does not compute lm-eval's benchmarks; choose one of hf, vllm"
    ):
        check_backend("third")
