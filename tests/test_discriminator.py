"""PatchGAN: names, sizes, initial values, normalisation."""

import pytest
import torch

from vqfast.models.discriminator import ActNorm, NLayerDiscriminator, fitting_layers, smallest_side


def test_state_dict_has_the_released_names_and_size():
    state = NLayerDiscriminator().state_dict()
    convs = {"0": True, "2": False, "5": False, "8": False, "11": True}
    for i, has_bias in convs.items():
        assert f"main.{i}.weight" in state and (f"main.{i}.bias" in state) == has_bias
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert {f"main.{i}.{n}" for i in (3, 6, 9) for n in norms} <= state.keys()
    assert len(state) == 22
    millions = sum(p.numel() for p in NLayerDiscriminator().parameters()) / 1e6
    assert round(millions, 2) == 2.77


def test_actnorm_convolutions_have_a_bias_and_a_flag():
    state = NLayerDiscriminator(use_actnorm=True).state_dict()
    assert "main.2.bias" in state and state["main.3.initialized"].dtype == torch.uint8
    assert state["main.3.loc"].shape == (1, 128, 1, 1)


def test_initial_weights_are_narrow_normals():
    torch.manual_seed(0)
    d = NLayerDiscriminator()
    assert d.main[8].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert d.main[9].weight.mean().item() == pytest.approx(1, abs=0.01)
    assert d.main[9].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not d.main[9].bias.any()


@pytest.mark.parametrize(("n_layers", "side", "patch"), [(3, 256, 30), (2, 64, 14), (1, 6, 1)])
def test_logits_are_per_patch(n_layers, side, patch):
    d = NLayerDiscriminator(ndf=4, n_layers=n_layers)
    assert d(torch.zeros(2, 3, side, side)).shape == (2, 1, patch, patch)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
def test_smallest_side_is_exact(n_layers):
    d, side = NLayerDiscriminator(ndf=2, n_layers=n_layers).eval(), smallest_side(n_layers)
    assert d(torch.zeros(1, 3, side, side)).numel() >= 1
    with pytest.raises(ValueError, match=f"at least {side}"):
        d(torch.zeros(1, 3, side, side - 1))
    with pytest.raises(RuntimeError):  # the network itself cannot go lower
        d.main(torch.zeros(1, 3, side - 1, side - 1))


def test_layers_follow_the_image():
    assert [fitting_layers(s) for s in (6, 11, 12, 16, 23, 24, 256)] == [1, 1, 2, 2, 2, 3, 3]
    assert fitting_layers(256, most=5) == 5
    with pytest.raises(ValueError, match="at least 6"):
        fitting_layers(5)


def test_actnorm_whitens_its_first_training_batch_only():
    norm = ActNorm(3).train()
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 7 + 2
    y = norm(x)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(y.std((0, 2, 3)), torch.ones(3), atol=1e-4)
    loc = norm.loc.clone()
    norm(x + 100)
    assert torch.equal(norm.loc, loc) and norm.initialized.item() == 1


def test_actnorm_in_eval_mode_or_loaded_keeps_its_values():
    norm = ActNorm(2).eval()
    x = torch.full((1, 2, 2, 2), 5.0)
    assert torch.equal(norm(x), x) and norm.initialized.item() == 0
    used = ActNorm(2).train()
    used(torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    fresh = ActNorm(2).train()
    fresh(torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1)))
    fresh.load_state_dict(ActNorm(2).state_dict())  # an untouched one: initialises again
    fresh(x + torch.arange(8.0).reshape(x.shape))
    assert fresh.loc.any()
    fresh.load_state_dict(used.state_dict())
    fresh(x)
    assert torch.equal(fresh.loc, used.loc)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_layers": 0}, ValueError, "n_layers.*0"),
        ({"ndf": 2.0}, TypeError, "ndf.*float"),
        ({"input_nc": -3}, ValueError, "input_nc"),
    ],
)
def test_arguments_are_checked(change, error, words):
    with pytest.raises(error, match=words):
        NLayerDiscriminator(**change)


def test_images_are_checked():
    d = NLayerDiscriminator(ndf=4)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\].*\[1, 1, 32, 32\]"):
        d(torch.zeros(1, 1, 32, 32))
    with pytest.raises(TypeError, match="uint8"):
        d(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
