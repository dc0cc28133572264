"""Lists of methods: what is refused and in which words, and what `--only` keeps."""

from typing import Any

import pytest

from components.common.core.errors import UserError
from pipelines.methods import read_methods, select
from pipelines.runs import RUNS, read_run

GOOD: dict[str, Any] = {"name": "a.b-1", "stage": "spin", "start": "base", "recipe": "tiny-dpo", "settings": {"x": 1}}


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


def test_good_lists_pass() -> None:
    assert read_methods([], "methods") == []
    other = GOOD | {"name": "b", "group": "table3", "stage": "sft", "start": "sft"}
    assert [method.entry() for method in read_methods([GOOD, other], "methods")] == [GOOD, other]


def test_tasks_and_parameters_are_called_after_the_method() -> None:
    names = {"sapo-dpo": "sapo_dpo", "ema-decay-0.9": "ema_decay_0_9", "3_Epochs": "3_epochs"}
    methods = read_methods([GOOD | {"name": name} for name in names], "methods")
    assert [method.use for method in methods] == [f"train_{use}" for use in names.values()]
    assert [method.label for method in methods] == [use.replace("_", "-") for use in names.values()]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["dpo"], "methods: entry 1 is str, must be a mapping with the keys name, stage, start, recipe, settings"),
        ([GOOD, _without("start")], "methods: entry 2 has no 'start'; it needs name, stage, start, recipe, settings"),
        ([GOOD | {"beta": 1}], "methods: entry 1 has the unknown key 'beta'; it takes name, stage, "),
        ([GOOD | {"settings": None}], "methods: entry 1: settings = None must be a mapping"),
        ([GOOD | {"recipe": 3}], "methods: entry 1: recipe = 3 must be text"),
        ([GOOD | {"stage": "ppo"}], "methods: entry 1: stage = 'ppo', must be one of sapo, dpo, orpo, spin, sft"),
        ([GOOD | {"start": "dpo"}], "methods: entry 1: start = 'dpo', must be one of base, sft"),
        ([GOOD | {"name": "../x"}], "methods: entry 1: name = '../x' must be letters, digits"),
        ([GOOD | {"name": "sft"}], "methods: entry 1: name = 'sft' must be letters, digits, '.', '_', '-', not base"),
        ([GOOD, GOOD], "methods: two entries are named 'a.b-1'"),
        ([GOOD, GOOD | {"name": "A-b.1"}], "methods: 'a.b-1' and 'A-b.1' differ in no letter or digit; tasks need"),
    ],
)
def test_bad_lists_are_one_clear_line(methods: list[Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_methods(methods, "methods")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_only_takes_names_and_groups_and_keeps_the_order() -> None:
    entries = [GOOD | {"name": name, "group": group} for name, group in (("a", "x"), ("b", "y"), ("c", "x"))]
    methods = read_methods([*entries, GOOD | {"name": "d"}], "methods")
    assert [method.name for method in select(methods, ["d", "x"], "run r")] == ["a", "c", "d"]
    with pytest.raises(UserError, match="--only z: run r has no method or group of this name; it has a, b, c, d, x"):
        select(methods, ["a", "z"], "run r")


def test_the_tiny_run_has_all_six_methods() -> None:
    names = [method.name for method in read_run(RUNS / "tiny.yaml").methods]
    assert names == ["sapo-dpo", "sapo-orpo", "dpo", "orpo", "spin-dpo", "spin-orpo"]
