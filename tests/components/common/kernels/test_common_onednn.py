"""oneDNN's products are those of `F.linear`, whatever the layout of what goes in."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from components.common.kernels.cpu import onednn

pytestmark = pytest.mark.skipif(not onednn.multiplies(torch.float32), reason="this torch has no oneDNN")


@pytest.fixture
def products(monkeypatch):
    """Shapes of what went to oneDNN, to which 512 rows are many."""
    monkeypatch.setattr(onednn, "FEWEST_ROWS", 512)
    shapes: list[tuple[int, ...]] = []
    multiply = onednn.packed_linear
    monkeypatch.setattr(
        onednn, "packed_linear", lambda x, *rest: (shapes.append(tuple(x.shape)), multiply(x, *rest))[1]
    )
    return shapes


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(600, 24), (2, 300, 24), (1, 600, 24)])
def test_products_are_those_of_linear(products, shape, biased):
    x, weight, bias = torch.randn(shape), torch.randn(40, 24), torch.randn(40) if biased else None
    torch.testing.assert_close(onednn.linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    assert products == [shape]


def test_views_are_read_as_they_lie(products):
    """A transposed weight, as in backward, and rows that are not next to each other."""
    x, weight = torch.randn(24, 600).t(), torch.randn(24, 40).t()
    torch.testing.assert_close(onednn.linear(x, weight), x @ weight.t(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(onednn.linear(x[::2][:512], weight), x[::2][:512] @ weight.t(), atol=1e-5, rtol=1e-5)
    assert products == [(600, 24)]  # the second has 300 rows


def test_few_rows_and_other_types_are_left_to_torch(products):
    weight = torch.randn(40, 24)
    onednn.linear(torch.randn(511, 24), weight)
    onednn.linear(torch.randn(0, 24), weight)
    onednn.linear(torch.randn(600, 24).bfloat16(), weight.bfloat16())
    assert not products


def test_types_that_are_not_multiplied():
    assert not onednn.multiplies(torch.float64) and not onednn.multiplies(torch.float16)
