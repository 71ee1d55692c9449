"""The fuzz of the search finds planted faults, its oracle is the definition, the kernels pass."""

import json

import numpy as np
import pytest
import torch

import vqfast
from vqfast.testing import fuzz, hostile, oracle


def _sound(z, codebook, metric):
    """Rows and codes that are finite, zeros elsewhere, in float32; normalised for cosine."""
    rows, codes = z.isfinite().all(1), codebook.isfinite().all(1)
    z, c = (t.float().masked_fill(~f[:, None], 0.0) for t, f in ((z, rows), (codebook, codes)))
    if metric == "cosine":
        z, c = (torch.nn.functional.normalize(t, dim=1) for t in (z, c))
    return z, c, rows, codes


def _by_scores(scores, z, codebook, metric):
    """The answer that scores [N, K] lead to, with all the rest as it must be."""
    _, _, rows, codes = _sound(z, codebook, metric)
    index = scores.masked_fill(~codes, torch.inf).nan_to_num(torch.inf, torch.inf).argmin(1)
    return index.masked_fill(~(rows & codes.any()), 0), fuzz.search(z, codebook, metric)[1]


def textbook(z, codebook, metric):
    """|z|² + |c|² - 2 z·c in float32."""
    a, c, _, _ = _sound(z, codebook, metric)
    scores = -(a @ c.T)
    if metric != "dot":
        scores = a.square().sum(1, keepdim=True) + c.square().sum(1) + 2 * scores
    return _by_scores(scores, z, codebook, metric)


def backwards(z, codebook, metric):
    """float64, but summed from the last coordinate to the first; on some rows of each search."""
    index, distance = fuzz.search(z, codebook, metric)
    if metric == "l2":
        some = slice(0, max(1, (1 << 21) // codebook.numel()))
        a, c, _, _ = (t.double() for t in _sound(z[some], codebook, metric))
        scores = (a[:, None] - c).square().flip(2).cumsum(2)[..., -1]
        index[some] = _by_scores(scores, z[some], codebook, metric)[0]
    return index, distance


def last_of_equals(z, codebook, metric):
    index, distance = fuzz.search(z, codebook.flip(0), metric)
    some = z.isfinite().all(1) & codebook.isfinite().all(1).any()
    return torch.where(some, len(codebook) - 1 - index, 0), distance


def last_code_unseen(z, codebook, metric):
    return fuzz.search(z, codebook[:-1] if len(codebook) > 1 else codebook, metric)


def sick_row_spreads(z, codebook, metric):
    index, distance = fuzz.search(z, codebook, metric)
    return torch.where(z.isfinite().all(), index, 0), distance


def float32_distance(z, codebook, metric):
    index, distance = fuzz.search(z, codebook, metric)
    if metric != "l2":
        return index, distance
    plain = (z.float() - codebook.float()[index]).square().sum(1)
    return index, torch.where(distance.isfinite(), plain, distance)


def raises_on_primes(z, codebook, metric):
    if len(codebook) == 61:
        raise IndexError("out of range")
    return fuzz.search(z, codebook, metric)


@pytest.mark.parametrize(
    "fault",
    [
        textbook, backwards, last_of_equals, last_code_unseen, sick_row_spreads,
        float32_distance, raises_on_primes,
    ],
)  # fmt: skip
def test_a_planted_fault_is_found_within_some_thousand_rows(fault):
    limit = 100_000 if fault in (raises_on_primes, backwards) else 20_000
    seen = fuzz.run(limit, 1, searcher=fault)
    assert seen.failures, f"{seen.rows} rows in {seen.searches} searches"


def test_the_textbook_formula_is_found_at_once_and_on_many_kinds():
    seen = fuzz.run(5_000, 0, searcher=textbook)
    assert seen.failures
    found = {
        hostile.case(3, i).kind
        for i in range(60)
        if fuzz.run(1, 3, first=i, count=1, searcher=textbook).failures
    }
    assert len(found) >= 6, found


def test_the_kernels_pass_on_every_instruction_set():
    seen = fuzz.run(200_000, 20, minutes=2)
    assert not seen.failures, "\n".join(seen.failures)
    assert seen.rows >= 200_000 and set(seen.counts["kind"]) == set(hostile.KINDS)


def test_the_oracle_is_the_definition_on_every_row():
    rows = 0
    for i in range(80):
        one = hostile.case(11, i)
        z, codebook = one.z[:97], one.codebook[:600]
        index, score = oracle.nearest(z, codebook, one.metric)
        right, least = oracle.definition(z, codebook, one.metric)
        assert np.array_equal(index, right) and np.array_equal(score, least, equal_nan=True), (
            one.kind
        )
        rows += len(z)
    assert rows > 3_000


def test_the_definition_agrees_with_sums_written_out_in_python():
    g = torch.Generator().manual_seed(0)
    z, c = torch.randn(5, 7, generator=g), torch.randn(9, 7, generator=g)
    index, score = oracle.definition(z, c, "l2")
    for n in range(5):
        sums = []
        for k in range(9):
            total = 0.0
            for x, y in zip(z[n].tolist(), c[k].tolist(), strict=True):
                total += (x - y) * (x - y)
            sums.append(total)
        assert score[n] == min(sums) and index[n] == sums.index(min(sums))


def test_a_wrong_oracle_is_told_from_a_wrong_kernel(monkeypatch, capsys):
    right = oracle.nearest

    def off_by_one(z, codebook, metric):
        index, score = right(z, codebook, metric)
        return np.minimum(index + 1, len(codebook) - 1), score

    monkeypatch.setattr(oracle, "nearest", off_by_one)
    assert fuzz.main(["--rows", "1e4", "--seed", "1"]) == 2
    assert "the oracle is wrong" in capsys.readouterr().err


def test_a_search_depends_on_seed_and_number_alone():
    first, again, other = hostile.case(4, 17), hostile.case(4, 17), hostile.case(4, 18)
    same = lambda a, b: torch.equal(a.nan_to_num(), b.nan_to_num())  # noqa: E731
    assert first.kind == again.kind and same(first.z, again.z)
    assert same(first.codebook, again.codebook) and first.metric == again.metric
    assert first.z.shape != other.z.shape or not same(first.z, other.z)


def test_command_prints_one_json_object_and_what_repeats_a_failure(monkeypatch, capsys):
    assert fuzz.main(["--rows", "3e3", "--seed", "5"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["rows"] >= 3000 and line["failures"] == [] and line["seed"] == 5
    assert sum(line["counts"]["kind"].values()) == line["rows"]

    nearest = vqfast.nearest
    monkeypatch.setattr(
        vqfast, "nearest", lambda z, c, **k: (nearest(z, c, **k)[0], nearest(z, c, **k)[1] * 1.001)
    )
    assert fuzz.main(["--rows", "1e5", "--seed", "5"]) == 1
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["failures"]) == 5
    again = next(x for x in shown.err.splitlines() if x.startswith("again: "))
    words = again.partition("vqfast.testing.fuzz ")[2].split()
    assert fuzz.main(words) == 1
    repeated = capsys.readouterr()
    assert json.loads(repeated.out)["failures"][0] in shown.err
