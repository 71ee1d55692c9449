"""float16 training: the scale of the losses halves on an overflow, the step is skipped and counted,
and a resume knows all of it.
"""

import functools
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vqfast.config import load
from vqfast.data.codes import save_codes
from vqfast.errors import NonFiniteError
from vqfast.train import tokenizer, transformer
from vqfast.train.distributed import World
from vqfast.train.stage import BadStep
from vqfast.train.tokenizer import TokenizerConfig, TokenizerStage

STAGE_1 = {
    "model": {
        "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [8],
        "z_channels": 8, "n_embed": 16, "embed_dim": 4,
    },
    "loss": {"perceptual_weight": 0.0, "disc_start": 1, "disc_channels": 8, "disc_num_layers": 1},
    "data": {"size": 16, "batch_size": 2},
}  # fmt: skip
STAGE_2 = {"model": {"n_layer": 1, "n_head": 2, "n_embd": 16}, "data": {"batch_size": 2}}
TRAIN = {
    "max_steps": 8, "log_every": 1, "learning_rate": 2e-3, "images_every": 0, "precision": "fp16",
    "tensorboard": False, "max_bad_steps": 2, "save_every": 3,
}  # fmt: skip


@pytest.fixture
def scale(monkeypatch):
    """scale(first, interval) sets where GradScaler begins, and good steps until it grows."""

    def set_to(first, interval=2000):
        made = functools.partial(GradScaler, init_scale=first, growth_interval=interval)
        monkeypatch.setattr(torch.amp, "GradScaler", made)

    GradScaler = torch.amp.GradScaler
    return set_to


def write_config(tmp_path, stage):
    path = tmp_path / f"{stage}.yaml"
    path.write_text(yaml.safe_dump({**(STAGE_1 if stage == 1 else STAGE_2), "train": TRAIN}))
    return path


@pytest.fixture
def train(tmp_path, two_pictures, tiny_tokenizer):
    """train(stage, out, *overrides) -> the folder of a run."""

    def call(stage, out, *overrides, **more):
        path, out = write_config(tmp_path, stage), tmp_path / out
        more |= {"out": out, "device": "cpu"}
        if stage == 1:
            assert tokenizer.run(path, overrides, data=two_pictures[0].parent, **more) == 0
        else:
            codes, noise = tmp_path / "codes.safetensors", torch.Generator().manual_seed(0)
            save_codes(codes, torch.randint(0, 16, (4, 8, 8), generator=noise))
            assert (
                transformer.run(path, overrides, data=codes, tokenizer=tiny_tokenizer, **more) == 0
            )
        return out

    return call


def column(out, name):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line.get(f"train/{name}") for line in lines]


