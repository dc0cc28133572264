"""The compiled pipelines on the real stages, with a model small enough for seconds."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TASKS = [
    "preflight",
    "data",
    "model",
    "evaluate-base",
    "sft",
    "evaluate-sft",
    "train-sapo-dpo",
    "evaluate-sapo-dpo",
    "train-sapo-orpo",
    "evaluate-sapo-orpo",
    "report",
]


STEPS = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 3, "eval_rows": 8}
SPIN = {"train_rows": 8, "per_device_train_batch_size": 4, "max_new_tokens": 4, "logging_steps": 1, "eval_rows": 4}


def as_alpaca(row: dict) -> dict[str, object]:
    return {"instruction": row["prompt"][0]["content"], "input": "", "output": row["chosen"][0]["content"]}


def as_sharegpt(row: dict) -> dict[str, object]:
    roles = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": roles[m["role"]], "value": m["content"]} for m in row["prompt"] + row["chosen"]]}


def run(
    directory: Path,
    chat_data: Path,
    micro_model: Path,
    extends: str,
    own: Callable[[dict], dict[str, object]] | None = None,
    **arguments: object,
) -> tuple[Path, str]:
    """Runs a run file from chats to report; gives the directory of the run and what was said.

    With `own` the chats come in that form, by `--data`, as a user's own rows do.
    """
    source = directory / "chats.jsonl"
    text = "".join((chat_data / f"{split}.jsonl").read_text() for split in ("train", "test"))
    if own:
        text = "".join(json.dumps(own(json.loads(line))) + "\n" for line in text.splitlines())
    else:
        data = {"source": str(source), "format": "auto", "test_rows": 16, "min_response_characters": 1}
        arguments |= {"data_settings": data}
    source.write_text(text)
    arguments |= {
        "extends": extends,
        "model_settings": {"source": f"scratch://{micro_model.parent / 'micro.yaml'}"},
        "sft_settings": STEPS,
        "evaluation_settings": {"limit": 12},
        "report_settings": {"title": "Tiny test"},
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(arguments))
    output = directory / "output"
    command = [sys.executable, "-m", "pipelines", "run", str(path), "--output", str(output)]
    command += ["--data", str(source)] if own else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return output, done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory, chat_data, micro_model) -> tuple[Path, str]:
    methods = [method(f"sapo-{loss}", "sapo", f"tiny-{loss}") for loss in ("dpo", "orpo")]
    return run(tmp_path_factory.mktemp("sapo"), chat_data, micro_model, "sapo-tiny", as_alpaca, methods=methods)


def method(name: str, stage: str, recipe: str, start: str = "sft", **settings: object) -> dict[str, object]:
    short = SPIN if stage == "spin" else STEPS
    return {"name": name, "stage": stage, "start": start, "recipe": recipe, "settings": short | settings}


METHODS = [
    method("sapo-dpo", "sapo", "tiny-dpo"),
    method("sapo-orpo", "sapo", "tiny-orpo", start="base"),
    method("dpo", "dpo", "tiny"),
    method("orpo", "orpo", "tiny", start="base"),
    method("spin-dpo", "spin", "tiny-dpo"),
    method("spin-orpo", "spin", "tiny-orpo"),
]
VARIANTS = [
    method("on-policy", "sapo", "tiny-orpo", on_policy=True),
    method("sft-chosen", "sft", "tiny"),
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, chat_data, micro_model) -> tuple[Path, str]:
    arguments = {"methods": METHODS, "sft_data_settings": {"max_rows": 24}}
    return run(tmp_path_factory.mktemp("comparison"), chat_data, micro_model, "tiny", **arguments)


@pytest.fixture(scope="module")
def ablated(tmp_path_factory, chat_data, micro_model) -> tuple[Path, str]:
    return run(
        tmp_path_factory.mktemp("ablation"), chat_data, micro_model, "ablation-tiny", as_sharegpt, methods=VARIANTS
    )


def rows_of(markdown: str, heading: str) -> list[str]:
    """First cells of the first table below a heading, without the table's own head."""
    lines = markdown[markdown.index(f"## {heading}\n") :].splitlines()
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[2:]))
    return [line.split("|")[1].strip() for line in table[2:]]


