"""Engine: the cache gives what a full pass gives, and a sample knows nothing of its batch."""

import pytest
import torch

from vqfast import Engine, NonFiniteError
from vqfast.engine import engine as engine_module
from vqfast.models.gpt import GPT, GPTConfig

SHAPE = {"vocab_size": 37, "block_size": 80, "n_layer": 2, "n_head": 2, "n_embd": 32}
PRECISIONS = ("fp32", "bf16", "int8", "int4")


def make_gpt(std=0.3, **changes):
    torch.manual_seed(4)
    gpt = GPT(GPTConfig(**{**SHAPE, **changes})).eval().requires_grad_(False)
    for p in gpt.parameters():
        p.normal_(0, std)
    return gpt


@pytest.fixture(scope="module")
def gpt():
    return make_gpt()


def _cond(b, Tc=1):
    return torch.randint(37, (b, Tc), generator=torch.Generator().manual_seed(b))


def test_prefill_and_steps_are_the_full_pass(gpt, each_backend, poison):
    tokens = torch.randint(37, (3, 80))
    full = gpt(tokens[:, 1:], tokens[:, :1])
    engine = Engine(gpt, batch=4)
    rows = [engine.prefill(tokens[:, :70])]
    rows += [engine.step(tokens[:, t]) for t in range(70, 79)]
    assert (torch.stack(rows, 1) - full[:, 69:]).abs().max() < 1e-5 * full.abs().max()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_prefill_has_the_bits_of_single_steps(gpt, precision, each_backend):
    """70 tokens of 3 rows go in more than one call; one row in one; steps one by one."""
    tokens = torch.randint(37, (3, 70))
    engine = Engine(gpt, precision, batch=3)
    whole = engine.prefill(tokens)
    assert torch.equal(engine.prefill(tokens[1:2])[0], whole[1])
    last = engine.prefill(tokens[:, :60])
    for t in range(60, 70):
        last = engine.step(tokens[:, t])
    assert torch.equal(last, whole)


def test_greedy_codes_are_those_of_full_passes(each_backend):
    """At every position of the cache."""
    gpt = make_gpt()
    gpt.ln_f.bias.zero_()  # or one code wins nearly everywhere
    cond, n = _cond(2, 3), SHAPE["block_size"] - 2
    codes = Engine(gpt, batch=2).generate(cond, n, seed=0, temperature=0.0)
    found = torch.empty(2, 0, dtype=torch.int64)
    for _ in range(n - 1):
        logits = gpt(torch.cat([found, found.new_zeros(2, 1)], 1), cond)[:, -1]
        found = torch.cat([found, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(codes[:, :-1], found) and codes.unique().numel() > 5


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.01), ("int8", 0.02), ("int4", 0.3)])
def test_small_formats_lose_little(precision, limit):
    gpt, cond = make_gpt(0.1, n_embd=64), _cond(4)
    codes = Engine(gpt, precision, batch=4).generate(cond, 80, seed=0, temperature=0.0)
    logits = gpt(codes, cond)
    chosen = logits.gather(2, codes[:, :, None])[:, :, 0]
    assert ((logits.amax(-1) - chosen) / logits.std(-1)).mean() < limit


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sample_is_the_same_alone_and_anywhere(gpt, precision, each_thread_count):
    options = {"seed": 5, "temperature": 3.0, "top_k": 30, "top_p": 0.95}
    cond = _cond(11, 2)
    whole = Engine(gpt, precision, batch=11).generate(cond, 25, **options)
    small = Engine(gpt, precision, batch=3)
    for i in range(0, 11, 3):
        part = small.generate(cond[i : i + 3], 25, sample_index=i, **options)
        assert torch.equal(part, whole[i : i + 3])
    order = torch.randperm(11)
    mixed = Engine(gpt, precision, batch=11)
    got = mixed.generate(cond[order], 25, sample_index=order, **options)
    assert torch.equal(got, whole[order])
    # the check can fail: another seed, another sample, another condition
    again = mixed.generate
    assert (again(cond, 25, **{**options, "seed": 6}) != whole).any(1).all()
    assert (again(cond, 25, sample_index=1, **options) != whole).any(1).all()
    assert (again((cond + 1) % 37, 25, **options) != whole).any(1).sum() > 8


