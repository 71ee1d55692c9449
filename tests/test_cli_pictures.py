"""The verbs that draw, encode and measure: what they write, and that they agree."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vqfast
from vqfast import images, metrics
from vqfast.data.codes import open_codes
from vqfast.models import tiled


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def listing(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else None


def complains(err, *parts):
    """One line on stderr, from us, that holds every part."""
    lines = [x for x in err.splitlines() if "no GPU found" not in x]
    return (
        len(lines) == 1 and lines[0].startswith("vqfast: error: ") and all(p in err for p in parts)
    )


# ---- sample


def test_sample_writes_images_that_depend_on_seed_and_number_alone(
    run_cli, tmp_path, tiny_pipeline
):
    base = ("sample", "--model", tiny_pipeline, "-n", 5, "--classes", "ant,2")
    runs = {
        "a": ["--seed", 3, "--json"],
        "b": ["--seed", 3, "--batch-size", 1],
        "c": ["--seed", 3, "--batch_size", 2],
        "other": ["--seed", 4],
    }
    for name, more in runs.items():
        code, out, _ = run_cli(*base, *more, "--out", name)
        assert code == 0
        if name == "a":
            said = json.loads(out)
            assert said["n"] == 5 and said["seed"] == 3 and said["out"] == "a"
    assert listing(tmp_path / "a") == [f"{i:06d}.png" for i in range(5)]
    bytes_of = {
        name: [p.read_bytes() for p in sorted((tmp_path / name).iterdir())] for name in runs
    }
    assert bytes_of["a"] == bytes_of["b"] == bytes_of["c"]
    assert not set(bytes_of["a"]) & set(bytes_of["other"])
    assert len(set(bytes_of["a"])) == 5


def test_sample_agrees_with_the_api(run_cli, tmp_path, tiny_pipeline):
    assert (
        run_cli("sample", "--model", tiny_pipeline, "-n", 3, "--seed", 9, "-k", 5, "--out", "o")[0]
        == 0
    )
    pipe = vqfast.Pipeline.from_pretrained(tiny_pipeline)
    for i, image in enumerate(pipe.sample(n=3, seed=9, top_k=5)):
        assert np.array_equal(np.array(image), pixels(tmp_path / "o" / f"{i:06d}.png"))


def test_existing_output_is_refused_and_overwrite_replaces_all_of_it(
    run_cli, tmp_path, tiny_pipeline
):
    base = ("sample", "--model", tiny_pipeline, "--out", "o")
    assert run_cli(*base, "-n", 3)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    code, _, err = run_cli(*base, "-n", 2, "--seed", 5)
    assert code == 1 and complains(err, "exists", "--overwrite")
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()} == before
    assert run_cli(*base, "-n", 2, "--seed", 5, "--overwrite")[0] == 0
    assert listing(tmp_path / "o") == ["000000.png", "000001.png"]
    assert (tmp_path / "o/000000.png").read_bytes() != before["000000.png"]
    assert listing(tmp_path) == ["o"]


def test_overwrite_never_takes_a_folder_that_holds_other_things(run_cli, tmp_path, tiny_pipeline):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    code, _, err = run_cli(
        "sample", "--model", tiny_pipeline, "-n", 1, "--out", "home", "--overwrite"
    )
    assert code == 1 and complains(err, "thesis.txt")
    assert listing(tmp_path / "home") == ["thesis.txt"]


def test_an_interrupted_overwrite_keeps_the_old_images(
    run_cli, tmp_path, monkeypatch, tiny_pipeline
):
    base = ("sample", "--model", tiny_pipeline, "--out", "o", "-n", 2)
    assert run_cli(*base)[0] == 0
    before = [p.read_bytes() for p in sorted((tmp_path / "o").iterdir())]

    def interrupted(image, path):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqfast.cli.sample.save_png", interrupted)
    assert run_cli(*base, "--seed", 1, "--overwrite")[0] == 130
    assert [p.read_bytes() for p in sorted((tmp_path / "o").iterdir())] == before
    assert listing(tmp_path) == ["o"]


def test_grid_is_one_sheet_of_the_same_images(run_cli, tmp_path, tiny_pipeline):
    code, _, _ = run_cli(
        "sample", "--model", tiny_pipeline, "-n", 4, "--grid", "g.png", "--out", "o"
    )
    assert code == 0
    sheet = pixels(tmp_path / "g.png")
    for i, (y, x) in enumerate([(2, 2), (2, 20), (20, 2), (20, 20)]):
        one = pixels(tmp_path / "o" / f"{i:06d}.png")
        assert np.array_equal(sheet[y : y + 16, x : x + 16], one)
    assert run_cli("sample", "--model", tiny_pipeline, "-n", 4, "--grid", "h.png")[0] == 0
    assert listing(tmp_path) == ["g.png", "h.png", "o"]


def test_no_images_are_no_error(run_cli, tmp_path, tiny_pipeline):
    code, out, _ = run_cli("sample", "--model", tiny_pipeline, "-n", 0, "--out", "o", "--json")
    assert code == 0 and json.loads(out)["n"] == 0 and not listing(tmp_path / "o")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--classes", "-5"],
        ["--classes", "3"],
        ["--classes", "dog"],
        ["--size", "17x16"],
        ["--cfg-scale", "2"],
    ],
)
def test_what_the_model_cannot_do_is_bad_usage(run_cli, tmp_path, tiny_pipeline, arguments):
    code, _, err = run_cli("sample", "--model", tiny_pipeline, "-n", 1, "--out", "o", *arguments)
    assert code == 2 and complains(err) and not (tmp_path / "o").exists()


def test_images_are_written_before_the_next_batch_is_drawn(
    run_cli, tmp_path, monkeypatch, tiny_pipeline
):
    counts, draw = [], vqfast.Engine.generate

    def spy(self, *args, **options):
        counts.append(len(list((tmp_path / "o").glob("*.png"))))
        return draw(self, *args, **options)

    monkeypatch.setattr(vqfast.Engine, "generate", spy)
    assert (
        run_cli("sample", "--model", tiny_pipeline, "-n", 7, "--batch-size", 3, "--out", "o")[0]
        == 0
    )
    assert counts == [0, 3, 6]


# ---- pictures and codes


def test_encode_decode_and_reconstruct_show_the_same_pixels(
    run_cli, tmp_path, tiny_tokenizer, two_pictures
):
    model = ("--model", tiny_tokenizer)
    code, out, _ = run_cli("encode", *two_pictures, *model, "--out", "c.safetensors", "--json")
    assert code == 0 and json.loads(out)["grids"] == [[10, 14], [10, 14]]
    grids = load_file(tmp_path / "c.safetensors")["codes"]
    assert grids.dtype == torch.int16 and grids.shape == (2, 10, 14)
    assert torch.equal(open_codes(tmp_path / "c.safetensors").codes[:, 0], grids)
    assert run_cli("decode", "c.safetensors", *model, "--out", "d")[0] == 0
    assert listing(tmp_path / "d") == ["000000.png", "000001.png"]
    code, out, _ = run_cli("reconstruct", *two_pictures, *model, "--out", "r.png", "--json")
    said = json.loads(out)
    assert code == 0 and len(said["images"]) == 2
    sheet = pixels(tmp_path / "r.png")
    for i, path in enumerate(two_pictures):
        y, given, decoded = 2 + 22 * i, pixels(path), pixels(tmp_path / "d" / f"{i:06d}.png")
        assert np.array_equal(sheet[y : y + 20, 2:30], given)
        assert np.array_equal(sheet[y : y + 20, 32:60], decoded)
        a, b = (images.to_tensor(Image.fromarray(v))[None] for v in (given, decoded))
        assert said["images"][i]["psnr"] == pytest.approx(float(metrics.psnr(a, b)))
        assert said["images"][i]["ssim"] == pytest.approx(float(metrics.ssim(a, b)))
    counts = torch.bincount(grids.flatten().long(), minlength=16)
    assert said["usage"] == pytest.approx(float((counts > 0).double().mean()))
    assert said["perplexity"] == pytest.approx(metrics.perplexity(counts))


def test_size_resizes_and_odd_pictures_lose_a_margin(
    run_cli, tiny_tokenizer, tmp_path, two_pictures
):
    odd = tmp_path / "odd.png"
    Image.open(two_pictures[0]).crop((0, 0, 27, 19)).save(odd)
    model = ("--model", tiny_tokenizer)
    code, out, _ = run_cli("encode", odd, two_pictures[0], *model, "--out", "a", "--json")
    assert code == 0 and json.loads(out)["grids"] == [[9, 13], [10, 14]]
    assert list(load_file(tmp_path / "a")) == ["000000", "000001"]
    assert run_cli("decode", "a", *model, "--out", "d")[0] == 0
    assert pixels(tmp_path / "d/000001.png").shape == (20, 28, 3)
    code, out, _ = run_cli("encode", odd, *model, "--size", "16x8", "--out", "b", "--json")
    assert code == 0 and json.loads(out)["grids"] == [[8, 4]]
    code, _, err = run_cli("encode", odd, *model, "--size", "15x8", "--out", "c")
    assert code == 2 and complains(err, "multiples of 2")


@pytest.fixture
def wide_picture(tmp_path):
    """64 x 96 pixels: more than what its bands need."""
    rng = np.random.default_rng(0)
    images.save_png(
        images.array_to_image(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)), tmp_path / "w.png"
    )
    return tmp_path / "w.png"


def test_little_memory_gives_the_same_pictures_and_codes(
    run_cli, tmp_path, tiny_tokenizer, wide_picture, monkeypatch
):
    tok = vqfast.VQGAN.from_pretrained(tiny_tokenizer)
    limits = [
        tiled.least_memory(tok.encoder, (64, 96), 4), tiled.least_memory(tok.decoder, (32, 48), 4)
    ]  # fmt: skip
    runs = []
    follow = tiled._Run.follow
    monkeypatch.setattr(tiled._Run, "follow", lambda *a: (runs.append(1), follow(*a))[1])
    model = ("--model", tiny_tokenizer)
    least = str(max(limits))
    for name, more in (("a", ()), ("b", ("--max-memory", least))):
        assert run_cli("encode", wide_picture, *model, *more, "--out", f"{name}.st")[0] == 0
        assert run_cli("decode", "a.st", *model, *more, "--out", name)[0] == 0
        sheet = f"{name}.png"
        assert run_cli("reconstruct", wide_picture, *model, *more, "--out", sheet)[0] == 0
        assert len(runs) == (4 if more else 0)
    assert torch.equal(load_file("a.st")["codes"], load_file("b.st")["codes"])
    for a, b in (("a.png", "b.png"), ("a/000000.png", "b/000000.png")):
        assert abs(pixels(tmp_path / a).astype(int) - pixels(tmp_path / b)).max() <= 1


def test_too_little_memory_is_bad_usage_that_names_the_least(
    run_cli, tmp_path, tiny_tokenizer, wide_picture
):
    tok = vqfast.VQGAN.from_pretrained(tiny_tokenizer)
    encodes = tiled.least_memory(tok.encoder, (64, 96), 4)
    decodes = tiled.least_memory(tok.decoder, (32, 48), 4)
    model = ("--model", tiny_tokenizer)
    assert run_cli("encode", wide_picture, *model, "--out", "a.st")[0] == 0
    before = listing(tmp_path)
    for verb, source, least in (
        ("encode", wide_picture, encodes),
        ("decode", "a.st", decodes),
        ("reconstruct", wide_picture, max(encodes, decodes)),
    ):
        out = ("--out", "o")
        code, _, err = run_cli(verb, source, *model, *out, "--max-memory", str(least - 1))
        assert code == 2 and complains(err, f"--max-memory must be at least {least} bytes", "64x96")
        assert listing(tmp_path) == before


def test_codes_of_another_tokenizer_or_out_of_range_are_refused(run_cli, tmp_path, tiny_tokenizer):
    from safetensors.torch import save_file

    table = {
        "range": ({"a": torch.tensor([[16]])}, {}, "16"),
        "negative": ({"a": torch.tensor([[-1]])}, {}, "-1"),
        "float": ({"a": torch.ones(2, 2)}, {}, "integers"),
        "rank": ({"a": torch.ones(4, dtype=torch.int64)}, {}, r"[4]"),
        "other": ({"a": torch.ones(2, 2, dtype=torch.int64)}, {"n_codes": "99"}, "99"),
        "none": ({}, {}, "no codes"),
    }
    for name, (grids, said, says) in table.items():
        save_file(grids, tmp_path / name, metadata=said or None)
        code, _, err = run_cli("decode", name, "--model", tiny_tokenizer, "--out", "o")
        assert code == 1 and complains(err, "DataError", says), err
    assert not (tmp_path / "o").exists()


def test_a_pipeline_serves_as_its_tokenizer(
    run_cli, tmp_path, tiny_tokenizer, tiny_pipeline, two_pictures
):
    for name, model in (("a", tiny_tokenizer), ("b", tiny_pipeline)):
        assert run_cli("encode", two_pictures[0], "--model", model, "--out", name)[0] == 0
    assert torch.equal(load_file(tmp_path / "a")["codes"], load_file(tmp_path / "b")["codes"])


def test_eval_of_reconstructions_is_the_mean_over_pictures(run_cli, tiny_tokenizer, two_pictures):
    (two_pictures[0].parent / "broken.png").write_bytes(b"no picture")
    try:
        arguments = ("--real", two_pictures[0].parent, "--model", tiny_tokenizer, "--size", "20x28")
        code, out, err = run_cli("eval", *arguments, "--json")
    finally:
        (two_pictures[0].parent / "broken.png").unlink()
    assert code == 0 and "broken.png" in err
    said = json.loads(out)
    assert said["images"] == 2 and said["skipped"] == 1
    code, out, _ = run_cli("reconstruct", *two_pictures, "--model", tiny_tokenizer, "--json")
    for key in ("usage", "perplexity"):
        assert said[key] == pytest.approx(json.loads(out)[key], rel=1e-6)
    assert said["psnr"] == pytest.approx(json.loads(out)["psnr_mean"], rel=1e-3)


def test_eval_of_two_sets_needs_a_network_and_says_its_name(run_cli, two_pictures, shared_data):
    folder = two_pictures[0].parent
    code, _, err = run_cli("eval", "--real", folder, "--fake", folder)
    assert code == 2 and complains(err, "--weights")
    weights = f"squeeze={shared_data}/weights/squeezenet1_1_tvformat_fp32.safetensors"
    code, out, _ = run_cli(
        "eval", "--real", folder, "--fake", folder, "--weights", weights, "--json"
    )
    assert code == 0
    said = json.loads(out)
    assert said["fd_squeeze"] == pytest.approx(0, abs=1e-3) and "fid" not in said
