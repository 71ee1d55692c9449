"""Packed models: the bits of the engine in a file, and nothing that packing rounded off."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open

import vqfast
from vqfast import CheckpointError, Engine, Pipeline, checkpoints
from vqfast.checkpoints import native
from vqfast.engine.packing import PackedGPT
from vqfast.models import conditioning
from vqfast.ops import _packed
from vqfast.ops.decode_step import matrices

PRECISIONS = ("fp32", "bf16", "int8", "int4")
SHAPE = {"vocab_size": 16, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 40}
GREEDY = {"seed": 0, "temperature": 0.0}


def make_gpt():
    torch.manual_seed(3)
    gpt = vqfast.GPT(vqfast.GPTConfig(**SHAPE)).eval().requires_grad_(False)
    for p in gpt.parameters():
        p.normal_(0, 0.3)
    return gpt


@pytest.fixture(scope="module")
def pipe(tiny_tokenizer):
    first = vqfast.VQGAN.from_pretrained(tiny_tokenizer)
    condition = conditioning.build({"kind": "class", "n_classes": 3, "null_class": 3}, first)
    return Pipeline(first, make_gpt(), condition, {"licence": "MIT"})


def stored(folder):
    """Configuration and tensors of a native folder."""
    found = checkpoints.read(folder)
    return found.config, found.tensors


def same(*folders):
    """Whether all hold the same configuration and the same bits."""
    (config, tensors), *others = (stored(folder) for folder in folders)
    for c, t in others:
        if c != config or t.keys() != tensors.keys():
            return False
        if any(t[n].dtype != x.dtype or not torch.equal(t[n], x) for n, x in tensors.items()):
            return False
    return True


# ---- the module


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_packed_model_runs_as_the_engine_packs_it(precision, each_backend):
    gpt, cond = make_gpt(), torch.tensor([[1], [2]])
    options = {"seed": 5, "temperature": 2.0}
    whole = Engine(gpt, precision, batch=2).generate(cond, 12, **options)
    packed = PackedGPT.of(gpt, precision)
    engine = Engine(packed, batch=2)
    assert engine.precision == precision
    assert torch.equal(engine.generate(cond, 12, **options), whole)
    assert engine._packed.weights.data_ptr() == packed.weights.data_ptr(), "no second copy"


def test_packed_float32_is_the_gpt():
    gpt = make_gpt()
    back = PackedGPT.of(gpt, "fp32").to_gpt()
    assert not back.training and back.state_dict().keys() == gpt.state_dict().keys()
    for name, value in gpt.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
        assert back.state_dict()[name].is_contiguous(), name
    idx, cond = torch.randint(16, (2, 9)), torch.tensor([[0], [4]])
    assert torch.equal(PackedGPT.of(gpt, "fp32")(idx, cond), gpt(idx, cond))


@pytest.mark.parametrize(("precision", "bits"), [("bf16", 16), ("int8", 8), ("int4", 4)])
def test_teacher_forcing_sees_the_rounded_weights(precision, bits):
    gpt = make_gpt()
    packed = PackedGPT.of(gpt, precision)
    back = packed.to_gpt()
    assert torch.equal(back.tok_emb.weight, gpt.tok_emb.weight)
    for name, exact in gpt.named_parameters():
        found = back.get_parameter(name)
        is_matrix = name == "head.weight" or (name.startswith("blocks") and exact.dim() == 2)
        assert torch.equal(found, exact) != is_matrix, name
        if is_matrix:  # rows are rounded one by one
            N, K = exact.shape
            panels = _packed.unpack(_packed.pack_matrix(exact, bits), N, K, bits)
            assert torch.equal(found, panels.transpose(1, 2).flatten(0, 1)[:N, :K]), name
    idx, cond = torch.randint(16, (2, 9)), torch.tensor([[0], [4]])
    assert torch.equal(packed(idx, cond), back(idx, cond))
    assert not torch.equal(packed(idx, cond), gpt(idx, cond))


def test_only_float32_is_packed_anew():
    gpt, cond = make_gpt(), torch.tensor([[1]])
    again = Engine(PackedGPT.of(gpt, "fp32"), "int4").generate(cond, 20, **GREEDY)
    assert torch.equal(again, Engine(gpt, "int4").generate(cond, 20, **GREEDY))
    for precision in ("bf16", "int8", "int4"):
        packed = PackedGPT.of(gpt, precision)
        for other in set(PRECISIONS) - {precision}:
            with pytest.raises(ValueError, match=f"precision must be {precision}.*gone.*{other}"):
                Engine(packed, other)
    with pytest.raises(ValueError, match="fp16"):
        Engine(gpt, "fp16")
    config = vqfast.GPTConfig(**SHAPE, n_unmasked=2)
    with pytest.raises(ValueError, match="n_unmasked"):
        PackedGPT(config, "int8")
    with pytest.raises(ValueError, match="n_unmasked"):
        PackedGPT.of(vqfast.GPT(config), "int8")


@pytest.mark.parametrize(
    ("bits", "digest"),
    [(32, "94eb20a404d2"), (16, "3506eb2abe55"), (8, "e612b64197d9"), (4, "d7e2f9bc8d15")],
)
def test_the_layout_has_a_number_of_its_own(bits, digest):
    """A change of what the bytes mean needs another `LAYOUT`, and other digests here."""
    N, K = 20, 70
    count = _packed.matrix_bytes(N, K, bits)
    # low bytes only: no exponent is that of infinity
    data = (torch.arange(count) * 7 % 61).to(torch.uint8)
    values = _packed.unpack(data, N, K, bits).contiguous()
    found = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    assert (_packed.LAYOUT, found[:12]) == (2, digest)


def test_int4_scales_are_nearly_the_best_there_are():
    """Held against a fine search of every group, and against the scale that clips nothing."""
    torch.manual_seed(0)
    for w in (torch.randn(32, 320), torch.randn(32, 320) ** 3, torch.rand(32, 320)):
        panels = _packed.unpack(_packed.pack_matrix(w, 4), 32, 320, 4)
        found = (panels.transpose(1, 2).flatten(0, 1)[:32, :320] - w).square().sum()
        groups = w.view(32, 10, 32)
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        errors = []
        for part in torch.linspace(1.2, 0.4, 161):
            scale = extreme / -8 * part
            errors.append(((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(2))
        best = torch.stack(errors).amin(0).sum()
        assert 0.98 * best < found < 1.05 * best and found < errors[40].sum()


def test_a_large_matrix_is_packed_like_its_rows():
    w = torch.randn(3 * _packed.PANEL, 32 * 150)  # more groups than are rounded at a time
    parts = [_packed.pack_matrix(part, 4) for part in w.split(_packed.PANEL)]
    assert torch.equal(_packed.pack_matrix(w, 4), torch.cat(parts))


# ---- in files


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stored_precision_gives_the_codes_of_the_engine(pipe, tmp_path, precision):
    pipe.save_pretrained(tmp_path / "m", precision=precision)
    loaded = Pipeline.from_pretrained(tmp_path / "m")
    assert loaded.transformer.precision == precision
    assert loaded.transformer.config == pipe.transformer.config
    assert loaded.metadata == {"licence": "MIT"} and loaded.device == torch.device("cpu")
    options = {"classes": [2, 0], "n": 3, "seed": 9, "temperature": 2.0, "cfg_scale": 1.5}
    codes = loaded.sample_codes(**options)
    assert torch.equal(codes, pipe.sample_codes(**options, precision=precision))
    assert torch.equal(codes, loaded.sample_codes(**options, precision=precision))
    images = [i.tobytes() for i in loaded.sample(**options)]
    assert images == [i.tobytes() for i in pipe.sample(**options, precision=precision)]
    loaded.save_pretrained(tmp_path / "again")
    assert same(tmp_path / "m", tmp_path / "again")


def test_a_stored_model_draws_larger_pictures_too(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m", precision="int4")
    options = {"classes": [1], "seed": 2, "temperature": 2.0, "size": (16, 20)}
    codes = Pipeline.from_pretrained(tmp_path / "m").sample_codes(**options)
    assert codes.shape == (1, 8, 10)
    assert torch.equal(codes, pipe.sample_codes(**options, precision="int4"))


def test_the_file_holds_the_bytes_of_the_op_and_says_what_they_are(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m", precision="int8")
    config, tensors = stored(tmp_path / "m")
    assert config["packed"] == {"precision": "int8", "layout": _packed.LAYOUT}
    said = json.loads((tmp_path / "m/config.json").read_text())
    assert said["config"]["packed"] == config["packed"]
    names = {n for n in tensors if n.startswith("transformer.")}
    assert names == {f"transformer.{n}" for n in ("tok_emb", "pos_emb", "vectors", "weights")}
    engine = Engine(pipe.transformer, "int8")
    assert torch.equal(tensors["transformer.weights"], engine._packed.weights)
    shapes = matrices(SHAPE["n_layer"], SHAPE["n_embd"], SHAPE["vocab_size"])
    expected = sum(_packed.matrix_bytes(*shape, 8) for shape in shapes)
    assert tensors["transformer.weights"].numel() == expected
    first = vqfast.VQGAN.from_pretrained(tmp_path / "m")  # the tokenizer is whole
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(first.encode(x), pipe.tokenizer.encode(x))


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_another_precision_than_the_stored_is_refused_at_once(pipe, tmp_path, precision):
    pipe.save_pretrained(tmp_path / "m", precision=precision)
    loaded = Pipeline.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=f"precision must be {precision}.*fp32"):
        loaded.iter_codes(precision="fp32")
    with pytest.raises(ValueError, match="precision must be.*int8"):
        loaded.save_pretrained(tmp_path / "n", precision="int8")
    assert not (tmp_path / "n").exists()


def test_stored_float32_gives_every_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m", precision="fp32")
    loaded = Pipeline.from_pretrained(tmp_path / "m")
    for precision in ("auto", "fp32", "bf16", "int8", "int4"):
        options = {"n": 2, "seed": 1, "temperature": 2.0, "precision": precision}
        assert torch.equal(loaded.sample_codes(**options), pipe.sample_codes(**options))


def test_weights_that_change_under_a_packed_pipeline_are_seen(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m", precision="int8")
    loaded = Pipeline.from_pretrained(tmp_path / "m")
    options = {"n": 2, "seed": 1, "temperature": 2.0}
    before = loaded.sample_codes(**options)
    loaded.transformer.tok_emb.neg_()
    assert not torch.equal(loaded.sample_codes(**options), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_file_is_made_of_broken_weights(pipe, tmp_path, precision, value):
    gpt = make_gpt()
    gpt.blocks[1].attn.proj.weight[3, 5] = value
    broken = Pipeline(pipe.tokenizer, gpt, pipe.conditioning)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj must be finite"):
        broken.save_pretrained(tmp_path / "m", precision=precision)
    assert not (tmp_path / "m").exists()


# ---- damaged files


def rewrite(folder, change):
    """The folder's model with what `change(config, tensors)` does, its checksum made anew."""
    found = checkpoints.read(folder)
    change(found.config, found.tensors)
    native.write(folder, found.kind, found.config, found.tensors, found.metadata)


