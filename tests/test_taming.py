"""taming's checkpoints: where the YAML lies, what it may say, and the way back."""

from types import MappingProxyType

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from vqfast import checkpoints
from vqfast.checkpoints import taming
from vqfast.errors import CheckpointError

NETWORK = {
    "ch": 8, "out_ch": 3, "in_channels": 3, "ch_mult": [1], "num_res_blocks": 1,
    "attn_resolutions": [], "resolution": 16, "z_channels": 5, "double_z": False, "dropout": 0.0,
}  # fmt: skip


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- stage 1


def vq_state(prefix="", n_embed=7, embed_dim=3):
    g = torch.Generator().manual_seed(1)
    shapes = {
        "encoder.conv_in.weight": (8, 3, 3, 3),
        "encoder.mid.block_1.norm1.weight": (8,),
        "decoder.conv_in.weight": (8, 5, 3, 3),
        "decoder.conv_out.weight": (3, 8, 3, 3),
        "quantize.embedding.weight": (n_embed, embed_dim),
    }
    return {prefix + k: torch.randn(s, generator=g) for k, s in shapes.items()}


def vq_tree(n_embed=7, embed_dim=3, target="taming.models.vqgan.VQModel", **params):
    params = {"embed_dim": embed_dim, "n_embed": n_embed, "ddconfig": dict(NETWORK), **params}
    return {"target": target, "params": params}


def put(path, state, tree=None, where=None, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, **more}, path)
    if tree is not None:
        where = where or path.with_suffix(".yaml")
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(tree if isinstance(tree, str) else yaml.safe_dump({"model": tree}))
    return path


@pytest.mark.parametrize(
    ("ckpt", "conf"),
    [
        ("m.ckpt", "m.yaml"),
        ("m.ckpt", "configs/2021-01-01T00-00-00-project.yaml"),
        ("m.ckpt", "configs/model.yaml"),
        ("checkpoints/last.ckpt", "configs/2021-01-01T00-00-00-project.yaml"),
        ("ckpts/last.ckpt", "configs/model.yaml"),
        ("a[1]*.safetensors", "a[1]*.yaml"),
    ],
)
def test_the_yaml_of_a_taming_file_is_found(tmp_path, ckpt, conf):
    put(tmp_path / ckpt, vq_state(), vq_tree(), tmp_path / conf, global_step=12)
    found = checkpoints.read(tmp_path / ckpt)
    assert (found.format, found.kind) == ("taming", "tokenizer")
    assert found.metadata == {"source": "taming", "global_step": 12}
    assert found.config == NETWORK | {"quantizer": "vq", "n_embed": 7, "embed_dim": 3}
    assert equal(found.tensors, vq_state())


def test_a_given_config_wins_and_without_one_the_error_says_where_it_looked(tmp_path):
    path = put(tmp_path / "m.ckpt", vq_state())
    with pytest.raises(CheckpointError, match=r"m\.yaml.*configs/\*project\.yaml.*config="):
        checkpoints.read(path)
    put(tmp_path / "o.ckpt", {}, vq_tree(), tmp_path / "other.yaml")
    assert checkpoints.read(path, tmp_path / "other.yaml").config["n_embed"] == 7
    assert checkpoints.read(path, {"model": vq_tree()}).config["n_embed"] == 7
    own = NETWORK | {"n_embed": 7, "embed_dim": 3}
    assert checkpoints.read(path, own).config == own


@pytest.mark.parametrize("mapping", [OmegaConf.create, MappingProxyType])
def test_a_given_config_may_be_any_mapping(tmp_path, mapping):
    path = put(tmp_path / "m.ckpt", vq_state())
    whole = {"quantizer": "vq", "n_embed": 7, "embed_dim": 3} | NETWORK
    for tree in ({"model": vq_tree()}, whole):
        assert checkpoints.read(path, mapping(tree)).config == whole


@pytest.mark.parametrize(
    ("state", "tree", "says"),
    [
        ({}, vq_tree(n_embed=8), "n_embed is 8"),
        ({}, vq_tree(embed_dim=4), "embed_dim is 4"),
        ({}, vq_tree(n_embed="7"), "n_embed must be an integer"),
        ({}, vq_tree(target="os.system"), "unknown target 'os.system'"),
        ({}, vq_tree(target="taming.modules.transformer.mingpt.GPT"), "stands for a gpt"),
        ({}, {"target": "taming.models.vqgan.VQModel", "params": "rm"}, "params must be a mapping"),
        ({}, "", "no|empty|mapping"),
        ({}, "model: !!python/object/apply:os.system ['true']\n", "python"),
        ({}, "model:\n\t- x", "m.yaml"),
        ({}, "\x00\x01", "m.yaml"),
        ({}, "- 1\n- 2", "mapping"),
        ({"n": torch.tensor([float("nan")])}, vq_tree(), "n holds NaN"),
        ({}, vq_tree(remap="/author/ids.npy"), "quantize.used"),
        ({}, vq_tree(ddconfig=NETWORK | {"use_linear_attn": True}), "use_linear_attn"),
        ({}, vq_tree(ddconfig={k: v for k, v in NETWORK.items() if k != "resolution"}), "resolu"),
    ],
)
def test_a_yaml_or_state_that_cannot_be_right_is_named(tmp_path, state, tree, says):
    path = put(tmp_path / "m.ckpt", vq_state() | state, tree)
    with pytest.raises(CheckpointError, match=says):
        checkpoints.read(path)


