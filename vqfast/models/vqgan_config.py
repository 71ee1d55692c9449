"""Configuration of a VQGAN, and the published ones by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vqfast import _check
from vqfast.nn.blocks import GROUPS

QUANTIZERS = ("vq", "gumbel", "ema")
METRICS = ("l2", "cosine", "dot")


@dataclass(frozen=True)
class VQGANConfig:
    """Everything that defines a tokenizer. Defaults: f16, 1024 codes of 256 (ImageNet).

    Network: `ch` base width (a multiple of 32), `ch_mult` one factor per level (downsampling is
    2 ** (levels - 1)), `num_res_blocks` per encoder level (the decoder has one more), attention in
    levels whose resolution, counted from `resolution` and not from the image at hand, is in
    `attn_resolutions`; `attn_type` "none" removes it everywhere, also in the middle.

    Codes: `n_embed` codes of `embed_dim`; `quantizer` "vq", "gumbel" or "ema"; `metric` "l2",
    "cosine" (both sides normalised) or "dot" (vq only). `beta` weighs the commitment term, or the
    codebook term when `legacy`, as released checkpoints were trained. `remap` lists the ids of
    the codes that are kept, if not all are; `unknown_index` says what becomes of the others:
    "random", "extra" or an id.
    Gumbel: `kl_weight`, `temp_init`. EMA: `decay`, `eps`, `dead_code_threshold`: the part of the
    mean count below which a code is revived (0: never).

    Raises:
        TypeError, ValueError: naming the key, what was expected and what came.
    """

    ch: int = 128
    out_ch: int = 3
    in_channels: int = 3
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    resolution: int = 256
    z_channels: int = 256
    double_z: bool = False
    dropout: float = 0.0
    attn_type: str = "vanilla"
    n_embed: int = 1024
    embed_dim: int = 256
    quantizer: str = "vq"
    metric: str = "l2"
    beta: float = 0.25
    legacy: bool = True
    remap: tuple[int, ...] | None = None
    unknown_index: str | int = "random"
    kl_weight: float = 5e-4
    temp_init: float = 1.0
    decay: float = 0.99
    eps: float = 1e-5
    dead_code_threshold: float = 0.01

    def __post_init__(self) -> None:
        for key in ("ch", "out_ch", "in_channels", "num_res_blocks", "resolution", "z_channels"):
            _check.integer(key, getattr(self, key), low=1, high=1 << 20)
        _check.integer("n_embed", self.n_embed, low=1, high=(1 << 31) - 1)
        _check.integer("embed_dim", self.embed_dim, low=1, high=1 << 20)
        for key in ("ch_mult", "attn_resolutions"):
            object.__setattr__(self, key, _integers(key, getattr(self, key)))
        if not 1 <= len(self.ch_mult) <= 12:
            raise ValueError(f"ch_mult must have 1 to 12 levels, got {len(self.ch_mult)}")
        if self.ch % GROUPS:
            raise ValueError(f"ch must be a multiple of {GROUPS} (group norm), got {self.ch}")
        _check.number("dropout", self.dropout, low=0, high=1, high_open=True)
        _check.number("beta", self.beta, low=0)
        _check.number("kl_weight", self.kl_weight, low=0)
        _check.number("temp_init", self.temp_init, low=0, low_open=True)
        _check.number("decay", self.decay, low=0, high=1, high_open=True)
        _check.number("eps", self.eps, low=0, low_open=True)
        _check.number("dead_code_threshold", self.dead_code_threshold, low=0)
        _check.choice("attn_type", self.attn_type, ("vanilla", "none"))
        _check.choice("quantizer", self.quantizer, QUANTIZERS)
        _check.choice("metric", self.metric, METRICS)
        self._check_combinations()

    def _check_combinations(self) -> None:
        for key in ("legacy", "double_z"):
            if not isinstance(getattr(self, key), bool):
                kind = type(getattr(self, key)).__name__
                raise TypeError(f"{key} must be true or false, got {kind}")
        if self.double_z:
            raise ValueError("double_z must be false: it belongs to KL autoencoders, not to VQGAN")
        if self.quantizer == "gumbel" and self.embed_dim != self.z_channels:
            raise ValueError(
                f"embed_dim must equal z_channels ({self.z_channels}) for quantizer gumbel, "
                f"got {self.embed_dim}"
            )
        if self.quantizer != "vq" and self.metric != "l2":
            raise ValueError(f"metric must be l2 for quantizer {self.quantizer}, got {self.metric}")
        if self.remap is not None:
            if self.quantizer != "vq":
                raise ValueError(f"remap must be null for quantizer {self.quantizer}")
            object.__setattr__(self, "remap", _integers("remap", self.remap, low=0))
            if not self.remap or max(self.remap) >= self.n_embed:
                raise ValueError(f"remap must list ids in 0..{self.n_embed - 1}")
        if not isinstance(self.unknown_index, str):
            _check.integer("unknown_index", self.unknown_index, low=0)
        else:
            _check.choice("unknown_index", self.unknown_index, ("random", "extra"))

    @property
    def factor(self) -> int:
        """Image side over grid side."""
        return 2 ** (len(self.ch_mult) - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON and YAML values; `from_dict` gives the same configuration back."""
        plain = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> VQGANConfig:
        """Strict: an unknown key, a wrong type or a wrong value is a ValueError naming the key."""
        if not isinstance(d, Mapping):
            raise ValueError(f"a VQGAN config must be a mapping, got {type(d).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(str(k) for k in d if k not in known)
        if unknown:
            raise ValueError(
                f"unknown key in the VQGAN config: {', '.join(unknown)}; known: {', '.join(known)}"
            )
        try:
            return cls(**d)
        except TypeError as e:
            raise ValueError(str(e)) from e

    @classmethod
    def preset(cls, name: str) -> VQGANConfig:
        """A released configuration by name; PRESETS lists them."""
        _check.choice("preset", name, tuple(PRESETS))
        return cls(**PRESETS[name])


def _integers(key: str, value: Any, low: int = 1) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{key} must be a list of ints, got {type(value).__name__}")
    return tuple(_check.integer(f"{key}[{i}]", v, low=low) for i, v in enumerate(value))


_LDM_F4: dict[str, Any] = {
    "ch_mult": (1, 2, 4),
    "attn_resolutions": (),
    "z_channels": 3,
    "n_embed": 8192,
    "embed_dim": 3,
}
_LDM_F8: dict[str, Any] = {
    "ch_mult": (1, 2, 2, 4),
    "attn_resolutions": (32,),
    "z_channels": 4,
    "n_embed": 16384,
    "embed_dim": 4,
}
_LLAMAGEN: dict[str, Any] = {"n_embed": 16384, "embed_dim": 8, "metric": "cosine", "legacy": False}

# published configurations; a checkpoint's own config always wins over these
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet_f16_1024": {},
    "imagenet_f16_16384": {"n_embed": 16384},
    "openimages_gumbel_f8": {
        "ch_mult": (1, 1, 2, 4),
        "attn_resolutions": (32,),
        "n_embed": 8192,
        "quantizer": "gumbel",
        "kl_weight": 1e-8,
    },
    "coco_f16_8192": {"n_embed": 8192},
    "sflckr_segmentation": {"in_channels": 182, "out_ch": 182},
    "coco_segmentation": {"in_channels": 183, "out_ch": 183},
    "ade20k_segmentation": {"in_channels": 151, "out_ch": 151},
    "imagenet_depth": {"in_channels": 1, "out_ch": 1},
    "ldm_f4": _LDM_F4,
    "ldm_f4_noattn": _LDM_F4 | {"attn_type": "none"},
    "ldm_f8": _LDM_F8,
    "ldm_f8_256": _LDM_F8 | {"n_embed": 256},
    "ldm_f16": {"z_channels": 8, "n_embed": 16384, "embed_dim": 8},
    "llamagen_vq16": _LLAMAGEN,
    "llamagen_vq8": _LLAMAGEN | {"ch_mult": (1, 2, 2, 4), "attn_resolutions": (32,)},
}
