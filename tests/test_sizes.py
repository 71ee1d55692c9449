"""Pictures of any size from a pipeline: sliding windows for every condition, and their decoding."""

import json

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqfast import Pipeline
from vqfast.engine import generate_windows
from vqfast.images import grid, load_image
from vqfast.models import conditioning
from vqfast.models.gpt import GPT, GPTConfig
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.windows import RULES, Windows

CONFIG = VQGANConfig(
    ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(4,), resolution=8,
    z_channels=8, n_embed=20, embed_dim=4,
)  # fmt: skip
WINDOW = (4, 4)
SIZE, GRID = (14, 26), (7, 13)  # pixels, codes


def make(condition):
    torch.manual_seed(0)
    tokenizer = VQGAN(CONFIG)
    c = conditioning.build(condition, tokenizer)
    gpt = GPT(GPTConfig(20, 16 + c.length(WINDOW) - 1, 2, 2, 16))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(0, 0.5)
        gpt.tok_emb.weight.mul_(4)
    return Pipeline(tokenizer, gpt, c)


@pytest.fixture(scope="module")
def classes():
    return make({"kind": "class", "n_classes": 3, "null_class": 3})


@pytest.mark.parametrize("rule", RULES)
def test_a_larger_picture_is_drawn_in_windows(classes, rule):
    options = {"seed": 2, "temperature": 2.0, "top_k": 15, "cfg_scale": 1.5}
    codes = classes.sample_codes([2, 1], n=3, size=SIZE, window_rule=rule, **options)
    assert codes.shape == (3, *GRID)
    cond, null = torch.tensor([[2], [1], [2]]), torch.full((3, 1), 3)
    want = generate_windows(
        classes._engine_for("fp32", 3), cond, Windows(GRID, WINDOW, rule), uncond=null,
        order="sequential", **options,
    )  # fmt: skip
    assert torch.equal(codes, want)
    images = classes.sample([2, 1], n=3, size=SIZE, window_rule=rule, **options)
    assert [i.size for i in images] == [(26, 14)] * 3


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_an_image_of_any_size_knows_no_batch(classes, cfg_scale):
    options = {"seed": 3, "temperature": 2.0, "size": SIZE, "cfg_scale": cfg_scale}
    whole = classes.sample_codes([0, 2], n=5, **options)
    for batch_size in (1, 4, 9, 20):
        assert torch.equal(
            classes.sample_codes([0, 2], n=5, **options, batch_size=batch_size), whole
        )
    rest = classes.sample_codes([0, 2], n=3, first=2, **options, batch_size=4)
    assert torch.equal(rest, whole[2:])
    assert len({c.numpy().tobytes() for c in whole}) == 5


def test_the_batch_counts_sequences(classes):
    batches = list(classes.iter_codes(n=5, size=SIZE, batch_size=8))  # four rows in flight
    assert [len(b) for b in batches] == [2, 2, 1]


@pytest.mark.parametrize("cond", [{"kind": "sos"}, {"kind": "class", "n_classes": 3}])
def test_the_models_own_size_is_the_same_by_any_name(cond):
    pipe = make(cond)
    codes = pipe.sample_codes(n=2, seed=1)
    for size in (8, (8, 8), [8, 8]):
        for rule in RULES:
            assert torch.equal(pipe.sample_codes(n=2, seed=1, size=size, window_rule=rule), codes)


def test_one_side_may_be_the_models_own():
    pipe = make({"kind": "sos"})
    for size, shape in (((8, 20), (4, 10)), ((20, 8), (10, 4)), (12, (6, 6))):
        codes = pipe.sample_codes(n=2, seed=1, size=size)
        assert codes.shape == (2, *shape)
    assert pipe.sample_codes(n=0, size=SIZE).shape == (0, *GRID)


def test_the_rules_draw_different_pictures(classes):
    a, b = (classes.sample_codes([1], seed=1, size=SIZE, window_rule=rule) for rule in RULES)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("kind", ["first_stage", "tokenizer", "coord"])
def test_a_window_sees_its_part_of_a_picture(kind):
    config = {
        "first_stage": {"kind": kind},
        "tokenizer": {"kind": kind, "config": {**CONFIG.to_dict(), "n_embed": 10}},
        "coord": {"kind": kind, "n_embed": 20, "down_factor": 2},
    }[kind]
    pipe = make(config)
    picture = torch.rand(2, 1, *SIZE) if kind == "coord" else torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        cond = pipe.conditioning.encode(picture)
    options = {"size": SIZE, "seed": 4, "temperature": 2.0}
    codes = pipe.sample_codes(cond=cond, n=3, **options)
    alone = pipe.sample_codes(cond=cond[1:], n=1, first=1, **options)
    assert torch.equal(alone[0], codes[1])
    # cells whose windows end before column 8 do not know what stands there
    changed = cond.view(2, *GRID).clone()
    changed[:, :, 8:] = (changed[:, :, 8:] + 1) % 10
    other = pipe.sample_codes(cond=changed.flatten(1), n=3, **options)
    assert torch.equal(other[:, 0, :7], codes[:, 0, :7])
    assert not torch.equal(other[:, :, 8:], codes[:, :, 8:])
    with pytest.raises(ValueError, match=r"cond must be \[m, 91\].*\[2, 16\]"):
        pipe.sample_codes(cond=cond[:, :16], **options)


