"""Compiles the pipelines to `pipelines/compiled/*.yaml`, and tells when a committed package is no longer the code."""

import difflib
import tempfile
from pathlib import Path

from kfp import compiler

from pipelines.package import COMPILED
from pipelines.sapo import sapo

PIPELINES = {"sapo": sapo}


def compile_pipelines(directory: Path = COMPILED) -> list[Path]:
    """Writes one package per pipeline and returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, pipeline in PIPELINES.items():
        paths.append(directory / f"{name}.yaml")
        compiler.Compiler().compile(pipeline, str(paths[-1]))
    return paths


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
