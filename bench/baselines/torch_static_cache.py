"""A decoding loop as gpt-fast writes it, for the weights of a vqfast.GPT: static buffers of keys
and values, fused query-key-value, and one compiled function per step that ends with the drawn token
(on CUDA replayed as a graph). Plain torch; attention reads the whole buffer under a mask.

Before it is timed in float32, its greedy tokens are held against the full pass of the model.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqfast import GPT

MEASURES = ("generate",)
TOP_K = 100
_CHECKED = 4  # tokens
_GREEDY = 1e-5  # a temperature, as gpt-fast has it


def version() -> str:
    return f"torch {torch.__version__}"


class StaticCache(nn.Module):
    """Draws one token after another for `batch` sequences of at most block_size tokens.

    Args:
        gpt: its weights are shared where dtype is theirs, else converted.
        batch, dtype: of the buffers.
    """

    def __init__(self, gpt: GPT, batch: int, dtype: torch.dtype):
        super().__init__()
        c, device = gpt.config, gpt.tok_emb.weight.device
        with torch.device("meta"):
            self.net = GPT(c).eval()
        state = {k: v.to(dtype) for k, v in gpt.state_dict().items()}
        self.net.load_state_dict(state, assign=True)
        self.qkv = nn.ModuleList(_fused(block.attn) for block in self.net.blocks)
        self.requires_grad_(False)
        shape = (batch, c.n_head, c.block_size, c.n_embd // c.n_head)
        # one buffer per layer: writes into slices of a larger one were compiled to copies of it all
        for name in (f"{kind}{layer}" for layer in range(c.n_layer) for kind in "kv"):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        seen = torch.ones(c.block_size, c.block_size, dtype=torch.bool, device=device).tril()
        self.register_buffer("seen", seen)

    def forward(self, token: Tensor, at: Tensor, temperature: Tensor) -> Tensor:
        """token [B, 1] at position at [1] -> the next one [B, 1]."""
        net, B = self.net, len(token)
        x = net.tok_emb(token) + net.pos_emb[0, at]  # [B, 1, E]
        mask = self.seen[None, None, at]  # [1, 1, 1, S]
        for layer, block in enumerate(net.blocks):
            qkv = self.qkv[layer](block.ln1(x)).view(B, 1, 3, net.config.n_head, -1)
            q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # [B, H, 1, d]
            keys, values = getattr(self, f"k{layer}"), getattr(self, f"v{layer}")
            keys[:, :, at] = k
            values[:, :, at] = v
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + block.attn.proj(y.transpose(1, 2).reshape(B, 1, -1))
            x = x + block.mlp(block.ln2(x))
        logits = net.head(net.ln_f(x))[:, 0].float() / temperature  # [B, V]
        least = logits.topk(min(TOP_K, logits.shape[1])).values[:, -1:]
        p = torch.where(logits < least, -torch.inf, logits).softmax(-1)
        # a draw without the synchronisation of torch.multinomial
        return (p / torch.empty_like(p).exponential_(1)).argmax(-1, keepdim=True)


def _fused(attention: nn.Module) -> nn.Linear:
    """Query, key and value as one layer; the three are dropped."""
    parts = (attention.query, attention.key, attention.value)
    fused = nn.Linear(1, 1, device="meta")
    fused.weight = nn.Parameter(torch.cat([p.weight for p in parts]), requires_grad=False)
    fused.bias = nn.Parameter(torch.cat([p.bias for p in parts]), requires_grad=False)
    del attention.query, attention.key, attention.value
    return fused


@torch.no_grad()
def generate(step: Any, cond: Tensor, n: int, temperature: float = 1.0) -> Tensor:
    """n tokens after cond [B, Tc] by a StaticCache, compiled or not -> [B, n]."""
    at = torch.zeros(1, dtype=torch.int64, device=cond.device)
    heat = torch.full((1,), temperature, device=cond.device)
    drawn = []
    # as gpt-fast does: for one query the compiler's own kernels beat those of the library
    plain = sdpa_kernel(SDPBackend.MATH) if cond.is_cuda else contextlib.nullcontext()
    with plain:
        for t in range(cond.shape[1] - 1 + n):
            token = cond[:, t : t + 1] if t < cond.shape[1] else drawn[-1]
            token = step(token.contiguous(), at, heat).clone()  # a graph writes over its output
            at += 1
            if t >= cond.shape[1] - 1:
                drawn.append(token)
    return torch.cat(drawn, 1)


def make(measure: str, case: Any, inputs: tuple) -> Any:
    gpt, cond = inputs
    dtype = torch.float32 if case.dtype == "fp32" else torch.bfloat16
    mode = "reduce-overhead" if case.device.startswith("cuda") else None
    step = torch.compile(
        StaticCache(gpt, len(cond), dtype), mode=mode, fullgraph=True, dynamic=False
    )
    codes = generate(step, cond, _CHECKED, _GREEDY)
    if dtype == torch.float32:  # in bfloat16 rounding decides between close logits
        with torch.no_grad():
            wrong = int((gpt(codes, cond).argmax(-1) != codes).sum())
        if wrong:
            raise RuntimeError(f"{wrong} of {codes.numel()} greedy tokens are not the model's")
    return lambda n: generate(step, cond, n)
