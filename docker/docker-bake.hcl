# Builds and tags the images of all stages, as pipelines/cluster.py names them. Needs Docker with buildx.
#
#   docker buildx bake -f docker/docker-bake.hcl                 all, for the CPU, into the local engine
#   docker buildx bake -f docker/docker-bake.hcl sapo            one
#   FLAVOUR=cuda docker buildx bake -f docker/docker-bake.hcl    with CUDA and vLLM

variable "REGISTRY" {
  default = "ghcr.io/sapo-pipelines"
}

variable "VERSION" {
  default = "0.1.0"
}

# cpu or cuda. data and report are the same in both.
variable "FLAVOUR" {
  default = "cpu"
}

variable "TAG" {
  default = VERSION
}

variable "BASE_IMAGE" {
  default = "python:3.11-slim"
}

# Commit and repository, for the labels.
variable "REVISION" {
  default = ""
}

variable "SOURCE" {
  default = ""
}

group "default" {
  targets = ["stage"]
}

target "stage" {
  name       = stage
  matrix     = { stage = ["data", "report", "model", "sft", "sapo", "train", "evaluation"] }
  target     = stage
  context    = "."
  dockerfile = "docker/Dockerfile"
  tags       = ["${REGISTRY}/${stage}:${TAG}"]
  args = {
    BASE_IMAGE        = BASE_IMAGE
    CONSTRAINTS       = FLAVOUR == "cuda" ? "docker/constraints-cuda.txt" : "docker/constraints.txt"
    TORCH_INDEX       = FLAVOUR == "cuda" ? "" : "https://download.pytorch.org/whl/cpu"
    TRAINING_EXTRAS   = FLAVOUR == "cuda" ? "sft,dpo,orpo,sapo,spin,bitsandbytes,deepspeed,vllm" : "sft,dpo,orpo,sapo,spin"
    EVALUATION_EXTRAS = FLAVOUR == "cuda" ? "evaluation,vllm" : "evaluation"
    APT_PACKAGES      = FLAVOUR == "cuda" ? "gcc libc6-dev" : ""
  }
  labels = {
    "org.opencontainers.image.version"  = VERSION
    "org.opencontainers.image.revision" = REVISION
    "org.opencontainers.image.licenses" = "Apache-2.0"
    "org.opencontainers.image.source"   = SOURCE
  }
}
