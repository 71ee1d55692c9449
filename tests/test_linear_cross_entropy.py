"""Head and cross-entropy in blocks: budgets against float64, scaled and frozen gradients."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from vqfast.nn.linear_cross_entropy import linear_cross_entropy
from vqfast.testing import tolerances

MODULE = importlib.import_module("vqfast.nn.linear_cross_entropy")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(MODULE, "_BLOCK", 600)


def make(B=3, S=17, E=40, V=123):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(B, S, E, generator=g), torch.randn(V, E, generator=g) / 4
    return x, w, torch.randint(V, (B, S), generator=g)


def plain(x, w, t):
    return F.cross_entropy(F.linear(x, w).flatten(0, -2), t.flatten())


def results(function, dtype, autocast, up=1.0):
    x, w, t = make()
    x, w = (a.to(dtype, copy=True).requires_grad_() for a in (x, w))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = function(x, w, t)
    return loss.detach(), *torch.autograd.grad(loss * up, (x, w))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("up", [1.0, 0.37])
def test_error_against_float64(small_blocks, each_isa, autocast, up):
    ours = results(linear_cross_entropy, torch.float32, autocast, up)
    theirs = results(plain, torch.float32, autocast, up)
    exact = results(plain, torch.float64, False, up)
    eps = tolerances.EPS[torch.bfloat16 if autocast else torch.float32]
    for i, (o, p, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert o.dtype == torch.float32 and o.shape == e.shape
        factor = tolerances.BACKWARD if i else tolerances.FORWARD
        assert (o - e).abs().max() <= factor * (p - e).abs().max() + eps * e.abs().max()


def test_no_matrix_of_all_logits_is_made(small_blocks, monkeypatch):
    x, w, t = make()
    sizes, op = [], torch.ops.vqfast.cross_entropy
    monkeypatch.setattr(
        torch.ops.vqfast, "cross_entropy", lambda a, b: sizes.append(a.shape) or op(a, b)
    )
    x.requires_grad_()
    linear_cross_entropy(x, w, t).backward()
    assert {s[0] for s in sizes} == {4, 3} and sum(s[0] for s in sizes) == t.numel()


def test_frozen_parts_and_no_grad(small_blocks):
    x, w, t = make()
    expected = linear_cross_entropy(x, w, t)
    for leaf, other in ((x, w), (w, x)):
        leaf.requires_grad_(True)
        other.requires_grad_(False)
        loss = linear_cross_entropy(x, w, t)
        loss.backward()
        assert torch.equal(loss, expected) and leaf.grad is not None and other.grad is None
        leaf.grad = None
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, t)
    assert torch.equal(loss, expected) and not loss.requires_grad


def test_backward_twice_gives_the_same_gradient(small_blocks):
    x, w, t = make()
    w.requires_grad_()
    loss = linear_cross_entropy(x, w, t)
    first = [torch.autograd.grad(loss * k, w, retain_graph=True)[0] for k in (2, 2)]
    assert torch.equal(*first)


def test_nan_shows(small_blocks):
    x, w, t = make()
    x[1, 2, 3] = torch.nan
    x.requires_grad_()
    loss = linear_cross_entropy(x, w, t)
    loss.backward()
    assert loss.isnan() and x.grad[1, 2].isnan().all() and x.grad[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_formats_hold_all_logits(small_blocks, dtype):
    x, w, t = make()
    loss = linear_cross_entropy(x.to(dtype), w.to(dtype), t)
    expected = plain(x.to(dtype), w.to(dtype), t).to(loss.dtype)
    torch.testing.assert_close(loss, expected, rtol=3e-3, atol=0)


def test_compiles_with_its_backward(small_blocks):
    x, w, t = make()
    w.requires_grad_()
    (expected,) = torch.autograd.grad(linear_cross_entropy(x, w, t), w)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x, w, t), w)
    torch.testing.assert_close(found, expected)
