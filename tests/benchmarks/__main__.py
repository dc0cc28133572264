"""Prints a table of ours against a peer, timed in turns in the same run, and writes `tests/benchmarks/results.json`.

make bench
python -m tests.benchmarks --quick       # smaller sizes, fewer repeats
"""

import argparse
from pathlib import Path

from tests.benchmarks.cases import CASES
from tests.benchmarks.harness import table, write

RESULTS = Path(__file__).parent / "results.json"

parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats; results.json is left alone")
quick = parser.parse_args().quick

results = [result for case in CASES for result in case(quick)]
print(table(results))
if not quick:
    write(results, RESULTS)
    print(f"\nwrote {RESULTS}")
