"""A stage for tests: takes a stage's flags, writes what each output flag names, and misbehaves when settings say so.

Settings: `say` (a line to print), `exit_code`, `sleep` (forever, with a child process), `ignore_sigterm`, `no_outputs`.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> None:
    flags = dict(zip(argv[::2], argv[1::2], strict=True))
    settings = json.loads(flags.get("--settings", "{}"))
    print(settings.get("say", "hello"))
    if settings.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if settings.get("sleep"):
        child = subprocess.Popen(["sleep", "600"])
        print(f"sleeping, child {child.pid}")
        time.sleep(600)
    if settings.get("exit_code"):
        print("about to fail", file=sys.stderr)
        sys.exit(settings["exit_code"])
    if not settings.get("no_outputs"):
        write_outputs(flags)


def write_outputs(flags: dict[str, str]) -> None:
    for flag in ("--output", "--training_log"):
        if flag in flags:
            Path(flags[flag]).mkdir(parents=True)
            (Path(flags[flag]) / "flags.json").write_text(json.dumps(flags))
    for flag in ("--report_file", "--html_file", "--markdown_file"):
        if flag in flags:
            Path(flags[flag]).parent.mkdir(parents=True, exist_ok=True)
            Path(flags[flag]).write_text("text")
    outputs = json.loads(flags["--executor_input"])["outputs"]
    Path(outputs["outputFile"]).write_text(json.dumps({"artifacts": outputs["artifacts"]}))


if __name__ == "__main__":
    main(sys.argv[1:])
