"""SAPOTrainer on random weights and random rows: no file is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.record import Context
from components.sapo.config import SAPOConfig
from components.sapo.trainer import SAPOTrainer


def tokenizer() -> PreTrainedTokenizerFast:
    """One of numbers: text plays no part here."""
    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, 1000)}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    wrapped.chat_template = "{{ messages }}"  # never used: rows are ids already
    return wrapped


def make_trainer(
    context: Context,
    model: Any,
    directory: Path,
    segment: int,
    pairs: int,
    rows: int,
    whole: int = 300,
    **options: Any,
) -> SAPOTrainer:
    """A trainer of DPO with `rows` rows of about `whole` tokens.

    Args:
        segment: tokens of B and B'.
        pairs: of a micro-batch.
        options: of SAPOConfig, over those here.
    """
    random = np.random.default_rng(0)
    vocabulary = min(model.config.vocab_size, 1000)
    scale = 8 if context.tiny else 1
    segment, whole = max(segment // scale, 4), whole // scale
    data = []
    for i in range(rows):
        length = int(np.clip(random.lognormal(np.log(whole), 0.4), whole // 3, 2 * whole))
        response = max(length // 2, segment + 2)
        ids = random.integers(5, vocabulary, length + response).tolist()
        data.append(
            {"id": str(i), "prompt_ids": ids[: length // 2], "chosen_ids": [*ids[length : length + response], 1]}
        )
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "loss_type": "dpo",
        "segment_length": segment,
        "max_new_tokens": segment,
        "max_length": 2048,
        "per_device_train_batch_size": pairs,
        "replay_buffer_size": 4 * rows,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not context.on_gpu,
        "save_total_limit": None,
    }
    args = SAPOConfig(**(defaults | options))
    return SAPOTrainer(model, args, data, processing_class=tokenizer())
