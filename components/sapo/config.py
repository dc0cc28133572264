"""Settings of SAPO. Defaults are the paper's DPO run; `recipes/` has the ORPO runs and smaller models."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments
from transformers.utils import is_bitsandbytes_available

from components.common.core.identity import Role
from components.common.generation.engines import ENGINES, Engine, EngineName
from components.common.stage.config import Resumption, setting
from components.common.training.config import settle_device
from components.common.training.roles import TrainerSettings
from components.sapo.losses import LOSSES, LossType


@dataclass(kw_only=True)
class SAPOConfig(TrainerSettings, TrainingArguments):
    """Settings of `SAPOTrainer`, on top of `transformers.TrainingArguments`.

    Raises:
        ValueError: a value cannot work; names the setting, the value and what is allowed.
    """

    resumption: ClassVar = Resumption(marker="manifest.json", log=("training_log", "training"))

    # The loss
    loss_type: LossType = setting("dpo", "Preference loss on the pairs.", "dpo and orpo: Eq. 1 and Eq. 3")
    beta: float = setting(
        0.1, "DPO, IPO, cDPO, RPO: strength of the pull towards the reference. SimPO: scale of the rewards.", "0.1"
    )
    orpo_lambda: float = setting(0.05, "ORPO: weight of the odds-ratio term.", "0.05")
    label_smoothing: float = setting(0.1, "cDPO: share of the pairs whose order is taken to be wrong.")
    nll_weight: float = setting(1.0, "RPO: weight of the chosen response's NLL per token.")
    simpo_gamma: float = setting(0.5, "SimPO: margin that the rewards of a pair are to have.")
    nll_scope: Literal["response", "sequence"] = setting(
        "response",
        "ORPO, RPO: tokens of L_SFT, of the chosen response or of prompt and response.",
        "not given; all in the code",
    )

    # The pairs
    max_length: int = setting(2048, "Tokens of prompt + response; a longer response is cut.", "2048")
    segment_length: int = setting(256, "Tokens of segment B (N_seg).", "256; ablated 64, 128")
    segment_start: Literal["whole", "anywhere"] = setting(
        "whole",
        "Draw B's start among those that leave a whole segment, or among all tokens.",
        "a random truncation point",
    )
    no_segment: bool = setting(False, "Regenerate the whole response instead of a segment.", "ablation of Table 3")
    max_new_tokens: int = setting(256, "Most tokens of B'.", "not given; 256 in the authors' code")
    on_eos: Literal["truncate", "keep_tail"] = setting(
        "truncate",
        "When B' ends the turn: drop C, or drop the end token and keep C.",
        "not given; C is dropped in the code",
    )
    responses_per_prompt: int = setting(1, "Rejected responses generated for each row.", "1; ablated 4, 8")

    # The sampler
    sampler: EngineName = setting(
        "hf", "Engine that writes B': transformers' generate, or vLLM in this process.", "generate in the code"
    )
    schedule: Literal["sync", "overlap"] = setting(
        "sync", "`sync` is Algorithm 1; `overlap` samples for the next step while this one trains, one step staler."
    )
    push_interval: int = setting(1, "EMA updates between those that the sampler gets.", "1")
    temperature: float = setting(0.7, "Sampling temperature; 0 is greedy.", "not given; 0.7 in the authors' code")
    top_k: int = setting(50, "Sample among this many tokens; 0 for all.", "not given; 50 in the authors' code")
    top_p: float = setting(
        0.95, "Sample among tokens of this total probability.", "not given; 0.95 in the authors' code"
    )
    on_policy: bool = setting(False, "Sample with the policy instead of its EMA.", "ablation of Table 3")
    sampler_dtype: Literal["float32", "bfloat16"] | None = setting(
        None, "Type of the weights that sample; `none` is bfloat16 where `bf16` is on.", "bfloat16 in the code"
    )
    sampler_batch_size: int = setting(64, "hf: prompts that generate together.")
    sampler_timeout: float = setting(
        600.0, "Seconds that one call of the engine may take, in its own thread.", role=Role.OPERATION
    )
    gpu_memory_utilization: float = setting(
        0.25, "vllm: share of the GPU's memory that the engine takes.", role=Role.OPERATION
    )
    sleep_level: int = setting(
        0, "vllm: 1 frees the engine's GPU memory between uses; 0 keeps it.", role=Role.OPERATION
    )

    # Off-policy learning
    replay_buffer_size: int = setting(2000, "Pairs held by the replay buffer, of the whole run.", "2000")
    ema_decay: float = setting(0.5, "alpha of Eq. 6: share of the old average kept by an update.", "0.5")
    ema_interval: int = setting(2, "Optimizer steps between EMA updates.", "2; 1 in the authors' code")
    reference: Literal["ema", "policy", "fixed", "base"] = setting(
        "ema",
        "Losses with a reference: what it is refreshed from; `fixed` keeps the start model, `base` (LoRA) is the model without "
        "its adapter.",
        "ema; ablated in Table 4",
    )
    reference_interval: int | Literal["epoch"] = setting(
        "epoch",
        "Losses with a reference: optimizer steps between its refreshes.",
        "periodically; 108 steps (an epoch) in the code",
    )

    # LoRA: names as in TRL's ModelConfig
    use_peft: bool = setting(
        False, "Train a LoRA adapter on a frozen base; the EMA and the reference are adapters too."
    )
    lora_r: int = setting(32, "Rank of the adapter.")
    lora_alpha: int = setting(64, "Scale of the adapter's product, times 1 / lora_r.")
    lora_target_modules: str | list[str] = setting("all-linear", "Layers that get an adapter, by name.")
    lora_adapter: str | None = setting(None, "Directory of an adapter to start from; none: a new one.", role=Role.INPUT)
    load_in_4bit: bool = setting(
        False, "Hold the base in 4 bits (bitsandbytes, NF4); needs use_peft and the hf sampler."
    )
    merge_adapter: bool = setting(
        True, "Write a plain model with the adapter merged in; false: the adapter alone.", role=Role.SCOPE
    )

    # What is written down, and where
    log_dir: str | None = setting(None, "Directory of pairs.jsonl; default: output_dir.", role=Role.OUTPUT_DIRECTORY)
    pairs_per_log: int = setting(2, "Pairs written to pairs.jsonl at each logging step.", role=Role.OPERATION)

    # Inherited, with other defaults
    learning_rate: float = setting(5e-7, "Peak learning rate.", "DPO 5e-7, ORPO 5e-6")
    optim: str = setting("rmsprop", "Optimizer by transformers' name.", "DPO rmsprop, ORPO adamw")
    lr_scheduler_type: str = setting("linear", "Learning rate schedule.", "not given; linear, ORPO inverse_sqrt")
    warmup_steps: float = setting(0.1, "Steps of warm-up, or a share of all steps below 1.", "not given; 0.1, ORPO 100")
    num_train_epochs: float = setting(4.0, "Passes over the rows.", "4")
    per_device_train_batch_size: int = setting(8, "Pairs of a micro-batch on each device.", "not given; 8 on 8 GPUs")
    bf16: bool | None = setting(  # type: ignore[assignment]
        None,
        "Mixed precision in bfloat16; `none` means where the GPU or CPU is fast at it.",
        "not given; bfloat16 in the code",
    )
    seed: int = setting(42, "Seed of everything random.", "not given; 42 in the authors' code")
    save_strategy: str = setting("steps", "When to save checkpoints: steps, epoch or no.")
    save_steps: float = setting(50, "Optimizer steps between checkpoints.")
    save_total_limit: int | None = setting(2, "Checkpoints kept; older ones are removed.")
    report_to: str | list[str] = setting("tensorboard", "Where curves go: tensorboard, wandb, mlflow, none.")
    logging_steps: float = setting(10, "Optimizer steps between log entries.")

    def __post_init__(self) -> None:
        self._check()
        settle_device(self)
        super().__post_init__()
        self._require(
            "use_peft", not (self.use_peft and self.is_sharded()), "an adapter is small: use parallelism = ddp"
        )

    def _check(self) -> None:
        for name in (
            "segment_length",
            "max_new_tokens",
            "responses_per_prompt",
            "replay_buffer_size",
            "ema_interval",
            "push_interval",
        ):
            self._require(name, getattr(self, name) >= 1, "must be 1 or more")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "sampler_batch_size"):
            self._require(name, getattr(self, name) >= 1, "must be 1 or more")
        for name in ("beta", "orpo_lambda", "learning_rate", "num_train_epochs"):
            self._require(name, getattr(self, name) > 0, "must be above 0")
        for name in ("temperature", "top_k", "pairs_per_log", "nll_weight", "simpo_gamma"):
            self._require(name, getattr(self, name) >= 0, "must be 0 or more")
        self._require("max_length", self.max_length >= 2, "must be 2 or more (a prompt and a response)")
        self._require("ema_decay", 0 <= self.ema_decay <= 1, "must be within [0, 1]")
        self._require("label_smoothing", 0 <= self.label_smoothing < 0.5, "must be within [0, 0.5)")
        self._require("top_p", 0 < self.top_p <= 1, "must be within (0, 1]")
        scope_fits = LOSSES[self.loss_type].nll or self.nll_scope == "response"
        with_nll = " or ".join(name for name, loss in LOSSES.items() if loss.nll)
        no_nll = f"`sequence` is for loss_type = {with_nll}; {self.loss_type} has no L_SFT"
        self._require("nll_scope", scope_fits, no_nll)
        interval = self.reference_interval
        self._require("reference_interval", interval == "epoch" or int(interval) >= 1, "must be 1 or more, or `epoch`")
        strategy = str(getattr(self.save_strategy, "value", self.save_strategy))
        self._require("save_strategy", strategy in ("no", "steps", "epoch"), "must be steps, epoch or no")
        in_place = self.on_policy and self.engine.serves_in_place
        self._require(
            "schedule",
            self.schedule == "sync" or not in_place,
            f"{self.sampler} reads the policy while it is trained: sync",
        )
        self._require(
            "push_interval", self.push_interval == 1 or not self.on_policy, "must be 1 where on_policy is set"
        )
        self._require("sampler_timeout", self.sampler_timeout > 0, "must be above 0")
        self._require("gpu_memory_utilization", 0 < self.gpu_memory_utilization < 1, "must be within (0, 1)")
        self._require("sleep_level", self.sleep_level in (0, 1), "must be 0 or 1")
        self._check_lora(in_place)
        needs_bitsandbytes = (
            any(part in str(self.optim) for part in ("8bit", "bnb", "paged")) and "torch" not in self.optim
        )
        for name, needed in (("optim", needs_bitsandbytes), ("load_in_4bit", self.load_in_4bit)):
            missing = needed and not is_bitsandbytes_available()
            self._require(name, not missing, "needs the package bitsandbytes (pip install '.[bitsandbytes]')")
        self._require("fp16", not self.fp16, "is not offered; use bf16")
        limit = self.save_total_limit
        self._require("save_total_limit", limit is None or limit >= 1, "must be 1 or more, or none to keep all")

    def _check_lora(self, in_place: bool) -> None:
        for name in ("lora_r", "lora_alpha"):
            self._require(name, getattr(self, name) >= 1, "must be 1 or more")
        self._require("reference", self.reference != "base" or self.use_peft, "`base` is for use_peft")
        self._require("load_in_4bit", self.use_peft or not self.load_in_4bit, "4 bits cannot be trained: set use_peft")
        self._require("lora_adapter", self.use_peft or self.lora_adapter is None, "is for use_peft")
        adapter_in_turns = self.use_peft and self.engine.serves_in_place
        self._require(
            "schedule",
            self.schedule == "sync" or not adapter_in_turns,
            f"{self.sampler} and training share the base in turns: sync",
        )
        quantised = self.load_in_4bit and not self.engine.serves_4bit
        with_4bit = " or ".join(name for name, engine in ENGINES.items() if engine.serves_4bit)
        self._require(
            "sampler", not quantised, f"{self.sampler} has no 4-bit base to put an adapter on: use {with_4bit}"
        )

    def derived(self, stage: Any) -> dict[str, Any]:
        """What indirect settings come to, and the type of the weights that sample once it is settled."""
        return super().derived(stage) | self.settled()

    def settled(self) -> dict[str, Any]:
        """Settings that count as what they come to."""
        return {"sampler_dtype": self.engine_dtype()}

    def is_sharded(self) -> bool:
        """Whether ZeRO or FSDP2 spreads the trained weights over processes."""
        zero = self.deepspeed_plugin is not None and self.deepspeed_plugin.zero_stage > 0
        return zero or bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")

    @property
    def engine(self) -> Engine:
        """What the sampler can do."""
        return ENGINES[self.sampler]

    def engine_dtype(self) -> str:
        """Type of the weights that sample."""
        return self.sampler_dtype or ("bfloat16" if self.bf16 else "float32")

    def served_dtype(self) -> torch.dtype | None:
        """Type of the copy of the EMA that is kept for the sampler; None where it can do without.

        A copy is needed where the EMA moves on while the sampler does not follow, and where an engine that serves in place runs
        in another type; any other engine has a copy of its own.
        """
        if self.use_peft:
            return torch.float32 if self.push_interval > 1 else None

        follows_ema = self.push_interval == 1
        same_type = self.engine_dtype() == "float32"
        if self.on_policy or (follows_ema and (same_type or not self.engine.serves_in_place)):
            return None

        return torch.bfloat16 if self.engine_dtype() == "bfloat16" else torch.float32

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)!r}: {allowed}")
