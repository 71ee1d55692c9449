"""VQGANConfig is strict and survives JSON."""

import json

import pytest

from vqfast.models.vqgan import PRESETS, VQGANConfig

TINY = {"ch": 32, "ch_mult": (1, 2, 2), "z_channels": 32, "n_embed": 64, "embed_dim": 8}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_embd": 8}, "n_embd.*known.*n_embed"),
        ({"n_embed": -1}, "n_embed.*-1"),
        ({"n_embed": 2.5}, "n_embed.*float"),
        ({"n_embed": True}, "n_embed.*bool"),
        ({"n_embed": "1024"}, "n_embed.*str"),
        ({"beta": float("nan")}, "beta.*nan"),
        ({"beta": -0.1}, "beta"),
        ({"dropout": 1.0}, "dropout"),
        ({"ch": 48}, "ch must be a multiple of 32.*48"),
        ({"ch_mult": []}, "ch_mult"),
        ({"ch_mult": 2}, "ch_mult.*int"),
        ({"ch_mult": [1, 0]}, r"ch_mult\[1\].*0"),
        ({"attn_resolutions": "16"}, "attn_resolutions.*str"),
        ({"legacy": "yes"}, "legacy.*str"),
        ({"double_z": True}, "double_z"),
        ({"quantizer": "fsq"}, "quantizer.*fsq"),
        ({"metric": "l1"}, "metric.*l1"),
        ({"quantizer": "gumbel"}, r"embed_dim must equal z_channels \(32\).*8"),
        ({"quantizer": "ema", "metric": "dot"}, "metric"),
        ({"remap": [64]}, r"remap.*0\.\.63"),
        ({"unknown_index": "first"}, "unknown_index.*first"),
    ],
)
def test_config_refuses_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        VQGANConfig.from_dict({**TINY, **change})


def test_config_survives_json():
    for c in [VQGANConfig.preset(p) for p in PRESETS] + [VQGANConfig(**TINY, remap=(1, 2))]:
        assert VQGANConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="imagenet_f16_1024"):
        VQGANConfig.preset("imagenet")
