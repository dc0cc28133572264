"""Algorithm 1 on top of `transformers.Trainer`: this file is the algorithm, and what it needs stands beside it.

One optimizer step is one iteration of the paper:

    get_batch_samples    lines 6-11: sample rows, cut them, regenerate B with the EMA, fill the replay buffer (sampling.py)
                         line 14: draw a batch from the buffer                                   (replay_buffer.py)
    compute_loss         line 15: the preference loss on the drawn pairs                (scoring.py, reference.py, losses.py)
    (Trainer)            line 16: the optimizer step
    after_step          line 17: the EMA, then the reference                                           (weights.py, ema.py)

Besides these there are the held-out pairs (held_out.py), the metrics (metrics.py) and the checkpoints (checkpoint.py).
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from components.common.core.identity import Identity
from components.common.generation.protocol import Sampler
from components.common.models.chat_templates import EncodedRow, encode_rows
from components.common.models.loading import load_tokenizer, stop_ids
from components.common.training.clock import Clock
from components.common.training.distributed.processes import gather, is_main_process
from components.sapo import sampling
from components.sapo.checkpoint import Stateful
from components.sapo.config import SAPOConfig
from components.sapo.held_out import HeldOutPairs
from components.sapo.lora import add_adapter, load_policy
from components.sapo.losses import LOSSES
from components.sapo.metrics import TrainingMetrics
from components.sapo.optimizer_state import OptimizerState
from components.sapo.pair_log import PairLog
from components.sapo.pairs import MicroBatch, make_pair
from components.sapo.reference import ReferenceLogps
from components.sapo.replay_buffer import ReplayBuffer
from components.sapo.resumable import ResumableTrainer
from components.sapo.sampling import SamplingStage, open_sampler
from components.sapo.scoring import PairScorer, loss_inputs
from components.sapo.state import identity
from components.sapo.weights import PolicyWeights

CANARY = 16  # tokens whose log-probs prove that the engine serves what was pushed


class SAPOTrainer(ResumableTrainer):
    """Trains a policy by self-play (arXiv 2405.20830), in one process or in several.

    Several processes do what one does with the same pairs a step: the rows of a step, their cuts and the draws from the
    buffer do not depend on how many there are. Each regenerates its share of the rows and trains on its share of the draws;
    new entries go to all, so every process has the whole buffer.

    Args:
        model: the policy, or the directory of one. Load it in float32; mixed precision comes from `args`.
        args: settings.
        train_dataset: rows with `id`, `prompt` and `chosen` messages (TRL's conversational format), or tokenised rows
            with `id`, `prompt_ids` and `chosen_ids`.
        eval_dataset: held-out rows in the same form.
        processing_class: tokenizer with a chat template; read from `model` when that is a directory.
        max_prompt_length: conversational rows with a longer prompt are dropped (tokens).
        sampler: engine for B'; default is the one that `args.sampler` names, with the EMA (on-policy: the policy).
        callbacks: as in `Trainer`.
        clock: of the run; default: one that starts now.

    Attributes:
        buffer: the replay buffer.
        weights: the policy's, and those that follow them: EMA, sampler's copy, reference.
        sampling: the sampling stage.
        held_out: held-out pairs; None without held-out rows.
        metrics: what the next log entry has.
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
        clock: Clock | None = None,
    ) -> None:
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_policy(model, args)
        if processing_class is None:
            raise ValueError("processing_class: is needed when model is not a directory")

        _disable_dropout(model)
        if args.use_peft:
            add_adapter(model, args)

        self.preference = LOSSES[args.loss_type]
        self.weights = PolicyWeights(model, args, has_reference=self.preference.reference)

        super().__init__(
            model=model,
            args=args,
            train_dataset=_tokenised(train_dataset, processing_class, max_prompt_length, args.max_length),
            eval_dataset=_tokenised(eval_dataset, processing_class, max_prompt_length, args.max_length) or None,
            processing_class=processing_class,
            callbacks=[_EachStep(self), *(callbacks or [])],
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs; Trainer divides by the accumulation
        self.clock = clock or Clock()

        self._make_collaborators(model, processing_class, sampler)

        if not args.engine.serves_in_place and not self.weights.in_parts:
            self.push()  # it has read the model's directory: prove that this is the model

    def _make_collaborators(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampler: Sampler | None
    ) -> None:
        """What the algorithm works with."""
        args = self.args
        self.stop_ids = stop_ids(model, tokenizer)
        pad_id = int(tokenizer.pad_token_id)
        self.rank_slice = sampling.RankSlice(args.process_index, args.world_size)

        self.metrics = TrainingMetrics(self.clock, self.stop_ids)
        self.buffer = ReplayBuffer(args.replay_buffer_size)
        self.scorer = PairScorer(model, self.preference, pad_id, args.device)

        engine = sampler or open_sampler(args, model, tokenizer, self.weights.served_model, self.stop_ids)
        self.sampling = SamplingStage(
            self.train_dataset, engine, args, self.rank_slice, self.clock, self.weights.serving
        )
        self.reference = ReferenceLogps(
            args.replay_buffer_size, self.scorer, self.weights.reference_model, self.rank_slice.index
        )
        self.held_out: HeldOutPairs | None = None
        if self.eval_dataset is not None:
            rows: Sequence[EncodedRow] = self.eval_dataset  # type: ignore[assignment]
            self.held_out = HeldOutPairs(
                rows, args, self.scorer, self.weights, self.accelerator.autocast, self.rank_slice, self.stop_ids
            )
        self.pair_log = PairLog(Path(args.log_dir or str(args.output_dir)) / "pairs.jsonl", tokenizer)

    @property
    def sampler(self) -> Sampler:
        """The engine that writes B'."""
        return self.sampling.sampler

    @property
    def policy(self) -> nn.Module:
        """The model that is trained, without what distributed training wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    # ---- The sampling stage (lines 6 to 11), and the draw that opens the training stage (line 14) -----------------

    def get_train_dataloader(self) -> DataLoader:
        """A stand-in that only counts: batches come from the replay buffer, once per optimizer step."""
        micro_batches = self.sampling.order.steps_per_epoch * self.args.gradient_accumulation_steps
        return DataLoader(range(micro_batches), batch_size=None)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one optimizer step."""
        step = self.state.global_step

        entries = self.sampling.entries(step)
        self.buffer.add(gather(entries))
        self.metrics.record_sampling(entries, self.train_dataset)

        random = sampling.generator(self.args.seed, sampling.DRAWS, step)
        micro_batches = [self._draw(random) for _ in range(num_batches)]

        inputs = [{"micro_batch": one, "input_ids": one.batch.model_inputs["input_ids"]} for one in micro_batches]
        return inputs, None

    def _draw(self, random: np.random.Generator) -> MicroBatch:
        """This process's micro-batch.

        Every process makes the draws of all of them: two processes draw what one does with two micro-batches.
        """
        size = self.args.per_device_train_batch_size
        drawn_by_process = [self.buffer.draw(size, random) for _ in range(self.rank_slice.count)]

        mine = drawn_by_process[self.rank_slice.index]
        pairs = [make_pair(self.train_dataset[e.row], i, e, self.args, self.stop_ids) for i, e in mine]
        self.metrics.record_draw(pairs, self.state.global_step, self.weights.ema.version)

        ids_by_process = [[entry_id for entry_id, _ in drawn] for drawn in drawn_by_process]
        return MicroBatch(pairs, self.scorer.collate(pairs), ids_by_process)

    # ---- The training stage (lines 15 and 16) ---------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with self.clock.timed("train"), self.scorer.attention(self.policy):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The preference loss on a micro-batch (Eq. 1 or Eq. 3), its mean over pairs."""
        micro_batch: MicroBatch = inputs["micro_batch"].to(self.args.device)

        # Mixed precision by hand: accelerate wraps the model's own forward, which pairs do not take.
        with self.accelerator.autocast():
            # The reference first: it may take the policy's place, and holds no activations afterwards.
            reference = self._reference_logps(micro_batch) if self.preference.reference else None

            token_logps, nll = self.scorer.policy_logps(
                model, self.policy, micro_batch, with_sequences=self.args.nll_scope == "sequence"
            )
            logps = loss_inputs(token_logps, micro_batch.batch, reference, nll)
            loss = self.preference.function(logps, self.args)

        b, b_prime = self.metrics.record_training(loss, token_logps.detach(), micro_batch)
        self._log_pairs(micro_batch, b, b_prime)
        return loss.losses.mean()

    def _reference_logps(self, micro_batch: MicroBatch) -> Tensor:
        """The reference's sums of both responses, (2, pairs)."""
        logps, reused = self.reference.logps(micro_batch)
        self.metrics.record("reference/reused", reused)
        return logps.to(self.args.device)

    def _log_pairs(self, micro_batch: MicroBatch, b: Tensor, b_prime: Tensor) -> None:
        """Writes some pairs as people read them, with the log-probs of B and B', at each logging step."""
        step = self.state.global_step + 1  # as in the log entry that follows this step
        if step % self.state.logging_steps != 0 or not is_main_process():
            return

        for i, pair in enumerate(micro_batch.pairs[: self.args.pairs_per_log]):
            self.pair_log.write(step, pair, b[i], b_prime[i], self.weights.ema.version - pair.version)

    # ---- Before the first step, and after each (line 17) ----------------------------------------------------------

    def after_step(self) -> None:
        step = self.state.global_step
        self.clock.first_step()
        self.sampling.settle()  # weights change between steps only, when nothing is sampled

        with self.clock.timed("ema"):
            if self.weights.average(step):
                self.push()
            if self.weights.refresh_reference(step, self.sampling.order.steps_per_epoch):
                self.reference.forget()

    def push(self) -> None:
        """Gives the sampler the weights it is to serve; an engine with a copy of its own proves that it serves them."""
        canary = None
        if self.args.engine.proves_weights:
            row = self.train_dataset[0]
            length = min(CANARY, self.args.max_length - 1)
            canary = (row["prompt_ids"] + row["chosen_ids"])[:length]

        self.weights.push(self.sampler, canary)

    def before_first_step(self) -> None:
        """The start weights write the held-out pairs; a resumed run has them already."""
        if not self.restore_running_loss():
            if self.weights.in_parts:  # they are there from now on
                self.push()
            if self.held_out is not None:
                self.held_out.start(self.sampling.held_out(self.held_out.rows))

        self.metrics.begin(self.state.global_step)

    # ---- Log and evaluation ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last entry to the trainer's own loss and learning rate."""
        if "loss" in logs:
            step = self.state.global_step
            logs |= self.metrics.entry(step, self.buffer) | {"ema/distance": self.weights.distance()}
            self.metrics.clear(step)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """How far the policy has moved from the start model on the held-out pairs (`HeldOutPairs`).

        Raises:
            ValueError: there are no held-out pairs.
        """
        if self.held_out is None:
            raise ValueError("eval_dataset: held-out rows are needed to evaluate")

        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.held_out.metrics().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def wall_clock(self) -> dict[str, float]:
        """Seconds and tokens of the run so far, over its interruptions; every process must call this.

        `seconds/generate` is the sampler's work, of which the learner waited `seconds/wait`; `seconds/first_step` runs from
        the start of the stage to the end of the first optimizer step; a shared prefix counts once in `tokens/trained`.
        """
        return self.clock.summary()

    # ---- What a checkpoint holds (`ResumableTrainer` saves it, and goes on from it) --------------------------------

    def parts(self) -> dict[str, Stateful]:
        """Nothing that follows from seed and step: rows, cuts and draws come from generators that are made for each step."""
        parts: dict[str, Stateful] = {
            "weights": self.weights,
            "optimization": OptimizerState(self.weights.layout, self.lr_scheduler),
            "buffer": self.buffer,
            "sampling": self.sampling,
            "metrics": self.metrics,
        }
        if self.preference.reference:
            parts["reference_logps"] = self.reference
        if self.held_out is not None:
            parts["held_out"] = self.held_out
        return parts

    def identity(self) -> Identity:
        return self._identity

    @functools.cached_property
    def _identity(self) -> Identity:
        """Made once: it digests every row."""
        policy: Any = self.policy
        held_out: Any = self.eval_dataset
        return identity(self.args, self.train_dataset, held_out, policy.config._name_or_path)

    def total_steps(self) -> int:
        return self.sampling.total_steps

    def model_is_prepared(self) -> None:
        self.weights.attach(self.model_wrapped, self.policy, self.optimizer)

    def parts_are_restored(self) -> None:
        self.push()

    def forget_after(self, step: int) -> None:
        if is_main_process():
            self.pair_log.keep_until(step)

    def save_trained(self, output: Path) -> None:
        """Writes the trained policy as a plain Hugging Face directory; all processes call this."""
        self.weights.save_policy(output)
        if is_main_process():
            self.processing_class.save_pretrained(output)  # type: ignore[union-attr]


class _EachStep(TrainerCallback):
    """Calls the trainer back once per optimizer step, before anything is logged or saved."""

    def __init__(self, trainer: SAPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.before_first_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.after_step()


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
