"""Every setting of every stage: another value is refused by name, or it is the same run, as its role says.

Stages and settings are found, not listed. What is listed are values that differ from the default where the type alone does not
tell one, and values that a stage refuses.
"""

import dataclasses
import importlib
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import components
from components.common.core.errors import UserError
from components.common.core.identity import OUTPUTS, Identity, Role, differences, refuse_other_run
from components.common.stage import session
from components.common.stage.parser import ConfigParser

STAGES = sorted(path.parent.name for path in Path(components.__file__).parent.glob("*/__main__.py"))
TRAINING = {"use_cpu": True, "report_to": "none", "bf16": False}
# What a run of these tests says besides its locations: settings that others need.
BASE: dict[str, dict[str, Any]] = {
    "sft": TRAINING,
    "dpo": TRAINING,
    "orpo": TRAINING,
    "sapo": TRAINING | {"use_peft": True},
    "spin": TRAINING
    | {"iterations": 2, "learning_rates": [1e-3, 5e-4], "betas": [0.1, 0.5], "orpo_lambdas": [0.1, 0.2]},
}
# Other values, where the type does not tell one that a stage takes; for a single stage after a dot.
OTHERS: dict[str, Any] = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "liger_kernel_config": {"rope": True},
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "model_init_kwargs": {"attn_implementation": "eager"},
    "optim_target_modules": ["q_proj"],
    "parallelism_config": {"tp_size": 1},
    "debug": "underflow_overflow",
    "eval_strategy": "steps",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "hub_strategy": "end",
    "log_level": "error",
    "log_level_replica": "error",
    "include_num_input_tokens_seen": "all",
    "train_sampling_strategy": "sequential",
    "torch_compile_backend": "eager",
    "torch_compile_mode": "max-autotune",
    "ddp_backend": "gloo",
    "report_to": "tensorboard",
    "packing_strategy": "bfd_split",
    "truncation_mode": "keep_end",
    "pad_to_multiple_of": 16,
    "f_divergence_type": "js_divergence",
    "loss_weights": [2.0],
    "attn_implementation": "eager",
    "save_steps": 20,
    "warmup_steps": 0.2,
    "iterations": 1,
    "learning_rates": [1e-3, 1e-4],
    "betas": [0.1, 0.7],
    "orpo_lambdas": [0.1, 0.3],
    "benchmarks": ["ifeval"],
    "judge_prices": {"gpt-4": [1.0, 2.0]},
    "lora_target_modules": ["q_proj"],
    "sft.loss_type": "dft",
    "dpo.loss_type": ["hinge"],
    "reference_interval": 5,
    "top_p": 0.5,
    "sampler_dtype": "bfloat16",  # float32 is what the base run settles on
}
# Settings that another one needs beside it.
TOGETHER: dict[str, dict[str, Any]] = {
    "load_best_model_at_end": {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 50, "save_steps": 50},
    "test_source_split": {"test_source": "t.jsonl"},
    "eval_packing": {"packing": True},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "nll_scope": {"loss_type": "orpo"},
    "schedule": {"use_peft": False, "lora_adapter": None},
}

# Settings that change along with another one.
ALONG: dict[str, dict[str, Any]] = {
    "iterations": {"learning_rates": [1e-3], "betas": [0.1], "orpo_lambdas": [0.1]},
    "use_peft": {"lora_adapter": None},
}


@pytest.fixture(scope="module")
def parsers() -> dict[str, ConfigParser]:
    """The command line of every stage, as its main makes it."""
    made: list[ConfigParser] = []
    make = ConfigParser.__init__

    def note(self: ConfigParser, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        made.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ConfigParser, "__init__", note)
        patched.setattr(ConfigParser, "help", lambda *_: "")
        for stage in STAGES:
            importlib.import_module(f"components.{stage}.__main__").main(["--help"])
    assert [parser.stage for parser in made] == STAGES
    return {parser.stage: parser for parser in made}


