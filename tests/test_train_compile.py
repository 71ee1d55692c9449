"""train.compile: the networks of both stages go through torch.compile, and train as without it."""

import functools
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from vqfast.data.codes import save_codes
from vqfast.train import tokenizer, transformer

STAGE_1 = {
    "model": {
        "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [8],
        "z_channels": 8, "n_embed": 16, "embed_dim": 4,
    },
    "loss": {"perceptual_weight": 0.0, "disc_start": 1, "disc_channels": 8, "disc_num_layers": 1},
    "data": {"size": 16, "batch_size": 2},
}  # fmt: skip
STAGE_2 = {"model": {"n_layer": 2, "n_head": 2, "n_embd": 16}, "data": {"batch_size": 2}}
TRAIN = {"max_steps": 3, "log_every": 1, "learning_rate": 1e-3, "images_every": 0}


@pytest.fixture
def train(tmp_path, two_pictures, tiny_tokenizer):
    """train(stage, on) -> losses by step and weights of a run of 3 steps."""

    def call(stage, on):
        tree = STAGE_1 if stage == 1 else STAGE_2
        path, out = tmp_path / "run.yaml", tmp_path / f"{stage}_{on}"
        path.write_text(
            yaml.safe_dump({**tree, "train": {**TRAIN, "compile": on, "tensorboard": False}})
        )
        more = {"out": out, "device": "cpu"}
        if stage == 1:
            assert tokenizer.run(path, data=two_pictures[0].parent, **more) == 0
        else:
            codes = tmp_path / "codes.safetensors"
            noise = torch.Generator().manual_seed(0)
            save_codes(codes, torch.randint(0, 16, (4, 8, 8), generator=noise))
            assert transformer.run(path, data=codes, tokenizer=tiny_tokenizer, **more) == 0
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["train/loss"] for line in lines]
        return losses, load_file(out / "last" / "model.safetensors")

    torch._dynamo.reset()
    counters.clear()
    yield call
    torch._dynamo.reset()


def _alike(got, expected):
    (losses, weights), (plain_losses, plain) = got, expected
    assert losses == pytest.approx(plain_losses, rel=1e-3)
    assert weights.keys() == plain.keys()
    # Adam moves a weight by the rate at most, in the other direction where a gradient is all error
    limit = 2 * TRAIN["max_steps"] * TRAIN["learning_rate"]
    for name, x in weights.items():
        assert float((x - plain[name]).abs().max()) <= limit, name


@pytest.mark.parametrize("stage", [1, 2])
def test_compiled_networks_train_as_plain_ones(train, stage, monkeypatch):
    """Dynamo and AOTAutograd for true; what inductor would generate runs as it was traced."""
    plain = train(stage, False)
    assert not counters["stats"]["unique_graphs"]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = train(stage, True)
    assert counters["stats"]["unique_graphs"] >= (2 if stage == 1 else 1)
    assert counters["stats"]["calls_captured"] > 20
    _alike(compiled, plain)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_default_compiler_trains_too(train):
    plain = train(2, False)
    _alike(train(2, True), plain)
    assert counters["inductor"], "inductor compiled nothing"
