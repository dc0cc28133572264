"""Uploads compiled pipelines to Kubeflow Pipelines, each as a new version only if its content is new.

Runs in the chart's Job with nothing but the standard library. A version is called RELEASE-DIGEST, where DIGEST is the start of
the package's sha256: running it again, or after a crash between two calls, changes nothing that is already there.

    python3 upload.py --endpoint http://ml-pipeline.kubeflow:8888 --packages /packages --release 0.1.0

Exit codes: 0 everything is there; 1 something could not be uploaded, the last line says why.
"""

import argparse
import hashlib
import json
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

API = "/apis/v2beta1"
RETRIED = {429, 500, 502, 503, 504}


class ApiError(Exception):
    """The KFP API did not do what was asked; `status` is the HTTP status, 0 when it could not be reached."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """The few KFP calls that an upload needs.

    Args:
        endpoint: URL of the API, without a path.
        token_file: a file with a bearer token, read before every call because Kubernetes renews it; empty for none.
        wait: seconds during which a call is tried again when the API cannot be reached or is overloaded.
    """

    def __init__(self, endpoint: str, token_file: str = "", wait: float = 0.0) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.token_file = token_file
        self.deadline = time.monotonic() + wait

    def call(self, method: str, path: str, query: dict[str, str] | None = None, **request: Any) -> dict[str, Any]:
        """One call, tried again until the deadline. Raises ApiError; a status that a retry cannot mend raises at once."""
        url = self.endpoint + API + path + ("?" + urllib.parse.urlencode(query) if query else "")
        pause = 0.5
        while True:
            try:
                return self._once(method, url, **request)
            except ApiError as error:
                if error.status not in RETRIED | {0} or time.monotonic() + pause > self.deadline:
                    raise
                print(f"{error}; trying again in {pause:g} s", flush=True)
            time.sleep(pause)
            pause = min(2 * pause, 15.0)

    def _once(
        self, method: str, url: str, body: bytes | None = None, content_type: str = "application/json"
    ) -> dict[str, Any]:
        headers = {"Content-Type": content_type}
        if self.token_file:
            headers["Authorization"] = "Bearer " + Path(self.token_file).read_text(encoding="utf-8").strip()
        request = urllib.request.Request(url, data=body, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, f"{method} {url}: HTTP {error.code}: {_reason(error.read())}") from error
        except (OSError, json.JSONDecodeError) as error:
            raise ApiError(0, f"{method} {url}: no answer from the KFP API: {error}") from error

    def find_pipeline(self, name: str, namespace: str) -> str | None:
        """The id of the pipeline of that name, or None."""
        try:
            quoted = urllib.parse.quote(name, safe="")
            found = self.call("GET", f"/pipelines/names/{quoted}", {"namespace": namespace} if namespace else None)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return found["pipeline_id"]

    def create_pipeline(self, name: str, description: str, namespace: str) -> str:
        """Creates a pipeline without versions and returns its id; one that someone else has just created will do."""
        pipeline = {"name": name, "display_name": name, "description": description}
        if namespace:
            pipeline["namespace"] = namespace
        try:
            return self.call("POST", "/pipelines", body=json.dumps(pipeline).encode())["pipeline_id"]
        except ApiError as error:
            found = self.find_pipeline(name, namespace) if error.status == 409 else None
            if found is None:
                raise
            return found

    def versions(self, pipeline_id: str) -> Iterator[str]:
        """Names of a pipeline's versions, newest first."""
        query = {"page_size": "100", "sort_by": "created_at desc"}
        while True:
            page = self.call("GET", f"/pipelines/{pipeline_id}/versions", query)
            yield from (version.get("name") or version["display_name"] for version in page.get("pipeline_versions", []))
            if not page.get("next_page_token"):
                return
            query = {**query, "page_token": page["next_page_token"]}

    def upload_version(self, pipeline_id: str, name: str, description: str, package: bytes) -> bool:
        """Uploads a package as a version; False if a version of that name is there by now."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="uploadfile"; filename="pipeline.yaml"\r\n'
        body = f"{head}Content-Type: application/yaml\r\n\r\n".encode() + package + f"\r\n--{boundary}--\r\n".encode()
        query = {"pipelineid": pipeline_id, "name": name, "display_name": name, "description": description}
        try:
            form = f"multipart/form-data; boundary={boundary}"
            self.call("POST", "/pipelines/upload_version", query, body=body, content_type=form)
        except ApiError as error:
            if error.status != 409:
                raise
            return False
        return True


def _reason(body: bytes) -> str:
    """What an error's body says: KFP sends JSON with `message` or `error_message`, gateways send anything."""
    text = body.decode(errors="replace")
    try:
        answer = json.loads(text)
        text = str(answer.get("message") or answer.get("error_message") or answer.get("error") or text)
    except (json.JSONDecodeError, AttributeError):
        pass
    return " ".join(text.split())[:500] or "no reason given"


