"""Stage 2 from files of codes: the same run as from the pictures, exact on resume, and clear about
what does not fit.
"""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vqfast.config import ConfigError
from vqfast.data.codes import CodesDataset, encoder_digest, open_codes, save_codes
from vqfast.errors import DataError
from vqfast.models.vqgan import VQGAN
from vqfast.pipeline import Pipeline
from vqfast.train import tokenizer, transformer
from vqfast.train.codes import CodeFeed
from vqfast.train.distributed import World
from vqfast.train.settings import DataSection

TREE = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "resid_pdrop": 0.1},
    "data": {"batch_size": 2},
    "train": {
        "max_steps": 8,
        "save_every": 3,
        "log_every": 1,
        "learning_rate": 1e-2,
        "pkeep": 0.8,
        "images_every": 0,
        "tensorboard": False,
    },
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


@pytest.fixture
def train(config_file, tiny_tokenizer, tmp_path):
    """train(data, out, *overrides, ...) runs in tmp_path and returns the folder `out`."""

    def call(data, out, *overrides, model=tiny_tokenizer, **more):
        out, where = tmp_path / out, {"tokenizer": model, "data": data, "device": "cpu"}
        assert transformer.run(config_file, overrides, out=out, **where, **more) == 0
        return out

    return call


@pytest.fixture
def file_of(tmp_path):
    """file_of(codes, labels, **about) -> path of a file of random codes: of 7 pictures, 8 x 8."""

    def write(codes=None, labels=None, name="given.safetensors", **about):
        noise = torch.Generator().manual_seed(3)
        given = torch.randint(0, 16, (7, 8, 8), generator=noise) if codes is None else codes
        save_codes(tmp_path / name, given, labels, **about)
        return tmp_path / name

    return write


