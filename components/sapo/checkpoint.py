"""Checkpoints: one directory with everything, proven complete by a manifest that is written last.

    checkpoint-40/
      policy.safetensors  ema.safetensors  reference.safetensors (DPO)   weights
      optimizer.safetensors  scheduler.json                              the optimizer step
      buffer.safetensors  held_out.safetensors                           pairs, counts, the start model's log-probs
      random.safetensors  random.json                                    states of torch, numpy and Python
      trainer.json                                                       step, log history, metrics not yet logged
      settings.json                                                      settings, data digest, versions
      manifest.json                                                      size and sha256 of each file; last, atomically

Only safetensors and JSON: nothing that is read can run code. A directory without a manifest is an interrupted save and is
passed over; one whose files do not match its manifest is refused.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.common.errors import UserError

MANIFEST = "manifest.json"
KIND = "sapo-checkpoint"
SCHEMA = 1
PREFIX = "checkpoint-"


class CheckpointWriter:
    """Writes one checkpoint; `finish` makes it count.

    Args:
        directory: the checkpoint's own directory; what an interrupted save left there is removed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(parents=True)

    def tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Writes `<name>.safetensors`; tensors that share memory are written apart."""
        plain = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        seen: dict[int, str] = {}
        for key, tensor in plain.items():
            if tensor.numel() and seen.setdefault(tensor.data_ptr(), key) != key:
                plain[key] = tensor.clone()
        save_file(plain, self.directory / f"{name}.safetensors")

    def json(self, name: str, content: Any) -> None:
        """Writes `<name>.json`."""
        (self.directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    def finish(self, step: int) -> None:
        """Flushes every file to disk, then puts the manifest in place in one move."""
        files = {}
        for path in sorted(self.directory.iterdir()):
            files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
            _sync(path)
        manifest = {"kind": KIND, "schema": SCHEMA, "step": step, "files": files}
        unfinished = self.directory / f"{MANIFEST}.tmp"
        unfinished.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(unfinished)
        unfinished.rename(self.directory / MANIFEST)
        _sync(self.directory)


class CheckpointReader:
    """Reads a checkpoint after checking all of it against its manifest.

    Raises:
        UserError: there is no manifest, it is not one of ours, or a file is missing, truncated or changed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.step = _verified(directory)["step"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.directory / f"{name}.safetensors")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.directory}: {name}.safetensors cannot be read: {error}") from error

    def json(self, name: str) -> Any:
        return json.loads((self.directory / f"{name}.json").read_text(encoding="utf-8"))


def complete_checkpoints(directory: Path) -> list[Path]:
    """Directories that have a manifest, oldest step first."""
    found = [path for path in directory.glob(f"{PREFIX}*") if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def remove_old(directory: Path, keep: int) -> None:
    """Keeps the newest `keep` complete checkpoints, and removes older ones with what interrupted saves left."""
    kept = complete_checkpoints(directory)[-keep:]
    newest = int(kept[-1].name.removeprefix(PREFIX)) if kept else -1
    for path in directory.glob(f"{PREFIX}*"):
        if path not in kept and int(path.name.removeprefix(PREFIX)) <= newest:
            (path / MANIFEST).unlink(missing_ok=True)  # first, so that a half-removed one never counts
            shutil.rmtree(path)


def require_complete(directory: Path) -> Path:
    """The directory, if it has a manifest; its files are checked when it is read.

    Raises:
        UserError: there is none.
    """
    if not (directory / MANIFEST).is_file():
        raise UserError(
            f"{directory}: is not a complete checkpoint (no {MANIFEST}); an older one may be: --resume_from DIR"
        )
    return directory


def _verified(directory: Path) -> dict[str, Any]:
    path = require_complete(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["kind"] != KIND or manifest["schema"] != SCHEMA:
            raise ValueError(f"kind {manifest['kind']!r}, schema {manifest['schema']!r}")
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not the manifest of a SAPO checkpoint of schema {SCHEMA}: {error}") from error
    for name, expected in files.items():
        _verify_file(directory / name, expected)
    return manifest


def _verify_file(path: Path, expected: dict[str, Any]) -> None:
    advice = "choose an older checkpoint with --resume_from DIR"
    if not path.is_file():
        raise UserError(f"{path}: is missing from the checkpoint; {advice}")
    if path.stat().st_size != expected["size"]:
        raise UserError(f"{path}: has {path.stat().st_size} bytes, the manifest says {expected['size']}; {advice}")
    if _sha256(path) != expected["sha256"]:
        raise UserError(f"{path}: was changed after it was saved (sha256 differs); {advice}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors named "<parameter>.<name>" and the rest as JSON."""
    tensors, plain = {}, {}
    for parameter, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value
            else:
                plain[f"{parameter}.{name}"] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def unflatten_optimizer(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**plain["state"], **tensors}.items():
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = value
    return {"state": state, "param_groups": plain["param_groups"]}


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of every global random generator of the process, as tensors and JSON."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, next_gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    plain = {"numpy": [name, position, has_gauss, gauss], "python": [version, list(internal), next_gauss]}
    return tensors, plain


def restore_random_states(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """The inverse of `random_states`."""
    name, position, has_gauss, gauss = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, next_gauss = plain["python"]
    random.setstate((version, tuple(internal), next_gauss))
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[f"cuda.{i}"] for i in range(torch.cuda.device_count()) if f"cuda.{i}" in tensors]
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
