"""Held to a naive float64 twin: values and gradients, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmray.ops.linear_cross_entropy import (
    IGNORED,
    chunk_rows,
    linear_cross_entropy_per_token,
    linear_cross_entropy_sum,
)

N, D, V = 11, 8, 23
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def given(dtype: torch.dtype = torch.float32, *, bias: bool = False, scale: float = 2.0):
    """Hidden rows, weight, bias and targets, the third of which is ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((N, D), (V, D)))
    shift = torch.randn(V, generator=generator).to(dtype) if bias else None
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[2] = IGNORED
    return (hidden * scale).to(dtype), weight.to(dtype), shift, targets


def naive(hidden, weight, shift, targets):
    """Loss and gradients in float64, with all logits at once."""
    exact = [one.double().detach().requires_grad_() for one in (hidden, weight, shift) if one is not None]
    logits = exact[0] @ exact[1].T + (exact[2] if shift is not None else 0.0)
    loss = sum(row.exp().sum().log() - row[target] for row, target in zip(logits, targets, strict=True) if target >= 0)
    return loss, torch.autograd.grad(loss * 0.25, exact)  # type: ignore[operator]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [1, 4, N, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_the_naive_ones(dtype, rows, bias):
    hidden, weight, shift, targets = given(dtype, bias=bias)
    want, gradients = naive(hidden, weight, shift, targets)
    trained = [one.requires_grad_() for one in (hidden, weight, shift) if one is not None]
    loss = linear_cross_entropy_sum(hidden, weight, targets, shift, num_chunk_rows=rows)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(want.item(), rel=TOLERANCE[dtype])
    (loss * 0.25).backward()
    for one, other in zip(trained, gradients, strict=True):
        assert one.grad is not None and one.grad.dtype == dtype
        assert (one.grad.double() - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()
    assert hidden.grad is not None and not hidden.grad[2].any(), "an ignored row has no gradient"


def test_each_row_by_itself_adds_up_to_the_sum():
    hidden, weight, _, targets = given()
    each = linear_cross_entropy_per_token(hidden, weight, targets, num_chunk_rows=3)
    want = F.cross_entropy((hidden @ weight.T).double(), targets, reduction="none")
    torch.testing.assert_close(each.double(), want, atol=1e-5, rtol=1e-5)
    assert each[2] == 0 and not each.requires_grad
    assert each.sum().item() == pytest.approx(linear_cross_entropy_sum(hidden, weight, targets).item(), rel=1e-6)


def test_what_is_frozen_gets_no_gradient():
    hidden, weight, _, targets = given()
    linear_cross_entropy_sum(hidden.requires_grad_(), weight, targets).backward()
    assert hidden.grad is not None and weight.grad is None


def test_a_tied_and_trained_head_gets_the_gradient_of_both_its_uses():
    _, weight, _, targets = given()
    ids = torch.arange(N)
    grads = []
    for chunked in (True, False):
        tied = weight.clone().requires_grad_()
        hidden = torch.tanh(F.embedding(ids, tied))
        if chunked:
            loss = linear_cross_entropy_sum(hidden, tied, targets, num_chunk_rows=4)
        else:
            loss = F.cross_entropy(hidden @ tied.T, targets, reduction="sum")
        loss.backward()
        grads.append(tied.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


def test_large_logits_do_not_overflow_and_a_sure_row_has_a_small_loss():
    hidden = torch.tensor([[300.0], [300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    loss = linear_cross_entropy_sum(hidden, weight, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(300.0) and hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [1.0]]))


def test_no_rows_are_a_loss_of_zero():
    hidden = torch.zeros(0, D, requires_grad=True)
    loss = linear_cross_entropy_sum(hidden, torch.zeros(V, D), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert linear_cross_entropy_per_token(hidden, torch.zeros(V, D), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_autocast_outside_changes_nothing():
    hidden, weight, _, targets = given()
    plain = linear_cross_entropy_sum(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_cross_entropy_sum(hidden, weight, targets)
    assert torch.equal(plain, inside)


def test_a_second_backward_pass_is_refused():
    hidden, weight, _, targets = given()
    loss = linear_cross_entropy_sum(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_all_logits_are_never_held_at_once():
    hidden, weight, _, targets = given()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        linear_cross_entropy_sum(hidden.requires_grad_(), weight, targets, num_chunk_rows=2)
    assert sum(kept) == N * D


def test_chunks_are_chosen_by_their_bytes():
    assert chunk_rows(49152, "cpu") * 49152 * 4 <= 32 * 2**20 < (chunk_rows(49152, "cpu") + 1) * 49152 * 4
    assert chunk_rows(49152, "cuda") > chunk_rows(49152, "cpu") and chunk_rows(10**9, "cpu") == 1
