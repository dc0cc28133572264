"""Arguments of a run against the parameters that a compiled package declares."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from components.common.core.errors import UserError
from pipelines.arguments import check_keys, own_data, run_arguments
from pipelines.package import COMPILED, Package, read_package
from pipelines.parameters import USES, parameters_of
from pipelines.runs import run_names

Cli = Callable[..., tuple[int, str, str]]
TINY = COMPILED / "tiny.yaml"


@pytest.fixture
def package(fake_package: Path) -> Package:
    return read_package(fake_package)


def test_package_tells_tasks_and_parameters(package: Package) -> None:
    assert package.name == "fake"
    assert package.tasks == {"first": "The first", "second": "The second", "second-2": "The third"}
    steps, text = package.parameters["steps"], package.parameters["text"]
    assert (steps.type, steps.required, steps.description) == ("NUMBER_INTEGER", True, "How many.")
    assert (text.type, text.required, text.default) == ("STRING", False, "a")


def test_set_keeps_other_keys_of_a_mapping(package: Package) -> None:
    assignments = ["steps=7", "one={a: 1, b: 2}", "one.b=1.5", "one.c=[1, x]", "text=3", "two={say: hi}", "rate=1e-5"]
    assert run_arguments(package, assignments) == {
        "steps": 7,
        "one": {"a": 1, "b": 1.5, "c": [1, "x"]},
        "text": "3",
        "two": {"say": "hi"},
        "rate": 1e-5,
    }


def test_a_default_is_not_changed_by_set(package: Package) -> None:
    run_arguments(package, ["steps=1", "one.a=1"])
    assert package.parameters["one"].default == {}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "--set steps: must be key=value"),
        (
            "stepz=1",
            "--set stepz=1: unknown parameter 'stepz' of pipeline fake; did you mean 'steps'? It takes: one, rate, steps",
        ),
        ("zzzzzz=1", "--set zzzzzz=1: unknown parameter 'zzzzzz' of pipeline fake; It takes: one, rate, steps, text, "),
        ("steps=1.5", "--set steps=1.5: steps = 1.5 is float, must be a whole number"),
        ("steps=true", "--set steps=true: steps = True is bool, must be a whole number"),
        ("rate=fast", "--set rate=fast: rate = 'fast' is str, must be a number"),
        ("one=[1]", "--set one=[1]: one = [1] is list, must be a mapping"),
        ("one=null", "--set one=null: one = None is NoneType, must be a mapping"),
        ("one={1: a}", "--set one={1: a}: one = {1: 'a'} holds a key that is not text; put it in quotes"),
        ("one={a: .inf}", "--set one={a: .inf}: one holds a value that JSON has not: "),
        ("one={a: 2026-01-02}", "--set one={a: 2026-01-02}: one holds a value that JSON has not: "),
        ("text=a", "pipeline fake: parameter 'steps' is required: How many."),
        ("steps=x", "--set steps=x: steps = 'x' is str, must be a whole number"),
        ("steps.a=1", "--set steps.a=1: steps is a whole number, it has no key 'a'"),
        ("one={a", "--set one={a: the value is not valid YAML or JSON: "),
    ],
)
def test_wrong_assignment_is_one_clear_line(package: Package, assignment: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        run_arguments(package, [assignment])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_wrong_parameter_ends_the_command_before_anything_is_written(
    fake_package: Path, tmp_path: Path, run_cli: Cli
) -> None:
    code, out, err = run_cli("run", fake_package, "--set", "stepz=1", "--output", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.startswith("pipelines: error: --set stepz=1: unknown parameter 'stepz'")
    assert not (tmp_path / "run").exists()


def test_missing_or_broken_package_and_run_file(tmp_path: Path, run_cli: Cli) -> None:
    code, _, err = run_cli("run", "tinny")
    assert code == 2
    names = ", ".join(run_names())
    assert err == (
        f"pipelines: error: no run 'tinny'; there are: {names}, or give the path of a run file or a package\n"
    )
    broken = tmp_path / "broken.yaml"
    broken.write_text("# PIPELINE DEFINITION\na: 1\n")
    code, _, err = run_cli("run", broken)
    assert code == 2
    assert "broken.yaml: not a compiled pipeline; make one with `python -m pipelines compile`" in err
    code, _, err = run_cli("run", TINY, "--only", "dpo")
    assert (code, f"--only dpo: {TINY} is compiled" in err) == (2, True)


def test_help_lists_every_run_and_parameter(run_cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_cli("run", "--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert f"runs: {', '.join(run_names())}" in text
    for name in (*parameters_of(USES, evaluates=True, reports=True), "train_NAME_recipe", "train_NAME_settings"):
        assert f"  {name} (" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "tiny", "--onyl", "x"], "unknown argument '--onyl'; did you mean --only?"),
        (["run", "tiny", "--overwrit"], "unknown argument '--overwrit'; did you mean --overwrite?"),
        (["run", "tiny", "more"], "unknown argument 'more'"),
        (["run", "tiny", "--set"], "argument --set: expected one argument; `python -m pipelines run --help` tells"),
        (["rn"], "invalid choice: 'rn' (choose from "),
        ([], "the following arguments are required: "),
    ],
)
def test_wrong_usage_is_told_in_one_line(run_cli: Cli, argv: list[str], message: str) -> None:
    code, out, err = run_cli(*argv)
    assert (code, out) == (2, "")
    assert message in err and err.startswith("pipelines: error: ") and err.count("\n") == 1


def test_data_of_ones_own_replace_those_of_the_run_for_every_stage(tmp_path: Path) -> None:
    rows = tmp_path / "my.jsonl"
    rows.write_text("{}")
    package = read_package(COMPILED / "smollm2.yaml")
    arguments = run_arguments(package, own_data(package, str(rows), "run"))
    own = {"data_recipe": "own", "data_settings": {"source": str(rows)}}
    assert arguments == own | {f"sft_{name}": value for name, value in own.items()}
    alone = read_package(COMPILED / "mistral-7b.yaml")  # has no SFT
    assert own_data(alone, "s3://b/my.jsonl", "submit") == [
        "data_recipe=own",
        'data_settings={"source": "s3://b/my.jsonl"}',
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "tiny", "--data", "none.jsonl"], "--data none.jsonl: no such file or directory"),
        (["submit", "tiny", "--endpoint", "http://x", "--data", "my.jsonl"], "a cluster does not see this machine's"),
    ],
)
def test_data_that_the_run_cannot_read_are_refused(run_cli: Cli, argv: list[str], message: str) -> None:
    code, out, err = run_cli(*argv)
    assert (code, out) == (2, "")
    assert message in err


def test_pipelines_without_a_data_stage_take_no_data(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    code, _, err = run_cli("run", fake_package, "--set", "steps=1", "--data", tmp_path, "--output", tmp_path / "run")
    assert code == 2 and "pipeline fake has no data_recipe" in err


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "train_spin_dpo_recipe=tny-dpo",
            "train_spin_dpo_recipe = 'tny-dpo'; did you mean 'tiny-dpo'? no such file, and spin has",
        ),
        ("data_recipe=none.yaml", "data_recipe = 'none.yaml' no such file, and data has no such recipe (capybara, "),
    ],
)
def test_a_recipe_that_is_not_there_ends_a_local_run_at_once(
    run_cli: Cli, tmp_path: Path, assignment: str, message: str
) -> None:
    code, out, err = run_cli("run", "tiny", "--set", assignment, "--output", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.startswith(f"pipelines: error: {message}") and not (tmp_path / "run").exists()


def test_a_recipe_of_the_run_file_is_checked_too(tmp_path: Path, run_cli: Cli) -> None:
    run_file = tmp_path / "mine.yaml"
    method = {"name": "mine", "stage": "dpo", "start": "sft", "recipe": "tinny", "settings": {}}
    run_file.write_text(yaml.safe_dump({"extends": "tiny", "methods": [method]}))
    code, _, err = run_cli("run", run_file, "--output", tmp_path / "run")
    assert code == 2
    assert err.startswith(
        "pipelines: error: train_mine_recipe = 'tinny'; did you mean 'tiny'? no such file, and dpo has"
    )


def test_the_stage_behind_a_parameter_is_read_from_the_package() -> None:
    stages = read_package(TINY).stages
    assert stages["sft_data_recipe"] == stages["data_settings"] == "data"
    assert stages["train_spin_orpo_settings"] == "spin" and stages["report_settings"] == "report"
    assert set(stages) == {name for name in read_package(TINY).parameters if name.endswith(("_recipe", "_settings"))}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data_settings.test_row=0.2", "unknown setting 'test_row' of the data stage; did you mean 'test_rows'? "),
        ("sft_data_settings.zzzz=1", "unknown setting 'zzzz' of the data stage; `python -m components.data --help`"),
        ("report_settings.titel=T", "unknown setting 'titel' of the report stage; did you mean 'title'? "),
    ],
)
def test_a_mistyped_key_of_a_stage_ends_the_command_at_once(
    run_cli: Cli, tmp_path: Path, assignment: str, message: str
) -> None:
    output = tmp_path / "run"
    code, out, err = run_cli("run", "tiny", "--output", str(output), "--set", assignment)
    assert (code, out) == (2, "")
    assert err.startswith(f"pipelines: error: --set {assignment}: {message}"), err
    assert not output.exists()


def test_keys_that_the_stages_take_pass() -> None:
    check_keys(
        read_package(TINY), ["data_settings.seed=1", "gpus=8", "report_settings={title: T}", "report_settings.title=T"]
    )


def test_a_stage_that_cannot_run_here_does_not_refuse_a_key() -> None:
    package = dataclasses.replace(read_package(TINY), stages={"sft_settings": "absent"})
    check_keys(package, ["sft_settings.anything=1"])
