"""Compiles the pipelines to `pipelines/compiled/*.yaml`, and tells when a committed package is no longer the code."""

import ast
import difflib
import re
import tempfile
from pathlib import Path

from kfp import compiler

from pipelines.ablation import ablation
from pipelines.comparison import comparison
from pipelines.package import COMPILED
from pipelines.sapo import sapo

PIPELINES = {"sapo": sapo, "comparison": comparison, "ablation": ablation}


def compile_pipelines(directory: Path = COMPILED) -> list[Path]:
    """Writes one package per pipeline and returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, pipeline in PIPELINES.items():
        paths.append(directory / f"{name}.yaml")
        compiler.Compiler().compile(pipeline, str(paths[-1]))
        _count_lists(paths[-1])
    return paths


def _count_lists(package: Path) -> None:
    """Puts a count for the default of a list in the package's opening comment, where kfp writes mappings in an order that
    differs from process to process. The specification itself is not touched: there kfp sorts them."""

    def count(line: re.Match[str]) -> str:
        return f"{line[1]}{len(ast.literal_eval(line[2]))} entries]"

    text = re.sub(r"^(#    \w+: list \[Default: )(\[.*\])\]$", count, package.read_text(encoding="utf-8"), flags=re.M)
    package.write_text(text, encoding="utf-8")


def drift(committed: Path = COMPILED) -> str:
    """What compiling would change in the committed packages, as a unified diff; empty when nothing."""
    changes: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for fresh in compile_pipelines(Path(scratch)):
            old = committed / fresh.name
            before = old.read_text(encoding="utf-8").splitlines() if old.is_file() else []
            after = fresh.read_text(encoding="utf-8").splitlines()
            changes += difflib.unified_diff(before, after, str(old), f"{old} (from the code)", lineterm="")
    return "\n".join(changes)