def _random_placements(gpt, precision, count):
    """How many of `count` draws of one sample, each at a random place of a batch of random size
    among random others, differ from the sample drawn alone."""
    g = torch.Generator().manual_seed(8)

    def random(low, high, *shape):
        return torch.randint(low, high, shape, generator=g)

    options = {"seed": 11, "temperature": 3.0}
    engine, mine = Engine(gpt, precision, batch=33), _cond(1, 2)
    alone = engine.generate(mine, 6, sample_index=1000, **options)[0]
    differ = 0
    for _ in range(count):
        b = int(random(1, 34))
        place, cond, index = int(random(0, b)), random(0, 37, b, 2), random(0, 1000, b)
        cond[place], index[place] = mine[0], 1000
        got = engine.generate(cond, 6, sample_index=index, **options)
        differ += not torch.equal(got[place], alone)
    return differ


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sample_is_the_same_at_64_random_placements(gpt, precision):
    assert _random_placements(gpt, precision, 64) == 0


def test_a_step_that_sees_its_batch_is_found(gpt, monkeypatch):
    """The inverse: the check fails if logits depend on the number of rows."""
    step = engine_module.decode_step

    def sees(tokens, *args, **options):
        return step(tokens, *args, **options) * (1 + 0.02 * len(tokens))

    monkeypatch.setattr(engine_module, "decode_step", sees)
    assert _random_placements(gpt, "fp32", 64) > 32


def test_reference_is_invariant_too(gpt):
    from vqfast import backend

    options = {"seed": 5, "temperature": 3.0, "top_p": 0.9}
    with backend("reference"):
        engine, cond = Engine(gpt, "int8", batch=5), _cond(5)
        whole = engine.generate(cond, 8, **options)
        for i in range(5):
            alone = engine.generate(cond[i : i + 1], 8, sample_index=i, **options)
            assert torch.equal(alone, whole[i : i + 1])


def test_the_position_goes_into_the_draw(gpt):
    engine, cond = Engine(gpt, batch=1), _cond(1)
    whole = engine.generate(cond, 12, seed=1, temperature=2.0)
    longer = torch.cat([cond, whole[:, :5]], 1)
    rest = engine.generate(longer, 7, seed=1, temperature=2.0, position=5)
    assert torch.equal(rest, whole[:, 5:])
    assert not torch.equal(engine.generate(longer, 7, seed=1, temperature=2.0), rest)


def test_guidance_mixes_the_logits(gpt, each_backend):
    cond, uncond = _cond(2, 2), torch.full((2, 2), 36)
    engine, plain = Engine(gpt, batch=2), Engine(gpt, batch=2)
    codes = engine.generate(cond, 6, seed=0, temperature=0.0, cfg_scale=2.5, uncond=uncond)
    for t in range(6):
        c = plain.prefill(torch.cat([cond, codes[:, :t]], 1))
        u = plain.prefill(torch.cat([uncond, codes[:, :t]], 1))
        assert torch.equal((u + 2.5 * (c - u)).argmax(-1), codes[:, t])
    assert torch.equal(  # without guidance the null condition changes nothing
        engine.generate(cond, 6, seed=0, uncond=uncond), engine.generate(cond, 6, seed=0)
    )


def test_guidance_is_batch_invariant(gpt):
    options = {"seed": 2, "temperature": 2.0, "cfg_scale": 1.5}
    cond, uncond = _cond(5), torch.zeros(5, 1, dtype=torch.int64)
    engine = Engine(gpt, batch=5)
    whole = engine.generate(cond, 10, uncond=uncond, **options)
    for i in range(5):
        one = slice(i, i + 1)
        alone = engine.generate(cond[one], 10, uncond=uncond[one], sample_index=i, **options)
        assert torch.equal(alone, whole[one])


