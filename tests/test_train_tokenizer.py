"""Stage 1: the arithmetic of one step, and the guard in front of the weights."""

import copy

import pytest
import torch
import yaml

from vqfast import losses
from vqfast.config import load
from vqfast.nn import blocks, trained_conv
from vqfast.testing import tolerances
from vqfast.train.distributed import World
from vqfast.train.stage import BadStep
from vqfast.train.tokenizer import TokenizerConfig, TokenizerStage

WORLD = World(0, 1, torch.device("cpu"))
TREE = {
    "model": {
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "attn_type": "none",
        "z_channels": 8,
        "n_embed": 16,
        "embed_dim": 4,
    },
    "loss": {"perceptual_weight": 0.0, "disc_start": 3, "disc_channels": 8, "disc_num_layers": 1},
    "data": {"size": 8, "batch_size": 2, "max_bad_fraction": 0.5},
    "train": {
        "max_steps": 8,
        "save_every": 3,
        "log_every": 1,
        "learning_rate": 1e-3,
        "max_bad_steps": 2,
        "images_every": 0,
        "tensorboard": False,
    },
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def settings(config_file, *overrides):
    return load(config_file, overrides, TokenizerConfig)


def stage(config_file, *overrides, seed=0):
    torch.manual_seed(seed)
    return TokenizerStage(settings(config_file, *overrides), WORLD, None)


def batch(seed=0, n=2, side=8):
    image = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return {"image": image, "label": torch.zeros(n, dtype=torch.int64)}


def state_of(s):
    return {name: x.clone() for name, x in s.tensors().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def largest_difference(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# ---- one step


@pytest.mark.parametrize("mode", ["shared", "taming"])
def test_generator_gradient_is_that_of_the_formula(config_file, mode):
    """Against plain autograd of rec + codebook + λ·g, with λ from taming's two gradients."""
    s = stage(config_file, f"train.discriminator_pass={mode}", "loss.disc_start=0")
    x = batch()["image"]
    s.train_mode(True)
    x_hat, codebook, _ = s.model(x)
    nll = (x - x_hat).abs().mean()
    g = -s.loss.discriminator(x_hat).mean()
    weight = losses.adaptive_weight(nll, g, s.model.last_layer, 0.8)
    expected = torch.autograd.grad(nll + weight * g + codebook, s._weights["model"])
    row = s._generator_pass(x, 0, 1)
    got = [p.grad for p in s._weights["model"]]
    assert torch.allclose(row["d_weight"], weight, rtol=1e-4)
    scale = max(float(e.abs().max()) for e in expected)
    assert largest_difference(got, expected) < 1e-4 * scale
    assert all(p.grad is None for p in s.loss.discriminator.parameters())


def test_taming_shows_the_discriminator_the_updated_autoencoder(config_file, monkeypatch):
    seen = {}
    for mode in ("shared", "taming"):
        s = stage(config_file, f"train.discriminator_pass={mode}", "loss.disc_start=0")
        before, fakes = s.model(batch()["image"])[0].detach(), []
        real = s.loss.discriminate
        monkeypatch.setattr(
            s.loss, "discriminate", lambda x, y, n, f=fakes, r=real: (f.append(y), r(x, y, n))[1]
        )
        s.step(0, [batch()])
        after = s.model(batch()["image"])[0].detach()
        seen[mode] = (fakes, before, after)
    (fake,), before, after = seen["shared"]
    assert torch.allclose(fake, before, atol=1e-6)
    assert not torch.allclose(fake, after, atol=1e-6)
    (fake,), before, after = seen["taming"]
    assert torch.allclose(fake, after, atol=1e-6)
    assert not torch.allclose(fake, before, atol=1e-6)


def test_discriminator_rests_before_its_start(config_file):
    s = stage(config_file, "loss.disc_start=2", "loss.gan_start=4")
    critic = s.loss.discriminator.main[0].weight
    for step, learns in ((0, False), (1, False), (2, True), (3, True), (4, True)):
        before = critic.detach().clone()
        values = s.step(step, [batch(step)])
        assert torch.equal(before, critic) != learns
        assert (float(values["disc_loss"]) > 0) == learns
        assert (float(values["d_weight"]) > 0) == (step >= 4)


def test_accumulation_is_the_mean_of_its_passes(config_file, monkeypatch):
    two = {"image": torch.cat([batch(1)["image"], batch(2)["image"]]), "label": torch.zeros(4)}
    found = []
    for batches in ([two], [batch(1), batch(2)], [batch(1)]):
        s = stage(config_file, "loss.disc_factor=0")
        weights, optimizer = s._weights["model"], s.optimizers["model"][0]
        monkeypatch.setattr(
            optimizer, "step", lambda w=weights: found.append([p.grad.clone() for p in w])
        )
        s.step(0, batches)
    whole, parts, alone = found
    scale = max(float(g.abs().max()) for g in whole)
    assert largest_difference(whole, parts) < 1e-5 * scale
    assert largest_difference(whole, alone) > 1e-2 * scale


@pytest.mark.parametrize("quantizer", ["vq", "ema"])
@pytest.mark.parametrize("mode", ["shared", "taming"])
def test_a_refused_step_leaves_no_trace(config_file, quantizer, mode):
    s = stage(
        config_file,
        "loss.disc_start=0",
        "train.ema_decay=0.9",
        f"model.quantizer={quantizer}",
        f"train.discriminator_pass={mode}",
    )
    s.step(0, [batch()])
    before = state_of(s)
    bad = batch()
    bad["image"][0, 0, 0, 0] = float("nan")
    with pytest.raises(BadStep) as error:
        s.step(1, [bad])
    assert error.value.component == "rec"
    assert same(before, state_of(s))
    assert all(p.grad is None for p in s.model.parameters())
    s.step(1, [batch()])
    assert not same(before, state_of(s))


@pytest.mark.parametrize(
    ("part", "component"),
    [("perceptual", "perceptual"), ("gan", "gan"), ("codebook", "codebook")],
)
def test_the_component_that_is_not_finite_is_named(config_file, monkeypatch, part, component):
    s = stage(config_file, "loss.disc_start=0")
    original = s.loss.generator

    def spoilt(*inputs):
        out = original(*inputs)
        out.parts[part] = torch.tensor(float("inf"))
        return out

    monkeypatch.setattr(s.loss, "generator", spoilt)
    with pytest.raises(BadStep) as error:
        s.step(0, [batch()])
    assert error.value.component == component


def test_a_bad_discriminator_step_is_refused_alone(config_file, monkeypatch):
    s = stage(config_file, "loss.disc_start=0", "train.discriminator_pass=taming")
    original = s.loss.discriminate

    def spoilt(*inputs):
        out = original(*inputs)
        return losses.DiscriminatorLoss(out.total * float("nan"), out.parts, True)

    monkeypatch.setattr(s.loss, "discriminate", spoilt)
    critic = {n: x.clone() for n, x in s.loss.discriminator.state_dict().items()}
    with pytest.raises(BadStep, match="gan"):
        s.step(0, [batch()])
    assert all(x.isfinite().all() for x in s.tensors().values() if x.is_floating_point())
    for name in ("main.0.weight", "main.2.weight"):
        assert torch.equal(critic[name], s.loss.discriminator.state_dict()[name])


def test_clipping_bounds_the_gradient(config_file, monkeypatch):
    seen = []
    s = stage(config_file, "train.grad_clip=0.01", "loss.disc_factor=0")
    optimizer = s.optimizers["model"][0]
    monkeypatch.setattr(
        optimizer, "step", lambda: seen.append([p.grad.norm() for p in s._weights["model"]])
    )
    values = s.step(0, [batch()])
    assert float(values["grad_norm"]) > 0.02
    assert float(torch.stack(seen[0]).norm()) == pytest.approx(0.01, rel=1e-3)


def test_an_unused_code_moves_onto_a_latent(config_file):
    s = stage(config_file, "train.revive_after=3", "model.n_embed=64", "loss.disc_factor=0")
    weight = s.model.quantize.embedding.weight
    with torch.no_grad():
        weight[10:] += 100  # nothing is near them
    moved = [float(s.step(step, [batch(step)])["revived"]) for step in range(3)]
    assert moved[:2] == [0, 0]
    latents = s._latents.movedim(1, -1).reshape(-1, 4)
    near = torch.cdist(weight[10:].detach(), latents).amin(1) < 1e-6
    assert 0 < int(near.sum()) <= moved[2] <= len(latents)
    moment = s.optimizers["model"][0].state[weight]["exp_avg"]
    assert not moment[10:][near].any()


def test_usage_counts_codes_of_recent_steps(config_file):
    s = stage(config_file, "loss.disc_factor=0")
    values = s.step(0, [batch()])
    used = set(s.model.encode(batch()["image"]).reshape(-1).tolist())
    assert 0 < float(values["usage"]) <= 1
    assert used  # codes after the update; the metric is of before
    s.extra["last_used"].fill_(-(10**6))
    values = s.step(500, [batch()])
    seen = int((s.extra["last_used"] == 500).sum())
    assert float(values["usage"]) == pytest.approx(seen / 16)


def test_bf16_trains_and_keeps_float32_weights(config_file):
    s = stage(config_file, "train.precision=bf16", "loss.disc_start=0")
    first = [float(s.step(i, [batch()])["rec_loss"]) for i in range(15)]
    assert first[-1] < 0.95 * first[0]
    assert all(x.dtype != torch.bfloat16 for x in s.tensors().values())


def test_gumbel_temperature_follows_its_schedule(config_file):
    more = ("model.quantizer=gumbel", "model.embed_dim=8", "loss.disc_factor=0")
    s = stage(config_file, *more, "train.temperature=[2,0.5]", "train.temperature_steps=4")
    seen = []
    for step in (0, 2, 4, 9):
        s.step(step, [batch()])
        seen.append(s.model.quantize.temperature)
    assert seen == [2, 1.25, 0.5, 0.5]
    s = stage(config_file, *more, "model.temp_init=0.7")
    s.step(0, [batch()])
    assert s.model.quantize.temperature == 0.7


def plain_steps(model, critic, images, half=False):
    """taming's arithmetic written out: one graph, one backward pass for each gradient of λ, torch's
    Adam; the discriminator sees the reconstructions of the one forward. half: networks and losses
    run under autocast to bfloat16. The weights afterwards.
    """
    nets = (model, critic)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.5, 0.9)) for m in nets]
    for x in images:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            x_hat, codebook, _ = model(x)
            x_hat = x_hat if x_hat.dtype == torch.float64 else x_hat.float()
            nll, g = (x - x_hat).abs().mean(), -critic(x_hat).mean()
        weight = losses.adaptive_weight(nll, g, model.last_layer, 0.8)
        for_model = torch.autograd.grad(nll + weight * g + codebook, list(model.parameters()))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            real, fake = (critic(t) for t in (x, x_hat.detach()))
        d_loss = losses.hinge_d_loss(*(t.to(x.dtype) for t in (real, fake)))
        for_critic = torch.autograd.grad(d_loss, list(critic.parameters()))
        for m, grads, optimizer in zip(nets, (for_model, for_critic), optimizers, strict=True):
            for p, grad in zip(m.parameters(), grads, strict=True):
                p.grad = grad
            optimizer.step()
    return flat(model, critic)


