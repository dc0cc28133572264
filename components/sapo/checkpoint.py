"""Checkpoints: one directory with everything, proven complete by a manifest that is written last.

    checkpoint-40/
      policy.safetensors  ema.safetensors  reference.safetensors (DPO)   trained weights, each flat
      optimizer.safetensors  optimizer.json  scheduler.json              the optimizer step
      buffer.safetensors  held_out.safetensors                           pairs, counts, the start model's log-probs
      random-1-of-1.safetensors  random-1-of-1.json                      states of torch, numpy and Python
      trainer.json                                                       step, log history, metrics not yet logged
      settings.json                                                      settings, data digest, versions
      manifest.json                                                      size and sha256 of each file; last, atomically

Where the policy is sharded, each process writes its parts of the first four to a file of its own, `policy-1-of-8.safetensors`,
with the place of each part in its metadata. Whoever resumes reads the elements it needs from whichever files have them: another
number of processes, or another way to shard, needs no conversion.

Only safetensors and JSON: nothing that is read can run code. A directory without a manifest is an interrupted save and is
passed over; one whose files do not match its manifest is refused.
"""

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.common.core.errors import UserError
from components.common.training.distributed.processes import barrier, gather, is_main_process

MANIFEST = "manifest.json"
KIND = "sapo-checkpoint"
SCHEMA = 2
STARTS = "starts"  # in a file's metadata: the first element of each of its parts
PREFIX = "checkpoint-"


class CheckpointWriter:
    """Writes one checkpoint, by all processes together; `finish` makes it count.

    Args:
        directory: the checkpoint's own directory; what an interrupted save left there is removed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._mine: list[Path] = []
        if is_main_process():
            if directory.exists():
                shutil.rmtree(directory)
            directory.mkdir(parents=True)
        barrier()

    def tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Writes `<name>.safetensors`, in the first process only."""
        if is_main_process():
            self._save(name, tensors)

    def parts(self, name: str, parts: dict[str, Tensor], starts: dict[str, int] | None) -> None:
        """Writes this process's parts of tensors.

        Args:
            parts: flat.
            starts: where each part begins in the whole flat tensor; None where all processes have the whole.
        """
        if starts is None:
            self.tensors(name, parts)
        else:
            self._save(f"{name}-{of_processes()}", parts, {STARTS: json.dumps(starts)})

    def own(self, name: str, tensors: dict[str, Tensor], content: Any) -> None:
        """Writes what each process has for itself."""
        self._save(f"{name}-{of_processes()}", tensors)
        self._write(f"{name}-{of_processes()}", content)

    def json(self, name: str, content: Any) -> None:
        """Writes `<name>.json`, in the first process only."""
        if is_main_process():
            self._write(name, content)

    def add(self, name: str) -> Path:
        """The path of a file that someone else is about to write."""
        self._mine.append(self.directory / name)
        return self._mine[-1]

    def _save(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Tensors that share memory are written apart."""
        plain = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        seen: dict[int, str] = {}
        for key, tensor in plain.items():
            if tensor.numel() and seen.setdefault(tensor.data_ptr(), key) != key:
                plain[key] = tensor.clone()
        save_file(plain, self.add(f"{name}.safetensors"), metadata)

    def _write(self, name: str, content: Any) -> None:
        self.add(f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    def finish(self, step: int) -> None:
        """Flushes every file to disk, then puts the manifest in place in one move."""
        mine = []
        for path in self._mine:
            _sync(path)
            mine.append((path.name, {"size": path.stat().st_size, "sha256": _sha256(path)}))
        files = dict(sorted(gather(mine)))
        if is_main_process():
            manifest = {"kind": KIND, "schema": SCHEMA, "step": step, "files": files}
            unfinished = self.directory / f"{MANIFEST}.tmp"
            unfinished.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _sync(unfinished)
            unfinished.rename(self.directory / MANIFEST)
            _sync(self.directory)
        barrier()


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

    def own(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """What this process wrote for itself; None if as many processes did not write this checkpoint."""
        mine = f"{name}-{of_processes()}"
        return (self.tensors(mine), self.json(mine)) if (self.directory / f"{mine}.json").exists() else None

    def parts(self, name: str) -> "SavedParts":
        """The tensors that `CheckpointWriter.parts` wrote under a name."""
        whole = self.directory / f"{name}.safetensors"
        return SavedParts([whole] if whole.exists() else sorted(self.directory.glob(f"{name}-*-of-*.safetensors")))


class SavedParts:
    """Flat tensors, each in one or several files.

    Args:
        paths: the files.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._places: dict[str, list[tuple[int, Any]]] = {}  # of each tensor: first element, and its slice of a file
        for path in paths:
            file = safe_open(path, framework="pt")
            starts = json.loads((file.metadata() or {}).get(STARTS, "{}"))
            for key in file.keys():  # noqa: SIM118  (not a dict)
                self._places.setdefault(key, []).append((starts.get(key, 0), file.get_slice(key)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def size(self, key: str) -> int:
        """Elements of the whole tensor."""
        return sum(math.prod(part.get_shape()) for _, part in self._places[key])

    def read(self, key: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a tensor, flat.

        Raises:
            UserError: they are in none of the files.
        """
        found = []
        for first, part in sorted(self._places.get(key, []), key=lambda place: place[0]):
            low, high = max(start, first), min(start + length, first + part.get_shape()[0])
            if low < high:
                found.append(part[low - first : high - first])
        elements = torch.cat(found) if found else torch.zeros(0)
        if len(elements) != length:
            raise UserError(f"the checkpoint has {len(elements)} of {length} elements of {key}: it is of another model")
        return elements

    def read_whole(self, key: str) -> Tensor:
        """A tensor that is in one file, in its own shape."""
        return self._places[key][0][1][:]


def of_processes() -> str:
    """Which process this is, in the name of a file."""
    processes = PartialState()
    return f"{processes.process_index + 1}-of-{processes.num_processes}"


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