def test_alias_bombs_end_quickly(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    with pytest.raises(CheckpointError, match="alias"):
        checkpoints.read(put(tmp_path / "m.ckpt", vq_state(), "\n".join(lines)))


def test_harmless_switches_of_ldm_and_unused_sections_are_accepted(tmp_path):
    more = {"lossconfig": {"target": "os.system", "params": {"command": "x"}}, "monitor": "val"}
    tree = vq_tree(
        target="ldm.models.autoencoder.VQModelInterface",
        ddconfig=NETWORK | {"attn_type": "none", "resamp_with_conv": True},
        ckpt_path="/author/only.ckpt",
        **more,
    )
    assert (
        checkpoints.read(put(tmp_path / "m.ckpt", vq_state(), tree)).config["attn_type"] == "none"
    )


def gumbel(state):
    state = dict(state)
    state["quantize.embed.weight"] = state.pop("quantize.embedding.weight")
    return state


def test_gumbel_tokenizers_keep_their_weight(tmp_path):
    tree = vq_tree(target="taming.models.vqgan.GumbelVQ", kl_weight=1e-8)
    found = checkpoints.read(put(tmp_path / "m.ckpt", gumbel(vq_state()), tree))
    assert found.config["quantizer"] == "gumbel" and found.config["kl_weight"] == 1e-8


def test_remapped_codes_come_from_the_file(tmp_path):
    used = {"quantize.used": torch.tensor([1, 4, 6])}
    path = put(tmp_path / "m.ckpt", vq_state() | used, vq_tree(remap="/author/ids.npy"))
    assert checkpoints.read(path).config["remap"] == [1, 4, 6]


# ---- stage 2

GPT = {"vocab_size": 7, "block_size": 20, "n_layer": 1, "n_head": 2, "n_embd": 4}
LABELS = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 5}}


def gpt_state():
    return {
        "transformer.tok_emb.weight": torch.randn(7, 4),
        "transformer.pos_emb": torch.randn(1, 20, 4),
        "transformer.blocks.0.attn.key.weight": torch.randn(4, 4),
        "transformer.blocks.0.attn.mask": torch.ones(1, 1, 20, 20),
    }


def net2net(cond, **more):
    params = {
        "first_stage_config": vq_tree(ckpt_path="/author/only.ckpt"),
        "cond_stage_config": cond,
        "transformer_config": {
            "target": "taming.modules.transformer.mingpt.GPT",
            "params": GPT,
        },
        **more,
    }
    return {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}


@pytest.mark.parametrize(
    ("cond", "more", "want"),
    [
        (LABELS, {}, {"kind": "class", "n_classes": 5}),
        ("__is_unconditional__", {"sos_token": 3}, {"kind": "sos", "sos_token": 3}),
        ("__is_unconditional__", {}, {"kind": "sos", "sos_token": 0}),
        ("__is_first_stage__", {}, {"kind": "first_stage"}),
        (
            {
                "target": "taming.modules.misc.coord.CoordStage",
                "params": {"n_embed": 7, "down_factor": 8},
            },
            {},
            {"kind": "coord", "n_embed": 7, "down_factor": 8},
        ),
    ],
)
def test_conditions_of_a_transformer(tmp_path, cond, more, want):
    state = vq_state("first_stage_model.") | gpt_state()
    state["first_stage_model.loss.x"] = torch.ones(1)
    found = checkpoints.read(put(tmp_path / "m.ckpt", state, net2net(cond, **more)))
    assert found.kind == "pipeline" and found.config["conditioning"] == want
    assert found.config["transformer"] == GPT and found.config["tokenizer"]["n_embed"] == 7
    parts = vq_state("tokenizer.") | gpt_state()
    del parts["transformer.blocks.0.attn.mask"]
    assert found.tensors.keys() == parts.keys()
    assert found.ignored == ["transformer.blocks.0.attn.mask", "first_stage_model.loss.x"]