def plain_conv3x3(x, weight, bias, residual=None):
    y = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    return y if residual is None else y + residual


def flat(*nets):
    return torch.cat([p.detach().double().reshape(-1) for m in nets for p in m.parameters()])


@pytest.mark.parametrize(
    ("precision", "side", "most"), [("fp32", 8, 0.1), ("fp32", 32, 0.1), ("bf16", 32, 0.5)]
)
def test_ten_steps_are_those_of_the_plain_formulation(
    config_file, precision, side, most, monkeypatch
):
    """Within the rounding that the plain formulation itself has in that precision."""
    s = stage(config_file, "loss.disc_start=0", f"train.precision={precision}", f"data.size={side}")
    nets = (s.model, s.loss.discriminator)
    start, images = flat(*nets), [batch(step, n=8, side=side)["image"] for step in range(10)]
    with monkeypatch.context() as plain:  # torch's convolutions
        plain.setattr(blocks, "trained_conv3x3", plain_conv3x3)
        plain.setattr(trained_conv, "FEW_POSITIONS", 0)
        plain.setattr(trained_conv, "_by_winograd", lambda *_: False)
        theirs = plain_steps(*copy.deepcopy(nets), images, half=precision == "bf16")
    wide = [m.double() for m in copy.deepcopy(nets)]
    exact = plain_steps(*wide, [x.double() for x in images])
    for step, x in enumerate(images):
        s.step(step, [{"image": x}])
    ours = flat(*nets)
    distance = torch.linalg.vector_norm
    allowed = tolerances.BACKWARD * distance(theirs - exact)
    # and not as far as from where they came, so that the bound says something
    assert distance(ours - exact) <= min(allowed, most * distance(exact - start))
