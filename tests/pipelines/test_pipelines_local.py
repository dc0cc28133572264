"""kfp.local runs a compiled package as processes: hand-over, logs, failure, interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kfp
import pytest
import yaml

from pipelines.local.processes import Processes
from pipelines.local.runner import LocalRun
from pipelines.package import read_package

REPOSITORY = Path(__file__).parents[2]
Cli = Callable[..., tuple[int, str, str]]


def test_tasks_run_in_order_and_hand_outputs_over(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    run_directory = tmp_path / "run"
    code, out, _ = run_cli("run", fake_package, "--set", "steps=1", "--output", run_directory)
    assert code == 0
    assert re.findall(r"^\[\d/3\] .*? \(", out, re.M) == [
        "[1/3] first: The first (",
        "[2/3] second: The second (",
        "[3/3] second-2: The third (",
    ]
    flags = json.loads((run_directory / "outputs" / "second-2" / "made" / "flags.json").read_text())
    assert flags["--given"] == str(run_directory / "outputs" / "second" / "made")
    assert "3 tasks in" in out.splitlines()[-1]
    assert yaml.safe_load((run_directory / "arguments.yaml").read_text()) == {"steps": 1}


def test_tasks_that_may_run_at_any_time_run_by_name(fan_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    code, out, err = run_cli("run", fan_package, "--set", "two.say=me", "--output", tmp_path / "run")
    assert (code, err) == (0, "")
    assert re.findall(r"^\[\d/3\] .*? \(", out, re.M) == [
        "[1/3] first: The first (",
        "[2/3] second-a: The second a (",
        "[3/3] second-b: The second b (",
    ]
    assert "[second-a] me\n" in out
    made = tmp_path / "run" / "outputs" / "second-a" / "made" / "flags.json"
    assert json.loads(made.read_text())["--given"] == str(tmp_path / "run" / "outputs" / "first" / "made")


def test_nothing_starts_after_a_failure(fan_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    code, out, err = run_cli("run", fan_package, "--set", "two.exit_code=3", "--output", tmp_path / "run")
    log = tmp_path / "run" / "logs" / "second-a.log"
    assert code == 1
    assert err == f"pipelines: error: task second-a (The second a) failed with exit code 3; its log: {log}\n"
    assert [line.split()[0] for line in out.splitlines() if line.endswith("not run")] == ["second-b"]


def test_lines_are_shown_with_the_task_and_kept_in_a_log(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    sayings = ["--set", "two.say=I am two", "--set", "three.say=I am three"]
    _, out, _ = run_cli("run", fake_package, "--set", "steps=1", *sayings, "--output", tmp_path / "run")
    assert "[second] I am two\n" in out
    assert "[second-2] I am three\n" in out
    logs = tmp_path / "run" / "logs"
    assert (logs / "second.log").read_text() == "I am two\n"
    assert (logs / "second-2.log").read_text() == "I am three\n"
    assert "Running pipeline" in (logs / "kfp.log").read_text()
    assert "Running pipeline" not in out


@pytest.mark.parametrize("text", ['it\'s "quoted", {braces} $HOME', "ünïcode\nlines", "python3 -m x"])
def test_settings_reach_the_stage_unchanged(fake_package: Path, tmp_path: Path, run_cli: Cli, text: str) -> None:
    settings = {"say": text, "rate": 1e-5, "steps": 3, "on": True, "none": None, "list": [1, "a"]}
    given = ["--set", "steps=1", "--set", f"one={json.dumps(settings)}"]
    code, _, err = run_cli("run", fake_package, *given, "--output", tmp_path / "run")
    assert (code, err) == (0, "")
    flags = json.loads((tmp_path / "run" / "outputs" / "first" / "made" / "flags.json").read_text())
    assert json.loads(flags["--settings"]) == settings
    assert re.search(r'"steps": 3[,}]', flags["--settings"])  # not 3.0


def test_output_below_a_folder_named_python3(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    """kfp.local itself replaces the word in every argument, so outputs would land elsewhere."""
    run_directory = tmp_path / "python3-projects"
    code, _, _ = run_cli("run", fake_package, "--set", "steps=1", "--output", run_directory)
    assert code == 0
    assert (run_directory / "outputs" / "first" / "made" / "flags.json").is_file()


def test_what_a_failed_stage_said_is_told_last(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    settings = ["--set", "steps=1", "--set", "one={exit_code: 2, say: 'fake: error: rate = 2: must be below 1'}"]
    code, _, err = run_cli("run", fake_package, *settings, "--output", tmp_path / "run")
    assert code == 1
    assert err.splitlines()[1:] == ["fake: error: rate = 2: must be below 1"]


def test_failed_stage_is_named_with_exit_code_and_log(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    failing = ["--set", "steps=1", "--set", "two.exit_code=3"]
    code, out, err = run_cli("run", fake_package, *failing, "--output", tmp_path / "run")
    log = tmp_path / "run" / "logs" / "second.log"
    assert code == 1
    assert err == f"pipelines: error: task second (The second) failed with exit code 3; its log: {log}\n"
    assert log.read_text() == "hello\nabout to fail\n"
    states = [line.split()[:5] for line in out.splitlines()[-3:]]
    assert [row[0] for row in states] == ["first", "second", "second-2"]
    assert ["done" in states[0], "failed" in states[1], "not" in states[2]] == [True, True, True]


def test_stage_without_executor_output_ends_the_run(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    arguments = ["--set", "steps=1", "--set", "one.no_outputs=true"]
    code, _, err = run_cli("run", fake_package, *arguments, "--output", tmp_path / "run")
    assert code == 1
    assert err.startswith("pipelines: error: kfp.local could not go on: ")
    assert "kfp.log" in err
    assert err.count("\n") == 1


def test_command_that_is_not_there(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    package = tmp_path / "broken.yaml"
    package.write_text(fake_package.read_text().replace("- python3\n", "- no-such-command\n"))
    code, _, err = run_cli("run", package, "--set", "steps=1", "--output", tmp_path / "run")
    assert code == 1
    assert "task first (The first) failed with exit code 127" in err
    assert "cannot start no-such-command" in (tmp_path / "run" / "logs" / "first.log").read_text()


def _start(package: Path, directory: Path, *settings: str, steps: bool = True) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipelines", "run", str(package), "--output", str(directory)]
    command += ["--set", "steps=1"] if steps else []
    command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _lines_until(process: "subprocess.Popen[str]", pattern: str) -> re.Match[str]:
    assert process.stdout
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"no line with {pattern}")


def _ends(pid: int) -> bool:
    """Whether a process is gone within two seconds; one that init has not reaped yet counts as gone."""
    for _ in range(40):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[str]"]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_stops_the_stage_and_its_children(
    fake_package: Path, tmp_path: Path, started: list["subprocess.Popen[str]"], number: signal.Signals
) -> None:
    process = _start(fake_package, tmp_path / "run", "two.sleep=true")
    started.append(process)
    child = int(_lines_until(process, r"sleeping, child (\d+)")[1])
    process.send_signal(number)
    out, err = process.communicate(timeout=15)
    assert process.returncode == 130
    assert err == "pipelines: interrupted\n"
    assert "interrupted" in out
    assert "not run" in out
    assert _ends(child)
    assert not (tmp_path / "run" / "outputs" / "second-2").exists()


def test_an_interruption_ends_the_run_and_not_only_the_task(
    fan_package: Path, tmp_path: Path, started: list["subprocess.Popen[str]"]
) -> None:
    process = _start(fan_package, tmp_path / "run", "two.sleep=true", steps=False)
    started.append(process)
    child = int(_lines_until(process, r"sleeping, child (\d+)")[1])
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=15)
    assert (process.returncode, err) == (130, "pipelines: interrupted\n")
    assert [line.split()[0] for line in out.splitlines() if line.endswith("not run")] == ["second-b"]
    assert _ends(child)


@pytest.mark.slow
def test_second_interruption_kills_a_stage_that_does_not_stop(
    fake_package: Path, tmp_path: Path, started: list["subprocess.Popen[str]"]
) -> None:
    process = _start(fake_package, tmp_path / "run", "one.sleep=true", "one.ignore_sigterm=true")
    started.append(process)
    _lines_until(process, "sleeping, child")
    process.send_signal(signal.SIGINT)
    _lines_until(process, "stopping first")
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


@pytest.mark.slow
def test_grace_ends_a_stage_that_does_not_stop(fake_package: Path, tmp_path: Path) -> None:

    run = LocalRun(read_package(fake_package), tmp_path / "run", Processes(), grace_seconds=0.3)
    script = f"import os, signal, time; time.sleep(2); os.kill({os.getpid()}, signal.SIGINT)"
    killer = subprocess.Popen([sys.executable, "-c", script])
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run.execute({"steps": 1, "one": {"sleep": True, "ignore_sigterm": True}})
    killer.wait()
    assert time.monotonic() - start < 10
    assert [(task.name, task.state, task.exit_code) for task in run.tasks] == [("first", "interrupted", -9)]


def test_another_kfp_is_refused(
    fake_package: Path, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kfp, "__version__", "9.9.9")
    code, _, err = run_cli("run", fake_package, "--set", "steps=1", "--output", tmp_path / "run")
    assert code == 2
    assert (
        "pipelines are written for the internals of kfp 2.17.0, installed is 9.9.9; run: pip install kfp==2.17.0" in err
    )


def test_output_that_holds_files_is_refused(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    code, _, err = run_cli("run", fake_package, "--set", "steps=1", "--output", tmp_path / "run")
    assert code == 2
    assert "is not empty" in err
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep"
