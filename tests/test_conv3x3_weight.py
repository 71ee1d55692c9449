"""What int16 factors and large tiles of ops.conv3x3_weight must not spoil: operands of any size,
NaN, exact sums.
"""

import pytest
import torch
from torch.nn.grad import conv2d_weight

from vqfast.ops import conv3x3_weight
from vqfast.testing import compare, tolerances

# several blocks of tiles, the last not full; more than one panel; no multiples of a tile
B, C, OUTS, H, W = 2, 70, 40, 33, 47
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def operands(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, C, H, W, generator=g), torch.randn(B, OUTS, H, W, generator=g)


def ratio(x, grad, dtype=torch.bfloat16):
    """Our error over what is allowed, the larger of dw and db, also of results in float32."""
    x, grad = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, grad))
    shape = (grad.shape[1], x.shape[1], 3, 3)
    plain = conv2d_weight(x, shape, grad, padding=1), grad.sum((0, 2, 3))
    exact = conv2d_weight(x.double(), shape, grad.double(), padding=1), grad.double().sum((0, 2, 3))
    worst = 0.0
    for results in (dtype, torch.float32):
        ours = conv3x3_weight(x, grad, dtype=results)
        for out, torch_out, right in zip(ours, plain, exact, strict=True):
            found = compare.budget_ratio(out, torch_out, right, tolerances.BACKWARD)
            worst = max(worst, found)
    return worst


@pytest.mark.parametrize("spread", [1e1, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("along", ["image", "position", "channel"])
def test_large_inputs_with_small_gradients_keep_the_others(along, spread, each_isa):
    x, grad = operands()
    if along == "image":
        size = torch.tensor([spread, 1 / spread]).view(2, 1, 1, 1)
    elif along == "position":
        size = (spread ** torch.linspace(-1, 1, H * W)).view(1, 1, H, W)
    else:
        order = torch.randperm(C, generator=torch.Generator().manual_seed(1))
        x = x * (spread ** torch.linspace(-1, 0, C)[order]).view(1, C, 1, 1)
        size = torch.ones(1)
    assert ratio(x * size, grad / size) <= 1


@pytest.mark.parametrize("power", [-36, -20, -8, 8, 18, 30])
def test_operands_of_any_magnitude(power, each_isa):
    x, grad = operands()
    assert ratio(x * 10.0**power, grad) <= 1
    assert ratio(x, grad * 10.0**power) <= 1
    assert ratio(x * 10.0**power, grad * 10.0**-power) <= 1


@pytest.mark.parametrize("name", ["aligned", "one tile", "one channel", "checkered", "no gradient"])
def test_sums_as_large_as_they_can_be_do_not_overflow(name, each_isa):
    x, grad = operands()
    if name == "aligned":  # every product has one sign, all of one size
        x, grad = torch.full_like(x, 3.0), torch.full_like(grad, 0.25)
    if name == "one tile":
        mask = torch.zeros(H, W)
        mask[8:12, 20:24] = 1
        x, grad = x * mask, grad * mask
    if name == "one channel":
        x[:, 1:], grad[:, 1:] = 0, 0
    if name == "checkered":
        signs = (torch.arange(H)[:, None] + torch.arange(W)) % 2 * 2 - 1
        x, grad = x.abs() * signs, grad.abs() * signs
    if name == "no gradient":
        grad[:, :, :, :24] = 0
    assert ratio(x, grad) <= 1


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_channel_alone(value, dtype, each_isa):
    x, grad = (t.to(dtype) for t in operands())
    clean, bias = conv3x3_weight(x, grad)
    x[1, 37, 20, 11] = value
    dw, db = conv3x3_weight(x, grad)
    assert not dw[:, 37].isfinite().any()
    assert torch.equal(db, bias)
    others = [c for c in range(C) if c != 37]
    error = (dw[:, others].double() - clean[:, others].double()).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * clean.abs().max()


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_spoils_its_output_alone(value, dtype, each_isa):
    x, grad = (t.to(dtype) for t in operands())
    clean, bias = conv3x3_weight(x, grad)
    grad[0, 33, 32, 46] = value
    dw, db = conv3x3_weight(x, grad)
    assert not dw[33].isfinite().all()
    assert not db[33].isfinite()
    others = [o for o in range(OUTS) if o != 33]
    error = (dw[others].double() - clean[others].double()).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * clean.abs().max()
    assert torch.equal(db[others], bias[others])


@BOTH
def test_zeros_give_zeros(dtype, each_isa):
    x, grad = (t.to(dtype) for t in operands())
    dw, db = conv3x3_weight(x, torch.zeros_like(grad))
    assert not dw.any()
    assert not db.any()
    dw, db = conv3x3_weight(torch.zeros_like(x), grad)
    assert not dw.any()
    assert db.all()


# one image of 128 x 128 has as many positions as float32 needs for large tiles
@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("name", ["normal", "heavy tails", "few gradients"])
def test_float32_keeps_its_budget_in_small_and_large_tiles(name, side, each_isa):
    g = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(1, 32, side, side, generator=g) for _ in range(2))
    if name == "heavy tails":
        x, grad = x**3, grad**3
    if name == "few gradients":
        grad = grad * (torch.rand(1, 1, side, side, generator=g) < 0.1)
    assert ratio(x, grad, torch.float32) <= 1


# of positions: one as there are many outputs, and four
@BOTH
@pytest.mark.parametrize(("height", "outs"), [(130, 300), (258, 40)], ids=["one span", "spans"])
def test_results_do_not_depend_on_the_threads(height, outs, dtype, each_isa):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, 40, height, 129, generator=g).to(dtype)
    grad = torch.randn(1, outs, height, 129, generator=g).to(dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(conv3x3_weight(x, grad))
    finally:
        torch.set_num_threads(before)
    for dw, db in runs[1:]:
        assert torch.equal(dw, runs[0][0])
        assert torch.equal(db, runs[0][1])


@BOTH
def test_sums_of_several_spans_keep_the_budget(dtype, each_isa):
    g = torch.Generator().manual_seed(4)
    x, grad = (torch.randn(1, 34, 258, 129, generator=g) for _ in range(2))
    assert ratio(x + 1, grad, dtype) <= 1