class Runs:
    """The identities of runs of a stage that differ in settings."""

    def __init__(self, parser: ConfigParser, directory: Path) -> None:
        self.parser, self.directory, self.stage = parser, directory, parser.stage
        self.base = dict(BASE.get(self.stage, {}))
        for name, field in parser.fields.items():
            if parser.roles[name] == Role.INPUT or field.default is dataclasses.MISSING is field.default_factory:
                self.base[name] = self.location(name, "input") if name != "output" else str(directory / "output")
        if self.stage == "report":
            self.base |= {name: [self.base[name]] for name in ("evaluations", "trainings")}

    def location(self, name: str, content: str) -> str:
        path = self.directory / f"{name}-{content}"
        path.write_text(content)
        return str(path)

    def identity(self, **settings: Any) -> Identity:
        running = session.Session(self.stage)
        session._current = running
        try:
            self.parser.parse(["--settings", json.dumps(self.base | settings)])
            return running.run["identity"]
        finally:
            session._current = None
            running.close()

    def other(self, name: str) -> dict[str, Any]:
        """The setting with another value, and those that change along with it."""
        value = OTHERS.get(f"{self.stage}.{name}", OTHERS.get(name))
        if value is None:
            value = another(self.parser.hints[name], self.base.get(name, self.parser._defaults().get(name)))
        return {name: value} | ALONG.get(name, {})

    def of_role(self, *roles: Role) -> Iterator[str]:
        return (name for name, role in self.parser.roles.items() if role in roles)


def another(hint: Any, value: Any) -> Any:
    """A value of a type that differs from another."""
    if typing.get_origin(hint) is typing.Literal:
        return next(choice for choice in typing.get_args(hint) if choice != value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(hint) if m is not type(None)]
        return another(members[0], value)
    if hint is bool:
        return not value
    if hint in (int, float):
        return hint((value or 0) + 1) if hint is int or (value or 0) >= 1 else (value or 0.25) / 2 + 0.125
    if hint is str:
        return f"{value or ''}x"
    if typing.get_origin(hint) in (list, tuple) or hint in (list, tuple):
        return [*(value or []), "x"]
    return {"x": 1}


@pytest.fixture(params=[stage for stage in STAGES if stage != "preflight"])  # it has no output to go on in
def runs(request: pytest.FixtureRequest, parsers: dict[str, ConfigParser], tmp_path: Path) -> Runs:
    return Runs(parsers[request.param], tmp_path)


# A stage refuses another value on this machine: such a setting cannot have been other in an earlier attempt of the run.
REFUSED = {"fp16", "tf32", "ddp_backend"}


def test_another_value_counts_by_its_role_and_is_named(runs: Runs):
    whole, refused = runs.identity(), set()
    for name in runs.of_role(Role.RESULT, Role.SCOPE, Role.OPERATION):
        beside = TOGETHER.get(name, {})
        other = runs.other(name)
        try:
            before = runs.identity(**beside) if beside and name not in beside else whole
            mine = runs.identity(**beside, **other)
        except (UserError, SystemExit):
            refused.add(name)
            continue
        check(name, runs.parser.roles[name], before, mine)
    assert refused <= REFUSED


def check(name: str, role: Role, before: Identity, mine: Identity) -> None:
    if role == Role.RESULT:
        with pytest.raises(UserError, match=rf"is of another run: (.*; )?{name} was .*, is "):
            refuse_other_run("out", before, mine)
        return

    assert differences(before, mine) == [], name
    named = [said.split(" was ")[0] for said in differences(before, mine, complete=True)]
    assert named == ([name] if role == Role.SCOPE else []), name


def test_an_input_may_lie_elsewhere_and_must_hold_the_same(runs: Runs):
    whole = runs.identity()
    for name in runs.of_role(Role.INPUT):
        many = isinstance(runs.base[name], list)
        moved, changed = runs.directory / "moved", runs.directory / "changed"
        moved.write_text("input")
        changed.write_text("something else")
        same, other = ([str(path)] if many else str(path) for path in (moved, changed))
        assert differences(whole, runs.identity(**{name: same}), complete=True) == [], name
        assert differences(whole, runs.identity(**{name: other})) == [f"other {name}"]


