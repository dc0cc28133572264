"""Algorithm 1 on top of `transformers.Trainer`.

One optimizer step is one iteration of the paper:
    get_batch_samples    lines 6-11, 14: sample rows, regenerate B with the EMA, fill the buffer, draw a batch from it
    compute_loss         line 15: the preference loss on the drawn pairs
    (Trainer)            line 16: the optimizer step
    _SelfPlayCallback    line 17: the EMA, then the reference
"""

import itertools
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from components.common.core.errors import UserError
from components.common.generation.hf import HFSampler
from components.common.generation.protocol import Canary, Sampler, SamplingSettings, make_canary
from components.common.kernels.pair_logps import (
    pair_logps,
    sequence_nll,
    shared_prefix_attention,
    supports_shared_prefix,
)
from components.common.kernels.pair_packing import PairBatch, PairIds, collate, whole_sequences
from components.common.models.chat_templates import EncodedRow, encode_rows
from components.common.models.loading import load_model, load_tokenizer, stop_ids, whole_models
from components.common.training.distributed.processes import all_reduce_sum, gather, is_main_process
from components.sapo import checkpoint, self_play, state
from components.sapo.checkpoint import CheckpointReader, CheckpointWriter
from components.sapo.config import SAPOConfig
from components.sapo.ema import EMA, copy_weights, frozen_copy, weights_of
from components.sapo.lora import add_adapter, load_policy, merge_into, merged_weights
from components.sapo.losses import LOSSES, PairLoss
from components.sapo.pair_log import PairLog
from components.sapo.reference_cache import ReferenceCache
from components.sapo.replay_buffer import Entry, ReplayBuffer
from components.sapo.schedule import Overlap, Schedule, Sync
from components.sapo.segments import Rejected
from components.sapo.sharding import Replicated, layout_of, relative_distance

CANARY = 16  # tokens whose log-probs prove that the engine serves what was pushed


