"""Settings of every training stage, and what of them depends on the machine."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import IntervalStrategy, TrainingArguments

from components.common.core.conversations import Row, read_rows
from components.common.core.errors import UserError
from components.common.core.identity import Role
from components.common.kernels.cpu.malloc import keep_freed_memory
from components.common.stage.config import REQUIRED, StageConfig, setting
from components.common.training.distributed.launch import is_launched, join_on_cpu, process_count

# Set by the stage from --output and --training_log, or, as secrets, by the environment (HF_TOKEN); a recipe must not.
HIDDEN = (
    "output_dir",
    "do_train",
    "do_eval",
    "do_predict",
    "local_rank",
    "resume_from_checkpoint",
    "disable_tqdm",
    "hub_token",
)


@dataclasses.dataclass(kw_only=True)
class TrainingStageConfig(StageConfig):
    """Settings of every training stage."""

    data: str = setting(REQUIRED, "Output of the data stage (train.jsonl, test.jsonl).", role=Role.INPUT)
    model: str | dict[str, str] = setting(
        REQUIRED,
        "Directory of the model to start from, with its chat template; or a mapping of names to directories, "
        "`{base: DIR, sft: DIR}`, of which `start` names one.",
        role=Role.INPUT,
    )
    start: str | None = setting(None, "Which of several models in `model` to start from.", role=Role.INDIRECT)
    name: str | None = setting(
        None, "What the report calls this run; default: the stage and its loss.", role=Role.SCOPE
    )
    training_log: str | None = setting(
        None,
        "Directory for curves, pairs and TensorBoard files; default OUTPUT/training.",
        role=Role.OUTPUT_DIRECTORY,
    )
    num_processes: int = setting(
        1,
        "Processes to train in, one a GPU; 0 is 1 (a CPU). Under torchrun or accelerate launch theirs count.",
        "8",
        role=Role.INDIRECT,
    )
    parallelism: Literal["ddp", "zero2", "zero3", "fsdp2"] = setting(
        "ddp",
        "What several processes share out: nothing (ddp), optimizer state and gradients (zero2), weights too (zero3 by "
        "DeepSpeed, fsdp2 by PyTorch).",
        role=Role.INDIRECT,
    )
    gpu_memory: float | None = setting(
        None,
        "`--dry_run`: plan for GPUs of this memory (GB); `none` for the GPU that is there, or 80 without one.",
        role=Role.OPERATION,
    )
    max_prompt_length: int = setting(1792, "Rows whose prompt has this many tokens or more are dropped.", "1792")
    eval_rows: int = setting(128, "Held-out rows that are scored during training; 0 for none.")

    def __post_init__(self) -> None:
        for name, least in (("max_prompt_length", 1), ("eval_rows", 0), ("num_processes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be {least} or more")
        self.num_processes = max(self.num_processes, 1)  # a pipeline hands over the number of its GPUs
        self.model = self._chosen_model()

    @classmethod
    def inputs_named(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Of several models the one to start from: the others need not be fetched, and do not count."""
        models, start = values.get("model"), values.get("start")
        return values | {"model": {start: models[start]}} if isinstance(models, dict) and start in models else values

    def held_out_rows(self, eval_strategy: str = "no") -> list[Row]:
        """The first `eval_rows` held-out rows; none where the data stage held none out.

        Raises:
            UserError: there are none, and `eval_strategy` (transformers' setting, one of its enum of strings) wants some.
        """
        rows = read_rows(self.data, "test")[: self.eval_rows] if self.eval_rows else []
        strategy = IntervalStrategy(eval_strategy)
        if not rows and strategy != IntervalStrategy.NO:
            few = "eval_rows" if self.eval_rows == 0 else "the data stage's test_rows"
            raise UserError(f"eval_strategy = {strategy.value} needs held-out rows; raise {few}, or set it to no")
        return rows

    @property
    def start_model(self) -> str:
        """The one directory to start from."""
        assert isinstance(self.model, str)  # chosen when this was made
        return self.model

    def _chosen_model(self) -> str:
        """The directory in `model` that `start` names."""
        if isinstance(self.model, str):
            if self.start is not None:
                raise ValueError(
                    f"start = {self.start}: model is the single directory {self.model}; leave start out, or give "
                    "model as a mapping such as {base: DIR, sft: DIR}"
                )
            return self.model
        names = ", ".join(self.model) or "nothing"
        if self.start is None:
            raise ValueError(f"model names several directories ({names}): set start to one of these names")
        if self.start not in self.model:
            raise ValueError(f"start = {self.start}: must be a name in model, which has {names}")
        return self.model[self.start]

    def processes(self) -> int:
        """That train: those of the launcher where there is one."""
        return process_count(self.num_processes)

    def log_directory(self) -> Path:
        """Where curves, pairs and the training log go."""
        return Path(self.training_log) if self.training_log else Path(self.output) / "training"


def settle_process(log_directory: Path) -> None:
    """Settles what a process has but one of, before it trains: the memory allocator's way, and TensorBoard's directory."""
    keep_freed_memory()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(log_directory / "tensorboard")


def settle_device(args: TrainingArguments) -> None:
    """Settles what depends on the machine, before transformers checks the arguments: `bf16` where it is None, and `use_cpu`
    where there is no GPU, without which transformers refuses bfloat16; and joins the processes of a launch on the CPU."""
    if args.bf16 is None:
        args.bf16 = not args.fp16 and has_fast_bfloat16()
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()

    if args.use_cpu and is_launched() and join_on_cpu():
        given: Any = args.accelerator_config or {}
        given = given if isinstance(given, dict) else given.to_dict()
        args.accelerator_config = {**given, "use_configured_state": True}

    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every parameter is used: no search for others in each step


def has_fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones: most GPUs, and CPUs with AVX-512 BF16
    or AMX. Elsewhere bfloat16 is emulated, a hundred times slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
