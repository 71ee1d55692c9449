"""Pictures that a sample starts from: ones to complete, and ones that condition the model."""

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

import vqfast
from vqfast.cli._parser import UsageError
from vqfast.errors import DataError
from vqfast.images import load_image, load_levels, resize_center_crop, to_tensor
from vqfast.models.conditioning import FirstStageCondition
from vqfast.models.vqgan import VQGAN

__all__ = ["condition_tokens", "known_codes"]


@torch.inference_mode()
def known_codes(
    pipe: "vqfast.Pipeline", paths: list[str], keep: int | float, size: tuple[int, int] | None
) -> Tensor:
    """[m, k] codes of the top rows of pictures, resized and cropped to the size of a sample.

    Args:
        keep: rows of codes (int), or their share of all (float), rounded down.
        size: (H, W) of a sample; None is the model's own.

    Raises:
        UsageError: more rows than there are, or the model's pictures do not have 3 channels.
        DataError: a bad picture.
    """
    tokenizer = pipe.tokenizer
    if tokenizer.config.in_channels != 3:
        raise UsageError(
            f"--complete: pictures have 3 channels, this model has {tokenizer.config.in_channels}"
        )
    height, width = size or (tokenizer.config.resolution,) * 2
    h, w = height // tokenizer.config.factor, width // tokenizer.config.factor
    rows = math.floor(h * keep + 1e-9) if isinstance(keep, float) else keep
    if rows > h:
        raise UsageError(f"--keep must be at most the {h} rows of codes of an image, got {rows}")
    found = []
    for path in paths:
        x = to_tensor(load_image(path), (height, width))[None]
        found.append(_encoded(tokenizer, x.to(pipe.device), "--complete").flatten(1)[:, : rows * w])
    return torch.cat(found).cpu()


@torch.inference_mode()
def condition_tokens(
    pipe: "vqfast.Pipeline", paths: list[str], size: tuple[int, int] | None
) -> Tensor:
    """[m, Tc] condition tokens of pictures, for a sample of `size`.

    What a picture has to be follows from the channels of the conditioning's first stage: 3, a
    picture; 1, a map of depths; more, a map of labels. See `_condition`.

    Raises:
        UsageError: the model is not conditioned on a picture. DataError: a bad picture.
    """
    side, stage = pipe.tokenizer.config.resolution, pipe.conditioning
    if stage.kind == "first_stage":
        config = pipe.tokenizer.config
    elif stage.kind == "tokenizer":
        config = stage.config
    else:
        raise UsageError(f"--cond: this model is conditioned on {stage.kind!r}, not on a picture")
    # the condition of a sample of another size grows with it
    height, width = (v * config.resolution // side for v in size or (side, side))
    found = []
    for path in paths:
        x = _condition(path, (height, width), config.in_channels)[None]
        found.append(_encoded(stage, x.to(pipe.device), "--cond"))
    return torch.cat(found).cpu()


def _encoded(stage: VQGAN | FirstStageCondition, x: Tensor, flag: str) -> Tensor:
    try:
        return stage.encode(x)
    except ValueError as error:  # sides that are no multiples of the factor
        raise UsageError(f"{flag}: {error}") from None


def _condition(path: str, size: tuple[int, int], channels: int) -> Tensor:
    """[channels, H, W] float32, as taming's data sets make them.

    Depths are stretched to [-1, 1], darkest to brightest, before the crop. Labels are the levels of
    the picture, unshifted, as one-hot channels; they are never mixed by resizing.
    """
    if channels == 3:
        return to_tensor(load_image(path), size)
    levels = load_levels(path)
    if channels == 1:
        low, high = cast(tuple[float, float], levels.getextrema())  # of one channel
        cut = resize_center_crop(levels.convert("F"), size, filter="bilinear")
        depth = torch.from_numpy(np.array(cut, dtype=np.float32))
        return ((depth - low) / max(high - low, 1) * 2 - 1).clamp(-1, 1)[None]
    cut = resize_center_crop(levels, size, filter="nearest")
    labels = torch.from_numpy(np.array(cut, dtype=np.int64))
    least, most = (int(v) for v in labels.aminmax())
    if least < 0 or most >= channels:
        raise DataError(f"{path}: labels must be in 0..{channels - 1}, got {least}..{most}")
    return nn.functional.one_hot(labels, channels).permute(2, 0, 1).float().contiguous()
