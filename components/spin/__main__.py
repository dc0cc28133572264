"""spin: Self-Play Fine-Tuning (arXiv 2401.01335), a baseline of SAPO's paper.

In each of four iterations the newest model writes a rejected response to every prompt; then it is trained to prefer the
chosen ones, with the DPO loss (against itself as it was) or the ORPO loss. "paper" values are those of SAPO's LLaMA-3-8B
and Mistral-7B baselines.

    python -m components.spin --config tiny-dpo --data runs/data --model runs/sft --output runs/spin-dpo

A run that was interrupted (SIGTERM saves first and exits with 143) goes on when the same command is given again.
"""

from collections.abc import Sequence

from components.common.stage.run import run_stage
from components.common.training.clock import Clock


def main(argv: Sequence[str]) -> None:
    clock = Clock()  # before torch is imported: that counts too
    from components.common.training.skeleton import run_training
    from components.spin.stage import SPINStage

    run_training(SPINStage, __doc__ or "", argv, clock)


if __name__ == "__main__":
    run_stage(main)
