"""Configurations: what is merged, what is refused, and how the text names it."""

from dataclasses import dataclass, field

import pytest
import yaml

from vqfast import config
from vqfast.config import ConfigError, key
from vqfast.models.vqgan import VQGANConfig
from vqfast.train.tokenizer import TokenizerConfig
from vqfast.train.transformer import TransformerConfig


@dataclass
class Inner:
    n: int = key(3, "a count", low=1)
    rate: float = key(0.5, "a rate", low=0, low_open=True)
    name: str = key("a", "a name", choices=("a", "b"))
    sizes: tuple[int, ...] = key((1, 2), "sizes", low=1)
    pair: tuple[float, float] = key((0.1, 0.2), "two", low=0)
    maybe: int | None = key(None, "perhaps")
    on: bool = key(False, "a switch")


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)


def load(tmp_path, text, *overrides, schema=Outer):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return config.load(path, overrides, schema)


def test_later_layers_win(tmp_path):
    got = load(tmp_path, "inner: {n: 5, rate: 1e-4}", "inner.n=7", "inner.n=8", "inner.sizes=[4,5]")
    assert (got.inner.n, got.inner.rate, got.inner.sizes) == (8, 1e-4, (4, 5))
    assert got.inner.name == "a"


@pytest.mark.parametrize("value", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_every_spelling_of_a_float_is_a_number(tmp_path, value):
    assert load(tmp_path, f"inner: {{rate: {value}}}").inner.rate == 1e-4
    assert load(tmp_path, "", f"inner.rate={value}").inner.rate == 1e-4


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("inner.nn=3", "inner.nn"),
        ("outer=3", "outer"),
        ("inner.n=many", "inner.n"),
        ("inner.n=1.5", "inner.n"),
        ("inner.n=true", "inner.n"),
        ("inner.n=-1", "inner.n"),
        ("inner.n=null", "inner.n"),
        ("inner.rate=nan", "inner.rate"),
        ("inner.rate=.nan", "inner.rate"),
        ("inner.rate=.inf", "inner.rate"),
        ("inner.rate=0", "inner.rate"),
        ("inner.name=c", "inner.name"),
        ("inner.name=3", "inner.name"),
        ("inner.sizes=[1,0]", "inner.sizes[1]"),
        ("inner.sizes=3", "inner.sizes"),
        ("inner.pair=[1]", "inner.pair"),
        ("inner.pair=[1,-2]", "inner.pair[1]"),
        ("inner.on=1", "inner.on"),
        ("inner=3", "inner"),
        ("inner.n.deeper=3", "inner.n"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(tmp_path, override, path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "inner: {n: 5}", override)
    assert path in str(error.value)


def test_an_unknown_key_suggests_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="inner.rat: unknown key; did you mean rate"):
        load(tmp_path, "inner: {rat: 5}")


@pytest.mark.parametrize("override", ["inner.n", "=3", "inner..n=3", "1n=3", "inner.n-x=3", ""])
def test_a_malformed_override_is_refused(tmp_path, override):
    with pytest.raises(ConfigError, match="override"):
        load(tmp_path, "", override)


def test_dump_loads_back_to_the_same_settings(tmp_path):
    got = load(tmp_path, "inner: {n: 5, maybe: 2, sizes: [9]}")
    for text in (config.dump(got), config.dump(got, explain=True)):
        assert load(tmp_path, text) == got
        assert yaml.safe_load(text)["inner"]["sizes"] == [9]


def test_an_explained_dump_says_what_keys_mean_and_may_be(tmp_path):
    @dataclass
    class Text:
        inner: Inner = field(default_factory=Inner)
        free: str = key("", "any text")

    got = Text(Inner(name="b"), free="two\nlines, 'quoted'  # and more")
    text = config.dump(got, explain=True)
    assert load(tmp_path, text, schema=Text) == got
    assert "  # a name (a, b)\n  name: b\n" in text
    assert "\n# any text\nfree: " in text


# ---- hostile files


@pytest.mark.parametrize("where", ["file", "override"])
@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch MARK']",
        "!!python/name:os.system",
        "!!python/object/new:type {}",
    ],
)
def test_a_python_tag_is_refused_and_runs_nothing(tmp_path, monkeypatch, where, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        if where == "file":
            load(tmp_path, f"inner:\n  n: {value}\n")
        else:
            load(tmp_path, "", f"inner.n={value}")
    assert not (tmp_path / "MARK").exists()


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(ConfigError, match="aliases expand"):
        load(tmp_path, "\n".join(rows))


def test_an_alias_to_an_enclosing_block_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds it"):
        load(tmp_path, "inner: &a {n: *a}")


def test_deep_nesting_is_refused_without_a_crash(tmp_path):
    with pytest.raises(ConfigError):
        load(tmp_path, "inner: " + "[" * 20_000 + "]" * 20_000)


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a${inner.n}", "${"])
def test_interpolation_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"inner\.name.*not expanded"):
        load(tmp_path, f"inner: {{name: '{text}'}}")
    with pytest.raises(ConfigError, match=r"inner\.name.*not expanded"):
        load(tmp_path, "", f"inner.name='{text}'")


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "just text", "a: [", "a: 1\na: 2", "inner: {n: 1, n: 2}", "\x00", "? [a]\n: b"],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError):
        load(tmp_path, text)


