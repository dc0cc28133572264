"""One learner step, forward and backward, against TRL's trainers on the same pairs; and how both grow."""

import copy
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harness import Result, Side, compare_apart, memory, speed
from benchmarks.preference import mean_loss
from benchmarks.shapes import Shape, dtype_name, learner_flops, make_pairs, matrix_speed, precisions, smollm2_shape
from components.common.kernels.pair_logps import response_logps
from components.common.kernels.pair_packing import PairIds, collate

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
OPTIONS: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
GROWN: list[dict[str, Any]] = [{"prompt": (600, 600)}, {"response": (400, 400), "segment": (192, 192)}, {"pairs": 3}]
REFERENCE = -1000.0  # log-prob of every response under the reference, given to both sides
Loss = Callable[[], torch.Tensor]
Step = Callable[[], None]


def learner_step(quick: bool, rounds: int) -> list[Result]:
    """DPO and ORPO at the lengths of SAPO's pairs: time and extra peak memory."""
    layers, shape = 2 if quick else 30, Shape(pairs=1 if quick else 2)
    model, pairs = smollm2_shape(layers), make_pairs(shape)
    results = []
    for dtype in precisions(quick):
        for name, peer, ours, theirs in (
            ("DPO", "TRL DPOTrainer", our_dpo, trl_dpo),
            ("ORPO", "TRL ORPOTrainer", our_orpo, trl_orpo),
        ):
            limit = learner_flops(model, pairs, name == "DPO") / matrix_speed(dtype)
            setting = f"{shape}, {dtype_name(dtype)}, {torch.get_num_threads()} threads"
            sides = [Side(prepared, (make, shape, dtype, layers), make is ours) for make in (theirs, ours)]
            peer_values, our_values = compare_apart(sides, rounds)
            results += [
                speed(f"{name} learner step", setting, peer, peer_values, our_values, limit),
                memory(f"{name} extra peak memory", setting, peer, peer_values, our_values),
            ]
    return results


def growth(quick: bool, rounds: int) -> list[Result]:
    """The DPO step of a four-layer model as one size grows at a time."""
    results = []
    lengths: dict[str, Any] = {"prompt": (300, 300), "response": (200, 200), "segment": (96, 96)}
    sizes = [(Shape(**lengths), 49152)]
    sizes += [(Shape(**(lengths | grown)), 49152) for grown in GROWN]
    sizes += [(Shape(**lengths), 8192)]
    for shape, vocabulary in sizes[:1] if quick else sizes:
        arguments = (shape, torch.float32, 2 if quick else 4, vocabulary)
        sides = [Side(prepared, (make, *arguments), make is our_dpo) for make in (trl_dpo, our_dpo)]
        theirs, ours = compare_apart(sides, 1)
        setting = f"{shape}, vocabulary {vocabulary:,}"
        results += [
            speed("growth: DPO step", setting, "TRL DPOTrainer", theirs, ours),
            memory("growth: memory", setting, "TRL DPOTrainer", theirs, ours),
        ]
    return results


def prepared(make: Callable[..., Step], shape: Shape, dtype: torch.dtype, layers: int, vocabulary: int = 49152) -> Step:
    """One side's step on the model and the pairs that both sides have."""
    return make(smollm2_shape(layers, vocabulary), make_pairs(shape), dtype)


def step(model: LlamaForCausalLM, loss: Loss, dtype: torch.dtype) -> Step:
    def run() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        model.zero_grad()

    return run


def our_dpo(model: LlamaForCausalLM, pairs: list[PairIds], dtype: torch.dtype) -> Step:
    batch = collate(pairs, pad_id=0, share=True, from_divergence=True)
    reference = torch.full((len(pairs),), REFERENCE)

    def loss() -> torch.Tensor:
        sums = response_logps(model, batch).sum(dim=1)
        return mean_loss("dpo", sums, batch.response_mask.sum(dim=1), (reference, reference))

    return step(model, loss, dtype)


def our_orpo(model: LlamaForCausalLM, pairs: list[PairIds], dtype: torch.dtype) -> Step:
    batch = collate(pairs, pad_id=0, share=True)

    def loss() -> torch.Tensor:
        return mean_loss("orpo", response_logps(model, batch).sum(dim=1), batch.response_mask.sum(dim=1))

    return step(model, loss, dtype)


def trl_dpo(model: LlamaForCausalLM, pairs: list[PairIds], dtype: torch.dtype) -> Step:
    """TRL's loss, with the reference's log-probs as columns (its `precompute_ref_log_probs`)."""
    from trl import DPOConfig, DPOTrainer

    class Pretokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    reference = {"ref_chosen_logps": REFERENCE, "ref_rejected_logps": REFERENCE}
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected, **reference} for p in pairs]
    with tempfile.TemporaryDirectory() as directory:
        args = DPOConfig(directory, max_length=None, per_device_train_batch_size=len(pairs), **OPTIONS)
        # The trainer changes its model's forward, so it gets a copy; the reference is never called.
        twin, unused = copy.deepcopy(model), smollm2_shape(layers=1, vocabulary=8)
        trainer = Pretokenised(twin, unused, args, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer())
    trainer.precompute_ref_logps = True
    batch = next(iter(trainer.get_train_dataloader()))
    return step(twin, lambda: trainer.compute_loss(twin, dict(batch)), dtype)


def trl_orpo(model: LlamaForCausalLM, pairs: list[PairIds], dtype: torch.dtype) -> Step:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    tokenizer = _tokenizer()
    with tempfile.TemporaryDirectory() as directory:
        args = ORPOConfig(directory, beta=0.05, max_length=4096, **OPTIONS)
        rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        twin = copy.deepcopy(model)
        trainer = ORPOTrainer(twin, args, train_dataset=rows, processing_class=tokenizer)
    batch: dict[str, Any] = dict(_orpo_batch(pairs))  # the trainer's own type says lists
    return step(twin, lambda: trainer.get_batch_loss_metrics(twin, dict(batch), train_eval="eval")[0], dtype)


def _orpo_batch(pairs: list[PairIds]) -> dict[str, torch.Tensor]:
    """The pairs as TRL's collator gives them: padded on the right, prompt masked in the labels."""
    batch = {}
    for name in ("chosen", "rejected"):
        rows = [(p.prompt, p.chosen if name == "chosen" else p.rejected) for p in pairs]
        longest = max(len(prompt) + len(response) for prompt, response in rows)
        padding = [longest - len(prompt) - len(response) for prompt, response in rows]
        ids = [prompt + response + [0] * n for (prompt, response), n in zip(rows, padding, strict=True)]
        mask = [[1] * (longest - n) + [0] * n for n in padding]
        labels = [[-100] * len(p) + r + [-100] * n for (p, r), n in zip(rows, padding, strict=True)]
        for part, values in (("input_ids", ids), ("attention_mask", mask), ("labels", labels)):
            batch[f"{name}_{part}"] = torch.tensor(values)
    return batch


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    model = BPE(vocab=vocabulary, merges=[], unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="<pad>", eos_token="<eos>")
    tokenizer.bos_token = "<eos>"
    return tokenizer
