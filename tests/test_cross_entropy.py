"""What is special to the token loss: large offsets, hostile logits, targets out of range."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vqfast.ops import cross_entropy
from vqfast.testing import compare, tolerances

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(N, V, dtype=torch.float32, offset=0.0):
    g = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(N, V, generator=g) + offset
    return logits.to(dtype), torch.randint(V, (N,), generator=g)


def results(function, logits, targets, dtype, reduction):
    x = logits.to(dtype, copy=True).requires_grad_()
    loss = function(x, targets, reduction=reduction)
    return loss.detach(), torch.autograd.grad(1.7 * loss.sum(), x)[0]


def assert_within_budget(logits, targets, reduction="mean"):
    dtype = logits.dtype
    ours = results(cross_entropy, logits, targets, dtype, reduction)
    plain = results(F.cross_entropy, logits, targets, dtype, reduction)
    exact = results(F.cross_entropy, logits, targets, torch.float64, reduction)
    factors = (tolerances.FORWARD, tolerances.BACKWARD)
    for o, p, e, factor in zip(ours, plain, exact, factors, strict=True):
        assert compare.budget_ratio(o, p, e, factor) <= 1
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 7, 16, 17, 1024, 5001, 16384])
def test_error_against_float64(V, dtype, each_backend):
    assert_within_budget(*make(9, V, dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, each_isa):
    assert_within_budget(*make(33, 259), reduction)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_costs_no_digits(offset, each_backend):
    logits, targets = make(17, 300)
    logits = logits.round(decimals=0)  # so that the offset is added exactly
    loss, grad = results(cross_entropy, logits, targets, torch.float32, "none")
    moved = results(cross_entropy, logits + offset, targets, torch.float32, "none")
    assert torch.equal(moved[0], loss) and torch.equal(moved[1], grad)


def test_impossible_tokens_and_an_impossible_target(each_backend):
    logits, targets = make(4, 40)
    logits[:, 20:] = -math.inf
    targets = targets % 20
    targets[3] = 30
    loss, grad = results(cross_entropy, logits, targets, torch.float32, "none")
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert loss[3] == math.inf and not grad[:3, 20:].any() and grad.isfinite().all()


def test_nan_stays_in_its_row(each_backend):
    logits, targets = make(5, 70)
    clean = results(cross_entropy, logits, targets, torch.float32, "none")
    logits[2, 3] = math.nan
    loss, grad = results(cross_entropy, logits, targets, torch.float32, "none")
    others = [0, 1, 3, 4]
    assert loss[2].isnan() and grad[2].isnan().all()
    assert torch.equal(loss[others], clean[0][others])
    assert torch.equal(grad[others], clean[1][others])


def test_leading_dims_and_views(each_backend):
    logits, targets = make(12, 30)
    cube = logits.view(3, 4, 30).transpose(0, 1)  # not contiguous
    loss = cross_entropy(cube, targets.view(3, 4).t(), reduction="none")
    assert loss.shape == (4, 3)
    flat = cross_entropy(logits, targets.int(), reduction="none")
    assert torch.equal(loss, flat.view(3, 4).t())


@pytest.mark.parametrize("bad", [-1, 10, -100, 2**40])
def test_target_out_of_range(bad):
    logits, targets = make(6, 10)
    targets[4] = bad
    with pytest.raises(ValueError, match=rf"targets .*0\.\.9.*{bad}"):
        cross_entropy(logits, targets)


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_the_raw_op_gives_nan_for_a_target_out_of_range(bad, each_backend):
    logits, targets = make(3, 10)
    targets[1] = bad
    loss, top, log_sum = torch.ops.vqfast.cross_entropy(logits, targets)
    assert loss.isnan().tolist() == [False, True, False]
    grad = torch.ops.vqfast.cross_entropy_backward(torch.ones(3), logits, targets, top, log_sum)
    torch.testing.assert_close(grad[1], logits[1].softmax(0))  # no one-hot term


def test_empty_batch(each_backend):
    logits = torch.empty(0, 7, requires_grad=True)
    loss = cross_entropy(logits, torch.empty(0, dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, 7)


def test_gradcheck_in_float64():
    logits, targets = make(4, 6)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), (logits,))


def test_compiles_with_its_backward():
    logits, targets = make(8, 20)
    logits.requires_grad_()

    def step(x, t):
        return cross_entropy(x * 2, t)

    (expected,) = torch.autograd.grad(step(logits, targets), logits)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(logits, targets), logits)
    assert torch.equal(found, expected)


def test_fake_and_meta_tensors_have_no_data_to_check():
    with FakeTensorMode():
        loss = cross_entropy(torch.empty(5, 7), torch.empty(5, dtype=torch.int64))
    assert loss.shape == ()
    meta = cross_entropy(
        torch.empty(5, 7, device="meta"),
        torch.empty(5, device="meta", dtype=torch.int64),
        reduction="none",
    )
    assert meta.shape == (5,) and meta.device.type == "meta"


L, TARGETS = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "reduction", "kind", "words"),
    [
        (([1.0], TARGETS), "mean", TypeError, "logits .*list"),
        ((L.long(), TARGETS), "mean", TypeError, "logits .*int64"),
        ((L, TARGETS.float()), "mean", TypeError, "targets .*float32"),
        ((L, TARGETS[:2]), "mean", ValueError, r"targets .*\[3\].*\[2\]"),
        ((L, TARGETS.to("meta")), "mean", ValueError, "targets .*meta"),
        ((L[:, :0], TARGETS), "mean", ValueError, "V >= 1"),
        ((L, TARGETS), "median", ValueError, "reduction .*median"),
    ],
)
def test_bad_arguments_are_named(arguments, reduction, kind, words):
    with pytest.raises(kind, match=words):
        cross_entropy(*arguments, reduction=reduction)
