"""THE shapes. Tests take the tags `smoke` and `edge`, benches take `bench`; ids are the models that
have the shape.

Letters as in the contract: N vectors, D code dimension, K codes; B batch, H heads, T tokens, d head
dimension; C channels, O output channels, H W height and width; V vocabulary; S cache slots of which
n are written; L layers. (H is heads in attention, height in group norm.)
"""

from typing import NamedTuple


class Case(NamedTuple):
    """One shape of one op. `shape` maps letters to sizes; its meaning is the op's
    `sample_inputs`."""

    id: str
    op: str
    shape: dict[str, int]
    tags: frozenset[str]

    def __getitem__(self, letter: str) -> int:  # type: ignore[override]  # by letter
        return self.shape[letter]


def _case(op: str, id: str, tags: str, **shape: int) -> Case:
    return Case(id, op, shape, frozenset(tags.split()))


_OVER_CODES = (
    "nearest", "nearest_quantize", "quantize", "straight_through", "code_order", "code_stats",
    "ema_stats", "ema_update",
)  # fmt: skip


def _codes(id: str, tags: str, N: int, K: int, D: int) -> list[Case]:
    """A shape of the ops over codes."""
    return [_case(op, id, tags, N=N, K=K, D=D) for op in _OVER_CODES]


def _step(id: str, tags: str, bits: int, **shape: int) -> Case:
    return _case("decode_step", id, tags, bits=bits, **shape)


