"""Packed, padded and single sequences give the same log-probs, losses and gradients, on every family that is packed."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM

from components.common.kernels import lean_layers, pair_attention, pair_logps, vocabulary_head
from components.common.kernels.cpu import onednn
from components.common.kernels.pair_attention import PairLayout, attend_pairs
from components.common.kernels.pair_logps import response_logps, sequence_nll
from components.common.kernels.pair_packing import PairIds, collate, whole_sequences
from components.common.kernels.pair_spans import Span
from components.common.kernels.vocabulary_head import token_logps
from components.sapo.losses import LOSSES, PairLogps

#         prompt                 chosen                rejected
PAIRS = [
    PairIds([5, 6, 7], [8, 9, 10, 2], [8, 11, 12, 10, 2]),  # A B C
    PairIds([5], [8, 9, 2], [11, 2]),  # A empty, B' ends early
    PairIds([5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 2], [3, 4, 5, 6]),  # C empty
    PairIds([5, 6], [2], [3]),  # one-token responses
    PairIds([5, 6], [8, 9, 2], [8, 9, 2]),  # B' is B
    PairIds([5, 6, 7], [8, 9, 10, 11, 2], [8, 9]),  # rejected is a beginning of chosen
]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gpt_neox": {},  # not packed: falls back to padded rows
}


def tiny(family: str, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(family, **(sizes | heads | FAMILIES[family] | more))
    return AutoModelForCausalLM.from_config(config).float().eval()


def alone(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The plainest way: one sequence, all logits, log_softmax."""
    logps = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0, :-1], dim=-1)
    return logps[len(prompt) - 1 :].gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)


def test_packed_layout():
    batch = collate(PAIRS[:2], pad_id=0, share=True)
    assert batch.model_inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 10, 5, 8, 9, 11]]
    assert batch.model_inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1, 2, 1]]
    assert batch.spans == [Span(0, 4, 2, 3), Span(9, 1, 2, 1)]
    assert batch.targets.tolist() == [8, 9, 10, 2, 11, 12, 10, 2, 8, 9, 2, 11, 2]
    assert batch.predictors.tolist() == [2, 3, 4, 5, 3, 6, 7, 8, 9, 10, 11, 9, 12]
    assert batch.response_mask.sum(dim=1).tolist() == [4, 3, 5, 2]
    assert batch.tokens.tolist() == [15, 7]


