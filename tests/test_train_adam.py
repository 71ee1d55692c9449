"""The optimizer of stage 1: torch's Adam, in whatever layout weights and gradients are."""

import pytest
import torch

from vqfast.train.adam import Adam

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("of_weight", LAYOUTS, ids=str)
@pytest.mark.parametrize("of_gradient", LAYOUTS, ids=str)
def test_steps_are_those_of_torch_in_every_layout(of_weight, of_gradient):
    g = torch.Generator().manual_seed(0)
    start, bias = torch.randn(6, 5, 3, 3, generator=g), torch.randn(6, generator=g)
    found = []
    for make in (Adam, lambda p, **o: torch.optim.Adam(p, foreach=False, **o)):
        # clones: a mere change of layout may share memory
        weights = [start.clone(memory_format=torch.contiguous_format), bias.clone()]
        weights[0] = weights[0].to(memory_format=of_weight)
        weights = [torch.nn.Parameter(w) for w in weights]
        optimizer = make(weights, lr=1e-2, betas=(0.5, 0.9))
        for step in range(3):
            noise = torch.Generator().manual_seed(step)
            for w in weights:
                w.grad = torch.randn(w.shape, generator=noise)
            weights[0].grad = weights[0].grad.to(memory_format=of_gradient)
            optimizer.step()
        moments = [optimizer.state[w][name] for w in weights for name in ("exp_avg", "exp_avg_sq")]
        assert moments[0].stride() == weights[0].stride()
        found.append([*(w.detach() for w in weights), *moments])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
