"""What TRL's trainers need to be interrupted at any moment, and to say what a run took."""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from components.common.training.clock import Clock


class InterruptibleTrainer(Trainer):
    """Goes in front of a trainer of TRL's in the order of classes.

    Attributes:
        clock: counts in `tokens/trained` the real tokens that this process ran through the policy. Whoever has a clock for the
            whole run puts it here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = Clock()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.clock.add("tokens/trained", real_tokens(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` asks whether a run is over after a step only. From a checkpoint of the last step, as a run leaves it that is
        # killed while it evaluates or writes, it would take one more, unless that step happens to end an epoch.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


def real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a batch without padding: of every sequence in it, such as a prompt with each of its two responses."""
    masks = [mask for name, mask in inputs.items() if name.endswith("attention_mask")]
    if not masks:  # packed rows have no padding, and no mask
        return int(inputs["input_ids"].numel())
    return sum(int(mask.sum()) for mask in masks)
