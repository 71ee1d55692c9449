"""`vqfast convert`: bits survive, nothing is guessed, nothing half is left."""

import json
import os
import pickle

import pytest
import safetensors.torch
import torch
import yaml

import vqfast
from vqfast import checkpoints

NETWORK = {
    "ch": 32, "out_ch": 3, "in_channels": 3, "ch_mult": [1, 2], "num_res_blocks": 1,
    "attn_resolutions": [8], "resolution": 16, "z_channels": 8, "double_z": False, "dropout": 0.0,
}  # fmt: skip
TREE = {
    "target": "taming.models.vqgan.VQModel",
    "params": {"embed_dim": 4, "n_embed": 16, "ddconfig": NETWORK},
}
LOST = "decoder.norm_out.bias"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    config = NETWORK | {"embed_dim": 4, "n_embed": 16}
    made = vqfast.VQGAN(vqfast.VQGANConfig.from_dict(config)).state_dict()
    return {k: torch.randn_like(v) for k, v in made.items()}


def taming_file(path, state, tree=TREE):
    torch.save({"state_dict": state, "global_step": 7}, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": tree}))
    return path


def test_taming_to_native_and_back_keeps_every_bit(run_cli, tmp_path, state):
    taming_file(tmp_path / "m.ckpt", state | {"loss.x": torch.ones(1)})
    code, out, _ = run_cli("convert", "m.ckpt", "native", "--json")
    said = json.loads(out)
    assert code == 0 and said["ignored"] == ["loss.x"] and said["changed"] == []
    assert run_cli("convert", "native", "back.ckpt", "--to", "taming")[0] == 0
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert back["global_step"] == 7
    assert back["state_dict"].keys() == state.keys()
    assert all(torch.equal(back["state_dict"][k], state[k]) for k in state)
    first = vqfast.VQGAN.from_pretrained(tmp_path / "m.ckpt")
    for path in ("native", "back.ckpt"):
        model = vqfast.VQGAN.from_pretrained(tmp_path / path)
        x = torch.randn(1, 3, 16, 16)
        assert torch.equal(model.encode(x), first.encode(x))


def test_a_pipeline_converts_as_a_whole(run_cli, tmp_path, state):
    gpt = vqfast.GPT(vqfast.GPTConfig(16, 64, n_layer=1, n_head=2, n_embd=8)).state_dict()
    whole = {f"first_stage_model.{k}": v for k, v in state.items()}
    whole |= {f"transformer.{k}": v for k, v in gpt.items()}
    tree = {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "first_stage_config": TREE,
            "cond_stage_config": {
                "target": "taming.modules.util.Labelator",
                "params": {"n_classes": 5},
            },
            "transformer_config": {
                "target": "taming.modules.transformer.mingpt.GPT",
                "params": {
                    "vocab_size": 16, "block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 8,
                },
            },
        },
    }  # fmt: skip
    taming_file(tmp_path / "p.ckpt", whole, tree)
    assert run_cli("convert", "p.ckpt", "native")[0] == 0
    assert run_cli("convert", "native", "back.ckpt", "--to", "taming")[0] == 0
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert back.keys() == whole.keys() and all(torch.equal(back[k], whole[k]) for k in whole)


def test_missing_weights_stop_it_unless_partial_is_asked_for(run_cli, tmp_path, state):
    less = {k: v for k, v in state.items() if k != LOST} | {"encoder.extra": torch.ones(1)}
    taming_file(tmp_path / "m.ckpt", less)
    code, _, err = run_cli("convert", "m.ckpt", "native")
    assert code == 1 and f"missing {LOST}" in err and "unexpected encoder.extra" in err
    assert not (tmp_path / "native").exists()
    code, out, _ = run_cli("convert", "m.ckpt", "native", "--allow-partial")
    assert code == 0 and f"missing {LOST}" in out
    found = checkpoints.read(tmp_path / "native")
    assert not found.tensors[LOST].any()
    assert found.metadata["partial"] == [f"missing {LOST}", "unexpected encoder.extra"]
    vqfast.VQGAN.from_pretrained(tmp_path / "native")


def test_weights_are_stored_in_the_asked_precision(run_cli, tmp_path, state):
    src = taming_file(tmp_path / "m.ckpt", state)
    assert run_cli("convert", src, tmp_path / "half", "--precision", "fp16")[0] == 0
    stored = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    loaded = vqfast.VQGAN.from_pretrained(tmp_path / "half").state_dict()
    assert all(torch.equal(loaded[k], v.half().float()) for k, v in state.items())
    wrong = run_cli("convert", src, tmp_path / "x.ckpt", "--to", "taming", "--precision", "fp16")
    assert wrong[0] == 2 and not (tmp_path / "x.ckpt").exists()


def test_existing_output_is_refused(run_cli, tmp_path, state):
    taming_file(tmp_path / "m.ckpt", state)
    assert run_cli("convert", "m.ckpt", "native")[0] == 0
    before = (tmp_path / "native/model.safetensors").read_bytes()
    code, _, err = run_cli("convert", "m.ckpt", "native")
    assert code == 1 and "--overwrite" in err
    code, _, err = run_cli("convert", "native", "m.ckpt", "--to", "taming")
    assert code == 1 and "m.ckpt exists" in err
    (tmp_path / "n.yaml").write_text("mine")
    code, _, err = run_cli("convert", "native", "n.ckpt", "--to", "taming")
    assert code == 1 and "n.yaml exists" in err and (tmp_path / "n.yaml").read_text() == "mine"
    assert (tmp_path / "native/model.safetensors").read_bytes() == before
    assert run_cli("convert", "m.ckpt", "native", "--overwrite")[0] == 0


def test_a_wrong_config_or_format_is_said(run_cli, tmp_path, state):
    taming_file(tmp_path / "m.ckpt", state)
    code, _, err = run_cli("convert", "m.ckpt", "x", "--from", "native")
    assert code == 1 and "known format (native)" in err
    bad = {**TREE, "params": {**TREE["params"], "ddconfig": {**NETWORK, "ch": 33}}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"model": bad}))
    code, _, err = run_cli("convert", "m.ckpt", "x", "--config", "bad.yaml")
    assert code == 1 and "ch is 33" in err
    assert not (tmp_path / "x").exists()


def test_what_a_format_cannot_say_is_bad_usage(run_cli, tmp_path, state):
    config = vqfast.VQGANConfig.from_dict(
        {**NETWORK, "embed_dim": 4, "n_embed": 16, "legacy": False}
    ).to_dict()
    checkpoints.native.write(tmp_path / "m", "tokenizer", config, state)
    code, _, err = run_cli("convert", "m", "x.ckpt", "--to", "taming")
    assert code == 2 and "legacy" in err and not (tmp_path / "x.ckpt").exists()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_file_runs_nothing(run_cli, tmp_path, state):
    taming_file(tmp_path / "m.ckpt", state)
    (tmp_path / "m.ckpt").write_bytes(pickle.dumps(Evil(tmp_path / "marker"), 2))
    code, _, err = run_cli("convert", "m.ckpt", "x")
    assert code == 1 and "system" in err
    assert not (tmp_path / "marker").exists() and not (tmp_path / "x").exists()
