"""The Triton search under the interpreter: exact on hostile data, and its bounds pair by pair; see
interpreted.py."""

import pytest
import torch
from interpreted import Checks, normal, plain, rng, run

check = Checks(__file__)


def found_right(z, codebook, metric, what):
    from vqfast.testing import compare

    indices, distances = run("nearest", z, codebook, metric)
    right, scores = plain("nearest", z, codebook, metric)
    name = ("l2", "cosine", "dot")[metric]
    assert compare.nearest_wrong_rows(indices, z, codebook, name) == 0, f"{what} {name}"
    assert torch.equal(indices, right), f"{what} {name}"
    same = (distances == scores) | (distances.isnan() & scores.isnan())
    assert same.all() and distances.dtype == torch.float32, f"{what} {name}"


@check
def nearest_is_exact_at_hostile_sizes():
    sizes = (
        (1, 1, 1),
        (5, 3, 2),
        (70, 131, 4),
        (33, 257, 8),
        (9, 65, 10),
        (65, 300, 17),
        (3, 129, 64),
        (7, 70, 257),
        (4, 77, 290),
    )
    for i, (N, K, D) in enumerate(sizes):
        for j, (zt, ct) in enumerate(
            ((torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32))
        ):
            z, c = normal(N + D, N, D, dtype=zt), normal(K, K, D, dtype=ct)
            found_right(z, c, (i + j) % 3, f"{zt} {ct} {N} {K} {D}")
    found_right(normal(1, 0, 3), normal(2, 5, 3), 0, "no rows")


@check
def nearest_is_exact_on_hard_data():
    z, c = normal(1, 20, 24), normal(2, 200, 24)
    for scale in (1e-40, 1e-20, 1e10, 1e18, 1e30):
        found_right(z * scale, c * scale, 0, f"scale {scale}")
    found_right(z * 1e-12, c, 1, "small rows")
    found_right(z, c * 1e-14, 1, "small codes")
    wide = 10 ** (24 * torch.rand(200, 1, generator=rng(3)) - 6)
    found_right(z * wide[:20].flip(0), c * wide, 0, "norms 1e-6 .. 1e18")
    found_right(z + 1e4, c + 1e4, 0, "shifted")
    found_right(z, (torch.rand(200, 24, generator=rng(4)) * 2 - 1) / 200, 0, "taming's start")
    for metric in range(3):
        found_right(c[torch.randint(200, (20,), generator=rng(5))], c, metric, "equal to codes")
        found_right(z, c[:3].repeat(60, 1), metric, "three codes")
        found_right(z * 0, c * 0, metric, "all zero")
        zero = c.clone()
        zero[7] = 0
        found_right(-zero[:20].abs(), zero, metric, "a zero code")
    whole = torch.randint(-2, 3, (200, 3), generator=rng(6)).float()
    found_right(whole[:20] + 0.5, whole, 0, "ties of integers")


def screened(z, codebook, metric):
    """The plan of a search and its scratch memory after a call."""
    from vqfast.kernels import _nearest_launch as launch

    scratch = launch.scratch(z, codebook)
    answer = torch.empty(len(z), dtype=torch.int64), torch.empty(len(z))
    launch.search(z, codebook, metric, *answer, scratch)
    return launch.plan(z, codebook), scratch


@check
def nearest_certifies_ordinary_rows():
    """Without this the answers could come from the slow path alone, and be right."""
    from vqfast.kernels._nearest_screen import NO_GROUP, SLOW_ROW

    for D, dtype, metric in (
        (4, torch.float32, 0), (9, torch.float32, 1), (12, torch.float32, 2),
        (24, torch.float16, 0), (24, torch.float16, 1), (64, torch.float32, 0),
        (300, torch.float16, 2),
    ):  # fmt: skip
        z, c = normal(1, 70, D, dtype=dtype), normal(2, 700, D, dtype=dtype)
        plan, (_, _, _, packed, bounds, _) = screened(z, c, metric)
        assert plan["splits"] > 1
        none = NO_GROUP.value
        groups = torch.stack([(packed >> 21 * j) & none for j in range(3)])  # [3, splits, N]
        near = bounds[:, :, 0] <= bounds[:, :, 1].amin(0)  # splits that may hold the answer
        certain = ~((packed == SLOW_ROW.value) & near).any(0)
        assert certain.sum() >= 65, f"{D} {dtype} {metric}: {int(certain.sum())} of 70"
        groups = torch.where(near, groups, none)
        answer = plain("nearest", z, c, metric)[0] // (plan["BLOCK_K"] // 8)
        alone = certain & ((groups != none).sum((0, 1)) == 1)
        assert alone.sum() >= 50 and torch.equal(groups.amin((0, 1))[alone], answer[alone])


