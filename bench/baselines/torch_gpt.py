"""The GPT of the second stage in plain torch, trained eagerly: nn.Linear, LayerNorm, exact GELU,
scaled_dot_product_attention(is_causal), F.cross_entropy and the fused AdamW. Parameter names are
ours, so that it starts from the same weights.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import Unsuitable

MEASURES = ("train_transformer",)


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Callable[[], Tensor]:
    gpt, idx, cond = inputs
    return training_step(network(gpt, case.device), case, idx, cond)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, S, E = x.shape
        q, k, v = (
            layer(x).view(B, S, self.heads, E // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, S, E))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class _GPT(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        E = config.n_embd
        self.tok_emb = nn.Embedding(config.vocab_size, E)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, E))
        self.blocks = nn.Sequential(*(_Block(E, config.n_head) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(E)
        self.head = nn.Linear(E, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_emb(tokens) + self.pos_emb[:, : tokens.shape[1]]
        return self.head(self.ln_f(self.blocks(x)))


def network(gpt: Any, device: str) -> nn.Module:
    """The network with the weights of a vqfast.GPT."""
    model = _GPT(gpt.config)
    model.load_state_dict(gpt.state_dict())
    return model.to(device).train()


def training_step(
    model: Callable[[Tensor], Tensor], case: Any, idx: Tensor, cond: Tensor
) -> Callable[[], Tensor]:
    """One step on logits = model(tokens); its loss is that before the update."""
    if case.dtype not in ("fp32", "bf16"):
        raise Unsuitable("trains in fp32 and bf16")
    weights = list(model.parameters())  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.cat([cond, idx], 1)[:, :-1].to(case.device)
    targets, first = idx.flatten().to(case.device), cond.shape[1] - 1

    def step() -> Tensor:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bf16"):
            logits = model(tokens)[:, first:]
            loss = F.cross_entropy(logits.flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step.same_weights = True  # type: ignore[attr-defined]
    return step
