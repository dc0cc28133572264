"""What is compared: the learner step, the EMA update and the replay buffer. Each case returns results for its settings."""

import copy
import random
import tempfile
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from components.sapo.ema import EMA, copy_weights
from components.sapo.losses import dpo_loss
from components.sapo.pair_forward import PairBatch, PairIds, collate, response_logps
from components.sapo.replay_buffer import Entry, ReplayBuffer
from components.sapo.segments import Segment
from tests.benchmarks.harness import Result, compare


def smollm2_shape(layers: int = 30) -> LlamaForCausalLM:
    """Random weights in the shape of SmolLM2-135M."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 49152}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))


def ema(quick: bool) -> list[Result]:
    """One EMA update against the loop over parameters of the authors' code, and against a plain copy of the weights."""
    policy = smollm2_shape(layers=4 if quick else 30)
    ours = EMA(policy, decay=0.5)
    naive = copy.deepcopy(policy)

    @torch.no_grad()
    def loop() -> None:
        for mine, theirs in zip(naive.parameters(), policy.parameters(), strict=True):
            mine.data = 0.5 * mine.data + 0.5 * theirs.data

    peer, mine, memcpy = compare(
        [loop, lambda: ours.update(policy), lambda: copy_weights(policy, naive)], 3 if quick else 9
    )
    setting = f"{policy.num_parameters() / 1e6:.0f}M parameters, float32, {torch.get_num_threads()} threads"
    return [Result("EMA update", setting, "loop over parameters", peer, mine, "ms", peer / mine, memcpy / mine)]


def replay_buffer(quick: bool) -> list[Result]:
    """A step (8 in, 8 out) against a deque with Python weights."""
    results = []
    for capacity in (2_000, 100_000) if quick else (2_000, 100_000, 1_000_000):
        entry = Entry(0, Segment(0, 256), np.zeros(256, dtype=np.int32), 0, 0)
        ours, plain = ReplayBuffer(capacity), deque([[entry, 0] for _ in range(capacity)], maxlen=capacity)
        for _ in range(capacity):
            ours.add(entry)
        generator = np.random.default_rng(0)

        def our_step(ours: ReplayBuffer = ours, entry: Entry = entry, generator: Any = generator) -> None:
            for _ in range(8):
                ours.add(entry)
            ours.draw(8, generator)

        def plain_step(plain: deque = plain, entry: Entry = entry) -> None:
            plain.extend([entry, 0] for _ in range(8))
            for used in random.choices(plain, weights=[1 / (count + 1) for _, count in plain], k=8):
                used[1] += 1

        peer, mine = compare([plain_step, our_step], 3 if quick or capacity > 100_000 else 15)
        results.append(Result("buffer step", f"{capacity:,} entries", "deque", peer, mine, "ms", peer / mine))
    return results


def make_pairs(count: int, prompt: int, response: int, segment: int) -> list[PairIds]:
    """Pairs of random tokens as self-play makes them: B' in the middle, A shared, C kept."""
    generator = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        chosen = generator.integers(5, 1000, response).tolist()
        start = int(generator.integers(0, response - segment + 1))
        replacement = generator.integers(5, 1000, segment).tolist()
        rejected = chosen[:start] + replacement + chosen[start + segment :]
        pairs.append(PairIds(generator.integers(5, 1000, prompt).tolist(), chosen, rejected))
    return pairs


def learner_step(quick: bool) -> list[Result]:
    """Forward and backward of DPO on two pairs, reference log-probs given, against TRL's DPOTrainer on the same pairs."""
    results = []
    model = smollm2_shape(layers=3 if quick else 30)
    for prompt, response, segment in [(300, 220, 96)] if quick else [(100, 100, 32), (300, 220, 96), (800, 220, 96)]:
        pairs = make_pairs(2, prompt, response, segment)
        batch = collate(pairs, pad_id=0, share=True)
        trl_loss = _trl_dpo_loss(model, pairs)
        reference = torch.full((2,), -1000.0)

        def ours(batch: PairBatch = batch, reference: torch.Tensor = reference) -> None:
            chosen, rejected = response_logps(model, batch).sum(dim=1).chunk(2)
            dpo_loss(chosen, rejected, reference, reference, 0.1).losses.mean().backward()
            model.zero_grad()

        def peer(trl_loss: Callable[[], torch.Tensor] = trl_loss) -> None:
            trl_loss().backward()
            model.zero_grad()

        theirs, mine = compare([peer, ours], 2 if quick else 5)
        setting = f"2 pairs, prompt {prompt}, response {response}, segment {segment}, {torch.get_num_threads()} threads"
        results.append(Result("DPO learner step", setting, "TRL DPOTrainer", theirs, mine, "ms", theirs / mine))
    return results


def _trl_dpo_loss(model: LlamaForCausalLM, pairs: list[PairIds]) -> Callable[[], torch.Tensor]:
    """TRL's loss on the pairs, with the reference's log-probs as columns (its `precompute_ref_log_probs`)."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Pretokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    reference = {"ref_chosen_logps": -1000.0, "ref_rejected_logps": -1000.0}
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected, **reference} for p in pairs]
    options = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    with tempfile.TemporaryDirectory() as directory:
        args = DPOConfig(directory, max_length=None, per_device_train_batch_size=len(pairs), **options)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), pad_token="<pad>", eos_token="<eos>")
        trainer = Pretokenised(
            model, copy.deepcopy(model), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    trainer.precompute_ref_logps = True
    batch = next(iter(trainer.get_train_dataloader()))
    return lambda: trainer.compute_loss(model, dict(batch))


CASES = [learner_step, ema, replay_buffer]
