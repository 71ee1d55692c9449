"""Conditionings: what becomes which tokens, what is refused, and configurations both ways."""

import pytest
import torch

from vqfast.models import conditioning
from vqfast.models.vqgan import VQGAN, VQGANConfig

CONFIG = VQGANConfig(
    ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=8, z_channels=8,
    n_embed=16, embed_dim=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VQGAN(CONFIG).eval()


def test_a_class_is_its_own_token(tokenizer):
    c = conditioning.build({"kind": "class", "n_classes": 5, "class_names": None}, tokenizer)
    assert c.length((4, 4)) == 1
    assert c.encode([4, 0]).tolist() == [[4], [0]]
    assert c.encode(torch.tensor([[3], [1]])).tolist() == [[3], [1]]
    assert c.encode([]).shape == (0, 1)
    assert c.encode(torch.tensor([2])).dtype == torch.int64


def test_class_names_are_taken(tokenizer):
    c = conditioning.ClassCondition(3, ["cat", "dog", "7"])
    assert c.encode(["dog", 0, "2", "7"]).tolist() == [[1], [0], [2], [2]]


@pytest.mark.parametrize("bad", [[5], [-1], ["bird"], ["9"], torch.tensor([5])])
def test_an_unknown_class_is_a_value_error(bad):
    with pytest.raises(ValueError, match="unknown class"):
        conditioning.ClassCondition(5, ["a", "b", "c", "d", "e"]).encode(bad)


@pytest.mark.parametrize("bad", [[1.5], [True], [None], torch.tensor([0.5])])
def test_a_class_of_the_wrong_kind_is_a_type_error(bad):
    with pytest.raises(TypeError, match="classes"):
        conditioning.ClassCondition(5).encode(bad)


def test_null_class_is_the_null_condition():
    assert conditioning.ClassCondition(5, null_class=5).null(2).tolist() == [[5], [5]]
    assert conditioning.ClassCondition(5).null(2) is None
    with pytest.raises(ValueError, match="null_class"):
        conditioning.ClassCondition(5, null_class=4)


def test_start_token_stands_in_front():
    c = conditioning.StartCondition(7)
    assert c.encode(3).tolist() == [[7]] * 3
    assert c.encode(torch.zeros(2, 3, 8, 8)).tolist() == [[7]] * 2
    assert c.length((4, 4)) == 1 and c.null(1) is None


def test_coordinates_are_averaged_scaled_and_never_reach_n_embed():
    c = conditioning.CoordinateCondition(n_embed=10, down_factor=2)
    H = W = 4
    whole = (torch.arange(H * W).float() / (H * W)).view(1, 1, H, W)
    # means of the 2 x 2 blocks: (0 1 4 5), (2 3 6 7), (8 9 12 13), (10 11 14 15) over 16
    assert c.encode(whole).tolist() == [[2, 3, 7, 8]]
    assert c.encode(torch.ones(1, 1, 2, 4)).tolist() == [[9, 9]]
    assert c.length((2, 3)) == 6
    with pytest.raises(ValueError, match="multiples of 2"):
        c.encode(torch.ones(1, 1, 3, 4))


def test_first_stage_shares_the_tokenizer_without_owning_it(tokenizer):
    c = conditioning.build({"kind": "first_stage"}, tokenizer)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(c.encode(x), tokenizer.encode(x).flatten(1))
    assert not c.state_dict() and c.length((4, 4)) == 16


def test_tokenizer_condition_is_a_vqgan_by_its_names(tokenizer):
    config = {**CONFIG.to_dict(), "in_channels": 1, "out_ch": 1}
    c = conditioning.build({"kind": "tokenizer", "config": config}, tokenizer).eval()
    assert c.state_dict().keys() == tokenizer.state_dict().keys()
    x = torch.randn(2, 1, 8, 8)
    codes = c.encode(x)
    assert torch.equal(c.encode(x, max_memory=1 << 20), codes)
    with pytest.raises(ValueError, match="max_memory"):
        c.encode(x, max_memory=1)
    assert codes.shape == (2, 16) and codes.dtype == torch.int64
    assert c.length((4, 4)) == 16


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "class", "n_classes": 3, "class_names": ["a", "b", "c"]},
        {"kind": "class", "n_classes": 3, "class_names": None, "null_class": 3},
        {"kind": "sos", "sos_token": 2},
        {"kind": "coord", "n_embed": 64, "down_factor": 4},
        {"kind": "first_stage"},
        {"kind": "tokenizer", "config": CONFIG.to_dict()},
    ],
    ids=lambda c: c["kind"],
)
def test_configuration_round_trip(config, tokenizer):
    assert conditioning.build(config, tokenizer).to_dict() == config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kind": "sound"}, "sound"),
        ({}, "kind"),
        ({"kind": "class"}, "n_classes"),
        ({"kind": "class", "n_classes": 3, "names": []}, "names"),
        ({"kind": "class", "n_classes": 3, "class_names": ["a"]}, "3 names, got 1"),
        ({"kind": "class", "n_classes": 0}, "n_classes"),
        ({"kind": "tokenizer"}, "config"),
        ({"kind": "tokenizer", "config": {"chh": 1}}, "chh"),
        ({"kind": "sos", "sos_token": -1}, "sos_token"),
    ],
)
def test_wrong_configurations_are_named(config, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        conditioning.build(config, tokenizer)