def bits(out):
    files = sorted((out / "last").glob("*.safetensors"))
    return {f"{f.name}:{name}": x for f in files for name, x in load_file(f).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def a_stage(tmp_path, *overrides):
    torch.manual_seed(0)
    config = load(write_config(tmp_path, 1), ("data.size=16", *overrides), TokenizerConfig)
    return TokenizerStage(config, World(0, 1, torch.device("cpu")), None)


def a_batch():
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return {"image": image, "label": torch.zeros(2, dtype=torch.int64)}


# ---- runs


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_goes_as_in_float32(train, stage):
    half = train(stage, "fp16")
    whole = train(stage, "fp32", "train.precision=fp32")
    losses = column(half, "loss")
    # the first gradient is of equal weights; after that the runs part, as Adam divides small errors
    assert column(half, "grad_norm")[0] == pytest.approx(column(whole, "grad_norm")[0], rel=0.01)
    assert losses[:3] == pytest.approx(column(whole, "loss")[:3], rel=0.02)
    assert losses[1] != column(whole, "loss")[1] and losses[-1] < losses[0]
    assert column(half, "loss_scale") == [2.0**16] * 8
    assert column(half, "skipped_steps") == [0] * 8
    assert column(whole, "loss_scale") == [None] * 8
    state = load_file(half / "last" / "train_state.safetensors")
    assert not [n for n, x in state.items() if x.dtype == torch.float16]


@pytest.mark.parametrize("stage", [1, 2])
def test_an_overflow_halves_the_scale_and_is_counted(train, scale, stage):
    scale(2.0**40)
    out = train(stage, "out", "train.max_steps=40")
    scales, skipped = column(out, "loss_scale"), column(out, "skipped_steps")
    n = int(skipped[-1])
    assert 3 <= n < 38  # more in a row than max_bad_steps, and an end
    for step, (now, count) in enumerate(zip(scales, skipped, strict=True), 1):
        assert now == 2.0 ** (40 - count)
        assert count <= step
    losses = column(out, "loss")
    assert losses[:3] == [None] * 3 and [x is None for x in losses].count(True) == n
    assert all(x.isfinite().all() for x in bits(out).values() if x.is_floating_point())


@pytest.mark.parametrize("stage", [1, 2])
def test_stop_and_resume_gives_the_same_bits(train, scale, stage):
    """Through overflows and growth of the scale."""
    scale(2.0**22, interval=2)
    more = ("train.max_steps=14", "train.ema_decay=0.9")
    whole = train(stage, "whole", *more)
    seen = column(whole, "loss_scale")
    steps = list(zip(seen, seen[1:], strict=False))
    assert any(a < b for a, b in steps) and any(a > b for a, b in steps)
    for stop in (5, 6, None):
        out = train(stage, "out", *more, max_steps=stop)
    assert same(bits(whole), bits(out))
    assert column(out, "skipped_steps") == column(whole, "skipped_steps")


def test_a_run_may_change_its_precision(train):
    train(2, "out", "train.precision=fp32", max_steps=2)
    out = train(2, "out", max_steps=4)
    assert column(out, "loss_scale") == [None, None, 2.0**16, 2.0**16]
    out = train(2, "out", "train.precision=bf16", max_steps=5)
    assert column(out, "loss_scale")[-1] is None


def test_an_exploding_run_still_ends(train, tmp_path):
    with pytest.raises(NonFiniteError):
        train(2, "out", "train.learning_rate=1e30", "train.save_every=1", "train.max_steps=60")
    values = bits(tmp_path / "out").values()
    assert all(x.isfinite().all() for x in values if x.is_floating_point())


# ---- one step


def test_a_skipped_step_moves_nothing(tmp_path, scale):
    scale(2.0**40)
    stage = a_stage(tmp_path)
    before = {n: x.clone() for n, x in stage.tensors().items()}
    with pytest.raises(BadStep) as error:
        stage.step(3, [a_batch()])
    assert error.value.overflow and stage.skipped == 1
    after = stage.tensors()
    assert after.pop("scaler").tolist() == [2.0**39, 0, 1]
    before.pop("scaler")
    assert same(before, after)


def test_gradients_that_are_not_finite_are_no_overflow_for_ever(tmp_path, scale):
    scale(8.0)
    stage = a_stage(tmp_path)
    stage.model.decoder.conv_in.weight.register_hook(lambda grad: grad * float("inf"))
    seen = []
    for step in range(5):
        with pytest.raises(BadStep, match="rec: gradient") as error:
            stage.step(step, [a_batch()])
        seen.append(error.value.overflow)
    assert seen == [True, True, True, False, False]
    assert stage.skipped == 3


def test_a_loss_that_is_not_finite_is_no_overflow(tmp_path):
    stage = a_stage(tmp_path)
    bad = a_batch()
    bad["image"][0, 0, 0, 0] = float("nan")
    with pytest.raises(BadStep, match="rec: loss") as error:
        stage.step(0, [bad])
    assert not error.value.overflow and stage.skipped == 0
    stage.step(1, [a_batch()])  # and the next one is as if it had not been


def test_an_overflow_of_the_discriminator_alone_is_one(tmp_path, scale):
    scale(2.0**10)
    stage = a_stage(tmp_path)
    first = next(stage.loss.discriminator.parameters())
    first.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(BadStep, match="discriminator gradient") as error:
        stage.step(3, [a_batch()])
    assert error.value.overflow and stage.scaler.get_scale() == 2.0**9