def test_padded_layout_masks_by_position_not_by_id():
    """Pad and end of turn may share an id: a real token that equals it is attended to."""
    batch = collate([PairIds([5, 2], [8, 2], [2])], pad_id=2, share=False)
    assert batch.model_inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.response_mask.int().tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("share", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_neox"])
def test_log_probs_are_those_of_single_sequences(family, share):
    model = tiny(family)
    logps = response_logps(model, batch := collate(PAIRS, pad_id=0, share=share))
    assert logps.dtype == torch.float32
    for i, pair in enumerate(PAIRS):
        for row, response in ((i, pair.chosen), (len(PAIRS) + i, pair.rejected)):
            torch.testing.assert_close(logps[row][batch.response_mask[row]], alone(model, pair.prompt, response))
    assert not logps[~batch.response_mask].any()


@pytest.mark.parametrize("rows", [1, 2048], ids=["onednn", "mkl"])
@pytest.mark.parametrize("loss_type", ["dpo", "orpo"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_losses_and_gradients_are_those_of_single_sequences(family, loss_type, rows, monkeypatch):
    def loss(rows: list[torch.Tensor]) -> torch.Tensor:
        chosen, rejected = torch.stack([row.sum() for row in rows]).chunk(2)
        tokens = torch.tensor([len(row) for row in rows]).chunk(2)
        logps = PairLogps(chosen, rejected, *tokens, chosen.detach() - 1, rejected.detach() + 1)
        return LOSSES[loss_type].function(logps, SimpleNamespace(beta=0.5, orpo_lambda=0.5)).losses.mean()

    def gradient(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(rows), list(model.parameters()))])

    model = tiny(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Qwen2's, which start at 0
            torch.nn.init.normal_(parameter)
    monkeypatch.setattr(onednn, "FEWEST_ROWS", rows)
    responses = [(p.prompt, p.chosen) for p in PAIRS] + [(p.prompt, p.rejected) for p in PAIRS]
    expected = gradient([alone(model, *sequence) for sequence in responses])
    for share in (True, False):
        batch = collate(PAIRS, pad_id=0, share=share)
        logps = response_logps(model, batch)
        ours = gradient([row[mask] for row, mask in zip(logps, batch.response_mask, strict=True)])
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def test_packing_does_not_depend_on_the_company():
    model = tiny("llama")
    together = response_logps(model, collate(PAIRS, pad_id=0, share=True))
    for i, pair in enumerate(PAIRS):
        single = response_logps(model, collate([pair], pad_id=0, share=True))
        torch.testing.assert_close(together[[i, len(PAIRS) + i], : single.shape[1]], single)


def test_gradient_checkpointing_recomputes_with_the_same_attention():
    gradients = []
    for checkpointed in (False, True):
        model = tiny("llama").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with pair_logps.shared_prefix_attention(model):
            response_logps(model, collate(PAIRS, pad_id=0, share=True)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_attention_is_put_back():
    model = tiny("llama")
    before = model.config._attn_implementation
    response_logps(model, collate(PAIRS, pad_id=0, share=True))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_layers_are_lean_while_pairs_are_packed(family):
    """Fewer bytes are kept for backward than by the layers as they come, which are put back."""
    model = tiny(family, intermediate_size=128)
    batch = collate(PAIRS, pad_id=0, share=True)
    kept = {"lean": _bytes_kept(model, batch)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean_layers, "_is_plain", lambda *of: False)
        kept["plain"] = _bytes_kept(model, batch)
    assert kept["lean"] < 0.8 * kept["plain"]
    assert not any("forward" in vars(module) for module in model.modules())


def test_linear_layers_go_to_onednn_in_both_directions(monkeypatch):
    """Each layer's query, key, value, output, gate and up, and down in its MLP, forward; then the same again for gradients."""
    monkeypatch.setattr(onednn, "FEWEST_ROWS", 1)
    sizes = []
    multiply = onednn.packed_linear
    monkeypatch.setattr(onednn, "packed_linear", lambda x, *of: (sizes.append(x.shape[-1]), multiply(x, *of))[1])
    model, batch = tiny("llama"), collate(PAIRS, pad_id=0, share=True)
    logps = response_logps(model, batch)
    layer = [16, 16, 16, 16, 16, 16, 32]  # inputs
    assert sizes == 2 * layer
    sizes.clear()
    logps.sum().backward()
    # Down, up, gate, output, value, key, query; what they gave.
    assert sorted(sizes) == sorted(2 * [16, 32, 32, 16, 8, 8, 16])
    with torch.autocast("cpu", torch.bfloat16):
        sizes.clear()
        response_logps(model, batch)
    assert not sizes


def _bytes_kept(model, batch):
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        response_logps(model, batch)
    return sum(tensor.nbytes for tensor in saved.values())


def test_other_architectures_are_padded_and_say_so(caplog):
    caplog.set_level("INFO")
    assert not pair_logps.supports_shared_prefix(tiny("gpt_neox"))
    assert "pairs are padded instead" in caplog.text
    assert pair_logps.supports_shared_prefix(tiny("llama"))


@pytest.mark.parametrize("part", [1, 3, 512])
@pytest.mark.parametrize("bias", [False, True], ids=["fused", "recomputed"])
def test_parts_equal_full_logits(monkeypatch, part, bias):
    monkeypatch.setattr(vocabulary_head, "CHUNK", part)  # tokens of any head
    monkeypatch.setattr(vocabulary_head, "LOGITS", 0)
    monkeypatch.setattr(vocabulary_head, "NARROWEST", part)  # entries of the vocabulary of a linear one
    torch.manual_seed(0)
    hidden, targets = torch.randn(10, 8, requires_grad=True), torch.randint(0, 50, (10,))
    head = torch.nn.Linear(8, 50, bias=bias)
    weights = torch.randn(10)
    ours = vocabulary_head.chunked_logps(hidden, head, targets)
    full = -F.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(ours, full)
    mine = torch.autograd.grad((weights * ours).sum(), [hidden, *head.parameters()])
    theirs = torch.autograd.grad((weights * full).sum(), [hidden, *head.parameters()])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[300.0, 0.0], [-300.0, 0.0]], requires_grad=True)
    head = torch.nn.Linear(2, 3, bias=False)
    head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    logps = vocabulary_head.chunked_logps(hidden, head, torch.tensor([0, 0]))
    assert logps.tolist() == [0.0, -600.0]
    logps.sum().backward()
    assert hidden.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_a_frozen_head_gets_no_gradient():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.nn.Linear(8, 50, bias=False).requires_grad_(False)
    vocabulary_head.chunked_logps(hidden, head, torch.tensor([1, 2, 3, 4])).sum().backward()
    assert hidden.grad is not None and head.weight.grad is None


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_bfloat16_is_near_float32(family):
    """Autocast to bfloat16 (8 bits of mantissa): log-probs within 0.1, gradients within 5% of their norm."""
    model = tiny(family)
    batch = collate(PAIRS, pad_id=0, share=True)
    results = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logps = response_logps(model, batch)
        assert logps.dtype == torch.float32
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), list(model.parameters()))])
        results.append((logps.detach(), gradient))
    (exact, exact_gradient), (mixed, mixed_gradient) = results
    assert 0 < (mixed - exact).abs().max() < 0.1
    assert (mixed_gradient - exact_gradient).norm() < 0.05 * exact_gradient.norm()


