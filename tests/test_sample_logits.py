"""Sampling: the filters and their order, the distribution, the random numbers, and bad rows."""

import math

import pytest
import torch

import vqfast
from vqfast import NonFiniteError
from vqfast.ops.sample_logits import philox, uniform
from vqfast.testing.tolerances import CHI_SQUARE_P


def draw(logits, B=None, seed=1, position=0, index=None, **options):
    logits = torch.as_tensor(logits)
    if B is not None:
        logits = logits.expand(B, -1).contiguous()
    index = torch.arange(len(logits)) if index is None else index
    return vqfast.sample_logits(logits, seed=seed, sample_index=index, position=position, **options)


def expected(row, temperature=1.0, top_k=None, top_p=None) -> list[float]:
    """Probabilities by the definition, token by token in plain Python."""
    kth = sorted(row, reverse=True)[top_k - 1] if top_k and top_k <= len(row) else -math.inf
    p = [math.exp(x / temperature) if x >= kth else 0.0 for x in row]
    p = [x / sum(p) for x in p]
    if top_p is not None:
        before = 0.0
        for v in sorted(range(len(p)), key=lambda v: (-row[v], v)):
            mass, p[v] = p[v], p[v] if before <= top_p else 0.0
            before += mass
    return [x / sum(p) for x in p]


def chi_square_limit(dof: int) -> float:
    """The value that chi-square passes with probability CHI_SQUARE_P (Wilson and Hilferty)."""
    z = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * CHI_SQUARE_P).double()).item()
    return dof * (1 - 2 / (9 * dof) + z * math.sqrt(2 / (9 * dof))) ** 3


