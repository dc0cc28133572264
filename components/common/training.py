"""What the training stages share: their common settings, progress, the training log and the saved model."""

import ctypes
import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from components.common.cli import REQUIRED, StageConfig, setting
from components.common.conversations import Row, read_rows
from components.common.errors import UserError
from components.common.launch import is_launched, join_on_cpu
from components.common.progress import progress

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

    data: str = setting(REQUIRED, "Output of the data stage (train.jsonl, test.jsonl).")
    model: str | dict[str, str] = setting(
        REQUIRED,
        "Directory of the model to start from, with its chat template; or a mapping of names to directories, "
        "`{base: DIR, sft: DIR}`, of which `start` names one.",
    )
    start: str | None = setting(None, "Which of several models in `model` to start from.")
    name: str | None = setting(None, "What the report calls this run; default: the stage and its loss.")
    training_log: str | None = setting(
        None, "Directory for curves, pairs and TensorBoard files; default OUTPUT/training."
    )
    num_processes: int = setting(
        1, "Processes to train in, one a GPU; 0 is 1 (a CPU). Under torchrun or accelerate launch theirs count.", "8"
    )
    parallelism: Literal["ddp", "zero2", "zero3", "fsdp2"] = setting(
        "ddp",
        "What several processes share out: nothing (ddp), optimizer state and gradients (zero2), weights too (zero3 by "
        "DeepSpeed, fsdp2 by PyTorch).",
    )
    gpu_memory: float | None = setting(
        None, "`--dry_run`: plan for GPUs of this memory (GB); `none` for the GPU that is there, or 80 without one."
    )
    max_prompt_length: int = setting(1792, "Rows whose prompt has this many tokens or more are dropped.", "1792")
    eval_rows: int = setting(128, "Held-out rows that are scored during training; 0 for none.")

    def __post_init__(self) -> None:
        for name, least in (("max_prompt_length", 1), ("eval_rows", 0), ("num_processes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be {least} or more")
        self.num_processes = max(self.num_processes, 1)  # a pipeline hands over the number of its GPUs
        self.model = self._start_model()

    def held_out_rows(self, eval_strategy: Any = "no") -> list[Row]:
        """The first `eval_rows` held-out rows; none where the data stage held none out.

        Raises:
            UserError: there are none, and `eval_strategy` (transformers' setting) wants some.
        """
        rows = read_rows(self.data, "test")[: self.eval_rows] if self.eval_rows else []
        strategy = getattr(eval_strategy, "value", eval_strategy)
        if not rows and strategy != "no":
            few = "eval_rows" if self.eval_rows == 0 else "the data stage's test_rows"
            raise UserError(f"eval_strategy = {strategy} needs held-out rows; raise {few}, or set it to no")
        return rows

    def _start_model(self) -> str:
        """The one directory to start from."""
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

    def log_directory(self) -> Path:
        return Path(self.training_log) if self.training_log else Path(self.output) / "training"


class TrainingProgress(TrainerCallback):
    """One progress bar over the steps, with the newest loss and margin beside it."""

    SHOWN = ("loss", "rewards/margins", "eval_loss", "eval_rewards/margins")

    def __init__(self, description: str) -> None:
        self.description = description
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = progress(total=state.max_steps, initial=state.global_step, desc=self.description, unit="steps")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.shown |= {k: f"{v:.4f}" for k, v in (logs or {}).items() if k in self.SHOWN}
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()


def show_progress(trainer: Trainer, description: str) -> None:
    """Replaces the trainer's printed dictionaries by one progress bar."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingProgress(description))


def final_evaluation(trainer: Trainer) -> dict[str, float]:
    """Metrics on the held-out rows at the end of training; the last ones where the last step was evaluated already."""
    for entry in reversed(trainer.state.log_history):
        if entry["step"] == trainer.state.global_step and any(name.startswith("eval_") for name in entry):
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return trainer.evaluate()


def stage_arguments(log_directory: Path) -> dict[str, Any]:
    """Trainer arguments that a stage sets itself, and the place of TensorBoard's files."""
    keep_freed_memory()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(log_directory / "tensorboard")
    return {"output_dir": str(log_directory), "disable_tqdm": True}


def settle_device(args: Any) -> None:
    """Settles what depends on the machine, before transformers checks the arguments: `bf16` where it is None, and `use_cpu`
    where there is no GPU, without which transformers refuses bfloat16; and joins the processes of a launch on the CPU."""
    if args.bf16 is None:
        args.bf16 = not args.fp16 and has_fast_bfloat16()
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    if args.use_cpu and is_launched() and join_on_cpu():
        given = args.accelerator_config or {}
        given = given if isinstance(given, dict) else given.to_dict()
        args.accelerator_config = {**given, "use_configured_state": True}
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every parameter is used: no search for others in each step


def keep_freed_memory() -> None:
    """On a CPU, keeps the memory that a step frees for the next one.

    glibc gives big blocks back to the system at once, and taking them again costs page faults: a third of a step in bfloat16.
    """
    libc = ctypes.CDLL(None)
    if not torch.cuda.is_available() and hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
        libc.mallopt(trim_threshold, -1)  # never trim
        libc.mallopt(mmap_max, 0)  # no block outside the heap


def has_fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones: most GPUs, and CPUs with AVX-512 BF16
    or AMX. Elsewhere bfloat16 is emulated, a hundred times slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()


def library_versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "accelerate", "deepspeed", "vllm")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_training_log(
    directory: Path, stage: str, name: str, trainer: Trainer, settings: dict[str, Any], summary: dict[str, float]
) -> None:
    """Writes `log_history.jsonl` and, last, `summary.json`: what the report stage reads."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry) for entry in trainer.state.log_history]
    (directory / "log_history.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {
        "schema": 1,
        "stage": stage,
        "name": name,
        "steps": trainer.state.global_step,
        "seconds": summary.get("train_runtime"),
        "settings": settings,
        "versions": library_versions(),
        "summary": summary,
    }
    (directory / "summary.json").write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


def save_model(trainer: Trainer, output: Path) -> None:
    """Writes the trained weights and tokenizer as a plain Hugging Face directory."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(output)
    trainer.processing_class.save_pretrained(output)  # type: ignore[union-attr]
