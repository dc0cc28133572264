"""Arguments of a run against the parameters that a compiled package declares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.core.errors import UserError
from pipelines.package import COMPILED, Package, check_keys, check_recipes, own_data, read_package, run_arguments

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def package(fake_package: Path) -> Package:
    return read_package(str(fake_package))


def _run_file(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_package_tells_tasks_and_parameters(package: Package) -> None:
    assert package.name == "fake"
    assert package.tasks == {"first": "The first", "second": "The second", "second-2": "The third"}
    steps, text = package.parameters["steps"], package.parameters["text"]
    assert (steps.type, steps.required, steps.description) == ("NUMBER_INTEGER", True, "How many.")
    assert (text.type, text.required, text.default) == ("STRING", False, "a")


def test_set_wins_over_the_run_file_and_keeps_other_keys(package: Package, tmp_path: Path) -> None:
    run_file = _run_file(tmp_path, {"steps": 1, "one": {"a": 1, "b": 2}})
    assignments = ["steps=7", "one.b=1.5", "one.c=[1, x]", "text=3", "two={say: hi}"]
    assert run_arguments(package, run_file, assignments) == {
        "steps": 7,
        "one": {"a": 1, "b": 1.5, "c": [1, "x"]},
        "text": "3",
        "two": {"say": "hi"},
    }


def test_a_default_is_not_changed_by_set(package: Package) -> None:
    run_arguments(package, None, ["steps=1", "one.a=1"])
    assert package.parameters["one"].default == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"stepz": 1},
            "unknown parameter 'stepz' of pipeline fake; did you mean 'steps'? It takes: one, rate, ",
        ),
        ({"zzzzzz": 1}, "unknown parameter 'zzzzzz' of pipeline fake; It takes: one, rate, steps, text, three, two"),
        ({"steps": "many"}, "steps = 'many' is str, must be a whole number"),
        ({"steps": 1.5}, "steps = 1.5 is float, must be a whole number"),
        ({"steps": True}, "steps = True is bool, must be a whole number"),
        ({"steps": 1, "rate": "fast"}, "rate = 'fast' is str, must be a number"),
        ({"steps": 1, "text": 5}, "text = 5 is int, must be text"),
        ({"steps": 1, "one": [1]}, "one = [1] is list, must be a mapping"),
        ({"steps": 1, "one": None}, "one = None is NoneType, must be a mapping"),
        ({"steps": 1, "one": {1: "a"}}, "one = {1: 'a'} holds a key that is not text; put it in quotes"),
        ({"steps": 1, "one": {"a": float("inf")}}, "one holds a value that JSON has not: "),
        ({"text": "a"}, "pipeline fake: parameter 'steps' is required: How many."),
    ],
)
def test_wrong_run_file_is_one_clear_line(package: Package, tmp_path: Path, content: Any, message: str) -> None:
    run_file = _run_file(tmp_path, content)
    with pytest.raises(UserError) as error:
        run_arguments(package, run_file, [])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "required" in message or str(error.value).startswith(f"{run_file}: ")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "--set steps: must be key=value"),
        ("stepz=1", "--set stepz=1: unknown parameter 'stepz'"),
        ("steps=x", "--set steps=x: steps = 'x' is str, must be a whole number"),
        ("steps.a=1", "--set steps.a=1: steps is a whole number, it has no key 'a'"),
        ("one={a", "--set one={a: the value is not valid YAML or JSON: "),
    ],
)
def test_wrong_assignment_is_one_clear_line(package: Package, assignment: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        run_arguments(package, None, [assignment])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_wrong_parameter_ends_the_command_before_anything_is_written(
    fake_package: Path, tmp_path: Path, run_cli: Cli
) -> None:
    code, out, err = run_cli("run", fake_package, "--set", "stepz=1", "--output", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.startswith("pipelines: error: --set stepz=1: unknown parameter 'stepz'")
    assert not (tmp_path / "run").exists()


def test_missing_or_broken_package_and_run_file(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    code, _, err = run_cli("run", "sapoo")
    assert code == 2
    assert (
        err
        == "pipelines: error: no pipeline 'sapoo'; there are: ablation, comparison, sapo, or give a package's path\n"
    )
    (tmp_path / "other.yaml").write_text("a: 1")
    code, _, err = run_cli("run", tmp_path / "other.yaml")
    assert code == 2
    assert "other.yaml: not a compiled pipeline; make one with `python -m pipelines compile`" in err
    code, _, err = run_cli("run", fake_package, "--run", tmp_path / "none.yaml")
    assert code == 2
    assert "none.yaml: cannot be read: No such file or directory" in err


def test_help_lists_every_parameter(run_cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_cli("run", "--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for path in COMPILED.glob("*.yaml"):
        for name in read_package(str(path)).parameters:
            assert f"  {name} (" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "sapo", "--runn", "x"], "unknown argument '--runn'; did you mean --run?"),
        (["run", "sapo", "--overwrit"], "unknown argument '--overwrit'; did you mean --overwrite?"),
        (["run", "sapo", "more"], "unknown argument 'more'"),
        (["run", "sapo", "--run"], "argument --run: expected one argument; `python -m pipelines run --help` tells"),
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
    run_file = tmp_path / "run.yaml"
    run_file.write_text("data_recipe: chitchat\ndata_settings: {max_rows: 5}")
    package = read_package("comparison")
    arguments = run_arguments(package, str(run_file), own_data(package, str(rows), "run"))
    own = {"data_recipe": "own", "data_settings": {"source": str(rows)}}
    assert arguments == own | {f"sft_{name}": value for name, value in own.items()}
    assert own_data(read_package("sapo"), "s3://b/my.jsonl", "submit") == [
        "data_recipe=own",
        'data_settings={"source": "s3://b/my.jsonl"}',
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "sapo", "--data", "none.jsonl"], "--data none.jsonl: no such file or directory"),
        (["submit", "sapo", "--endpoint", "http://x", "--data", "my.jsonl"], "a cluster does not see this machine's"),
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
        ("sapo_dpo_recipe=tny-dpo", "sapo_dpo_recipe = 'tny-dpo'; did you mean 'tiny-dpo'? no such file, and sapo has"),
        ("data_recipe=none.yaml", "data_recipe = 'none.yaml' no such file, and data has no such recipe (capybara, "),
    ],
)
def test_a_recipe_that_is_not_there_ends_a_local_run_at_once(
    run_cli: Cli, tmp_path: Path, assignment: str, message: str
) -> None:
    code, out, err = run_cli("run", "sapo", "--set", assignment, "--output", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.startswith(f"pipelines: error: {message}") and not (tmp_path / "run").exists()


def test_a_recipe_of_a_method_is_named_with_it() -> None:
    package = read_package("comparison")
    method = {"name": "mine", "stage": "dpo", "start": "sft", "recipe": "tinny", "settings": {}}
    with pytest.raises(UserError, match=r"methods: mine: recipe = 'tinny'; did you mean 'tiny'\?"):
        check_recipes(package, {"methods": [method]})


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data_settings.test_row=0.2", "unknown setting 'test_row' of the data stage; did you mean 'test_rows'? "),
        ("sft_data_settings.zzzz=1", "unknown setting 'zzzz' of the data stage; `python -m components.data --help`"),
    ],
)
def test_a_mistyped_key_of_a_stage_ends_the_command_at_once(
    run_cli: Cli, tmp_path: Path, assignment: str, message: str
) -> None:
    output = tmp_path / "run"
    code, out, err = run_cli("run", "comparison", "--output", str(output), "--set", assignment)
    assert (code, out) == (2, "")
    assert err.startswith(f"pipelines: error: --set {assignment}: {message}"), err
    assert not output.exists()


def test_keys_that_the_stages_take_pass() -> None:
    check_keys(["data_settings.seed=1", "gpus=8", "report_settings={title: T}", "report_settings.title=T"])


def test_a_stage_that_cannot_run_here_does_not_refuse_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.package.stage_of", lambda name: "absent")
    check_keys(["sft_settings.anything=1"])
