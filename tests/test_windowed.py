"""Sampling in sliding windows: what full passes would give, in any order and batch."""

import pytest
import torch

from vqfast import Engine, NonFiniteError, sample_logits
from vqfast.engine import windowed
from vqfast.engine.windowed import generate_windows
from vqfast.models.gpt import GPT, GPTConfig
from vqfast.windows import RULES, Windows

V = 37
WINDOW = (4, 6)
SIZES = [(8, 13), (7, 6), (4, 13), (5, 7)]


def make_gpt(**changes):
    torch.manual_seed(4)
    shape = {"vocab_size": V, "block_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 16, **changes}
    gpt = GPT(GPTConfig(**shape)).eval().requires_grad_(False)
    for p in gpt.parameters():
        p.normal_(0, 0.4)
    gpt.ln_f.bias.zero_()  # no code is likely everywhere,
    gpt.tok_emb.weight.mul_(3)  # and what came before decides what comes next
    return gpt


@pytest.fixture(scope="module")
def gpt():
    return make_gpt()


@pytest.fixture(scope="module")
def engine(gpt):
    return Engine(gpt, batch=8)


def tokens(seed, *shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def conditions(kind, b, size):
    """(cond, uncond): one token for each image, three, or a grid of them."""
    shape = {"class": (1,), "three": (3,), "grid": size}[kind]
    return tokens(1, b, *shape), tokens(2, b, *shape)


def crop(cond, window):
    if cond.dim() == 2:
        return cond
    (h, w), (top, left) = WINDOW, window[:2]
    return cond[:, top : top + h, left : left + w].flatten(1)


def full_passes(gpt, cond, uncond, scale, windows, **draw):
    """taming's loop: the whole window goes through the model for every cell."""
    (H, W), (h, w) = windows.size, windows.window
    codes = torch.zeros(len(cond), H, W, dtype=torch.int64)
    for i in range(H):
        for j in range(W):
            window = windows.at((i, j))
            patch = codes[:, window.top : window.top + h, window.left : window.left + w].flatten(1)
            n = (i - window.top) * w + j - window.left
            c, u = (gpt(patch, crop(x, window))[:, n] for x in (cond, uncond))
            codes[:, i, j] = sample_logits(
                u + scale * (c - u), sample_index=torch.arange(len(cond)), position=i * W + j,
                seed=3, **draw,
            )  # fmt: skip
    return codes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["class", "three", "grid"])
@pytest.mark.parametrize("size", SIZES)
def test_codes_are_those_of_full_passes(gpt, engine, size, kind, rule):
    windows, (cond, uncond) = Windows(size, WINDOW, rule), conditions(kind, 2, size)
    for scale, temperature in ((1.0, 0.0), (2.5, 0.0), (1.0, 3.0)):
        codes = generate_windows(
            engine, cond, windows, seed=3, temperature=temperature, cfg_scale=scale, uncond=uncond,
            order="sequential",
        )  # fmt: skip
        assert codes.shape == (2, *size) and codes.dtype == torch.int64
        want = full_passes(gpt, cond, uncond, scale, windows, temperature=temperature)
        assert torch.equal(codes, want)
    assert len(codes.unique()) > 12


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("class", {}),
        ("three", {"cfg_scale": 2.0}),
        ("class", {"cfg_scale": 2.0, "cfg_interval": (15, 70)}),
        ("grid", {"cfg_scale": 0.5}),
        ("three", {"prefix": tokens(3, 3, 31)}),
        ("grid", {"prefix": tokens(3, 3, 42), "cfg_scale": 3.0, "cfg_interval": (50, 60)}),
    ],
)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [(9, 14), (6, 25)])
def test_the_wavefront_draws_the_codes_of_the_sequence(gpt, size, rule, kind, more, poison):
    engine = Engine(gpt, batch=3)  # its cache is full of NaN
    windows, (cond, uncond) = Windows(size, WINDOW, rule), conditions(kind, 3, size)
    options = {"seed": 7, "temperature": 2.0, "top_p": 0.95, "uncond": uncond, **more}
    wave = generate_windows(engine, cond, windows, **options)
    assert torch.equal(wave, generate_windows(engine, cond, windows, **options, order="sequential"))
    if "prefix" in more:
        k = more["prefix"].shape[1]
        assert torch.equal(wave.flatten(1)[:, :k], more["prefix"])
    other = generate_windows(engine, cond, windows, **{**options, "seed": 8})
    assert not torch.equal(wave, other)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_every_precision_has_one_answer(gpt, precision):
    engine, windows = Engine(gpt, precision, batch=3), Windows((6, 13), WINDOW)
    cond, uncond = conditions("class", 3, None)
    options = {"seed": 1, "temperature": 2.0, "cfg_scale": 2.0, "uncond": uncond}
    wave = generate_windows(engine, cond, windows, **options)
    assert torch.equal(wave, generate_windows(engine, cond, windows, **options, order="sequential"))


