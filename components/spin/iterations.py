"""The loop of SPIN: generate with the start model, train on the window, save; each iteration starts from the last.

Several processes go through it together: each generates its share and trains, the first one writes.
"""

import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from components.common.models.loading import load_model, stop_ids
from components.common.training.clock import Clock
from components.common.training.distributed.processes import is_main_process, on_main_process, process_count
from components.common.training.log import final_evaluation, show_progress
from components.common.training.preference import preference_trainer
from components.common.training.resume import RunRecord
from components.common.training.saving import save_model
from components.common.training.stop import StopCallback, StoppedError, StopRequest
from components.common.training.trainer import InterruptibleTrainer
from components.spin import generation
from components.spin.files import mark_checkpoint, newest_checkpoint, write_json
from components.spin.inputs import SPINInputs
from components.spin.pair_log import write_pairs
from components.spin.samplers import open_sampler
from components.spin.schedule import Iteration, first_steps, schedule, trainer_settings

logger = logging.getLogger(__name__)


class SPINRun:
    """One run of all iterations; what an earlier process of the same run completed is not done again.

    Args:
        inputs: models, rows, settings and places.
        clock: of the run; its file is kept up to date.
        stop: is looked at after each batch of responses, each step and each iteration.
        save: is called when a batch of responses, a checkpoint or an iteration is safely on the disk.
    """

    def __init__(
        self, inputs: SPINInputs, clock: Clock, stop: StopRequest, save: Callable[[], None] = lambda: None
    ) -> None:
        self.inputs = inputs
        self.clock = clock
        self.stop = stop
        self.save = save

    def run(self) -> None:
        """Goes through the iterations.

        Raises:
            StoppedError: `stop` was requested; the same run goes on from there.
        """
        for iteration in schedule(self.inputs.settings):
            if on_main_process(self.inputs.files.result, iteration.index) is None:
                self.inputs.files.iteration(iteration.index).mkdir(parents=True, exist_ok=True)
                self.generate(iteration)
                self.train(iteration)
                self.save()
                _free_memory()
                self.stop_if_requested()

    # ---- Responses ------------------------------------------------------------------------------------------------

    def generate(self, iteration: Iteration) -> None:
        """Rejected responses for every row, of the training set and of the held-out one."""
        inputs, index = self.inputs, iteration.index
        parts = [("generate", inputs.train_rows, inputs.files.generated(index))]
        if inputs.held_out_rows:
            parts.append(("held_out", inputs.held_out_rows, inputs.files.held_out(index)))
        missing = on_main_process(
            lambda: [name for name, rows, path in parts if not generation.is_complete(path, rows)]
        )

        if missing:
            # A model that generates is loaded whole, also where the last trainer's was loaded in shards (ZeRO-3).
            unset_hf_deepspeed_config()
            with ExitStack() as opened:
                with self.timed("load_sampler", iteration):
                    engine = open_sampler(inputs.start_model(index), inputs.tokenizer, inputs.settings)
                    sampler = opened.enter_context(engine)
                for name, rows, path in parts:
                    if name in missing:
                        label = f"iteration {index}: {name}"
                        with self.timed(name, iteration):
                            generation.generate(sampler, rows, path, index, inputs.settings, self.after_batch, label)
            del sampler
            _free_memory()

        steps = first_steps(len(inputs.train_rows), inputs.settings, process_count())
        on_main_process(write_pairs, inputs, index, steps)

    def after_batch(self) -> None:
        """A batch of responses is on disk."""
        self.save_clock()
        self.save()
        self.stop_if_requested()

    # ---- Training -------------------------------------------------------------------------------------------------

    def train(self, iteration: Iteration) -> None:
        """Trains on the window's pairs, and completes the iteration."""
        inputs, index = self.inputs, iteration.index
        with self.timed("train", iteration):
            trainer, summary = self._trained(iteration)
            self._save_model(trainer, index)
        if inputs.held_out_rows:
            with self.timed("evaluate", iteration):
                summary |= final_evaluation(trainer)

        generated = generation.statistics(inputs.pairs(index), stop_ids(inputs.model, inputs.tokenizer))
        summary |= generated
        result = {"steps": trainer.state.global_step, "history": trainer.state.log_history, "summary": summary}
        on_main_process(inputs.files.finish_iteration, index, result)
        logger.info(
            "iteration %d: %d steps; %d of %d generated responses were equal to the chosen ones",
            *(index, trainer.state.global_step, generated["generated/identical"], len(inputs.train_rows)),
        )

    def _trained(self, iteration: Iteration) -> tuple[InterruptibleTrainer, dict[str, float]]:
        """The iteration's trainer at its end, with the mean loss and the tokens it trained on."""
        trainer = self.make_trainer(iteration)
        # Tokens and loss are those of the steps that are in the checkpoint: steps that a kill undid do not count.
        record = RunRecord(trainer, trainer.clock)
        for callback in (record, StopCallback(self.stop), _AfterStepAndSave(self)):
            trainer.add_callback(callback)

        checkpoint = on_main_process(newest_checkpoint, self.inputs.files.checkpoints(iteration.index))
        if checkpoint:
            logger.info("iteration %d: resumes from %s", iteration.index, checkpoint)
        metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics

        if self.stop.agreed() and trainer.state.global_step < trainer.state.max_steps:
            raise StoppedError(f"(iteration {iteration.index}, after step {trainer.state.global_step})")
        tokens = trainer.clock.summary()["tokens/trained"]
        return trainer, {"train_loss": record.train_loss(metrics), "tokens/trained": tokens}

    def make_trainer(self, iteration: Iteration) -> InterruptibleTrainer:
        """The trainer of one iteration, with its model, its reference and its pairs."""
        inputs, index = self.inputs, iteration.index
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(inputs.log_directory / "tensorboard" / f"iteration-{index}")
        args = trainer_settings(inputs.settings, iteration, str(inputs.files.checkpoints(index)))
        start, loss = inputs.start_model(index), inputs.settings.loss_type
        model = load_model(start, torch.float32)
        reference = load_model(start, torch.float32) if loss == "dpo" else None

        pairs = [pair for one in iteration.window for pair in inputs.pairs(one)]
        held_out = inputs.held_out_pairs(index)
        trainer = preference_trainer(loss, model, reference, args, pairs, held_out, inputs.tokenizer)
        show_progress(trainer, f"iteration {index}: train")
        return trainer

    def _save_model(self, trainer: Trainer, index: int) -> None:
        """The trained model, in one move: a directory of that name is always whole."""
        model = self.inputs.files.model(index)
        unfinished = model.with_name("model.unfinished")
        for left in (model, unfinished):
            on_main_process(shutil.rmtree, left, True)  # whether it is there or not
        save_model(trainer, unfinished)
        on_main_process(unfinished.rename, model)

    # ---- Interruptions --------------------------------------------------------------------------------------------

    @contextmanager
    def timed(self, part: str, iteration: Iteration) -> Iterator[None]:
        """Counts the time inside the block, up to the last `save_clock` if the process is killed."""
        with self.clock.timed(part, of=f"iteration-{iteration.index}"):
            yield
        self.save_clock()

    def save_clock(self) -> None:
        """Writes the times so far, of blocks that still run too; all processes call this."""
        state = self.clock.state_dict()
        if is_main_process():
            write_json(self.inputs.files.clock, state)

    def stop_if_requested(self) -> None:
        """Raises StoppedError if any process was told to stop; all processes call this."""
        if self.stop.agreed():
            raise StoppedError("(between two batches of responses or two iterations)")


class _AfterStepAndSave(TrainerCallback):
    """Makes the trainer's checkpoints count, and keeps the run's clock."""

    def __init__(self, run: SPINRun) -> None:
        self.run = run

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.clock.first_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        on_main_process(mark_checkpoint, directory)
        self.run.save_clock()
        self.run.save()


def _free_memory() -> None:
    """Models that only cycles of references keep alive are dropped before the next ones are loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
