"""Several processes of one command: how they start, stop and fail together. The commands are small Python programs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.common.training.distributed.supervisor import environment, supervise

SUPERVISOR = """
import sys
from components.common.training.distributed.supervisor import supervise
sys.exit(supervise(sys.argv[1:], 2, 5.0))
"""
WAITING = "import os, pathlib, signal, sys, time\nrank = os.environ['RANK']\npathlib.Path(rank).touch()\n"


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def started(text: str, directory: Path) -> subprocess.Popen[str]:
    """A supervisor of two such programs, each of which has come as far as to touch a file with its rank's name."""
    root = str(Path(__file__).parents[4])
    command = [*program(SUPERVISOR), *program(WAITING + text)]
    environ = os.environ | {"PYTHONPATH": root}
    process = subprocess.Popen(command, cwd=directory, env=environ, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((directory / rank).exists() for rank in "01"):
        assert time.monotonic() < deadline, process.stderr
        time.sleep(0.02)
    return process


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_each_process_knows_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    text = f"import os; open(os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert supervise(program(text), 3, 5.0) == 0
    places = [Path(rank).read_text().split() for rank in "012"]
    assert [place[:5] for place in places] == [[r, r, "3", "3", "127.0.0.1"] for r in "012"]
    assert len({place[5] for place in places}) == 1


def test_threads_are_divided_unless_they_are_set(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert environment({}, 8)["OMP_NUM_THREADS"] == "8"
    assert environment({"OMP_NUM_THREADS": "3"}, 8)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert environment({}, 8)["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_a_failure_ends_the_others_and_its_code_comes_out_with_its_last_words(capfd):
    text = "import os, time\nprint('rank', os.environ['RANK'])\n"
    text += "if os.environ['RANK'] == '1': raise SystemExit('no such tensor')\ntime.sleep(60)"
    begin = time.monotonic()
    assert supervise(program(text), 2, 20.0) == 1
    assert time.monotonic() - begin < 15  # not the minute that the other would sleep
    out, err = capfd.readouterr()
    assert out == "rank 0\n"  # the first one's only
    assert "rank 1 | no such tensor" in err


@pytest.mark.slow
def test_what_does_not_go_is_killed(capfd):
    text = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    text += "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    begin = time.monotonic()
    assert supervise(program(text), 2, 3.0) == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 15


def test_an_error_of_all_is_said_once(capfd):
    text = "import os, sys, time\ntime.sleep(0.3 * (os.environ['RANK'] == '0'))\nsys.exit('error: wrong')"
    assert supervise([*program(text)], 2, 5.0) == 1
    assert capfd.readouterr().err.count("error: wrong") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_all_and_they_take_the_time_they_need(number, code, tmp_path):
    text = f"""
def stop(*_):
    time.sleep(1)
    pathlib.Path('saved-' + rank).touch()
    sys.exit({code})
signal.signal({int(number)}, stop)
pathlib.Path('ready-' + rank).touch()
while True: time.sleep(0.05)
"""
    process = started(text, tmp_path)
    while not all((tmp_path / f"ready-{rank}").exists() for rank in "01"):
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == code
    assert all((tmp_path / f"saved-{rank}").exists() for rank in "01")


def test_no_process_outlives_a_supervisor_that_was_killed(tmp_path):
    process = started(
        "pathlib.Path('pid-' + rank).write_text(str(os.getpid()))\nwhile True: time.sleep(0.05)", tmp_path
    )
    while not all((tmp_path / f"pid-{r}").exists() and (tmp_path / f"pid-{r}").read_text() for r in "01"):
        time.sleep(0.02)
    pids = [int((tmp_path / f"pid-{r}").read_text()) for r in "01"]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
