"""Reads what the evaluation and training stages wrote. Every figure of the report comes from here."""

import heapq
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from components.common.core.errors import UserError
from components.common.storage.locations import existing_path

EVALUATION_SCHEMAS = (1, 2)  # 2 added what each benchmark took and found, and digests
TRAINING_SCHEMAS = (1,)


def finite(value: float | None) -> float | None:
    """The value, or None for infinity and NaN: what a diverged model scored is reported as missing."""
    return value if value is not None and math.isfinite(value) else None


Figure = Annotated[float | None, AfterValidator(finite)]


class Measurement(BaseModel):
    """One metric of one model; `n` counts the samples behind it."""

    benchmark: str
    metric: str
    value: Figure
    stderr: Figure = None
    interval: tuple[float, float] | None = None  # 95%, where it does not follow from stderr
    n: int | None = None
    higher_is_better: bool
    description: str = ""


class TrivialBaseline(BaseModel):
    """What guessing reaches on a metric; `benchmark` is only needed where two benchmarks share the metric's name."""

    name: str
    benchmark: str | None = None
    metric: str
    value: Figure
    description: str = ""


class Evaluation(BaseModel):
    """A `results.json`."""

    name: str = Field(min_length=1)
    results: list[Measurement]
    baselines: list[TrivialBaseline] = []
    settings: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    provenance: dict[str, str] = {}  # digests of data, model and code
    benchmarks: dict[str, Any] = {}  # per benchmark: seconds, and details of how it was run
    seconds: Figure = None


class Training(BaseModel):
    """A training log: `summary.json`, the lines of `log_history.jsonl`, and where the log is."""

    stage: str = Field(min_length=1)
    name: str = Field(min_length=1)
    steps: int | None = None
    seconds: Figure = None
    settings: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    folder: Path
    history: list[dict[str, Any]] = []

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever the log has a finite number under `key`."""
        lines = [line for line in self.history if is_number(line.get("step")) and is_number(line.get(key))]
        return [(line["step"], line[key]) for line in lines]

    def last(self, key: str) -> float | None:
        """The value logged last under `key`."""
        points = self.curve(key)
        return points[-1][1] if points else None


class Pair(BaseModel):
    """A sampled pair: y+ = a + b + c, y- = a + b_prime (+ c where it was kept)."""

    step: int
    row_id: str
    split: str = "train"
    prompt: str
    a: str
    b: str
    b_prime: str
    c: str = ""
    c_kept: bool
    ema_version: int | None = None
    generated_at_step: int | None = None
    logp_b: Figure = None
    logp_b_prime: Figure = None


Record = TypeVar("Record", bound=BaseModel)


def read_evaluation(directory: str) -> Evaluation:
    """Reads the output directory of the evaluation stage.

    Raises:
        UserError: it or its results.json is missing, is not JSON, has another schema, or lists a metric twice.
    """
    path = existing_path(directory, "evaluations") / "results.json"
    evaluation = _checked(Evaluation, _read_json(path, "an evaluation directory", EVALUATION_SCHEMAS), str(path))
    metrics = [(m.benchmark, m.metric) for m in evaluation.results]
    if repeated := _first_repeated(metrics):
        raise UserError(f"{path}: lists {repeated[0]} / {repeated[1]} twice; a metric must appear once")
    return evaluation


def read_training(directory: str) -> Training:
    """Reads a training log, given as its directory or as that of the model which holds it.

    Raises:
        UserError: it or its summary.json is missing, is not JSON or has another schema, or the log has a bad line.
    """
    folder = existing_path(directory, "trainings")
    if not (folder / "summary.json").is_file() and (folder / "training").is_dir():
        folder = folder / "training"
    path = folder / "summary.json"
    content = _read_json(path, "a training log directory", TRAINING_SCHEMAS)
    history = [line for _, line in _read_json_lines(folder / "log_history.jsonl")]
    return _checked(Training, {**content, "folder": folder, "history": history}, str(path))


def read_evaluations(directories: list[str]) -> list[Evaluation]:
    """Reads all evaluations; raises UserError when two have the same name."""
    evaluations = [read_evaluation(directory) for directory in directories]
    if repeated := _first_repeated(evaluation.name for evaluation in evaluations):
        raise UserError(f"--evaluations: two are named {repeated!r}; give each its own --name, or leave one out")
    return evaluations


def read_trainings(directories: list[str]) -> list[Training]:
    """Reads all training logs; raises UserError when two have the same name."""
    trainings = [read_training(directory) for directory in directories]
    if repeated := _first_repeated(training.name for training in trainings):
        raise UserError(f"--trainings: two are named {repeated!r}; give each its own --name, or leave one out")
    return trainings


def early_and_late_pairs(training: Training, count: int) -> tuple[list[Pair], list[Pair]]:
    """Up to `count` pairs of a run, half from its first steps and half from its last, each in order of step.

    Only these are held in memory: a long run may have logged gigabytes.

    Raises:
        UserError: a line is not a pair; names the line.
    """
    first = heapq.nsmallest(count, _read_pairs(training))
    shown = len(first)
    late = sorted(heapq.nlargest(shown // 2, _read_pairs(training)))
    return [pair for _, _, pair in first[: shown - shown // 2]], [pair for _, _, pair in late]


def _read_pairs(training: Training) -> Iterator[tuple[int, int, Pair]]:
    """(step, line number, pair): the line number keeps the order within a step and makes the tuples comparable."""
    path = training.folder / "pairs.jsonl"
    for number, line in _read_json_lines(path):
        pair = _checked(Pair, line, f"{path}, line {number}")
        yield pair.step, number, pair


def _read_json(path: Path, what: str, schemas: tuple[int, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; {path.parent} is not {what}, or its stage did not finish")
    content = _parsed(path.read_bytes(), str(path))
    if content.get("schema") not in schemas:
        known = " and ".join(map(str, schemas))
        raise UserError(f"{path}: has schema {content.get('schema')!r}, this report reads schema {known}")
    return content


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered objects of a JSON Lines file; nothing where there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parsed(line, f"{path}, line {number}")


def _parsed(text: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a JSON object, is {type(content).__name__}")
    return content


def _checked(record: type[Record], content: dict[str, Any], where: str) -> Record:
    try:
        return record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {field}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def _first_repeated(items: Iterable[Any]) -> Any:
    seen = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None


def is_number(value: Any) -> bool:
    """Whether a value of a log is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
