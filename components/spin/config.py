"""Settings of SPIN. Defaults are the paper's SPIN-DPO runs; `recipes/` has the ORPO runs and smaller models."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from components.common.core.identity import Role
from components.common.generation.engines import EngineName
from components.common.stage.config import Resumption, setting
from components.common.training.config import TrainingStageConfig, has_fast_bfloat16
from components.common.training.roles import TrainerSettings

# How many snapshots have been made; the last file of each.
SAVED = "saved.json"


@dataclass(kw_only=True)
class SPINStageConfig(TrainingStageConfig):
    """Where the spin stage reads and writes. OUTPUT with an unfinished run in it is gone on with by itself."""

    resumption: ClassVar = Resumption(marker=SAVED, from_output=True, log=("training_log", "training"))

    keep_iterations: bool = setting(
        False,
        "Leave OUTPUT/spin (each iteration's responses and model) in place when the run is complete.",
        role=Role.OPERATION,
    )


@dataclass(kw_only=True)
class SPINSettings(TrainerSettings):
    """Settings of the method and of its trainers.

    Raises:
        ValueError: a value cannot work; names the setting, the value and what is allowed.
    """

    # The iterations
    loss_type: Literal["dpo", "orpo"] = setting("dpo", "Preference loss on the pairs.", "both")
    iterations: int = setting(4, "Times that all responses are generated and then trained on.", "4")
    window: int = setting(2, "Newest iterations whose pairs are trained on together.", "2")
    learning_rates: list[float] = setting(
        [5e-7, 5e-7, 1e-7, 1e-7], "Peak learning rate of each iteration.", "5e-7, 5e-7, 1e-7, 1e-7"
    )
    betas: list[float] = setting(
        [0.1, 0.1, 0.1, 5.0],
        "DPO: strength of the pull towards the iteration's start model, for each iteration.",
        "0.1, 0.1, 0.1, 5.0",
    )
    orpo_lambdas: list[float] = setting(
        [0.05, 0.05, 0.05, 0.05],
        "ORPO: weight of the odds-ratio term in each iteration.",
        "not given; 0.05 as for ORPO",
    )
    epochs_per_iteration: float = setting(3.0, "Passes over the pairs of an iteration's window.", "3")

    # The pairs
    train_rows: int | None = setting(None, "Use this many rows, the first of train.jsonl; `none` for all.", "all")
    max_length: int = setting(2048, "Tokens of prompt + response; a longer response is cut.", "2048")
    max_new_tokens: int = setting(256, "Most tokens of a generated response.", "not given; 256 in the SPIN code")
    temperature: float = setting(1.0, "Sampling temperature; 0 is greedy.", "not given; 1 in the SPIN code")
    top_k: int = setting(0, "Sample among this many tokens; 0 for all.", "not given; all in the SPIN code")
    top_p: float = setting(1.0, "Sample among tokens of this total probability.", "not given; 1 in the SPIN code")
    sampler: EngineName = setting("hf", "Engine that generates: transformers' generate, or vLLM.")
    sampler_batch_size: int = setting(
        64, "Prompts handed to each engine together; each batch is saved when it is done."
    )

    # The trainer of each iteration
    optim: str = setting("rmsprop", "Optimizer by transformers' name.", "as DPO and ORPO: rmsprop, adamw")
    lr_scheduler_type: str = setting(
        "linear", "Learning rate schedule of each iteration.", "not given; linear, ORPO inverse_sqrt"
    )
    warmup_steps: float = setting(
        0.1, "Steps of warm-up of each iteration, or a share of its steps below 1.", "not given; 0.1, ORPO 100"
    )
    per_device_train_batch_size: int = setting(
        8, "Pairs of a micro-batch on each device.", "not given; 8 on 8 GPUs in the SPIN code"
    )
    per_device_eval_batch_size: int = setting(8, "Held-out pairs scored together.")
    gradient_accumulation_steps: int = setting(1, "Micro-batches of an optimizer step.", "not given")
    gradient_checkpointing: bool = setting(False, "Recompute activations in backward: less memory, more time.")
    bf16: bool | None = setting(
        None, "Mixed precision in bfloat16; `none` means where the GPU or CPU is fast at it.", "not given"
    )
    use_cpu: bool = setting(False, "Stay on the CPU where there is a GPU.")
    seed: int = setting(42, "Seed of everything random.", "not given; 42 in the SPIN code")

    # What is written down
    save_steps: int = setting(50, "Optimizer steps between checkpoints within an iteration.")
    save_total_limit: int = setting(2, "Checkpoints kept within an iteration; older ones are removed.")
    logging_steps: int = setting(10, "Optimizer steps between log entries.")
    pairs_per_log: int = setting(4, "Pairs of each iteration written to pairs.jsonl.", role=Role.OPERATION)
    report_to: str | list[str] = setting("tensorboard", "Where curves go: tensorboard, wandb, mlflow, none.")

    def __post_init__(self) -> None:
        self._check()
        if self.bf16 is None:
            self.bf16 = has_fast_bfloat16()

    def _check(self) -> None:
        for name in ("iterations", "window", "max_new_tokens", "sampler_batch_size", "per_device_train_batch_size"):
            self._require(name, getattr(self, name) >= 1, "must be 1 or more")
        for name in ("per_device_eval_batch_size", "gradient_accumulation_steps", "save_steps", "save_total_limit"):
            self._require(name, getattr(self, name) >= 1, "must be 1 or more")
        self._require("logging_steps", self.logging_steps >= 1, "must be 1 or more")
        self._require("train_rows", self.train_rows is None or self.train_rows >= 1, "must be 1 or more, or `none`")
        for name in ("temperature", "top_k", "pairs_per_log", "warmup_steps"):
            self._require(name, getattr(self, name) >= 0, "must be 0 or more")
        self._require("epochs_per_iteration", self.epochs_per_iteration > 0, "must be above 0")
        self._require("max_length", self.max_length >= 2, "must be 2 or more (a prompt and a response)")
        self._require("top_p", 0 < self.top_p <= 1, "must be within (0, 1]")
        for name in ("learning_rates", "betas" if self.loss_type == "dpo" else "orpo_lambdas"):
            values = getattr(self, name)
            self._require(name, len(values) == self.iterations, f"must list {self.iterations} values, one an iteration")
            self._require(name, all(value > 0 for value in values), "must be above 0 in every iteration")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)!r}: {allowed}")
