#!/usr/bin/env bash
# Builds the images with Podman, where there is no Docker with buildx.
#
#   docker/podman.sh build [TARGET...]   all targets, or these; tags as in docker-bake.hcl
#   docker/podman.sh base                a base image from Debian's packages, for a machine that reaches no registry but
#                                        Debian's mirror; needs mmdebstrap. Then: BASE_IMAGE=localhost/debian-python
#
# From the environment: BASE_IMAGE, TORCH_INDEX, REGISTRY, TAG; PIP_CONFIG, a pip.conf to use while building;
# PODMAN_BUILD_ARGS, more arguments of `podman build`, such as "--isolation chroot".
set -euo pipefail
cd "$(dirname "$0")/.."

base() {
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm - \
    "${MIRROR:-http://deb.debian.org/debian}" | podman import --quiet - localhost/debian-python
}

build() {
  local arguments=(--format docker --file docker/Dockerfile --ignorefile docker/Dockerfile.dockerignore)  # docker: with HEALTHCHECK
  local more=()
  read -ra more <<<"${PODMAN_BUILD_ARGS:-}"
  arguments+=("${more[@]}")
  [ -z "${BASE_IMAGE:-}" ] || arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
  [ -z "${TORCH_INDEX+set}" ] || arguments+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
  [ -z "${PIP_CONFIG:-}" ] || arguments+=(--secret "id=pip,src=$PIP_CONFIG")
  for target in "$@"; do
    podman build "${arguments[@]}" --target "$target" --tag "${REGISTRY:-ghcr.io/sapo-pipelines}/$target:${TAG:-0.1.0}" .
  done
}

case "${1:-}" in
  base) base ;;
  build)
    shift
    [ $# -gt 0 ] || set -- data report model sft sapo train evaluation
    build "$@"
    ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
