"""Compile the pipelines, run one on this machine without a cluster, or submit it to one.

    python -m pipelines compile                                   write pipelines/compiled/*.yaml, for the UI's upload
    python -m pipelines compile --check                           only tell whether they still match the code (for CI)
    python -m pipelines run comparison --run pipelines/runs/tiny.yaml   run it as processes; minutes on a CPU
    python -m pipelines run sapo --data my.jsonl                  the same on rows of your own
    python -m pipelines run --help                                the parameters of every pipeline
    python -m pipelines submit comparison --run FILE --endpoint URL --wait   run it on a cluster
    python -m pipelines trainjob comparison --run FILE --method NAME --nodes 2 ...   print one method as a TrainJob

Exit codes: 0 done; 1 a stage or a run failed, the cluster cannot be reached, or --check found a difference;
2 wrong usage; 130 interrupted.
"""

import argparse
import difflib
import json
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import yaml

from components.common.core.errors import UserError
from components.common.stage.outputs import prepare_output
from pipelines.methods import METHOD_LISTS, check_methods, select
from pipelines.package import (
    COMPILED,
    Package,
    check_keys,
    check_recipes,
    own_data,
    package_names,
    read_package,
    run_arguments,
)

_RUN = """Run a compiled pipeline as processes of this Python environment (or in containers), one task after the other.

Every line a stage says is shown with the task's name and kept in OUTPUT/logs/TASK.log; what it writes lands in
OUTPUT/outputs/TASK/. Ctrl-C stops the running stage (SIGTERM, then SIGKILL after 20 seconds or a second Ctrl-C).

    python -m pipelines run comparison --run pipelines/runs/tiny.yaml
    python -m pipelines run comparison --run pipelines/runs/tiny.yaml --only sapo-dpo,dpo --output runs/try
    python -m pipelines run sapo --run pipelines/runs/sapo-tiny.yaml --set sft_settings.max_steps=5
    python -m pipelines run sapo --data my.jsonl
"""

