"""Comparing the models of runs."""

from pathlib import Path

import torch

from components.common.models.loading import load_model


def weights(directory: Path | str) -> dict[str, torch.Tensor]:
    return load_model(str(directory), torch.float32).state_dict()


def equal_weights(mine: Path | str, theirs: Path | str) -> bool:
    a, b = weights(mine), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
