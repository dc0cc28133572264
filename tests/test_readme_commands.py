"""What the READMEs tell people to type works: flags, recipes, run files and targets exist, and marked blocks run.

A fenced block below the line `<!-- runnable -->` is run: its commands in order, in a directory that has this project and,
where the README's own commands do not make them, `runs/data`, `runs/model` and `runs/sft` of a model of 60 thousand
parameters. Stages run in this process (importing torch for each would take minutes); everything else in a shell.
"""

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from components.common.core.conversations import read_rows, write_rows
from components.common.stage.recipes import find_recipe
from pipelines.__main__ import main as pipelines_main
from pipelines.runs import run_names

ROOT = Path(__file__).parents[1]
PARTS = ("components", "pipelines", "docker", "helm", "tests")
READMES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for part in PARTS for path in (ROOT / part).rglob("README.md")),
]
MARK = "<!-- runnable -->"
STAGE = re.compile(r"python3? -m components\.(\w+)(?![\w.])")
MODULE = re.compile(r"python3? -m (components\.\w+\.[\w.]+)")  # a tool of a stage
PIPELINES = re.compile(r"python3? -m pipelines (\w+)")
IMAGE = re.compile(r"ghcr\.io/sapo-pipelines/(\w+):\S+")


class Block(NamedTuple):
    """A fenced block: where it is, its language ("" for a shell's), whether it is marked, and its text."""

    readme: Path
    line: int
    language: str
    marked: bool
    text: str

    def commands(self) -> list[str]:
        """One entry a command: comments cut off, continued lines joined."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [bare for line in lines if (bare := re.sub(r"(^|\s)#.*", "", line).strip())]


def blocks(readme: Path) -> Iterator[Block]:
    lines = readme.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        before = lines[start - 1] if start else ""
        text = "\n".join(lines[start + 1 : number]) + "\n"
        yield Block(readme, start + 1, lines[start].removeprefix("```"), before == MARK, text)
        start = None


def name(readme: Path) -> str:
    return readme.relative_to(ROOT).as_posix()


def shell_commands(readme: Path) -> list[str]:
    """Commands of its shell blocks, and those in running text."""
    inline = re.findall(r"`([^`\n]*python3? -m [^`\n]*)`", re.sub(r"```.*?```", "", readme.read_text(), flags=re.S))
    return [*inline, *(c for b in blocks(readme) if b.language in ("", "bash", "sh") for c in b.commands())]


@cache
def flags_of_stage(stage: str) -> set[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        importlib.import_module(f"components.{stage}.__main__").main(["--help"])
    return {"help", *re.findall(r"^  --(\w+)", said.getvalue(), re.M)}


@cache
def flags_of_pipelines(command: str) -> set[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        pipelines_main([command, "--help"])
    return set(re.findall(r"--(\w+)", said.getvalue()))


def arguments(command: str, after: re.Match[str]) -> list[str]:
    """The words behind a program's name, up to a pipe, a redirection or the next command."""
    rest = re.split(r"\s(?:\||>|<|&&|;)(?:\s|$)|[;)]$", command[after.end() :])[0]
    return shlex.split(rest, posix=True)


def wrong(command: str) -> list[str]:
    """What in a command does not exist."""
    if match := MODULE.search(command):
        return [] if importlib.util.find_spec(match[1]) else [f"module {match[1]}"]
    if match := STAGE.search(command):
        stage = match[1]
    elif match := IMAGE.search(command):
        stage = match[1]
        if stage == "train":  # the image of every training stage; the stage is its first argument
            stage = arguments(command, match)[0]
    elif match := PIPELINES.search(command):
        given = arguments(command, match)
        runs = [] if match[1] == "compile" else [word for word in given[:1] if word not in ("RUN", "--help")]
        missing = [f"run {word}" for word in runs if not (ROOT / word).is_file() and word not in run_names()]
        return missing + unknown(given, flags_of_pipelines(match[1]))
    elif command.startswith("make "):
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        words = [word for word in command.split()[1:] if "=" not in word]
        return [f"target {word}" for word in words if word not in targets and not word.startswith(".venv/")]
    else:
        return []
    given = arguments(command, match)
    if not (ROOT / "components" / stage / "__main__.py").is_file():
        return [f"stage {stage}"]
    problems = unknown(given, flags_of_stage(stage) | {"config", "settings"})
    for i, word in enumerate(given[:-1]):
        if word == "--config" and re.fullmatch(r"[\w-]+", given[i + 1]) and given[i + 1] != "RECIPE":
            try:
                find_recipe(stage, given[i + 1])
            except Exception as error:
                problems.append(str(error))
    return problems