def test_results_may_go_elsewhere(runs: Runs):
    whole = runs.identity()
    for name in runs.of_role(*OUTPUTS):
        assert runs.identity(**{name: str(runs.directory / f"elsewhere-{name}")}) == whole, name


def test_a_default_that_is_given_is_one_that_is_left_out(runs: Runs):
    given = {name: value for name, value in runs.parser._defaults().items() if name not in runs.base}
    given = {name: value for name, value in given.items() if is_json(value) and name not in ("report_to", "deepspeed")}
    assert len(given) > 3
    assert runs.identity(**given) == runs.identity()


def is_json(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


INDIRECT = {
    "per_device_train_batch_size": (
        {"per_device_train_batch_size": 4, "num_processes": 2},
        "pairs_per_step was 8, is 4",
    ),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        "pairs_per_step was 8, is 16",
    ),
    "num_processes": ({"num_processes": 4, "per_device_train_batch_size": 2}, "pairs_per_step was 8, is 32"),
    "parallelism": ({"parallelism": "fsdp2"}, None),
    "start": ({"start": "sft"}, None),
    "deepspeed": (None, None),  # a launcher's, of machines with DeepSpeed
    "fsdp": (None, None),
    "fsdp_config": (None, None),
    "average_tokens_across_devices": ({"average_tokens_across_devices": False}, None),  # there is one process
    "accelerator_config": (
        {"accelerator_config": {"non_blocking": True}},
        None,
    ),
}


def test_work_may_be_spread_otherwise(runs: Runs):
    whole = runs.identity()
    for name in runs.of_role(Role.INDIRECT):
        equal, difference = INDIRECT[name]
        if equal is None:
            continue
        if name == "start":
            equal = equal | {"model": {"base": "nowhere", "sft": runs.base["model"]}}
        assert differences(whole, runs.identity(**equal), complete=True) == [], name
        if difference:
            assert differences(whole, runs.identity(**{name: equal[name]})) == [difference]


def test_averaging_over_processes_counts_where_there_are_several(parsers: dict[str, ConfigParser], tmp_path: Path):
    runs = Runs(parsers["sft"], tmp_path)
    two = {"num_processes": 2, "per_device_train_batch_size": 4}
    (said,) = differences(runs.identity(), runs.identity(**two, average_tokens_across_devices=False))
    assert said == "average_tokens_across_devices was True, is False"


def test_what_chooses_the_best_model_counts_with_it(parsers: dict[str, ConfigParser], tmp_path: Path):
    runs = Runs(parsers["dpo"], tmp_path)
    best = TOGETHER["load_best_model_at_end"] | {"load_best_model_at_end": True}
    (said,) = differences(runs.identity(**best), runs.identity(**best | {"save_steps": 100}))
    assert said == "save_steps was 50, is 100"


def test_every_setting_of_a_stage_without_an_output_has_a_role(parsers: dict[str, ConfigParser]):
    roles = parsers["preflight"].roles
    assert roles["report_file"] == Role.OUTPUT_FILE
    assert roles["dry_run"] == Role.OPERATION
    assert roles["gpus"] == Role.RESULT


def test_every_setting_that_libraries_declare_has_a_role_in_the_table():
    """A new version's setting needs one: components/common/training/roles.py."""
    from transformers import TrainingArguments
    from trl import DPOConfig, SFTConfig
    from trl.experimental.orpo import ORPOConfig

    from components.common.training.roles import TRAINER_ROLES

    declared = {f.name for c in (TrainingArguments, SFTConfig, DPOConfig, ORPOConfig) for f in dataclasses.fields(c)}
    assert declared - TRAINER_ROLES.keys() == set()
    assert TRAINER_ROLES.keys() - declared == set()
