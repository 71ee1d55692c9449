"""Pipeline: requests, invariance to the batch, conditions, and models on the disk."""

import pytest
import torch

from vqfast import CheckpointError, Pipeline
from vqfast.models import conditioning
from vqfast.models.gpt import GPT, GPTConfig
from vqfast.models.vqgan import VQGAN, VQGANConfig

CONFIG = VQGANConfig(
    ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(4,), resolution=16,
    z_channels=8, n_embed=20, embed_dim=4,
)  # fmt: skip
GRID, T = 4, 16


def make(condition, V=20, metadata=None):
    torch.manual_seed(0)
    tokenizer = VQGAN(CONFIG).eval()
    c = conditioning.build(condition, tokenizer).eval()
    gpt = GPT(GPTConfig(V, T + c.length((GRID, GRID)) - 1, 2, 2, 16)).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(0, 0.5)
        gpt.tok_emb.weight.mul_(4)  # what came before decides what comes next
    return Pipeline(tokenizer, gpt, c, metadata)


@pytest.fixture(scope="module")
def classes():
    names = ["cat", "dog", "fox"]
    return make(
        {"kind": "class", "n_classes": 3, "class_names": names, "null_class": 3},
        metadata={"licence": "MIT"},
    )


def pixels(images):
    return [image.tobytes() for image in images]


def test_neither_codes_nor_pixels_depend_on_the_batch(classes):
    options = {"classes": [2, 0], "n": 7, "seed": 9, "temperature": 2.0}
    codes = classes.sample_codes(**options)
    assert codes.shape == (7, GRID, GRID) and codes.dtype == torch.int64
    images = classes.sample(**options)
    assert [i.size for i in images] == [(16, 16)] * 7 and images[0].mode == "RGB"
    for batch_size in (1, 3, 7):
        assert torch.equal(classes.sample_codes(**options, batch_size=batch_size), codes)
        assert pixels(classes.sample(**options, batch_size=batch_size)) == pixels(images)
    assert not torch.equal(classes.sample_codes(**{**options, "seed": 10}), codes)
    assert len({c.numpy().tobytes() for c in codes}) == 7


def test_images_are_the_decoded_codes(classes):
    options = {"classes": [1], "seed": 4}
    (image,) = classes.sample(**options)
    with torch.no_grad():
        x = classes.tokenizer.decode(classes.sample_codes(**options))[0]
    levels = ((x.clamp(-1, 1) + 1) * 127.5 + 1e-3).to(torch.uint8).permute(1, 2, 0)
    assert image.tobytes() == levels.numpy().tobytes()


def test_classes_are_taken_in_turn(classes):
    options = {"seed": 1, "temperature": 3.0}
    turn = classes.sample_codes([2, "dog"], n=5, **options)
    for i in range(5):
        alone = classes.sample_codes([[2, 1][i % 2]], n=1, first=i, **options)
        assert torch.equal(alone[0], turn[i])
    assert len(classes.sample_codes(["cat", "cat", 1])) == 3
    assert torch.equal(
        classes.sample_codes(n=4, **options), classes.sample_codes([0, 1, 2], n=4, **options)
    )


def test_a_request_can_go_on_where_it_stopped(classes):
    options = {"classes": [0, 1, 2], "seed": 3, "temperature": 2.0}
    whole = classes.sample_codes(n=8, **options)
    rest = classes.sample_codes(n=5, first=3, batch_size=2, **options)
    assert torch.equal(rest, whole[3:])


def test_streaming_holds_a_batch_at_a_time(classes):
    batches = classes.iter_codes(n=10**6, batch_size=3, seed=2)
    found = [next(batches), next(batches)]
    assert [len(b) for b in found] == [3, 3]
    assert torch.equal(torch.cat(found), classes.sample_codes(n=6, seed=2))
    images = classes.iter_images(n=10**6, batch_size=3, seed=2)
    assert next(images).tobytes() == pixels(classes.sample(n=1, seed=2))[0]


def test_no_images(classes):
    assert classes.sample(n=0) == []
    assert classes.sample_codes(n=0).shape == (0, GRID, GRID)


def test_greedy_is_the_argmax_of_the_transformer(classes):
    codes = classes.sample_codes([1], temperature=0.0).flatten(1)
    with torch.no_grad():
        logits = classes.transformer(codes, torch.tensor([[1]]))
    assert torch.equal(logits.argmax(-1), codes)


