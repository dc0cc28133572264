"""Recipes that extend one another: what wins, what is refused, and that shipped ones say only what differs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.core.errors import UserError
from components.common.stage import recipes
from components.common.stage.config import StageConfig, setting
from components.common.stage.parser import ConfigParser
from components.common.stage.recipes import COMPONENTS, find_recipe, read_recipe, read_yaml_mapping, recipe_names

SHIPPED = [
    (folder.parent.name, name)
    for folder in sorted(COMPONENTS.glob("*/recipes"))
    for name in recipe_names(folder.parent.name)
]
Write = Callable[..., Path]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes recipes that ship with a stage called `stage`."""
    folder = tmp_path / "stage" / "recipes"
    folder.mkdir(parents=True)
    monkeypatch.setattr(recipes, "COMPONENTS", tmp_path)

    def write(name: str, **content: Any) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_a_chain_says_only_what_differs_and_the_last_wins(shipped: Write) -> None:
    shipped("first", beta=0.1, rates=[1, 2], options={"a": 1}, steps=3)
    shipped("second", extends="first", rates=[3], steps=None)
    shipped("third", extends="second", options={"b": 2})
    assert read_recipe("stage", "third") == {"beta": 0.1, "rates": [3], "options": {"b": 2}, "steps": None}
    assert read_recipe("stage", "first")["options"] == {"a": 1}


def test_a_recipe_anywhere_extends_a_shipped_one_by_name_and_its_neighbour_by_path(
    shipped: Write, tmp_path: Path
) -> None:
    shipped("base", beta=0.1, steps=1)
    mine = tmp_path / "elsewhere"
    mine.mkdir()
    (mine / "mine.yaml").write_text("extends: base\nsteps: 2\n")
    (mine / "other.yaml").write_text("extends: ./mine.yaml\nseed: 3\n")
    assert read_recipe("stage", str(mine / "other.yaml")) == {"beta": 0.1, "steps": 2, "seed": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": "b", "b": "c", "c": "a"}, "a.yaml: extends goes in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml"),
        ({"a": "a"}, "a.yaml: extends goes in a circle: a.yaml -> a.yaml"),
        ({"a": "b", "b": "c", "c": "b"}, "a.yaml: extends goes in a circle: b.yaml -> c.yaml -> b.yaml"),
        ({"a": "zero"}, "a.yaml: extends = 'zero': no such file, and stage has no such recipe (a)"),
        ({"a": "b", "b": "zero"}, "b.yaml: extends = 'zero': no such file, and stage has no such recipe (a, b)"),
        ({"a": ["b"], "b": None}, "a.yaml: extends = ['b']: no such file, and stage has no such recipe (a, b)"),
    ],
)
def test_a_circle_or_an_unknown_name_is_one_clear_line(shipped: Write, content: dict[str, Any], message: str) -> None:
    for name, base in content.items():
        shipped(name, extends=base)
    with pytest.raises(UserError) as error:
        read_recipe("stage", "a")
    assert str(error.value).endswith(message)
    assert "\n" not in str(error.value)


class Config(StageConfig):
    """A stage with one setting."""

    beta: float = setting(0.5, "Strength.")


def test_a_wrong_setting_is_told_with_the_file_that_says_it(shipped: Write) -> None:
    wrong = shipped("base", bta=0.1)
    shipped("mine", extends="base", beta=0.2)
    with pytest.raises(UserError, match=f"^{wrong}: unknown setting 'bta'"):
        ConfigParser("stage", [Config]).parse(["--output", "o", "--config", "mine"])


@pytest.mark.parametrize(("stage", "name"), SHIPPED)
def test_a_shipped_recipe_does_not_repeat_what_it_extends(stage: str, name: str) -> None:
    own = read_yaml_mapping(find_recipe(stage, name))
    extended = read_recipe(stage, own.pop("extends")) if "extends" in own else {}
    assert {key: value for key, value in own.items() if key in extended and extended[key] == value} == {}


@pytest.mark.parametrize("stage", sorted({stage for stage, _ in SHIPPED}))
def test_no_two_recipes_of_a_stage_say_the_same(stage: str) -> None:
    said = [read_yaml_mapping(find_recipe(stage, name)) for name in recipe_names(stage)]
    explicit = [settings for settings in said if "extends" not in settings]
    assert [settings for number, settings in enumerate(explicit) if settings in explicit[:number]] == []
