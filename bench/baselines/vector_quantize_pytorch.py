"""lucidrains' VectorQuantize: the search in eval mode; forward and backward in training mode; the
moving averages by one-hot matrices.

Forward and backward with a learnable codebook, as its authors advise for gradients instead of
moving averages.
"""

from typing import Any

import torch

from baselines import Unsuitable

MEASURES = ("nearest", "quantize", "ema_stats", "ema_update")
_MAX_BYTES = 8 << 30


def version() -> str:
    from importlib.metadata import version as installed

    import vector_quantize_pytorch  # noqa: F401  is it importable?

    return f"vector-quantize-pytorch {installed('vector-quantize-pytorch')}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    from vector_quantize_pytorch import VectorQuantize

    if measure == "ema_stats":
        return _one_hot_sums(*inputs)
    if measure == "ema_update":
        return _moving_averages(*inputs)
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


def _one_hot_sums(z: torch.Tensor, order: torch.Tensor, start: torch.Tensor) -> Any:
    """Lines 1 to 3 of its `track_cluster_size_and_embed_avg`, and the one-hot matrix it takes."""
    K = len(start) - 1
    if (8 + 4) * len(z) * K > _MAX_BYTES:
        raise Unsuitable("its one-hot matrices are over 8 GiB")
    owner = torch.repeat_interleave(torch.arange(K, device=z.device), start.diff())
    indices = torch.empty_like(order).scatter(0, order, owner)[None]

    @torch.no_grad()
    def sums() -> tuple:
        one_hot = torch.nn.functional.one_hot(indices, K).type(torch.float32)
        total = torch.einsum("h n d, h n c -> h c d", z.float()[None], one_hot)
        return one_hot.sum(dim=1), total.contiguous()

    return sums


def _moving_averages(
    cluster_size: torch.Tensor, embed_avg: torch.Tensor, weight: torch.Tensor,
    packed: torch.Tensor, decay: float, eps: float,
) -> Any:  # fmt: skip
    """Its `ema_inplace` on both averages, then its `update_ema`."""
    from vector_quantize_pytorch import VectorQuantize
    from vector_quantize_pytorch.vector_quantize_pytorch import ema_inplace

    K, D = weight.shape
    book = VectorQuantize(dim=D, codebook_size=K, decay=decay, eps=eps).to(weight.device)._codebook
    book.cluster_size.copy_(cluster_size[None])
    book.embed_avg.copy_(embed_avg[None])
    counts, sums = packed[None, :, -1].contiguous(), packed[None, :, :-1].contiguous()

    @torch.no_grad()
    def step() -> None:
        ema_inplace(book.cluster_size, counts, decay)
        ema_inplace(book.embed_avg, sums, decay)
        book.update_ema()

    return step


@torch.no_grad()
def _search(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)[1][0]
