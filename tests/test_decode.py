"""decode_attention and decode_step: exactness, packed formats, and bits that depend on no batch."""

import importlib

import pytest
import torch

from vqfast import backend
from vqfast.engine.packing import BITS, pack_gpt
from vqfast.models.gpt import GPT, GPTConfig
from vqfast.ops import decode_attention
from vqfast.ops._packed import matrix_bytes, pack_matrix, unpack

step_file = importlib.import_module("vqfast.ops.decode_step")


def _cache(B, H, S, d, n, dtype=torch.float32):
    """q, k, v with NaN from slot n on."""
    q, k, v = torch.randn(B, H, d), torch.randn(B, H, S, d), torch.randn(B, H, S, d)
    k[:, :, n:] = v[:, :, n:] = torch.nan
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _exact(q, k, v, n):
    q, k, v = (t.double() for t in (q, k[:, :, :n], v[:, :, :n]))
    p = (torch.einsum("bhd,bhtd->bht", q, k) / q.shape[2] ** 0.5).softmax(-1)
    return torch.einsum("bht,bhtd->bhd", p, v)


@pytest.mark.parametrize(("n", "d"), [(1, 16), (63, 64), (64, 59), (65, 100), (129, 7)])
def test_attention_reads_the_written_slots_only(n, d, each_backend):
    q, k, v = _cache(2, 3, 130, d, n)
    exact = _exact(q, k, v, n)
    got = decode_attention(q, k, v, n)
    assert (got - exact).abs().max() < 1e-5 * exact.abs().max()


def test_attention_takes_a_half_cache_and_large_scores(each_backend):
    q, k, v = _cache(1, 2, 20, 40, 9)
    q = q * 200
    got = decode_attention(q, k.bfloat16(), v.bfloat16(), 9)
    exact = _exact(q, k.bfloat16(), v.bfloat16(), 9)
    assert got.dtype == torch.float32 and (got - exact).abs().max() < 1e-4


def test_nothing_to_attend_to_gives_zeros(each_backend):
    q, k, v = _cache(2, 1, 4, 8, 0)
    assert torch.equal(decode_attention(q, k, v, 0), torch.zeros(2, 1, 8))


def test_attention_of_a_row_does_not_see_its_batch(each_backend, each_thread_count):
    q, k, v = _cache(9, 2, 70, 24, 66)
    whole = decode_attention(q, k, v, 66)
    for b in range(9):
        one = slice(b, b + 1)
        assert torch.equal(decode_attention(q[one], k[one], v[one], 66)[0], whole[b])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"length": 5}, ValueError, "length"),
        ({"length": -1}, ValueError, "length"),
        ({"q": torch.zeros(2, 3)}, ValueError, "q.*3 dimensions"),
        ({"k_cache": torch.zeros(2, 1, 4, 9)}, ValueError, "k_cache"),
        ({"v_cache": torch.zeros(2, 1, 4, 8).half()}, TypeError, "v_cache.*float16"),
        ({"q": torch.zeros(2, 1, 8, dtype=torch.int64)}, TypeError, "q.*int64"),
    ],
)
def test_wrong_arguments_are_named(change, error, said):
    cache = torch.zeros(2, 1, 4, 8)
    arguments = {"q": torch.zeros(2, 1, 8), "k_cache": cache, "v_cache": cache, "length": 2}
    with pytest.raises(error, match=said):
        decode_attention(**{**arguments, **change})


# ---- packed weights


def _unpacked(w, bits):
    """What the packed matrix stands for, [N, K]; padding is zero unless a value is NaN."""
    N, K = w.shape
    panels = unpack(pack_matrix(w, bits), N, K, bits)  # [panels, Kp, 16]
    rows = panels.transpose(1, 2).reshape(-1, panels.shape[1])
    assert w.isnan().any() or not (rows[N:].any() or rows[:, K:].any())
    return rows[:N, :K]


@pytest.mark.parametrize(("N", "K"), [(16, 64), (37, 40), (1, 1), (33, 130)])
def test_packing_keeps_what_the_format_holds(N, K):
    w = torch.randn(N, K) * torch.logspace(-3, 3, N)[:, None]
    assert torch.equal(_unpacked(w, 32), w)
    assert torch.equal(_unpacked(w, 16), w.bfloat16().float())
    most = w.abs().amax(1, keepdim=True)
    assert ((_unpacked(w, 8) - w).abs() <= most / 127 * 0.501).all()
    # half a step, or what clipping a value of the other sign to 7 loses; scales have 8 bits
    assert ((_unpacked(w, 4) - w).abs() <= most / 8 * 2.7).all()


def test_int4_loses_a_tenth_of_a_normal_matrix():
    w = torch.randn(64, 1024)
    error = ((_unpacked(w, 4) - w) ** 2).mean().sqrt()
    assert error < 0.095, error


def test_rows_of_zeros_stay_zero_and_nan_is_not_hidden():
    w = torch.randn(20, 70)
    w[3] = 0
    for bits in BITS.values():
        assert not _unpacked(w, bits)[3].any()
    w[5, 6] = torch.nan
    for bits in BITS.values():
        assert _unpacked(w, bits)[5, 6].isnan()