@check
def nearest_bounds_hold_for_every_pair():
    """L − C <= s t S <= L − C + 2 A e + u g, from the packed columns, in float64."""
    for D, dtype, metric, scale in (
        (3, torch.float32, 0, 1.0), (9, torch.float32, 2, 1e-3), (16, torch.float16, 0, 1.0),
        (30, torch.float32, 0, 30.0), (30, torch.bfloat16, 0, 1e10), (100, torch.float32, 2, 1e-30),
        (40, torch.float32, 1, 1e5), (300, torch.float16, 1, 1.0),
    ):  # fmt: skip
        spread = 10 ** (2 * torch.rand(300, 1, generator=rng(3)) - 1)
        z = (scale * normal(1, 60, D)).to(dtype)
        c = (scale * spread * normal(2, 300, D)).to(dtype)
        plan, (rows, codes, slack, _, _, peaks) = screened(z, c, metric)
        place = torch.arange(300)
        group, tile = plan["BLOCK_K"] // 8, place // plan["BLOCK_K"] * plan["BLOCK_K"]
        inside = place - tile
        rows, codes = (
            rows[:60].double(),
            codes[tile + inside % group * 8 + inside // group].double(),
        )
        x, y = z.double(), c.double()
        t = 4096.0
        if metric == 1:
            x, y = x / x.norm(dim=1)[:, None], y / y.norm(dim=1)[:, None]
        else:
            high = (D - 1).bit_length() // 2 + 1
            t = 2.0 ** min(96, 12 - high - peaks.max().log2().floor().item())
        E = plan["E"]
        unit, spread, offset = rows[:, E, None], rows[:, E + 2, None], rows[:, E + 3, None] * 2048
        s = unit * t / 1024
        score = s * t * ((0 if metric == 2 else (y * y).sum(1) / 2) - x @ y.T)
        lower = rows @ codes.T
        e, g = slack.double()[place // group].unbind(1)
        theta = (plan["W"] + 16) * 2.0**-21
        terms = rows.abs() @ codes.abs().T
        what = f"{D} {dtype} {metric}"
        assert (lower > 0).all() and rows.isfinite().all(), what
        assert (lower - offset + theta * terms <= score + theta * offset).all(), what
        assert (score <= lower - offset - theta * terms + 2 * spread * e + unit * g
                + theta * offset).all(), what  # fmt: skip
        # and they are not so wide that they say nothing: 2^-9 are two roundings to float16
        wide = -2 * spread * codes[:, E + 2] / (s * t * x.norm(dim=1)[:, None] * y.norm(dim=1))
        assert wide.median() < (2.0**-13 if plan["SPLIT"] else 2.0**-9), f"{what}: {wide.median()}"


@check
def nearest_is_the_same_however_the_codes_are_split():
    from vqfast.kernels import _nearest_launch as launch

    actual, splits = launch.processors, set()
    for K, D, dtype in ((1600, 16, torch.float16), (1100, 8, torch.float32)):
        z, c = normal(1, 9, D, dtype=dtype), normal(2, K, D, dtype=dtype)
        c[K // 2 :] = c[: K - K // 2]  # ties far apart, in other splits or other tiles
        found = []
        for processors in (1, 3, 132):
            launch.processors = lambda t, n=processors: n
            found_right(z, c, processors % 3, f"{K} {D} {processors} processors")
            found.append(run("nearest", z, c, 0))
            splits.add(launch.plan(z, c)["splits"])
        assert all(torch.equal(a, b) for f in found for a, b in zip(f, found[0], strict=True))
    launch.processors = actual
    assert len(splits) >= 3, splits


@check
def nearest_decides_near_ties():
    """Codes that differ by the last bits of float32, inside a group, across groups and tiles."""
    for D, dtype in ((3, torch.float32), (16, torch.float32), (64, torch.float16)):
        c = normal(1, 700, D, dtype=dtype)
        for near in (1, 40, 300, 699):
            eps = torch.finfo(dtype).eps * (torch.arange(D) == near % D)
            c[near] = (c[0].float() * (1 + 2 * eps)).to(dtype)
        z = (c[0].float() + 0.1 * normal(2, 20, D)).to(dtype)
        for metric in range(3):
            found_right(z, c, metric, f"near ties {D} {dtype}")


@check
def nearest_keeps_what_is_not_finite_apart():
    for metric in range(3):
        for D in (5, 24):
            z, c = normal(1, 40, D), normal(2, 200, D)
            z[::9, D // 2] = torch.tensor(
                [float("nan"), float("inf"), -float("inf"), float("nan"), float("inf")]
            )
            found_right(z, c, metric, "bad rows")
            for k, bad in ((0, "nan"), (1, "inf"), (31, "-inf"), (199, "nan")):
                c[k, k % D] = float(bad)
            found_right(z, c, metric, "bad rows and codes")
            found_right(z, c * float("nan"), metric, "no code is finite")


@pytest.mark.parametrize("name", check.functions)
def test_interpreted(name):
    check.passed(name)


if __name__ == "__main__":
    check.run()
