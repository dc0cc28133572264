"""What was measured: a table, and a file that is written after every case, so that a run that is cut off leaves it."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

Group = Literal["right", "fast", "planned"]
Value = float | int | str | bool | None | dict[str, "Value"] | list["Value"]


@dataclass
class Row:
    """One thing that was checked or measured.

    Attributes:
        ok: whether a check holds; None where nothing is checked.
        values: numbers by name; those with a `_` in front are in the file, and not in the table.
    """

    group: Group
    case: str
    setting: str
    values: dict[str, Value] = field(default_factory=dict)
    ok: bool | None = None


@dataclass(frozen=True)
class Case:
    """A function that adds rows.

    Attributes:
        seconds: what it may take; with less left of the run it does not start.
    """

    group: Group
    name: str
    seconds: float
    run: Callable[[Context], None]


class Context:
    """Where a run is, how large its sizes are, and what it has found.

    Args:
        device: cuda or cpu.
        tiny: sizes of a test.
        deadline: on the clock of `time.monotonic`.
        path: the file of results.
    """

    def __init__(self, device: torch.device, tiny: bool, deadline: float, path: Path) -> None:
        self.device = device
        self.tiny = tiny
        self.deadline = deadline
        self.path = path
        self.there: dict[str, Value] = {}
        self.rows: list[Row] = []
        self.failed: dict[str, str] = {}
        self.not_run: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.running = ""  # the case

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, group: Group, case: str, setting: str, ok: bool | None = None, **values: Value) -> None:
        self.rows.append(Row(group, case, setting, values, ok))
        print(line(self.rows[-1]), flush=True)

    def run(self, case: Case) -> None:
        """Runs a case; what it raises is written down, and the next one goes on."""
        if self.left() < case.seconds and not self.tiny:
            self.not_run[case.name] = f"{case.seconds:.0f} s are needed, {max(self.left(), 0):.0f} s are left"
            return self.write()
        start = time.monotonic()
        self.running = case.name
        try:
            case.run(self)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "site-packages" not in frame.filename] or list(frames)
            places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in (frames[-1], ours[-1]))
            self.failed[case.name] = f"{type(error).__name__}: {str(error)[:600]} [{places}]"
            print(f"FAILED {case.name}: {self.failed[case.name]}", flush=True)
            traceback.clear_frames(error.__traceback__)  # they hold tensors
        self.seconds[case.name] = round(time.monotonic() - start, 1)
        print(f"[{case.name}: {self.seconds[case.name]} s, {self.left():.0f} s left]", flush=True)
        self.forget()
        self.write()

    def forget(self) -> None:
        """Gives memory back."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def write(self) -> None:
        found = {
            "there": self.there,
            "failed": self.failed,
            "not_run": self.not_run,
            "seconds": self.seconds,
            "rows": [asdict(row) for row in self.rows],
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)

    @property
    def is_good(self) -> bool:
        return not self.failed and all(row.ok is not False for row in self.rows)

    def table(self) -> str:
        lines = [line(row) for group in ("right", "fast", "planned") for row in self.rows if row.group == group]
        lines += [f"FAILED   {name}: {why}" for name, why in self.failed.items()]
        lines += [f"not run  {name}: {why}" for name, why in self.not_run.items()]
        return "\n".join(lines)


def line(row: Row) -> str:
    mark = {True: "ok  ", False: "BAD ", None: "    "}[row.ok]
    values = "  ".join(f"{name} {_text(value)}" for name, value in row.values.items() if not name.startswith("_"))
    return f"{row.group:7}  {mark}{row.case}, {row.setting}: {values}"


def _text(value: Value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
