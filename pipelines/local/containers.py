"""Runs the tasks of a local run in containers, on Docker or Podman, with kfp.local's DockerRunner.

DockerRunner's own way to run one is replaced (`kfp_patches.container_patch`): started detached, followed, waited for, removed.

A container has a read-only root file system with a tmpfs at /tmp, no capabilities, the network of the host (a store on
localhost is the same store), and sees of the host's files, each at the path it has here:

    the directory of the run        to write
    the working directory           to read, so that relative paths in the arguments mean what they mean here
    paths in the arguments          to read: a recipe, a file of rows, a model
    files that a variable names     to read: `PIP_CERT`, `AWS_SHARED_CREDENTIALS_FILE`, ...

`SAPO_CACHE` and `HF_HOME` are mounted too, to write, so that nothing is fetched twice.
"""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from docker.client import DockerClient
from docker.errors import DockerException, ImageNotFound
from docker.types import DeviceRequest, Mount
from kfp import local
from requests.exceptions import RequestException

from components.common.core.errors import UserError
from pipelines.local.kfp_patches import Patch, container_patch
from pipelines.local.runner import STAGE_ENVIRONMENT, CannotStartError, LocalRun

IMAGE_USER = 1000  # of docker/Dockerfile
# Variables with these beginnings reach the stages: credentials, endpoints, mirrors, proxies, trackers, threads.
PASSED_ON = ("AWS_", "HF_", "MLFLOW_", "OMP_", "PIP_", "S3_", "SAPO_", "SSL_CERT_", "WANDB_")
PASSED_ON_NAMES = ("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_CANNOT_RUN = 125  # what `docker run` exits with when the engine, not the command, is at fault
_GONE = (DockerException, RequestException, OSError)


class Containers:
    """Tells LocalRun to run tasks in containers.

    Raises:
        UserError: no engine answers.
    """

    def __init__(self) -> None:
        try:
            with contextlib.closing(DockerClient.from_env()) as client:
                self._info: dict[str, Any] = client.info()
        except _GONE as error:
            place = os.environ.get("DOCKER_HOST", "the default socket (DOCKER_HOST is not set)")
            raise UserError(
                f"no container engine answers at {place}: {error}; start Docker, or `podman system service --time 0 "
                "unix:///tmp/podman.sock &` with DOCKER_HOST=unix:///tmp/podman.sock"
            ) from error

    def runner(self, run: LocalRun, arguments: dict[str, Any]) -> local.DockerRunner:
        """kfp.local's runner, with what every container of the run gets."""
        caches = _caches()
        environment = passed_on(os.environ) | {name: f"/cache/{name.lower()}" for name in caches}
        user = self._user([run.directory / "outputs", *caches.values()])
        shown = _shown(run.directory, arguments, environment.values())
        mounts = [Mount(str(path), str(path), type="bind", read_only=True) for path in shown]
        mounts += [Mount(environment[name], str(path), type="bind") for name, path in caches.items()]
        has_gpus = "nvidia" in self._info.get("Runtimes", {})
        return local.DockerRunner(
            environment={**STAGE_ENVIRONMENT, **environment},
            mounts=mounts,
            user=user,
            working_dir=str(Path.cwd()) if Path.cwd() in shown else "/work",
            read_only=True,
            tmpfs={"/tmp": "rw,exec,mode=1777"},  # exec: torch and Triton load what they compile from there
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            network_mode="host",
            shm_size="2g",  # data loaders and NCCL; an engine's default is 64 MB
            healthcheck={"test": ["NONE"]},  # the run itself watches; Podman needs systemd for one
            device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])] if has_gpus else [],
        )

    def patch(self, run: LocalRun) -> Patch:
        def run_container(client: Any, image: str, command: list[str], volumes: Any, **options: Any) -> int:
            return run.run_task(lambda: _Container(run, client, image, command, volumes=volumes, **options))

        return container_patch(run_container)

    def _user(self, written: list[Path]) -> str:
        """Whose files the stages write: the caller's. For root it is the images' user, who is given the directories."""
        for directory in written:
            directory.mkdir(parents=True, exist_ok=True)
        if "name=rootless" in (self._info.get("SecurityOptions") or ()):
            return "0:0"  # in a rootless engine this is the caller, without any right beyond
        if os.getuid() != 0:
            return f"{os.getuid()}:{os.getgid()}"
        for directory in written:
            os.chown(directory, IMAGE_USER, IMAGE_USER)
        return f"{IMAGE_USER}:{IMAGE_USER}"


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that stages in containers get."""
    names = (name for name in environment if name.startswith(PASSED_ON) or name.upper() in PASSED_ON_NAMES)
    return {name: environment[name] for name in names}


def _caches() -> dict[str, Path]:
    """Where caches are on the host. Root has its own for containers: the images' user could not write to root's."""
    own = Path(os.environ.get("SAPO_CACHE", Path.home() / ".cache" / "sapo-pipelines")).resolve()
    if os.getuid() == 0:
        return {name: own / "containers" / name.lower() for name in ("SAPO_CACHE", "HF_HOME")}
    return {"SAPO_CACHE": own, "HF_HOME": Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))}


def _shown(directory: Path, arguments: dict[str, Any], values: Iterable[str]) -> list[Path]:
    """What containers may read: the working directory, and absolute paths in arguments and variables."""
    texts = [str(Path.cwd()), *_texts(arguments), *values]
    paths = [Path(text.rpartition("://")[2]) for text in texts]
    kept: list[Path] = []
    for path in sorted({path for path in paths if path.is_absolute() and path.exists()}):
        covered = any(path.is_relative_to(other) for other in [*kept, directory])
        if not covered and path not in (Path("/"), Path("/tmp")):
            kept.append(path)
    return kept


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str) and len(value) < 4096 and "\0" not in value:
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


class _Container:
    """One task in a container, as LocalRun drives it.

    Raises:
        CannotStartError: there is no such image, or the engine refuses.
    """

    def __init__(self, run: LocalRun, client: Any, image: str, command: list[str], **options: Any) -> None:
        self._exit_code: int | None = None
        self._trouble = ""
        try:
            _pull_if_missing(run, client, image)
            # The entrypoint is given, as a cluster gives it: an image's own must not come before the command.
            self._container = client.containers.create(
                image, command[1:], entrypoint=command[:1], labels={"sapo-pipelines.run": str(run.directory)}, **options
            )
        except _GONE as error:
            raise CannotStartError(f"cannot make a container of {image}: {error}", _CANNOT_RUN) from error
        try:
            self._container.start()
        except _GONE as error:
            self.close()
            raise CannotStartError(f"cannot start a container of {image}: {error}", _CANNOT_RUN) from error
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        try:
            self._exit_code = self._container.wait()["StatusCode"]
        except _GONE as error:
            self._trouble = f"the container engine is gone: {error}"
            self._exit_code = _CANNOT_RUN

    def lines(self) -> Iterator[str]:
        """What the container says, as it says it; the engine hands over pieces of any length."""
        rest = b""
        with contextlib.suppress(*_GONE):  # the waiter meets the same, and tells
            for piece in self._container.logs(stream=True, follow=True):
                *lines, rest = (rest + piece).split(b"\n")
                yield from (line.decode(errors="replace") + "\n" for line in lines)
        if rest:
            yield rest.decode(errors="replace") + "\n"
        self._waiter.join()
        if self._trouble:
            yield self._trouble + "\n"

    def poll(self) -> int | None:
        return self._exit_code

    def terminate(self) -> None:
        self._signal("SIGTERM")

    def kill(self) -> None:
        self._signal("SIGKILL")

    def _signal(self, name: str) -> None:
        with contextlib.suppress(*_GONE):  # it has ended meanwhile
            self._container.kill(name)

    def close(self) -> None:
        with contextlib.suppress(*_GONE):
            self._container.remove(force=True, v=True)


def _pull_if_missing(run: LocalRun, client: Any, image: str) -> None:
    """Fetches an image that is not there; one that is, is left as it is."""
    try:
        client.images.get(image)
    except ImageNotFound:
        run.say(f"pulling {image}")
        name, _, tag = image.rpartition(":")
        for event in client.api.pull(name, tag, stream=True, decode=True):
            run.raise_if_interrupted()
            if "error" in event:
                raise CannotStartError(
                    f"cannot pull {image}: {event['error']}; build the images with `docker buildx bake -f "
                    "docker/docker-bake.hcl`",
                    _CANNOT_RUN,
                ) from None