_SUBMIT = """Run a compiled pipeline on a cluster: checks the arguments, starts the run, prints its URL.

With --wait it shows the tasks until the run has ended, and the exit code is 0 only if it SUCCEEDED. Interrupting that
leaves the run going; submitting again with the same --key finds it. Credentials come from the environment: KF_TOKEN (a
bearer token) or KF_COOKIE (such as authservice_session=...).

    python -m pipelines submit comparison --run pipelines/runs/tiny.yaml --endpoint http://localhost:8080 --wait
    python -m pipelines submit comparison --run pipelines/runs/tiny.yaml --endpoint http://localhost:8080 --dry_run
"""
_TRAINJOB = """Print one method of a run as a TrainJob of Kubeflow Trainer: the same stage, on several nodes.

    python -m pipelines trainjob comparison --run pipelines/runs/llama3-8b.yaml --method sapo-dpo --nodes 2 \\
      --data s3://sapo/data --model s3://sapo/sft --output s3://sapo/sapo-dpo | kubectl create -f -
"""


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns the exit code."""
    try:
        parser = _parser(with_parameters=not {"-h", "--help"}.isdisjoint(argv))
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            _refuse_unknown(unknown[0], arguments.usage)
        if arguments.command == "compile":
            return _compile(arguments.check)
        return {"run": _run, "submit": _submit, "trainjob": _trainjob}[arguments.command](arguments)
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


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as the stages do, and not below the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` tells more")


def _refuse_unknown(given: str, usage: str) -> NoReturn:
    """Raises UserError for an argument that the command has not, with the flag of its usage that is nearest."""
    close = difflib.get_close_matches(given.partition("=")[0], re.findall(r"--\w+", usage), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"unknown argument {given!r}{hint}")


def _parser(with_parameters: bool) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser("python -m pipelines", description=__doc__, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{compile,run,submit,trainjob}")

    about = "Compile every pipeline to pipelines/compiled/NAME.yaml."
    command = commands.add_parser("compile", help=about, description=about, allow_abbrev=False)
    command.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a package differs from the code"
    )

    command = commands.add_parser(
        "run",
        help="Run a compiled pipeline on this machine.",
        description=_RUN,
        epilog=_parameters_help().replace("%", "%%") if with_parameters else None,
        formatter_class=form,
        allow_abbrev=False,
    )
    _add_arguments_of_run(command)
    _add_data(command, "path, or hf://owner/name")
    command.add_argument(
        "--containers",
        action="store_true",
        help="in containers of the stages' images, on Docker or Podman (DOCKER_HOST), instead of as processes",
    )
    command.add_argument("--output", metavar="DIR", help="default: runs/NAME-TIME; refused if it holds files")
    command.add_argument("--overwrite", action="store_true", help="empty the output directory first")

    about = "Run a compiled pipeline on a cluster."
    _add_submit(
        commands.add_parser("submit", help=about, description=_SUBMIT, formatter_class=form, allow_abbrev=False)
    )
    about = "Print one method of a run as a TrainJob, for several nodes."
    command = commands.add_parser(
        "trainjob", help=about, description=_TRAINJOB, formatter_class=form, allow_abbrev=False
    )
    _add_trainjob(command)
    for command in commands.choices.values():
        command.set_defaults(usage=command.format_usage())
    return parser


def _add_arguments_of_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("pipeline", metavar="NAME", help="a compiled pipeline, or the path of a package")
    command.add_argument("--run", metavar="FILE", help="YAML file of pipeline parameters; those left out have defaults")
    command.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="one parameter, over the file; KEY.SETTING=VALUE sets one key of a mapping; may be repeated",
    )
    command.add_argument(
        "--only",
        metavar="NAMES",
        help="comparison, ablation: only these methods of the list, by name or group, with commas between",
    )


def _add_data(command: argparse.ArgumentParser, places: str) -> None:
    command.add_argument(
        "--data",
        metavar="PLACE",
        help=f"your own rows in place of the run's ({places}): instruction / input / output, ShareGPT, messages, or prompt "
        "and chosen; a tenth is held out. Sets data_recipe and data_settings, those for SFT too",
    )


def _add_submit(command: argparse.ArgumentParser) -> None:
    _add_arguments_of_run(command)
    _add_data(command, "hf://owner/name or s3://bucket/key")
    add = command.add_argument
    add(
        "--endpoint", metavar="URL", required=True, help="of Kubeflow Pipelines; in full Kubeflow https://HOST/pipeline"
    )
    add("--namespace", metavar="NAME", default="", help="of a profile; leave it out where Kubeflow has one user")
    add("--experiment", metavar="NAME", default="sapo", help="made if missing; default: sapo")
    add(
        "--service_account",
        metavar="NAME",
        default="sapo-runner",
        help="of the pods; default: sapo-runner; '' for none",
    )
    add("--key", metavar="KEY", help="names the run: submitting the same again finds it instead of starting another")
    add("--wait", action="store_true", help="until the run has ended; exit code 0 only if it SUCCEEDED")
    add("--timeout", metavar="SECONDS", type=float, default=0, help="of --wait; the run itself goes on; default: none")
    add("--poll", metavar="SECONDS", type=float, default=15, help="between two looks at the run; default: 15")
    add("--dry_run", action="store_true", help="print what would be sent, as JSON, and send nothing")


def _add_trainjob(command: argparse.ArgumentParser) -> None:
    _add_arguments_of_run(command)
    add = command.add_argument
    add("--method", metavar="NAME", required=True, help="the entry of the list of methods to train")
    add("--nodes", metavar="N", type=int, required=True, help="pods, each with all the GPUs of a training stage")
    for name, what in (("data", "output of the data stage"), ("model", "model to start from"), ("output", "result")):
        add(f"--{name}", metavar="URI", required=True, help=f"s3:// location of the {what}")


def _parameters_help() -> str:
    lines = []
    for name in package_names():
        lines.append(f"parameters of {name}:")
        for key, parameter in read_package(name).parameters.items():
            default = "required" if parameter.required else f"default: {parameter.default!r}"
            lines.append(f"  {key} ({parameter.type_name}; {default})")
            lines.append(textwrap.fill(parameter.description, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _compile(check: bool) -> int:
    from pipelines.compilation import compile_pipelines, drift  # kfp takes a second to import; --help needs none

    if not check:
        print(*compile_pipelines(), sep="\n")
    elif difference := drift():
        print(difference)
        print(
            "pipelines: error: compiled packages differ from the code; run `python -m pipelines compile`",
            file=sys.stderr,
        )
        return 1
    else:
        print(f"{COMPILED}: up to date")
    return 0


def _package_and_parameters(arguments: argparse.Namespace) -> tuple[Package, dict[str, Any]]:
    package = read_package(arguments.pipeline)
    assignments = arguments.set
    if arguments.command != "trainjob" and arguments.data is not None:
        assignments = [*own_data(package, arguments.data, arguments.command), *assignments]
    parameters = _with_methods(package, run_arguments(package, arguments.run, assignments), arguments.only)
    check_keys(arguments.set)
    return package, parameters


def _run(arguments: argparse.Namespace) -> int:
    package, parameters = _package_and_parameters(arguments)
    check_recipes(package, parameters)

    from pipelines.local import Executor, LocalRun, RunError, planned_tasks

    executor: Executor | None = None
    if arguments.containers:
        from pipelines.containers import Containers

        executor = Containers()
    output = arguments.output or f"runs/{package.name}-{datetime.now():%Y%m%d-%H%M%S}"
    directory = prepare_output(output, arguments.overwrite)
    run = LocalRun(package, directory, executor=executor)
    tasks = len(planned_tasks(package, parameters))
    print(f"pipeline {package.name}: {tasks} tasks, everything lands in {directory}", flush=True)
    try:
        run.execute(parameters)
    except (RunError, KeyboardInterrupt) as error:
        print(run.table(), flush=True)
        if isinstance(error, KeyboardInterrupt):
            raise
        print(f"pipelines: error: {error}", file=sys.stderr)
        return 1
    print(run.times())
    for place in sorted((directory / "outputs").glob("*/*/report.html")):
        print(f"report: {place}")
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    package, parameters = _package_and_parameters(arguments)

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
    package, parameters = _package_and_parameters(arguments)

    from pipelines.trainjob import train_job

    places = {name: getattr(arguments, name) for name in ("method", "nodes", "data", "model", "output")}
    print(yaml.safe_dump(train_job(package, parameters, **places), sort_keys=False), end="")
    return 0


def _with_methods(package: Package, parameters: dict[str, Any], only: str | None) -> dict[str, Any]:
    """The arguments with their list of methods checked, and cut down to those of `--only`."""
    for name in METHOD_LISTS & package.parameters.keys():
        methods = parameters.get(name, package.parameters[name].default)
        check_methods(methods, name)
        return parameters | ({name: select(methods, only.split(","), name)} if only is not None else {})
    if only is not None:
        raise UserError(f"--only {only}: pipeline {package.name} has no list of methods")
    return parameters


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