class SAPOTrainer(Trainer):
    """Trains a policy by self-play (arXiv 2405.20830), in one process or in several.

    Several processes do what one does with the same pairs a step: the rows of a step, their cuts and the draws from the
    buffer do not depend on how many there are. Each regenerates its share of the rows and trains on its share of the draws;
    new entries go to all, so every process has the whole buffer.

    Args:
        model: the policy, or the directory of one. Load it in float32; mixed precision comes from `args`.
        args: settings.
        train_dataset: rows with `id`, `prompt` and `chosen` messages (TRL's conversational format), or tokenised rows
            with `id`, `prompt_ids` and `chosen_ids`.
        eval_dataset: held-out rows in the same form. B' is generated for them once, by the start model; what is
            measured is how the policy's log-probs of those pairs move from the start.
        processing_class: tokenizer with a chat template; read from `model` when that is a directory.
        max_prompt_length: conversational rows with a longer prompt are dropped (tokens).
        sampler: engine for B'; default is `transformers`' generate on the EMA (on-policy: on the policy).
        callbacks: as in `Trainer`.

    Attributes:
        ema, buffer, sampler: the parts of the method.
        ema_model, served_model, reference: models with the weights of the EMA, of what samples, and of the reference. None
            where the weights are lists of parts instead (the policy is sharded, or trains an adapter), and `reference` where
            the loss needs none.
        layout: where the trained parameters lie; from the start of training on.
    """

    args: SAPOConfig
    train_dataset: list[EncodedRow]

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SAPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        max_prompt_length: int = 1792,
        sampler: Sampler | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_policy(model, args)
        if processing_class is None:
            raise ValueError("processing_class: is needed when model is not a directory")
        _disable_dropout(model)
        self.preference = LOSSES[args.loss_type]
        self.in_parts = args.is_sharded() or args.use_peft
        if args.use_peft:
            add_adapter(model, args)
        self._copy_models(model, args)
        train_rows = _tokenised(train_dataset, processing_class, max_prompt_length, args.max_length)
        eval_rows = _tokenised(eval_dataset, processing_class, max_prompt_length, args.max_length)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows or None,
            processing_class=processing_class,
            callbacks=[_SelfPlayCallback(self), *(callbacks or [])],
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs; Trainer divides by the accumulation
        self.rank_slice = self_play.RankSlice(self.args.process_index, self.args.world_size)
        self.stop_ids = stop_ids(model, processing_class)
        self.pad_id = int(processing_class.pad_token_id)
        self.share_prefix = supports_shared_prefix(model)
        self.sampler = sampler or self._engine()
        self.buffer = ReplayBuffer(args.replay_buffer_size)
        self.reference_cache = ReferenceCache(args.replay_buffer_size)
        self.row_order = self_play.RowOrder(len(train_rows), self._rows_per_step(), args.seed)
        self.schedule = self._schedule()
        self.pair_log = PairLog(Path(args.log_dir or str(args.output_dir)) / "pairs.jsonl", processing_class)
        self.held_out: HeldOut | None = None
        self.stop_requested = False  # set it (from a signal handler) to save after the current step and stop
        self._resumed: CheckpointReader | None = None
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps_timed = 0  # the step of the last log entry
        self._waited_logged = self._sampled_logged = 0.0
        self.started = time.perf_counter()  # of the run; a stage puts its own start here
        self._totals: defaultdict[str, float] = defaultdict(float)  # of `wall_clock`
        if args.sampler == "vllm" and not self.in_parts:
            self.push()  # it has read the model's directory: prove that this is the model

    def _copy_models(self, model: PreTrainedModel, args: SAPOConfig) -> None:
        """Models for the EMA, for what samples and for the reference, where they are not kept as lists of parts.

        They are made before Trainer wraps the policy's forward: a later deepcopy would run the policy's weights.
        """
        self.ema_model = self.served_model = self.reference = None
        self.reference_weights: list[Tensor] = []
        self.layout = Replicated(model, None)
        if self.in_parts:
            if args.sampler == "hf":
                self.served_model = model if args.use_peft else _unsharded(model, args)
            return
        self.ema_model = frozen_copy(model).to(args.device)
        served = [model] if args.on_policy else [self.ema_model]
        if (dtype := args.served_dtype()) is not None:
            served = [frozen_copy(model).to(args.device, dtype)]
        self.served_model = served[0]
        names = self.layout.names
        copied = None if dtype is None else weights_of(self.served_model, names)
        self.ema = EMA(weights_of(self.ema_model, names), args.ema_decay, copied)
        if self.preference.reference:
            self.reference = frozen_copy(model).to(args.device)
            self.reference_weights = weights_of(self.reference, names)

    def _rows_per_step(self) -> int:
        """As many fresh rows as pairs are trained on by all processes: N of Algorithm 1."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _engine(self) -> Sampler:
        settings = SamplingSettings(self.args.temperature, self.args.top_k, self.args.top_p, self.stop_ids)
        if self.args.sampler == "hf":
            model: Any = self.served_model
            return HFSampler(model, settings, self.pad_id, self.args.sampler_batch_size)
        from components.common.generation.vllm import VLLMSampler

        return VLLMSampler(
            str(self.policy.name_or_path),
            settings,
            max_model_len=self.args.max_length,
            dtype=self.args.engine_dtype(),
            gpu_memory_utilization=self.args.gpu_memory_utilization,
            sleep_level=self.args.sleep_level,
            timeout=self.args.sampler_timeout,
        )

    def _schedule(self) -> Schedule:
        if self.args.schedule == "sync":
            return Sync(self._generate)
        return Overlap(self._generate, self._total_steps() - 1, self.args.sampler_timeout)

    # ---- The sampling stage, and the draw that opens the training stage -------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """A stand-in that only counts: batches come from the replay buffer, once per optimizer step."""
        micro_batches = self.row_order.steps_per_epoch * self.args.gradient_accumulation_steps
        return DataLoader(range(micro_batches), batch_size=None)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        step = self.state.global_step
        entries = self.schedule.entries(step)
        self.buffer.add(gather(entries))
        self._record_sampling(entries)
        random = self_play.generator(self.args.seed, self_play.DRAWS, step)
        size = self.args.per_device_train_batch_size
        # One draw for each process, by all of them alike: two processes draw what one does with two micro-batches.
        drawn = [[self.buffer.draw(size, random) for _ in range(self.rank_slice.count)] for _ in range(num_batches)]
        return [self._collate(of_each) for of_each in drawn], None

    def _generate(self, step: int, steps_done: int) -> list[Entry]:
        """Entries from the rows of a step; reads nothing that changes while a step runs."""
        random = self_play.generator(self.args.seed, self_play.SAMPLING, step)
        rows, epoch = self.row_order.at(step), self.row_order.epoch_of(step)
        return self._sample(self.train_dataset, rows, random, steps_done, epoch)

    def _sample(
        self, rows: list[EncodedRow], chosen: list[int], random: np.random.Generator, step: int, epoch: int
    ) -> list[Entry]:
        """This process's share of the entries that `self_play.sample_entries` gives."""
        # transformers' generate has no adapter of its own: it runs the policy's model, with the EMA's adapter in place.
        in_turns = self.args.use_peft and self.args.sampler == "hf" and not self.args.on_policy
        with self.layout.swapped_in(self.ema.serving) if in_turns else nullcontext():
            return self_play.sample_entries(rows, chosen, self.sampler, self.args, random, step, epoch, self.rank_slice)

    def _record_sampling(self, entries: list[Entry]) -> None:
        for entry in entries:
            b = self.train_dataset[entry.row]["chosen_ids"][entry.segment.start : entry.segment.end]
            self._metrics["sampling/b_prime_length"].append(len(entry.replacement))
            self._totals["tokens/generated"] += len(entry.replacement)
            self._metrics["sampling/identical"].append(float(b == entry.replacement.tolist()))
            self._metrics["sampling/ended"].append(float(not self.stop_ids.isdisjoint(entry.replacement.tolist())))

    def _collate(self, drawn_by: list[list[tuple[int, Entry]]]) -> dict[str, Any]:
        """This process's micro-batch of those that all draw; chosen responses are in its first half, rejected in the second."""
        drawn = drawn_by[self.rank_slice.index]
        pairs = [_Pair(self.train_dataset[e.row], e, self._rejected(e), entry_id) for entry_id, e in drawn]
        batch = self._collate_pairs(pairs)
        for _, entry in drawn:
            self._metrics["buffer/age_steps"].append(self.state.global_step - entry.step)
            self._metrics["buffer/age_versions"].append(self.ema.version - entry.version)
        ids = [[entry_id for entry_id, _ in drawn] for drawn in drawn_by]
        return {"batch": batch, "pairs": pairs, "ids": ids, "input_ids": batch.model_inputs["input_ids"]}

    def _collate_pairs(self, pairs: list["_Pair"], whole: bool = False) -> PairBatch:
        """Pairs for the model; what cancels in the loss is not scored, unless responses are wanted `whole`."""
        ids = [PairIds(pair.row["prompt_ids"], pair.row["chosen_ids"], pair.rejected.ids) for pair in pairs]
        return collate(ids, self.pad_id, self.share_prefix, self.preference.shared_cancels and not whole)

    def _rejected(self, entry: Entry) -> Rejected:
        return self_play.rejected_response(self.train_dataset[entry.row], entry, self.args, self.stop_ids)

    # ---- The training stage ---------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        attention = shared_prefix_attention(self.policy) if self.share_prefix else nullcontext()
        with self._timed("train"), attention:
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        pairs, batch = inputs["pairs"], inputs["batch"].to(self.args.device)
        # Mixed precision by hand: accelerate wraps the model's own forward, which pairs do not take.
        with self.accelerator.autocast():
            loss, logps = self._pair_loss(model, batch, pairs, inputs["ids"])
        self._totals["tokens/trained"] += batch.real_tokens()
        self._record_training(loss, logps.detach(), pairs, batch)
        return loss.losses.mean()

    def _pair_loss(
        self, model: nn.Module, batch: PairBatch, pairs: list["_Pair"], ids_of_all: list[list[int]]
    ) -> tuple[PairLoss, Tensor]:
        """The loss of each pair, and the log-prob of each response token, (2 * pairs, longest response)."""
        extras: tuple[Tensor, ...] = ()
        if self.preference.reference:
            # First, as it may swap the reference's weights into the policy, and holds no activations afterwards.
            extras += self._reference_logps(pairs, ids_of_all).to(self.args.device).unbind()
        batches = [batch, self._sequences(pairs)] if self.args.nll_scope == "sequence" else [batch]
        logps, *of_sequences = pair_logps(model, self.policy, batches)
        chosen, rejected = self._per_response(logps, batch).chunk(2)
        if self.preference.nll:
            extras += (sequence_nll(of_sequences[0], batches[1]) if of_sequences else -chosen,)
        return self.preference.function(chosen, rejected, *extras, self._weight()), logps

    def _per_response(self, logps: Tensor, batch: PairBatch) -> Tensor:
        """What the loss reads of per-token log-probs, (2 * pairs,): their sum, or their mean over response tokens."""
        sums = logps.sum(dim=1)
        return sums / batch.response_mask.sum(dim=1) if self.preference.per_token else sums

    def _weight(self) -> float:
        return float(getattr(self.args, self.preference.weight))

    @torch.no_grad()
    def _reference_logps(self, pairs: list["_Pair"], ids_of_all: list[list[int]]) -> Tensor:
        """The reference's log-probs of both responses, (2, pairs); only of pairs it has not scored since its last refresh.

        Args:
            ids_of_all: entries of this micro-batch by process. What one process scores, all of them know.
        """
        ids = ids_of_all[self.rank_slice.index]
        missing = self.reference_cache.missing(ids)
        self._metrics["reference/reused"].append(1 - len(missing) / len(ids))
        if any(self.reference_cache.missing(of_one) for of_one in ids_of_all):
            by_id = dict(zip(ids, pairs, strict=True))
            # Sharded processes go forward together, even the one that has nothing to score.
            scored = missing or ids[:1]
            batch = self._collate_pairs([by_id[i] for i in scored]).to(self.args.device)
            with self._reference_model() as (model, policy):
                logps = self._per_response(pair_logps(model, policy, [batch])[0], batch)
            found = gather([(scored, torch.stack(logps.chunk(2)).float().cpu())])
            for entry_ids, values in found:
                self.reference_cache.store(entry_ids, values)
        return self.reference_cache.get(ids)

    @contextmanager
    def _reference_model(self) -> Iterator[tuple[Any, Any]]:
        """What to call for the reference's forward pass, and the model within it."""
        if self.reference is not None:
            yield self.reference, self.reference
            return
        with self.layout.swapped_in(self.reference_weights):
            yield self.model_wrapped, self.policy

    def _sequences(self, pairs: list["_Pair"]) -> PairBatch:
        """Prompt and chosen response of each pair as one sequence."""
        chosen = [(pair.row["prompt_ids"], pair.row["chosen_ids"]) for pair in pairs]
        return whole_sequences(chosen, self.pad_id, self.share_prefix).to(self.args.device)

    def _record_training(self, loss: PairLoss, logps: Tensor, pairs: list["_Pair"], batch: PairBatch) -> None:
        margins = loss.chosen_rewards - loss.rejected_rewards
        chosen, rejected = logps.sum(dim=1).chunk(2)
        of_chosen, of_rejected = logps.chunk(2)
        b = _segment_sums(of_chosen, [(p.entry.segment.start, p.entry.segment.end) for p in pairs])
        b_prime = _segment_sums(of_rejected, [(p.rejected.start, p.rejected.end) for p in pairs])
        recorded = {
            "rewards/chosen": loss.chosen_rewards,
            "rewards/rejected": loss.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "logps/b": b,
            "logps/b_prime": b_prime,
            "tokens/pair": batch.tokens,
        }
        for name, values in recorded.items():
            self._metrics[name] += values.tolist()
        step = self.state.global_step + 1  # as in the log entry that follows this step
        if step % self.state.logging_steps == 0 and is_main_process():
            for i, pair in enumerate(pairs[: self.args.pairs_per_log]):
                behind = self.ema.version - pair.entry.version
                self.pair_log.write(step, pair.row, pair.entry, pair.rejected, b[i], b_prime[i], behind)

    # ---- After the optimizer step ---------------------------------------------------------------------------------

    def after_step(self) -> None:
        """Line 17: the EMA every `ema_interval` steps, then the reference at its own interval."""
        step = self.state.global_step
        if "seconds/first_step" not in self._totals:
            self._totals["seconds/first_step"] = time.perf_counter() - self.started
        self.schedule.settle()
        with self._timed("ema"):
            if step % self.args.ema_interval == 0:
                pushed = (self.ema.version + 1) % self.args.push_interval == 0
                self.ema.update(self.layout.parts(), serve=pushed)
                if pushed and not self.args.on_policy:
                    self.push()
            if self.args.on_policy:
                self.push()
            if (
                self.preference.reference
                and self.args.reference in ("ema", "policy")
                and step % self._reference_interval() == 0
            ):
                source = self.ema.average if self.args.reference == "ema" else self.layout.parts()
                copy_weights(source, self.reference_weights)
                self.reference_cache.version += 1

    def push(self) -> None:
        """Gives the sampler the weights it is to serve; an engine with a copy of its own proves that it serves them."""
        if not self.in_parts:
            served: Any = self.served_model
            return self.sampler.load(served.named_parameters(), self.ema.served_version, self._canary(served))
        parts = self.layout.parts() if self.args.on_policy else self.ema.serving
        with self.layout.swapped_in(parts):
            canary = self._canary(self.model_wrapped)
            weights = merged_weights(self.policy) if self.args.use_peft else self.layout.weights(parts)
            in_place = self.args.use_peft and self.args.sampler == "hf"
            self.sampler.load([] if in_place else weights, self.ema.served_version, canary)

    def _canary(self, model: Any) -> Canary | None:
        """What the weights to serve give, by the model that has them."""
        if self.args.sampler != "vllm":
            return None
        row = self.train_dataset[0]
        length = min(CANARY, self.args.max_length - 1)
        return make_canary(model, (row["prompt_ids"] + row["chosen_ids"])[:length])

    def _reference_interval(self) -> int:
        interval = self.args.reference_interval
        return self.row_order.steps_per_epoch if interval == "epoch" else int(interval)

    @property
    def policy(self) -> nn.Module:
        """The model that is trained, without what distributed training wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    # ---- Held-out pairs -------------------------------------------------------------------------------------------

    def _make_held_out(self) -> None:
        """Pairs from held-out rows and the start model, with its log-probs of them."""
        rows: list[EncodedRow] = self.eval_dataset  # type: ignore[assignment]
        random = self_play.generator(self.args.seed, self_play.HELD_OUT, 0)
        every = list(range(len(rows)))
        entries = self._sample(rows, every, random, step=0, epoch=0)
        self.set_held_out(gather(entries), start_logps=None)

    def set_held_out(self, entries: list[Entry], start_logps: Tensor | None) -> None:
        """Held-out pairs from their entries; without log-probs the policy as it is now is the start."""
        rows: list[EncodedRow] = self.eval_dataset  # type: ignore[assignment]
        rejected = [self_play.rejected_response(rows[e.row], e, self.args, self.stop_ids) for e in entries]
        pairs = [_Pair(rows[e.row], e, r, i) for i, (e, r) in enumerate(zip(entries, rejected, strict=True))]
        self.held_out = HeldOut(pairs, self._score(pairs) if start_logps is None else start_logps)

    @torch.no_grad()
    def _score(self, pairs: list["_Pair"]) -> Tensor:
        """The policy's log-probs of both responses, (2, pairs): sums, or means per token, as the loss takes them.

        Each process scores every n-th pair, all of them equally many: forward is a common work where the policy is sharded.
        """
        n = self.rank_slice.count
        mine = list(itertools.islice(itertools.cycle(pairs), self.rank_slice.index, -(-len(pairs) // n) * n, n))
        model: Any = self.model_wrapped
        was_training = model.training
        model.eval()
        scores = []
        for low in range(0, len(mine), self.args.per_device_eval_batch_size):
            some = mine[low : low + self.args.per_device_eval_batch_size]
            batch = self._collate_pairs(some, whole=True).to(self.args.device)
            with self.accelerator.autocast():
                logps = self._per_response(pair_logps(model, self.policy, [batch])[0], batch)
            scores.append(torch.stack(logps.chunk(2)).cpu())
        model.train(was_training)
        by_process = gather([torch.cat(scores, dim=1)])  # each (2, mine)
        return torch.stack(by_process, dim=2).flatten(1)[:, : len(pairs)]

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """How far the policy has moved from the start model on the held-out pairs.

        Rewards are the change of the log-prob since the start: times beta where the loss has a reference (DPO, IPO), per
        token where it takes means (ORPO, IPO). So every run begins at a margin of exactly 0, and a margin above 0 means
        that y+ gained on y-.
        """
        if self.held_out is None:
            raise ValueError("eval_dataset: held-out rows are needed to evaluate")
        now = self._score(self.held_out.pairs)
        scale = self._weight() if self.preference.reference else 1.0
        chosen, rejected = scale * (now - self.held_out.start_logps)
        metrics = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "logps/chosen": now[0].mean(),
            "logps/rejected": now[1].mean(),
        }
        named = {f"{metric_key_prefix}_{name}": value.item() for name, value in metrics.items()}
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    # ---- Checkpoint and resume ------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, from a checkpoint of this run if one is given.

        Args:
            resume_from_checkpoint: a checkpoint's directory, or True for the newest complete one in `output_dir`.

        Raises:
            UserError: there is none, it is damaged, or it is of a run with other settings or rows.
        """
        if not resume_from_checkpoint:
            self._cut_pair_log(0)
            return super().train(None, *args, **kwargs)
        self._resumed = CheckpointReader(self._checkpoint_directory(resume_from_checkpoint))
        state.check_identity(self, self._resumed)
        self._cut_pair_log(self._resumed.step)
        if self._resumed.step >= self._total_steps():
            return self._nothing_left(self._resumed)
        return super().train(str(self._resumed.directory), *args, **kwargs)

    def _cut_pair_log(self, step: int) -> None:
        if is_main_process():
            self.pair_log.keep_until(step)

    def _checkpoint_directory(self, given: str | bool) -> Path:
        if given is not True:
            return Path(str(given))
        if found := checkpoint.complete_checkpoints(Path(str(self.args.output_dir))):
            return found[-1]
        raise UserError(f"{self.args.output_dir}: holds no complete checkpoint to resume from")

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self.row_order.steps_per_epoch)

    def _nothing_left(self, reader: CheckpointReader) -> TrainOutput:
        """The run had ended when it was interrupted: only the trained weights and the log are needed."""
        self._prepare_for_training(self._total_steps(), self.get_train_dataloader(), None)
        self.state = TrainerState.load_from_json(str(reader.directory / "trainer_state.json"))
        return TrainOutput(self.state.global_step, math.nan, {"train_runtime": 0.0})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(str(self.args.output_dir))
        with self._timed("save"):
            state.save(self, CheckpointWriter(directory / f"{checkpoint.PREFIX}{self.state.global_step}"))
        if self.args.save_total_limit is not None and is_main_process():
            checkpoint.remove_old(directory, self.args.save_total_limit)

    # `Trainer` calls the next three when it resumes; the files it would look for are not there.

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[Any, DataLoader]:
        """Wraps the model and makes the optimizer; from here on it is known where the trained parameters lie."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.layout = layout_of(self.policy, self.optimizer)
        if self.in_parts:
            self._copy_parts()
        if self._resumed is not None:
            state.restore(self, self._resumed)
        return prepared

    def _copy_parts(self) -> None:
        """The EMA and the reference as lists of parts, which start as the policy."""
        start, dtype = self.layout.parts(), self.args.served_dtype()
        served = None if dtype is None else [part.to(dtype, copy=True) for part in start]
        self.ema = EMA([part.clone() for part in start], self.args.ema_decay, served)
        if self.preference.reference:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            self.reference_weights = [part.to(dtype, copy=True) for part in start]
            if self.args.reference == "base":  # an adapter of zeros adds nothing
                torch._foreach_zero_(self.reference_weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """All is put back together, once the model is prepared."""

    def _load_rng_state(self, checkpoint_directory: str | None) -> None:
        if self._resumed is not None:
            state.restore_random_states(self._resumed)

    def unlogged(self) -> dict[str, Any]:
        """Metrics of all processes since the last log entry, as JSON; a resumed run logs them with its own."""
        return {
            "metrics": self._metrics_of_all(),
            "loss": float(np.mean(gather([float(self._tr_loss)]))),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "wall_clock": self.wall_clock(),
        }

    def save_trained(self, output: Path) -> None:
        """Writes the trained policy as a plain Hugging Face directory, one parameter at a time; all processes call this."""
        if self.args.use_peft and self.args.merge_adapter:
            if is_main_process():
                with whole_models():
                    base = load_model(str(self.policy.name_or_path))
                merge_into(base, self.policy)
                base.save_pretrained(output)
        elif self.layout.sharded:
            whole = self.layout.weights(self.layout.parts())
            weights = {name: weight.cpu() for name, weight in whole if is_main_process()}
            if is_main_process():
                self.policy.save_pretrained(output, state_dict=weights)  # type: ignore[operator]
        elif is_main_process():
            self.policy.save_pretrained(output)  # type: ignore[operator]
        if is_main_process():
            self.processing_class.save_pretrained(output)  # type: ignore[union-attr]

    def before_first_step(self) -> None:
        """`Trainer` has reset its running loss by now; a resumed run goes on with the saved one."""
        if self._resumed is not None:
            saved = self._resumed.json("trainer")
            self._tr_loss += saved["loss"]
            self._total_loss_scalar = saved["total_loss"]
            self._globalstep_last_logged = saved["last_logged"]
            if is_main_process():
                self._metrics = defaultdict(list, saved["metrics"])
                self._totals = defaultdict(float, saved["wall_clock"])
        elif self.in_parts:
            self.push()
        if self.eval_dataset is not None and self._resumed is None:
            self._make_held_out()
        self._steps_timed = self.state.global_step

    # ---- Metrics --------------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._seconds[part] += seconds
        self._totals[f"seconds/{part}"] += seconds

    def wall_clock(self) -> dict[str, float]:
        """Seconds and tokens of the run so far, over its interruptions.

        `seconds/generate` is the sampler's work, of which the learner waited `seconds/wait`; `seconds/first_step` runs from
        the start of the stage to the end of the first optimizer step; a shared prefix counts once in `tokens/trained`.
        """
        generated = {"seconds/generate": self.schedule.sampled, "seconds/wait": self.schedule.waited}
        seconds = {**self._totals, **{name: self._totals[name] + value for name, value in generated.items()}}
        tokens = ("tokens/generated", "tokens/trained")
        return seconds | {name: float(all_reduce_sum(int(self._totals[name]), self.args.device)) for name in tokens}

    def _metrics_of_all(self) -> dict[str, list[float]]:
        """Values of every process since the last entry."""
        merged: defaultdict[str, list[float]] = defaultdict(list)
        for metrics in gather([dict(self._metrics)]):
            for name, values in metrics.items():
                merged[name] += values
        return dict(merged)

    def _speed(self, metrics: dict[str, list[float]]) -> dict[str, float]:
        """Seconds of each part of a step, pairs and tokens per second, and the most memory so far, since the last entry."""
        steps = max(self.state.global_step - self._steps_timed, 1)
        # The learner's time; the sampler's own, which may pass beside it, is told apart.
        self._seconds["wait"] = self.schedule.waited - self._waited_logged
        sampled = self.schedule.sampled - self._sampled_logged
        self._waited_logged, self._sampled_logged = self.schedule.waited, self.schedule.sampled
        total = max(sum(self._seconds.values()), 1e-9)
        speed = {f"seconds/{part}": seconds / steps for part, seconds in self._seconds.items()}
        speed["seconds/sample"] = sampled / steps
        speed["pairs_per_second"] = len(metrics["rewards/margins"]) / total
        speed["tokens_per_second"] = sum(metrics["tokens/pair"]) / total
        return speed | {"memory/peak_gib": peak_memory_gib()}

    def _buffer_use(self) -> dict[str, float]:
        """How full the buffer is, and the reuse histogram of what it holds: shares drawn 0, 1, 2 and 3 or more times."""
        counts = np.minimum(self.buffer.counts(), 3)
        shares = np.bincount(counts, minlength=4) / max(len(counts), 1)
        names = ("never", "once", "twice", "more")
        reuse = {f"buffer/drawn_{name}": float(share) for name, share in zip(names, shares, strict=True)}
        use = {"buffer/size": len(self.buffer), "buffer/evicted": self.buffer.evicted}
        return {**use, "buffer/mean_count": float(self.buffer.counts().mean()), **reuse}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last entry to the trainer's own loss and learning rate."""
        if "loss" in logs:
            metrics = self._metrics_of_all()
            logs |= {name: float(np.mean(values)) for name, values in metrics.items() if values}
            distance = relative_distance(self.layout, self.ema.average, self.layout.parts())
            logs |= self._speed(metrics) | self._buffer_use() | {"ema/distance": distance}
            self._metrics.clear()
            self._seconds.clear()
            self._steps_timed = self.state.global_step
        super().log(logs, start_time)


