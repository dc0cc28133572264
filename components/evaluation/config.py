"""Settings of the evaluation stage."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from components.common.core.identity import Role
from components.common.generation.engines import EngineName
from components.common.stage.config import REQUIRED, Resumption, StageConfig, setting
from components.evaluation.judged_config import JudgedConfig
from components.evaluation.registry import BENCHMARKS, GROUPS

# The record of an output's run; it is written first, so a stage can go on in an output that has it.
SETTINGS = "settings.json"
# Settings that results.json does not list.
HIDDEN = {field.name for field in dataclasses.fields(StageConfig)} - {"output"} | {"resume"}


@dataclass(kw_only=True)
class EvaluationConfig(JudgedConfig, StageConfig):
    """Settings of the evaluation stage."""

    resumption: ClassVar = Resumption(marker=SETTINGS, from_output=True, at_any_moment=True, extends="resume")

    model: str = setting(REQUIRED, "Hugging Face directory to score (output of model, sft or sapo).", role=Role.INPUT)
    data: str | None = setting(
        None,
        "Output of the data stage, for held_out: test.jsonl is scored, train.jsonl makes the unigram baseline.",
        role=Role.INPUT,
    )
    name: str | None = setting(
        None, "What the report calls this model; none: the name of its directory.", role=Role.SCOPE
    )
    benchmarks: tuple[str, ...] = setting(
        ("held_out",),
        f"What to run: {', '.join(BENCHMARKS)}; "
        + "; ".join(f"`{group}` is {', '.join(members)}" for group, members in GROUPS.items())
        + ".",
        "leaderboard, ifeval, mt_bench, alpaca_eval",
        role=Role.SCOPE,
    )
    limit: int | None = setting(
        None, "Use this many documents of each benchmark (of each MMLU subject), its first ones; none: all.", "all"
    )
    engine: EngineName = setting(
        "hf", "What computes answers: Hugging Face transformers, or vLLM. held_out always takes transformers."
    )
    batch_size: int = setting(
        8, "Prompts per forward pass; those of held_out have four replies each.", role=Role.OPERATION
    )
    max_length: int | None = setting(
        None, "Window in tokens, never more than the model's own; longer prompts keep their end. None: the model's own."
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Where to run; `auto` takes a GPU if there is one.", role=Role.OPERATION
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Type of the weights; `auto`: float32 on the CPU, bfloat16 on a GPU. Log-probabilities are float32."
    )
    gpu_memory_utilization: float = setting(
        0.85, "Share of a GPU's memory that vLLM takes. No effect on the CPU.", role=Role.OPERATION
    )
    tensor_parallel_size: int = setting(1, "GPUs that share the model in vLLM.", role=Role.OPERATION)
    apply_chat_template: bool | None = setting(
        None,
        "Render the prompts of the leaderboard and IFEval with the chat template; none: IFEval's only, as the "
        "leaderboard (v1) did.",
    )
    fewshot_as_multiturn: bool = setting(
        True, "With the chat template, examples are earlier turns of the conversation; else part of the question."
    )
    task_path: str | None = setting(
        None,
        "Directory of lm-eval task YAMLs that replace the package's tasks of the same name.",
        role=Role.INPUT,
    )
    task_data: str | None = setting(
        None,
        "Directory with copies of the tasks' data sets, as owner/name; none: the hub, or its cache.",
        role=Role.INPUT,
    )
    nltk_data: str = setting(
        "pypi://llama-index-core",
        "Where IFEval finds NLTK's punkt_tab if NLTK does not: a directory, or a package that carries it.",
        role=Role.INPUT,
    )
    seed: int = setting(
        42, "Seed of held_out's wrong replies and of sampled answers; models compare under equal seeds only."
    )
    resume: bool = setting(
        False,
        "Go on in a finished output, such as with more benchmarks; one that an interrupted run left is gone on with by itself.",
        role=Role.OPERATION,
    )

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_length", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization = {self.gpu_memory_utilization}: must be above 0 and at most 1")
        if self.overwrite and self.resume:
            raise ValueError("overwrite = True and resume = True: choose one")
        self.benchmarks = self._expanded()
        self.check_judged()

    def _expanded(self) -> tuple[str, ...]:
        """The benchmarks, each once, with groups spelled out."""
        known = (*BENCHMARKS, *GROUPS)
        if not self.benchmarks or any(name not in known for name in self.benchmarks):
            raise ValueError(f"benchmarks = {list(self.benchmarks)}: must be a list of {', '.join(known)}")
        spelled = [GROUPS.get(name, (name,)) for name in self.benchmarks]
        return tuple(dict.fromkeys(name for names in spelled for name in names))

    def recorded(self) -> dict[str, Any]:
        """The settings as results.json lists them."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in HIDDEN}
