"""The stage as a user runs it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from components.common.core.conversations import read_rows, write_rows
from components.common.core.errors import UserError
from components.common.models.chat_templates import encode_prompt, encode_response
from components.common.models.loading import load_model, load_tokenizer
from components.evaluation.__main__ import main


@pytest.fixture(scope="module")
def evaluated(chat_data: Path, micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluation") / "output"
    main(["--data", str(chat_data), "--model", str(micro_model), "--output", str(output), "--batch_size", "4"])
    return output


def read_results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def read_samples(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "held_out" / "samples.jsonl").read_text().splitlines()]


def test_perplexities_are_those_of_plain_torch(evaluated: Path, chat_data: Path, micro_model: Path):
    model, tokenizer = load_model(str(micro_model), torch.float32), load_tokenizer(str(micro_model))
    nll, tokens, size = 0.0, 0, 0
    for row in read_rows(chat_data, "test"):
        text = row["chosen"][0]["content"]
        prompt, reply = encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, text)
        labels = torch.tensor([[-100] * len(prompt) + reply])
        with torch.no_grad():
            nll += model(torch.tensor([prompt + reply]), labels=labels).loss.item() * len(reply)
        tokens, size = tokens + len(reply), size + len(text.encode())
    values = {entry["metric"]: entry["value"] for entry in read_results(evaluated)["results"]}
    assert values["perplexity_per_token"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert values["perplexity_per_byte"] == pytest.approx(math.exp(nll / size), rel=1e-4)


def test_results_follow_from_the_samples(evaluated: Path):
    results, samples = read_results(evaluated), read_samples(evaluated)
    entries = {entry["metric"]: entry for entry in results["results"]}
    accuracy = sum(sample["picked_choice"] == sample["true_choice"] for sample in samples) / 16
    assert len(samples) == 16
    assert entries["next_reply_accuracy"]["value"] == accuracy
    assert entries["next_reply_accuracy"]["stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 15))
    assert all(entry["n"] == 16 and entry["stderr"] > 0 for entry in entries.values())
    assert [entry["higher_is_better"] for entry in entries.values()] == [True, False, False]
    for sample in samples:
        assert sample["nll"] == -sample["log_likelihoods"][sample["true_choice"]]


def test_results_say_what_was_run(evaluated: Path, micro_model: Path):
    results = read_results(evaluated)
    assert results["name"] == micro_model.name
    assert results["schema"] == 2
    assert results["settings"]["dtype"] == "float32"
    held_out = results["benchmarks"]["held_out"]
    assert 0 < held_out["seconds"] <= results["seconds"]
    assert held_out["details"]["window"] == 512  # the model's own
    assert held_out["details"]["counts"] == {"rows": 16, "truncated_prompts": 0, "replies_longer_than_window": 0}
    assert held_out["details"]["tokens"]["end_of_turn"] == "<|im_end|>"
    assert set(results["versions"]) == {"torch", "transformers", "lm_eval"}
    assert [(b["name"], b["metric"]) for b in results["baselines"]] == [
        ("unigram", "perplexity_per_token"),
        ("unigram", "perplexity_per_byte"),
        ("chance", "next_reply_accuracy"),
    ]


def test_limit_name_table_and_kubeflow_metrics(
    chat_data: Path, micro_model: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    artifacts = {name: {"artifacts": [{"name": name, "uri": "x", "metadata": {}}]} for name in ("metrics", "results")}
    executor_input = {"outputs": {"outputFile": str(tmp_path / "out.json"), "artifacts": artifacts}}
    settings = {
        "data": str(chat_data),
        "model": str(micro_model),
        "output": str(tmp_path / "o"),
        "limit": 5,
        "name": "m",
    }
    main(["--settings", json.dumps(settings), "--executor_input", json.dumps(executor_input)])
    whole = {sample["id"]: sample for sample in read_samples(evaluated)}
    samples = read_samples(tmp_path / "o")
    assert [sample["choices"] for sample in samples] == [whole[sample["id"]]["choices"] for sample in samples]
    assert len(samples) == 5
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines if "baseline" in line] == [
        ["chance", "baseline"],
        ["unigram", "baseline"],
        ["unigram", "baseline"],
    ]
    published = json.loads((tmp_path / "out.json").read_text())["artifacts"]
    metrics = published["metrics"]["artifacts"][0]["metadata"]
    assert metrics["perplexity_per_token"] == read_results(tmp_path / "o")["results"][1]["value"]
    assert metrics["chance_next_reply_accuracy"] == 0.25
    assert published["results"]["artifacts"][0]["metadata"] == {"name": "m"}


def test_dry_run_writes_nothing(chat_data: Path, micro_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "output"
    main(["--data", str(chat_data), "--model", str(micro_model), "--output", str(output), "--dry_run"])
    assert f"score 16 rows x 4 replies with {micro_model}" in capsys.readouterr().out
    assert not output.exists()


def test_help_lists_the_settings(capsys: pytest.CaptureFixture[str]):
    main(["--help"])
    text = capsys.readouterr().out
    assert "--batch_size int" in text and "held-out-tiny" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmarks", "[arc]"], r"benchmarks = \['arc'\]: must be a list of held_out, arc_challenge,"),
        (["--benchmarks", "[]"], r"benchmarks = \[\]: must be a list of held_out"),
        (["--limit", "0"], "limit = 0: must be at least 1"),
        (["--device", "tpu"], "device = 'tpu' is not valid: Input should be 'auto', 'cpu' or 'cuda'"),
        (["--model", "/none"], "--model /none: no such file or directory"),
        (["--data", "/none"], "/none/test.jsonl: no such file; --data must be a directory that the data stage wrote"),
    ],
)
def test_mistakes_are_named(chat_data: Path, micro_model: Path, tmp_path: Path, flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        main(["--data", str(chat_data), "--model", str(micro_model), "--output", str(tmp_path / "o"), *flags])
    assert not (tmp_path / "o").exists()


def test_no_gpu(chat_data: Path, micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--data", str(chat_data), "--model", str(micro_model), "--output", str(tmp_path / "o"), "--device", "cuda"]
    with pytest.raises(UserError, match="--device cuda: no GPU is visible here; use auto or cpu"):
        main(flags)


def test_a_model_without_chat_template(chat_data: Path, micro_model: Path, tmp_path: Path):
    bare = shutil.copytree(micro_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="its tokenizer has no chat template; run the model stage"):
        main(["--data", str(chat_data), "--model", str(bare), "--output", str(tmp_path / "o")])


def test_too_few_rows(chat_data: Path, micro_model: Path, tmp_path: Path):
    data = shutil.copytree(chat_data, tmp_path / "data")
    write_rows(data / "test.jsonl", read_rows(chat_data, "test")[:3])
    with pytest.raises(UserError, match="4 choices need 3; --data needs a larger test split"):
        main(["--data", str(data), "--model", str(micro_model), "--output", str(tmp_path / "o")])


def test_a_window_that_no_reply_fits(chat_data: Path, micro_model: Path, tmp_path: Path):
    flags = ["--data", str(chat_data), "--model", str(micro_model), "--output", str(tmp_path / "o")]
    with pytest.raises(UserError, match=r"no reply of test.jsonl fits in 2 tokens; raise --max_length"):
        main([*flags, "--max_length", "2"])