class _SelfPlayCallback(TrainerCallback):
    """Calls the trainer back once per optimizer step, before anything is logged or saved."""

    def __init__(self, trainer: SAPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.before_first_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.after_step()
        if all_reduce_sum(int(self.trainer.stop_requested), args.device):
            self.trainer.stop_requested = True
            control.should_save = control.should_training_stop = True


@dataclass(frozen=True)
class _Pair:
    """A row with an entry of the buffer and the rejected response they make."""

    row: EncodedRow
    entry: Entry
    rejected: Rejected
    entry_id: int


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs, and the start model's log-probs of both responses, (2, pairs)."""

    pairs: list[_Pair]
    start_logps: Tensor


def peak_memory_gib() -> float:
    """The most memory this process has held: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _segment_sums(logps: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Sum of log-probs over a span of response tokens of each row, (rows,)."""
    return torch.stack([row[start:end].sum() for row, (start, end) in zip(logps, spans, strict=True)])


def _unsharded(model: PreTrainedModel, args: SAPOConfig) -> nn.Module:
    """A whole copy of a model that is, or will be, sharded, for transformers' generate."""
    dtype = getattr(torch, args.engine_dtype())
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return frozen_copy(model).to(args.device, dtype)
    with whole_models():  # ZeRO-3 has sharded the policy as it was loaded
        whole = load_model(str(model.name_or_path), dtype)
    return whole.requires_grad_(False).eval().to(args.device)


def _tokenised(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, max_length: int
) -> list[EncodedRow]:
    rows: list[Any] = [{"id": str(i), **row} for i, row in enumerate(dataset or [])]
    if not rows or "prompt_ids" in rows[0]:
        return rows
    return encode_rows(tokenizer, rows, min(max_prompt_length, max_length), max_length)[0]


def _disable_dropout(model: nn.Module) -> None:
    """Both responses of a pair, and the reference, must see the same network.

    Dropout modules and the plain numbers that attention layers keep (such as `attention_dropout`) are both set to 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name in ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
                if isinstance(getattr(holder, name, None), float):
                    setattr(holder, name, 0.0)
