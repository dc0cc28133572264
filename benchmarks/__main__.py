"""Prints a table of ours against a peer, timed in turns in the same run, and writes `benchmarks/results.json`.

make bench                                               # everything
python -m benchmarks --quick                             # smaller sizes, fewer repeats
python -m benchmarks --case ema                          # one case
python -m benchmarks --case whole_iteration --rounds 3   # the median of three
"""

import argparse
import time
from pathlib import Path
from typing import Protocol

from benchmarks.harness import Result, quiet, table, write
from benchmarks.iteration import whole_iteration
from benchmarks.learner import growth, learner_step
from benchmarks.sampler import sampler
from benchmarks.storage import storage
from benchmarks.upkeep import ema, replay_buffer


class Case(Protocol):
    """A comparison. `rounds` counts where a round takes minutes; the others take as many as they need."""

    __name__: str

    def __call__(self, quick: bool, rounds: int) -> list[Result]: ...


IN_ORDER: tuple[Case, ...] = (learner_step, whole_iteration, ema, replay_buffer, sampler, growth, storage)
CASES = {case.__name__: case for case in IN_ORDER}
SLOW = (sampler, growth)  # left out of a quick run: an engine takes a minute to start; one size tells of no growth
RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes, fewer repeats and cases; results.json is left alone"
    )
    parser.add_argument("--case", choices=CASES, help="only this one; the others' rows of results.json stay")
    rounds = (
        "timed rounds of a learner step and of an iteration, after one that warms up; the median counts (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help=rounds)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")

    cases = [CASES[arguments.case]] if arguments.case else list(CASES.values())
    if arguments.quick and not arguments.case:
        cases = [case for case in cases if case not in SLOW]
    for case in cases:
        start = time.perf_counter()
        results = case(arguments.quick, arguments.rounds)
        print(f"\n{table(results)}\n[{case.__name__}: {time.perf_counter() - start:.0f} s]", flush=True)
        if not arguments.quick:
            write(results, RESULTS)
    if not arguments.quick:
        print(f"\nwrote {RESULTS}")


if __name__ == "__main__":  # the sides of a comparison import this file in their processes
    main()
