"""Stage-1 losses: values, the adaptive weight at its limits, gating, gradients, component names."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from vqfast import CheckpointError
from vqfast.losses import (
    Stage1Loss,
    adaptive_weight,
    hinge_d_loss,
    non_finite,
    vanilla_d_loss,
)

RANDOM = {"perceptual_net": "squeeze", "perceptual_weights": "random"}


def build(**changes):
    torch.manual_seed(0)
    loss = Stage1Loss(
        **{**RANDOM, "disc_start": 0, "disc_channels": 8, "image_size": 32, **changes}
    )
    return loss.train()


class Tail(nn.Module):
    """The last convolution of a decoder, on fixed features."""

    def __init__(self, channels=3):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(8, channels, 3, padding=1)
        self.h = torch.randn(2, 8, 32, 32, generator=g)
        self.x = torch.rand(2, channels, 32, 32, generator=g) * 2 - 1
        self.codebook = nn.Parameter(torch.tensor(0.3))

    def forward(self):
        return self.conv(self.h)


def logits(seed=0):
    return torch.randn(2, 1, 6, 5, generator=torch.Generator().manual_seed(seed))


# ---- pieces


def test_hinge_and_vanilla_are_their_formulas():
    real, fake = logits(0).tolist(), logits(1).tolist()
    real, fake = (torch.tensor(t).reshape(-1).tolist() for t in (real, fake))
    n = len(real)
    hinge = 0.5 * (sum(max(0, 1 - r) for r in real) + sum(max(0, 1 + f) for f in fake)) / n
    plus = [math.log1p(math.exp(-r)) for r in real] + [math.log1p(math.exp(f)) for f in fake]
    assert hinge_d_loss(logits(0), logits(1)).item() == pytest.approx(hinge, rel=1e-6)
    assert vanilla_d_loss(logits(0), logits(1)).item() == pytest.approx(
        0.5 * sum(plus) / n, rel=1e-6
    )


def test_a_perfect_discriminator_has_no_hinge_loss():
    assert hinge_d_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -9.0])).item() == 0


def weigh(nll_scale, g_scale, disc_weight=0.8):
    w = torch.tensor([3.0, 4.0], requires_grad=True)  # d|w|/dw has length 1
    return adaptive_weight(w.norm() * nll_scale, w.norm() * g_scale, w, disc_weight)


@pytest.mark.parametrize(
    ("nll", "g", "want"),
    [
        (1.0, 1.0, 0.8 / 1.0001),
        (2.0, 0.5, 0.8 * 2 / 0.5001),
        (1.0, 0.0, 0.8 * 1e4),  # the 1e-4 alone
        (1e9, 1.0, 0.8 * 1e4),  # the cap
        (0.0, 1.0, 0.0),
        (1e30, 1.0, 0.8 * 1e4),  # squares overflow float32
        (1.0, 1e30, 0.0),
        (math.inf, 1.0, 0.0),  # inf · 0 somewhere in the gradient is NaN
        (math.nan, 1.0, 0.0),
        (1.0, math.nan, 0.0),
        (1e30, 1e30, 0.0),
    ],
)
def test_adaptive_weight_is_a_capped_ratio_and_always_finite(nll, g, want):
    got = weigh(nll, g)
    assert got.isfinite() and not got.requires_grad
    if not (math.isinf(nll) or math.isinf(g)):
        assert got.item() == pytest.approx(want, rel=1e-5)
    assert 0 <= got <= 0.8 * 1e4


def test_adaptive_weight_keeps_both_graphs():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    nll, g = w.square().sum(), w.exp().sum()
    adaptive_weight(nll, g, w)
    (nll + g).backward()
    assert w.grad is not None


def test_non_finite_names_the_component():
    ok = {"rec": torch.tensor(1.0), "gan": torch.tensor(-2.0)}
    assert non_finite(ok) is None
    assert non_finite({**ok, "codebook": torch.tensor(math.nan)}) == "codebook"
    assert non_finite({**ok, "gan": torch.tensor(math.inf)}) == "gan"


# ---- the whole objective


def plain_objective(loss, tail, x_hat, step):
    """The sum, written out and differentiated as one graph."""
    rec = (tail.x - x_hat).abs().mean()
    p = loss.perceptual(tail.x, x_hat).mean()
    g = -loss.discriminator(x_hat).mean()
    nll = rec + loss.perceptual_weight * p
    weight = adaptive_weight(nll, g, tail.conv.weight, loss.disc_weight, most=loss.disc_weight_max)
    total = nll + weight * loss.gan_factor(step) * g + loss.codebook_weight * tail.codebook
    return total, {"rec": rec, "perceptual": p, "gan": g, "codebook": tail.codebook}, weight


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"codebook_weight": 0.5, "perceptual_weight": 0.3, "disc_weight": 0.2, "disc_factor": 0.7},
        {"gan_ramp": 9},
        {"disc_weight_max": 1e-3},
    ],
)
def test_generator_loss_and_gradient_are_those_of_the_plain_sum(changes):
    loss, tail = build(**changes), Tail()
    want, parts, weight = plain_objective(loss, tail, tail(), step=3)
    grads = torch.autograd.grad(want, [tail.conv.weight, tail.conv.bias, tail.codebook])
    got = loss.generator(tail.x, tail(), tail.codebook, tail.conv.weight, step=3)
    got.total.backward()
    torch.testing.assert_close(got.total, want)
    torch.testing.assert_close(got.d_weight, weight)
    for name, value in parts.items():
        torch.testing.assert_close(got.parts[name], value.detach(), msg=name)
    for p, grad in zip([tail.conv.weight, tail.conv.bias, tail.codebook], grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_scaling_the_total_scales_the_gradient():
    # what a loss scaler or gradient accumulation does
    loss, tail, grads = build(), Tail(), []
    for scale in (1.0, 4.0):
        tail.zero_grad()
        out = loss.generator(tail.x, tail(), tail.codebook, tail.conv.weight, step=0)
        (out.total * scale).backward()
        grads.append(tail.conv.weight.grad.clone())
    torch.testing.assert_close(grads[1], 4 * grads[0])


def test_the_generator_pass_leaves_no_gradient_in_the_discriminator():
    loss, tail = build(), Tail()
    loss.generator(tail.x, tail(), tail.codebook, tail.conv.weight, step=0).total.backward()
    assert all(p.grad is None for p in loss.parameters())


def test_the_discriminator_pass_leaves_no_gradient_in_the_generator():
    loss, tail = build(), Tail()
    loss.discriminate(tail.x, tail(), step=0).total.backward()
    assert all(p.grad is None for p in tail.parameters())
    weights = [p for p in loss.discriminator.parameters() if p.dim() > 1]
    assert all(p.grad is not None and p.grad.any() for p in weights)


@pytest.mark.parametrize(("kind", "rule"), [("hinge", hinge_d_loss), ("vanilla", vanilla_d_loss)])
def test_discriminator_sees_real_and_fake_in_separate_passes(kind, rule):
    loss, tail = build(disc_loss=kind, disc_factor=0.5), Tail()
    fake = tail().detach()
    got = loss.discriminate(tail.x, fake, step=0)
    want = 0.5 * rule(loss.discriminator(tail.x), loss.discriminator(fake))
    torch.testing.assert_close(got.total, want)
    mixed = loss.discriminator(torch.cat([tail.x, fake])).chunk(2)
    assert not torch.allclose(got.total, 0.5 * rule(*mixed))  # joint statistics would differ


def test_both_adversarial_terms_wait_for_their_start():
    loss, tail = build(disc_start=4, gan_start=6, gan_ramp=1), Tail()
    before = {k: v.clone() for k, v in loss.discriminator.state_dict().items()}
    for step in range(8):
        gen = loss.generator(tail.x, tail(), tail.codebook, tail.conv.weight, step)
        disc = loss.discriminate(tail.x, tail(), step)
        assert disc.active == (step >= 4) and bool(disc.total.any()) == (step >= 4)
        assert disc.total.requires_grad == (step >= 4)
        assert bool(gen.parts["gan"].any()) == bool(gen.d_weight.any()) == (step >= 6)
        if step == 3:  # not even running statistics have moved
            now = loss.discriminator.state_dict()
            assert all(torch.equal(v, now[k]) for k, v in before.items())
    assert [loss.gan_factor(s) for s in (5, 6, 7, 8)] == [0, 0.5, 1, 1]


def test_gan_starts_with_the_discriminator_by_default():
    assert [build(disc_start=5).gan_factor(s) for s in (4, 5)] == [0, 1]


def test_fixed_weight_is_used_as_it_is():
    loss, tail = build(disc_adaptive=False, disc_weight=0.25), Tail()
    out = loss.generator(tail.x, tail(), tail.codebook, tail.conv.weight, step=0)
    assert out.d_weight.item() == 0.25
    want = out.nll + 0.25 * out.parts["gan"] + out.parts["codebook"]
    torch.testing.assert_close(out.total.detach(), want)


def test_validation_without_a_graph_weighs_the_gan_term_zero():
    loss, tail = build().eval(), Tail()
    with torch.no_grad():
        out = loss.generator(tail.x, tail(), tail.codebook, tail.conv.weight, step=0)
    assert out.d_weight.item() == 0 and out.parts["gan"].any()
    torch.testing.assert_close(out.total, out.nll + out.parts["codebook"])


@pytest.mark.parametrize(
    ("where", "name"), [("x", "rec"), ("codebook", "codebook"), ("d", "gan"), ("p", "perceptual")]
)
def test_a_nan_shows_in_its_component_and_in_the_total(where, name):
    loss, tail = build(), Tail()
    with torch.no_grad():
        if where == "x":
            tail.x[0, 0, 0, 0] = math.nan
        elif where == "codebook":
            tail.codebook.fill_(math.nan)
        elif where == "d":
            loss.discriminator.main[0].weight.fill_(math.nan)
        else:
            loss.perceptual.lin0.model[1].weight.fill_(math.nan)
    out = loss.generator(tail.x, tail(), tail.codebook, tail.conv.weight, step=0)
    assert non_finite(out.parts) == name
    assert out.d_weight.isfinite() and not out.total.isfinite()


def test_perfect_reconstruction_has_finite_gradients():
    loss, tail = build(), Tail()
    out = loss.generator(tail().detach(), tail(), tail.codebook, tail.conv.weight, step=0)
    out.total.backward()
    assert out.parts["rec"].item() == 0 and tail.conv.weight.grad.isfinite().all()


def test_l2_and_bce_are_mean_errors():
    tail = Tail()
    off = {"perceptual_weight": 0, "disc_factor": 0}
    x_hat = tail().detach()
    one_hot = (tail.x > 0).float()
    got = build(pixel="l2", **off).generator(tail.x, x_hat, tail.codebook, tail.conv.weight, 0)
    torch.testing.assert_close(got.parts["rec"], F.mse_loss(x_hat, tail.x))
    got = build(pixel="bce", **off).generator(one_hot, x_hat, tail.codebook, tail.conv.weight, 0)
    torch.testing.assert_close(
        got.parts["rec"], F.binary_cross_entropy(x_hat.sigmoid(), one_hot), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reconstructions_get_their_gradient(dtype):
    loss, tail = build(), Tail()
    want = loss.generator(tail.x, tail(), tail.codebook, tail.conv.weight, step=0)
    want.total.backward()
    grad, tail.conv.weight.grad = tail.conv.weight.grad, None
    with torch.autocast("cpu", dtype):
        x_hat = tail()
        assert x_hat.dtype == dtype
        got = loss.generator(tail.x, x_hat, tail.codebook, tail.conv.weight, step=0)
    (got.total * 1024).backward()
    assert got.total.dtype == torch.float32
    torch.testing.assert_close(got.total, want.total, rtol=0.05, atol=0)
    torch.testing.assert_close(got.d_weight, want.d_weight, rtol=0.1, atol=0)
    error = (tail.conv.weight.grad / 1024 - grad).norm() / grad.norm()
    assert error < 0.1


def test_parts_that_are_off_are_not_built():
    loss = Stage1Loss(perceptual_weight=0, disc_factor=0)
    assert loss.perceptual is None and loss.discriminator is None and not list(loss.parameters())
    tail = Tail()
    out = loss.generator(tail.x, tail(), tail.codebook, tail.conv.weight, step=10**9)
    assert not out.parts["perceptual"].any() and not out.parts["gan"].any()
    assert not loss.discriminate(tail.x, tail(), step=10**9).active


def test_the_discriminator_fits_the_images():
    assert build(image_size=16).discriminator.n_layers == 2
    assert build(image_size=256, disc_norm="actnorm").discriminator.n_layers == 3
    assert build(in_channels=1).discriminator.input_nc == 1


def test_missing_perceptual_weights_say_how_to_do_without(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"vgg16-397923af\.pth.*perceptual_weight of 0"):
        Stage1Loss()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pixel": "l3"}, ValueError, "pixel.*l3"),
        ({"disc_loss": "lsgan"}, ValueError, "disc_loss"),
        ({"disc_norm": "group"}, ValueError, "disc_norm"),
        ({"disc_start": -1}, ValueError, "disc_start"),
        ({"disc_weight": math.nan}, ValueError, "disc_weight"),
        ({"codebook_weight": "1"}, TypeError, "codebook_weight"),
        ({"pixel": "bce"}, ValueError, "perceptual_weight 0"),
        ({"image_size": 4}, ValueError, "at least 6"),
        ({"perceptual_net": "resnet"}, ValueError, "resnet"),
    ],
)
def test_arguments_are_checked(change, error, words):
    with pytest.raises(error, match=words):
        build(**change)
