"""The GPT of VQGAN's second stage: taming's minGPT, with its parameter names.

Input tokens are [condition ; image codes] in one vocabulary with one learned position table. Blocks
are pre-LayerNorm, GELU is the exact erf form, the head is untied and has no bias.
Source: arXiv:2012.09841 section 3.2; CompVis/taming-transformers
taming/modules/transformer/mingpt.py.

Letters: E embedding width, S length of [condition ; codes] without its last token.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast import _check
from vqfast.nn.linear_cross_entropy import linear_cross_entropy
from vqfast.nn.trained_heads import trained_heads
from vqfast.ops.causal_attention import causal_attention

__all__ = ["GPT", "GPTConfig"]


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; the names are minGPT's.

    Args:
        vocab_size: V; condition tokens and image codes share it.
        block_size: most tokens that one pass may read, condition included, last token excluded.
        n_layer, n_head, n_embd: blocks, heads, width; n_head divides n_embd.
        embd_pdrop, resid_pdrop, attn_pdrop: dropout rates in training.
        n_unmasked: the first n_unmasked positions see one another in both directions.

    Raises:
        TypeError: a value of the wrong kind. ValueError: one out of range; the text names the key.
    """

    vocab_size: int
    block_size: int
    n_layer: int = 12
    n_head: int = 8
    n_embd: int = 256
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    n_unmasked: int = 0

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            _check.integer(name, getattr(self, name), low=1)
        _check.integer("n_unmasked", self.n_unmasked, low=0, high=self.block_size)
        for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
            _check.number(name, getattr(self, name), low=0, high=1, high_open=True)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head must divide n_embd = {self.n_embd}, got {self.n_head}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        """Strict inverse of `to_dict`: an unknown or missing key is a ValueError that names it."""
        fields = dataclasses.fields(cls)
        unknown = sorted(set(values) - {f.name for f in fields})
        if unknown:
            raise ValueError(f"unknown key of the transformer: {', '.join(unknown)}")
        needed = {f.name for f in fields if f.default is dataclasses.MISSING}
        if missing := sorted(needed - set(values)):
            raise ValueError(f"missing key of the transformer: {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class CausalSelfAttention(nn.Module):
    """Multi-head attention, [B, S, E] -> [B, S, E]; causal but for the first n_unmasked
    positions.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_unmasked = config.n_head, config.n_unmasked
        self.attn_pdrop = config.attn_pdrop
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_drop = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        B, S, E = x.shape
        # views, [B, H, S, d]: the kernel takes their strides
        q, k, v = trained_heads(x, (self.query, self.key, self.value), self.n_head)
        dropout = self.attn_pdrop if self.training else 0.0
        if dropout or self.n_unmasked:
            mask = torch.ones(S, S, dtype=torch.bool, device=x.device).tril()
            mask[: self.n_unmasked, : self.n_unmasked] = True
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            y = causal_attention(q, k, v)
        return self.resid_drop(self.proj(y.transpose(1, 2).reshape(B, S, E)))


class Block(nn.Module):
    """x + attention(ln1 x), then x + mlp(ln2 x)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        E = config.n_embd
        self.ln1 = nn.LayerNorm(E)
        self.ln2 = nn.LayerNorm(E)
        self.attn = CausalSelfAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, E), nn.Dropout(config.resid_pdrop)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """Decoder-only transformer over [condition ; image codes].

    State-dict keys: tok_emb.weight [V, E], pos_emb [1, block_size, E],
    blocks.i.{ln1,ln2,attn.{key,query,value,proj}, mlp.0,mlp.2}.{weight,bias}, ln_f.{weight,bias},
    head.weight [V, E].
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # _init draws; nn.Embedding's own draw would import half of torch when on the meta device
        empty = torch.empty(config.vocab_size, config.n_embd)
        self.tok_emb = nn.Embedding.from_pretrained(empty, freeze=False)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, config.n_embd))
        self.drop = nn.Dropout(config.embd_pdrop)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(_init)

    def forward(self, idx: Tensor, cond: Tensor) -> Tensor:
        """Teacher forcing: row t of the result predicts image token t.

        Args:
            idx: [B, T] int64 image codes; the last one is not read.
            cond: [B, Tc] int64 condition tokens, Tc >= 1.

        Returns:
            logits [B, T, V].

        Raises:
            TypeError: tokens are not integers. ValueError: shapes, devices or token ids are wrong,
                or Tc + T - 1 > block_size.
        """
        return self.head(self.features(idx, cond))

    def features(self, idx: Tensor, cond: Tensor) -> Tensor:
        """What the head reads, [B, T, E]; arguments and errors as `forward`."""
        self._check_tokens("idx", idx)
        self._check_tokens("cond", cond)
        T, Tc = idx.shape[1], cond.shape[1]
        if idx.shape[0] != cond.shape[0]:
            raise ValueError(f"cond must have the {idx.shape[0]} rows of idx, got {cond.shape[0]}")
        _check.same_device("cond", cond, "idx", idx)
        if Tc < 1:
            raise ValueError("cond must hold at least one token per row, got 0")
        if Tc + T - 1 > self.config.block_size:
            raise ValueError(
                f"cond and idx must fit block_size = {self.config.block_size}, "
                f"got {Tc} + {T} - 1 tokens"
            )
        tokens = torch.cat([cond, idx], dim=1)[:, :-1]  # [B, S]
        return self.ln_f(self.hidden(tokens)[:, Tc - 1 :])

    def hidden(self, tokens: Tensor) -> Tensor:
        """[B, S] token ids -> [B, S, E], the output of the last block."""
        x = self.tok_emb(tokens) + self.pos_emb[:, : tokens.shape[1]]
        return self.blocks(self.drop(x))

    def loss(
        self,
        idx: Tensor,
        cond: Tensor,
        *,
        pkeep: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the image tokens; the condition is read but never predicted.

        Args:
            idx, cond: as in `forward`.
            pkeep: probability that an image token is read as it is; else a uniform token of the
                vocabulary stands in its place. Targets stay clean. Only in training mode.
            generator: of the replacement; on its own device, so that a CPU generator gives the same
                draw on any device.

        Returns:
            scalar, in nats per token.

        Raises:
            ValueError: pkeep outside [0, 1], or as `forward`.
        """
        pkeep = _check.number("pkeep", pkeep, low=0, high=1)
        self._check_tokens("idx", idx)
        seen = idx
        if self.training and pkeep < 1:
            device = idx.device if generator is None else generator.device
            keep = torch.rand(idx.shape, generator=generator, device=device) < pkeep
            other = torch.randint(
                self.config.vocab_size, idx.shape, generator=generator, device=device
            )
            seen = torch.where(keep.to(idx.device), idx, other.to(idx.device))
        return linear_cross_entropy(self.features(seen, cond), self.head.weight, idx)

    def decay_groups(self, weight_decay: float = 0.01) -> list[dict[str, Any]]:
        """Two parameter groups for AdamW: the weights of Linear layers decay; all else does not."""
        linear = [m for m in self.modules() if isinstance(m, nn.Linear)]
        decayed = {id(m.weight) for m in linear}
        groups: tuple[list, list] = ([], [])
        for p in self.parameters():
            groups[id(p) not in decayed].append(p)
        return [
            {"params": groups[0], "weight_decay": weight_decay},
            {"params": groups[1], "weight_decay": 0.0},
        ]

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        _check.integer_tensor(name, tokens)
        _check.ndim(name, tokens, 2)
        V = self.config.vocab_size
        if tokens.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in tokens.aminmax())
            if low < 0 or high >= V:
                raise ValueError(f"{name} must hold token ids in 0..{V - 1}, got {low}..{high}")


def _init(module: nn.Module) -> None:
    """Weights N(0, 0.02); biases, LayerNorms and positions keep 0, (1, 0) and 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
