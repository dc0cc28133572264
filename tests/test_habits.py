"""What holds for every commit: the form of its subject, and that the lock has all that a developer's machine installs."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
HOOKS = {
    hook["id"]: hook
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    for hook in repository["hooks"]
}


def subject_is_taken(message: str, directory: Path) -> bool:
    """What pre-commit says of a commit message."""
    hook = HOOKS["commit-subject"]
    file = directory / "COMMIT_EDITMSG"
    file.write_text(message, encoding="utf-8")

    command = [sys.executable, "-m", "pre_commit.languages.pygrep", *hook["args"], hook["entry"], str(file)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "message",
    [
        "feat: a third engine\n\nIts weights are pushed by name.\n",
        "fix(sapo): say which row is empty",
        "refactor!: one identity for all stages\n",
        "test: " + "x" * 66 + "\n\n" + "y" * 100,
        "Merge branch 'gpu'\n",
        'Revert "feat: a third engine"\n',
    ],
)
def test_a_conventional_subject_is_taken(message: str, tmp_path: Path) -> None:
    assert subject_is_taken(message, tmp_path)


@pytest.mark.parametrize(
    "message",
    [
        "README: figures of today\n",
        "a third engine\n\nfeat: not in the subject\n",
        "feat a third engine\n",
        "feat:\n",
        "test: " + "x" * 67 + "\n\nThe subject has 73 characters.\n",
    ],
)
def test_any_other_subject_is_refused(message: str, tmp_path: Path) -> None:
    assert not subject_is_taken(message, tmp_path)


def test_hooks_run_what_make_check_runs() -> None:
    """No tool that the other does not have, and none from the network."""
    check = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ncheck:")[1].split("\n\n")[0]
    tools = re.findall(r"\$\(VENV\)/bin/(ruff \w+|mypy|lint-imports)", check)
    local = [re.match(r"\.venv/bin/(ruff \w+|[\w-]+)", hook["entry"]) for hook in HOOKS.values()]
    assert sorted(tools) == sorted(found[1] for found in local if found)
    assert {hook["language"] for hook in HOOKS.values()} == {"system", "pygrep"}


def requirements_of(extra: str) -> Iterator[Requirement]:
    """What an extra of ours asks for, with what the extras it names ask for."""
    for line in [*PROJECT["dependencies"], *EXTRAS[extra]]:
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            yield requirement
            continue
        for named in requirement.extras:
            yield from requirements_of(named)


def brought_by(requirement: Requirement, seen: set[tuple[str, frozenset[str]]]) -> None:
    """Adds to `seen` all distributions that come with one, from the metadata of those that are installed."""
    key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
    if key in seen:
        return
    seen.add(key)

    for line in importlib.metadata.requires(requirement.name) or []:
        needed = Requirement(line)
        asked = ("", *requirement.extras)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in asked):
            brought_by(needed, seen)


def locked() -> list[str]:
    lines = (ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [canonicalize_name(line.split("==")[0]) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("extra", ["all", "dev"])
def test_all_that_an_extra_brings_is_in_the_lock(extra: str) -> None:
    seen: set[tuple[str, frozenset[str]]] = set()
    for requirement in requirements_of(extra):
        brought_by(requirement, seen)

    assert len(seen) > 50
    assert {name for name, _ in seen} - set(locked()) == set()


def test_the_lock_has_each_distribution_once() -> None:
    names = locked()
    assert len(names) == len(set(names))


def test_the_sapo_stage_imports_without_trl() -> None:
    """Its extra does not bring TRL. What the learner, the sampler and the command import is asked for without it."""
    assert not [line for line in requirements_of("sapo") if line.name == "trl"]
    modules = ", ".join(f"components.sapo.{name}" for name in ("__main__", "config", "trainer"))
    code = f"import sys; sys.modules['trl'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
