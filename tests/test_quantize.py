"""`quantize`: values, gradients against plain torch in float64, graphs, compilation."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

import vqfast
from vqfast import _dispatch
from vqfast.testing import compare, tolerances

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(z, codebook, indices, beta, legacy, metric):
    """The textbook in autograd: losses by detach, straight-through by z + (z_q - z).detach()."""
    if metric == "cosine":
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    z_q = F.embedding(indices, codebook)
    commitment, codes = (z_q.detach() - z).square().mean(), (z_q - z.detach()).square().mean()
    loss = commitment + beta * codes if legacy else beta * commitment + codes
    return z + (z_q - z).detach(), loss


def pull(outputs, z, codebook, upstream):
    """Values, and the gradients of sum(z_q * upstream) + 3 loss."""
    z_q, loss = outputs
    dz, dc = torch.autograd.grad((z_q * upstream).sum() + 3 * loss, (z, codebook))
    return {"z_q": z_q.detach(), "loss": loss.detach(), "dz": dz, "dc": dc}


def leaves(dtype, *tensors):
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("metric", "legacy"), list(itertools.product(("l2", "cosine", "dot"), (False, True)))
)
def test_values_and_gradients_keep_the_budget(each_backend, dtype, metric, legacy):
    for N, K, D in ((515, 7, 9), (65, 130, 33)):
        z, codebook, upstream = (
            t.to(dtype) for t in (normal(1, N, D), normal(2, K, D), normal(3, N, D))
        )
        ours = leaves(dtype, z, codebook)
        q = vqfast.quantize(*ours, beta=0.3, legacy=legacy, metric=metric)
        assert torch.equal(q.indices, vqfast.nearest(z, codebook, metric=metric))
        assert q.z_q.dtype == dtype and q.loss.dtype == torch.float32
        got = pull((q.z_q, q.loss), *ours, upstream)
        twins = []
        for kind in (dtype, torch.float64):
            pair = leaves(kind, z, codebook)
            twins.append(
                pull(plain(*pair, q.indices, 0.3, legacy, metric), *pair, upstream.to(kind))
            )
        for name, value in got.items():
            factor = tolerances.BACKWARD if name[0] == "d" else tolerances.FORWARD
            assert compare.budget_ratio(value, twins[0][name], twins[1][name], factor) <= 1, name


def test_gradient_near_the_codes_is_not_lost_in_rounding():
    # sums of differences, not differences of sums: z is within 1e-4 of a code of norm 1e3
    codebook = 1e3 + normal(1, 3, 4)
    z = codebook[torch.arange(300) % 3] + 1e-4 * normal(2, 300, 4)
    ours, exact = leaves(torch.float32, z, codebook), leaves(torch.float64, z, codebook)
    q = vqfast.quantize(*ours)
    found = torch.autograd.grad(q.loss, ours[1])[0].double()
    loss = plain(*exact, q.indices, 0.25, False, "l2")[1]
    expected = torch.autograd.grad(loss, exact[1])[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_z_q_is_the_code_itself_and_the_gradient_passes_straight_through():
    z, codebook = leaves(torch.float32, normal(1, 2, 3, 5, 8), 10 * normal(2, 4, 8))
    q = vqfast.quantize(z, codebook)
    assert q.z_q.shape == z.shape and q.indices.shape == z.shape[:-1]
    assert torch.equal(q.z_q, codebook[q.indices])
    grads = torch.autograd.grad(q.z_q.sum(), (z, codebook), allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(z))
    assert grads[1] is None or not grads[1].any()


def test_beta_lies_on_the_term_that_legacy_says():
    z, codebook = leaves(torch.float32, normal(1, 40, 6), normal(2, 9, 6))

    def grads(**options):
        return torch.autograd.grad(vqfast.quantize(z, codebook, **options).loss, (z, codebook))

    one = grads(beta=1.0)
    for legacy, which in ((False, 0), (True, 1)):
        scaled = grads(beta=0.5, legacy=legacy)
        torch.testing.assert_close(scaled[which], 0.5 * one[which])
        torch.testing.assert_close(scaled[1 - which], one[1 - which])


def test_only_what_is_asked_for_has_a_graph():
    z, codebook = leaves(torch.float32, normal(1, 6, 8), normal(2, 5, 8))
    free, fixed = (
        vqfast.quantize(z.detach(), codebook),
        vqfast.quantize(z.detach(), codebook.detach()),
    )
    assert free.loss.requires_grad and not free.z_q.requires_grad
    assert not fixed.loss.requires_grad and not fixed.z_q.requires_grad
    encoder = vqfast.quantize(z, codebook.detach())
    assert encoder.loss.requires_grad and encoder.z_q.requires_grad
    with torch.no_grad():
        assert not vqfast.quantize(z, codebook).loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(vqfast.quantize(z, codebook).indices, free.indices)


def test_ten_backward_passes_agree_bit_for_bit():
    z, codebook, upstream = normal(1, 3000, 8), normal(2, 3, 8), normal(3, 3000, 8)
    runs = []
    for _ in range(10):
        pair = leaves(torch.float32, z, codebook)
        q = vqfast.quantize(*pair)
        runs.append(pull((q.z_q, q.loss), *pair, upstream))
    assert all(torch.equal(runs[0][k], run[k]) for run in runs for k in run)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_float64_gradients_on_the_reference(metric):
    z, codebook = leaves(torch.float64, normal(1, 11, 5), normal(2, 6, 5))
    with vqfast.backend("reference"):

        def loss():
            return vqfast.quantize(z, codebook, beta=1.0, metric=metric).loss

        found = torch.autograd.grad(loss(), (z, codebook))
        for leaf, grad in zip((z, codebook), found, strict=True):
            numeric = torch.zeros_like(leaf)
            for at in range(leaf.numel()):
                ends = []
                for step in (1e-6, -1e-6):
                    leaf.data.view(-1)[at] += step
                    ends.append(loss().item())
                    leaf.data.view(-1)[at] -= step
                # the value moves through both terms, each gradient is of one
                numeric.view(-1)[at] = (ends[0] - ends[1]) / 2e-6 / 2
            torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-8)


def test_autocast_does_not_touch_the_search():
    z, codebook = normal(1, 300, 64), normal(2, 1000, 64) * 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        q = vqfast.quantize(z, codebook)
    assert torch.equal(q.indices, vqfast.nearest(z, codebook))
    assert q.loss.dtype == torch.float32
    half = vqfast.quantize(z.bfloat16(), codebook)
    assert half.z_q.dtype == torch.bfloat16
    assert torch.equal(half.indices, vqfast.nearest(z.bfloat16().float(), codebook))


def test_compiles_without_a_graph_break():
    def step(z, codebook):
        q = vqfast.quantize(z, codebook, beta=0.3)
        return q.z_q * 1, q.loss * 1, q.indices + 0

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    for N in (130, 257):
        upstream, results = normal(3, N, 8), []
        for call in (step, fast):
            pair = leaves(torch.float32, normal(1, N, 8), normal(2, 65, 8))
            z_q, loss, indices = call(*pair)
            results.append({"indices": indices, **pull((z_q, loss), *pair, upstream)})
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-6)


def test_second_derivatives_are_refused():
    z, codebook = leaves(torch.float32, normal(1, 6, 4), normal(2, 5, 4))
    first = torch.autograd.grad(vqfast.quantize(z, codebook).loss, z, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


def test_no_vectors_give_no_loss():
    z, codebook = leaves(torch.float32, torch.zeros(0, 4), normal(2, 5, 4))
    q = vqfast.quantize(z, codebook)
    q.loss.backward()
    assert q.loss.item() == 0 and q.indices.shape == (0,) and not codebook.grad.any()


def test_a_bad_row_shows_in_the_loss():
    z = normal(1, 6, 4)
    z[3, 1] = float("nan")
    q = vqfast.quantize(z, normal(2, 5, 4))
    assert q.indices[3] == 0 and q.loss.isnan()


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"beta": float("nan")}, ValueError, "beta.*nan"),
        ({"beta": -1.0}, ValueError, "beta.*-1"),
        ({"beta": "much"}, TypeError, "beta.*str"),
        ({"metric": "l3"}, ValueError, "metric.*l3"),
    ],
)
def test_wrong_options_name_what_came(options, kind, text):
    with pytest.raises(kind, match=text):
        vqfast.quantize(normal(1, 6, 4), normal(2, 5, 4), **options)


@pytest.mark.parametrize("metric", ("l2", "cosine", "dot"))
def test_rows_in_parts_give_the_bits_of_one_call(monkeypatch, each_backend, metric):
    g = torch.Generator().manual_seed(3)
    z, codebook = torch.randn(150, 6, generator=g), torch.randn(40, 6, generator=g)
    z[5] = float("nan")
    counted = importlib.import_module("vqfast.ops.quantize").counted
    settings = {"beta": 0.3, "legacy": False, "metric": metric}
    whole, counts = counted(z, codebook, **settings)
    calls = []
    search = importlib.import_module("vqfast.ops.nearest")
    monkeypatch.setattr(search, "rows_of_a_call", lambda codebook: calls.append(1) or 64)
    parts, counts_of_parts = counted(z, codebook, **settings)
    assert calls
    for a, b in zip((*whole, counts), (*parts, counts_of_parts), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) and a.dtype == b.dtype
    assert torch.equal(counts, torch.bincount(whole.indices, minlength=40))
    with _dispatch.backend("reference"):
        right = counted(z, codebook, **settings)[1]
    assert torch.equal(counts, right)
