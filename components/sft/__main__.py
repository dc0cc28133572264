"""sft: supervised fine-tuning on response tokens, with TRL's SFTTrainer.

The tokens are those of every other stage: the prompt under the chat template, then the response and one end-of-turn token.
Only response tokens carry loss.

    python -m components.sft --config tiny --data runs/data --model runs/model --output runs/sft

A run that was interrupted (SIGTERM saves first and exits with 143) goes on when the same command is given again.
"""

from collections.abc import Sequence

from components.common.stage.run import run_stage
from components.common.training.clock import Clock


def main(argv: Sequence[str]) -> None:
    clock = Clock()  # before torch is imported: that counts too
    from components.common.training.skeleton import run_training
    from components.sft.stage import SFTStage

    run_training(SFTStage, __doc__ or "", argv, clock)


if __name__ == "__main__":
    run_stage(main)