@pytest.mark.parametrize("order", windowed.ORDERS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"cfg_scale": 2.0},
        {"cfg_scale": 2.0, "cfg_interval": (5, 9)},
        {"prefix": tokens(3, 3, 8)},
    ],
)
def test_a_grid_of_the_models_own_size_is_the_ordinary_path(engine, order, more):
    windows, (cond, uncond) = Windows(WINDOW, WINDOW), conditions("three", 3, None)
    options = {"seed": 3, "temperature": 2.0, "top_k": 20, "sample_index": 5}
    codes = generate_windows(
        engine, cond, windows, **options, uncond=uncond, **more, order=order
    ).flatten(1)
    more = dict(more)
    prefix = more.pop("prefix", torch.empty(3, 0, dtype=torch.int64))
    k = prefix.shape[1]
    drawn = engine.generate(
        torch.cat([cond, prefix], 1), 24 - k, **options, **more,
        uncond=torch.cat([uncond, prefix], 1), position=k,
    )  # fmt: skip
    assert torch.equal(codes, torch.cat([prefix, drawn], 1))


@pytest.mark.parametrize("kind", ["class", "grid"])
def test_an_image_is_the_same_alone_and_anywhere(gpt, kind):
    engine, windows = Engine(gpt, batch=7), Windows((5, 14), WINDOW)
    cond, uncond = conditions(kind, 7, windows.size)
    options = {"seed": 5, "temperature": 2.0, "cfg_scale": 1.5}
    whole = generate_windows(engine, cond, windows, uncond=uncond, **options)
    small = Engine(gpt, batch=3)
    for i in range(0, 7, 3):
        some = slice(i, i + 3)
        part = generate_windows(
            small, cond[some], windows, uncond=uncond[some], sample_index=i, **options
        )
        assert torch.equal(part, whole[some])
    order = torch.randperm(7)
    mixed = generate_windows(
        engine, cond[order], windows, uncond=uncond[order], sample_index=order, **options
    )
    assert torch.equal(mixed, whole[order])
    moved = generate_windows(engine, cond, windows, uncond=uncond, sample_index=1, **options)
    assert (moved != whole).flatten(1).any(1).all()


def test_the_reference_agrees_with_itself_in_any_order(gpt):
    from vqfast import backend

    windows, cond = Windows((5, 8), WINDOW), tokens(1, 2, 1)
    with backend("reference"):
        engine = Engine(gpt, batch=2)
        wave, sequence = (
            generate_windows(engine, cond, windows, seed=1, temperature=2.0, order=order)
            for order in windowed.ORDERS
        )
        alone = generate_windows(engine, cond[1:], windows, seed=1, temperature=2.0, sample_index=1)
    assert torch.equal(wave, sequence) and torch.equal(alone[0], wave[1])