@pytest.mark.parametrize("share", [True, False], ids=["packed", "padded"])
def test_from_divergence_margins_are_those_of_whole_responses(share):
    """What both responses share adds the same to both sums, so scoring may begin where they differ."""
    model = tiny("llama")
    whole = response_logps(model, collate(PAIRS, pad_id=0, share=share))
    batch = collate(PAIRS, pad_id=0, share=share, from_divergence=True)
    rest = response_logps(model, batch)
    assert len(batch.targets) == sum(len(p.chosen) + len(p.rejected) - 2 * p.shared() for p in PAIRS)
    for i, pair in enumerate(PAIRS):
        for row in (i, len(PAIRS) + i):
            assert not rest[row, : pair.shared()].any()
            torch.testing.assert_close(rest[row, pair.shared() :], whole[row, pair.shared() :])
    chosen, rejected = whole.sum(dim=1).chunk(2)
    chosen_rest, rejected_rest = rest.sum(dim=1).chunk(2)
    torch.testing.assert_close(chosen - rejected, chosen_rest - rejected_rest, atol=1e-5, rtol=0)


@pytest.mark.parametrize("queries", [1, 2, 128])
@pytest.mark.parametrize("window", [None, 3])
def test_blocks_of_queries_see_what_a_mask_shows(monkeypatch, window, queries):
    """Results and gradients of attention in blocks, whatever their size, are those of one product under the whole mask."""
    monkeypatch.setattr(pair_attention, "QUERIES", queries)
    batch = collate(PAIRS, pad_id=0, share=True)
    layout = PairLayout(batch.spans)
    tokens = torch.arange(batch.model_inputs["input_ids"].shape[1])
    mask = layout.block_mask(window, torch.device("cpu"))
    visible = mask.mask_mod(None, None, tokens.unsqueeze(1), tokens)
    torch.manual_seed(0)
    parts = [torch.randn(1, heads, len(tokens), 16, requires_grad=True) for heads in (4, 2, 2)]
    ours, _ = attend_pairs(None, *parts, None, 0.25, layout, window)
    plain = F.scaled_dot_product_attention(*parts, attn_mask=visible, scale=0.25, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, plain)
    weights = torch.randn_like(plain)
    mine, theirs = (torch.autograd.grad((weights * result).sum(), parts) for result in (ours, plain))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("share", [True, False])
def test_sequence_nll_is_transformers_own_loss(share):
    model = tiny("llama")
    sequences = [([5, 6, 7], [8, 9]), ([5], [8, 9, 10, 2])]
    batch = whole_sequences(sequences, pad_id=0, share=share)
    nll = sequence_nll(response_logps(model, batch), batch)
    for value, (prompt, response) in zip(nll, sequences, strict=True):
        ids = torch.tensor([prompt + response])
        assert value.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)


def test_log_probs_are_float32_even_of_bfloat16_logits():
    logits = torch.randn(3, 50, dtype=torch.bfloat16)
    logps = token_logps(logits, torch.tensor([1, 2, 3]))
    assert logps.dtype == torch.float32
    expected = torch.log_softmax(logits.double(), dim=-1)[torch.arange(3), [1, 2, 3]]
    torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=0)
