"""What the transformer is conditioned on, as tokens: class, start token, coordinates, or the codes
of another image.

Condition and image tokens share one vocabulary: class k is token k. Every conditioning has

    kind            its name in a configuration
    length(grid)    Tc, the number of condition tokens for a grid (h, w) of image codes
    encode(c)       what a user gives -> [B, Tc] int64
    null(n)         [n, Tc] tokens of "no condition" for classifier-free guidance, or None
    to_dict()       what `build` takes back
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast import _check
from vqfast.models.vqgan import VQGAN, VQGANConfig

__all__ = [
    "ClassCondition",
    "CoordinateCondition",
    "FirstStageCondition",
    "StartCondition",
    "TokenizerCondition",
    "build",
]


class ClassCondition(nn.Module):
    """Class labels: one token, the class id.

    Args:
        n_classes: ids are 0..n_classes - 1.
        class_names: their names, in order; `encode` takes them too.
        null_class: token of "no class", n_classes or above, if the model was trained with label
            dropout.
    """

    kind: Literal["class"] = "class"

    def __init__(
        self,
        n_classes: int,
        class_names: Sequence[str] | None = None,
        null_class: int | None = None,
    ):
        super().__init__()
        self.n_classes = _check.integer("n_classes", n_classes, low=1)
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        if self.class_names is not None and len(self.class_names) != n_classes:
            raise ValueError(
                f"class_names must hold {n_classes} names, got {len(self.class_names)}"
            )
        if null_class is not None:
            _check.integer("null_class", null_class, low=n_classes)
        self.null_class = null_class

    def length(self, grid: tuple[int, int]) -> int:
        return 1

    def class_id(self, value: int | str) -> int:
        """The id of a class given by id or by name. ValueError for one that is unknown."""
        if isinstance(value, str):
            names = self.class_names or []
            if value in names:
                return names.index(value)
            if not value.lstrip("-").isdigit():
                known = ", ".join(names) or "none has a name"
                raise ValueError(f"unknown class {value!r}; the classes are: {known}")
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"classes must hold ints or names, got {type(value).__name__}")
        if not 0 <= value < self.n_classes:
            raise ValueError(f"unknown class {value}; classes are 0..{self.n_classes - 1}")
        return value

    def encode(self, c: Tensor | Sequence[int | str]) -> Tensor:
        """[B] ids (tensor or list, names too) -> [B, 1]. ValueError for an unknown class."""
        device = None
        if isinstance(c, Tensor):
            _check.integer_tensor("classes", c)
            _check.ndim("classes", c, (1, 2))
            if c.dim() == 2 and c.shape[1] != 1:
                raise ValueError(f"classes must be [B] or [B, 1], got {list(c.shape)}")
            device, c = c.device, c.reshape(-1).tolist()
        ids = [self.class_id(value) for value in c]
        return torch.tensor(ids, dtype=torch.int64, device=device).reshape(-1, 1)

    def null(self, n: int) -> Tensor | None:
        return None if self.null_class is None else torch.full((n, 1), self.null_class)

    def to_dict(self) -> dict[str, Any]:
        values = {
            "kind": self.kind,
            "n_classes": self.n_classes,
            "class_names": self.class_names,
        }
        return values if self.null_class is None else {**values, "null_class": self.null_class}


class StartCondition(nn.Module):
    """No condition: one start token in front of the image codes."""

    kind: Literal["sos"] = "sos"

    def __init__(self, sos_token: int = 0):
        super().__init__()
        self.sos_token = _check.integer("sos_token", sos_token, low=0)

    def length(self, grid: tuple[int, int]) -> int:
        return 1

    def encode(self, c: Tensor | int) -> Tensor:
        """c: how many rows, or any tensor whose first dim says so -> [B, 1]."""
        if isinstance(c, Tensor):
            return torch.full((c.shape[0], 1), self.sos_token, device=c.device)
        return torch.full((_check.integer("c", c, low=0), 1), self.sos_token)

    def null(self, n: int) -> Tensor | None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "sos_token": self.sos_token}


class CoordinateCondition(nn.Module):
    """Where each pixel lies in an uncropped image, as tokens.

    taming's rule: row-major index / (H·W) in [0, 1], cropped with the image, averaged over
    down_factor² pixels, times n_embed, rounded. Exactly 1 would give n_embed, which is no token; it
    becomes n_embed - 1.
    """

    kind: Literal["coord"] = "coord"

    def __init__(self, n_embed: int, down_factor: int = 16):
        super().__init__()
        self.n_embed = _check.integer("n_embed", n_embed, low=1)
        self.down_factor = _check.integer("down_factor", down_factor, low=1)

    def length(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1]

    def encode(self, c: Tensor) -> Tensor:
        """[B, 1, H, W] coordinates in [0, 1] -> [B, (H / down_factor)·(W / down_factor)]."""
        _check.floating("coordinates", c)
        _check.ndim("coordinates", c, 4)
        H, W, f = c.shape[2], c.shape[3], self.down_factor
        if c.shape[1] != 1 or H % f or W % f:
            raise ValueError(
                f"coordinates must be [B, 1, H, W] with multiples of {f}, got {list(c.shape)}"
            )
        mean = F.avg_pool2d(c, f).clamp(0, 1)  # [B, 1, h, w]
        return (mean * self.n_embed).round().long().clamp(max=self.n_embed - 1).flatten(1)

    def null(self, n: int) -> Tensor | None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "n_embed": self.n_embed, "down_factor": self.down_factor}


class FirstStageCondition(nn.Module):
    """An image, as codes of the tokenizer that the transformer predicts; it holds no weights of its
    own.
    """

    kind: Literal["first_stage"] = "first_stage"

    def __init__(self, tokenizer: VQGAN):
        super().__init__()
        self._tokenizer = (tokenizer,)  # in a tuple: not a submodule, its weights are saved once

    def length(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1]

    def encode(self, c: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> [B, h·w]."""
        return self._tokenizer[0].encode(c).flatten(1)

    def null(self, n: int) -> Tensor | None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}


