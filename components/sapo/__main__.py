"""sapo: Self-Augmented Preference Optimization (arXiv 2405.20830).

An EMA copy of the policy rewrites a random segment of each chosen response; the pairs enter a replay buffer; the policy
trains on draws from it with the DPO or ORPO loss, or another one. "paper" values are those of its LLaMA-3-8B and
Mistral-7B runs.

    python -m components.sapo --config tiny-dpo --data runs/data --model runs/sft --output runs/sapo-dpo

A run that was interrupted (SIGTERM saves first and exits with 143) goes on when the same command is given again.
"""

from collections.abc import Sequence

from components.common.stage.run import run_stage
from components.common.training.clock import Clock


def main(argv: Sequence[str]) -> None:
    clock = Clock()  # before torch is imported: that counts too
    from components.common.training.skeleton import run_training
    from components.sapo.stage import SAPOStage

    run_training(SAPOStage, __doc__ or "", argv, clock)


if __name__ == "__main__":
    run_stage(main)
