"""The compiled pipeline on the real stages, with a model small enough for seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TASKS = [
    "data",
    "model",
    "sft",
    "sapo",
    "sapo-2",
    "evaluation",
    "evaluation-2",
    "evaluation-3",
    "evaluation-4",
    "report",
]


def run_file(directory: Path, source: Path, architecture: Path) -> Path:
    steps = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 3, "eval_rows": 8}
    arguments = {
        "data_settings": {"source": str(source), "format": "auto", "test_rows": 16, "min_response_characters": 1},
        "model_settings": {"source": f"scratch://{architecture}"},
        "sft_settings": steps,
        "sapo_dpo_settings": steps,
        "sapo_orpo_settings": steps,
        "evaluation_settings": {"limit": 12},
        "report_settings": {"title": "Tiny test"},
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(arguments))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, chat_data, micro_model) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("run")
    source = directory / "chats.jsonl"
    source.write_text("".join((chat_data / f"{split}.jsonl").read_text() for split in ("train", "test")))
    run = run_file(directory, source, micro_model.parent / "micro.yaml")
    output = directory / "output"
    command = [sys.executable, "-m", "pipelines", "run", "sapo", "--run", str(run), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return output, done.stdout


@pytest.mark.slow
def test_every_task_ran_once_in_an_order_that_fits(finished):
    output, said = finished
    ran = [line.split()[1].rstrip(":") for line in said.splitlines() if line.startswith("[") and "/10] " in line]
    assert sorted(ran) == sorted(TASKS)
    assert [ran.index(task) for task in ("data", "model", "sft")] == [0, 1, ran.index("sft")]
    assert ran.index("sft") < min(ran.index("sapo"), ran.index("sapo-2"))
    assert ran[-1] == "report"
    assert sorted(path.stem for path in (output / "logs").glob("*.log")) == sorted([*TASKS, "kfp"])


@pytest.mark.slow
def test_the_table_holds_what_the_evaluations_measured(finished):
    output, said = finished
    results = {}
    for path in (output / "outputs").glob("evaluation*/results/results.json"):
        content = json.loads(path.read_text())
        results[content["name"]] = {entry["metric"]: entry for entry in content["results"]}
    assert set(results) == {"base", "sft", "sapo-dpo", "sapo-orpo"}
    report = (output / "outputs" / "report" / "report" / "report.md").read_text()
    for name, metrics in results.items():
        assert metrics["next_reply_accuracy"]["n"] == 12
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
    for task in ("sapo", "sapo-2"):
        log = output / "outputs" / task / "training_log"
        pairs = [json.loads(line) for line in (log / "pairs.jsonl").read_text().splitlines()]
        assert len(pairs) == 6  # two at each of three logging steps
    page = (output / "outputs" / "report" / "report" / "report.html").read_text()
    assert "Tiny test" in page
    assert pairs[0]["row_id"] in page