@pytest.mark.parametrize("order", windowed.ORDERS)
def test_cells_that_are_not_drawn_never_leak(gpt, monkeypatch, poison, order):
    windows, (cond, _) = Windows((7, 14), WINDOW), conditions("class", 2, None)
    engine = Engine(gpt, batch=2)
    found = []
    for token in (0, 11, V - 1):
        monkeypatch.setattr(windowed, "_UNSAMPLED", token)
        found.append(generate_windows(engine, cond, windows, seed=2, order=order))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_every_token_that_is_fed_stands_in_the_final_grid(engine, monkeypatch):
    """And each row of a call is another place of the cache."""
    windows, (cond, uncond) = Windows((7, 14), WINDOW), conditions("grid", 2, (7, 14))
    fed, call = [], Engine._call

    def spy(self, tokens, slots, positions, n_logits):
        fed.append((tokens, slots, positions))
        return call(self, tokens, slots, positions, n_logits)

    monkeypatch.setattr(Engine, "_call", spy)
    codes = generate_windows(engine, cond, windows, seed=2, cfg_scale=2.0, uncond=uncond)
    F, lanes = windows.rows_in_flight, 2 * windows.rows_in_flight
    for given, slots, positions in fed:
        assert len(set(zip(slots.tolist(), positions.tolist(), strict=True))) == len(given)
        assert len(given) <= windowed._ROWS_PER_CALL
        for token, slot, position in zip(given, slots, positions, strict=True):
            source = (cond, uncond)[slot % lanes // F] if position < 24 else codes
            assert token in source[slot // lanes]


# ---- how much is done


def count(engine, monkeypatch, windows, cond, **options):
    """Rows of every call, and the calls of on_step."""
    rows, steps, call = [], [], Engine._call

    def spy(self, tokens, *args):
        rows.append(len(tokens))
        return call(self, tokens, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_call", spy)
        generate_windows(engine, cond, windows, seed=0, on_step=steps.append, **options)
    return rows, steps


class _Enough(Exception):
    pass


def test_the_wavefront_takes_a_third_of_the_steps():
    gpt = make_gpt(block_size=256, n_layer=1, n_embd=8, n_head=1)
    engine, windows, cond = Engine(gpt, batch=1), Windows((42, 64), (16, 16)), tokens(1, 1, 1)
    wave, sequence = [], []
    generate_windows(engine, cond, windows, seed=0, on_step=lambda s: wave.append(s.step))

    def first(step):
        sequence.append(step.steps)
        raise _Enough

    with pytest.raises(_Enough):
        generate_windows(engine, cond, windows, seed=0, on_step=first, order="sequential")
    assert wave == list(range(1, 721)) and sequence == [2688]
    assert 3 * len(wave) < sequence[0]


@pytest.mark.parametrize("order", windowed.ORDERS)
@pytest.mark.parametrize("kind", ["three", "grid"])
def test_a_window_that_stays_feeds_one_token(engine, monkeypatch, order, kind):
    """One that moves feeds what its cells lack: all codes before the predicted one, and the
    condition where it is cropped or the slot is new.
    """
    size, wave = (6, 14), order == "wavefront"
    windows, (cond, _) = Windows(size, WINDOW), conditions(kind, 2, size)
    Tc, held = (24 if kind == "grid" else 3), {}
    rows, steps = count(engine, monkeypatch, windows, cond, order=order)
    want = 0
    for [cell] in windows.raster():
        window = windows.at(cell)
        lane = cell[0] % windows.rows_in_flight if wave else 0
        if held.get(lane) == window[:2]:
            want += 1
        elif lane in held and kind == "three":
            want += max(1, window.before)
        else:
            want += Tc + window.before
        held[lane] = window[:2]
    assert sum(rows) == 2 * want and max(rows) <= windowed._ROWS_PER_CALL
    assert [s.step for s in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].steps == len(steps) == (14 + 6 * 5 if wave else 6 * 14)


def test_a_grid_as_wide_as_the_window_feeds_few(engine, monkeypatch):
    windows, cond = Windows((9, 6), WINDOW), tokens(1, 1, 1)
    rows, _ = count(engine, monkeypatch, windows, cond)
    # the window moves down at row 3 with two rows of context, and so on to row 7
    assert len(rows) == 54 and rows.count(12) == 5 and rows.count(1) == 49


def test_calls_are_bounded_in_rows(engine, monkeypatch):
    windows, cond = Windows((5, 14), WINDOW), tokens(1, 7, 1)
    rows, steps = count(engine, monkeypatch, windows, cond)
    monkeypatch.setattr(windowed, "_ROWS_PER_CALL", 5)
    small, again = count(engine, monkeypatch, windows, cond)
    assert max(small) == 5 < max(rows) and sum(small) == sum(rows)
    assert torch.equal(again[-1].codes, steps[-1].codes)


def test_guidance_costs_nothing_outside_its_interval(engine, monkeypatch):
    windows, (cond, uncond) = Windows((4, 14), WINDOW), conditions("class", 2, None)
    plain, _ = count(engine, monkeypatch, windows, cond)
    options = {"cfg_scale": 2.0, "uncond": uncond}
    none, _ = count(engine, monkeypatch, windows, cond, **options, cfg_interval=(7, 7))
    some, _ = count(engine, monkeypatch, windows, cond, **options, cfg_interval=(50, 56))
    all_, _ = count(engine, monkeypatch, windows, cond, **options)
    assert none == plain and sum(all_) == 2 * sum(plain)
    # of the last six cells of the last row, four have 3 rows and 3 codes before them in a window
    # that just moved; the first of these also lacks the condition, and at last the window stays
    assert sum(some) == sum(plain) + 2 * ((1 + 21) + 21 + 21 + 21 + 1 + 1)


# ---- callbacks and refusals


def test_on_step_sees_the_grid_as_it_fills(engine):
    windows, cond, prefix = Windows((5, 9), WINDOW), tokens(1, 2, 1), tokens(2, 2, 11)
    seen = []
    options = {"seed": 1, "prefix": prefix, "sample_index": torch.tensor([4, 9])}
    codes = generate_windows(engine, cond, windows, **options, on_step=seen.append)
    steps = list(windows.wavefront(11))
    assert len(seen) == len(steps)
    drawn = torch.arange(45).view(5, 9) < 11
    for step, cells in zip(seen, steps, strict=True):
        for i, j in cells:
            drawn[i, j] = True
        assert step.images == (4, 9) and step.steps == len(steps)
        assert torch.equal(step.codes, torch.where(drawn, codes, -1))
    assert drawn.all()
    spoilt = generate_windows(engine, cond, windows, **options, on_step=lambda s: s.codes.zero_())
    assert torch.equal(spoilt, codes)


def test_an_exception_leaves_the_engine_usable(gpt):
    engine, windows, cond = Engine(gpt, batch=2), Windows((5, 9), WINDOW), tokens(1, 2, 1)
    before = engine.generate(cond, 20, seed=1)

    def stop(step):
        if step.step == 9:
            raise _Enough

    with pytest.raises(_Enough):
        generate_windows(engine, cond, windows, seed=0, on_step=stop)
    with pytest.raises(ValueError, match="prefill first"):
        engine.step(torch.tensor([0, 0]))
    assert torch.equal(engine.generate(cond, 20, seed=1), before)


def test_a_whole_prefix_is_all(engine):
    windows, prefix = Windows((5, 9), WINDOW), tokens(2, 2, 45)
    codes = generate_windows(engine, tokens(1, 2, 1), windows, seed=1, prefix=prefix)
    assert torch.equal(codes.flatten(1), prefix)


def test_broken_weights_are_an_error_naming_sample_and_position():
    gpt = make_gpt()
    gpt.pos_emb[0, 3 + 6] = float("nan")  # of the window's second row, column 3
    with pytest.raises(NonFiniteError, match="sample 3 at position 17"):
        generate_windows(
            Engine(gpt, batch=2), tokens(1, 2, 1), Windows((5, 14), WINDOW), seed=0, sample_index=3
        )


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"cond": torch.zeros(2, 1)}, TypeError, "cond.*float32"),
        ({"cond": torch.full((2, 1), V)}, ValueError, "cond.*0..36.*37"),
        ({"cond": tokens(1, 9, 1)}, ValueError, r"cond.*1\.\.8.*\[9, 1\]"),
        ({"cond": tokens(1, 0, 1)}, ValueError, r"cond.*\[0, 1\]"),
        ({"cond": tokens(1, 2, 0)}, ValueError, r"cond.*\[2, 0\]"),
        ({"cond": tokens(1, 2, 9, 5)}, ValueError, r"cond.*\[2, 5, 9\].*grid.*\[2, 9, 5\]"),
        ({"cond": tokens(1, 2, 28)}, ValueError, "24 codes after 28 tokens.*capacity is 50"),
        ({"cfg_scale": 2.0}, ValueError, "null condition"),
        ({"cfg_scale": 2.0, "uncond": tokens(1, 2, 2)}, ValueError, "uncond.*like cond"),
        ({"cfg_scale": 2.0, "uncond": tokens(1, 2, 1) + V}, ValueError, "uncond"),
        ({"cfg_scale": 2.0, "cfg_interval": (3, 1)}, ValueError, "cfg_interval"),
        ({"prefix": tokens(1, 1, 3)}, ValueError, r"prefix.*\[2, <= 45\].*\[1, 3\]"),
        ({"prefix": tokens(1, 2, 46)}, ValueError, r"prefix.*\[2, 46\]"),
        ({"prefix": torch.full((2, 1), V)}, ValueError, "prefix.*37"),
        ({"order": "spiral"}, ValueError, "order.*wavefront, sequential.*spiral"),
        ({"seed": -1}, ValueError, "seed"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"sample_index": torch.arange(3)}, ValueError, "sample_index"),
        ({"on_step": 3}, TypeError, "on_step"),
    ],
)
def test_wrong_arguments_are_named(engine, changes, error, said):
    given = {"cond": tokens(1, 2, 1), "seed": 0, "windows": Windows((5, 9), WINDOW), **changes}
    with pytest.raises(error, match=said):
        generate_windows(engine, **given)
