"""Windows over a larger grid: the published rules word by word, and an order that only needs what
it has."""

import pytest

from vqfast.windows import RULES, Windows

SIZES = [((16, 16), (16, 16)), ((42, 64), (16, 16)), ((17, 39), (16, 16)), ((9, 20), (4, 6)),
         ((7, 5), (5, 3)), ((3, 11), (1, 4)), ((6, 2), (3, 1)), ((5, 9), (5, 4))]  # fmt: skip


def published_start(rule, i, N):
    """As the two scripts have it, for a window of 16."""
    if rule == "scene":
        return min(max(i - 7, 0), N - 16)
    if i <= 8:
        local = i
    elif N - i < 8:
        local = 16 - (N - i)
    else:
        local = 8
    return i - local


def raster_context(windows, cell):
    """The cells before `cell` in its window, found by looking at each."""
    (h, w), window = windows.window, windows.at(cell)
    inside = [
        (i, j)
        for i in range(window.top, window.top + h)
        for j in range(window.left, window.left + w)
    ]
    return [c for c in inside if c < cell]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("N", [16, 17, 23, 24, 25, 31, 32, 42, 64])
def test_a_window_of_16_stands_where_the_scripts_put_it(rule, N):
    down, across = Windows((N, 16), (16, 16), rule), Windows((16, N), (16, 16), rule)
    for i in range(N):
        assert down.at((i, 5))[:2] == (published_start(rule, i, N), 0)
        assert across.at((5, i))[:2] == (0, published_start(rule, i, N))


def test_the_rules_differ_for_even_windows_alone():
    even = [Windows((9, 9), (4, 4), rule) for rule in RULES]
    odd = [Windows((9, 9), (5, 5), rule) for rule in RULES]
    assert even[0].at((4, 4)) == (2, 2, 10) and even[1].at((4, 4)) == (3, 3, 5)
    assert all(odd[0].at(c) == odd[1].at(c) for [c] in odd[0].raster())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "window"), SIZES)
def test_a_window_lies_in_the_grid_and_holds_its_cell_and_context(size, window, rule):
    windows = Windows(size, window, rule)
    (H, W), (h, w) = size, window
    for [cell] in windows.raster():
        found = windows.at(cell)
        assert 0 <= found.top <= cell[0] < found.top + h <= H
        assert 0 <= found.left <= cell[1] < found.left + w <= W
        context = [i * W + j for i, j in raster_context(windows, cell)]
        assert windows.cells(found, 0, found.before) == context
        assert windows.cells(found, found.before, found.before + 1) == [cell[0] * W + cell[1]]
        assert windows.cells(found, 2, h * w) == windows.cells(found, 0, h * w)[2:]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "window"), SIZES)
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_the_wavefront_draws_every_cell_once_after_all_that_it_needs(size, window, rule, share):
    windows = Windows(size, window, rule)
    H, W = size
    known = int(share * H * W)
    done = {divmod(n, W) for n in range(known)}
    assert len(done) == known
    for step in windows.wavefront(known):
        assert step and len(step) <= windows.rows_in_flight
        for cell in step:
            assert set(raster_context(windows, cell)) <= done
        assert not done & set(step) and len(set(step)) == len(step)
        done |= set(step)
    assert len(done) == H * W


def test_no_order_by_rows_is_shorter():
    """Step after step, each row draws one cell if all that it needs is there. In windows of one row
    no row needs another.
    """
    for size, window in (s for s in SIZES if s[1][0] > 1):
        windows = Windows(size, window)
        done, steps, (H, W) = set(), 0, size
        while len(done) < H * W:
            rows = [next((j for j in range(W) if (i, j) not in done), W) for i in range(H)]
            cells = [(i, j) for i, j in enumerate(rows) if j < W]
            done |= {c for c in cells if set(raster_context(windows, c)) <= done}
            steps += 1
        assert steps == len(list(windows.wavefront()))


@pytest.mark.parametrize(
    ("size", "before", "after"),
    [((16, 64), 1024, 304), ((28, 80), 2240, 512), ((42, 64), 2688, 720), ((30, 16), 480, 480)],
)
def test_steps_before_and_after(size, before, after):
    windows = Windows(size, (16, 16))
    assert len(list(windows.raster())) == before
    assert len(list(windows.wavefront())) == after


def test_raster_order_starts_behind_what_is_known():
    windows = Windows((3, 4), (2, 2))
    assert list(windows.raster(9)) == [[(2, 1)], [(2, 2)], [(2, 3)]]
    assert not list(windows.raster(12)) and not list(windows.wavefront(12))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (((15, 64), (16, 16)), ValueError, "at least 16x16 codes.*15x64.*no window fits"),
        (((64, 15), (16, 16)), ValueError, "64x15"),
        (((16, 0), (16, 16)), ValueError, "size must be >= 1, got 0"),
        (((16, 16), (16, 16), "taming"), ValueError, "window_rule.*make_samples, scene.*taming"),
        (((16.0, 16), (16, 16)), TypeError, "size must be an int"),
        ((16, (16, 16)), TypeError, "size must be a pair"),
        (((16, 16, 3), (16, 16)), ValueError, "size must be a pair"),
    ],
)
def test_wrong_windows_are_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        Windows(*arguments)
