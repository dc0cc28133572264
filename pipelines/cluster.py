"""What a stage is on a cluster: its image. One place, so that a fork changes its registry once and compiles again."""

REGISTRY = "ghcr.io/sapo-pipelines"
VERSION = "0.1.0"  # of this distribution; tests compare it with pyproject.toml


def image(stage: str) -> str:
    """The container image of a stage, such as `ghcr.io/sapo-pipelines/sapo:0.1.0`.

    `train` is an image that holds every training stage: in a comparison the stage is an argument of the run.
    """
    return f"{REGISTRY}/{stage}:{VERSION}"
