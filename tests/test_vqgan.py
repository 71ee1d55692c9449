"""The VQGAN network against a plain float64 version, and what encode and decode promise."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import vqfast
from vqfast.models import vqgan_run
from vqfast.models.vqgan import PRESETS, VQGAN, VQGANConfig
from vqfast.nn.blocks import ResBlock
from vqfast.testing import compare, tolerances
from vqfast.testing.tokenizers import TINY, images
from vqfast.testing.tokenizers import tokenizer as make

# ---- the network, read from the state dict alone


class Plain:
    """taming's network as functions of a state dict; `used` collects the names it read."""

    def __init__(self, state, config):
        self.sd, self.c, self.used = state, config, set()

    def get(self, name):
        self.used.add(name)
        return self.sd[name]

    def conv(self, name, x, stride=1, padding=1):
        return F.conv2d(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"), stride, padding)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.get(f"{name}.weight"), self.get(f"{name}.bias"), 1e-6)

    def norm_swish(self, name, x):
        h = self.norm(name, x)
        return h * torch.sigmoid(h)

    def res(self, name, x):
        h = self.conv(f"{name}.conv1", self.norm_swish(f"{name}.norm1", x))
        h = self.conv(f"{name}.conv2", self.norm_swish(f"{name}.norm2", h))
        if h.shape[1] != x.shape[1]:
            x = self.conv(f"{name}.nin_shortcut", x, padding=0)
        return x + h

    def attn(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{p}", h, padding=0).flatten(2) for p in "qkv")  # [B, C, hw]
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5, dim=-1)
        out = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", out, padding=0)

    def level(self, name, x, blocks, size):
        for b in range(blocks):
            x = self.res(f"{name}.block.{b}", x)
            if size in self.c.attn_resolutions and self.c.attn_type != "none":
                x = self.attn(f"{name}.attn.{b}", x)
        return x

    def mid(self, name, x):
        x = self.res(f"{name}.mid.block_1", x)
        if self.c.attn_type != "none":
            x = self.attn(f"{name}.mid.attn_1", x)
        return self.res(f"{name}.mid.block_2", x)

    def prequant(self, x):
        h, last = self.conv("encoder.conv_in", x), len(self.c.ch_mult) - 1
        for i in range(last + 1):
            h = self.level(f"encoder.down.{i}", h, self.c.num_res_blocks, self.c.resolution // 2**i)
            if i < last:
                h = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), 2, 0)
        h = self.mid("encoder", h)
        h = self.conv("encoder.conv_out", self.norm_swish("encoder.norm_out", h))
        return self.conv("quant_conv", h, padding=0)

    def decode(self, z_q):
        last = len(self.c.ch_mult) - 1
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", z_q, padding=0))
        h = self.mid("decoder", h)
        for i in range(last, -1, -1):
            h = self.level(
                f"decoder.up.{i}", h, self.c.num_res_blocks + 1, self.c.resolution // 2**i
            )
            if i:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = self.conv(f"decoder.up.{i}.upsample.conv", h)
        return self.conv("decoder.conv_out", self.norm_swish("decoder.norm_out", h))