def test_a_condition_of_another_scale_is_refused():
    coarse = {**CONFIG.to_dict(), "ch_mult": [1, 1, 1]}
    pipe = make({"kind": "tokenizer", "config": coarse})
    cond = torch.zeros(1, 4, dtype=torch.int64)
    assert pipe.sample_codes(cond=cond).shape == (1, *WINDOW)
    with pytest.raises(ValueError, match="condition of 4 tokens.*4x4 codes of a window"):
        pipe.sample_codes(cond=cond, size=SIZE)


@pytest.mark.parametrize("k", [13 * 3, 13 * 2 + 5])
def test_a_larger_picture_is_completed(classes, k):
    options = {"seed": 6, "temperature": 2.0, "size": SIZE}
    whole = classes.sample_codes([1, 2], **options)
    prefix = whole.flatten(1)[:, :k]
    assert torch.equal(classes.sample_codes([1, 2], **options, prefix=prefix), whole)
    other = classes.sample_codes([1, 2], **options, prefix=(prefix + 1) % 20)
    assert torch.equal(other.flatten(1)[:, :k], (prefix + 1) % 20)
    assert not torch.equal(other, whole)
    with pytest.raises(ValueError, match=r"prefix must be \[m >= 1, k <= 91\]"):
        classes.sample_codes([1], **options, prefix=torch.zeros(1, 92, dtype=torch.int64))


def test_on_step_sees_the_grid(classes):
    seen = []
    codes = classes.sample_codes([0, 1], n=3, size=SIZE, batch_size=8, on_step=seen.append)
    steps = 13 + 4 * 6
    assert [s.images for s in seen] == [(0, 1)] * steps + [(2,)] * steps
    assert all(s.steps == steps and s.codes.shape[1:] == GRID for s in seen)
    assert torch.equal(seen[steps - 1].codes, codes[:2]) and (seen[0].codes == -1).sum() == 2 * 90


# ---- the tokenizer


def test_a_large_grid_is_decoded_and_encoded_without_a_matrix_of_positions(classes):
    """The attention of a grid may only take the kernel that holds no positions x positions."""
    codes = torch.randint(20, (1, 20, 33))
    with torch.no_grad():
        free = classes.tokenizer.decode(codes)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            x = classes.tokenizer.decode(codes)
            again = classes.tokenizer.encode(x)
    assert x.shape == (1, 3, 40, 66) and again.shape == (1, 20, 33)
    assert torch.equal(x, free)


# ---- the command line


@pytest.mark.parametrize("rule", RULES)
def test_the_command_draws_the_pictures_of_the_api(run_cli, tmp_path, tiny_pipeline, rule):
    asked = ["--size", "20x30", "--window-rule", rule, "--seed", 5, "--classes", "bee"]
    code, out, _ = run_cli(
        "sample", "--model", tiny_pipeline, "-n", 2, *asked, "--out", "o", "--grid", "g.png",
        "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["n"] == 2
    pipe = Pipeline.from_pretrained(tiny_pipeline)
    want = pipe.sample(["bee"], n=2, size=(20, 30), seed=5, window_rule=rule)
    for i, image in enumerate(want):
        found = load_image(tmp_path / "o" / f"{i:06d}.png")
        assert found.size == (30, 20) and np.array_equal(np.array(found), np.array(image))
    sheet = load_image(tmp_path / "g.png")
    assert np.array_equal(np.array(sheet), np.array(grid(want)))


def test_a_picture_is_completed_in_any_size(run_cli, tmp_path, tiny_pipeline, two_pictures):
    asked = ["--complete", two_pictures[0], "--keep", 3, "--size", "18x24", "-n", 1]
    assert run_cli("sample", "--model", tiny_pipeline, *asked, "--out", "o")[0] == 0
    assert load_image(tmp_path / "o" / "000000.png").size == (24, 18)


@pytest.mark.parametrize(
    ("size", "said"), [("14x30", "at least 16x16"), ("17x16", "multiples of 2"), ("8", "window")]
)
def test_sizes_that_no_window_fits_are_bad_usage(run_cli, tmp_path, tiny_pipeline, size, said):
    code, _, err = run_cli("sample", "--model", tiny_pipeline, "--size", size, "--out", "o")
    assert code == 2 and said in err and not (tmp_path / "o").exists()