def name_and_description(package: str) -> tuple[str, str]:
    """What a package calls itself, from the comment with which kfp opens it. Raises ValueError if there is none.

    The description begins with the title, because the UI's list of pipelines has no column for it.
    """
    name = re.search(r"^# Name: (\S+)$", package, re.M)
    if not package.startswith("# PIPELINE DEFINITION") or name is None:
        raise ValueError("not a package that `python -m pipelines compile` wrote")
    about = re.search(r"^# Description: (.*(?:\n# {3,}.*)*)", package, re.M)
    title = re.search(r"^  displayName: (['\"]?)(.+)\1$", package, re.M)
    described = " ".join(about[1].replace("\n#", " ").split()) if about else ""
    return name[1], f"{title[2]}. {described}".replace("''", "'") if title else described


def upload(api: Api, package: bytes, release: str, namespace: str = "") -> str:
    """Makes one package a version of its pipeline, and returns what was done in one line."""
    name, description = name_and_description(package.decode())
    digest = hashlib.sha256(package).hexdigest()[:12]
    pipeline_id = api.find_pipeline(name, namespace) or api.create_pipeline(name, description, namespace)
    present = list(api.versions(pipeline_id))
    for position, version in enumerate(present):
        if version.endswith(f"-{digest}"):
            newer = f"; the UI offers the newer {present[0]} first" if position else ""
            return f"{name}: version {version} is there already{newer}"
    version = f"{release}-{digest}"
    uploaded = api.upload_version(pipeline_id, version, description, package)
    return f"{name}: version {version} " + ("uploaded" if uploaded else "is there already")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("upload.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--endpoint", required=True, help="URL of the KFP API")
    parser.add_argument("--packages", required=True, type=Path, help="directory of compiled pipelines, *.yaml")
    parser.add_argument("--release", required=True, help="what a version's name begins with")
    parser.add_argument("--namespace", default="", help="profile namespace that owns the pipelines; none: shared")
    parser.add_argument("--token_file", default="", help="file with the bearer token of the API; none: no token")
    parser.add_argument("--wait", type=float, default=300.0, help="seconds to wait for the API (default: 300)")
    arguments = parser.parse_args(argv)

    api = Api(arguments.endpoint, arguments.token_file, arguments.wait)
    packages = sorted(arguments.packages.glob("*.yaml"))
    if not packages:
        print(f"upload: error: no *.yaml in {arguments.packages}", file=sys.stderr)
        return 1
    for path in packages:
        try:
            print(upload(api, path.read_bytes(), arguments.release, arguments.namespace), flush=True)
        except (ApiError, OSError, ValueError) as error:
            print(f"upload: error: {path.name}: {error}{_hint(error)}", file=sys.stderr)
            return 1
    return 0


def _hint(error: Exception) -> str:
    if isinstance(error, ApiError) and error.status in (401, 403):
        return "; in a profile namespace set kfp.multiUser, and let the account use pipelines.kubeflow.org"
    if isinstance(error, ApiError) and error.status == 0:
        return "; is kfp.endpoint right, and does a network policy let this pod reach it?"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
