"""What a refusal of a C++ kernel may ask: the inputs, and nothing past them."""

import pytest
import torch

from vqfast import _native

pytestmark = pytest.mark.skipif(_native.load() is None, reason="native library not built")


def conv3x3_views(side):
    x, weight = torch.zeros(1, side, side, 64), torch.zeros(64, 3, 3, 64)
    return [_native._view(t) for t in (x, weight, torch.zeros(64), None)]


def test_a_refusal_says_its_reason_or_nothing():
    refuse = _native.load().refuse
    assert refuse("conv3x3", conv3x3_views(16), [1]) == ""
    assert refuse("conv3x3", conv3x3_views(4), [1]) == "fewer than 64 positions of the result"


@pytest.mark.parametrize(
    ("tensors", "scalars", "message"),
    [(2, [1], "input 2 of 2"), (3, [1], "input 3 of 3"), (4, [], "input 0 of 0")],
)
def test_a_refusal_that_reads_past_the_inputs_raises(tensors, scalars, message):
    """An output, to a refusal, is a tensor that it was not given."""
    views = conv3x3_views(16)[:tensors]
    with pytest.raises(IndexError, match=message):
        _native.load().refuse("conv3x3", views, scalars)
