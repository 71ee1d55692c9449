"""Whole runs of stage 1: stopped, killed, damaged, mistaken, and resumed to the same bits."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from vqfast._files import FolderLock
from vqfast.config import ConfigError
from vqfast.errors import CheckpointError, DataError, NonFiniteError
from vqfast.models.vqgan import VQGAN
from vqfast.train import loop, tokenizer
from vqfast.train.tokenizer import TokenizerStage

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


def write_config(folder):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def write_pictures(folder):
    folder.mkdir()
    noise = torch.Generator().manual_seed(1)
    for i in range(6):
        pixels = torch.randint(0, 256, (12, 10, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def config_file(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def run(config_file, data, out, *overrides, **more):
    return tokenizer.run(config_file, overrides, data=data, out=out, device="cpu", **more)


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def bits(out):
    files = sorted((Path(out) / "last").glob("*.safetensors"))
    return {f"{f.name}:{name}": x for f in files for name, x in load_file(f).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    data = write_pictures(folder / "pictures")
    assert run(write_config(folder), data, folder / "out", "train.ema_decay=0.9") == 0
    return folder / "out"


@pytest.fixture
def whole(finished, tmp_path):
    """A copy of the run that nothing stopped."""
    return shutil.copytree(finished, tmp_path / "whole", symlinks=True)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stop_and_resume_gives_the_same_bits(config_file, pictures, tmp_path, whole, stop):
    out = tmp_path / "stopped"
    for steps in (stop, None):
        assert run(config_file, pictures, out, "train.ema_decay=0.9", max_steps=steps) == 0
    assert same(bits(out), bits(whole))
    assert [r["step"] for r in rows(out)] == list(range(1, 9))
    names = ("train/loss", "train/usage", "train/disc_loss", "train/d_weight")
    assert [[r[n] for n in names] for r in rows(out)] == [
        [r[n] for n in names] for r in rows(whole)
    ]


def test_another_seed_gives_other_bits(config_file, pictures, tmp_path, whole):
    out = tmp_path / "other"
    assert run(config_file, pictures, out, "train.ema_decay=0.9", "train.seed=1") == 0
    assert not same(bits(out), bits(whole))


def test_last_is_a_tokenizer_with_the_averaged_weights(whole):
    model = VQGAN.from_pretrained(whole / "last")
    tensors = load_file(whole / "last" / "train_state.safetensors")
    name = "decoder.conv_out.weight"
    assert torch.equal(model.state_dict()[name], tensors[f"ema.{name}"])
    assert not torch.equal(model.state_dict()[name], tensors[f"weights.model.{name}"])


def test_a_finished_run_has_nothing_to_do(config_file, pictures, whole, capsys):
    before = bits(whole)
    assert run(config_file, pictures, whole, "train.ema_decay=0.9") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert same(before, bits(whole))


def test_damaged_checkpoints_are_passed_over(config_file, pictures, whole, capsys):
    expected = bits(whole)
    newest = (whole / "last").resolve() / "train_state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    assert run(config_file, pictures, whole, "train.ema_decay=0.9") == 0
    said = capsys.readouterr().err
    assert "not valid" in said
    assert "at step 6" in said
    assert same(bits(whole), expected)
    for path in whole.rglob("train_state.safetensors"):
        path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        run(config_file, pictures, whole, "train.ema_decay=0.9")


def test_resume_none_and_foreign_paths_never_mix(config_file, pictures, tmp_path, whole):
    with pytest.raises(ConfigError, match="holds a run already"):
        run(config_file, pictures, whole, resume="none")
    other = tmp_path / "other"
    assert run(config_file, pictures, other, max_steps=1) == 0
    with pytest.raises(ConfigError, match="holds a newer run"):
        run(config_file, pictures, other, resume=str(whole / "last"))
    with pytest.raises(CheckpointError, match="nothing to resume from"):
        run(config_file, pictures, tmp_path / "new", resume=str(tmp_path / "absent"))


def test_resume_from_a_path_continues_elsewhere(config_file, pictures, tmp_path, whole):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert run(config_file, pictures, first, "train.ema_decay=0.9", max_steps=4) == 0
    assert run(config_file, pictures, second, "train.ema_decay=0.9", resume=str(first)) == 0
    assert same(bits(second), bits(whole))
    finished = str(whole / "last")
    assert run(config_file, pictures, third, "train.ema_decay=0.9", resume=finished) == 0
    assert same(bits(third), bits(whole))


@pytest.mark.parametrize(
    "override", ["data.batch_size=3", "train.seed=9", "train.accumulate=2", "model.embed_dim=8"]
)
def test_a_resume_under_other_rules_is_refused(config_file, pictures, tmp_path, override):
    out = tmp_path / "out"
    assert run(config_file, pictures, out, max_steps=1) == 0
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        run(config_file, pictures, out, override)


def test_changed_data_are_said_aloud(config_file, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(config_file, pictures, out, max_steps=1) == 0
    (pictures / "0.png").rename(pictures / "renamed.png")
    assert run(config_file, pictures, out, max_steps=2) == 0
    assert "WARNING: the data are not those" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(
    config_file, pictures, tmp_path, whole, monkeypatch, number, code
):
    out, original = tmp_path / "out", TokenizerStage.step

    def step(self, step, batches):
        values = original(self, step, batches)
        if step == 4:
            os.kill(os.getpid(), number)
        return values

    before = signal.getsignal(number)
    monkeypatch.setattr(TokenizerStage, "step", step)
    assert run(config_file, pictures, out, "train.ema_decay=0.9") == code
    assert signal.getsignal(number) is before
    assert (out / "last").resolve().name == "step_00000005"
    monkeypatch.setattr(TokenizerStage, "step", original)
    assert run(config_file, pictures, out, "train.ema_decay=0.9") == 0
    assert same(bits(out), bits(whole))


def test_a_second_interrupt_leaves_at_once(config_file, pictures, tmp_path, monkeypatch):
    out, original = tmp_path / "out", TokenizerStage.step

    def step(self, step, batches):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step, batches)

    monkeypatch.setattr(TokenizerStage, "step", step)
    assert run(config_file, pictures, out) == 130
    assert (out / "last").resolve().name == "step_00000003"
    VQGAN.from_pretrained(out / "last")


def test_signals_are_left_alone_outside_the_main_thread():
    seen = []

    def inside():
        with loop.Signals() as signals:
            seen.append((signal.getsignal(signal.SIGTERM), signals.code))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]


def test_too_many_bad_steps_end_the_run(config_file, pictures, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(NonFiniteError, match=r"rec loss is nan at step \d+: 2 steps in a row"):
        run(config_file, pictures, out, "train.learning_rate=1e30", "train.save_every=1")
    assert all(x.isfinite().all() for x in bits(out).values() if x.is_floating_point())


def test_a_single_bad_step_is_skipped_and_said(
    config_file, pictures, tmp_path, monkeypatch, capsys
):
    out, original = tmp_path / "out", TokenizerStage.step

    def step(self, step, batches):
        if step in (2, 5):
            batches[0]["image"][0] = float("inf")
        return original(self, step, batches)

    monkeypatch.setattr(TokenizerStage, "step", step)
    assert run(config_file, pictures, out) == 0
    said = capsys.readouterr().err
    assert said.count("step refused: rec") == 2
    assert [("train/loss" in r) for r in rows(out)] == [
        True,
        True,
        False,
        True,
        True,
        False,
        True,
        True,
    ]


def test_bad_pictures_are_counted_across_a_resume(config_file, pictures, tmp_path, capsys):
    (pictures / "bad.png").write_bytes(b"not a picture")
    out = tmp_path / "out"
    assert run(config_file, pictures, out) == 0
    assert capsys.readouterr().err.count("bad.png") == 1
    assert rows(out)[-1]["data/skipped"] == 1
    assert run(config_file, pictures, out, max_steps=12) == 0
    assert "bad.png" not in capsys.readouterr().err
    assert rows(out)[-1]["data/skipped"] == 1
    with pytest.raises(DataError, match=r"bad\.png"):
        run(config_file, pictures, tmp_path / "strict", "data.max_bad_fraction=0.01")


def test_nothing_readable_is_an_error(config_file, tmp_path):
    (tmp_path / "none").mkdir()
    for path in (tmp_path / "none", tmp_path / "absent"):
        with pytest.raises(DataError):
            run(config_file, path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"data\.path"):
        run(config_file, None, tmp_path / "out")


def test_one_trainer_per_folder(config_file, pictures, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with FolderLock(out), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        run(config_file, pictures, out)
    assert run(config_file, pictures, out, max_steps=1) == 0


def test_a_folder_that_cannot_be_written_is_found_first(config_file, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        run(config_file, pictures, tmp_path / "file" / "out")


def test_what_a_killed_run_left_is_removed(config_file, pictures, tmp_path):
    out = tmp_path / "out"
    (out / "checkpoints" / ".tmp-999999-aa-step_00000001").mkdir(parents=True)
    (out / "metrics.jsonl").write_text('{"step": 1, "x": 1}\n{"step": 2')
    assert run(config_file, pictures, out) == 0
    assert not list(out.rglob(".tmp*"))
    assert [r["step"] for r in rows(out)] == list(range(1, 9))


def test_dry_run_and_print_config_write_nothing(config_file, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(config_file, pictures, out, dry_run=True) == 0
    assert "parameters: model" in capsys.readouterr().out
    assert run(config_file, pictures, out, "model.n_embed=48", print_config=True) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["n_embed"] == 48
    assert not out.exists()


def test_a_run_leaves_the_random_state_alone(config_file, pictures, tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run(config_file, pictures, tmp_path / "out", max_steps=1)
    assert torch.equal(expected, torch.rand(3))


def test_validation_and_pictures_are_written(config_file, pictures, tmp_path):
    out = tmp_path / "out"
    more = ("train.val_every=4", "train.images_every=4", "data.val_fraction=0.4")
    assert run(config_file, pictures, out, *more) == 0
    assert [r["step"] for r in rows(out) if "val/psnr" in r] == [4, 8]
    names = {p.name for p in (out / "images").iterdir()}
    assert "step_00000008_reconstructions.png" in names
    assert "step_00000008_inputs.png" in names
