"""Settings of the evaluation stage."""

from dataclasses import dataclass
from typing import Literal

from components.common.cli import REQUIRED, StageConfig, setting

BENCHMARKS = ("held_out",)


@dataclass(kw_only=True)
class EvaluationConfig(StageConfig):
    """Settings of the evaluation stage."""

    data: str = setting(
        REQUIRED, "Output of the data stage: test.jsonl is scored, train.jsonl makes the unigram baseline."
    )
    model: str = setting(REQUIRED, "Hugging Face directory to score (output of model, sft or sapo).")
    name: str | None = setting(None, "What the report calls this model; none: the name of its directory.")
    benchmarks: tuple[str, ...] = setting(("held_out",), f"What to run; known: {', '.join(BENCHMARKS)}.")
    limit: int | None = setting(None, "Score this many rows of the test split, its first ones; none: all.")
    batch_size: int = setting(8, "Prompts per forward pass, each with its four replies.")
    max_length: int | None = setting(
        None, "Window in tokens, never more than the model's own; longer prompts keep their end. None: the model's own."
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Where to run; `auto` takes a GPU if there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Type of the weights; `auto`: float32 on the CPU, bfloat16 on a GPU. Log-probabilities are float32."
    )
    seed: int = setting(42, "Seed of the choice and order of wrong replies; models compare under equal seeds only.")

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        unknown = [name for name in self.benchmarks if name not in BENCHMARKS]
        if unknown or not self.benchmarks:
            raise ValueError(f"benchmarks = {list(self.benchmarks)}: must be a list of {', '.join(BENCHMARKS)}")
