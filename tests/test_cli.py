"""The command line: exit codes, one-line errors, whole files, and what the verbs write."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vqfast
from vqfast import cli, config, images, metrics
from vqfast.cli import _models, _parser
from vqfast.errors import NonFiniteError

VERBS = ["sample", "reconstruct", "encode", "decode", "train", "eval", "convert", "info", "check"]
TINY = {
    "ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (), "resolution": 16,
    "z_channels": 8, "n_embed": 16, "embed_dim": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of a random tokenizer: 2 pixels per code, 16 codes."""
    torch.manual_seed(1)
    model = vqfast.VQGAN(vqfast.VQGANConfig(**TINY))
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, tokenizer):
    """Folder of a random class-conditional pipeline: 16 x 16 images, classes ant, bee, cat."""
    from vqfast.models import conditioning

    torch.manual_seed(2)
    first = vqfast.VQGAN.from_pretrained(tokenizer)
    gpt = vqfast.GPT(vqfast.GPTConfig(16, 64, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(0, 0.3)
    condition = conditioning.build(
        {"kind": "class", "n_classes": 3, "class_names": ["ant", "bee", "cat"]}, first
    )
    folder = tmp_path_factory.mktemp("models") / "pipeline"
    vqfast.Pipeline(first, gpt, condition).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two 20 x 28 PNGs."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for i in range(2):
        small = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))
        paths.append(folder / f"{i}.png")
        small.resize((28, 20), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """run(*arguments) -> (exit code, stdout, stderr), in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


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


# ---- usage


def test_help_names_every_verb_and_loads_no_torch():
    code = "import sys, vqfast.cli as c; c.main(['--help']); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "False", ran.stderr
    assert all(verb in ran.stdout for verb in VERBS)


@pytest.mark.parametrize(
    "verb", [*([v] for v in VERBS), ["train", "tokenizer"], ["train", "transformer"]]
)
def test_every_verb_explains_itself(run, verb):
    code, out, err = run(*verb, "--help")
    assert code == 0 and out.startswith(f"usage: vqfast {' '.join(verb)}") and not err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "VERB"),
        (["paint"], "paint"),
        (["sample", "--colour", "red"], "--colour"),
        (["sample", "--see", "1"], "--see"),  # no guessing of abbreviations
        (["sample", "-n", "-1"], "-1"),
        (["sample", "-n", "two"], "integer"),
        (["sample", "-n", "1e3"], "integer"),
        (["sample", "-t", "nan"], "finite"),
        (["sample", "-t", "inf"], "finite"),
        (["sample", "-t", "-1"], "negative"),
        (["sample", "-p", "1.5"], "at most 1"),
        (["sample", "-p", "0"], "above 0"),
        (["sample", "-k", "0"], "at least 1"),
        (["sample", "--seed", "-1"], "--seed"),
        (["sample", "--seed", str(2**64)], "--seed"),
        (["sample", "--batch-size", "0"], "--batch-size"),
        (["sample", "--size", "0x-4"], "--size"),
        (["sample", "--size", "0x4"], "--size"),
        (["sample", "--precision", "fp7"], "fp7"),
        (["sample", "--device", "gpu9"], "gpu9"),
        (["sample", "--classes", "1,,2"], "--classes"),
        (["sample", "--grid", "x.png", "-n", "100000"], "--grid"),
        (["reconstruct"], "IMAGE"),
        (["decode"], "FILE"),
        (["train"], "STAGE"),
        (["train", "tokenizer"], "CONFIG"),
        (["train", "tokenizer", "c.yaml", "--nope", "a.b=1"], "--nope"),
        (["train", "tokenizer", "no.yaml"], "no.yaml"),
        (["convert", "a"], "DST"),
        (["convert", "a", "b", "--to", "onnx"], "native, taming"),
        (["convert", "a", "b", "--from", "onnx"], "--from"),
        (["eval"], "--real"),
        (["eval", "--real", "x", "--weights", "y"], "KIND=FILE"),
        (["check", "--op", "nope"], "--op"),
    ],
)
def test_bad_usage_is_exit_2_one_line_and_writes_nothing(run, tmp_path, arguments, says):
    code, out, err = run(*arguments)
    assert code == 2 and not out and complains(err, says), err
    assert not listing(tmp_path)


def test_flags_take_dashes_or_underscores():
    a = _parser.parse(["sample", "--batch_size", "3", "--cfg_scale=1.5", "--out", "a_b"])
    b = _parser.parse(["sample", "--batch-size", "3", "--cfg-scale=1.5", "--out", "a_b"])
    assert a == b and a.batch_size == 3 and a.out == "a_b"


def test_sizes_and_classes_are_read_as_written():
    args = _parser.parse(["sample", "--size", "16x32", "--classes", "1,fish, 2"])
    assert args.size == (16, 32) and args.classes == [1, "fish", 2]
    assert _parser.parse(["sample", "--size", "64"]).size == (64, 64)


# ---- failures while running


def test_failures_are_exit_1_one_line_and_write_nothing(run, tmp_path, tokenizer, pictures):
    (tmp_path / "junk.ckpt").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    before = listing(tmp_path)
    model = ("--model", tokenizer)
    table = [
        (["sample", "--model", "nothing", "--out", "x"], "CheckpointError", "nothing"),
        (["sample", "--model", "junk.ckpt", "--out", "x"], "CheckpointError", "junk.ckpt"),
        (["sample", *model, "--out", "x"], "CheckpointError", "a pipeline is needed"),
        (["encode", "no.png", *model, "--out", "x"], "DataError", "no.png"),
        (["encode", pictures[0], "empty.png", *model, "--out", "x"], "DataError", "empty.png"),
        (["encode", "pipe.png", *model, "--out", "x"], "DataError", "regular file"),
        (["decode", "junk.ckpt", *model, "--out", "x"], "DataError", "junk.ckpt"),
        (["decode", "pipe.png", *model, "--out", "x"], "DataError", "regular file"),
        (["decode", "no.safetensors", *model, "--out", "x"], "DataError", "no.safetensors"),
        (["eval", "--real", "nowhere", *model], "DataError", "nowhere"),
        (["convert", "pipe.png", "x"], "CheckpointError", "pipe.png"),
    ]
    for arguments, *says in table:
        code, out, err = run(*arguments)
        assert code == 1 and not out and complains(err, *says), (arguments, err)
        assert listing(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_line_and_auto_says_it_falls_back(run, tokenizer, pictures):
    for device in ("cuda", "cuda:7"):
        code, _, err = run("encode", pictures[0], "--model", tokenizer, "--device", device)
        assert code == 1 and complains(err, "BackendError", device)
    code, _, err = run("encode", pictures[0], "--model", tokenizer)
    assert code == 0 and err.count("no GPU found") == 1


def test_an_unforeseen_error_is_one_line_with_its_place(run, monkeypatch):
    def broken():
        return {}["key"]

    monkeypatch.setattr(vqfast, "info", broken)
    code, out, err = run("info")
    assert code == 1 and not out and complains(err, "KeyError", ".py:")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_signals_leave_finished_images_and_no_half_ones(
    run, tmp_path, monkeypatch, pipeline, number, code
):
    save, count = images.save_png, []

    def third_time_lucky(image, path):
        count.append(path)
        if len(count) == 3:
            os.kill(os.getpid(), number)
        save(image, path)

    monkeypatch.setattr("vqfast.cli.sample.save_png", third_time_lucky)
    before = signal.getsignal(signal.SIGTERM)
    got, out, err = run("sample", "--model", pipeline, "-n", 10**9, "--out", "o", "--batch-size", 2)
    assert got == code and not out and err.splitlines()[-1].startswith("vqfast: ")
    assert listing(tmp_path / "o") == ["000000000.png", "000000001.png"]
    assert all(pixels(p).shape == (16, 16, 3) for p in (tmp_path / "o").iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_leaves_is_no_error(monkeypatch, capfd):
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["--help"]) == 0
        assert cli.main(["info", "--json"]) == 0
    assert "Traceback" not in capfd.readouterr().err


# ---- sample


def test_sample_writes_images_that_depend_on_seed_and_number_alone(run, tmp_path, pipeline):
    base = ("sample", "--model", pipeline, "-n", 5, "--classes", "ant,2")
    runs = {
        "a": ["--seed", 3, "--json"],
        "b": ["--seed", 3, "--batch-size", 1],
        "c": ["--seed", 3, "--batch_size", 2],
        "other": ["--seed", 4],
    }
    for name, more in runs.items():
        code, out, _ = run(*base, *more, "--out", name)
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


def test_sample_agrees_with_the_api(run, tmp_path, pipeline):
    assert run("sample", "--model", pipeline, "-n", 3, "--seed", 9, "-k", 5, "--out", "o")[0] == 0
    pipe = vqfast.Pipeline.from_pretrained(pipeline)
    for i, image in enumerate(pipe.sample(n=3, seed=9, top_k=5)):
        assert np.array_equal(np.array(image), pixels(tmp_path / "o" / f"{i:06d}.png"))


def test_existing_output_is_refused_and_overwrite_replaces_all_of_it(run, tmp_path, pipeline):
    base = ("sample", "--model", pipeline, "--out", "o")
    assert run(*base, "-n", 3)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    code, _, err = run(*base, "-n", 2, "--seed", 5)
    assert code == 1 and complains(err, "exists", "--overwrite")
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()} == before
    assert run(*base, "-n", 2, "--seed", 5, "--overwrite")[0] == 0
    assert listing(tmp_path / "o") == ["000000.png", "000001.png"]
    assert (tmp_path / "o/000000.png").read_bytes() != before["000000.png"]
    assert listing(tmp_path) == ["o"]


def test_overwrite_never_takes_a_folder_that_holds_other_things(run, tmp_path, pipeline):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    code, _, err = run("sample", "--model", pipeline, "-n", 1, "--out", "home", "--overwrite")
    assert code == 1 and complains(err, "thesis.txt")
    assert listing(tmp_path / "home") == ["thesis.txt"]


def test_an_interrupted_overwrite_keeps_the_old_images(run, tmp_path, monkeypatch, pipeline):
    base = ("sample", "--model", pipeline, "--out", "o", "-n", 2)
    assert run(*base)[0] == 0
    before = [p.read_bytes() for p in sorted((tmp_path / "o").iterdir())]

    def interrupted(image, path):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqfast.cli.sample.save_png", interrupted)
    assert run(*base, "--seed", 1, "--overwrite")[0] == 130
    assert [p.read_bytes() for p in sorted((tmp_path / "o").iterdir())] == before
    assert listing(tmp_path) == ["o"]


def test_grid_is_one_sheet_of_the_same_images(run, tmp_path, pipeline):
    code, _, _ = run("sample", "--model", pipeline, "-n", 4, "--grid", "g.png", "--out", "o")
    assert code == 0
    sheet = pixels(tmp_path / "g.png")
    for i, (y, x) in enumerate([(2, 2), (2, 20), (20, 2), (20, 20)]):
        one = pixels(tmp_path / "o" / f"{i:06d}.png")
        assert np.array_equal(sheet[y : y + 16, x : x + 16], one)
    assert run("sample", "--model", pipeline, "-n", 4, "--grid", "h.png")[0] == 0
    assert listing(tmp_path) == ["g.png", "h.png", "o"]


def test_no_images_are_no_error(run, tmp_path, pipeline):
    code, out, _ = run("sample", "--model", pipeline, "-n", 0, "--out", "o", "--json")
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
def test_what_the_model_cannot_do_is_bad_usage(run, tmp_path, pipeline, arguments):
    code, _, err = run("sample", "--model", pipeline, "-n", 1, "--out", "o", *arguments)
    assert code == 2 and complains(err) and not (tmp_path / "o").exists()


def test_images_are_written_before_the_next_batch_is_drawn(run, tmp_path, monkeypatch, pipeline):
    counts, draw = [], vqfast.Engine.generate

    def spy(self, *args, **options):
        counts.append(len(listing(tmp_path / "o")))
        return draw(self, *args, **options)

    monkeypatch.setattr(vqfast.Engine, "generate", spy)
    assert run("sample", "--model", pipeline, "-n", 7, "--batch-size", 3, "--out", "o")[0] == 0
    assert counts == [0, 3, 6]


# ---- pictures and codes


def test_encode_decode_and_reconstruct_show_the_same_pixels(run, tmp_path, tokenizer, pictures):
    model = ("--model", tokenizer)
    code, out, _ = run("encode", *pictures, *model, "--out", "c.safetensors", "--json")
    assert code == 0 and json.loads(out)["grids"] == [[10, 14], [10, 14]]
    grids = list(load_file(tmp_path / "c.safetensors").values())
    assert all(g.dtype == torch.int32 and g.shape == (10, 14) for g in grids)
    assert run("decode", "c.safetensors", *model, "--out", "d")[0] == 0
    assert listing(tmp_path / "d") == ["000000.png", "000001.png"]
    code, out, _ = run("reconstruct", *pictures, *model, "--out", "r.png", "--json")
    said = json.loads(out)
    assert code == 0 and len(said["images"]) == 2
    sheet = pixels(tmp_path / "r.png")
    for i, path in enumerate(pictures):
        y, given, decoded = 2 + 22 * i, pixels(path), pixels(tmp_path / "d" / f"{i:06d}.png")
        assert np.array_equal(sheet[y : y + 20, 2:30], given)
        assert np.array_equal(sheet[y : y + 20, 32:60], decoded)
        a, b = (images.to_tensor(Image.fromarray(v))[None] for v in (given, decoded))
        assert said["images"][i]["psnr"] == pytest.approx(float(metrics.psnr(a, b)))
        assert said["images"][i]["ssim"] == pytest.approx(float(metrics.ssim(a, b)))
    counts = torch.bincount(torch.cat([g.flatten() for g in grids]).long(), minlength=16)
    assert said["usage"] == pytest.approx(float((counts > 0).double().mean()))
    assert said["perplexity"] == pytest.approx(metrics.perplexity(counts))


def test_size_resizes_and_odd_pictures_lose_a_margin(run, tokenizer, tmp_path, pictures):
    odd = tmp_path / "odd.png"
    Image.open(pictures[0]).crop((0, 0, 27, 19)).save(odd)
    model = ("--model", tokenizer)
    code, out, _ = run("encode", odd, pictures[0], *model, "--out", "a", "--json")
    assert code == 0 and json.loads(out)["grids"] == [[9, 13], [10, 14]]
    code, out, _ = run("encode", odd, *model, "--size", "16x8", "--out", "b", "--json")
    assert code == 0 and json.loads(out)["grids"] == [[8, 4]]
    code, _, err = run("encode", odd, *model, "--size", "15x8", "--out", "c")
    assert code == 2 and complains(err, "multiples of 2")


def test_codes_of_another_tokenizer_or_out_of_range_are_refused(run, tmp_path, tokenizer):
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
        code, _, err = run("decode", name, "--model", tokenizer, "--out", "o")
        assert code == 1 and complains(err, "DataError", says), err
    assert not (tmp_path / "o").exists()


def test_a_pipeline_serves_as_its_tokenizer(run, tmp_path, tokenizer, pipeline, pictures):
    for name, model in (("a", tokenizer), ("b", pipeline)):
        assert run("encode", pictures[0], "--model", model, "--out", name)[0] == 0
    assert torch.equal(load_file(tmp_path / "a")["000000"], load_file(tmp_path / "b")["000000"])


def test_eval_of_reconstructions_is_the_mean_over_pictures(run, tokenizer, pictures):
    (pictures[0].parent / "broken.png").write_bytes(b"no picture")
    try:
        arguments = ("--real", pictures[0].parent, "--model", tokenizer, "--size", "20x28")
        code, out, err = run("eval", *arguments, "--json")
    finally:
        (pictures[0].parent / "broken.png").unlink()
    assert code == 0 and "broken.png" in err
    said = json.loads(out)
    assert said["images"] == 2 and said["skipped"] == 1
    code, out, _ = run("reconstruct", *pictures, "--model", tokenizer, "--json")
    for key in ("usage", "perplexity"):
        assert said[key] == pytest.approx(json.loads(out)[key], rel=1e-6)
    assert said["psnr"] == pytest.approx(json.loads(out)["psnr_mean"], rel=1e-3)


def test_eval_of_two_sets_needs_a_network_and_says_its_name(run, pictures, shared_data):
    folder = pictures[0].parent
    code, _, err = run("eval", "--real", folder, "--fake", folder)
    assert code == 2 and complains(err, "--weights")
    weights = f"squeeze={shared_data}/weights/squeezenet1_1_tvformat_fp32.safetensors"
    code, out, _ = run("eval", "--real", folder, "--fake", folder, "--weights", weights, "--json")
    assert code == 0
    said = json.loads(out)
    assert said["fd_squeeze"] == pytest.approx(0, abs=1e-3) and "fid" not in said


# ---- the rest


def test_info_and_check_print_one_object(run):
    code, out, _ = run("info", "--json")
    assert code == 0 and json.loads(out)["torch"] == torch.__version__
    code, out, _ = run("check", "--op", "nearest", "--device", "cpu", "--json")
    said = json.loads(out)
    assert code == 0 and said["failed"] == 0 and said["passed"] == len(said["rows"])


def test_check_fails_when_a_kernel_does(run, monkeypatch):
    from vqfast.testing import Row

    rows = [
        Row("nearest", "tiny", "float32", "cpu", True, 0.5),
        Row("nearest", "tiny", "float16", "cpu", False, float("inf"), "3 differ"),
    ]
    monkeypatch.setattr("vqfast.cli.check.check_ops", lambda device, op: iter(rows))
    code, out, _ = run("check", "--device", "cpu", "--json")
    assert code == 1 and json.loads(out)["rows"][1]["error"] is None
    code, out, _ = run("check", "--device", "cpu")
    assert code == 1 and "3 differ" in out and "1 passed, 1 failed" in out


def test_train_hands_everything_over(run, monkeypatch):
    from vqfast.train import tokenizer, transformer

    calls = []

    def fake(path, overrides, **options):
        calls.append((path, overrides, options))
        return 143

    monkeypatch.setattr(tokenizer, "run", fake)
    monkeypatch.setattr(transformer, "run", fake)
    more = ("--data", "d=1", "--out", "o", "--max_steps", 5, "--device", "cpu", "--dry-run")
    assert run("train", "tokenizer", "c.yaml", "a.b=1", *more, "c.d=x=y")[0] == 143
    path, overrides, options = calls[0]
    assert path == "c.yaml" and overrides == ["a.b=1", "c.d=x=y"]
    assert options == {
        "data": "d=1", "out": "o", "resume": "auto", "max_steps": 5, "device": "cpu",
        "precision": None, "dry_run": True, "print_config": False,
    }  # fmt: skip
    assert run("train", "transformer", "c.yaml", "--tokenizer", "t")[0] == 143
    assert calls[1][2]["tokenizer"] == "t"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (config.ConfigError("model.n_embedd: unknown key"), 2, "model.n_embedd"),
        (NonFiniteError("rec is nan"), 1, "NonFiniteError: rec"),
        (OSError(28, "No space left on device", "o/last"), 1, "o/last: No space"),
        (MemoryError(), 1, "memory"),
    ],
)
def test_errors_of_a_training_become_exit_codes(run, monkeypatch, error, code, says):
    from vqfast.train import tokenizer

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(tokenizer, "run", fail)
    got, out, err = run("train", "tokenizer", "c.yaml")
    assert got == code and not out and complains(err, says)


def test_the_default_model_is_the_shipped_one(monkeypatch, tmp_path):
    shipped = os.path.join(os.path.dirname(vqfast.__file__), "assets", "emoji64")
    if os.path.isdir(shipped):
        assert str(_models.model_path(None)) == shipped
    monkeypatch.setattr(vqfast, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(vqfast.CheckpointError, match="emoji64"):
        _models.model_path(None)