def test_a_conditioning_tokenizer_keeps_its_own_config_and_weights(tmp_path):
    state = vq_state("first_stage_model.") | gpt_state() | vq_state("cond_stage_model.", 6, 2)
    found = checkpoints.read(put(tmp_path / "m.ckpt", state, net2net(vq_tree(6, 2))))
    assert found.config["conditioning"]["kind"] == "tokenizer"
    assert found.config["conditioning"]["config"]["n_embed"] == 6
    assert found.tensors["conditioning.quantize.embedding.weight"].shape == (6, 2)


def test_a_shared_first_stage_is_kept_once_and_must_be_the_same(tmp_path):
    shared = vq_state("first_stage_model.") | gpt_state() | vq_state("cond_stage_model.")
    found = checkpoints.read(put(tmp_path / "m.ckpt", shared, net2net("__is_first_stage__")))
    assert not [k for k in found.tensors if k.startswith("conditioning.")]
    shared["cond_stage_model.encoder.conv_in.weight"] += 1
    with pytest.raises(
        CheckpointError, match=r"cond_stage_model\.encoder\.conv_in\.weight differs"
    ):
        checkpoints.read(put(tmp_path / "m.ckpt", shared, net2net("__is_first_stage__")))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"permuter_config": {"target": "taming.modules.transformer.permuter.ZCurve"}}, "ZCurve"),
        ({"cond_stage_config": "__is_secret__"}, "__is_secret__"),
        ({"cond_stage_config": {"target": "os.system", "params": {}}}, r"os\.system"),
        ({"transformer_config": {"target": "x.GPT", "params": GPT}}, r"x\.GPT"),
        (
            {
                "transformer_config": {
                    "target": "taming.modules.transformer.mingpt.GPT",
                    "params": {k: v for k, v in GPT.items() if k != "n_head"},
                }
            },
            "n_head is missing",
        ),
        (
            {
                "transformer_config": {
                    "target": "taming.modules.transformer.mingpt.GPT",
                    "params": GPT | {"vocab_size": 9},
                }
            },
            r"vocab_size is 9.*\[7, 4\]",
        ),
    ],
)
def test_what_a_transformers_yaml_cannot_say_is_named(tmp_path, change, says):
    state = vq_state("first_stage_model.") | gpt_state()
    tree = net2net(LABELS)
    tree["params"] |= change
    with pytest.raises(CheckpointError, match=says):
        checkpoints.read(put(tmp_path / "m.ckpt", state, tree))


def test_a_transformer_without_its_yaml_says_what_is_missing(tmp_path):
    path = put(tmp_path / "m.ckpt", vq_state("first_stage_model.") | gpt_state())
    with pytest.raises(CheckpointError, match="n_head"):
        checkpoints.read(path)


def test_the_tokenizer_of_a_pipeline_is_taken_out_and_the_reverse_refused(tmp_path):
    state = vq_state("first_stage_model.") | gpt_state()
    path = put(tmp_path / "p.ckpt", state, net2net(LABELS))
    found = checkpoints.read(path, expect="tokenizer")
    assert found.kind == "tokenizer" and equal(found.tensors, vq_state())
    path = put(tmp_path / "t.ckpt", vq_state(), vq_tree())
    with pytest.raises(CheckpointError, match="holds a tokenizer, a pipeline is needed"):
        checkpoints.read(path, expect="pipeline")


# ---- writing


@pytest.mark.parametrize("cond", [LABELS, "__is_unconditional__", "__is_first_stage__", vq_tree()])
def test_a_written_taming_pipeline_reads_as_the_same(tmp_path, cond):
    state = vq_state("first_stage_model.") | gpt_state()
    if isinstance(cond, dict) and "vqgan" in cond["target"]:
        state |= vq_state("cond_stage_model.")
    first = checkpoints.read(put(tmp_path / "a.ckpt", state, net2net(cond), global_step=9))
    taming.write(tmp_path / "b.ckpt", first.kind, first.config, first.tensors, first.metadata)
    again = checkpoints.read(tmp_path / "b.ckpt")
    assert again.config == first.config and equal(again.tensors, first.tensors)
    assert again.metadata == first.metadata
    kept = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == state.keys() - {"transformer.blocks.0.attn.mask"}


def test_what_taming_has_no_word_for_is_refused(tmp_path):
    base = NETWORK | {"n_embed": 7, "embed_dim": 3, "quantizer": "vq"}
    for key, value in (
        ("metric", "cosine"),
        ("legacy", False),
        ("beta", 0.5),
        ("quantizer", "ema"),
    ):
        with pytest.raises(ValueError, match=key):
            taming.write(tmp_path / "m.ckpt", "tokenizer", base | {key: value}, {})
    assert not list(tmp_path.iterdir())
