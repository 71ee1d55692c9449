"""The suite quality: its figures against plain float64, its pictures against the recipe's split."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import vqfast
from vqfast import Engine, Pipeline, images
from vqfast.data import open_source
from vqfast.data.source import held_out
from vqfast.engine.packing import PackedGPT
from vqfast.testing import compare, tolerances

BENCH = Path(__file__).resolve().parent.parent / "bench"
NAMES = ("ant", "bee", "cat")
RECIPE = "data:\n  val_fraction: 0.4\n"


@pytest.fixture
def quality(monkeypatch):
    """bench/quality.py, on the path as `python bench/run.py` puts it."""
    monkeypatch.syspath_prepend(str(BENCH))
    import quality

    return quality


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """36 pictures in three classes, and the recipe that holds some of them out."""
    folder, rng = tmp_path_factory.mktemp("quality"), np.random.default_rng(1)
    for i in range(36):
        path = folder / "data" / NAMES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images.save_png(images.array_to_image(rng.integers(0, 255, (16, 16, 3), np.uint8)), path)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    return Pipeline.from_pretrained(tiny_pipeline)


def _batch(n=5, T=12):
    g = torch.Generator().manual_seed(7)
    return torch.randint(16, (n, T), generator=g), torch.randint(3, (n, 1), generator=g)


def _nats(logits, idx):
    """Mean of -log softmax of the codes, written out."""
    total = 0.0
    for row, code in zip(logits.flatten(0, 1).tolist(), idx.flatten().tolist(), strict=True):
        top = max(row)
        total += top + math.log(math.fsum(math.exp(x - top) for x in row)) - row[code]
    return total / idx.numel()


def test_float32_has_the_loss_of_float64(quality, pipe, each_backend):
    idx, cond = _batch()
    found = quality.measure(pipe.transformer, idx, cond, ["fp32"])["fp32"]
    assert found["loss"] == 0 and found["agreement"] == 1 and found["divergence"] == 0
    gpt = PackedGPT.of(pipe.transformer, "fp32").to_gpt().double()
    with torch.no_grad(), vqfast.backend("reference"):
        exact = torch.tensor(_nats(gpt(idx, cond), idx), dtype=torch.float64)
        plain = pipe.transformer.loss(idx, cond).double()
    out = torch.tensor(found["nats"], dtype=torch.float64)
    assert compare.budget_ratio(out, plain, exact, tolerances.FORWARD) <= 1
    assert compare.budget_ratio(out * 1.0001, plain, exact, tolerances.FORWARD) > 1


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_figures_are_those_of_the_engine_on_every_prefix(quality, pipe, precision, monkeypatch):
    monkeypatch.setattr(quality, "_ROWS", 2)  # three batches
    idx, cond = _batch()
    found = quality.measure(pipe.transformer, idx, cond, ["fp32", precision])[precision]
    logits = {}
    for name in ("fp32", precision):
        engine = Engine(pipe.transformer, name, batch=5)
        fed = torch.cat([cond, idx], 1)
        rows = [engine.prefill(fed[:, : t + 1]) for t in range(idx.shape[1])]
        logits[name] = torch.stack(rows, 1).double()
    ours, exact = logits[precision], logits["fp32"]
    nats = _nats(ours, idx)
    p, q = exact.softmax(-1), ours.softmax(-1)
    expected = {
        "nats": nats,
        "loss": nats / _nats(exact, idx) - 1,
        "agreement": float((ours.argmax(-1) == exact.argmax(-1)).double().mean()),
        "divergence": float((p * (p / q).log()).sum(-1).mean()),
    }
    assert found.keys() == expected.keys() and found["divergence"] > 0
    for name, value in expected.items():
        # differences of sums: float64 to the size of what they are made of
        assert abs(found[name] - value) < 1e3 * tolerances.EPS[torch.float64] * nats, name


def test_figures_see_what_is_wrong(quality):
    idx, _ = _batch()
    exact = torch.nn.functional.one_hot(idx, 16).double() * 9
    right = quality.figures(exact, exact, idx)
    assert right["agreement"] == right["codes"] == 60 and right["divergence"] == 0
    ours = exact.clone()
    ours[0, 3] = ours[0, 3].roll(1)
    off = quality.figures(ours, exact, idx)
    assert off["agreement"] == 59 and off["divergence"] > 8
    assert off["nats"] - off["exact_nats"] == pytest.approx(9)
    assert off["exact_nats"] == right["nats"]


def test_examples_are_what_the_recipe_holds_out(quality, pipe, pictures):
    source = open_source(pictures / "data")
    held = held_out(source, 0.4)
    assert 5 < held.sum() < 31
    for case, chosen in (("held_out", held), ("learned", ~held)):
        idx, cond = quality.examples(pipe, pictures / "recipe.yaml", pictures / "data", case)
        numbers = np.flatnonzero(chosen)
        assert len(idx) == len(numbers) and idx.shape[1] == 64
        assert cond.flatten().tolist() == [source.label(i) for i in numbers]
        for i, codes in zip(numbers[:4], idx, strict=False):
            x = images.to_tensor(images.load_image(pictures / "data" / source.name(i).decode()))
            with torch.no_grad():
                assert torch.equal(pipe.tokenizer.encode(x[None])[0].flatten(), codes)


def test_learned_pictures_are_spread_over_the_data(quality, pipe, pictures, monkeypatch):
    monkeypatch.setattr(quality, "_LEARNED", 5)
    args = (pipe, pictures / "recipe.yaml", pictures / "data", "learned")
    few, _ = quality.examples(*args)
    monkeypatch.setattr(quality, "_LEARNED", 10**6)
    everything, _ = quality.examples(*args)
    n = len(everything)
    assert torch.equal(few, everything[[i * n // 5 for i in range(5)]])


def test_codes_serve_like_their_pictures(quality, pipe, pictures, tmp_path):
    from vqfast.data.codes import save_codes

    idx, cond = quality.examples(pipe, pictures / "recipe.yaml", pictures / "data", "learned")
    save_codes(tmp_path / "c.safetensors", idx.view(-1, 8, 8), cond.flatten(), n_codes=16)
    (tmp_path / "all.yaml").write_text("data:\n  val_fraction: 0.0\n")
    again = quality.examples(pipe, tmp_path / "all.yaml", tmp_path / "c.safetensors", "learned")
    assert torch.equal(again[0], idx) and torch.equal(again[1], cond)
    with pytest.raises(ValueError, match="held out"):
        quality.examples(pipe, tmp_path / "all.yaml", tmp_path / "c.safetensors", "held_out")


def test_the_shipped_model_keeps_its_loss_on_held_out_pictures(quality, shared_data):
    pipe = Pipeline.from_pretrained(quality.MODEL)
    data = Path(shared_data) / "noto_emoji128.tar"
    idx, cond = quality.examples(pipe, quality.RECIPE, data, "held_out")
    found = quality.measure(pipe.transformer, idx, cond, quality.PRECISIONS)
    assert len(idx) == 40 and found["fp32"]["nats"] == pytest.approx(8.95, abs=0.005)  # its README
    for precision, goal in {"bf16": 0.001, **quality.GOALS}.items():
        assert 0 < abs(found[precision]["loss"]) <= goal, precision


def test_a_missed_goal_is_said(quality):
    assert "within 0.5 %" in quality._verdict("held_out", "int8", {"loss": -0.005})
    assert "NOT within 0.5 %" in quality._verdict("held_out", "int8", {"loss": -0.0051})
    assert "NOT within 2 %" in quality._verdict("held_out", "int4", {"loss": 0.021})
    assert quality._verdict("learned", "int4", {"loss": 0.5}) == ""


def test_the_bench_prints_rows_and_refuses_what_it_cannot_do(
    quality, pictures, tiny_pipeline, capsys, tmp_path
):
    import run

    common = ["--suite", "quality", "--no-gate", "--json", "--model", str(tiny_pipeline)]
    common += ["--config", str(pictures / "recipe.yaml")]
    assert run.main([*common, "--data", str(pictures / "data"), "--case", "held_out"]) == 0
    out, _ = capsys.readouterr()
    line = json.loads(out)
    assert line["gate"] == "UNVERIFIED"
    assert [r["dtype"] for r in line["rows"]] == ["fp32", "bf16", "int8", "int4"]
    for row in line["rows"]:
        assert row["quality"].keys() == {"nats", "loss", "agreement", "divergence"}
        assert "p50" not in row and "UNVERIFIED" in row["note"]
    assert "within" in line["rows"][2]["note"]
    for wrong, said in (
        ([], "--data"),
        (["--data", str(tmp_path / "absent")], "absent"),
        (["--data", str(pictures / "data"), "--case", "gpt"], "held_out, learned"),
        (["--data", str(pictures / "data"), "--dtype", "int3"], "int3"),
    ):
        assert run.main([*common, *wrong]) == 2
        assert said in capsys.readouterr().err
    packed = tmp_path / "packed"
    vqfast.Pipeline.from_pretrained(tiny_pipeline).save_pretrained(packed, precision="int8")
    common[common.index("--model") + 1] = str(packed)
    assert run.main([*common, "--data", str(pictures / "data")]) == 2
    assert "precision must be int8" in capsys.readouterr().err
