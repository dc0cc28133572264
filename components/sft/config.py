"""Settings of the sft stage. Defaults are the paper's run on LLaMA-3-8B."""

from dataclasses import dataclass

import torch
from trl import SFTConfig

from components.common.stage.config import setting
from components.common.training.config import settle_device
from components.common.training.roles import TrainerSettings


@dataclass(kw_only=True)
class SFTSettings(TrainerSettings, SFTConfig):
    """TRL's `SFTConfig` with the paper's values as defaults."""

    learning_rate: float = setting(2e-5, "Peak learning rate.", "2e-5")
    lr_scheduler_type: str = setting("cosine", "Learning rate schedule.", "cosine")
    warmup_steps: float = setting(0.1, "Steps of warm-up, or a share of all steps below 1.", "not given; 0.1")
    num_train_epochs: float = setting(3.0, "Passes over the rows.", "3")
    max_length: int | None = setting(2048, "Tokens of prompt + response; a longer response is cut.", "2048")
    per_device_train_batch_size: int = setting(8, "Rows of a micro-batch on each device.", "not given; 128 in all")
    bf16: bool | None = setting(  # type: ignore[assignment]
        None, "Mixed precision in bfloat16; `none` means where the GPU or CPU is fast at it."
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in backward: less memory, more time.")
    # TRL's own default looks for text columns, and would train rows of token ids on their prompts too.
    completion_only_loss: bool | None = setting(True, "Loss on response tokens only; off: on the prompt's too.")
    attn_implementation: str | None = setting(
        None, "Attention kernels: sdpa, flash_attention_2 (package flash-attn); `none` for the model's own choice."
    )
    save_strategy: str = setting("no", "When to save checkpoints.")
    report_to: str | list[str] = setting("tensorboard", "Where curves go: tensorboard, wandb, mlflow, none.")
    seed: int = setting(42, "Seed of everything random.")

    def __post_init__(self) -> None:
        if self.max_length is None or self.max_length < 2:
            raise ValueError(f"max_length = {self.max_length}: must be 2 or more (a prompt and a response)")
        if self.packing and self.packing_strategy == "wrapped":
            raise ValueError("packing_strategy = wrapped: lets samples see and cut each other; use bfd")
        settle_device(self)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
