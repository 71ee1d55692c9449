"""faiss GpuIndexFlatL2 with k = 1 on tensors of the GPU, the index built beforehand."""

from typing import Any

import torch

from baselines import Unsuitable

MEASURES = ("nearest",)
DEVICES = ("cuda",)


def version() -> str:
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError(f"faiss {faiss.__version__} is built without GPU support")
    return f"faiss {faiss.__version__} GPU"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    import faiss
    import faiss.contrib.torch_utils  # noqa: F401  lets faiss take tensors

    z, codebook, metric = inputs
    if metric != 0:
        raise Unsuitable("l2 only")
    rows, codes = z.float().contiguous(), codebook.float().contiguous()
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexFlatL2(resources, codes.shape[1])
    index.add(codes)

    def search(kept: Any = resources) -> torch.Tensor:  # the index needs its resources alive
        return index.search(rows, 1)[1][:, 0]

    return search