def test_guidance_uses_the_null_class(classes):
    greedy = {"classes": [1], "temperature": 0.0}
    codes = classes.sample_codes(**greedy, cfg_scale=3.0).flatten(1)
    with torch.no_grad():
        c = classes.transformer(codes, torch.tensor([[1]]))
        u = classes.transformer(codes, torch.tensor([[3]]))
    assert torch.equal((u + 3.0 * (c - u)).argmax(-1), codes)
    assert not torch.equal(codes, classes.sample_codes(**greedy).flatten(1))


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "int8", "int4"])
def test_every_precision_samples(classes, precision):
    codes = classes.sample_codes(n=2, precision=precision, seed=1)
    assert ((codes >= 0) & (codes < 20)).all()
    if precision in ("auto", "fp32"):
        assert torch.equal(codes, classes.sample_codes(n=2, seed=1))


def test_changed_weights_are_used(classes):
    pipe = make({"kind": "sos"})
    before = pipe.sample_codes(n=2, seed=1)
    with torch.no_grad():
        pipe.transformer.tok_emb.weight.neg_()
    assert not torch.equal(pipe.sample_codes(n=2, seed=1), before)


def test_a_prefix_is_kept_and_continued(classes):
    options = {"classes": [1, 2], "n": 3, "seed": 6, "temperature": 2.0}
    whole = classes.sample_codes(**options)
    again = classes.sample_codes(**options, prefix=whole.flatten(1)[:, :7])
    assert torch.equal(again, whole)
    other = classes.sample_codes(**options, prefix=torch.zeros(1, 7, dtype=torch.int64))
    assert not other.flatten(1)[:, :7].any() and not torch.equal(other, whole)
    guided = classes.sample_codes(
        **options, prefix=torch.zeros(1, 7, dtype=torch.int64), cfg_scale=2.0
    )
    assert not guided.flatten(1)[:, :7].any()
    full = classes.sample_codes(**options, prefix=whole.flatten(1))
    assert torch.equal(full, whole)


def test_a_start_token_needs_nothing():
    pipe = make({"kind": "sos", "sos_token": 5})
    codes = pipe.sample_codes(n=3, seed=2)
    assert torch.equal(pipe.sample_codes(seed=2), codes[:1])
    with pytest.raises(ValueError, match="classes must be None"):
        pipe.sample_codes(classes=[1])


@pytest.mark.parametrize("kind", ["first_stage", "tokenizer", "coord"])
def test_conditions_on_a_picture(kind):
    config = {
        "first_stage": {"kind": kind},
        "tokenizer": {"kind": kind, "config": {**CONFIG.to_dict(), "n_embed": 10}},
        "coord": {"kind": kind, "n_embed": 20, "down_factor": 4},
    }[kind]
    pipe = make(config)
    pictures = torch.rand(2, 1, 16, 16) if kind == "coord" else torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        cond = pipe.conditioning.encode(pictures)
    codes = pipe.sample_codes(cond=cond, n=3, seed=1, temperature=2.0)
    assert torch.equal(
        pipe.sample_codes(cond=cond[1:], n=1, first=1, seed=1, temperature=2.0)[0], codes[1]
    )
    assert len(pipe.sample_codes(cond=cond)) == 2
    with pytest.raises(ValueError, match=f"cond must be given.*{kind}"):
        pipe.sample_codes(n=1)
    with pytest.raises(ValueError, match=r"cond must be \[m, 16\].*\[2, 15\]"):
        pipe.sample_codes(cond=cond[:, :15])


def test_tokens_that_are_no_codes_are_decoded_with_a_warning():
    pipe = make({"kind": "sos"}, V=40)
    with torch.no_grad():
        pipe.transformer.head.weight[:20] = 0
    codes = pipe.sample_codes(temperature=0.0)
    assert (codes >= 20).any()
    with pytest.warns(RuntimeWarning, match="no codes of the tokenizer"):
        (image,) = pipe.sample(temperature=0.0)
    assert image.size == (16, 16)


# ---- files