VARIANTS = {
    "f4": {},
    "two blocks, wide steps": {"ch_mult": (1, 1, 4), "num_res_blocks": 2},
    "attention at two levels": {"attn_resolutions": (8, 16)},
    "no attention": {"attn_type": "none"},
    "one level": {"ch_mult": (2,), "attn_resolutions": (32,)},
    "depth": {"in_channels": 1, "out_ch": 1},
    "segmentation": {"in_channels": 7, "out_ch": 7},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_network_is_the_published_one(changes):
    tok = make(**changes).double()
    plain = Plain(tok.state_dict(), tok.config)
    x = images(2, tok.config, 32, 48).double()
    with torch.no_grad():
        z = plain.prequant(x)
        torch.testing.assert_close(tok.encode_to_prequant(x), z, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(tok.decode_latents(z), plain.decode(z), rtol=1e-9, atol=1e-11)
    assert plain.used == {k for k in tok.state_dict() if not k.startswith("quantize.")}


def test_small_activations_show_the_norm_epsilon():
    # at this scale 1e-5 in place of 1e-6 changes the result by several per cent
    block = ResBlock(32, 32).double()
    x = 1e-3 * torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    plain = Plain({f"b.{k}": v for k, v in block.state_dict().items()}, VQGANConfig())
    torch.testing.assert_close(block(x), plain.res("b", x), rtol=1e-9, atol=1e-12)


# trap table of the published checkpoints: tensors and millions of parameters
COUNTS = {
    "imagenet_f16_1024": (343, 72.14),
    "imagenet_f16_16384": (343, 76.07),
    "openimages_gumbel_f8": (301, 69.00),
    "coco_f16_8192": (343, 73.98),
    "sflckr_segmentation": (343, 72.55),
    "coco_segmentation": (343, 72.56),
    "ade20k_segmentation": (343, 72.48),
    "imagenet_depth": (343, 72.14),
    "ldm_f4": (205, 55.32),
    "ldm_f4_noattn": (185, 53.22),
    "ldm_f8": (299, 67.72),
    "ldm_f8_256": (299, 67.65),
    "ldm_f16": (343, 69.59),
    "llamagen_vq16": (343, 71.88),
    "llamagen_vq8": (299, 70.11),
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_has_the_size_of_the_released_file(name):
    with torch.device("meta"):
        state = VQGAN(VQGANConfig.preset(name)).state_dict()
    millions = sum(v.numel() for v in state.values()) / 1e6
    assert (len(state), round(millions, 2)) == COUNTS[name]


def test_default_is_f16_with_1024_codes_of_256():
    c = VQGANConfig()
    assert (c.factor, c.n_embed, c.embed_dim) == (16, 1024, 256)


# ---- encode, decode, forward


def test_codes_are_the_nearest_to_the_latents():
    tok = make()
    x = images(2, tok.config, 32, 64)
    with torch.no_grad():
        z = tok.encode_to_prequant(x).movedim(1, -1)  # [B, h, w, D]
        codes = tok.encode(x)
        d = (z.double()[..., None, :] - tok.quantize.embedding.weight.double()).square().sum(-1)
    assert codes.dtype == torch.int64 and codes.shape == (2, 8, 16)
    assert torch.equal(codes, d.argmin(-1)) and len(codes.unique()) > 10


@pytest.mark.parametrize("quantizer", ["vq", "gumbel", "ema"])
def test_decode_of_encode_is_the_forward_pass(quantizer):
    tok = make(quantizer=quantizer, **({"embed_dim": 32} if quantizer == "gumbel" else {}))
    x = images(3, tok.config)
    with torch.no_grad():
        x_hat, loss, info = tok(x)
        codes = tok.encode(x)
        again = tok.decode(codes)
    assert torch.equal(info["indices"], codes) and loss.shape == ()
    # z + (z_q - z) is not z_q to the bit
    torch.testing.assert_close(again, x_hat, rtol=1e-4, atol=1e-5)


def test_decode_takes_every_integer_type():
    tok = make()
    codes = torch.randint(64, (1, 2, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = tok.decode(codes)
        for dtype in (torch.uint8, torch.int16, torch.int32):
            assert torch.equal(tok.decode(codes.to(dtype)), want)
    assert want.shape == (1, 3, 8, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [1, 3 * 32 * 32 * 32])  # all maps; those of the finest level
def test_large_maps_go_image_by_image_to_the_same_result(limit, dtype, monkeypatch):
    tok = make().to(dtype)
    x, exact, sizes = images(3, tok.config).to(dtype), copy.deepcopy(tok).double(), []
    tok.encoder.down[0].block[0].register_forward_hook(lambda *a: sizes.append(len(a[2])))
    tok.encoder.mid["block_1"].register_forward_hook(lambda *a: sizes.append(len(a[2])))
    with torch.no_grad():
        codes = tok.encode(x)
        y, z = tok.decode(codes), tok.encode_to_prequant(x)
        exact_y, exact_z = exact.decode(codes), exact.encode_to_prequant(x.double())
        monkeypatch.setattr(vqgan_run, "_POOLED_BYTES", 1)
        assert torch.equal(tok.encode_to_prequant(x), z) and torch.equal(tok.decode(codes), y)
        monkeypatch.setattr(vqgan_run, "_LARGE_BYTES", limit * dtype.itemsize)
        by_images = tok.encode_to_prequant(x)
        assert sizes[6:] == ([1] * 6 if limit == 1 else [1, 1, 1, 3])
        assert compare.budget_ratio(by_images, z, exact_z, tolerances.FORWARD) <= 1
        assert compare.budget_ratio(tok.decode(codes), y, exact_y, tolerances.FORWARD) <= 1
    assert tok.encode_to_prequant(x).requires_grad and sizes[-1] == 3  # with gradients, at once


def test_an_empty_batch_is_an_empty_result():
    tok = make()
    with torch.no_grad():
        codes = tok.encode(torch.empty(0, 3, 32, 32))
        assert codes.shape == (0, 8, 8) and codes.dtype == torch.int64
        assert tok.decode(codes).shape == (0, 3, 32, 32)


def test_layout_of_the_input_does_not_matter():
    tok = make()
    x = images(2, tok.config)
    strided = torch.stack([x, x], -1)[..., 0]
    with torch.no_grad():
        want = tok.encode_to_prequant(x)
        for other in (x.contiguous(memory_format=torch.channels_last), strided):
            assert torch.equal(tok.encode_to_prequant(other), want)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([1.0], TypeError, "list"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(3, 32, 32), ValueError, r"\[3, 32, 32\]"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"\[B, 3, H, W\].*\[1, 1, 32, 32\]"),
        (torch.zeros(1, 3, 32, 30), ValueError, r"multiples of 4.*\[1, 3, 32, 30\]"),
        (torch.zeros(1, 3, 0, 32), ValueError, "multiples of 4"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "device"),
    ],
)
def test_encode_refuses(x, error, words):
    tok = make()
    for call in (tok.encode, tok.encode_to_prequant, tok):
        with pytest.raises(error, match=words):
            call(x)


@pytest.mark.parametrize(
    ("codes", "error", "words"),
    [
        ([[[1]]], TypeError, "list"),
        (torch.zeros(1, 2, 2), TypeError, "float32"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), TypeError, "bool"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"3 dimensions.*\[2, 2\]"),
        (torch.full((1, 2, 2), 64), ValueError, r"codes must be in 0\.\.63.*64"),
        (torch.full((1, 2, 2), -1), ValueError, r"codes must be in 0\.\.63.*-1"),
    ],
)
def test_decode_refuses(codes, error, words):
    with pytest.raises(error, match=words):
        make().decode(codes)


def test_gumbel_encodes_without_noise_also_in_training_mode():
    tok = make(quantizer="gumbel", embed_dim=32).train()
    x = images(2, tok.config)
    with torch.no_grad():
        logits = tok.quantize.proj(tok.encode_to_prequant(x))
        assert torch.equal(tok.encode(x), logits.argmax(1))
        noisy = [tok(x)[2]["indices"] for _ in range(2)]
    assert not torch.equal(*noisy)


def test_encoding_does_not_move_an_ema_codebook():
    tok = make(quantizer="ema").train()
    before = {k: v.clone() for k, v in tok.state_dict().items()}
    with torch.no_grad():
        tok.encode(images(2, tok.config))
    assert all(torch.equal(v, before[k]) for k, v in tok.state_dict().items())
    tok(images(2, tok.config))
    assert any(not torch.equal(v, before[k]) for k, v in tok.state_dict().items())


def test_every_weight_gets_a_finite_gradient():
    tok = make(quantizer="vq").train()
    x = images(2, tok.config)
    x_hat, loss, _ = tok(x)
    ((x_hat - x).abs().mean() + loss).backward()
    for name, p in tok.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("how", ["autocast", "module"])
def test_half_precision_searches_and_loses_in_float32(how):
    tok = make()
    if how == "module":
        tok.bfloat16()
    x = images(2, tok.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        z = tok.encode_to_prequant(x)
        codes = tok.encode(x)
        x_hat, loss, info = tok(x)
    assert z.dtype == x_hat.dtype == torch.bfloat16 and x_hat.isfinite().all()
    rows, book = z.movedim(1, -1).double(), tok.quantize.embedding.weight.double()
    d = (rows[..., None, :] - book).square().sum(-1)  # [B, h, w, K]
    assert torch.equal(codes, d.argmin(-1)) and torch.equal(info["indices"], codes)
    # beta 0.25 and weight 1 on the two terms, which have one value
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1.25 * d.min(-1).values.mean().item() / 8, rel=1e-5)


def test_beta_and_legacy_reach_the_gradient_of_the_latents():
    grads = {}
    for legacy in (True, False):
        tok = make(beta=0.5, legacy=legacy)
        x = images(2, tok.config).requires_grad_()
        (grads[legacy],) = torch.autograd.grad(tok(x)[1], x)
    # legacy: weight 1 on the commitment term; fixed: beta
    torch.testing.assert_close(grads[False], 0.5 * grads[True], rtol=1e-4, atol=1e-9)


def test_codebook_starts_uniform_within_one_over_K():
    weight = VQGAN(VQGANConfig(**{**TINY, "n_embed": 500})).quantize.embedding.weight
    assert weight.abs().max() <= 1 / 500 and weight.abs().max() > 0.9 / 500


def test_forward_reports_the_perplexity_of_the_batch():
    tok = make()
    with torch.no_grad():
        info = tok(images(2, tok.config))[2]
    share = torch.bincount(info["indices"].reshape(-1), minlength=64) / info["indices"].numel()
    want = torch.exp(-torch.special.xlogy(share, share).sum())
    torch.testing.assert_close(info["perplexity"], want)


def test_to_rgb_shows_depth_and_classes():
    tok = make()
    x = torch.tensor([[[[-3.0, 0.5]]]])
    assert tok.to_rgb(x).tolist() == [[[[-1.0, 0.5]]] * 3]
    classes = torch.tensor([[0, 1], [2, 0]])
    shown = tok.to_rgb(F.one_hot(classes, 7).movedim(-1, 0)[None].float())
    assert shown.shape == (1, 3, 2, 2) and shown.abs().max() <= 1
    assert torch.equal(shown[..., 0, 0], shown[..., 1, 1])
    assert not torch.equal(shown[..., 0, 0], shown[..., 0, 1])


def test_remapped_codebook_decodes_only_the_kept_codes():
    kept = [3, 11, 40, 63]
    tok = make(remap=kept)
    with torch.no_grad():
        codes = tok.encode(images(2, tok.config))
        assert tok.n_codes == 4 and codes.min() >= 0 and codes.max() < 4
        full = make()
        full.load_state_dict({k: v for k, v in tok.state_dict().items() if k != "quantize.used"})
        want = full.decode(torch.tensor(kept)[codes])
        torch.testing.assert_close(tok.decode(codes), want)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        tok.decode(torch.full((1, 2, 2), 4))


# ---- files


@pytest.mark.parametrize(
    "changes", [{}, {"quantizer": "gumbel", "embed_dim": 32}, {"quantizer": "ema"}]
)
def test_saved_and_loaded_model_is_the_same(tmp_path, changes):
    tok = make(**changes)
    tok.save_pretrained(tmp_path / "m", metadata={"note": "x"})
    rng = torch.get_rng_state()
    got = vqfast.VQGAN.from_pretrained(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), rng) and not got.training
    assert got.config == tok.config
    want, have = tok.state_dict(), got.state_dict()
    assert want.keys() == have.keys() and all(torch.equal(have[k], v) for k, v in want.items())
    x = images(1, tok.config)
    with torch.no_grad():
        assert torch.equal(got.encode(x), tok.encode(x))
        assert torch.equal(got.encode_to_prequant(x), tok.encode_to_prequant(x))


def test_precision_sets_the_dtype_of_the_weights(tmp_path):
    make().save_pretrained(tmp_path / "m", dtype=torch.float16)
    for precision, dtype in [(None, "float32"), ("bf16", "bfloat16"), ("fp16", "float16")]:
        tok = VQGAN.from_pretrained(tmp_path / "m", precision=precision)
        assert {str(p.dtype) for p in tok.parameters()} == {f"torch.{dtype}"}
    with pytest.raises(ValueError, match="precision.*int3"):
        VQGAN.from_pretrained(tmp_path / "m", precision="int3")


def test_tensors_that_do_not_fit_are_all_named():
    tok = make()
    state = dict(tok.state_dict())
    state.pop("quant_conv.bias")
    state["extra.weight"] = torch.zeros(1)
    state["encoder.conv_in.weight"] = torch.zeros(32, 3, 5, 5)
    with pytest.raises(vqfast.CheckpointError) as e:
        VQGAN.from_tensors(tok.config.to_dict(), state, what="here.ckpt")
    for words in ("here.ckpt", "quant_conv.bias", "extra.weight", "encoder.conv_in.weight"):
        assert words in str(e.value)


def test_a_config_that_is_too_large_allocates_nothing():
    # 2^31 codes of 2^20 would be 8 EiB
    config = {**TINY, "n_embed": 2**31 - 1, "embed_dim": 1 << 20}
    with pytest.raises(vqfast.CheckpointError, match="quantize.embedding.weight"):
        VQGAN.from_tensors(config, make().state_dict(), what="huge")


def test_parts_are_reachable_under_tamings_names():
    tok = make()
    assert tok.last_layer is tok.decoder.conv_out.weight
    paths = ["encoder.mid.attn_1", "decoder.mid.block_2", "encoder.down.0.downsample.conv"]
    for path in itertools.chain(paths, ["decoder.up.1.upsample.conv", "encoder.down.1.attn.0.q"]):
        assert isinstance(tok.get_submodule(path), torch.nn.Module)