@pytest.mark.parametrize("interval", [(0, 3), (2, 5), (5, 99), (3, 3), (0, 99)])
def test_guidance_acts_in_its_interval_alone(gpt, interval, each_backend, poison):
    """Positions are those of the image, whose first two tokens are given here."""
    cond, uncond, begin = _cond(2, 3), torch.full((2, 3), 36), 2
    engine, plain = Engine(gpt, batch=2), Engine(gpt, batch=2)
    codes = engine.generate(
        cond, 6, seed=0, temperature=0.0, cfg_scale=-2.5, cfg_interval=interval, uncond=uncond,
        position=begin,
    )  # fmt: skip
    for t in range(6):
        c = plain.prefill(torch.cat([cond, codes[:, :t]], 1))
        u = plain.prefill(torch.cat([uncond, codes[:, :t]], 1))
        guided = interval[0] <= begin + t < interval[1]
        logits = u - 2.5 * (c - u) if guided else c
        assert torch.equal(logits.argmax(-1), codes[:, t])


def test_guidance_costs_nothing_outside_its_interval(gpt, monkeypatch):
    rows, step = [], engine_module.decode_step

    def spy(tokens, *args, **options):
        rows.append(len(tokens))
        return step(tokens, *args, **options)

    monkeypatch.setattr(engine_module, "decode_step", spy)
    engine, cond, uncond = Engine(gpt, batch=2), _cond(2, 3), _cond(2, 3) + 1
    options = {"seed": 0, "cfg_scale": 2.0, "uncond": uncond % 37}
    engine.generate(cond, 8, **options, cfg_interval=(3, 6))
    # u takes its 6 tokens at once when guidance begins
    assert rows == [6, 2, 2, 2, 12, 4, 4, 2, 2]
    rows.clear()
    engine.generate(cond, 4, **options)
    assert rows == [12, 4, 4, 4]


def test_a_long_prefill_goes_in_few_bounded_calls(gpt, monkeypatch):
    rows, step = [], engine_module.decode_step

    def spy(tokens, *args, **options):
        rows.append(len(tokens))
        return step(tokens, *args, **options)

    monkeypatch.setattr(engine_module, "decode_step", spy)
    Engine(gpt, batch=3).generate(_cond(3, 70), 1, seed=0)
    assert sum(rows) == 210 and len(rows) == 4 and max(rows) <= 64


def test_every_token_calls_on_step(gpt):
    seen, engine, cond = [], Engine(gpt, batch=3), _cond(3, 2)
    options = {"seed": 3, "temperature": 2.0, "sample_index": torch.tensor([7, 1, 4])}
    codes = engine.generate(cond, 5, **options, on_step=seen.append)
    assert [s.step for s in seen] == [1, 2, 3, 4, 5]
    for s in seen:
        assert s.images == (7, 1, 4) and s.steps == 5 and s.codes.shape == (3, 5)
        assert torch.equal(s.codes[:, : s.step], codes[:, : s.step])
        assert (s.codes[:, s.step :] == -1).all()
    assert torch.equal(engine.generate(cond, 5, **options), codes)
    spoilt = engine.generate(cond, 5, **options, on_step=lambda s: s.codes.fill_(0))
    assert torch.equal(spoilt, codes)  # it is a copy


def test_an_exception_of_on_step_leaves_the_engine_usable(gpt):
    class Enough(Exception):
        pass

    def stop(step):
        if step.step == 3:
            raise Enough

    engine, cond = Engine(gpt, batch=2), _cond(2)
    whole = engine.generate(cond, 6, seed=1)
    with pytest.raises(Enough):
        engine.generate(cond, 6, seed=1, on_step=stop)
    with pytest.raises(ValueError, match="prefill first"):
        engine.step(torch.tensor([0, 0]))
    assert torch.equal(engine.generate(cond, 6, seed=1), whole)


def test_exactly_the_capacity_fits(gpt):
    engine = Engine(gpt, batch=1)
    assert engine.capacity == 80
    assert engine.generate(_cond(1, 3), 78, seed=0).shape == (1, 78)
    with pytest.raises(ValueError, match="capacity is 80"):
        engine.generate(_cond(1, 3), 79, seed=0)
    engine.prefill(_cond(1, 79))
    engine.step(torch.tensor([0]))
    with pytest.raises(ValueError, match="80 tokens"):
        engine.step(torch.tensor([0]))
    with pytest.raises(ValueError, match="81"):
        engine.prefill(_cond(1, 81))


def test_nothing_asked_gives_nothing(gpt):
    engine = Engine(gpt, batch=2)
    assert engine.generate(_cond(2), 0, seed=0).shape == (2, 0)
    assert engine.generate(torch.empty(0, 1, dtype=torch.int64), 4, seed=0).shape == (0, 4)