class TokenizerCondition(VQGAN):
    """Another picture (depth, segmentation one-hot, ...), as codes of its own VQGAN.

    A VQGAN by its parameter names, so that taming's `cond_stage_model.*` fits without renaming.
    """

    kind: Literal["tokenizer"] = "tokenizer"

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        # no downsampling after the last level
        self.down_factor = 2 ** (len(config.ch_mult) - 1)

    def length(self, grid: tuple[int, int]) -> int:
        """Of a condition image at the configured resolution, whatever the grid of the image
        codes.
        """
        return (self.config.resolution // self.down_factor) ** 2

    def encode(self, c: Tensor, *, max_memory: int | None = None) -> Tensor:
        """[B, in_channels, H, W] -> [B, h·w]; max_memory as `VQGAN.encode`."""
        return super().encode(c, max_memory=max_memory).flatten(1)

    def null(self, n: int) -> Tensor | None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "config": self.config.to_dict()}


Conditioning = (
    ClassCondition | StartCondition | CoordinateCondition | FirstStageCondition | TokenizerCondition
)


def build(config: dict[str, Any], tokenizer: VQGAN) -> Conditioning:
    """The conditioning that a configuration describes; the inverse of its `to_dict`.

    Args:
        config: {"kind": "class", "n_classes": 10, "class_names": [...] | None} with an optional
            "null_class"; {"kind": "sos", "sos_token": 0}; {"kind": "coord", "n_embed": 1024,
            "down_factor": 16}; {"kind": "first_stage"}; {"kind": "tokenizer", "config": VQGANConfig
            as a dict}.
        tokenizer: the first stage; kind "first_stage" shares it.

    Raises:
        ValueError: unknown kind or key, or a value out of range; the text names it.
    """
    values = dict(config)
    kind = values.pop("kind", None)
    keys: dict[str, set[str]] = {
        "class": {"n_classes", "class_names", "null_class"},
        "sos": {"sos_token"},
        "coord": {"n_embed", "down_factor"},
        "first_stage": set(),
        "tokenizer": {"config"},
    }
    _check.choice("conditioning kind", kind, keys)
    if unknown := sorted(set(values) - keys[kind]):
        raise ValueError(f"unknown key of the {kind} conditioning: {', '.join(unknown)}")
    if kind == "first_stage":
        return FirstStageCondition(tokenizer)
    try:
        if kind == "tokenizer":
            return TokenizerCondition(VQGANConfig.from_dict(values["config"]))
        if kind == "class":
            return ClassCondition(**values)
        return StartCondition(**values) if kind == "sos" else CoordinateCondition(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{kind} conditioning: {error}") from error
