"""Checkpoints: one directory with everything, proven complete by a manifest that is written last.

    checkpoint-40/
      policy.safetensors  ema.safetensors  reference.safetensors  served.safetensors   trained weights, each flat
      optimizer.safetensors  optimizer.json            the optimizer step and the learning rate schedule
      buffer.safetensors  sampling.safetensors         pairs with their counts; entries that wait for the next step
      reference_logps.safetensors  held_out.safetensors    log-probs of the reference, and of the start model
      random.own-1-of-1.safetensors  .json             states of torch, numpy and Python
      weights.json  metrics.json  trainer.json  trainer_state.json    versions, values not yet logged, log history
      settings.json                                    settings, data digest, versions
      manifest.json                                    size and sha256 of each file; last, atomically

`save` and `load` take the parts of a run by name, each with `state_dict` and `load_state_dict`, and know nothing else of them.
How a value is written follows from what it is:

    Parts          this process's elements of tensors, to `<key>.safetensors`; where the policy is sharded, each process has a
                   file of its own, `<key>-1-of-8.safetensors`, with the place of each part in its metadata
    PerProcess     what each process has for itself, to `<key>.own-1-of-8.safetensors` and `.json`: never taken for parts
    tensor, array  to `<name>.safetensors`, by the first process
    anything else  to `<name>.json`, by the first process

Whoever resumes reads the elements it needs from whichever files have them: another number of processes, or another way to
shard, needs no conversion. Only safetensors and JSON: nothing that is read can run code. A directory without a manifest is an
interrupted save and is passed over; one whose files do not match its manifest is refused.
"""

import functools
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.common.core.errors import UserError
from components.common.training.distributed.processes import barrier, gather, is_main_process

MANIFEST = "manifest.json"
KIND = "sapo-checkpoint"
SCHEMA = 3
STARTS = "starts"  # in a file's metadata: the first element of each of its parts
PREFIX = "checkpoint-"


State = Mapping[str, Any]


class Stateful(Protocol):
    """A part of a run. What its `state_dict` holds is the same in every process, but for `Parts` and `PerProcess`."""

    def state_dict(self) -> State:
        """What a resumed run needs of it."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Puts it back; tensors come as arrays, `Parts` as `SavedParts`."""
        ...


@dataclass(frozen=True)
class Parts:
    """This process's parts of tensors.

    Attributes:
        tensors: flat, by name.
        starts: where each begins in the whole flat tensor; None where every process has the whole.
    """

    tensors: dict[str, Tensor]
    starts: dict[str, int] | None


@dataclass(frozen=True)
class PerProcess:
    """What this process has for itself. Another number of processes does not get it back."""

    tensors: dict[str, Tensor]
    content: Any


def save(writer: "CheckpointWriter", run: Mapping[str, Stateful]) -> None:
    """Writes the parts of a run by name; every process must call this."""
    for name, part in run.items():
        _save_state(writer, name, part.state_dict())


def _save_state(writer: "CheckpointWriter", name: str, state: State) -> None:
    tensors: dict[str, Tensor] = {}
    content: dict[str, Any] = {}

    for key, value in state.items():
        if isinstance(value, Parts):
            writer.parts(key, value)
        elif isinstance(value, PerProcess):
            writer.own(key, value)
        elif isinstance(value, Tensor | np.ndarray):
            tensors[key] = torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
        else:
            content[key] = value

    if tensors:
        writer.tensors(name, tensors)
    if content:
        writer.json(name, content)


def load(reader: "CheckpointReader", run: Mapping[str, Stateful]) -> None:
    """Puts the parts of a run back.

    Raises:
        UserError: a file cannot be read, or is of another model.
    """
    for name, part in run.items():
        part.load_state_dict(_Saved(reader, name))


class _Saved(Mapping[str, Any]):
    """What `_save_state` wrote under a name: its own tensors and JSON, and, by their keys, `Parts` and `PerProcess`."""

    def __init__(self, reader: "CheckpointReader", name: str) -> None:
        self._reader = reader
        self._name = name

    @functools.cached_property
    def _content(self) -> dict[str, Any]:
        return self._reader.json(self._name) if self._reader.has(f"{self._name}.json") else {}

    @functools.cached_property
    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        if not self._reader.has(f"{self._name}.safetensors"):
            return {}

        return {key: tensor.numpy() for key, tensor in self._reader.tensors(self._name).items()}

    def __getitem__(self, key: str) -> Any:
        if key in self._content:
            return self._content[key]
        if (own := self._reader.own(key)) is not None:
            return own
        if (parts := self._reader.parts(key)) is not None:
            return parts
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        yield from self._content
        yield from self._arrays

    def __len__(self) -> int:
        return len(self._content) + len(self._arrays)


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

    def parts(self, name: str, parts: Parts) -> None:
        """Writes this process's parts of tensors."""
        if parts.starts is None:
            self.tensors(name, parts.tensors)
        else:
            self._save(f"{name}-{of_processes()}", parts.tensors, {STARTS: json.dumps(parts.starts)})

    def own(self, name: str, mine: PerProcess) -> None:
        """Writes what each process has for itself."""
        self._save(f"{name}.own-{of_processes()}", mine.tensors)
        self._write(f"{name}.own-{of_processes()}", mine.content)

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

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.directory / name).is_file()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A file of tensors."""
        try:
            return load_file(self.directory / f"{name}.safetensors")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.directory}: {name}.safetensors cannot be read: {error}") from error

    def json(self, name: str) -> Any:
        """A file of JSON."""
        return json.loads((self.directory / f"{name}.json").read_text(encoding="utf-8"))

    def own(self, name: str) -> PerProcess | None:
        """What this process wrote for itself; None if as many processes did not write this checkpoint."""
        mine = f"{name}.own-{of_processes()}"

        return PerProcess(self.tensors(mine), self.json(mine)) if self.has(f"{mine}.json") else None

    def parts(self, name: str) -> "SavedParts | None":
        """The tensors that `CheckpointWriter.parts` wrote under a name; None if it wrote none."""
        whole = self.directory / f"{name}.safetensors"
        files = [whole] if whole.exists() else sorted(self.directory.glob(f"{name}-*-of-*.safetensors"))

        return SavedParts(files) if files else None


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

    def __len__(self) -> int:
        return len(self._places)

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


class RandomStates:
    """States of every global random generator of this process.

    What is random in self-play comes from seeds and steps; these are for what else a model may draw.
    """

    def state_dict(self) -> State:
        """torch's, numpy's and Python's."""
        name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        version, internal, next_gauss = random.getstate()

        tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        content = {"numpy": [name, position, has_gauss, gauss], "python": [version, list(internal), next_gauss]}
        return {"random": PerProcess(tensors, content)}

    def load_state_dict(self, state: State) -> None:
        """Restores them; where another number of processes saved, nothing."""
        try:
            saved: PerProcess = state["random"]
        except KeyError:
            return

        name, position, has_gauss, gauss = saved.content["numpy"]
        np.random.set_state((name, saved.tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
        version, internal, next_gauss = saved.content["python"]
        random.setstate((version, tuple(internal), next_gauss))

        torch.set_rng_state(saved.tensors["torch"])
        cuda = [saved.tensors[f"cuda.{i}"] for i in range(torch.cuda.device_count()) if f"cuda.{i}" in saved.tensors]
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
