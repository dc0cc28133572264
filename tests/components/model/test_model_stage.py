"""The model stage: template, tokens, embeddings and stop tokens, and what it refuses."""

import json
import shutil

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from components.common.core.errors import UserError
from components.model import sources
from components.model.__main__ import main
from components.model.sources import train_tokenizer


@pytest.fixture(scope="module")
def plain_model(chat_data, tmp_path_factory):
    """A model as it comes from the hub: no template, its own end token, a tokenizer that opens text with BOS."""
    directory = tmp_path_factory.mktemp("plain")
    tokenizer = train_tokenizer(str(chat_data), 400)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, tie_word_embeddings=True, **sizes))
    model.generation_config = GenerationConfig(eos_token_id=1)
    model.save_pretrained(directory)
    return directory


def run(source, output, *argv: str):
    main(["--source", str(source), "--output", str(output), *argv])
    return AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)


def test_scratch_model_has_the_size_it_was_given(micro_model):
    model = AutoModelForCausalLM.from_pretrained(micro_model)
    tokenizer = AutoTokenizer.from_pretrained(micro_model)
    assert model.config.hidden_size == 32
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 402  # 400 + two of ChatML
    assert {p.name for p in micro_model.iterdir()} >= {"config.json", "model.safetensors", "generation_config.json"}


def test_scratch_model_stops_at_its_own_special_tokens_only(micro_model):
    """Not at the ids that its family has by default, which are ordinary tokens of this tokenizer."""
    stops = GenerationConfig.from_pretrained(micro_model).eos_token_id
    assert {AutoTokenizer.from_pretrained(micro_model).convert_ids_to_tokens(i) for i in stops} <= {
        "<|im_end|>",
        "</s>",
    }


def test_scratch_tokenizer_loses_no_text(micro_model):
    tokenizer = AutoTokenizer.from_pretrained(micro_model)
    text = "Any text — 你好, naïve 🙂\n  indented"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chatml_on_a_plain_model(plain_model, tmp_path):
    model, tokenizer = run(plain_model, tmp_path / "out")
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.get_input_embeddings().weight.shape[0] == 402
    assert set(GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id) == {1, tokenizer.eos_token_id}
    assert tokenizer.pad_token_id is not None
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "<s><|im_start|>user\nHi<|im_end|>\n"  # BOS, because the tokenizer opens plain text with it


def test_new_embeddings_are_the_mean_and_old_ones_stay(plain_model, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(plain_model).get_input_embeddings().weight
    model, _ = run(plain_model, tmp_path / "out")
    after = model.get_input_embeddings().weight
    assert torch.equal(after[:400], before)
    torch.testing.assert_close(after[400:], before.mean(dim=0).expand(2, -1))


def test_zephyr_needs_no_new_token(plain_model, tmp_path):
    model, tokenizer = run(plain_model, tmp_path / "out", "--chat_template", "zephyr")
    assert (len(tokenizer), tokenizer.eos_token) == (400, "</s>")
    assert model.get_input_embeddings().weight.shape[0] == 400
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "<s><|user|>\nHi</s>\n"


def test_keep_leaves_a_template(micro_model, tmp_path):
    _, tokenizer = run(micro_model, tmp_path / "out", "--chat_template", "keep")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(micro_model).chat_template


def test_random_weights_follow_the_seed(chat_data, micro_model, tmp_path):
    source = f"scratch://{micro_model.parent / 'micro.yaml'}"
    data = ["--data", str(chat_data)]
    first, second, third = (
        run(source, tmp_path / name, *data, "--seed", seed)[0].get_input_embeddings().weight
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_gguf_out_of_a_package(tmp_path, monkeypatch):
    """The real SmolLM2 is 98 MB; here it is the lookup that is tested."""
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(sources, "package_directory", lambda uri: tmp_path / "package")
    with pytest.raises(UserError, match=r"pypi://toy: has 0 \.gguf files where exactly one is expected"):
        main(["--source", "pypi://toy", "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--source", "nowhere"], "--source nowhere: no such file or directory"),
        (["--source", "ftp://x"], r"ftp:// is not supported; use a path, hf://"),
        (["--source", "scratch://tiny-llama"], "data: is needed with source = scratch://tiny-llama"),
        (["--source", "scratch://tiny-llama", "--data", "d", "--chat_template", "keep"], "has none of its own"),
        (["--source", "x", "--chat_template", "alpaca"], "chat_template = 'alpaca' is not valid"),
    ],
)
def test_wrong_settings(argv, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([*argv, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_unknown_architecture_lists_the_known(chat_data, tmp_path):
    with pytest.raises(UserError, match="no such architecture; there is tiny-llama"):
        main(["--source", "scratch://huge", "--data", str(chat_data), "--output", str(tmp_path / "out")])


def test_model_without_template_is_refused_with_keep(plain_model, tmp_path):
    with pytest.raises(UserError, match="has no chat template"):
        main(["--source", str(plain_model), "--chat_template", "keep", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_truncated_weights_are_one_line(plain_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(plain_model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        main(["--source", str(broken), "--output", str(tmp_path / "out")])


def test_dry_run_writes_nothing(micro_model, tmp_path, capsys):
    main(["--source", str(micro_model), "--output", str(tmp_path / "out"), "--dry_run"])
    assert "plan: llama model at" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_config_of_a_directory_is_plain_hugging_face(micro_model):
    assert json.loads((micro_model / "config.json").read_text())["model_type"] == "llama"