def test_saved_models_draw_the_same(classes, tmp_path):
    classes.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    assert loaded.metadata["licence"] == "MIT"
    assert loaded.conditioning.class_names == ["cat", "dog", "fox"]
    options = {"classes": ["fox"], "n": 3, "seed": 8}
    assert pixels(loaded.sample(**options)) == pixels(classes.sample(**options))
    tokenizer = VQGAN.from_pretrained(tmp_path / "model")
    assert torch.equal(tokenizer.decoder.conv_out.weight, classes.tokenizer.decoder.conv_out.weight)


def test_own_tokenizer_of_a_condition_is_saved(tmp_path):
    pipe = make({"kind": "tokenizer", "config": {**CONFIG.to_dict(), "n_embed": 10}})
    pipe.save_pretrained(tmp_path, metadata={"a": 1}, dtype=torch.float16)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert loaded.metadata["a"] == 1
    for name, value in pipe.conditioning.state_dict().items():
        got = loaded.conditioning.state_dict()[name]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, value, rtol=2e-3, atol=1e-4)


def test_a_tokenizer_is_no_pipeline(classes, tmp_path):
    classes.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="pipeline is needed"):
        Pipeline.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_listed(classes, tmp_path, monkeypatch):
    state = classes.transformer.state_dict()
    state.pop("ln_f.bias")
    state["blocks.9.ln1.weight"] = torch.zeros(16)
    monkeypatch.setattr(classes.transformer, "state_dict", lambda: state)
    classes.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="missing ln_f.bias; unexpected blocks.9.ln1.weight"):
        Pipeline.from_pretrained(tmp_path)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"classes": [3]}, ValueError, "unknown class 3"),
        ({"classes": ["cow"]}, ValueError, "cow"),
        ({"classes": []}, ValueError, "at least one class"),
        ({"classes": [1.5]}, TypeError, "float"),
        ({"n": -1}, ValueError, "n must"),
        ({"n": 2.0}, TypeError, "n must"),
        ({"seed": -1}, ValueError, "seed"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_p": 0}, ValueError, "top_p"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"precision": "fp16"}, ValueError, "precision.*fp16"),
        ({"size": (12, 16)}, ValueError, "at least 16x16, got 12x16.*window"),
        ({"size": (16, 30)}, ValueError, "multiples of 4, got 16x30"),
        ({"size": (16, 0)}, ValueError, "size"),
        ({"size": (16, 32, 3)}, ValueError, r"size must be \(H, W\)"),
        ({"size": "16x16"}, ValueError, "size must be"),
        ({"size": 16.0}, ValueError, "size must be"),
        ({"size": (16.0, 16)}, TypeError, "size must be an int"),
        ({"window_rule": "taming"}, ValueError, "window_rule.*make_samples, scene.*taming"),
        ({"cond": torch.zeros(1, 1)}, TypeError, "cond.*float32"),
        ({"prefix": torch.zeros(1, 17, dtype=torch.int64)}, ValueError, "prefix"),
        ({"classes": [1], "cond": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, "exclude"),
    ],
)
@pytest.mark.parametrize("method", ["sample", "iter_codes"])
def test_wrong_requests_are_named_before_anything_is_drawn(classes, method, arguments, error, said):
    with pytest.raises(error, match=said):
        getattr(classes, method)(**{"n": 0, **arguments})


def test_the_native_size_is_taken_in_any_spelling(classes):
    for size in (16, (16, 16), [16, 16]):
        assert classes.sample_codes(n=0, size=size).shape == (0, GRID, GRID)


def test_guidance_without_a_null_condition_is_refused():
    with pytest.raises(ValueError, match="null condition"):
        make({"kind": "class", "n_classes": 3}).sample_codes(n=0, cfg_scale=2.0)


@pytest.mark.parametrize(
    ("condition", "V", "said"),
    [
        ({"kind": "sos"}, 19, "codes"),
        ({"kind": "class", "n_classes": 30}, 24, "classes"),
        ({"kind": "class", "n_classes": 3, "null_class": 24}, 24, "classes"),
        ({"kind": "sos", "sos_token": 24}, 24, "start token"),
    ],
)
def test_a_vocabulary_without_room_is_refused(condition, V, said):
    with pytest.raises(ValueError, match=f"vocab_size.*{said}"):
        make(condition, V=V)


def test_parts_of_the_wrong_kind_are_named(classes):
    with pytest.raises(TypeError, match="tokenizer.*VQGAN.*GPT"):
        Pipeline(classes.transformer, classes.transformer, classes.conditioning)