def test_sizes_are_what_the_description_says():
    for bits in BITS.values():
        assert pack_matrix(torch.randn(37, 70), bits).numel() == matrix_bytes(37, 70, bits)


# ---- the step

# E off every vector width and panel; d off too; V not a multiple of 16
ODD = {"vocab_size": 37, "block_size": 70, "n_layer": 2, "n_head": 2, "n_embd": 40}


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(1)
    model = GPT(GPTConfig(**ODD)).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(0, 0.3)
    return model


class Session:
    """A cache of 4 sequences, full of NaN, and calls of the step on it."""

    def __init__(self, gpt, precision):
        c = gpt.config
        shape = (c.n_layer, 4, c.n_head, c.block_size, c.n_embd // c.n_head)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.k, self.v = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        self.packed, self.bits = pack_gpt(gpt, precision), BITS[precision]

    def __call__(self, rows, n_logits=None):
        """rows: (token, slot, position) each."""
        columns = [torch.tensor(c) for c in zip(*rows, strict=True)]
        n = len(rows) if n_logits is None else n_logits
        return step_file.decode_step(
            *columns, self.k, self.v, self.packed, bits=self.bits, n_logits=n
        )


def _rows(tokens, slot):
    return [(token, slot, position) for position, token in enumerate(tokens)]


def _full_pass(gpt, precision, tokens):
    """[T - 1, V] float64 logits, by the GPT of the matrices that the packed ones stand for."""
    copy = GPT(gpt.config).eval().requires_grad_(False)
    copy.load_state_dict(gpt.state_dict())
    for m in copy.modules():
        if isinstance(m, torch.nn.Linear):
            m.weight.copy_(_unpacked(m.weight, BITS[precision]))
    with backend("reference"):
        return copy.double()(tokens[:, 1:], tokens[:, :1])[0]


@pytest.mark.parametrize("precision", BITS)
def test_step_is_the_full_pass_of_the_packed_weights(gpt, precision, each_isa, poison):
    tokens = torch.randint(37, (1, 70))
    exact = _full_pass(gpt, precision, tokens)
    got = Session(gpt, precision)(_rows(tokens[0].tolist(), 2))[:-1]
    # the cache of the small formats is bfloat16
    limit = 2e-5 if precision == "fp32" else 2e-2
    assert (got - exact).abs().max() < limit * exact.abs().max()


@pytest.mark.parametrize("precision", BITS)
def test_reference_and_kernel_agree(gpt, precision, each_backend):
    tokens = torch.randint(37, (1, 20))
    exact = _full_pass(gpt, precision, tokens)
    got = Session(gpt, precision)(_rows(tokens[0].tolist(), 0))[:-1]
    limit = 1e-5 if precision == "fp32" else 2e-2
    assert (got - exact).abs().max() < limit * exact.abs().max()


@pytest.mark.parametrize("precision", BITS)
def test_a_row_has_the_same_bits_in_every_call(gpt, precision, each_backend):
    """All tokens at once, one by one, among other sequences and in another order."""
    tokens = torch.randint(37, (3, 11)).tolist()
    alone = [Session(gpt, precision)(_rows(t, 0)) for t in tokens]
    one_by_one = Session(gpt, precision)
    for t, row in enumerate(_rows(tokens[0], 3)):
        assert torch.equal(one_by_one([row])[0], alone[0][t])
    rows = [row for slot in range(3) for row in _rows(tokens[slot], slot)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2)).tolist()
    mixed = Session(gpt, precision)([rows[i] for i in order])
    for place, i in enumerate(order):
        assert torch.equal(mixed[place], alone[i // 11][i % 11])


@pytest.mark.parametrize("precision", BITS)
def test_every_number_of_rows_gives_the_same_bits(gpt, precision, each_isa, each_thread_count):
    """Tiles of 1, 2, 4 and 8 rows and what is left over."""
    tokens = torch.randint(37, (4, 6)).tolist()
    rows = [row for slot in range(4) for row in _rows(tokens[slot], slot)]
    whole = Session(gpt, precision)(rows)
    for n in (1, 2, 3, 5, 7, 8, 9, 13):
        assert torch.equal(Session(gpt, precision)(rows[:n]), whole[:n])


def test_logits_of_the_last_rows_only(gpt, each_backend):
    rows = _rows([1, 2, 3, 4], 1)
    whole = Session(gpt, "fp32")(rows)
    for n in range(5):
        session = Session(gpt, "fp32")
        assert torch.equal(session(rows, n_logits=n), whole[4 - n :])
        assert torch.equal(session([(5, 1, 4)]), Session(gpt, "fp32")([*rows, (5, 1, 4)])[-1:])


def test_step_writes_only_the_slots_of_its_rows(gpt, each_backend):
    session = Session(gpt, "fp32")
    session(_rows([1, 2, 3], 2))
    for cache in (session.k, session.v):
        assert cache[:, 2, :, :3].isfinite().all()
        assert cache[:, 2, :, 3:].isnan().all() and cache[:, [0, 1, 3]].isnan().all()
