"""Query, key and value as one product: budgets against float64, frozen parts, other layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqfast.nn.trained_heads import trained_heads
from vqfast.testing import tolerances


def assert_within_budget(run, inputs, *, precision=torch.float32):
    """`run(ours, *inputs)` against plain torch, both against float64."""

    def results(ours, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        autocast = dtype == torch.float32 and precision != torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(ours, *leaves)
        g = torch.Generator().manual_seed(1)
        up = torch.randn(y.shape, generator=g).bfloat16().to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, up)]

    ours, plain = results(True, torch.float32), results(False, torch.float32)
    exact = results(False, torch.float64)
    for i, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert o.dtype == p.dtype and o.shape == p.shape
        factor = tolerances.BACKWARD if i else tolerances.FORWARD
        # under autocast the eps is that of the products' format
        allowed = factor * (p - e).abs().max() + tolerances.EPS[precision] * e.abs().max()
        assert (o - e).abs().max() <= allowed, i


def make(shape, n_out, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=g),
        torch.randn(n_out, shape[-1], generator=g),
        torch.randn(n_out, generator=g),
    )


def heads(ours, x, *parameters):
    """The three products one behind the other, [3, B, H, S, d]."""
    layers = []
    for w, b in zip(parameters[:3], parameters[3:], strict=True):
        layer = nn.Linear(*reversed(w.shape))
        del layer.weight, layer.bias
        layer.weight, layer.bias = w, b  # leaves of the test, not parameters
        layers.append(layer)
    if ours:
        return torch.stack(trained_heads(x, layers, 4))
    B, S, E = x.shape
    plain = [F.linear(x, m.weight, m.bias) for m in layers]
    return torch.stack([y.view(B, S, 4, E // 4).transpose(1, 2) for y in plain])


def head_inputs(B, S, E):
    made = [make((B, S, E), E, seed) for seed in range(3)]
    return made[0][0], *(m[1] / E**0.5 for m in made), *(m[2] for m in made)


@pytest.mark.parametrize(("B", "S", "E"), [(2, 37, 64), (1, 256, 512), (3, 1, 8)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_heads_against_float64(B, S, E, precision):
    assert_within_budget(heads, head_inputs(B, S, E), precision=precision)


def test_heads_under_autocast_are_one_product(monkeypatch):
    layers, x = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)), torch.randn(2, 7, 64)
    calls, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *a: calls.append(a[1].shape) or linear(*a))
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = trained_heads(x, layers, 4)
    assert calls == [(192, 64)]
    assert q.dtype == torch.bfloat16 and q.shape == (2, 4, 7, 16)
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    layers[1].requires_grad_(False)
    (q + k + v).float().sum().backward()
    assert layers[0].weight.grad.dtype == torch.float32 and layers[1].weight.grad is None
    assert layers[2].bias.grad.shape == (64,)


def test_heads_of_another_layer_class_are_called():
    """A wrapped or quantised layer has its own forward."""

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layers, x = [nn.Linear(8, 8), Doubled(8, 8), nn.Linear(8, 8)], torch.randn(1, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        _, k, _ = trained_heads(x, layers, 2)
        assert torch.equal(k.transpose(1, 2).reshape(1, 3, 8), layers[1](x))


def test_a_second_derivative_is_refused():
    layers, x = [nn.Linear(8, 8) for _ in range(3)], torch.randn(1, 3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        q, _, _ = trained_heads(x, layers, 2)
    (grad,) = torch.autograd.grad(q.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_layers_without_bias_and_an_empty_batch_are_torchs_own():
    layers = [nn.Linear(8, 8, bias=False) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        for x in (torch.randn(2, 3, 8), torch.randn(0, 3, 8)):
            q, _, v = trained_heads(x, layers, 2)
            assert q.shape == (len(x), 2, 3, 4) and torch.equal(
                v.transpose(1, 2).reshape(x.shape), layers[2](x)
            )


def test_compiles_with_its_backward():
    layers, x = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), torch.randn(2, 3, 8)

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = trained_heads(x, list(layers), 2)
        return (q * k + v).float().square().sum()

    loss(x).backward()
    expected = layers[1].weight.grad.clone()
    layers.zero_grad()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    found, eps = layers[1].weight.grad, tolerances.EPS[torch.bfloat16]
    assert (found - expected).abs().max() <= 4 * eps * expected.abs().max()
