"""lucidrains' VectorQuantize: the search in eval mode; forward and backward in training mode.

With a learnable codebook, as its authors advise for gradients instead of moving averages.
"""

from typing import Any

import torch

from baselines import Unsuitable

MEASURES = ("nearest", "quantize")
_MAX_BYTES = 8 << 30


def version() -> str:
    from importlib.metadata import version as installed

    import vector_quantize_pytorch  # noqa: F401  is it importable?

    return f"vector-quantize-pytorch {installed('vector-quantize-pytorch')}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    from vector_quantize_pytorch import VectorQuantize

    z, codebook, *rest = inputs
    if measure == "nearest" and rest[0] != 0:
        raise Unsuitable("measured with l2 only")
    if 4 * 4 * len(z) * len(codebook) > _MAX_BYTES:
        raise Unsuitable("its N x K matrices are over 8 GiB")
    train = measure == "quantize"
    module = VectorQuantize(
        dim=codebook.shape[1],
        codebook_size=len(codebook),
        learnable_codebook=train,
        ema_update=not train,
    ).to(z.device)
    with torch.no_grad():
        module._codebook.embed.copy_(codebook.float()[None])
        module._codebook.initted.fill_(True)
    module.train(train)
    x = z.float()[None]
    if not train:
        with torch.no_grad():
            module(x)
        return lambda: _search(module, x)
    (upstream,) = rest
    x = x.clone().requires_grad_()

    def step() -> torch.Tensor:
        x.grad = None
        module.zero_grad()
        z_q, indices, loss = module(x)
        torch.autograd.backward((z_q, loss.sum()), (upstream[None], torch.ones_like(loss.sum())))
        return indices[0]

    return step


@torch.no_grad()
def _search(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)[1][0]
