"""What the result has to do with the settings that transformers and TRL have declared, and what the indirect ones come to.

Each field of `TrainingArguments`, `SFTConfig`, `DPOConfig` and `ORPOConfig` stands here by name. A test fails when a new
version brings another; until it has a role, it counts as one that the result depends on.
"""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from components.common.core.identity import Role, plain

# The optimizer, the schedule, the loss, the order of rows, the precision: every number of the result comes from these.
_RESULT = """
    num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args
    optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor
    bf16 fp16 bf16_full_eval fp16_full_eval tf32 gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha
    seed data_seed full_determinism ignore_data_skip restore_callback_states_from_checkpoint
    load_best_model_at_end metric_for_best_model greater_is_better prediction_loss_only include_for_metrics
    batch_eval_metrics remove_unused_columns label_names train_sampling_strategy length_column_name
    dataloader_drop_last dataloader_in_order auto_find_batch_size parallelism_config

    max_length max_completion_length truncation_mode packing packing_strategy padding_free pad_to_multiple_of padding_value
    pad_token eos_token shuffle_dataset dataset_text_field dataset_kwargs completion_only_loss assistant_only_loss
    loss_type loss_weights beta ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing use_weighting
    discopop_tau sync_ref_model ref_model_mixup_alpha ref_model_sync_steps precompute_ref_log_probs
    precompute_ref_batch_size disable_dropout router_aux_loss_coef model_init_kwargs trust_remote_code
    is_encoder_decoder activation_offloading
"""

# They decide together which rows make a step: see `spread`.
_INDIRECT = """
    per_device_train_batch_size gradient_accumulation_steps average_tokens_across_devices accelerator_config
    deepspeed fsdp fsdp_config
"""

_OPERATION = """
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica log_on_each_node disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id skip_memory_metrics debug

    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size eval_accumulation_steps
    eval_do_concat_batches eval_use_gather_object eval_packing generate_during_eval

    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
    resume_from_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision

    use_cpu local_rank do_train do_eval do_predict torch_empty_cache_steps dataset_num_proc
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
"""

TRAINER_ROLES: Mapping[str, Role] = {
    **dict.fromkeys(_RESULT.split(), Role.RESULT),
    **dict.fromkeys(_INDIRECT.split(), Role.INDIRECT),
    **dict.fromkeys(_OPERATION.split(), Role.OPERATION),
    "chat_template_path": Role.INPUT,
    "output_dir": Role.OUTPUT_DIRECTORY,
}

# Of accelerate's configuration, what says where and how fast data travels, and nothing of the rows.
_NOT_OF_THE_ROWS = ("use_configured_state", "non_blocking")
# With `load_best_model_at_end` these decide which checkpoint is the result.
_CHOOSE_THE_BEST = ("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps", "save_total_limit")


class TrainerSettings:
    """Settings of a trainer of transformers, of which a table gives the roles. Goes in front of its config class."""

    inherited_roles: ClassVar[Mapping[str, Role]] = TRAINER_ROLES

    def derived(self, stage: Any) -> dict[str, Any]:
        """What the indirect settings come to; `stage` says how many processes there are."""
        return spread(self, stage.processes())


def spread(args: Any, processes: int) -> dict[str, Any]:
    """What counts of the settings that spread the work over processes: two of 4 pairs are one of 8.

    Args:
        args: `TrainingArguments`, or settings with some of their names.
        processes: that train.
    """
    found = {"pairs_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * processes}
    if hasattr(args, "average_tokens_across_devices"):
        found["average_tokens_across_devices"] = args.average_tokens_across_devices or processes == 1
    if accelerator := plain(getattr(args, "accelerator_config", None)):
        found["accelerator_config"] = {k: v for k, v in accelerator.items() if k not in _NOT_OF_THE_ROWS}
    if getattr(args, "load_best_model_at_end", False):
        found |= {name: getattr(args, name) for name in _CHOOSE_THE_BEST}
    return found


def rows_per_epoch(rows: int, args: Any, processes: int) -> int:
    """Rows that a `Trainer` of several processes goes through: it fills the last batches up with the first rows."""
    together = args.per_device_train_batch_size * processes
    return rows if processes == 1 else -(-rows // together) * together


def sharded_checkpoint(parallelism: str, processes: int) -> str | None:
    """How a `Trainer`'s checkpoint is in parts that another number or kind of processes cannot read; None for a whole one.

    Args:
        parallelism: the setting; a launcher that has chosen DeepSpeed or FSDP by itself wins.
        processes: that train.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED") or (parallelism.startswith("zero") and processes > 1):
        return f"DeepSpeed, {processes} processes"
    return "FSDP" if _is_on("ACCELERATE_USE_FSDP") or (parallelism == "fsdp2" and processes > 1) else None


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
