"""RAPIDS cuVS brute force with k = 1, the index built beforehand. Its memory is not torch's, so the
memory column does not see it.
"""

from typing import Any

import torch

from baselines import Unsuitable

MEASURES = ("nearest",)
DEVICES = ("cuda",)


def version() -> str:
    import cuvs
    from cuvs.neighbors import brute_force  # noqa: F401  is it importable?

    return f"cuvs {cuvs.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    from cuvs.neighbors import brute_force

    z, codebook, metric = inputs
    if metric != 0:
        raise Unsuitable("l2 only")
    dtype = torch.float16 if z.dtype == torch.float16 else torch.float32
    rows, codes = z.to(dtype).contiguous(), codebook.to(dtype).contiguous()
    index = brute_force.build(codes, metric="sqeuclidean")

    def search(kept: Any = codes) -> torch.Tensor:  # the index may refer to its data
        neighbors = brute_force.search(index, rows, 1)[1]
        return torch.as_tensor(neighbors, device=rows.device)[:, 0]

    return search
