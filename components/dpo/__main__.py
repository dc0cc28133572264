"""dpo: Direct Preference Optimization on the data's own pairs (arXiv 2305.18290), with TRL's DPOTrainer.

The reference is the start model, frozen. The paper's baseline: beta 0.1, learning rate 5e-7, RMSprop, 3 epochs.

    python -m components.dpo --config tiny --data runs/data --model runs/sft --output runs/dpo

A run that was interrupted (SIGTERM saves first and exits with 143) goes on when the same command is given again.
"""

from collections.abc import Sequence

from components.common.stage.run import run_stage
from components.common.training.clock import Clock


def main(argv: Sequence[str]) -> None:
    clock = Clock()  # before torch is imported: that counts too
    from components.common.training.skeleton import run_training
    from components.dpo.stage import DPOStage

    run_training(DPOStage, __doc__ or "", argv, clock)


if __name__ == "__main__":
    run_stage(main)
