"""The loop of SPIN: generate with the start model, train on the window, save; each iteration starts from the last.

Several processes go through it together: each generates its share and trains, the first one writes.
"""

import gc
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from components.common.models.chat_templates import EncodedRow
from components.common.models.loading import load_model, stop_ids
from components.common.training.distributed.processes import gather, is_main_process, on_main_process, process_count
from components.common.training.log import final_evaluation, show_progress_on_main_process
from components.common.training.preference import EncodedPair, preference_trainer
from components.common.training.saving import save_model_on_main_process
from components.spin import generation, results
from components.spin.clock import Clock
from components.spin.config import SPINSettings
from components.spin.files import RunFiles, mark_checkpoint, newest_checkpoint
from components.spin.samplers import open_sampler
from components.spin.schedule import Iteration, first_steps, schedule, trainer_settings

logger = logging.getLogger(__name__)


class StoppedError(Exception):
    """The run was told to stop, and has saved what it had."""


class SPINRun:
    """One run of all iterations; what an earlier process of the same run completed is not done again.

    Args:
        model: directory of the start model.
        train, held_out: tokenised rows; held-out ones may be none.
        log_directory: where curves and sampled pairs go.
        save: is called when a batch of responses, a checkpoint or an iteration is safely on the disk.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[EncodedRow],
        held_out: Sequence[EncodedRow],
        settings: SPINSettings,
        files: RunFiles,
        log_directory: Path,
        clock: Clock,
        save: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.train_rows = train
        self.held_out_rows = held_out
        self.settings = settings
        self.files = files
        self.log_directory = log_directory
        self.clock = clock
        self.save = save
        self.stop_requested = False  # set it (from a signal handler) to save and raise StoppedError soon
        self.first_steps = first_steps(len(train), settings, process_count())

    def run(self) -> None:
        """Goes through the iterations.

        Raises:
            StoppedError: `stop_requested` was set; the same run goes on from there.
        """
        for iteration in schedule(self.settings):
            if on_main_process(self.files.result, iteration.index) is None:
                self.files.iteration(iteration.index).mkdir(parents=True, exist_ok=True)
                self.generate(iteration)
                self.train(iteration)
                self.save()
                _free_memory()
                self.stop_if_requested()

    def start_model(self, iteration: Iteration) -> str:
        """The model that an iteration generates with, starts from and, with DPO, references."""
        return self.model if iteration.index == 0 else str(self.files.model(iteration.index - 1))

    def generate(self, iteration: Iteration) -> None:
        """Rejected responses for every row, of the training set and of the held-out one."""
        index = iteration.index
        parts = [("generate", self.train_rows, self.files.generated(index))]
        parts += [("held_out", self.held_out_rows, self.files.held_out(index))] if self.held_out_rows else []
        missing = on_main_process(
            lambda: [name for name, rows, path in parts if not generation.is_complete(path, rows)]
        )
        missing_parts = [part for part in parts if part[0] in missing]
        if missing:
            _forget_sharding()
            with ExitStack() as opened:
                with self.clock.measure(f"iteration-{index}/seconds/load_sampler"):
                    engine = open_sampler(self.start_model(iteration), self.tokenizer, self.settings)
                    sampler = opened.enter_context(engine)
                for name, rows, path in missing_parts:
                    with self.clock.measure(f"iteration-{index}/seconds/{name}"):
                        label = f"iteration {index}: {name}"
                        generation.generate(sampler, rows, path, index, self.settings, self.after_batch, label)
            del sampler
            _free_memory()
        on_main_process(results.write_pairs, self, index)

    def after_batch(self) -> None:
        """A batch of responses is on disk."""
        self.clock.save()
        self.save()
        self.stop_if_requested()

    def pairs(self, index: int) -> list[EncodedPair]:
        """The pairs that an iteration generated."""
        return generation.read_pairs(self.files.generated(index), self.train_rows)

    def train(self, iteration: Iteration) -> None:
        """Trains on the window's pairs, and completes the iteration."""
        index = iteration.index
        with self.clock.measure(f"iteration-{index}/seconds/train"):
            trainer, metrics = self._trained(iteration)
            self._save(trainer, index)
        evaluation: dict[str, float] = {}
        if self.held_out_rows:
            with self.clock.measure(f"iteration-{index}/seconds/evaluate"):
                evaluation = final_evaluation(trainer)
        generated = generation.statistics(self.pairs(index), stop_ids(self.model, self.tokenizer))
        summary = {"train_loss": metrics["train_loss"], **evaluation, **generated}
        summary["tokens/trained"] = sum(gather([trainer.tokens_trained]))
        history = trainer.state.log_history
        result = {"steps": trainer.state.global_step, "history": history, "summary": summary}
        on_main_process(self.files.finish_iteration, index, result)
        logger.info(
            "iteration %d: %d steps; %d of %d generated responses were equal to the chosen ones",
            *(index, trainer.state.global_step, generated["generated/identical"], len(self.train_rows)),
        )

    def _trained(self, iteration: Iteration) -> tuple[Any, dict[str, float]]:
        trainer = self.make_trainer(iteration)
        trainer.add_callback(_Interruptible(self, trainer, iteration))
        checkpoint = on_main_process(newest_checkpoint, self.files.checkpoints(iteration.index))
        if checkpoint:
            logger.info("iteration %d: resumes from %s", iteration.index, checkpoint[0])
            trainer.tokens_trained = checkpoint[1] if is_main_process() else 0  # of all processes
        metrics = trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None).metrics
        if self.told_to_stop() and trainer.state.global_step < trainer.state.max_steps:
            raise StoppedError(f"iteration {iteration.index}, after step {trainer.state.global_step}")
        return trainer, metrics

    def make_trainer(self, iteration: Iteration) -> Any:
        """The trainer of one iteration, with its model, its reference and its pairs."""
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.log_directory / "tensorboard" / f"iteration-{iteration.index}")
        args = trainer_settings(self.settings, iteration, str(self.files.checkpoints(iteration.index)))
        start = self.start_model(iteration)
        model = load_model(start, torch.float32)
        reference = load_model(start, torch.float32) if self.settings.loss_type == "dpo" else None
        pairs = [pair for index in iteration.window for pair in self.pairs(index)]
        held_out = None
        if self.held_out_rows:
            held_out = generation.read_pairs(self.files.held_out(iteration.index), self.held_out_rows)
        trainer = preference_trainer(self.settings.loss_type, model, reference, args, pairs, held_out, self.tokenizer)
        show_progress_on_main_process(trainer, f"iteration {iteration.index}: train")
        return trainer

    def _save(self, trainer: Any, index: int) -> None:
        """The trained model, in one move: a directory of that name is always whole."""
        model = self.files.model(index)
        unfinished = model.with_name("model.unfinished")
        for left in (model, unfinished):
            on_main_process(shutil.rmtree, left, True)  # whether it is there or not
        save_model_on_main_process(trainer, unfinished)
        on_main_process(unfinished.rename, model)

    def told_to_stop(self) -> bool:
        """Whether any process was."""
        return any(gather([self.stop_requested]))

    def stop_if_requested(self) -> None:
        if self.told_to_stop():
            raise StoppedError("between two batches of responses or two iterations")


def _free_memory() -> None:
    """Models that only cycles of references keep alive are dropped before the next ones are loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forget_sharding() -> None:
    """A model that generates is loaded whole, also where the last trainer's was loaded in shards (ZeRO-3)."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


class _Interruptible(TrainerCallback):
    """Stops with a checkpoint when told to, makes checkpoints count, and keeps the clock."""

    def __init__(self, run: SPINRun, trainer: Any, iteration: Iteration) -> None:
        self.run = run
        self.trainer = trainer
        self.iteration = iteration

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.iteration.index == 0:
            self.run.clock.mark("seconds/first_step")
        if self.run.told_to_stop():
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        tokens = sum(gather([self.trainer.tokens_trained]))
        on_main_process(mark_checkpoint, directory, tokens)
        self.run.clock.save()
        self.run.save()
