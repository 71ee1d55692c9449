"""A pipeline's transformer from plain weights to packed ones and, where that is exact, back."""

from collections.abc import Mapping

import torch
from torch import Tensor

import vqfast
from vqfast.checkpoints import Checkpoint
from vqfast.cli._parser import UsageError
from vqfast.engine.packing import PackedGPT, describe, load_packed

__all__ = ["pack", "unpack"]

_PART = "transformer."


def pack(found: Checkpoint, tensors: Mapping[str, Tensor], precision: str, path: str) -> Checkpoint:
    """A pipeline with packed weights; all other tensors keep their bits and dtypes.

    Args:
        found: its configuration and metadata.
        tensors: its tensors, that fit the model.
        path: of the source, for the error text.

    Raises:
        UsageError: weights that are packed in another precision, or not finite in this one.
    """
    try:
        model = PackedGPT.of(_transformer(found, tensors, path), precision)
        config = {**found.config, "packed": describe(model)}
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    state = {name: _as_stored(x, _dtype(found, tensors)) for name, x in model.state_dict().items()}
    return _with_transformer(found, tensors, config, state)


def unpack(found: Checkpoint, tensors: Mapping[str, Tensor], path: str) -> Checkpoint:
    """A pipeline with plain weights: the inverse of `pack` for "fp32". UsageError for any other."""
    model = _transformer(found, tensors, path)
    if isinstance(model, PackedGPT):
        if model.precision != "fp32":
            raise UsageError(
                f"{path}: its transformer is packed in {model.precision} and has no plain weights "
                "any more, since packing rounds; convert what it was made of"
            )
        model = model.to_gpt()
    config = {k: v for k, v in found.config.items() if k != "packed"}
    return _with_transformer(found, tensors, config, model.state_dict())


def _transformer(
    found: Checkpoint, tensors: Mapping[str, Tensor], path: str
) -> vqfast.GPT | PackedGPT:
    config = vqfast.GPTConfig.from_dict(found.config["transformer"])
    state = {k.removeprefix(_PART): v for k, v in tensors.items() if k.startswith(_PART)}
    if "packed" in found.config:
        return load_packed(config, found.config["packed"], state, what=path)
    with torch.device("meta"):
        model = vqfast.GPT(config)
    # no second copy of what may be gigabytes
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return model


def _with_transformer(
    found: Checkpoint, tensors: Mapping[str, Tensor], config: dict, state: Mapping[str, Tensor]
) -> Checkpoint:
    """`found` with another configuration and the state of another transformer."""
    kept = {k: v for k, v in tensors.items() if not k.startswith(_PART)}
    kept |= {_PART + k: v for k, v in state.items()}
    return Checkpoint(found.format, found.kind, config, kept, found.metadata, found.ignored)


def _dtype(found: Checkpoint, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Of the embeddings and vectors of the source, which stand for one another."""
    name = "tok_emb" if "packed" in found.config else "tok_emb.weight"
    return tensors[_PART + name].dtype


def _as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the dtype that it came in, if that loses nothing."""
    small = x.to(dtype) if x.is_floating_point() else x
    return small if torch.equal(small.to(x.dtype), x) else x
