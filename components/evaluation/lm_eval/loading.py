"""A benchmark's tasks of lm-eval with their data, examples and stops."""

import hashlib
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import yaml
from datasets.exceptions import DatasetsError
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from components.common.core.errors import UserError
from components.common.storage.locations import existing_path
from components.evaluation.config import EvaluationConfig
from components.evaluation.lm_eval.tasks import TASKS

logger = logging.getLogger(__name__)

FEWSHOT_SEED = 1234  # lm-eval's own; the examples are those that `lm_eval --tasks ...` draws
MAX_GEN_TOKS = 256  # lm-eval's default of its engines, for a task whose YAML names none


def load_tasks(name: str, config: EvaluationConfig) -> dict[str, Any]:
    """The benchmark's tasks with their data, as lm-eval's `evaluate` takes them.

    Raises:
        UserError: the data cannot be had, a task has no documents, or fewer examples than shots.
    """
    benchmark = TASKS[name]
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if benchmark.prepare is not None:
        benchmark.prepare(config.nltk_data)
    group: dict[str, Any] = {"group": f"evaluated {name}", "task": [name], "num_fewshot": benchmark.shots}
    if benchmark.fewshot_split:
        group["fewshot_split"] = benchmark.fewshot_split
    if config.task_data:
        copy = _local_copy(config.task_data, benchmark.dataset)
        group |= {"dataset_path": str(copy), "dataset_kwargs": {"cache_dir": _cache_of(copy)}}
    try:
        tasks = _load_group(group, benchmark.folder, config.task_path)
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: its data ({group.get('dataset_path', benchmark.dataset)}) cannot be loaded: {reason}; without a "
            f"network give --task_data DIR with a copy in DIR/{benchmark.dataset}"
        ) from error
    for task in tasks["tasks"].values():
        _check_documents(task, benchmark.shots)
    return tasks


def _load_group(group: dict[str, Any], folder: str, task_path: str | None) -> dict[str, Any]:
    """A group's tasks with its settings laid over theirs, MMLU's 57 too; lm-eval does that for groups in a file."""
    folders = [Path(lm_eval.tasks.__file__).parent / folder]
    folders += [existing_path(task_path, "task_path")] if task_path else []
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
        manager = TaskManager(include_defaults=False, include_path=[*folders, Path(directory)])
        return {**manager.load([group["group"]])}


def _local_copy(task_data: str, dataset: str) -> Path:
    copy = existing_path(task_data, "task_data") / dataset
    if not copy.is_dir():
        raise UserError(
            f"--task_data {task_data}: has no {dataset}; on a machine with a network: "
            f"hf download {dataset} --repo-type dataset --local-dir {copy}"
        )
    return copy


def _cache_of(copy: Path) -> str:
    """A cache for this state of the copy: `datasets` tells local data sets apart by the last part of their path alone."""
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / hashlib.sha256(repr(state).encode()).hexdigest()[:16])


def _check_documents(task: Task, shots: int) -> None:
    name = task.config.task
    if not len(task.eval_docs):
        raise UserError(f"{name}: its data has no documents; look at --task_data")
    if shots and len(list(task.fewshot_docs())) < shots:
        raise UserError(f"{name}: needs {shots} examples and its data has {len(list(task.fewshot_docs()))}")
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def stop_at(
    tasks: dict[str, Task], stops: list[int], tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, Any]:
    """Lets tasks that generate stop at every end-of-turn token too; returns what was set, for the record."""
    generating = [task for task in tasks.values() if task.OUTPUT_TYPE == "generate_until"]
    # An ordinary token may be among the model's stops; its text must not be.
    texts = [token for stop in stops if (token := tokenizer.decode([stop])) in tokenizer.all_special_tokens]
    record: dict[str, Any] = {}
    for task in generating:
        options = task.config.generation_kwargs
        wanted = options.get("max_gen_toks", MAX_GEN_TOKS)
        most = min(wanted, length // 2)
        if most < wanted:
            logger.warning("answers get %s tokens instead of %s: the window is %s", most, wanted, length)
        until = list(dict.fromkeys([*options.get("until", []), *texts]))
        task.set_config("generation_kwargs", {"until": until, "max_gen_toks": most}, update=True)
        record = {"stops": until, "stop_ids": stops, "max_new_tokens": most}
    return record
