"""Compiles runs to packages, and tells when a committed package is no longer what its run file and the code say."""

import ast
import dataclasses
import difflib
import re
import tempfile
from pathlib import Path
from typing import Any

from kfp import compiler

from pipelines.graph import pipeline_of
from pipelines.local.kfp_patches import applied, compiler_patches
from pipelines.package import COMPILED, Package, read_package
from pipelines.runs import RUNS, Run, read_run


def packaged_runs() -> list[Run]:
    """The runs of `pipelines/runs` that say `package: true`."""
    runs = (read_run(path) for path in sorted(RUNS.glob("*.yaml")))
    return [run for run in runs if run.package]


def compile_run(run: Run, directory: Path | None = None) -> Package:
    """The package of a run, with its tasks in the order of the run.

    Args:
        run: what to compile.
        directory: where to leave the package as a file, `<name>.yaml`; nowhere if left out.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = (directory or Path(scratch)) / f"{run.name}.yaml"
        with applied(compiler_patches()):
            pipeline, titles = pipeline_of(run)
            compiler.Compiler().compile(pipeline, str(path))
        _settle_comment(path)
        return dataclasses.replace(read_package(path), tasks=titles)


def compile_packages(directory: Path = COMPILED) -> list[Path]:
    """Writes the package of every run that has one, removes what other packages lie there, and returns the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for run in packaged_runs():
        compile_run(run, directory)
        paths.append(directory / f"{run.name}.yaml")
    for other in set(directory.glob("*.yaml")) - set(paths):
        other.unlink()
    return paths


def drift(committed: Path = COMPILED) -> str:
    """What compiling would change in the committed packages, as a unified diff; empty when nothing."""
    changes: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        fresh = {path.name: path for path in compile_packages(Path(scratch))}
        for name in sorted(fresh.keys() | {path.name for path in committed.glob("*.yaml")}):
            old = committed / name
            before = old.read_text(encoding="utf-8").splitlines() if old.is_file() else []
            after = fresh[name].read_text(encoding="utf-8").splitlines() if name in fresh else []
            changes += difflib.unified_diff(before, after, str(old), f"{old} (from the code)", lineterm="")
    return "\n".join(changes)


def _settle_comment(package: Path) -> None:
    """Sorts the defaults that are mappings in the package's opening comment.

    There kfp writes them in an order that differs from process to process; in the specification itself it sorts them.
    """

    def settle(line: re.Match[str]) -> str:
        return f"{line[1]}{_in_order(ast.literal_eval(line[2]))!r}]"

    text = re.sub(
        r"^(#    \w+: (?:dict|list) \[Default: )([\[{].*[\]}])\]$",
        settle,
        package.read_text(encoding="utf-8"),
        flags=re.M,
    )
    package.write_text(text, encoding="utf-8")


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(inner) for inner in value] if isinstance(value, list) else value
