"""The command line: which commands there are, and what each takes."""

import argparse
import difflib
import re
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from components.common.core.errors import UserError
from pipelines.parameters import USES, Parameter, parameters_of
from pipelines.runs import run_names

_ABOUT = """Compile the pipelines, run one on this machine without a cluster, or submit it to one.

    python -m pipelines run tiny                          as processes; minutes on a CPU
    python -m pipelines run tiny --data my.jsonl          the same on rows of your own
    python -m pipelines run --help                        the runs there are, and every parameter
    python -m pipelines submit llama3-8b --endpoint URL --wait   on a cluster
    python -m pipelines trainjob llama3-8b --method NAME --nodes 2 ...   print one method as a TrainJob
    python -m pipelines compile                           write pipelines/compiled/*.yaml, for the Kubeflow UI
    python -m pipelines compile --check                   only tell whether they still match run files and code (for CI)

Exit codes: 0 done; 1 a stage or a run failed, the cluster cannot be reached, or --check found a difference;
2 wrong usage; 130 interrupted.
"""
_RUN = """Run everything as processes of this Python environment (or in containers), one task after the other.

Every line a stage says is shown with the task's name and kept in OUTPUT/logs/TASK.log; what it writes lands in
OUTPUT/outputs/TASK/. Ctrl-C stops the running stage (SIGTERM, then SIGKILL after 20 seconds or a second Ctrl-C).

    python -m pipelines run tiny
    python -m pipelines run pipelines/runs/tiny.yaml --only sapo-dpo,dpo --output runs/try
    python -m pipelines run tiny --set sft_settings.max_steps=5 --set train_dpo_recipe=mine.yaml
    python -m pipelines run smollm2 --data my.jsonl
"""
_SUBMIT = """Run on a cluster: checks the arguments, starts the run, prints its URL.

With --wait it shows the tasks until the run has ended, and the exit code is 0 only if it SUCCEEDED. Interrupting that
leaves the run going; submitting again with the same --key finds it. Credentials come from the environment: KF_TOKEN (a
bearer token) or KF_COOKIE (such as authservice_session=...).

    python -m pipelines submit tiny --endpoint http://localhost:8080 --wait
    python -m pipelines submit tiny --endpoint http://localhost:8080 --dry_run
"""
_TRAINJOB = """Print one method of a run as a TrainJob of Kubeflow Trainer: the same stage, on several nodes.

    python -m pipelines trainjob llama3-8b --method sapo-dpo --nodes 2 \\
      --data s3://sapo/data --model s3://sapo/sft --output s3://sapo/sapo-dpo | kubectl create -f -
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command and its options.

    Raises:
        UserError: wrong usage, in one line.
    """
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        _refuse_unknown(unknown[0], arguments.usage)
    return arguments


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as the stages do, and not below the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` tells more")


def _refuse_unknown(given: str, usage: str) -> NoReturn:
    """Raises UserError for an argument that the command has not, with the flag of its usage that is nearest."""
    close = difflib.get_close_matches(given.partition("=")[0], re.findall(r"--\w+", usage), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"unknown argument {given!r}{hint}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m pipelines", description=_ABOUT, formatter_class=_Text, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{compile,run,submit,trainjob}")

    def add(name: str, about: str, description: str = "", epilog: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=about,
            description=description or about,
            epilog=epilog,
            formatter_class=_Text,
            allow_abbrev=False,
        )

    _add_compile(add("compile", "Compile every run file that says `package: true` to pipelines/compiled/NAME.yaml."))
    _add_run(add("run", "Run everything on this machine.", _RUN, epilog=_runs_and_parameters().replace("%", "%%")))
    _add_submit(add("submit", "Run everything on a cluster.", _SUBMIT))
    _add_trainjob(add("trainjob", "Print one method of a run as a TrainJob, for several nodes.", _TRAINJOB))
    for command in commands.choices.values():
        command.set_defaults(usage=command.format_usage())
    return parser


_Text = argparse.RawDescriptionHelpFormatter


def _add_compile(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a package differs from its run file and the code"
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    _add_what_to_run(command)
    _add_data(command, "path, or hf://owner/name")
    command.add_argument(
        "--containers",
        action="store_true",
        help="in containers of the stages' images, on Docker or Podman (DOCKER_HOST), instead of as processes",
    )
    command.add_argument("--output", metavar="DIR", help="default: runs/NAME-TIME; refused if it holds files")
    command.add_argument("--overwrite", action="store_true", help="empty the output directory first")


def _add_what_to_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "run", metavar="RUN", help="a run of pipelines/runs by its name, or the path of a run file or of a package"
    )
    command.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="one parameter, over the run file; KEY.SETTING=VALUE sets one key of a mapping; may be repeated",
    )
    command.add_argument(
        "--only",
        metavar="NAMES",
        help="only these methods of the run file, by name or group, with commas between",
    )


def _add_data(command: argparse.ArgumentParser, places: str) -> None:
    command.add_argument(
        "--data",
        metavar="PLACE",
        help=f"your own rows in place of the run's ({places}): instruction / input / output, ShareGPT, messages, or prompt "
        "and chosen; a tenth is held out. Sets data_recipe and data_settings, those for SFT too",
    )


def _add_submit(command: argparse.ArgumentParser) -> None:
    _add_what_to_run(command)
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
    _add_what_to_run(command)
    add = command.add_argument
    add("--method", metavar="NAME", required=True, help="the method to train")
    add("--nodes", metavar="N", type=int, required=True, help="pods, each with all the GPUs of a training stage")
    for name, what in (("data", "output of the data stage"), ("model", "model to start from"), ("output", "result")):
        add(f"--{name}", metavar="URI", required=True, help=f"s3:// location of the {what}")


def _runs_and_parameters() -> str:
    """What `run --help` says below the flags."""
    lines = [f"runs: {', '.join(run_names())}", "", "parameters, which a run file and --set set:"]
    parameters = parameters_of(USES, evaluates=True, reports=True)
    parameters |= {
        "train_NAME_recipe": Parameter(
            "STRING", "Recipe of the method NAME, with _ for other signs than letters and digits."
        ),
        "train_NAME_settings": Parameter("STRUCT", "Settings of that method, laid over its recipe."),
    }
    for name, parameter in parameters.items():
        default = "" if parameter.default is None else f"; default: {parameter.default!r}"
        lines.append(f"  {name} ({parameter.type_name}{default})")
        lines.append(textwrap.fill(parameter.description, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    lines += [
        "",
        "A run file also has methods, stages, extends, package, title and description: pipelines/README.md.",
    ]
    return "\n".join(lines)
