"""Entry point of the image `train`, which holds every training stage: `docker run train STAGE --config ...`."""

import runpy
import sys

STAGES = ("sapo", "dpo", "orpo", "spin", "sft")
USAGE = f"""usage: train STAGE [--config RECIPE] [--SETTING VALUE ...]

STAGE is one of {", ".join(STAGES)}; everything after it goes to `python -m components.STAGE`.
`train STAGE --help` lists every setting of a stage.
"""


def main(argv: list[str]) -> int:
    """Runs the stage that the first argument names; exit code 2 when it names none."""
    if argv and argv[0] in STAGES:
        sys.argv = [f"components.{argv[0]}", *argv[1:]]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return 0
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    print(
        f"train: error: {f'unknown stage {argv[0]!r}' if argv else 'no stage given'}\n{USAGE}", end="", file=sys.stderr
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
