#!/usr/bin/env bash
# Resolves the CUDA flavour of the images (Linux, x86-64, Python 3.11) from metadata alone: nothing of CUDA is downloaded.
#
#   docker/constraints-cuda.sh           makes docker/constraints-cuda.txt anew, as close to constraints.txt as vLLM allows
#   docker/constraints-cuda.sh --check   resolves with its versions, writes nothing; says which are missing or unused
#
# Needs uv (the extra `dev` has it) and PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

resolve() {
  local extras=(data model report sft dpo orpo sapo spin bitsandbytes deepspeed evaluation vllm)
  uv pip compile pyproject.toml "${extras[@]/#/--extra=}" --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --no-annotate --no-header --no-config --quiet "$@"
}

pins() { grep -v '^#' docker/constraints-cuda.txt; }

case "${1:-}" in
  "")
    # vLLM sets two versions apart: numpy (numba needs <2.4) and apache-tvm-ffi (vLLM pins it).
    shared=$(mktemp) made=$(mktemp)
    grep -vE '^(numpy|apache-tvm-ffi)==' docker/constraints.txt >"$shared"
    pins >"$made" # uv keeps what an output has
    resolve --constraint "$shared" --output-file "$made" >/dev/null
    { grep '^#' docker/constraints-cuda.txt && cat "$made"; } >"$shared"
    cp "$shared" docker/constraints-cuda.txt && rm "$shared" "$made"
    ;;
  --check)
    resolved=$(resolve --constraint <(pins))
    diff <(pins) <(echo "$resolved") || { echo "docker/constraints-cuda.txt is not what resolves: make it anew" >&2 && exit 1; }
    ;;
  *)
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
