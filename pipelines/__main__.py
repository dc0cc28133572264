"""Compile the pipelines, or run one on this machine without a cluster.

    python -m pipelines compile                                   write pipelines/compiled/*.yaml, for the UI's upload
    python -m pipelines compile --check                           only tell whether they still match the code (for CI)
    python -m pipelines run comparison --run pipelines/runs/tiny.yaml   run it as processes; minutes on a CPU
    python -m pipelines run --help                                the parameters of every pipeline

Exit codes: 0 done; 1 a stage failed, or --check found a difference; 2 wrong usage; 130 interrupted.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from components.common.cli import prepare_output
from components.common.errors import UserError
from pipelines.methods import METHOD_LISTS, check_methods, select
from pipelines.package import COMPILED, Package, package_names, read_package, run_arguments

_RUN = """Run a compiled pipeline as processes of this Python environment, one task after the other.

Every line a stage says is shown with the task's name and kept in OUTPUT/logs/TASK.log; what it writes lands in
OUTPUT/outputs/TASK/. Ctrl-C stops the running stage (SIGTERM, then SIGKILL after 20 seconds or a second Ctrl-C).

    python -m pipelines run comparison --run pipelines/runs/tiny.yaml
    python -m pipelines run comparison --run pipelines/runs/tiny.yaml --only sapo-dpo,dpo --output runs/try
    python -m pipelines run sapo --run pipelines/runs/sapo-tiny.yaml --set sft_settings.max_steps=5
"""


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns the exit code."""
    try:
        arguments = _parser(with_parameters=not {"-h", "--help"}.isdisjoint(argv)).parse_args(argv)
        if arguments.command == "compile":
            return _compile(arguments.check)
        return _run(arguments)
    except UserError as error:
        print(f"pipelines: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "kfp":
            raise
        print("pipelines: error: kfp is not installed: pip install 'sapo-pipelines[local]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pipelines: interrupted", file=sys.stderr)
        return 130


def _parser(with_parameters: bool) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m pipelines", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{compile,run}")

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
    command.add_argument("--output", metavar="DIR", help="default: runs/NAME-TIME; refused if it holds files")
    command.add_argument("--overwrite", action="store_true", help="empty the output directory first")
    return parser


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


def _run(arguments: argparse.Namespace) -> int:
    package = read_package(arguments.pipeline)
    parameters = _with_methods(package, run_arguments(package, arguments.run, arguments.set), arguments.only)

    from pipelines.local import LocalRun, RunError, planned_tasks

    output = arguments.output or f"runs/{package.name}-{datetime.now():%Y%m%d-%H%M%S}"
    directory = prepare_output(output, arguments.overwrite)
    run = LocalRun(package, directory)
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
