"""Every recipe in configs/ builds and runs one batch, the command in its head is one, and where
weights are missing the message says what to pass.
"""

import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from vqfast.cli import _parser
from vqfast.models.vqgan import VQGAN, VQGANConfig

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
TOKENIZERS = [path for path in RECIPES if path.stem.endswith("_tokenizer")]
# what makes them small: fewer images, and of the large transformers one block of full width
SMALL = ("data.batch_size=2", "data.num_workers=0")
FEW_BLOCKS = {"class_transformer", "unconditional_transformer"}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Two class folders, under `train` as CIFAR-10's tar has them."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(("cat", "dog", "cat", "dog")):
        path = folder / "train" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (40, 40, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def f16_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "f16"
    config = VQGANConfig(
        ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(), attn_type="none",
        resolution=256, z_channels=8, n_embed=16, embed_dim=4,
    )  # fmt: skip
    VQGAN(config).save_pretrained(folder)
    return folder


def test_there_are_recipes_of_both_stages():
    rest = [path for path in RECIPES if path not in TOKENIZERS]
    assert TOKENIZERS and rest
    assert all(path.stem.endswith("_transformer") for path in rest)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_works(run_cli, path, classes, f16_tokenizer, tmp_path):
    stage = path.stem.rpartition("_")[2]
    keys, more = list(SMALL), ["--data", classes, "--device", "cpu", "--dry-run"]
    if stage == "tokenizer":
        # neither weights nor the heads of the lpips package are needed to build it
        keys += ["loss.perceptual_weights=random", "loss.perceptual_heads=random"]
    else:
        more += ["--tokenizer", f16_tokenizer]
    if path.stem in FEW_BLOCKS:
        keys.append("model.n_layer=1")
    code, out, err = run_cli("train", stage, path, *keys, *more)
    assert code == 0, err
    assert "parameters:" in out and "dry run: nothing was trained or written" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_command_in_its_head_is_one(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(line.removeprefix("#") for line in head if line.startswith("#   "))
    words = shlex.split(text.replace("\\\n", " "))
    args = _parser.parse(words[words.index("vqfast") + 1 :])
    assert args.config == f"configs/{path.name}" and args.stage == path.stem.rpartition("_")[2]
    assert args.data and args.out
    assert args.stage == "tokenizer" or args.tokenizer


@pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.stem)
def test_missing_weights_are_asked_for_by_key(run_cli, path, classes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    # a small network: what is missing is found when the loss is built
    small = ("model.ch=32", "model.ch_mult=[1,2]", "model.resolution=32", "data.size=32", *SMALL)
    on = ("--data", classes, "--device", "cpu", "--dry-run")
    code, _, err = run_cli("train", "tokenizer", path, *small, *on)
    assert code == 1 and "CheckpointError" in err and "no such file" in err
    assert "torchvision's" in err and str(tmp_path) in err
    for key in (
        "perceptual_weights=FILE",
        "perceptual_heads=FILE (or none)",
        "perceptual_weight=0",
    ):
        assert f"loss.{key}" in err
    code, out, err = run_cli("train", "tokenizer", path, "loss.perceptual_weight=0", *small, *on)
    assert code == 0 and "dry run" in out, err
