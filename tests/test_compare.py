"""The comparisons find the faults that are planted here."""

import math

import torch

from vqfast.testing import compare


def _case():
    g = torch.Generator().manual_seed(0)
    exact = torch.randn(33, 7, generator=g, dtype=torch.float64)
    plain = (exact + 1e-6 * torch.randn(33, 7, generator=g, dtype=torch.float64)).float()
    return plain, exact


def test_budget_accepts_torch_itself_and_refuses_a_larger_error():
    plain, exact = _case()
    assert compare.budget_ratio(plain, plain, exact, 2.0) <= 0.5
    worse = plain.clone()
    worse[5, 3] += 1e-4
    assert compare.budget_ratio(worse, plain, exact, 2.0) > 1


def test_budget_refuses_a_nan_tail_a_shape_and_a_missing_output():
    plain, exact = _case()
    tail = plain.clone()
    tail[-1, -1] = math.nan
    assert compare.budget_ratio(tail, plain, exact, 2.0) == math.inf
    assert compare.budget_ratio(plain[:-1], plain, exact, 2.0) == math.inf
    assert compare.budget_ratio(None, plain, exact, 2.0) == math.inf


def test_budget_refuses_infinity_for_a_number_and_a_swapped_result():
    plain, exact = _case()
    blown = plain.clone()
    blown[0, 0] = math.inf
    assert compare.budget_ratio(blown, plain, exact, 2.0) == math.inf
    assert compare.budget_ratio(plain.flip(0), plain, exact, 2.0) > 1


def test_exact_counts_differences_dtypes_and_shapes():
    a = torch.arange(9)
    shifted = a.clone()
    shifted[4] += 1
    assert compare.exact_mismatches(a, a) == 0
    assert compare.exact_mismatches(shifted, a) == 1
    assert compare.exact_mismatches(a.int(), a) == 9
    assert compare.exact_mismatches(a[:8], a) == 9


def test_chi_square_accepts_fair_draws_and_refuses_biased_ones_and_impossible_ones():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    fair = torch.multinomial(p, 20000, replacement=True).bincount(minlength=4)
    assert compare.chi_square_p(fair, p) > 1e-6
    biased = torch.tensor([9000, 7000, 4000, 0])
    assert compare.chi_square_p(biased, p) < 1e-6
    assert compare.chi_square_p(torch.tensor([10, 6, 3, 1]), p) == 0.0


def test_nearest_rule_finds_a_shifted_index_a_higher_duplicate_and_a_bad_row():
    g = torch.Generator().manual_seed(1)
    z, c = torch.randn(20, 5, generator=g), torch.randn(11, 5, generator=g)
    c[7] = c[2]
    z[0], z[1] = c[2], math.nan
    right = torch.cdist(z.double().nan_to_num(), c.double()).argmin(1)
    right[0], right[1] = 2, 0
    assert compare.nearest_wrong_rows(right, z, c) == 0
    for row, index in ((0, 7), (1, 3), (5, int(right[5] + 1) % 11), (6, 11), (6, -1)):
        wrong = right.clone()
        wrong[row] = index
        assert compare.nearest_wrong_rows(wrong, z, c) == 1
