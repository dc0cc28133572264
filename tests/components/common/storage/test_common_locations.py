"""Locations: schemes, missing paths, and packages that are unpacked but never run."""

import zipfile

import pytest

from components.common.core.errors import UserError
from components.common.storage import locations


@pytest.mark.parametrize(("uri", "scheme"), [("a/b", ""), ("/a", ""), ("hf://o/n", "hf"), ("pypi://p", "pypi")])
def test_scheme(uri, scheme):
    assert locations.scheme(uri) == scheme


def test_missing_path(tmp_path):
    with pytest.raises(UserError, match=r"--model .*nope: no such file or directory"):
        locations.existing_path(str(tmp_path / "nope"), "model")


def test_scheme_that_is_not_supported_here():
    with pytest.raises(UserError, match="--model ftp://x: ftp:// is not supported here; give a path"):
        locations.existing_path("ftp://x", "model")


def test_hub_names():
    assert locations.split_hub("hf://owner/name@v1") == ("owner/name", "v1")
    assert locations.split_hub("hf://owner/name") == ("owner/name", None)
    with pytest.raises(UserError, match="must be hf://owner/name"):
        locations.split_hub("hf://name")


def toy_wheel(command):
    """What `pip download` leaves."""
    wheel = locations.Path(command[command.index("--dest") + 1]) / "toy_package-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_package/__init__.py", "raise SystemExit('executed')")
        archive.writestr("toy_package/data.json", "{}")
    return type("Result", (), {"returncode": 0, "stderr": ""})


def test_package_comes_from_a_wheel_and_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    calls: list = []
    monkeypatch.setattr(locations.subprocess, "run", lambda command, **_: calls.append(command) or toy_wheel(command))
    for _ in range(2):
        assert (locations.package_directory("pypi://toy-package") / "data.json").read_text() == "{}"
    assert len(calls) == 1  # the second time it is in the cache
    assert "--no-deps" in calls[0]


def test_a_package_that_two_processes_fetch_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path))

    def slow_pip(command, **_):
        monkeypatch.setattr(locations.subprocess, "run", lambda command, **_: toy_wheel(command))
        locations.package_directory("pypi://toy-package")  # the other process, which is faster
        return toy_wheel(command)

    monkeypatch.setattr(locations.subprocess, "run", slow_pip)
    assert (locations.package_directory("pypi://toy-package") / "data.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "pypi").iterdir()] == ["toy-package"]


def test_package_that_pip_cannot_find(tmp_path, monkeypatch):
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path))
    failure = type("Result", (), {"returncode": 1, "stderr": "Looking\nERROR: No matching distribution found"})
    monkeypatch.setattr(locations.subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(UserError, match="pypi://no-such: cannot be fetched: ERROR: No matching distribution found"):
        locations.package_directory("pypi://no-such")
    assert list((tmp_path / "pypi").iterdir()) == []  # nothing half-done is left