def bits(out, only="*"):
    files = sorted((out / "last").glob(f"{only}.safetensors"))
    return {f"{f.name}:{name}": x for f in files for name, x in load_file(f).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_codes_is_the_run_on_their_pictures(train, two_pictures):
    """With mirrored pictures too; the codes are those that the first run kept."""
    flip = "data.flip=true"
    pictures = train(two_pictures[0].parent, "pictures", flip, "data.size=16")
    from_codes = train(pictures / "codes.safetensors", "codes")
    assert same(bits(pictures, "model"), bits(from_codes, "model"))
    assert [r["train/loss"] for r in rows(pictures)] == [r["train/loss"] for r in rows(from_codes)]
    straight = train(two_pictures[0].parent, "straight", "data.size=16")
    assert not same(bits(pictures, "model"), bits(straight, "model"))


def test_what_encode_writes_can_be_trained_on(
    run_cli, tmp_path, two_pictures, tiny_tokenizer, config_file
):
    model = ("--model", tiny_tokenizer, "--size", "16x16")
    for name, path in zip(("ant", "bee"), two_pictures, strict=True):
        assert run_cli("encode", path, *model, "--out", f"codes/{name}.safetensors")[0] == 0
        assert run_cli("encode", path, *model, "--out", f"classes/{name}/0.safetensors")[0] == 0
    about = open_codes(tmp_path / "codes" / "ant.safetensors").about
    assert about["encoder"] == encoder_digest(VQGAN.from_pretrained(tiny_tokenizer))
    on = ("train", "transformer", config_file, "--tokenizer", tiny_tokenizer, "--device", "cpu")
    for data, kind in (("codes", "sos"), ("classes", "class"), ("codes/ant.safetensors", "sos")):
        out = f"out_{kind}_{len(data)}"
        code, _, err = run_cli(*on, "--data", data, "--out", out, "--max-steps", 2)
        assert code == 0, err
        pipe = Pipeline.from_pretrained(tmp_path / out / "last")
        assert pipe.conditioning.kind == kind
        assert pipe.sample(n=1, seed=0)[0].size == (16, 16)
    assert Pipeline.from_pretrained(tmp_path / "out_class_7/last").conditioning.class_names == [
        "ant",
        "bee",
    ]
    code, _, err = run_cli(*on, "--data", "nothing.safetensors", "--out", "x")
    assert code == 1 and "DataError" in err and "nothing.safetensors" in err
    code, _, err = run_cli(*on[:3], "data.flip=true", *on[3:], "--data", "codes", "--out", "x")
    assert code == 2 and "data.flip" in err and "codes" in err


@pytest.mark.parametrize("variants", [1, 3])
def test_stop_and_resume_gives_the_same_bits(train, file_of, variants):
    codes = torch.randint(0, 16, (7, variants, 8, 8))
    path = file_of(codes, torch.arange(7) % 3)
    more = ("train.ema_decay=0.9", "train.class_dropout=0.3", "train.accumulate=2")
    whole = train(path, "whole", *more)
    for steps in (4, None):
        out = train(path, "out", *more, max_steps=steps)
    assert same(bits(whole), bits(out))
    assert [r["step"] for r in rows(out)] == list(range(1, 9))
    path.unlink()
    other = train(file_of(codes.flip(0), torch.arange(7) % 3), "other", *more)
    assert not same(bits(whole, "model"), bits(other, "model"))


def test_changed_codes_are_told_on_resume(train, file_of, capsys):
    train(file_of(), "out", max_steps=2)
    train(file_of(), "out", max_steps=3)
    assert "WARNING" not in capsys.readouterr().err
    train(file_of(torch.randint(0, 16, (7, 8, 8))), "out", max_steps=4)
    assert "the data are not those" in capsys.readouterr().err


def test_every_encoding_of_a_picture_is_drawn():
    n, A = 5, 3
    data = CodesDataset("", torch.arange(n * A).reshape(n, A, 1, 1), torch.zeros(n))
    world = World(0, 1, torch.device("cpu"))
    feed = CodeFeed(data, "", DataSection(batch_size=n), 1, world, 1)
    seen = torch.stack([feed.take(step)[0]["codes"].flatten() for step in range(40)])
    assert ((seen // A).sort(1).values == torch.arange(n)).all()  # each picture once an epoch
    counts = torch.bincount(seen.flatten() % A, minlength=A)
    assert counts.min() > 40 * n / A / 2


def test_held_out_codes_validate(train, file_of):
    path = file_of(names=[f"{i}.png" for i in range(7)])
    out = train(path, "part", "train.val_every=4", "data.val_fraction=0.5")
    assert [r["step"] for r in rows(out) if "val/loss" in r] == [4, 8]
    assert all(x.isfinite().all() for x in bits(out, "model").values() if x.is_floating_point())
    held = file_of(torch.randint(0, 16, (3, 8, 8)), name="held.safetensors")
    out = train(path, "two", "train.val_every=8", f"data.val_path='{held}'")
    assert [r["step"] for r in rows(out) if "val/loss" in r] == [8]
    (held.parent / "val").mkdir()
    with pytest.raises(DataError, match="val"):
        train(path, "none", "train.val_every=8", f"data.val_path='{held.parent / 'val'}'")


def test_held_out_codes_are_those_of_the_held_out_names(file_of, tiny_tokenizer):
    from vqfast.train.codes import given_codes

    names = [f"{i}.png" for i in range(7)]
    data = DataSection(path=str(file_of(names=names)), val_fraction=0.5)
    kept, held = given_codes(data, VQGAN.from_pretrained(tiny_tokenizer))
    assert data.size == 16
    assert sorted(kept.names + held.names) == names and kept.names and held.names
    whole = open_codes(data.path)
    for part in (kept, held):
        for i, name in enumerate(part.names):
            assert torch.equal(part.codes[i], whole.codes[names.index(name)])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.flip=true", "data.flip: must be false"),
        ("data.crop=random", 'data.crop: must be "center"'),
        ("data.min_crop=0.5", "data.min_crop"),
        ("data.subset=a", "data.subset: must be null"),
        ("data.condition_path=a", "data.condition_path"),
        ("data.size=32", "data.size: the codes are of pictures of 16 pixels, got 32"),
        ("model.conditioning=image", "model.conditioning: image needs pictures"),
        ("model.conditioning=class", "model.conditioning"),
    ],
)
def test_a_key_that_codes_cannot_serve_is_refused(train, file_of, override, words):
    with pytest.raises(ConfigError, match=words):
        train(file_of(), "out", override)


@pytest.mark.parametrize(
    ("codes", "about", "words"),
    [
        (torch.full((2, 8, 8), 16), {}, r"codes 16\.\.16, allowed 0\.\.15"),
        (torch.zeros(2, 8, 8).long(), {"n_codes": 32}, "made with 32 codes, the tokenizer has 16"),
        (torch.zeros(2, 8, 8).long(), {"encoder": "other"}, "another tokenizer"),
        (torch.zeros(2, 4, 8).long(), {}, "square to train on, got 4x8"),
        ([torch.zeros(8, 8).long(), torch.zeros(4, 4).long()], {}, "one size"),
    ],
)
def test_codes_that_do_not_fit_are_a_data_error(train, file_of, codes, about, words):
    with pytest.raises(DataError, match=words):
        train(file_of(codes, **about), "out")


@pytest.mark.parametrize("labels", [[0, 1, -1, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0]])
def test_labels_must_be_those_of_the_model(train, file_of, labels):
    path = file_of(labels=torch.tensor(labels))
    more = ("model.conditioning=class", "model.n_classes=2")
    with pytest.raises(ConfigError, match="1 pictures of .* have no class|model.n_classes"):
        train(path, "out", *more)


def test_kind_codes_needs_codes(train, two_pictures, tmp_path):
    for data in (two_pictures[0].parent, two_pictures[0], tmp_path / "none"):
        with pytest.raises(DataError):
            train(data, "out", "data.kind=codes")


def test_stage_1_does_not_train_on_codes(file_of, tmp_path):
    path = tmp_path / "stage_1.yaml"
    path.write_text("train: {max_steps: 1}\nloss: {perceptual_weight: 0}\n")
    for more in ((), ("data.kind=codes",)):
        with pytest.raises(DataError, match="codes, not pictures"):
            tokenizer.run(path, more, data=file_of(), out=tmp_path / "out", device="cpu")


def test_a_dry_run_on_codes_writes_nothing(train, file_of, tmp_path, capsys):
    train(file_of(), "out", dry_run=True)
    assert "codes [2, 64]" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
