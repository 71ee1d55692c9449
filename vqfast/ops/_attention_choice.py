"""On a GPU: whether attention runs on our kernel or on torch's, by what was measured.

`attention_measured.json` is the table, `python bench/gpu_attention.py --measure --write` fills it.
A row says that for an op, on GPUs of a compute capability, for a dtype, a head dim d, and T of at
least `T_from` and at most `T_to`, torch's scaled_dot_product_attention was faster in a pass:
"forward", without gradients, or "training", forward and backward together. What has no row runs on
ours, which keeps what torch's does not: future slots that hold NaN never show, and gradients are
equal from run to run. A forced backend runs ours whatever the table says.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from vqfast._dispatch import forced_backend

TABLE = Path(__file__).with_name("attention_measured.json")
PASSES = ("forward", "training")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # others go to the reference, chunked


def read(path: Path = TABLE) -> tuple[tuple, ...]:
    """("causal_attention", (major, minor), "bfloat16", d, T_from, T_to, pass) of each row.

    Raises:
        ValueError: a row that says nothing: no such pass or dtype, or an empty range.
    """
    found = []
    for row in json.loads(path.read_text())["torch"]:
        known = row["pass"] in PASSES and row["dtype"] in ("float32", "float16", "bfloat16")
        if not known or not 1 <= row["T_from"] <= row["T_to"]:
            raise ValueError(f"{path.name}: not a row of the table: {row}")
        key = (row["op"], tuple(row["capability"]), row["dtype"], row["d"])
        found.append((*key, row["T_from"], row["T_to"], row["pass"]))
    return tuple(found)


TORCH = read()


def capability(t: Tensor) -> tuple[int, int] | None:
    """Compute capability of the GPU of t; None off a GPU, where there is nothing to choose."""
    return torch.cuda.get_device_capability(t.device) if t.is_cuda else None


def takes_torch(op: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these inputs of an op go to torch's scaled_dot_product_attention."""
    gpu = capability(q)
    if gpu is None or forced_backend() is not None or q.dtype not in _DTYPES or q.numel() == 0:
        return False
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    case = (op, gpu, str(q.dtype).removeprefix("torch."), q.shape[3])
    for *key, low, high, what in TORCH:
        if tuple(key) == case and low <= q.shape[2] <= high and what == PASSES[trains]:
            return True
    return False


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """scaled_dot_product_attention, in the dtype of q also under autocast."""
    with torch.autocast(q.device.type, enabled=False):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale
        )
