"""What `helm test` runs: are the secrets there, does the store take writes, does KFP answer and have the pipelines?

    python3 check.py --endpoint http://ml-pipeline.kubeflow:8888 --bucket mlpipeline --pipelines tiny,smollm2

Secrets and the store's address come from the environment, as in a stage's pod, and are never printed.
Exit codes: 0 all checks passed; 1 at least one did not.
"""

import argparse
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from functools import partial

from upload import Api, ApiError

STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
SECRETS = {"HF_TOKEN": "sapo-hub", **dict.fromkeys(STORE_KEYS, "sapo-store"), "OPENAI_API_KEY": "sapo-judge"}


class CheckError(Exception):
    """A check did not pass; the message says what was found and what to do."""


def check_secret(variable: str, secret: str, required: bool) -> str:
    """Whether a secret reached the environment. Raises CheckError when it did not and is required, or cannot be right."""
    value = os.environ.get(variable, "")
    if value != value.strip():
        raise CheckError(
            f"begins or ends with white space, such as the newline of a file: make secret {secret} without"
        )
    if value:
        return "there"
    if required:
        raise CheckError(f"no value: create secret {secret} (see the chart's README), or give the chart its value")
    return "none, not required"


def check_store(bucket: str, prefix: str) -> str:
    """Writes, reads and removes one small object. Raises CheckError with the store's reason."""
    if not all(os.environ.get(key) for key in STORE_KEYS):
        return "skipped: no keys"
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ModuleNotFoundError as error:
        raise CheckError("this image has no boto3; set image.registry and image.tag to the stage images") from error
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or None
    config = Config(
        s3={"addressing_style": "path"}, connect_timeout=5, read_timeout=15, retries={"total_max_attempts": 3}
    )
    key = f"{prefix}/check-{uuid.uuid4().hex}".lstrip("/")
    try:
        client = boto3.client("s3", endpoint_url=endpoint, region_name=os.environ.get("AWS_REGION"), config=config)
        client.put_object(Bucket=bucket, Key=key, Body=b"check")
        same = client.get_object(Bucket=bucket, Key=key)["Body"].read() == b"check"
        client.delete_object(Bucket=bucket, Key=key)
    except (BotoCoreError, ClientError, ValueError) as error:
        raise CheckError(f"s3://{bucket} at {endpoint or 'AWS'}: {error}") from error
    if not same:
        raise CheckError(f"s3://{bucket} at {endpoint or 'AWS'}: an object came back changed")
    return f"wrote, read and removed an object in s3://{bucket}/{prefix}"


def check_api(api: Api) -> str:
    api.call("GET", "/healthz")
    return f"{api.endpoint} answers"


def check_pipeline(api: Api, name: str, namespace: str) -> str:
    """Whether a pipeline is in the UI, and which version it offers. Raises CheckError when it is not."""
    pipeline_id = api.find_pipeline(name, namespace)
    newest = next(api.versions(pipeline_id), None) if pipeline_id else None
    if newest is None:
        raise CheckError("not uploaded; see `kubectl logs job/sapo-upload`")
    return f"newest version {newest}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("check.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--endpoint", required=True, help="URL of the KFP API")
    parser.add_argument("--namespace", default="", help="profile namespace that owns the pipelines; none: shared")
    parser.add_argument("--token_file", default="", help="file with the bearer token of the API; none: no token")
    parser.add_argument("--bucket", required=True, help="bucket to write to")
    parser.add_argument("--prefix", default="", help="where in the bucket")
    parser.add_argument("--pipelines", default="", help="names of pipelines that must be uploaded, with commas between")
    parser.add_argument("--required", default="", help="secrets that must be there, with commas between")
    arguments = parser.parse_args(argv)

    api = Api(arguments.endpoint, arguments.token_file, wait=10.0)
    required = arguments.required.split(",")
    checks: list[tuple[str, Callable[[], str]]] = []
    for variable, secret in SECRETS.items():
        checks.append((variable, partial(check_secret, variable, secret, secret in required)))
    checks.append(("store", partial(check_store, arguments.bucket, arguments.prefix)))
    checks.append(("KFP API", partial(check_api, api)))
    for name in filter(None, arguments.pipelines.split(",")):
        checks.append((f"pipeline {name}", partial(check_pipeline, api, name, arguments.namespace)))
    failed = [title for title, check in checks if not _run(title, check)]
    return 1 if failed else 0


def _run(title: str, check: Callable[[], str]) -> bool:
    """Prints how a check went, and tells whether it passed."""
    try:
        print(f"ok      {title}: {check()}", flush=True)
    except (ApiError, CheckError, OSError) as error:
        print(f"FAILED  {title}: {error}", flush=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
