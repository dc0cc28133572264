"""The tasks of lm-eval that are benchmarks here, with the shots and metrics that the paper's figures have.

The tasks are lm-eval's own; what is set here is the number of examples and what is read from the outcome. An answer has as many
tokens as the task's YAML says (IFEval: 1,280), else lm-eval's default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from components.evaluation.benchmark import Metric
from components.evaluation.lm_eval.ifeval_data import require_ifeval_data
from components.evaluation.lm_eval.metrics import IFEVAL, ifeval_metrics, plain_metrics


@dataclass(frozen=True, kw_only=True)
class LMEvalTask:
    """A task, or a group of tasks, of lm-eval.

    Attributes:
        folder: of lm-eval's tasks.
        dataset: on the hub.
        shots: examples in a prompt.
        metrics: our name -> lm-eval's metric and filter.
        fewshot_split: where examples come from; None: as the task says.
        chat_template: prompts are rendered with the chat template where the settings do not say.
        prepare: makes sure of what the task needs beside its data; takes the setting `nltk_data`.
        packages: distributions that decide on the scores beside lm-eval, for the results' versions.
        read: from the benchmark's name, `metrics`, a description and lm-eval's outcome to metrics.
    """

    folder: str
    dataset: str
    shots: int
    metrics: dict[str, str]
    fewshot_split: str | None = None
    chat_template: bool = False
    prepare: Callable[[str], None] | None = None
    packages: tuple[str, ...] = ()
    read: Callable[[str, dict[str, str], str, dict[str, Any]], list[Metric]] = plain_metrics


# By the benchmark's name in the registry.
TASKS = {
    "arc_challenge": LMEvalTask(
        folder="arc",
        dataset="allenai/ai2_arc",
        shots=25,
        metrics={"acc_norm": "acc_norm,none"},
        fewshot_split="train",
    ),
    "hellaswag": LMEvalTask(
        folder="hellaswag",
        dataset="Rowan/hellaswag",
        shots=10,
        metrics={"acc_norm": "acc_norm,none"},
        fewshot_split="train",
    ),
    "mmlu": LMEvalTask(
        folder="mmlu/default",
        dataset="cais/mmlu",
        shots=5,
        metrics={"acc": "acc,none"},
    ),
    "truthfulqa_mc2": LMEvalTask(
        folder="truthfulqa",
        dataset="truthfulqa/truthful_qa",
        shots=0,
        metrics={"acc": "acc,none"},
    ),
    "winogrande": LMEvalTask(
        folder="winogrande",
        dataset="allenai/winogrande",
        shots=5,
        metrics={"acc": "acc,none"},
        fewshot_split="train",
    ),
    "gsm8k": LMEvalTask(
        folder="gsm8k",
        dataset="openai/gsm8k",
        shots=5,
        metrics={"exact_match": "exact_match,strict-match", "exact_match_flexible": "exact_match,flexible-extract"},
    ),
    "ifeval": LMEvalTask(
        folder="ifeval",
        dataset="google/IFEval",
        shots=0,
        metrics=IFEVAL,
        chat_template=True,
        prepare=require_ifeval_data,
        packages=("langdetect", "nltk"),
        read=ifeval_metrics,
    ),
}
