"""orpo: Odds Ratio Preference Optimization on the data's own pairs (arXiv 2403.07691), with TRL's ORPOTrainer.

There is no reference model. The paper's baseline: lambda 0.05 (`beta`), learning rate 5e-6, AdamW, 3 or 4 epochs.

    python -m components.orpo --config tiny --data runs/data --model runs/sft --output runs/orpo

A run that was interrupted (SIGTERM saves first and exits with 143) goes on when the same command is given again.
"""

from collections.abc import Sequence

from components.common.stage.run import run_stage
from components.common.training.clock import Clock


def main(argv: Sequence[str]) -> None:
    clock = Clock()  # before torch is imported: that counts too
    from components.common.training.skeleton import run_training
    from components.orpo.stage import ORPOStage

    run_training(ORPOStage, __doc__ or "", argv, clock)


if __name__ == "__main__":
    run_stage(main)
