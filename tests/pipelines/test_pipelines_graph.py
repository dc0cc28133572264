"""The graph of a run on fake stages: which tasks run, in which order, and what each is given."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Cli = Callable[..., tuple[int, str, str]]
METHODS = [
    {"name": "b", "stage": "sapo", "start": "sft", "recipe": "tiny-dpo", "settings": {"beta": 0.5, "steps": 3}},
    {"name": "a.1", "stage": "spin", "start": "base", "recipe": "tiny-orpo", "settings": {}},
    {"name": "c", "stage": "dpo", "start": "sft", "recipe": "tiny", "settings": {"none": None, "text": 'it\'s "q"'}},
]
FIRST = ["preflight", "data", "model", "evaluate-base", "sft-data", "sft", "evaluate-sft"]


@pytest.fixture
def fake_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose `components` package holds fake stages; `python -m` finds it first."""
    for stage in ("preflight", "data", "model", "sft", "sapo", "dpo", "orpo", "spin", "evaluation", "report"):
        folder = tmp_path / "components" / stage
        folder.mkdir(parents=True)
        shutil.copy(Path(__file__).parent / "fake_stage.py", folder / "__main__.py")
    (tmp_path / "components" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(run_cli: Cli, *more: object, **content: Any) -> tuple[int, str, str]:
    """Runs a run file with this content over the tiny run."""
    run_file = Path.cwd() / "mine.yaml"
    settings = {"extends": "tiny", "methods": METHODS, "report_settings": {"title": "T"}}
    run_file.write_text(yaml.safe_dump(settings | content))
    return run_cli("run", run_file, "--output", "out", *more)


def _outputs() -> Path:
    return Path.cwd() / "out" / "outputs"


def _flags(task: str, artifact: str) -> dict[str, str]:
    return json.loads((_outputs() / task / artifact / "flags.json").read_text())


def _ran(out: str) -> list[str]:
    return re.findall(r"^\[\d+/\d+\] (\S+):", out, re.M)


def test_every_method_is_trained_evaluated_and_reported(fake_stages: Path, run_cli: Cli) -> None:
    code, out, err = _run(run_cli)
    assert (code, err) == (0, "")
    labels = ["b", "a-1", "c"]  # in the order of the run file
    methods = [f"{task}-{label}" for label in labels for task in ("train", "evaluate")]
    assert _ran(out) == [*FIRST, *methods, "report"]
    assert "train-a-1: Training of a.1 (" in out and "[train-a-1] hello" in out

    root = _outputs()
    models = {"base": f"{root}/model/model", "sft": f"{root}/sft/model"}
    for method, label in zip(METHODS, labels, strict=True):
        trained, evaluated = _flags(f"train-{label}", "model"), _flags(f"evaluate-{label}", "results")
        assert trained["--model"] == models[method["start"]]
        assert (trained["--name"], trained["--config"]) == (method["name"], method["recipe"])
        assert trained["--num_processes"] == "0"  # as many as GPUs
        assert json.loads(trained["--settings"]) == method["settings"]
        assert (evaluated["--model"], evaluated["--name"]) == (trained["--output"], method["name"])
        assert evaluated["--data"] == trained["--data"] == f"{root}/data/data"
    settings = json.loads(_flags("train-b", "model")["--settings"])  # its keys come in any order
    assert isinstance(settings["steps"], int), "3 was handed over as 3.0"

    assert _flags("sft", "model")["--data"] == f"{root}/sft-data/data"
    assert _flags("sft", "model")["--name"] == "sft"
    assert [_flags(f"evaluate-{name}", "results")["--model"] for name in models] == list(models.values())
    assert (root / "data" / "rejected_rows").is_file()
    _check_report(labels)


def _check_report(labels: list[str], sft: bool = True) -> None:
    report, root = _flags("report", "report"), _outputs()
    evaluated, trained = ["base", *(["sft"] if sft else []), *labels], [*(["sft"] if sft else [])]
    assert yaml.safe_load(report["--evaluations"]) == [f"{root}/evaluate-{name}/results" for name in evaluated]
    assert yaml.safe_load(report["--trainings"]) == [
        f"{root}/{task}/training_log" for task in (*trained, *(f"train-{label}" for label in labels))
    ]
    assert report["--settings"] == '{"title": "T"}'
    assert (root / "report" / "html").is_file()


def test_the_preflight_is_told_what_every_stage_will_read(fake_stages: Path, run_cli: Cli) -> None:
    preflight = fake_stages / "components" / "preflight" / "__main__.py"
    preflight.write_text("import json, sys\nprint(json.dumps(sys.argv))\n" + preflight.read_text())
    assert _run(run_cli, "--set", 'data_settings={"source": "s3://b/x"}', "--set", "gpus=8")[0] == 0
    said = (Path.cwd() / "out" / "logs" / "preflight.log").read_text().splitlines()[0]
    argv = json.loads(said)
    flags = dict(zip(argv[1::2], argv[2::2], strict=True))
    assert json.loads(flags["--methods"]) == [method["settings"] for method in METHODS]
    assert json.loads(flags["--data_settings"]) == {"source": "s3://b/x"}
    assert (flags["--gpus"], flags["--sft_data_recipe"], flags["--evaluation_gpus"]) == ("8", "chitchat-tiny", "0")


def test_stages_that_a_run_leaves_out_are_not_there(fake_stages: Path, run_cli: Cli) -> None:
    from_base = [method | {"start": "base"} for method in METHODS[:1]]
    code, out, err = _run(run_cli, stages=["evaluation", "report"], methods=from_base)
    assert (code, err) == (0, "")
    assert _ran(out) == ["preflight", "data", "model", "evaluate-base", "train-b", "evaluate-b", "report"]
    _check_report(["b"], sft=False)
    shutil.rmtree("out")
    code, out, err = _run(run_cli, stages=["sft"], methods=METHODS[:1])
    assert (code, err, _ran(out)) == (0, "", ["preflight", "data", "model", "sft", "train-b"])
    assert _flags("sft", "model")["--data"] == f"{_outputs()}/data/data"
    shutil.rmtree("out")
    code, _, err = _run(run_cli, "--set", "sft_data_recipe=own", stages=["sft"], methods=[])
    assert (code, "unknown parameter 'sft_data_recipe' of pipeline mine" in err) == (2, True)


def test_a_training_has_a_process_for_each_gpu(fake_stages: Path, run_cli: Cli) -> None:
    code, _, err = _run(run_cli, "--set", "gpus=8", methods=METHODS[:1])
    assert (code, err) == (0, "")
    assert _flags("train-b", "model")["--num_processes"] == _flags("sft", "model")["--num_processes"] == "8"


def test_each_training_runs_the_stage_that_its_method_names(fake_stages: Path, run_cli: Cli) -> None:
    for stage in ("sapo", "spin", "dpo"):
        module = fake_stages / "components" / stage / "__main__.py"
        module.write_text(f'print("I am {stage}")\n' + module.read_text())
    code, out, _ = _run(run_cli)
    assert code == 0
    assert re.findall(r"\[train-(\S+)\] I am (\w+)", out) == [("b", "sapo"), ("a-1", "spin"), ("c", "dpo")]


@pytest.mark.parametrize(
    ("methods", "only", "labels"),
    [(METHODS[::2], [], ["b", "c"]), (METHODS, ["--only", "c,a.1"], ["a-1", "c"]), ([], [], [])],
)
def test_a_method_left_out_is_not_run_and_not_reported(
    fake_stages: Path, run_cli: Cli, methods: Any, only: list[str], labels: list[str]
) -> None:
    code, out, err = _run(run_cli, *only, methods=methods)
    assert (code, err) == (0, "")
    assert [task.removeprefix("train-") for task in _ran(out) if task.startswith("train-")] == labels
    assert out.startswith(f"pipeline mine: {8 + 2 * len(labels)} tasks")
    _check_report(labels)


def test_what_was_run_can_be_run_again(fake_stages: Path, run_cli: Cli) -> None:
    given = [
        "--only",
        "b,c",
        "--set",
        "train_b_settings.beta=0.25",
        "--set",
        "train_c_recipe=smollm2",
        "--set",
        "cpu=4",
    ]
    assert _run(run_cli, *given)[0] == 0
    assert yaml.safe_load(Path("out/arguments.yaml").read_text()) == {
        "train_b_settings": {"beta": 0.25, "steps": 3},
        "train_c_recipe": "smollm2",
        "cpu": "4",
    }
    code, _, err = run_cli("run", "out/run.yaml", "--output", "again")
    assert (code, err) == (0, "")
    for path in sorted(Path("out/outputs").glob("*/*/flags.json")):
        first = json.loads(path.read_text())
        second = json.loads((Path("again") / path.relative_to("out")).read_text())
        for flags in (first, second):
            flags.pop("--executor_input")
        assert {flag: text.replace("/again/", "/out/") for flag, text in second.items()} == first


def test_a_training_that_fails_ends_the_run(fake_stages: Path, run_cli: Cli) -> None:
    failing = [METHODS[0], METHODS[1] | {"settings": {"exit_code": 3}}, METHODS[2]]
    code, out, err = _run(run_cli, methods=failing)
    assert code == 1
    assert err == (
        "pipelines: error: task train-a-1 (Training of a.1) failed with exit code 3; its log: out/logs/train-a-1.log\n"
    )
    assert _ran(out)[-1] == "train-a-1"  # neither c nor the report started
    not_run = re.findall(r"^(\S+) .* not run$", out, re.M)
    assert not_run == ["evaluate-a-1", "train-c", "evaluate-c", "report"]


def test_wrong_methods_end_the_command_before_anything_starts(fake_stages: Path, run_cli: Cli) -> None:
    code, out, err = _run(run_cli, methods=[METHODS[0], METHODS[0]])
    assert (code, out) == (2, "")
    assert err.endswith("mine.yaml: methods: two entries are named 'b'; the report needs a name for each\n")
    code, _, err = _run(run_cli, "--only", "dpo")
    assert (code, err) == (
        2,
        "pipelines: error: --only dpo: run mine has no method or group of this name; it has a.1, b, c\n",
    )
