"""Packs the weights of a GPT for `decode_step`: float32, bfloat16, int8 per row or int4 per group.

    pack_gpt   GPT -> Packed, the arguments of the op
    PackedGPT  the same as a module that can be saved, loaded, moved and sampled from

The layout is described in vqfast/ops/_packed.py. Embeddings, biases and LayerNorms stay float32:
they are looked up or tiny. Everything is a copy, so a packed model does not follow later changes of
the GPT.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqfast import _check
from vqfast.checkpoints import fit
from vqfast.engine._memory import empty_bytes
from vqfast.errors import CheckpointError
from vqfast.models.gpt import GPT, GPTConfig
from vqfast.ops._packed import LAYOUT, matrix_bytes, pack_matrix, unpack
from vqfast.ops.decode_step import VECTORS_PER_LAYER, matrices

BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}


class Packed(NamedTuple):
    """Arguments of `decode_step`, in its order."""

    tok_emb: Tensor  # [V, E] float32
    pos_emb: Tensor  # [S, E] float32
    vectors: Tensor  # [n] float32
    weights: Tensor  # [bytes] uint8


def _matrix_names(L: int) -> list[tuple[str, ...]]:
    """Modules of a GPT whose weights, one below the other, are a matrix of `matrices`; in order."""
    names: list[tuple[str, ...]] = []
    for i in range(L):
        at = f"blocks.{i}."
        names.append(tuple(f"{at}attn.{part}" for part in ("query", "key", "value")))
        names += [(f"{at}attn.proj",), (f"{at}mlp.0",), (f"{at}mlp.2",)]
    return [*names, ("head",)]


def _vector_names(L: int) -> list[str]:
    """Parameters of a GPT that follow one another in `vectors`."""
    parts = (
        "ln1.weight", "ln1.bias", "attn.query.bias", "attn.key.bias", "attn.value.bias",
        "attn.proj.bias", "ln2.weight", "ln2.bias", "mlp.0.bias", "mlp.2.bias",
    )  # fmt: skip
    names = [f"blocks.{i}.{part}" for i in range(L) for part in parts]
    return [*names, "ln_f.weight", "ln_f.bias"]


def _sizes(config: GPTConfig, bits: int) -> list[int]:
    """Bytes of every packed matrix."""
    shapes = matrices(config.n_layer, config.n_embd, config.vocab_size)
    return [matrix_bytes(*shape, bits) for shape in shapes]


@torch.no_grad()
def pack_gpt(gpt: GPT, precision: str) -> Packed:
    """All weights of a GPT in one format, on its device.

    Args:
        gpt: read, never changed.
        precision: "fp32", "bf16", "int8" or "int4".
    """
    bits, L = BITS[precision], gpt.config.n_layer
    sizes = _sizes(gpt.config, bits)
    device = gpt.tok_emb.weight.device
    weights = empty_bytes(sum(sizes), device)
    for names, place in zip(_matrix_names(L), weights.split(sizes), strict=True):
        matrix = torch.cat([gpt.get_parameter(f"{name}.weight") for name in names])
        place.copy_(pack_matrix(matrix.float(), bits))
    return Packed(
        gpt.tok_emb.weight.float().clone(),
        gpt.pos_emb[0].float().clone(),
        torch.cat([gpt.get_parameter(name).float() for name in _vector_names(L)]),
        weights,
    )


class PackedGPT(nn.Module):
    """A GPT whose weights are packed in one precision, as `decode_step` reads them.

    Its state is `Packed`: tok_emb [V, E], pos_emb [S, E], vectors [n], weights [bytes] uint8. It
    cannot be trained; `Engine` and `Pipeline` take it like a GPT.

    Args:
        config: of the GPT.
        precision: "fp32", "bf16", "int8" or "int4".
        packed: what `pack_gpt` gives. None: zeros, to be loaded over.

    Raises:
        ValueError: unknown precision, or n_unmasked > 0, which no cache can serve.
    """

    tok_emb: Tensor
    pos_emb: Tensor
    vectors: Tensor
    weights: Tensor

    def __init__(self, config: GPTConfig, precision: str, packed: Packed | None = None):
        super().__init__()
        _check.choice("precision", precision, BITS)
        _refuse_unmasked(config)
        self.config, self.precision = config, precision
        L, E, V = config.n_layer, config.n_embd, config.vocab_size
        if packed is None:
            packed = Packed(
                torch.zeros(V, E),
                torch.zeros(config.block_size, E),
                torch.zeros((L * VECTORS_PER_LAYER + 2) * E),
                torch.zeros(sum(_sizes(config, BITS[precision])), dtype=torch.uint8),
            )
        for name, value in packed._asdict().items():
            self.register_buffer(name, value)

    @classmethod
    def of(cls, gpt: "GPT | PackedGPT", precision: str) -> "PackedGPT":
        """A packed copy of a GPT; a model that is packed so already as it is.

        Raises:
            ValueError: as `choose_precision`, or n_unmasked > 0.
        """
        precision = choose_precision(gpt, precision)
        if isinstance(gpt, PackedGPT):
            if gpt.precision == precision:
                return gpt
            gpt = gpt.to_gpt()
        _refuse_unmasked(gpt.config)
        return cls(gpt.config, precision, pack_gpt(gpt, precision))

    @property
    def packed(self) -> Packed:
        """The arguments of `decode_step`; they share memory with this module."""
        small = (self.tok_emb.float(), self.pos_emb.float(), self.vectors.float())
        return Packed(*small, self.weights)

    def unpacked(self) -> Iterator[Tensor]:
        """Every matrix [N, K] in float32, unpacked one at a time."""
        c, bits = self.config, BITS[self.precision]
        shapes = matrices(c.n_layer, c.n_embd, c.vocab_size)
        places = self.weights.split(_sizes(c, bits))
        for (N, K), place in zip(shapes, places, strict=True):
            panels = unpack(place, N, K, bits).transpose(1, 2)  # [panels, rows, Kp]
            yield panels.reshape(-1, panels.shape[2])[:N, :K]

    @torch.no_grad()
    def to_gpt(self) -> GPT:
        """A float32 GPT with the values of the packed weights, in eval mode and new memory.

        Exact for "fp32". For the others the values are the rounded ones.
        """
        with torch.device("meta"):
            gpt = GPT(self.config).eval()
        L, small = self.config.n_layer, self.packed
        state = {"tok_emb.weight": small.tok_emb.clone(), "pos_emb": small.pos_emb[None].clone()}
        for names, matrix in zip(_matrix_names(L), self.unpacked(), strict=True):
            parts = matrix.clone(memory_format=torch.contiguous_format).chunk(len(names))
            state |= {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
        vectors = _vector_names(L)
        lengths = [gpt.get_parameter(name).numel() for name in vectors]
        state |= dict(zip(vectors, small.vectors.clone().split(lengths), strict=True))
        gpt.load_state_dict(state, assign=True)
        return gpt

    def forward(self, idx: Tensor, cond: Tensor) -> Tensor:
        """Teacher forcing, arguments and errors as `GPT.forward`: [B, T, V].

        It unpacks all weights at every call and rounds no activation, which `Engine` does in the
        small precisions. For more than a look take `to_gpt` once.
        """
        return self.to_gpt()(idx, cond)


def _refuse_unmasked(config: GPTConfig) -> None:
    if config.n_unmasked:
        raise ValueError(f"gpt must have n_unmasked = 0, got {config.n_unmasked}")


def choose_precision(gpt: GPT | PackedGPT, precision: str) -> str:
    """The precision that `precision` means for a model: "auto" is that of its weights.

    Raises:
        ValueError: unknown, or one that packed weights cannot give: only float32 can be packed
            anew.
    """
    _check.choice("precision", precision, ("auto", *BITS))
    stored = gpt.precision if isinstance(gpt, PackedGPT) else "fp32"
    if precision not in ("auto", stored) and stored != "fp32":
        raise ValueError(
            f"precision must be {stored} (or auto), in which this model is stored: what packing "
            f"rounded off is gone; got {precision!r}"
        )
    return stored if precision == "auto" else precision


# ---- in files


def describe(gpt: PackedGPT) -> dict[str, Any]:
    """What a configuration says of packed weights.

    Raises:
        ValueError: the weights hold NaN or infinity, which no file may.
    """
    for i, matrix in enumerate(gpt.unpacked()):
        if not bool(torch.isfinite(matrix).all()):
            names = " and ".join(_matrix_names(gpt.config.n_layer)[i])
            raise ValueError(
                f"{names} must be finite to be packed in {gpt.precision}, it holds NaN or infinity"
            )
    return {"precision": gpt.precision, "layout": LAYOUT}


def empty_packed(config: GPTConfig, said: Any, *, what: object) -> PackedGPT:
    """The packed model of a file on the meta device.

    Args:
        said: what `describe` gave.
        what: path for the error text.

    Raises:
        CheckpointError: another layout, or an unknown precision.
    """
    if not isinstance(said, Mapping) or set(said) != {"precision", "layout"}:
        raise CheckpointError(f"{what}: packed must hold precision and layout, got {said!r}")
    if said["layout"] != LAYOUT:
        raise CheckpointError(
            f"{what}: weights packed in layout {said['layout']!r}, this package reads {LAYOUT}: "
            "convert the checkpoint that they were made of again"
        )
    try:
        with torch.device("meta"):
            return PackedGPT(config, said["precision"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{what}: {error}") from None


def load_packed(
    config: GPTConfig, said: Any, tensors: Mapping[str, Tensor], *, what: object
) -> PackedGPT:
    """The packed model of a file.

    Args:
        tensors: its state dict; embeddings and vectors in any floating-point dtype.
        config, said, what: as `empty_packed`.

    Raises:
        CheckpointError: as `empty_packed`, or tensors that do not fit; the text lists them.
    """
    model = empty_packed(config, said, what=what)
    found, _ = fit(model, tensors, what=str(what))
    weights = empty_bytes(found["weights"].numel(), torch.device("cpu")).copy_(found["weights"])
    tok_emb, pos_emb, vectors = (found[name].float() for name in ("tok_emb", "pos_emb", "vectors"))
    return PackedGPT(config, model.precision, Packed(tok_emb, pos_emb, vectors, weights))
