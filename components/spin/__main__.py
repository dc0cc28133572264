"""spin: Self-Play Fine-Tuning (arXiv 2401.01335), a baseline of SAPO's paper.

In each of four iterations the newest model writes a rejected response to every prompt; then it is trained to prefer the
chosen ones, with the DPO loss (against itself as it was) or the ORPO loss. "paper" values are those of SAPO's LLaMA-3-8B
and Mistral-7B baselines.

    python -m components.spin --config tiny-dpo --data runs/data --model runs/sft --output runs/spin-dpo

A run that was interrupted (SIGTERM saves first and exits with 143) goes on when the same command is given again.
"""

import dataclasses
import functools
import logging
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.core.conversations import read_rows
from components.common.core.errors import TERMINATED, UserError
from components.common.stage.kfp import publish
from components.common.stage.outputs import check_output
from components.common.stage.parser import ConfigParser
from components.common.stage.run import run_stage
from components.common.stage.session import is_mirrored, when_complete
from components.common.training.distributed import launch

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    started = time.perf_counter()
    from components.common.models.chat_templates import encode_rows
    from components.common.models.loading import load_config, load_tokenizer
    from components.spin.config import SPINSettings, SPINStageConfig

    parser = ConfigParser("spin", [SPINStageConfig, SPINSettings])
    if {"-h", "--help"} & set(argv):
        print(parser.help(__doc__ or ""))
        return
    launch.start(parser, argv)
    stage, settings = parser.parse(argv)
    _check_settings(settings)

    load_config(stage.model)
    tokenizer = load_tokenizer(stage.model)
    max_prompt_length = min(stage.max_prompt_length, settings.max_length)
    rows = read_rows(stage.data, "train")[: settings.train_rows]
    train, dropped = encode_rows(tokenizer, rows, max_prompt_length, settings.max_length)
    rows = stage.held_out_rows()
    held_out = encode_rows(tokenizer, rows, max_prompt_length, settings.max_length)[0] if rows else []
    files = _files(stage, settings, train, held_out)
    _show_plan(stage, settings, len(train), dropped, files)
    if not stage.dry_run:
        _run(stage, settings, tokenizer, train, held_out, files, started)


def _check_settings(settings: Any) -> None:
    """Settings that only transformers or TRL can judge, before anything is loaded."""
    from components.spin.schedule import schedule, trainer_settings

    try:
        for iteration in schedule(settings):
            trainer_settings(settings, iteration, "unused")
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error


def _files(stage: Any, settings: Any, train: Any, held_out: Any) -> Any:
    """The places of the run, after a check that they are free or of this very run; writes unless it is a dry run."""
    from components.common.training.distributed.processes import on_main_process, prepare_output_on_main_process
    from components.spin import snapshots
    from components.spin.files import RunFiles, check_identity, identity

    files = RunFiles(Path(stage.output))
    mine = identity(stage, settings, train, held_out)
    if not (stage.overwrite or stage.dry_run):
        on_main_process(snapshots.adopt, files)
    if files.run.exists() and not stage.overwrite:
        check_identity(files, mine)
        return files
    # A run that was killed before its first file leaves these; anything else is not ours to touch.
    leftovers = files.output.is_dir() and {path.name for path in files.output.iterdir()} <= {
        "spin",
        "training",
        "checkpoints",
    }
    check_output(stage.output, stage.overwrite or leftovers)
    if not stage.dry_run:
        prepare_output_on_main_process(stage.output, overwrite=True)
        on_main_process(_begin, files, mine)
    return files


def _begin(files: Any, record: dict[str, Any]) -> None:
    from components.spin.files import write_json

    files.root.mkdir()
    write_json(files.run, record)


def _show_plan(stage: Any, settings: Any, rows: int, dropped: int, files: Any) -> None:
    from components.common.training.distributed.processes import is_main_process
    from components.spin.schedule import describe

    plan = describe(rows, dropped, stage.model, settings, launch.process_count(stage.num_processes))
    if not stage.overwrite:
        complete = [str(i) for i in range(settings.iterations) if files.result(i) is not None]
        plan += [f"goes on with the run in {files.root}"] if files.run.exists() else []
        plan += [f"complete already: iterations {', '.join(complete)}"] if complete else []
    for line in plan if is_main_process() else []:
        print(line) if stage.dry_run else logger.info(line)


def _run(stage: Any, settings: Any, tokenizer: Any, train: Any, held_out: Any, files: Any, started: float) -> None:
    from components.common.training.config import stage_arguments
    from components.common.training.distributed.processes import destroy_process_group, on_main_process
    from components.spin import snapshots
    from components.spin.clock import Clock
    from components.spin.iterations import SPINRun, StoppedError

    stage_arguments(stage.log_directory())
    clock = Clock(files.clock, started)
    save = functools.partial(snapshots.save, files, stage.keep_iterations) if is_mirrored() else lambda: None
    run = SPINRun(stage.model, tokenizer, train, held_out, settings, files, stage.log_directory(), clock, save)

    def stop(*_: object) -> None:
        logger.info("SIGTERM: finishing the step or batch, then saving")
        run.stop_requested = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        run.run()
    except StoppedError as place:
        logger.info("stopped (%s) and saved; the same command goes on from there", place)
        destroy_process_group()
        sys.exit(TERMINATED)
    finally:
        signal.signal(signal.SIGTERM, before)
    on_main_process(_write, stage, settings, run)
    destroy_process_group()


def _write(stage: Any, settings: Any, run: Any) -> None:
    from components.spin.results import write_results

    name = stage.name or f"spin-{settings.loss_type}"
    summary = write_results(run, name, dataclasses.asdict(stage) | dataclasses.asdict(settings))
    if not stage.keep_iterations:
        when_complete(run.files.remove, run.files.root)
    when_complete(lambda: shutil.rmtree(run.files.snapshots, ignore_errors=True), run.files.snapshots)
    logger.info(
        "generated for %.0f s, trained for %.0f s, first step after %.0f s; wrote %s",
        *(summary["seconds/generate"], summary["seconds/train"], summary["seconds/first_step"], stage.output),
    )
    shown = ("train_loss", "train_runtime", "eval_rewards/margins", "eval_rewards/accuracies", "seconds/first_step")
    publish(stage.executor_input, {"metrics": {k: v for k, v in summary.items() if k in shown}})


if __name__ == "__main__":
    run_stage(main)