CASES: tuple[Case, ...] = (
    # ---- nearest code, statistics, quantize
    *_codes("vqgan_f16_1024", "bench", 8192, 1024, 256),
    *_codes("vqgan_f16_16384", "bench", 8192, 16384, 256),
    *_codes("vqgan_f16_16384_one_image", "bench", 256, 16384, 256),
    *_codes("gumbel_f8", "bench", 4096, 8192, 256),
    *_codes("llamagen_16384", "bench", 8192, 16384, 8),
    *_codes("ldm_f4", "bench", 16384, 8192, 3),
    *_codes("ldm_f8", "bench", 8192, 16384, 4),
    *_codes("titok_4096", "bench", 8192, 4096, 12),
    *_codes("k8192_d32", "bench", 8192, 8192, 32),
    *_codes("ibq_262144", "bench", 2048, 262144, 16),  # D 16, as D 256 takes minutes in the peers
    *_codes("smoke_d4", "smoke", 300, 257, 4),
    *_codes("smoke_d32", "smoke", 200, 515, 32),
    *_codes("smoke_d256", "smoke", 65, 130, 256),
    *_codes("smoke_skewed", "smoke skewed", 257, 6, 64),  # most rows on one code
    *_codes("edge_n0", "edge", 0, 5, 3),
    *_codes("edge_n1_k1_d1", "edge", 1, 1, 1),
    *_codes("edge_primes", "edge", 127, 61, 17),
    *_codes("edge_d257", "edge", 31, 37, 257),
    # ---- causal attention
    _case("causal_attention", "taming_f16", "bench", B=8, H=16, T=256, d=64),
    _case("causal_attention", "taming_f16_cond", "bench", B=8, H=16, T=257, d=64),
    _case("causal_attention", "llamagen_384", "bench", B=4, H=16, T=576, d=64),
    _case("causal_attention", "llamagen_512", "bench", B=2, H=16, T=1024, d=64),
    _case("causal_attention", "smoke_d64", "smoke", B=2, H=3, T=130, d=64),
    _case("causal_attention", "smoke_d40", "smoke", B=1, H=2, T=65, d=40),
    _case("causal_attention", "edge_t1", "edge", B=2, H=1, T=1, d=16),
    _case("causal_attention", "edge_t0", "edge", B=2, H=2, T=0, d=16),
    _case("causal_attention", "edge_primes", "edge", B=1, H=3, T=37, d=59),
    _case("causal_attention", "edge_d100", "edge", B=1, H=1, T=17, d=100),
    # ---- attention of the autoencoder: one head across the channels, T = h·w
    _case("full_attention", "taming_f16", "bench", B=1, H=1, T=256, d=512),
    _case("full_attention", "taming_f16_512px", "bench", B=1, H=1, T=1024, d=512),
    _case("full_attention", "ldm_f4", "bench", B=1, H=1, T=4096, d=512),
    _case("full_attention", "smoke_d512", "smoke", B=1, H=1, T=66, d=512),
    _case("full_attention", "smoke_d40", "smoke", B=2, H=2, T=97, d=40),
    _case("full_attention", "edge_t1", "edge", B=2, H=1, T=1, d=16),
    _case("full_attention", "edge_t0", "edge", B=2, H=2, T=0, d=16),
    _case("full_attention", "edge_primes", "edge", B=1, H=3, T=37, d=59),
    # ---- group norm + SiLU
    *(
        _case(op, id, tags, B=B, C=C, H=H, W=W, groups=groups)
        for op in ("group_norm_silu", "group_norm_silu_apply")
        for id, tags, B, C, H, W, groups in (
            ("vqgan_256px", "bench", 1, 128, 256, 256, 32),
            ("vqgan_64px", "bench", 4, 256, 64, 64, 32),
            ("vqgan_16px", "bench", 8, 512, 16, 16, 32),
            ("smoke", "smoke", 2, 64, 9, 7, 32),
            ("edge_one_pixel", "edge", 3, 32, 1, 1, 8),
            ("edge_primes", "edge", 1, 39, 5, 11, 13),
            ("edge_b0", "edge", 0, 32, 2, 2, 32),
        )
    ),
    # ---- convolution on few positions (the kernels take 1024 of y, and 16 channels or more)
    *(
        _case(op, id, tags, B=B, C=C, O=outs, H=H, W=W, k=k, stride=s, padding=d, **more)
        for op in ("conv_few", "conv_few_input", "conv_few_weight")
        for id, tags, B, C, outs, H, W, k, s, d, more in (
            ("vqgan_4px", "bench", 4, 512, 512, 4, 4, 3, 1, 1, {"wide": 1}),
            ("vqgan_8px", "bench", 4, 256, 256, 8, 8, 3, 1, 1, {"wide": 1}),
            ("vqgan_16px", "bench", 1, 512, 512, 16, 16, 3, 1, 1, {}),
            ("patchgan_7px", "bench", 4, 256, 512, 8, 8, 4, 1, 1, {"wide": 1}),
            ("smoke", "smoke", 2, 32, 48, 8, 9, 3, 1, 1, {}),
            ("smoke_wide", "smoke", 2, 48, 32, 7, 10, 3, 2, 0, {"wide": 1}),
            ("smoke_patch", "smoke", 1, 33, 65, 9, 8, 4, 2, 1, {"wide": 1, "bias": 0}),
            ("edge_odd", "edge", 3, 37, 67, 5, 3, 3, 1, 1, {}),
            ("edge_1x1", "edge", 1, 131, 35, 31, 33, 1, 1, 0, {"wide": 1}),
            ("edge_one_position", "edge", 1, 16, 16, 1, 1, 3, 1, 1, {}),
            ("edge_far_padding", "edge", 2, 17, 19, 2, 3, 2, 3, 4, {"bias": 0}),
            ("edge_b0", "edge", 0, 32, 32, 4, 4, 3, 1, 1, {}),
        )
    ),
    # ---- 3x3 convolution (the kernel takes 64 positions of y and 32 channels, or more)
    _case("conv3x3", "vqgan_256px", "bench", B=1, C=128, O=128, H=256, W=256),
    _case("conv3x3", "vqgan_128px", "bench", B=1, C=256, O=256, H=128, W=128),
    _case("conv3x3", "vqgan_32px", "bench", B=4, C=512, O=256, H=32, W=32),
    _case("conv3x3", "vqgan_up", "bench", B=1, C=128, O=128, H=128, W=128, scale=2),
    _case("conv3x3", "vqgan_16px", "bench", B=1, C=512, O=512, H=16, W=16),
    _case("conv3x3", "vqgan_rgb", "bench", B=1, C=3, O=128, H=256, W=256),
    _case("conv3x3", "smoke_rgb", "smoke", B=2, C=3, O=67, H=17, W=19, residual=1),
    _case("conv3x3", "edge_gray_column", "edge", B=3, C=1, O=33, H=259, W=1),
    _case("conv3x3", "edge_16_channels", "edge", B=1, C=16, O=128, H=8, W=9),
    _case("conv3x3", "smoke_few", "smoke", B=2, C=130, O=131, H=8, W=9, residual=1),
    _case("conv3x3", "edge_few_doubled", "edge", B=1, C=131, O=130, H=13, W=2, scale=2),
    _case("conv3x3", "edge_one_column", "edge", B=1, C=259, O=128, H=67, W=1),
    _case("conv3x3", "smoke", "smoke", B=2, C=64, O=48, H=32, W=34),
    _case("conv3x3", "smoke_residual", "smoke", B=1, C=40, O=36, H=33, W=32, residual=1),
    _case("conv3x3", "smoke_doubled", "smoke", B=2, C=35, O=40, H=17, W=16, scale=2),
    _case("conv3x3", "smoke_large_tiles", "smoke", B=2, C=130, O=48, H=35, W=49, residual=1),
    _case("conv3x3", "edge_large_tiles", "edge", B=1, C=193, O=33, H=7, W=301),
    _case("conv3x3", "edge_odd", "edge", B=1, C=37, O=67, H=41, W=25),
    _case("conv3x3", "edge_doubled", "edge", B=1, C=33, O=67, H=1, W=257, scale=2, residual=1),
    _case("conv3x3", "edge_one_row", "edge", B=1, C=33, O=32, H=1, W=1025),
    _case("conv3x3", "edge_b0", "edge", B=0, C=32, O=32, H=32, W=32),
    *(
        _case("conv3x3_stats", id, tags, B=B, C=C, O=outs, H=H, W=W, groups=groups, **more)
        for id, tags, B, C, outs, H, W, groups, more in (
            ("vqgan_256px", "bench", 1, 128, 128, 256, 256, 32, {"residual": 1}),
            ("vqgan_64px", "bench", 4, 256, 256, 64, 64, 32, {}),
            ("vqgan_rgb", "bench", 1, 3, 128, 256, 256, 32, {}),
            ("smoke_rgb", "smoke", 2, 3, 66, 17, 49, 33, {"residual": 1}),
            ("smoke_few", "smoke", 2, 130, 132, 27, 29, 4, {}),
            ("smoke_large_tiles", "smoke", 2, 130, 48, 35, 49, 16, {"residual": 1}),
            ("edge_gray_column", "edge", 3, 1, 33, 259, 1, 11, {}),
            ("edge_odd", "edge", 3, 137, 67, 41, 25, 67, {}),
            ("edge_b0", "edge", 0, 128, 32, 64, 64, 32, {}),
        )
    ),
    _case("conv3x3_down", "vqgan_256px", "bench", B=1, C=128, O=128, H=256, W=256),
    _case("conv3x3_down", "vqgan_32px", "bench", B=4, C=256, O=256, H=32, W=32),
    _case("conv3x3_down", "smoke", "smoke", B=2, C=64, O=48, H=32, W=34),
    _case("conv3x3_down", "edge_odd", "edge", B=1, C=37, O=67, H=35, W=53),
    _case("conv3x3_down", "edge_wide", "edge", B=3, C=150, O=129, H=18, W=15),
    _case("conv3x3_down", "edge_one_row", "edge", B=1, C=33, O=35, H=3, W=517),
    _case("conv3x3_down", "edge_b0", "edge", B=0, C=32, O=32, H=32, W=32),
    *(
        _case("conv3x3_weight", id, tags, B=B, C=C, O=outs, H=H, W=W, wide=wide)
        for id, tags, B, C, outs, H, W, wide in (
            ("vqgan_256px", "bench", 1, 128, 128, 256, 256, 0),
            ("vqgan_64px", "bench", 4, 128, 128, 64, 64, 1),
            ("vqgan_32px", "bench", 4, 512, 256, 32, 32, 0),
            ("vqgan_16px", "bench", 1, 512, 512, 16, 16, 1),
            ("smoke", "smoke", 2, 64, 48, 32, 34, 0),
            ("edge_odd", "edge", 1, 37, 67, 41, 25, 0),
            ("edge_wide", "edge", 2, 150, 33, 31, 33, 1),
            ("edge_large_tiles", "edge", 1, 37, 67, 129, 131, 0),
            ("edge_many_outputs", "edge", 1, 33, 293, 32, 34, 1),
            ("edge_few_positions", "edge", 3, 67, 130, 5, 7, 0),
            ("edge_few_outputs", "edge", 1, 40, 3, 129, 130, 1),
            ("edge_one_tile", "edge", 5, 48, 17, 2, 2, 1),
            ("edge_one_row", "edge", 1, 33, 32, 1, 1025, 0),
            ("edge_b0", "edge", 0, 32, 32, 32, 32, 0),
        )
    ),
    # ---- token loss
    _case("cross_entropy", "vqgan_f16_16384", "bench", N=2048, V=16384),
    _case("cross_entropy", "vqgan_f16_1024", "bench", N=4096, V=1024),
    _case("cross_entropy", "smoke", "smoke", N=65, V=513),
    _case("cross_entropy", "edge_v1", "edge", N=3, V=1),
    _case("cross_entropy", "edge_n0", "edge", N=0, V=7),
    # ---- sampling
    _case("sample_logits", "vqgan_f16_16384", "bench", B=8, V=16384),
    _case("sample_logits", "vqgan_f16_1024", "bench", B=8, V=1024),
    _case("sample_logits", "smoke", "smoke", B=33, V=257),
    _case("sample_logits", "edge_v1", "edge", B=2, V=1),
    _case("sample_logits", "edge_b0", "edge", B=0, V=5),
    # ---- cached decoding
    _case("decode_attention", "gpt_336m", "bench", B=8, H=16, S=256, d=64, n=200),
    _case("decode_attention", "smoke", "smoke", B=3, H=2, S=70, d=64, n=65),
    _case("decode_attention", "edge_one_slot", "edge", B=1, H=1, S=1, d=16, n=1),
    _case("decode_attention", "edge_primes", "edge", B=2, H=3, S=41, d=59, n=37),
    # ---- one step of a GPT: L layers, T tokens of each of B sequences that have n, `logits` of the
    # last rows, `bits` of a weight. No bench case: the step is measured as a network.
    *(
        _step(
            f"smoke_{bits}bit", "smoke", bits, L=2, B=3, H=2, S=70, d=20, V=37, n=5, T=2, logits=4
        )
        for bits in (32, 16, 8, 4)
    ),
    _step("edge_first_token", "edge", 32, L=1, B=1, H=1, S=1, d=16, V=1, n=0, T=1, logits=1),
    _step("edge_prefill", "edge", 4, L=1, B=2, H=3, S=21, d=29, V=67, n=2, T=19, logits=0),
)


def cases(op: str, *tags: str) -> list[Case]:
    """The cases of an op that carry any of the tags; all of them without tags."""
    return [c for c in CASES if c.op == op and (not tags or c.tags & set(tags))]
