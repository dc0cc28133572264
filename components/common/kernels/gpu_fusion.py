"""Chains of elementwise operations as one kernel on a GPU, where each by itself would read and write all of its numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Off: no GPU has run them yet. `make gpu` checks each against its operations, and times a step with and without.
ENABLED = False


def is_wanted(tensor: Tensor) -> bool:
    """Whether what is computed of this tensor goes to the functions that are made for a GPU."""
    return ENABLED and tensor.is_cuda


def one_kernel(function: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors, compiled when it is first called, once for all lengths and widths."""
    return _compiled_later(function, of_rows=False)


def one_kernel_of_rows(function: Callable[P, R]) -> Callable[P, R]:
    """The same, where the last size of each tensor is the model's: a kernel may then keep all numbers of a token at hand."""
    return _compiled_later(function, of_rows=True)


def _compiled_later(function: Callable[P, R], of_rows: bool) -> Callable[P, R]:
    @functools.cache
    def compiled() -> Callable[P, R]:
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not ENABLED:
            return function(*args, **kwargs)
        for arg in args if of_rows else ():
            if isinstance(arg, Tensor):
                torch._dynamo.mark_static(arg, arg.dim() - 1)
        return compiled()(*args, **kwargs)

    return run
