"""`python -m pipelines`: compile, run, submit, trainjob. `options.py` has their flags."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import yaml

from components.common.core.errors import UserError
from components.common.stage.outputs import prepare_output
from pipelines.arguments import check_keys, check_recipes, own_data, run_arguments
from pipelines.options import parse
from pipelines.package import COMPILED, Package, is_package, read_package
from pipelines.runs import Run, find_run, read_run


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns the exit code."""
    try:
        arguments = parse(argv)
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"pipelines: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "kfp":
            raise
        print("pipelines: error: kfp is not installed: pip install 'sapo-pipelines[local]'", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `submit --dry_run | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("pipelines: interrupted", file=sys.stderr)
        return 130


class _Asked(NamedTuple):
    """What a command works on; `run` is None where it was given a package."""

    run: Run | None
    package: Package
    parameters: dict[str, Any]  # beside the package's defaults


def _asked(arguments: argparse.Namespace) -> _Asked:
    """Reads, compiles and checks what the command line names.

    Raises:
        UserError: there is no such run, or an argument does not fit it.
    """
    path, run = find_run(arguments.run), None
    if is_package(path):
        if arguments.only is not None:
            raise UserError(f"--only {arguments.only}: {path} is compiled; give --only with its run file")
        package = read_package(path)
    else:
        run = read_run(path)
        if arguments.only is not None:
            run = run.only(arguments.only.split(","))
        package = _compiled(run)

    assignments = list(arguments.set)
    if arguments.command != "trainjob" and arguments.data is not None:
        assignments = [*own_data(package, arguments.data, arguments.command), *assignments]
    parameters = run_arguments(package, assignments)
    check_keys(package, arguments.set)
    return _Asked(run, package, parameters)


def _compiled(run: Run) -> Package:
    from pipelines.compilation import compile_run  # kfp takes a second to import; --help needs none

    return compile_run(run)


def _compile(arguments: argparse.Namespace) -> int:
    from pipelines.compilation import compile_packages, drift

    if not arguments.check:
        print(*compile_packages(), sep="\n")
    elif difference := drift():
        print(difference)
        print(
            "pipelines: error: compiled packages differ from run files and code; run `python -m pipelines compile`",
            file=sys.stderr,
        )
        return 1
    else:
        print(f"{COMPILED}: up to date")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    run, package, parameters = _asked(arguments)
    check_recipes(package, parameters)

    from pipelines.local.runner import Executor, LocalRun, RunError

    if arguments.containers:
        from pipelines.local.containers import Containers

        executor: Executor = Containers()
    else:
        from pipelines.local.processes import Processes

        executor = Processes()

    output = arguments.output or f"runs/{package.name}-{datetime.now():%Y%m%d-%H%M%S}"
    directory = prepare_output(output, arguments.overwrite)
    if run is not None:
        content = yaml.safe_dump(run.as_file(parameters), sort_keys=False, allow_unicode=True)
        (directory / "run.yaml").write_text(content, encoding="utf-8")

    local = LocalRun(package, directory, executor)
    print(f"pipeline {package.name}: {len(package.tasks)} tasks, everything lands in {directory}", flush=True)
    try:
        local.execute(parameters)
    except (RunError, KeyboardInterrupt) as error:
        print(local.table(), flush=True)
        if isinstance(error, KeyboardInterrupt):
            raise
        print(f"pipelines: error: {error}", file=sys.stderr)
        return 1
    print(local.times())
    for place in sorted((directory / "outputs").glob("*/*/report.html")):
        print(f"report: {place}")
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    _, package, parameters = _asked(arguments)

    from pipelines.submit import Cluster, Submission, SubmitError, failure, live

    where = {
        name: getattr(arguments, name) for name in ("endpoint", "namespace", "experiment", "service_account", "key")
    }
    submission = Submission(package, parameters, **where)
    if arguments.dry_run:
        print(json.dumps(submission.request(), indent=2))
        return 0
    try:
        cluster = Cluster(submission)
        run, started = cluster.start()
        url = cluster.url(run.run_id)
        print(f"{'started' if started else 'found'} {run.display_name}: {url}", flush=True)
        if not arguments.wait:
            return 0
        run = cluster.wait(run.run_id, arguments.timeout, arguments.poll, live(package.name))
    except SubmitError as error:
        print(f"pipelines: error: {error}", file=sys.stderr)
        return 1
    if run.state == "SUCCEEDED":
        print(f"SUCCEEDED: {url}")
        return 0
    print(f"pipelines: error: {failure(run)}; see {url}", file=sys.stderr)
    return 1


def _trainjob(arguments: argparse.Namespace) -> int:
    run, _, parameters = _asked(arguments)
    if run is None:
        raise UserError(f"{arguments.run} is compiled; give the run file, which has the methods")

    from pipelines.trainjob import train_job

    places = {name: getattr(arguments, name) for name in ("method", "nodes", "data", "model", "output")}
    print(yaml.safe_dump(train_job(run, parameters, **places), sort_keys=False), end="")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "compile": _compile,
    "run": _run,
    "submit": _submit,
    "trainjob": _trainjob,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
