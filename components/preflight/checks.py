"""Checks that need no cluster: recipes, the hub, buckets, the judge. Each tells what it found and never raises."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from components.common.core.errors import UserError
from components.common.storage.client import check_read, check_write, is_s3, split
from components.common.storage.locations import scheme, split_hub
from components.evaluation.judged_config import JUDGED, JudgedConfig
from components.preflight.config import PreflightConfig

TIMEOUT_SECONDS = 20
HUB_KINDS = {"data": "dataset", "sft_data": "dataset", "model": "model", "evaluation": "dataset"}


class Check(NamedTuple):
    """One thing looked at: `skipped` could not be looked at, and does not stop the run."""

    what: str
    state: Literal["ok", "failed", "skipped"]
    found: str


def check_inputs(config: PreflightConfig) -> Iterator[Check]:
    """Recipes, and what the data, the model and the methods are read from or written to."""
    written = dict.fromkeys(uri for uri in _strings(config.methods) if is_s3(uri))
    read: dict[str, None] = {}
    for stage in ("data", "sft_data", "model", "evaluation"):
        try:
            settings = config.settings_of(stage)
        except UserError as error:
            yield Check(f"recipe of {stage}", "failed", str(error))
            continue
        for uri in _strings(settings):
            if scheme(uri) == "hf":
                read.setdefault(f"{HUB_KINDS[stage]} {uri}")
            elif is_s3(uri):
                read.setdefault(uri)
        if stage == "evaluation" and (judged := JUDGED.keys() & set(settings.get("benchmarks", ()))):
            if "alpaca_eval" in judged and "alpaca_eval_data" not in settings:
                read.setdefault(f"dataset {JudgedConfig.alpaca_eval_data}")
            yield check_judge(settings)
    for place in read:
        yield check_bucket(place, writable=False) if is_s3(place) else check_hub(*place.split(" ", 1))
    for place in written:
        yield check_bucket(place, writable=True)


def check_hub(kind: str, uri: str) -> Check:
    """Whether the hub gives this repository to whoever `HF_TOKEN` belongs to; gated ones included."""
    what = f"{kind} {uri}"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return Check(what, "skipped", "HF_HUB_OFFLINE is set: only what is in the cache will be found")
    try:
        name, _ = split_hub(uri)
    except UserError as error:
        return Check(what, "failed", str(error))
    token = os.environ.get("HF_TOKEN", "")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    status = _status(f"{hub}/api/{kind}s/{name}/auth-check", token)
    with_token = "HF_TOKEN does not open it" if token else "HF_TOKEN is not set (secret sapo-hub, key token)"
    if isinstance(status, str):
        return Check(what, "failed", f"{hub} does not answer: {status}; check the network policy, or HF_HUB_OFFLINE=1")
    if status == 403:
        return Check(what, "failed", f"access is gated: accept its terms on the hub; {with_token}")
    if status in (401, 404):
        return Check(what, "failed", f"there is no such {kind}, or it is private and {with_token}")
    return Check(what, "ok" if status < 300 else "failed", f"the hub says {status}")


def check_bucket(uri: str, writable: bool) -> Check:
    """Whether keys below a location can be listed, and written where a run will write."""
    try:
        (check_write if writable else check_read)(split(uri))
    except UserError as error:
        return Check(uri, "failed", str(error))
    return Check(uri, "ok", "readable and writable" if writable else "readable")


def check_judge(settings: dict[str, Any]) -> Check:
    """Whether the judge's endpoint takes the key, if it wants one."""
    url = settings.get("judge_base_url") or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    variable = settings.get("judge_key_variable", JudgedConfig.judge_key_variable)
    what, key = f"judge at {url}", os.environ.get(variable, "") if variable else ""
    if variable and not key:
        return Check(what, "failed", f"{variable} is not set (OPENAI_API_KEY comes from secret sapo-judge, key key)")
    status = _status(f"{url.rstrip('/')}/models", key)
    if isinstance(status, str):
        return Check(what, "failed", f"does not answer: {status}; check the network policy")
    if status in (401, 403):
        return Check(what, "failed", f"refuses the key in {variable} ({status})")
    return Check(what, "ok", f"answers {status}")


def _status(url: str, token: str) -> int | str:
    """The HTTP status of a GET, or why there was none."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def _strings(value: Any) -> Iterator[str]:
    """Every text in a mapping or list, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)