def _layout(config, tensors):
    config["packed"]["layout"] += 1


def _precision(config, tensors):
    config["packed"]["precision"] = "int3"


def _other_precision(config, tensors):
    config["packed"]["precision"] = "bf16"


def _said_nothing(config, tensors):
    config["packed"] = None


def _more_said(config, tensors):
    config["packed"]["group"] = 64


def _cut(config, tensors):
    tensors["transformer.weights"] = tensors["transformer.weights"][:-1]


def _missing(config, tensors):
    del tensors["transformer.vectors"]


def _numbers(config, tensors):
    tensors["transformer.weights"] = tensors["transformer.weights"].short()


def _strange(config, tensors):
    tensors["transformer.head.weight"] = torch.zeros(2)


def _wider(config, tensors):
    config["transformer"]["n_embd"] = 48


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_layout, "layout.*reads.*convert"),
        (_precision, "int3"),
        (_other_precision, r"weights has shape"),
        (_said_nothing, "packed must hold"),
        (_more_said, "packed must hold.*group"),
        (_cut, "weights has shape"),
        (_missing, "missing vectors"),
        (_numbers, "int16"),
        (_strange, "unexpected head.weight"),
        (_wider, "tok_emb has shape"),
    ],
)
def test_what_does_not_fit_is_an_error(pipe, tmp_path, run_cli, change, said):
    pipe.save_pretrained(tmp_path / "m", precision="int8")
    rewrite(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=said):
        Pipeline.from_pretrained(tmp_path / "m")
    code, _, err = run_cli("convert", "m", "n")
    assert code == 1 and "m" in err and not (tmp_path / "n").exists()


