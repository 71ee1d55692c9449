"""`vqfast.nn.VectorQuantizer` beside the classes that it stands for: the installed ones."""

import copy
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vqfast.nn import VectorQuantizer
from vqfast.testing import compare, tolerances

TAMING = ("taming.modules.vqvae.quantize", "VectorQuantizer2")
DIFFUSERS = ("diffusers.models.autoencoders.vae", "VectorQuantizer")  # taming's, copied


def observe(q, z, upstream):
    """Floats and indices of a call, its backward pass and the lookup of what it found."""
    dtype = q.embedding.weight.dtype
    x = z.to(dtype, copy=True).requires_grad_()
    z_q, loss, (_, encodings, indices) = q(x)
    assert encodings is None and z_q.is_contiguous()
    ((z_q * upstream.to(dtype)).sum() + loss).backward()
    # of a clone: theirs overwrites the extra id in its argument
    entry = q.get_codebook_entry(indices.reshape(-1).clone(), (2, 4, 5, 6)).detach()
    return [z_q, loss, x.grad, q.embedding.weight.grad, entry], indices


@pytest.mark.parametrize("where", [TAMING, DIFFUSERS], ids=["taming", "diffusers"])
@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "fixed"])
@pytest.mark.parametrize("sane", [True, False], ids=["sane", "flat"])
@pytest.mark.parametrize("unknown", [None, "random", "extra", 1])
def test_side_by_side(foreign, tmp_path, where, legacy, sane, unknown):
    path = None
    if unknown is not None:
        path = str(tmp_path / "used.npy")
        np.save(path, np.arange(0, 50, 3))
    arguments = (50, 6, 0.3, path, unknown or "random", sane, legacy)
    ours, theirs = VectorQuantizer(*arguments), foreign(*where)(*arguments)
    theirs.embedding.weight.data = F.normalize(torch.randn(50, 6), dim=1)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert ours.re_embed == theirs.re_embed
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    z, upstream = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)
    found = [observe(q, z, upstream) for q in (ours, theirs, copy.deepcopy(theirs).double())]
    (floats, indices), (plain, expected), (exact, _) = found
    if unknown == "random":  # drawn in another order
        assert indices.shape == expected.shape and indices.dtype == expected.dtype
        del floats[4]
    else:
        assert compare.exact_mismatches(indices, expected) == 0
    for i, out in enumerate(floats):
        factor = tolerances.BACKWARD if i in (2, 3) else tolerances.FORWARD
        assert out.dtype == plain[i].dtype
        assert compare.budget_ratio(out, plain[i], exact[i], factor) <= 1, i


def test_signatures_begin_with_tamings(foreign):
    for method in ("__init__", "forward", "get_codebook_entry"):
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(c, method)).parameters.values()]
            for c in (VectorQuantizer, foreign(*TAMING))
        )
        assert ours[: len(theirs)] == theirs


def test_z_q_has_the_layout_of_z():
    q, z = VectorQuantizer(70, 5, 0.25), torch.randn(2, 5, 3, 4)
    assert q(z)[0].is_contiguous()
    last = z.to(memory_format=torch.channels_last)
    assert q(last)[0].is_contiguous(memory_format=torch.channels_last)
