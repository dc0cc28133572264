"""Linear layers on a CPU by oneDNN, with weights in a layout of its own.

These are the operators that torch.compile calls. Called eagerly, float32 goes to MKL instead, which reaches three quarters of
oneDNN's speed on an AMD EPYC with AVX-512, and less for a few rows; bfloat16 goes to oneDNN, but a product of a few rows spends
up to half of its time on laying the weights out.
"""

import functools

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ROWS = 8  # that the layout is chosen for; it is good for any number
FEWEST_ROWS = 2048  # worth a layout for one product: 4,000 rows gained a tenth, 1,400 nothing


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether there is a fast product of this type here."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """(out, in) -> the same for `packed_linear` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with a packed weight; x has its type, and nothing is kept for backward."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, packed for this one product where that is faster: many float32 rows. Only where no gradient is recorded.

    Args:
        x: (..., in).
        weight: (out, in); may be a transposed view, which gives x @ weight.T its backward.
        bias: (out,).
    """
    is_float32 = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if is_float32 and x.numel() >= FEWEST_ROWS * x.shape[-1] and multiplies(torch.float32):
        return packed_linear(x, pack(weight), bias)
    return F.linear(x, weight, bias)
