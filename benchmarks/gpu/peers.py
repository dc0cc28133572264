"""The same step by others: TRL's trainers where TRL is there, and a plain loop over padded rows with all logits."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.gpu.record import Context
from benchmarks.preference import mean_loss
from components.common.kernels.pair_packing import PairIds

REFERENCE = -1000.0  # log-prob of every response under the reference, given to all sides
Loss = Callable[[list[PairIds]], Tensor]


def rows_of(pairs: list[PairIds], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen, then rejected, padded on the right: ids, attention mask, and labels that are -100 at prompt and padding."""
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (prompt, response) in enumerate(rows):
        whole = len(prompt) + len(response)
        ids[i, :whole] = torch.tensor(prompt + response)
        labels[i, len(prompt) : whole] = torch.tensor(response)
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in rows])
    mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    return ids.to(device), mask.to(device), labels.to(device)


def plain(context: Context, model: Any, loss: str) -> Loss:
    """How the step is written without any trick."""

    def of(pairs: list[PairIds]) -> Tensor:
        ids, mask, labels = rows_of(pairs, context.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        labels = labels[:, 1:]
        real = labels >= 0
        logps = -F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
        sums = (logps.view_as(labels) * real).sum(1)
        if loss == "dpo":
            reference = torch.full((len(pairs),), REFERENCE, device=context.device)
            return mean_loss("dpo", sums, real.sum(1), (reference, reference))
        return mean_loss("orpo", sums, real.sum(1))

    return of


def trl_dpo(context: Context, model: Any) -> Loss:
    """TRL's DPOTrainer, with the reference's log-probs as columns (its `precompute_ref_log_probs`)."""
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    from benchmarks.gpu.shapes import random_model
    from benchmarks.gpu.trainer import tokenizer

    disable_progress_bars()

    class Pretokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    reference = {"ref_chosen_logps": REFERENCE, "ref_rejected_logps": REFERENCE}
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9, 8], **reference}]
    unused = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory() as directory:
        args = DPOConfig(directory, max_length=None, per_device_train_batch_size=1, **_options(context))
        model_of_reference = random_model(context.device, unused | {"num_key_value_heads": 1, "vocab_size": 16})
        data = Dataset.from_list(rows)
        trainer = Pretokenised(model, model_of_reference, args, train_dataset=data, processing_class=tokenizer())
    trainer.precompute_ref_logps = True
    collator: Any = trainer.data_collator

    def of(pairs: list[PairIds]) -> Tensor:
        rows = [
            {"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected, **reference} for p in pairs
        ]
        batch = {k: v.to(context.device) if isinstance(v, Tensor) else v for k, v in collator(rows).items()}
        return trainer.compute_loss(model, batch)

    return of


def trl_orpo(context: Context, model: Any) -> Loss:
    """TRL's ORPOTrainer."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset, disable_progress_bars
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from benchmarks.gpu.trainer import tokenizer

    disable_progress_bars()
    words = tokenizer()
    words.bos_token = "<eos>"
    with tempfile.TemporaryDirectory() as directory:
        args = ORPOConfig(directory, beta=0.05, max_length=4096, **_options(context))
        data = Dataset.from_list([{"prompt": "5", "chosen": "6", "rejected": "7"}])
        trainer = ORPOTrainer(model, args, train_dataset=data, processing_class=words)

    def of(pairs: list[PairIds]) -> Tensor:
        batch: dict[str, Any] = {}
        ids, mask, labels = rows_of(pairs, context.device)
        for name, part in (("chosen", slice(0, len(pairs))), ("rejected", slice(len(pairs), None))):
            batch |= {
                f"{name}_input_ids": ids[part],
                f"{name}_attention_mask": mask[part],
                f"{name}_labels": labels[part],
            }
        return trainer.get_batch_loss_metrics(model, batch, train_eval="eval")[0]

    return of


def _options(context: Context) -> dict[str, Any]:
    options = {"report_to": "none", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    return options | {"use_cpu": not context.on_gpu}