def unknown(given: list[str], flags: set[str]) -> list[str]:
    words = [word.removeprefix("--").partition("=")[0] for word in given if re.match(r"--\w", word)]
    return [f"flag --{word}" for word in words if word not in flags]


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_commands_name_stages_flags_recipes_run_files_and_targets_that_exist(readme: Path) -> None:
    problems = {command: found for command in shell_commands(readme) if (found := wrong(command))}
    assert not problems


def test_a_command_that_went_stale_is_found() -> None:
    assert wrong("python -m components.data --config chitchat --sauce x") == ["flag --sauce"]
    assert wrong("python -m components.data --config chitchad --output x")[0].startswith("--config chitchad: no such")
    assert wrong("python -m components.dta --output x") == ["stage dta"]
    assert wrong("python -m pipelines run pipelines/runs/none.yaml --onyl x") == [
        "run pipelines/runs/none.yaml",
        "flag --onyl",
    ]
    assert wrong("python -m pipelines submit tinny --wait") == ["run tinny"]
    assert wrong("python -m pipelines run tiny --only dpo") == []
    assert wrong("docker run ghcr.io/sapo-pipelines/train:1.0 dpo --bta 1") == ["flag --bta"]
    assert wrong("make tset") == ["target tset"]
    assert wrong("FOO=1 .venv/bin/python -m components.data --config own --output x | tee log") == []


@pytest.fixture
def workplace(tmp_path: Path, chat_data: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that has this project, a `python`, and runs/data (with `rejected`), runs/model and runs/sft."""
    for part in ("components", "pipelines", "tests", "docker", "helm", "Makefile", "pyproject.toml"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "bin").mkdir()
    for program in ("python", "python3"):
        script = tmp_path / "bin" / program
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        script.chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(tmp_path / "bin")
    for split in ("train", "test"):
        rows = read_rows(chat_data, split)[:24]
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            row["rejected"] = other["chosen"]
        (tmp_path / "runs" / "data").mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "runs" / "data" / f"{split}.jsonl", rows)
    for model in ("model", "sft"):
        (tmp_path / "runs" / model).symlink_to(micro_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return tmp_path


def run(block: Block, place: Path) -> None:
    if block.language == "python":
        exec(compile(block.text, str(block.readme), "exec"), {"__name__": "__main__"})
        return
    for command in block.commands():
        if match := re.match(rf"(?:\.venv/bin/)?{STAGE.pattern}", command):
            importlib.import_module(f"components.{match[1]}.__main__").main(arguments(command, match))
            continue
        done = subprocess.run(["bash", "-euc", command], cwd=place, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("readme", [path for path in READMES if any(b.marked for b in blocks(path))], ids=name)
def test_marked_blocks_run(readme: Path, workplace: Path) -> None:
    marked = [block for block in blocks(readme) if block.marked]
    made = {Path(word) for block in marked for word in re.findall(r"--output (runs/\w+)(?=\s)", block.text)}
    for path in made & {Path("runs/data"), Path("runs/model"), Path("runs/sft")}:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    for block in marked:
        run(block, workplace)
    assert all(any(path.iterdir()) for path in made if f"--output {path} --dry_run" not in readme.read_text())
