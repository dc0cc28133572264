"""evaluation: scores a model on the benchmarks of the paper, and on the held-out split of the data stage.

python -m components.evaluation --data runs/data --model runs/sft --output runs/evaluation-sft
"""

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from components.common.core.errors import UserError
from components.common.stage.kfp import publish
from components.common.stage.outputs import check_output, prepare_output
from components.common.stage.parser import ConfigParser
from components.common.stage.run import run_stage
from components.evaluation import results
from components.evaluation.benchmark import Outcome
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context, load_benchmark, pick_device
from components.evaluation.provenance import digests
from components.evaluation.registry import BENCHMARKS, help_lines

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    parser = ConfigParser("evaluation", [EvaluationConfig])
    if {"-h", "--help"} & set(argv):
        print(parser.help(f"{__doc__}\n{help_lines()}"))
        return
    (config,) = parser.parse(argv)
    config.resume = config.resume or results.is_unfinished(config)
    started = time.monotonic()
    _check_output(config)
    if not any(
        BENCHMARKS[name].needs_hub for name in config.benchmarks
    ):  # the libraries read these when they are imported
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

    device, dtype = pick_device(config)
    if config.resume:
        results.check_resumable(config, dtype)
    plans = {name: load_benchmark(name).check(name, config) for name in config.benchmarks}
    for name, plan in plans.items():
        logger.info("%s: %s; %s on %s", name, plan, dtype, device)
    if config.dry_run:
        print("\n".join(f"plan: {name}: {plan}" for name, plan in plans.items()) + f"\nwrites {config.output}")
        return

    output = Path(config.output) if config.resume else prepare_output(config.output, config.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    results.start(output, config, dtype)
    name = config.name or Path(config.model).resolve().name
    outcomes = run_benchmarks(config, Context(name, output, device, dtype))
    settings = config.recorded() | {"device": device, "dtype": dtype}
    content = results.assemble(name, outcomes, settings, digests(config), time.monotonic() - started)
    results.write_json(output / results.RESULTS, content)  # last: its presence says that the evaluation is whole
    print(results.table(content))
    publish(config.executor_input, {"metrics": results.flat_metrics(content), "results": {"name": name}})


def run_benchmarks(config: EvaluationConfig, context: Context) -> dict[str, tuple[Outcome, float]]:
    """Each benchmark's outcome and wall-clock in seconds; those that an earlier run finished are read."""
    outcomes = {}
    try:
        for name in config.benchmarks:
            folder = context.folder / name
            folder.mkdir(exist_ok=True)
            found = results.finished_outcome(folder)
            if found is None:
                began = time.monotonic()
                outcome = load_benchmark(name).run(name, config, dataclasses.replace(context, folder=folder))
                found = outcome, time.monotonic() - began
                results.save_outcome(folder, *found)
                logger.info("%s: done in %.1f s", name, found[1])
            outcomes[name] = found
    finally:
        context.free()
    return outcomes


def _check_output(config: EvaluationConfig) -> None:
    if not config.resume:
        check_output(config.output, config.overwrite)
    elif Path(config.output).exists() and not Path(config.output).is_dir():
        raise UserError(f"--output {config.output}: is a file; give a directory")


if __name__ == "__main__":
    run_stage(main)
