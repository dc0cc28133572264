"""preflight: what a run needs and lacks, in a minute and before any GPU is used.

Reads the recipes and settings of a run and checks that recipes exist, that the hub opens each model and data set, that
buckets can be read and written, that the judge takes the key; in a pod of Kubeflow Pipelines also the volume for caches,
Kueue's queue and the quota of GPUs. Prints a table; exit code 1 when something is missing, with all of it in one go.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from components.common.core.errors import UserError
from components.common.stage.kfp import publish
from components.common.stage.parser import ConfigParser
from components.common.stage.run import run_stage
from components.preflight.checks import Check, check_inputs
from components.preflight.config import PreflightConfig
from components.preflight.namespace import check_namespace, of_pod

logger = logging.getLogger(__name__)

HIDDEN = ("output", "overwrite")


def main(argv: Sequence[str]) -> None:
    """Runs every check; raises SystemExit(1) when one failed."""
    parser = ConfigParser("preflight", [PreflightConfig], hidden=HIDDEN)
    if "--help" in argv or "-h" in argv:
        print(parser.help(__doc__ or ""))
        return
    (config,) = parser.parse(argv)
    namespace = of_pod()
    if config.dry_run:
        print(_plan(config))
        return
    checks = [*check_inputs(config), *check_namespace(config, namespace)]
    for check in checks:
        if check.state != "failed":  # those end the log, as errors
            logger.info("%-7s %s: %s", check.state, check.what, check.found)
    _write_report(config.report_file, checks)
    publish(config.executor_input)
    if failed := [check for check in checks if check.state == "failed"]:
        for check in failed:
            print(f"preflight: error: {check.what}: {check.found}", file=sys.stderr)
        sys.exit(1)


def _plan(config: PreflightConfig) -> str:
    stages = ("data", "sft_data", "model", "evaluation")
    lines = [f"{stage}: recipe {getattr(config, f'{stage}_recipe') or 'none'}" for stage in stages]
    return "\n".join(
        [*lines, f"GPUs: {config.gpus} to train, {config.evaluation_gpus} to evaluate ({config.gpu_type})"]
    )


def _write_report(file: str | None, checks: list[Check]) -> None:
    if file is None:
        return
    cells = ([text.replace("|", "\\|") for text in check] for check in checks)
    rows = "".join(f"| {what} | {state} | {found} |\n" for what, state, found in cells)
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(f"| Checked | State | Found |\n|---|---|---|\n{rows}", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--report_file {file}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    run_stage(main)