def test_damaged_bytes_of_the_weights_are_found(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m", precision="int4")
    path = tmp_path / "m" / native.WEIGHTS
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    begin, end = (8 + length + x for x in header["transformer.weights"]["data_offsets"])
    for at in (begin, begin + 33, (begin + end) // 2, end - 1):
        data = bytearray(good)
        data[at] ^= 4
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="checksum"):
            Pipeline.from_pretrained(tmp_path / "m")
    path.write_bytes(good[: (begin + end) // 2])
    with pytest.raises(CheckpointError, match=r"damaged or cut"):
        Pipeline.from_pretrained(tmp_path / "m")


# ---- the command line


@pytest.mark.parametrize("precision", PRECISIONS)
def test_convert_packs_and_sample_runs_it(run_cli, tmp_path, pipe, precision):
    pipe.save_pretrained(tmp_path / "m", dtype=torch.float16)
    whole = Pipeline.from_pretrained(tmp_path / "m")
    code, out, _ = run_cli("convert", "m", "small", "--precision", precision, "--json")
    assert code == 0 and json.loads(out)["packed"] == precision
    with safe_open(tmp_path / "small" / native.WEIGHTS, "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes.pop("transformer.weights") == torch.uint8
    assert set(dtypes.values()) == {torch.float16}, "what is not packed keeps its bits"
    options = {"n": 3, "seed": 2, "temperature": 2.0}
    small = Pipeline.from_pretrained(tmp_path / "small")
    assert torch.equal(
        small.sample_codes(**options), whole.sample_codes(**options, precision=precision)
    )
    assert run_cli("sample", "--model", "small", "-n", "1", "--out", "pictures")[0] == 0
    more = ("--precision", precision, "-n", "1", "--out")
    assert run_cli("sample", "--model", "m", *more, "others")[0] == 0
    pictures, others = (next((tmp_path / n).iterdir()) for n in ("pictures", "others"))
    assert pictures.read_bytes() == others.read_bytes()
    # again, and as it is
    assert run_cli("convert", "small", "same")[0] == 0
    assert run_cli("convert", "small", "too", "--precision", precision)[0] == 0
    assert same(*(tmp_path / name for name in ("small", "same", "too")))


def test_packed_files_shrink_with_the_format(run_cli, tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "m")
    sizes = {}
    for precision in PRECISIONS:
        assert run_cli("convert", "m", precision, "--precision", precision)[0] == 0
        weights = stored(tmp_path / precision)[1]["transformer.weights"]
        sizes[precision] = weights.numel()
    assert sizes["fp32"] == 2 * sizes["bf16"]
    assert 1.9 < sizes["bf16"] / sizes["int8"] < 2 and 1.8 < sizes["int8"] / sizes["int4"] < 2


def test_convert_gives_float32_back_and_nothing_else(run_cli, tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "m")
    assert run_cli("convert", "m", "packed", "--precision", "fp32")[0] == 0
    assert run_cli("convert", "packed", "half", "--precision", "fp16")[0] == 0
    assert run_cli("convert", "m", "want", "--precision", "fp16")[0] == 0
    assert same(tmp_path / "half", tmp_path / "want")
    assert run_cli("convert", "packed", "via", "--precision", "int8")[0] == 0
    for precision in ("bf16", "int8", "int4"):
        assert run_cli("convert", "m", precision, "--precision", precision)[0] == 0
        for asked in (["--precision", "fp32"], ["--precision", "fp16"], ["--to", "taming"]):
            code, _, err = run_cli("convert", precision, "x", *asked)
            assert code == 2 and precision in err and not (tmp_path / "x").exists()
    assert same(tmp_path / "via", tmp_path / "int8")
    assert not same(tmp_path / "via", tmp_path / "int4")


def test_a_tokenizer_cannot_be_packed(run_cli, tmp_path, tiny_tokenizer):
    for precision in ("int8", "int4"):
        code, _, err = run_cli("convert", tiny_tokenizer, "x", "--precision", precision)
        assert code == 2 and "transformer" in err and not (tmp_path / "x").exists()
    assert run_cli("convert", tiny_tokenizer, "half", "--precision", "bf16")[0] == 0
    assert {t.dtype for t in stored(tmp_path / "half")[1].values()} == {torch.bfloat16}