def test_missing_oversized_and_binary_files_are_named(tmp_path):
    for name, data in (("absent.yaml", None), ("big.yaml", b"#" * (2 << 20)), ("b.yaml", b"\xff")):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=name):
            config.load(tmp_path / name, [], Outer)
    with pytest.raises(ConfigError):
        config.load(tmp_path, [], Outer)


# ---- the two schemas


def test_every_key_of_the_sections_is_explained():
    for schema in (TokenizerConfig, TransformerConfig):
        for section in schema.__dataclass_fields__.values():
            if section.name == "tokenizer" or section.default_factory is VQGANConfig:
                continue
            for name, entry in section.default_factory.__dataclass_fields__.items():
                assert entry.metadata.get("doc"), f"{section.name}.{name}"


def test_the_model_section_is_checked_under_its_path(tmp_path):
    for override, path in (("model.n_embed=-1", "model.n_embed"), ("model.ch=33", "model.ch")):
        with pytest.raises(ConfigError, match=path):
            load(tmp_path, "", override, schema=TokenizerConfig)


def test_resolution_and_size_follow_each_other(tmp_path):
    got = load(tmp_path, "data: {size: 64}", schema=TokenizerConfig)
    assert got.model.resolution == 64
    got = load(tmp_path, "model: {resolution: 128}", schema=TokenizerConfig)
    assert got.data.size == 128
    got = load(tmp_path, "", schema=TokenizerConfig)
    assert got.data.size == got.model.resolution == 256


def test_keys_of_another_quantizer_are_refused(tmp_path):
    for override, more in (
        ("train.revive_after=3", "model.quantizer=ema"),
        ("train.temperature=[1,0.1]", "model.quantizer=vq"),
    ):
        with pytest.raises(ConfigError, match=override.split("=")[0]):
            load(tmp_path, "", override, more, schema=TokenizerConfig)


def test_gan_start_before_disc_start_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"loss\.gan_start"):
        load(tmp_path, "loss: {disc_start: 10, gan_start: 5}", schema=TokenizerConfig)


# ---- files written for taming

TAMING = """
model:
  base_learning_rate: 4.5e-06
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 64
    n_embed: 512
    ckpt_path: /somebody/last.ckpt
    ddconfig: {double_z: False, z_channels: 64, resolution: 64, in_channels: 3, out_ch: 3,
      ch: 32, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [16], dropout: 0.0}
    lossconfig:
      target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator
      params: {disc_conditional: False, disc_in_channels: 3, disc_start: 77, disc_weight: 0.6}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 5
    num_workers: 2
    train:
      target: taming.data.custom.CustomTrain
      params: {training_images_list_file: some/training.txt, size: 64}
"""


def test_a_taming_file_is_translated(tmp_path):
    got = load(tmp_path, TAMING, "model.params.n_embed=48", "train.seed=3", schema=TokenizerConfig)
    assert (got.model.n_embed, got.model.embed_dim, got.model.ch_mult) == (48, 64, (1, 2))
    assert got.model.quantizer == "vq"
    assert (got.loss.disc_start, got.loss.disc_weight) == (77, 0.6)
    assert (got.data.path, got.data.size, got.data.batch_size) == ("some/training.txt", 64, 5)
    assert got.train.base_learning_rate == 4.5e-6
    assert got.train.seed == 3


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("taming.models.vqgan.VQModel", "os.system", "model.target: unknown target 'os.system'"),
        ("taming.data.custom.CustomTrain", "builtins.exec", "data.params.train.target"),
        ("disc_start: 77", "disc_begin: 77", "model.params.lossconfig.params.disc_begin"),
        ("ch: 32", "chh: 32", "model.params.ddconfig.chh"),
        ("embed_dim: 64", "embed: 64", "model.params.embed"),
        ("disc_conditional: False", "disc_conditional: True", "disc_conditional"),
    ],
)
def test_what_a_taming_file_may_not_say(tmp_path, old, new, said):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, TAMING.replace(old, new), schema=TokenizerConfig)
    assert said in str(error.value)
    if "target" in said:
        assert "taming.models.vqgan.GumbelVQ" in str(error.value)


def test_a_stage_2_file_of_taming_is_translated(tmp_path):
    text = """
model:
  base_learning_rate: 4.5e-06
  target: taming.models.cond_transformer.Net2NetTransformer
  params:
    cond_stage_key: class_label
    pkeep: 0.9
    transformer_config:
      target: taming.modules.transformer.mingpt.GPT
      params: {vocab_size: 1024, block_size: 256, n_layer: 2, n_head: 4, n_embd: 64}
    first_stage_config: {target: taming.models.vqgan.VQModel, params: {ckpt_path: /x.ckpt}}
    cond_stage_config: {target: taming.modules.util.Labelator, params: {n_classes: 10}}
"""
    got = load(tmp_path, text, schema=TransformerConfig)
    assert (got.model.n_layer, got.model.vocab_size, got.model.n_classes) == (2, 1024, 10)
    assert (got.model.conditioning, got.train.pkeep) == ("class", 0.9)
    with pytest.raises(ConfigError, match="is no tokenizer"):
        load(tmp_path, text, schema=TokenizerConfig)


@pytest.mark.parametrize("name", ["tokenizer", "transformer"])
def test_the_shipped_files_load(name):
    from pathlib import Path

    folder = Path(__file__).parents[1] / "configs"
    found = sorted(folder.glob(f"*_{name}.yaml"))
    assert found
    schema = TokenizerConfig if name == "tokenizer" else TransformerConfig
    for path in found:
        config.load(path, [], schema)
