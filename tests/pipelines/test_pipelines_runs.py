"""Run files: those that ship fit the stages, and a wrong one is one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.core.errors import UserError
from components.common.stage.parser import ConfigParser
from components.common.stage.recipes import EXTENDS, find_recipe, merged, read_layers, read_recipe
from pipelines.runs import OPTIONAL, RUNS, find_run, read_run, run_names

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", run_names())
def test_run_files_fit_say_how_to_run_them_and_name_recipes_that_exist(name: str) -> None:
    run = read_run(find_run(name))
    text = (RUNS / f"{name}.yaml").read_text()
    assert f"#   python -m pipelines run {name}" in text
    assert f"#   python -m pipelines submit {name} " in text
    for key, parameter in run.parameters.items():
        if key.endswith("_recipe"):
            find_recipe(run.uses[key.removesuffix("_recipe")].stage, parameter.default)


@pytest.mark.parametrize("name", run_names())
def test_run_files_do_not_repeat_what_they_extend(name: str) -> None:
    *extended, own = read_layers(RUNS / f"{name}.yaml", RUNS, "")
    below = merged(extended)
    assert {key for key, value in own.settings.items() if key in below and below[key] == value} <= {"package"}


@pytest.mark.parametrize("name", run_names())
def test_methods_of_run_files_have_recipes_and_settings_that_their_stages_take(name: str) -> None:
    for method in read_run(find_run(name)).methods:
        settings = read_recipe(method.stage, method.recipe) | method.settings
        # Only what depends on the machine is left out.
        settings = {key: value for key, value in settings.items() if not key.startswith(("fsdp", "bf16"))}
        settings |= {"use_cpu": True, "bf16": False, "report_to": "none"} | _SAMPLER.get(method.stage, {})
        argv = ["--data", "d", "--output", "o", "--model", "m", "--name", method.name]
        stage, _ = _parser_of(method.stage).parse([*argv, "--settings", json.dumps(settings)])
        assert (stage.model, stage.name) == ("m", method.name)


_SAMPLER = {"spin": {"sampler": "hf"}}


def _parser_of(stage: str) -> ConfigParser:
    from components.common.training.config import HIDDEN, TrainingStageConfig
    from components.common.training.preference import DPOSettings, ORPOSettings
    from components.common.training.resume import ResumableStageConfig
    from components.sapo.config import SAPOConfig
    from components.sft.config import SFTSettings
    from components.spin.config import SPINSettings, SPINStageConfig

    classes: dict[str, list[type]] = {
        "sapo": [ResumableStageConfig, SAPOConfig],
        "dpo": [ResumableStageConfig, DPOSettings],
        "orpo": [ResumableStageConfig, ORPOSettings],
        "spin": [SPINStageConfig, SPINSettings],
        "sft": [TrainingStageConfig, SFTSettings],
    }
    return ConfigParser(stage, classes[stage], hidden=() if stage == "spin" else HIDDEN)


def test_ablation_has_every_group_and_the_paper_rows_are_names_of_variants() -> None:
    groups = {"default", "table3", "table4", "table5", "figure2", "ema", "sft_chosen", "spin_ema"}
    tiny, paper = (read_run(RUNS / f"ablation-{size}.yaml").methods for size in ("tiny", "llama3-8b"))
    assert {method.group for method in tiny} == {method.group for method in paper} == groups
    names = {method.name for method in paper}
    tables = yaml.safe_load((REPOSITORY / "components" / "report" / "paper.yaml").read_text())
    ablations = [table for table in tables if "metrics" not in table]  # the others are of the comparison
    assert [row["label"] for table in ablations for row in table["rows"] if not names & set(row["runs"])] == []


def _file(directory: Path, **content: Any) -> Path:
    path = directory / "My run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_file_says_what_differs_and_is_not_what_it_extends(tmp_path: Path) -> None:
    tiny = read_run(RUNS / "tiny.yaml")
    run = read_run(_file(tmp_path, extends="tiny", cpu="4", data_settings={"max_rows": 5}))
    assert (run.name, run.title, run.description, run.package) == ("my-run", "my-run", "", False)
    assert (run.methods, run.stages) == (tiny.methods, tiny.stages) == (run.methods, OPTIONAL)
    changed = {key for key in tiny.parameters if tiny.parameters[key].default != run.parameters[key].default}
    assert changed == {"cpu", "data_settings"}
    assert list(run.parameters) == list(tiny.parameters)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(run.as_file({})))
    assert read_run(again).parameters == run.parameters


METHOD = {"name": "m", "stage": "dpo", "start": "sft", "recipe": "tiny", "settings": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"cpus": "4"},
            "unknown parameter 'cpus' of a run file; did you mean 'cpu'? It takes: extends, package, title, ",
        ),
        ({"train_dpo_settings": {}}, "unknown parameter 'train_dpo_settings' of a run file; "),
        ({"cpu": 4}, "cpu = 4 is int, must be text"),
        ({"data_settings": [1]}, "data_settings = [1] is list, must be a mapping"),
        ({"data_settings": None}, "data_settings = None is NoneType, must be a mapping"),
        ({"data_settings": {1: "a"}}, "data_settings = {1: 'a'} holds a key that is not text; put it in quotes"),
        ({"data_settings": {"a": float("inf")}}, "data_settings holds a value that JSON has not: "),
        ({"methods": {"dpo": 1}}, "methods = {'dpo': 1} is dict, must be a list"),
        ({"methods": ["dpo"]}, "methods: entry 1 is str, must be a mapping"),
        ({"package": "yes"}, "package = 'yes' must be true or false"),
        ({"title": 3}, "title = 3 must be text"),
        ({"stages": "all"}, "stages = 'all' is str, must be a list"),
        ({"stages": ["train"]}, "stages: 'train' must be one of sft_data, sft, evaluation, report"),
        ({"stages": ["sft_data"], "methods": []}, "stages: sft_data needs sft; add it, or take sft_data out"),
        ({"stages": ["sft", "report"]}, "stages: report needs evaluation; add it, or take report out"),
        ({"stages": ["evaluation"], "methods": [METHOD]}, "m starts from sft, which is not in stages; add it"),
        ({"extends": "tinny"}, "extends = 'tinny': no such file, and there is no such run (ablation-llama3-8b, "),
        ({"extends": None}, "data_recipe is missing; set it, or begin with `extends: tiny`"),
    ],
)
def test_a_wrong_run_file_is_one_clear_line(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    given = {EXTENDS: "tiny"} | content
    path = _file(tmp_path, **{key: value for key, value in given.items() if key != EXTENDS or value is not None})
    with pytest.raises(UserError) as error:
        read_run(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)