@pytest.mark.slow
def test_a_comparison_trains_evaluates_and_reports_every_method(compared):
    output, said = compared
    ran = re.findall(r"^\[\d+/20\] (\S+):", said, re.M)
    names = [method["name"] for method in METHODS]
    first = ["preflight", "data", "model", "evaluate-base", "sft-data", "sft", "evaluate-sft"]
    methods = [f"{task}-{name}" for name in names for task in ("train", "evaluate")]
    assert ran == [*first, *methods, "report"]
    markdown = (output / "outputs" / "report" / "report" / "report.md").read_text()
    assert rows_of(markdown, "Results")[:8] == ["base", "sft", *names]
    assert rows_of(markdown, "Training") == ["sft", *names]
    assert rows_of(markdown, "Where the time went") == ["sft", *names]
    assert "Missing" not in markdown
    assert "Beside the paper" not in markdown


@pytest.mark.slow
def test_each_method_ran_its_stage_from_its_start_with_its_settings(compared):
    output, _ = compared
    models = {"base": str(output / "outputs" / "model" / "model"), "sft": str(output / "outputs" / "sft" / "model")}
    for entry in METHODS:
        folder = output / "outputs" / f"train-{entry['name']}"
        summary = json.loads((folder / "training_log" / "summary.json").read_text())
        assert (summary["name"], summary["stage"]) == (entry["name"], entry["stage"])
        assert summary["settings"]["model"] == models[entry["start"]]
        expected = entry["settings"] if entry["stage"] == "spin" else {"max_steps": 3}
        assert {key: summary["settings"][key] for key in expected} == expected
        assert (folder / "model" / "model.safetensors").is_file()
        measured = output / "outputs" / f"evaluate-{entry['name']}" / "results" / "results.json"
        assert json.loads(measured.read_text())["name"] == entry["name"]


@pytest.mark.slow
def test_an_ablation_stands_beside_the_paper(ablated):
    output, said = ablated
    assert len(re.findall(r"^\[\d+/12\] ", said, re.M)) == 12
    markdown = (output / "outputs" / "report" / "report" / "report.md").read_text()
    assert rows_of(markdown, "Results")[:4] == ["base", "sft", "on-policy", "sft-chosen"]
    assert "dpo" not in rows_of(markdown, "Training")
    assert "### Table 3: training paradigm" in markdown
    assert "| on-policy | 65.97 | 36.73 | 7.49 | on-policy |" in markdown
    assert "Table 5" not in markdown


@pytest.mark.slow
def test_every_task_ran_once_in_the_order_of_the_run(finished):
    output, said = finished
    ran = [line.split()[1].rstrip(":") for line in said.splitlines() if line.startswith("[") and "/11] " in line]
    assert ran == TASKS
    assert sorted(path.stem for path in (output / "logs").glob("*.log")) == sorted([*TASKS, "kfp"])


@pytest.mark.slow
def test_the_table_holds_what_the_evaluations_measured(finished):
    output, said = finished
    results = {}
    for path in (output / "outputs").glob("evaluate-*/results/results.json"):
        content = json.loads(path.read_text())
        results[content["name"]] = {entry["metric"]: entry for entry in content["results"]}
    assert set(results) == {"base", "sft", "sapo-dpo", "sapo-orpo"}
    report = (output / "outputs" / "report" / "report" / "report.md").read_text()
    for name, metrics in results.items():
        assert metrics["next_reply_accuracy"]["n"] == 7  # a tenth of 64 rows
        assert name in report
        assert f"{metrics['perplexity_per_token']['value']:.0f}"[:2] in report
    assert "unigram" in said
    assert "report.html" in said.splitlines()[-1] + said.splitlines()[-2]


@pytest.mark.slow
def test_each_training_left_its_log_and_sapo_its_pairs(finished):
    output, _ = finished
    summaries = [json.loads(path.read_text()) for path in output.glob("outputs/*/training_log/summary.json")]
    assert sorted(summary["name"] for summary in summaries) == ["sapo-dpo", "sapo-orpo", "sft"]
    assert all(summary["steps"] == 3 for summary in summaries)
    for task in ("train-sapo-dpo", "train-sapo-orpo"):
        log = output / "outputs" / task / "training_log"
        pairs = [json.loads(line) for line in (log / "pairs.jsonl").read_text().splitlines()]
        assert len(pairs) == 6  # two at each of three logging steps
    page = (output / "outputs" / "report" / "report" / "report.html").read_text()
    assert "Tiny test" in page
    assert pairs[0]["row_id"] in page
