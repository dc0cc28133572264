"""What is one kernel on a GPU computes what the CPU's operations compute; and a new length does not compile it anew."""

import pytest
import torch
from torch import nn

from components.common.kernels import gpu_fusion, lean_layers, vocabulary_head
from components.common.kernels.lean_layers import _GatedDown, _Norm
from components.common.kernels.vocabulary_head import block_width, chunked_logps


def results(function, *inputs):
    """What comes out, and the gradients of all that goes in, from the GPU's functions, run as they are, and from the CPU's."""
    found = []
    for wanted in (True, False):
        parts = [tensor.clone().requires_grad_() for tensor in inputs]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_fusion, "is_wanted", lambda tensor, wanted=wanted: wanted)
            patch.setattr(gpu_fusion, "ENABLED", False)
            out = function(*parts)
            torch.manual_seed(1)
            found.append([out.detach(), *torch.autograd.grad(out, parts, torch.randn_like(out))])
    return zip(*found, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 7, 32), torch.randn(32)
    for mine, theirs in results(lambda x, weight: _Norm.apply(x, weight, 1e-6, dtype), x, weight):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_mlp(dtype):
    torch.manual_seed(0)
    gate, up = torch.randn(2, 1, 7, 32, dtype=dtype).unbind()
    for mine, theirs in results(_GatedDown.apply, gate, up, torch.randn(16, 32)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [500, 1024, 3000])
def test_vocabulary_head(vocabulary, dtype):
    torch.manual_seed(0)
    targets = torch.randint(vocabulary, (40,))
    targets[:2] = torch.tensor([0, vocabulary - 1])

    def logps(hidden, weight):
        head = nn.Linear(*reversed(weight.shape), bias=False)
        del head.weight
        head.weight = weight
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return chunked_logps(hidden, head, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_head, "LOGITS", 1)  # the narrowest blocks: several, and a last one of another width
        compared = list(results(logps, torch.randn(40, 16), torch.randn(vocabulary, 16)))
    for mine, theirs in compared:
        torch.testing.assert_close(mine, theirs)


def test_a_gpu_gets_blocks_whose_rows_begin_at_even_addresses():
    for tokens in (1, 700, 3500, 8191, 100_000):
        width = block_width(tokens, 128_256, on_gpu=True)
        assert width % 256 == 0 or width == 128_256
        assert (
            width * tokens <= max(vocabulary_head.LOGITS_ON_GPU, vocabulary_head.NARROWEST * tokens) or width == 128_256
        )


def test_a_new_length_does_not_compile_anew(monkeypatch):
    """Dynamo's half of compilation: what it guards on."""
    from torch._dynamo.testing import CompileCounterWithBackend

    plain_compile, counters = torch.compile, []

    def counted(function, dynamic):
        counters.append(CompileCounterWithBackend("eager"))
        return plain_compile(function, dynamic=dynamic, backend=counters[-1])

    monkeypatch.setattr(torch, "compile", counted)
    of_rows, of_blocks = ("_norm_forward", "_norm_backward", "_gated", "_gated_backward"), ("_lse", "_d_logits")
    for name in of_rows:  # anew, so that nothing is compiled yet
        function = getattr(lean_layers, name).__wrapped__
        monkeypatch.setattr(lean_layers, name, gpu_fusion.one_kernel_of_rows(function))
    for name in of_blocks:
        function = getattr(vocabulary_head, name).__wrapped__
        monkeypatch.setattr(vocabulary_head, name, gpu_fusion.one_kernel(function))
    monkeypatch.setattr(gpu_fusion, "is_wanted", lambda tensor: True)
    monkeypatch.setattr(gpu_fusion, "ENABLED", True)
    monkeypatch.setattr(vocabulary_head, "LOGITS", 1)
    torch._dynamo.reset()
    norm, down, head = nn.Parameter(torch.ones(32)), nn.Parameter(torch.ones(32, 64)), nn.Linear(32, 3000, bias=False)
    for tokens in (64, 32, 50, 33, 3000, 1024):  # some equal other sizes
        x = torch.randn(1, tokens, 32, requires_grad=True)
        wide = torch.randn(1, tokens, 64, requires_grad=True)
        hidden = _Norm.apply(x, norm, 1e-6, torch.float32) + _GatedDown.apply(wide, wide * 2, down)
        chunked_logps(hidden[0], head, torch.randint(3000, (tokens,))).sum().backward()
    assert [counter.frame_count for counter in counters] == [1] * 6
