"""How many optimizer steps training takes, as `transformers.Trainer` counts them."""

import math

from transformers import TrainingArguments


def steps_per_epoch(rows: int, micro_batch: int, accumulation: int) -> int:
    """Steps of one pass over the rows.

    Args:
        micro_batch: rows of one forward pass, over all processes.
        accumulation: micro-batches of a step.
    """
    return math.ceil(math.ceil(rows / micro_batch) / accumulation)


def steps_of_run(rows: int, args: TrainingArguments, processes: int) -> tuple[int, int]:
    """Steps of a whole run, and of each epoch."""
    per_epoch = steps_per_epoch(rows, args.train_batch_size * processes, args.gradient_accumulation_steps)
    whole = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    return whole, per_epoch
