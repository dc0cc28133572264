"""What wins, what is refused, and what the one line says."""

import dataclasses
from typing import Literal

import pytest

from components.common.core.errors import UserError
from components.common.stage import outputs, run
from components.common.stage.config import REQUIRED, StageConfig, setting
from components.common.stage.parser import ConfigParser


@dataclasses.dataclass(kw_only=True)
class ToyConfig(StageConfig):
    source: str = setting(REQUIRED, "Where rows come from.")
    rate: float = setting(0.1, "Share of rows, within [0, 1].", paper="0.5")
    steps: int | Literal["epoch"] = setting("epoch", "Steps.")
    kind: Literal["dpo", "orpo"] = setting("dpo", "Loss.")
    fast: bool = setting(False, "Fast.")
    limit: int | None = setting(None, "Rows.")
    names: list[str] = setting([], "Names.")
    shares: tuple[float, ...] = setting((), "Shares.")

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate = {self.rate}: must be within [0, 1]")


REQUIRED_FLAGS = ["--output", "out", "--source", "rows"]


def parse(*argv: str) -> ToyConfig:
    return ConfigParser("toy", [ToyConfig]).parse([*REQUIRED_FLAGS, *argv])[0]


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_win_over_settings_over_recipe_over_defaults(recipe):
    path = recipe("rate: 0.2\nsteps: 5\nkind: orpo\nlimit: 7")
    config = parse("--config", path, "--settings", '{"rate": 0.3, "steps": 6}', "--rate", "0.4")
    assert (config.rate, config.steps, config.kind, config.limit, config.fast) == (0.4, 6, "orpo", 7, False)


def test_recipe_may_give_required_settings(recipe):
    path = recipe("output: a\nsource: b")
    assert ConfigParser("toy", [ToyConfig]).parse(["--config", path])[0].source == "b"


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--fast"], "fast", True),
        (["--fast", "false"], "fast", False),
        (["--limit", "none"], "limit", None),
        (["--rate", "5e-1"], "rate", 0.5),
        (["--steps", "epoch"], "steps", "epoch"),
        (["--steps", "12"], "steps", 12),
        (["--names", "[a, b]"], "names", ["a", "b"]),
        (["--names", "a"], "names", ["a"]),
        (["--shares", "0.5"], "shares", (0.5,)),
        (["--source", "123"], "source", "123"),
        (["--settings", ""], "rate", 0.1),
    ],
)
def test_values_of_flags(flags, field, value):
    assert getattr(parse(*flags), field) == value


def test_yaml_numbers_without_a_point_are_numbers(recipe):
    assert parse("--config", recipe("rate: 5e-1")).rate == 0.5  # YAML 1.1 reads 5e-1 as text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rat", "1"], r"unknown argument '--rat'; did you mean 'rate'\?"),
        (["--rat=1"], r"^unknown argument '--rat'; did you mean 'rate'\?"),
        (["rate"], r"unknown argument 'rate'; `python -m components.toy --help`"),
        (["--rate"], r"^--rate: needs a value \(float\): Share of rows, within \[0, 1\]\.$"),
        (["--rate", "--fast"], r"^--rate: needs a value"),
        (["--rate="], r"^--rate: needs a value"),
        (["--kind"], r"^--kind: needs a value \(dpo\|orpo\): Loss"),
        (["--config"], r"^--config: needs a value; `python -m components.toy --help`"),
        (["--rate", "fast"], r"command line: rate = 'fast' is not valid: .*valid number"),
        (["--rate", "2"], r"rate = 2.0: must be within \[0, 1\]"),
        (["--kind", "ppo"], r"kind = 'ppo' is not valid: .*'dpo' or 'orpo'"),
        (["--settings", '{"stpes": 1}'], r"--settings: unknown setting 'stpes'; did you mean 'steps'\?"),
        (["--settings", "{"], r"--settings: not valid JSON"),
        (["--settings", "[1]"], r"--settings: must be a JSON object, is list"),
        (["--config", "missing.yaml"], r"--config missing.yaml: no such file"),
    ],
)
def test_mistakes_name_the_setting_the_value_and_what_is_allowed(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sorce: x", r"recipe.yaml: unknown setting 'sorce'; did you mean 'source'\?"),
        ("rate: [", r"recipe.yaml: not valid YAML"),
        ("- a", r"recipe.yaml: must be a mapping"),
        ("limit: many", r"recipe.yaml: limit = 'many' is not valid"),
    ],
)
def test_mistakes_in_a_recipe_name_the_file(recipe, text, message):
    with pytest.raises(UserError, match=message):
        parse("--config", recipe(text))


def test_missing_required_setting():
    with pytest.raises(UserError, match=r"--source is required: Where rows come from\."):
        ConfigParser("toy", [ToyConfig]).parse(["--output", "x"])


def test_hidden_settings_cannot_be_given():
    with pytest.raises(UserError, match="unknown argument '--limit'"):
        ConfigParser("toy", [ToyConfig], hidden=["limit"]).parse([*REQUIRED_FLAGS, "--limit", "3"])


def test_help_has_meaning_type_default_and_paper_value(monkeypatch):
    monkeypatch.setattr(ToyConfig, "__module__", "components.toy")  # settings of libraries are shortened
    text = " ".join(ConfigParser("toy", [ToyConfig]).help("toy: a stage.").split())
    assert "--rate float Share of rows, within [0, 1]. [default: 0.1; paper: 0.5]" in text
    assert "--kind dpo|orpo Loss. [default: dpo]" in text
    assert "--source str Where rows come from. [required]" in text


def test_output_that_holds_files_is_refused_and_kept(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(UserError, match=r"is not empty; give another directory, or --overwrite"):
        outputs.prepare_output(str(tmp_path), overwrite=False)
    assert (tmp_path / "precious.txt").exists()


def test_overwrite_empties_the_output(tmp_path):
    (tmp_path / "old.txt").write_text("x")
    assert list(outputs.prepare_output(str(tmp_path), overwrite=True).iterdir()) == []


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; give a directory"):
        outputs.prepare_output(str(tmp_path / "file"), overwrite=True)


def test_parents_of_the_output_are_made(tmp_path):
    assert outputs.prepare_output(str(tmp_path / "a" / "b"), overwrite=False).is_dir()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("rate = 2: must be within [0, 1]"), 2, "error: rate = 2: must be within [0, 1]"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "the disk is full"),
    ],
)
def test_a_stage_ends_with_one_line_and_an_exit_code(error, code, message, capsys, monkeypatch):
    def main(argv):
        raise error

    monkeypatch.setattr("sys.argv", ["stage"])
    with pytest.raises(SystemExit) as stopped:
        run.run_stage(main)
    said = capsys.readouterr().err
    assert stopped.value.code == code
    assert message in said and said.count("\n") == 1


def test_a_bug_keeps_its_stack_trace(monkeypatch):
    def main(argv):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sys.argv", ["stage"])
    with pytest.raises(RuntimeError, match="a bug"):
        run.run_stage(main)
