"""Stage 2: order and content of cached codes, conditions, and runs that resume to the same bits."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from vqfast.config import ConfigError, load
from vqfast.data import Batches, ImageDataset, open_source
from vqfast.data.codes import CodesDataset
from vqfast.errors import DataError, NonFiniteError
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.pipeline import Pipeline
from vqfast.train import codes, transformer
from vqfast.train.codes import CodeFeed, Encoder, encode_pictures
from vqfast.train.distributed import World
from vqfast.train.settings import DataSection
from vqfast.train.transformer import TransformerConfig

WORLD = World(0, 1, torch.device("cpu"))
TREE = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16},
    "data": {"size": 8, "batch_size": 2, "max_bad_fraction": 0.5},
    "train": {
        "max_steps": 8,
        "save_every": 3,
        "log_every": 1,
        "learning_rate": 1e-2,
        "max_bad_steps": 2,
        "images_every": 0,
        "tensorboard": False,
    },
}


def tiny_tokenizer(seed=0):
    torch.manual_seed(seed)
    return VQGAN(
        VQGANConfig(
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
            attn_resolutions=(),
            attn_type="none",
            resolution=8,
            z_channels=8,
            n_embed=16,
            embed_dim=4,
        )
    ).eval()


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def draw(path, seed):
    noise = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (8, 8, 3), generator=noise, dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


@pytest.fixture
def pictures(tmp_path):
    for i in range(7):
        draw(tmp_path / "pictures" / f"{i}.png", i)
    return tmp_path / "pictures"


@pytest.fixture
def classes(tmp_path):
    for name in ("cat", "dog", "owl"):
        for i in range(3):
            draw(tmp_path / "classes" / name / f"{i}.png", hash((name, i)) % 1000)
    return tmp_path / "classes"


def run(config_file, tokenizer, data, out, *overrides, **more):
    return transformer.run(
        config_file, overrides, tokenizer=tokenizer, data=data, out=out, device="cpu", **more
    )


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def bits(out):
    files = sorted((Path(out) / "last").glob("*.safetensors"))
    return {f"{f.name}:{name}": x for f in files for name, x in load_file(f).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---- cached codes


@pytest.mark.parametrize("flip", [False, True])
def test_cached_codes_are_those_of_the_pictures_in_their_order(pictures, flip):
    model, source = tiny_tokenizer(), open_source(pictures)
    data = DataSection(size=8, batch_size=3, flip=flip)
    made = encode_pictures(source, data, Encoder(model, None, WORLD), None)
    feed = CodeFeed(made, "", data, seed=5, world=WORLD, accumulate=2)
    batches = Batches(ImageDataset(source, 8, flip=flip), 3, seed=5)
    for step in range(4):
        for got in feed.take(step):
            expected = model.encode(next(batches)["image"]).flatten(1)
            assert torch.equal(got["codes"], expected)
    assert made.codes.shape == (7, 2 if flip else 1, 4, 4)
    assert len({tuple(row.tolist()) for row in made.codes[:, 0].flatten(1)}) > 3


def test_each_rank_takes_its_own_share(pictures):
    data = CodesDataset("", torch.arange(56).reshape(7, 2, 2, 2), torch.zeros(7))
    one = CodeFeed(data, "", DataSection(batch_size=4), 3, WORLD, 1)
    two = [
        CodeFeed(data, "", DataSection(batch_size=2), 3, World(r, 2, torch.device("cpu")), 1)
        for r in range(2)
    ]
    for step in range(5):
        together = torch.cat([feed.take(step)[0]["codes"] for feed in two])
        assert torch.equal(one.take(step)[0]["codes"], together)


def test_stored_codes_are_used_again_and_only_for_the_same_inputs(pictures, tmp_path, monkeypatch):
    source, data = open_source(pictures), DataSection(size=8)
    counted, original = [], codes._encode
    monkeypatch.setattr(codes, "_encode", lambda *a: (counted.append(1), original(*a))[1])
    first = encode_pictures(source, data, Encoder(tiny_tokenizer(), None, WORLD), tmp_path)
    again = encode_pictures(source, data, Encoder(tiny_tokenizer(), None, WORLD), tmp_path)
    assert len(counted) == 1
    assert torch.equal(first.codes, again.codes) and torch.equal(first.labels, again.labels)
    encode_pictures(source, data, Encoder(tiny_tokenizer(1), None, WORLD), tmp_path)
    assert len(counted) == 2
    (tmp_path / "codes.safetensors").write_bytes(b"damaged")
    encode_pictures(source, data, Encoder(tiny_tokenizer(1), None, WORLD), tmp_path)
    assert len(counted) == 3


def test_bad_pictures_are_left_out_and_counted(pictures, config_file, tokenizer, tmp_path, capsys):
    (pictures / "bad.png").write_bytes(b"x")
    out = tmp_path / "out"
    assert run(config_file, tokenizer, pictures, out, max_steps=2) == 0
    assert capsys.readouterr().err.count("bad.png") == 1
    assert rows(out)[-1]["data/skipped"] == 1
    with pytest.raises(DataError, match=r"bad\.png"):
        run(config_file, tokenizer, pictures, tmp_path / "strict", "data.max_bad_fraction=0")


# ---- runs


@pytest.mark.parametrize(
    "more", [(), ("data.crop=random", "data.flip=true", "train.ema_decay=0.9")]
)
def test_stop_and_resume_gives_the_same_bits(config_file, tokenizer, pictures, tmp_path, more):
    more = (*more, "train.pkeep=0.8", "model.resid_pdrop=0.1")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(config_file, tokenizer, pictures, whole, *more) == 0
    for steps in (4, None):
        assert run(config_file, tokenizer, pictures, out, *more, max_steps=steps) == 0
    assert same(bits(whole), bits(out))
    assert [r["step"] for r in rows(out)] == list(range(1, 9))


def test_last_is_a_pipeline_that_samples(config_file, tokenizer, pictures, tmp_path):
    out = tmp_path / "out"
    assert run(config_file, tokenizer, pictures, out, "train.max_steps=60") == 0
    losses = [r["train/loss"] for r in rows(out)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    pipe = Pipeline.from_pretrained(out / "last")
    assert pipe.conditioning.kind == "sos"
    assert pipe.sample(n=1, seed=0)[0].size == (8, 8)
    trained = load_file(out / "last" / "model.safetensors")
    assert torch.equal(trained["tokenizer.quant_conv.weight"], tiny_tokenizer().quant_conv.weight)


def test_class_folders_make_a_class_model(config_file, tokenizer, classes, tmp_path):
    out = tmp_path / "out"
    assert run(config_file, tokenizer, classes, out, "train.class_dropout=0.5") == 0
    pipe = Pipeline.from_pretrained(out / "last")
    assert pipe.conditioning.class_names == ["cat", "dog", "owl"]
    assert pipe.conditioning.null_class == 3
    assert pipe.transformer.config.vocab_size == 16
    assert pipe.transformer.config.block_size == 16
    assert len(pipe.sample(classes=["owl"], n=1, seed=0, cfg_scale=2.0)) == 1


def _stage(config_file, tokenizer, data, *overrides):
    more = (*overrides, f"tokenizer='{tokenizer}'", f"data.path='{data}'")
    config = load(config_file, more, TransformerConfig)
    return transformer._build(config, WORLD, None)


def test_label_dropout_is_off_outside_training(config_file, tokenizer, classes):
    stage, _ = _stage(config_file, tokenizer, classes, "train.class_dropout=0.5")
    batch = {"codes": torch.zeros(200, 16, dtype=torch.int64), "label": torch.arange(200) % 3}
    stage.train_mode(False)
    assert torch.equal(stage._tokens(batch)[1][:, 0], batch["label"])
    stage.train_mode(True)
    dropped = (stage._tokens(batch)[1] == 3).float().mean()
    assert 0.35 < float(dropped) < 0.65


def test_a_picture_without_class_is_refused(config_file, tokenizer, classes, tmp_path):
    draw(classes / "alone.png", 1)
    with pytest.raises(ConfigError, match="1 pictures of"):
        run(config_file, tokenizer, classes, tmp_path / "out")
    assert (
        run(config_file, tokenizer, classes, tmp_path / "out", "model.conditioning=unconditional")
        == 0
    )


def test_codes_of_another_picture_are_a_condition(config_file, tokenizer, pictures, tmp_path):
    other = tmp_path / "condition"
    for i in range(7):
        draw(other / f"{i}.jpg", 100 + i)
    more = ("model.conditioning=image", f"data.condition_path='{other}'", "data.flip=true")
    for name, extra in (("a", ()), ("b", (f"model.condition_tokenizer='{tokenizer}'",))):
        assert (
            run(config_file, tokenizer, pictures, tmp_path / name, *more, *extra, max_steps=2) == 0
        )
        pipe = Pipeline.from_pretrained(tmp_path / name / "last")
        assert pipe.conditioning.kind == ("tokenizer" if extra else "first_stage")
        assert pipe.transformer.config.block_size == 31
    (other / "6.jpg").rename(other / "other.jpg")
    with pytest.raises(DataError, match="names"):
        run(config_file, tokenizer, pictures, tmp_path / "c", *more)


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("model.conditioning=class", "model.conditioning"),
        ("model.conditioning=image", "data.condition_path"),
        ("model.vocab_size=3", "model.vocab_size"),
        ("model.block_size=3", "model.block_size"),
        ("model.n_head=3", "model.n_embd"),
        ("data.size=9", "data.size"),
    ],
)
def test_what_cannot_be_is_refused_by_its_path(
    config_file, tokenizer, pictures, tmp_path, override, path
):
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        run(config_file, tokenizer, pictures, tmp_path / "out", override)


def test_another_tokenizer_on_resume_is_refused(config_file, tokenizer, pictures, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    tiny_tokenizer(1).save_pretrained(other)
    assert run(config_file, tokenizer, pictures, out, max_steps=1) == 0
    with pytest.raises(ConfigError, match="tokenizer"):
        run(config_file, other, pictures, out)


def test_an_exploding_run_ends_with_finite_checkpoints(config_file, tokenizer, pictures, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(NonFiniteError, match="cross-entropy"):
        run(config_file, tokenizer, pictures, out, "train.learning_rate=1e30", "train.save_every=1")
    assert all(x.isfinite().all() for x in bits(out).values() if x.is_floating_point())


def test_validation_and_samples_are_written(config_file, tokenizer, pictures, tmp_path):
    out = tmp_path / "out"
    more = ("train.val_every=4", "train.images_every=8", "data.val_fraction=0.6", "train.samples=2")
    assert run(config_file, tokenizer, pictures, out, *more) == 0
    assert [r["step"] for r in rows(out) if "val/loss" in r] == [4, 8]
    assert (out / "images" / "step_00000008_samples.png").exists()


def test_dry_run_writes_nothing(config_file, tokenizer, pictures, tmp_path, capsys):
    assert run(config_file, tokenizer, pictures, tmp_path / "out", dry_run=True) == 0
    assert "parameters: transformer" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