@pytest.mark.parametrize(
    ("word", "answer"),
    [  # known answers of the Random123 distribution
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_words(word, answer):
    got = philox((word, word), tuple(torch.tensor([word]) for _ in range(4)))
    assert tuple(int(x) for x in got) == answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_draw_at_positions_of_their_own(each_backend, each_thread_count, dtype):
    logits = (2 * torch.randn(40, 23)).to(dtype)
    at = torch.randint(9, (40,))
    at[3] = 2**32 - 1
    options = {"seed": 5, "top_k": 20, "top_p": 0.9, "sample_index": torch.arange(40)}
    found = vqfast.sample_logits(logits, position=at, **options)
    for b in range(40):
        one = {**options, "sample_index": torch.tensor([b])}
        assert found[b] == vqfast.sample_logits(logits[b : b + 1], position=int(at[b]), **one)
    assert (found != vqfast.sample_logits(logits, position=0, **options)).any()
    logits[7, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=f"sample 7 at position {int(at[7])}"):
        vqfast.sample_logits(logits, position=at, **options)


@pytest.mark.parametrize(
    ("position", "error"), [(torch.zeros(3), TypeError), (torch.zeros(2, dtype=int), ValueError)]
)
def test_positions_of_the_wrong_kind_are_refused(position, error):
    with pytest.raises(error, match="position"):
        draw(torch.zeros(3, 5), position=position)


def test_uniform_numbers_are_uniform_and_differ_by_every_key():
    index = torch.arange(100_000)
    u = uniform(3, index, 7)
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == len(u)
    n = torch.histc(u, 100, 0, 1)
    assert ((n - 1000) ** 2 / 1000).sum() < chi_square_limit(99)
    for other in (uniform(4, index, 7), uniform(3, index, 8), uniform(3, index + 2**32, 7)):
        assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 0.02


FILTERS = [
    {},
    {"temperature": 0.5},
    {"top_k": 7, "temperature": 0.8},
    {"top_p": 0.7},
    {"top_k": 12, "top_p": 0.6, "temperature": 1.3},
    {"top_k": 1},
    {"top_k": 999, "top_p": 0.95},
    {"top_k": 3, "top_p": 1e-9},
    {"top_k": 4, "top_p": 1.0, "temperature": 2.0},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_follow_the_filtered_softmax(options, each_backend):
    row = (1.5 * torch.randn(48)).double().tolist()
    want = torch.tensor(expected([float(torch.tensor(x)) for x in row], **options))
    n = torch.bincount(draw(row, 8000, seed=11, position=5, **options), minlength=48)
    assert n[want == 0].sum() == 0
    kept = want > 0
    chi = ((n - 8000 * want)[kept] ** 2 / (8000 * want[kept])).sum()
    assert chi < chi_square_limit(max(1, int(kept.sum()) - 1))


@pytest.mark.parametrize("V", [1, 2, 37, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_draws_what_the_reference_draws(V, dtype):
    logits = (2 * torch.randn(300, V)).to(dtype)  # half precision has many ties
    logits[:, V // 2] = -torch.inf if V > 1 else 0.0
    for options in [*FILTERS, {"temperature": 0.0}, {"top_p": 0.5, "temperature": 50.0}]:
        found = []
        for name in ("cpu", "reference"):
            if vqfast.explain("sample_logits", logits, torch.arange(300))[name] is not None:
                pytest.skip("native library not built")
            with vqfast.backend(name):
                found.append(draw(logits, seed=2**63 + 5, **options))
        assert torch.equal(*found), options


def test_ties_of_the_kth_are_kept_and_the_rest_is_not(each_backend):
    row = [0.0, 3.0, 1.0, 1.0, 2.0, 1.0, -1.0]
    seen = draw(row, 2000, temperature=5.0, top_k=3).unique().tolist()
    assert seen == [1, 2, 3, 4, 5]


def test_top_p_keeps_the_crossing_token_and_the_lower_of_equals(each_backend):
    row = torch.tensor([0.1, 0.25, 0.25, 0.4]).log()
    assert draw(row, 2000, top_p=0.39).unique().tolist() == [3]
    assert draw(row, 2000, top_p=0.41).unique().tolist() == [1, 3]
    assert draw(row, 2000, top_p=0.66).unique().tolist() == [1, 2, 3]


def test_temperature_0_is_argmax_and_takes_the_first_of_equals(each_backend):
    row = torch.tensor([[0.0, 2.0, 2.0, -torch.inf], [-1.0, -3.0, -2.0, -1.0]])
    assert draw(row, temperature=0.0).tolist() == [1, 0]
    assert draw(row, temperature=1e-30, top_p=0.4).tolist() == [1, 0]


def test_tiny_temperatures_and_huge_logits_do_not_overflow(each_backend):
    row = torch.tensor([[1e4, -1e4, 1e4 - 1], [3e38, -3e38, 0.0]])
    assert draw(row, temperature=1e-30).tolist() == [0, 0]
    assert draw(row.to(torch.bfloat16).float(), temperature=1e-300).tolist()[1] == 0


def test_minus_infinity_is_never_drawn(each_backend):
    row = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.1, -torch.inf])
    for options in ({}, {"top_k": 4}, {"top_p": 0.99}, {"temperature": 100.0}):
        assert draw(row, 500, **options).unique().tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
def test_a_row_without_a_distribution_is_an_error_naming_it(bad, temperature, each_backend):
    logits = torch.zeros(3, 5)
    if bad == "all -inf":
        logits[1] = -torch.inf
    else:
        logits[1, 4] = float(bad)
    index = torch.tensor([10, 77, 12])
    with pytest.raises(NonFiniteError, match=r"sample 77 at position 9"):
        draw(logits, index=index, position=9, temperature=temperature, top_k=2)


def test_half_precision_logits_are_filtered_as_float32(each_backend):
    logits = torch.randn(200, 64).to(torch.bfloat16)
    assert torch.equal(draw(logits, top_k=5), draw(logits.float(), top_k=5))


def test_top_k_beyond_the_vocabulary_is_off(each_backend):
    logits = torch.randn(200, 9)
    assert torch.equal(draw(logits, top_k=10**18), draw(logits))
    assert torch.equal(draw(logits, top_k=9, top_p=1.0), draw(logits))


def test_a_sample_is_the_same_alone_and_anywhere_in_a_batch(each_backend, each_thread_count):
    logits = 2 * torch.randn(32, 100)
    index = torch.randint(2**40, (32,))
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "position": 3}
    whole = draw(logits, index=index, **options)
    for i in range(32):
        assert draw(logits[i : i + 1], index=index[i : i + 1], **options) == whole[i]
    order = torch.randperm(32)
    assert torch.equal(draw(logits[order], index=index[order], **options), whole[order])
    # the check can fail: what must change the draw does
    for other in (index + 1, index + 2**32):
        assert not torch.equal(draw(logits, index=other, **options), whole)
    assert not torch.equal(draw(logits, index=index, **{**options, "position": 4}), whole)
    assert not torch.equal(draw(logits, index=index, seed=2, **options), whole)


def test_strides_are_taken_and_nothing_else_is_touched(each_backend):
    wide = torch.randn(8, 20)
    before, state = wide.clone(), torch.random.get_rng_state()
    got = draw(wide[:, ::2], top_p=0.8)
    assert torch.equal(got, draw(wide[:, ::2].contiguous(), top_p=0.8))
    assert torch.equal(wide, before) and torch.equal(torch.random.get_rng_state(), state)


def test_no_rows_give_no_tokens(each_backend):
    got = draw(torch.empty(0, 5))
    assert got.shape == (0,) and got.dtype == torch.int64


ROW = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": "1"}, TypeError, "temperature.*str"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 2.5}, TypeError, "top_k.*float"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.1}, ValueError, "top_p"),
        ({"top_p": float("nan")}, ValueError, "top_p"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 1.0}, TypeError, "seed.*float"),
        ({"position": -1}, ValueError, "position"),
        ({"sample_index": torch.arange(3)}, ValueError, "sample_index.*3"),
        ({"sample_index": torch.zeros(2)}, TypeError, "sample_index.*float32"),
        ({"sample_index": [0, 1]}, TypeError, "sample_index.*list"),
        ({"logits": torch.zeros(4)}, ValueError, "logits.*2 dimensions"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "at least one token"),
        ({"logits": torch.zeros(2, 4, dtype=torch.long)}, TypeError, "logits.*int64"),
    ],
)
def test_wrong_arguments_are_named(change, error, said):
    arguments = {"seed": 0, "sample_index": torch.arange(2), "position": 0, **change}
    with pytest.raises(error, match=said):
        vqfast.sample_logits(arguments.pop("logits", ROW), **arguments)


def test_the_largest_seed_works(each_backend):
    assert not torch.equal(
        draw(torch.zeros(50, 100), seed=2**64 - 1), draw(torch.zeros(50, 100), seed=2**63 - 1)
    )
