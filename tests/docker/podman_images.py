"""What the tests of the images need of Podman: a configuration, a base image and the build."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("data", "report", "model", "sft", "sapo", "train", "evaluation")
OWN_BASE, PUBLIC_BASE = "localhost/debian-python", "docker.io/library/python:3.11-slim"
# A containers.conf for Podman inside a container, where it must not raise the limits of processes.
LIMITED = '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
PIP_SETTINGS = ("cert", "extra-index-url", "find-links", "index-url", "proxy")

if not shutil.which("podman"):
    SKIP = "Podman is not installed (apt-get install podman buildah runc mmdebstrap; as root .ci/run does it)"
elif os.environ.get("SAPO_TEST_PODMAN") not in ("1", "all"):
    SKIP = "builds images of gigabytes for minutes: set SAPO_TEST_PODMAN=1, as .ci/run does"
else:
    SKIP = ""


def run(*argv: str | Path, **changed: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command in the repository, with these changes of the environment."""
    return subprocess.run(argv, cwd=ROOT, env=os.environ | changed, capture_output=True, text=True, timeout=1800)


def base_image() -> str:
    """The name of a base image: one that is there, else pulled, else made of Debian's packages; skips without any."""
    for name in (OWN_BASE, PUBLIC_BASE):
        if run("podman", "image", "exists", name).returncode == 0:
            return name
    if run("podman", "pull", "--quiet", PUBLIC_BASE).returncode == 0:
        return PUBLIC_BASE
    if not shutil.which("mmdebstrap"):
        pytest.skip(f"no base image: {PUBLIC_BASE} cannot be pulled, and mmdebstrap is not installed")
    made = run(ROOT / "docker" / "podman.sh", "base")
    if made.returncode != 0:
        pytest.skip(f"no base image, neither pulled nor made: {last_line(made.stderr)}")
    return OWN_BASE


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def build(directory: Path) -> "subprocess.CompletedProcess[str]":
    """Builds all images for the CPU, with packages from where this environment has them from.

    Args:
        directory: for pip's configuration.
    """
    settings, changed = pip_settings(), {"PIP_CONFIG": str(directory / "pip.conf")}
    if "TORCH_INDEX" not in os.environ and (version := importlib.metadata.version("torch")).endswith("+cpu"):
        # pip's own settings lead to a build for the CPU. PyPI's, with CUDA, must not take its place.
        pin = directory / "torch.txt"
        pin.write_text(f"torch=={version}\n")
        settings["constraint"] = str(pin)
        changed["TORCH_INDEX"] = ""
    (directory / "pip.conf").write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    named = sorted({word for text in settings.values() for word in text.split() if word.startswith("/")})
    mounts = [f"--volume {path}:{path}:ro" for path in named if Path(path).exists()]
    changed["PODMAN_BUILD_ARGS"] = " ".join(["--isolation chroot", *mounts])
    return run(ROOT / "docker" / "podman.sh", "build", *STAGES, **changed)


def pip_settings() -> dict[str, str]:
    """What pip is told here about where packages are; an index in a local folder stays out."""
    listed = run(sys.executable, "-m", "pip", "config", "list").stdout.splitlines()
    given = {
        key.rpartition(".")[2]: ast.literal_eval(value) for key, _, value in (line.partition("=") for line in listed)
    }
    words = {name: [w for w in text.split() if not w.startswith("file:")] for name, text in given.items()}
    return {name: " ".join(words[name]) for name in PIP_SETTINGS if words.get(name)}