@pytest.mark.parametrize("where", ["nan", "inf"])
def test_broken_weights_are_an_error_naming_sample_and_position(where, each_backend):
    gpt = make_gpt()
    gpt.pos_emb[0, 4] = float(where)
    with pytest.raises(NonFiniteError, match="sample 3 at position 4"):
        Engine(gpt, batch=2).generate(_cond(2), 9, seed=0, sample_index=3)


def test_engine_keeps_the_weights_it_was_made_of():
    gpt = make_gpt()
    engine = Engine(gpt, batch=1)
    before = engine.generate(_cond(1), 10, seed=0)
    for p in gpt.parameters():
        p.mul_(-1)
    assert torch.equal(engine.generate(_cond(1), 10, seed=0), before)
    assert not torch.equal(Engine(gpt, batch=1).generate(_cond(1), 10, seed=0), before)


def test_reset_forgets(gpt):
    engine = Engine(gpt, batch=2)
    first = engine.prefill(_cond(2, 5))
    engine.prefill(_cond(1, 9))
    assert torch.equal(engine.prefill(_cond(2, 5)), first)
    engine.reset()
    with pytest.raises(ValueError, match="prefill first"):
        engine.step(torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda e: e.prefill(torch.zeros(1, 2)), TypeError, "tokens.*float32"),
        (lambda e: e.prefill(torch.tensor([[37]])), ValueError, "0..36.*37"),
        (lambda e: e.prefill(torch.tensor([[-1]])), ValueError, "-1"),
        (lambda e: e.prefill(_cond(3)), ValueError, r"\[3, 1\]"),
        (lambda e: e.prefill(torch.tensor([1])), ValueError, "2 dimensions"),
        (lambda e: e.generate(_cond(3), 1, seed=0), ValueError, r"cond.*\[3, 1\]"),
        (lambda e: e.generate(_cond(1), -1, seed=0), ValueError, "n must"),
        (lambda e: e.generate(_cond(1), 1, seed=-1), ValueError, "seed"),
        (lambda e: e.generate(_cond(1), 1, seed=0, temperature=-1.0), ValueError, "temperature"),
        (lambda e: e.generate(_cond(1), 0, seed=0, top_p=2.0), ValueError, "top_p"),
        (lambda e: e.generate(_cond(1), 1, seed=0, cfg_scale=2.0), ValueError, "null condition"),
        (lambda e: e.generate(_cond(1), 1, seed=0, cfg_interval=(2, 1)), ValueError, "2, 1"),
        (lambda e: e.generate(_cond(1), 1, seed=0, cfg_interval=(-1, 1)), ValueError, "interval"),
        (lambda e: e.generate(_cond(1), 1, seed=0, cfg_interval=(1,)), ValueError, "1 values"),
        (lambda e: e.generate(_cond(1), 1, seed=0, cfg_interval=(0, 1.0)), TypeError, "float"),
        (lambda e: e.generate(_cond(1), 1, seed=0, cfg_interval=3), TypeError, "interval.*int"),
        (lambda e: e.generate(_cond(1), 1, seed=0, on_step=3), TypeError, "on_step.*int"),
        (
            lambda e: e.generate(_cond(1), 1, seed=0, cfg_scale=2.0, uncond=_cond(1, 2)),
            ValueError,
            "uncond",
        ),
        (
            lambda e: e.generate(_cond(2), 1, seed=0, sample_index=torch.arange(3)),
            ValueError,
            "sample_index",
        ),
    ],
)
def test_wrong_arguments_are_named(gpt, call, error, said):
    with pytest.raises(error, match=said):
        call(Engine(gpt, batch=2))


def test_step_takes_the_rows_of_the_prefill(gpt):
    engine = Engine(gpt, batch=4)
    engine.prefill(_cond(2))
    with pytest.raises(ValueError, match="last prefill"):
        engine.step(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((torch.nn.Linear(1, 1),), TypeError, "gpt.*Linear"),
        ((make_gpt(), "fp8"), ValueError, "precision.*fp8"),
        ((make_gpt(), "fp32", 0), ValueError, "batch"),
        ((make_gpt(n_unmasked=2),), ValueError, "n_unmasked"),
    ],
)
def test_wrong_engines_are_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        Engine(*arguments)
