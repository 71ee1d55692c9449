"""`vqfast sample`: pictures to start from, progress, and runs that were interrupted."""

import io
import json
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import vqfast
from vqfast import images
from vqfast.cli._progress import SampleProgress
from vqfast.engine import Step
from vqfast.models import conditioning

REQUEST = "vqfast-request.json"


def listing(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else None


def complains(err, *parts):
    """One line on stderr, from us, that holds every part."""
    lines = [x for x in err.splitlines() if "no GPU found" not in x]
    return (
        len(lines) == 1 and lines[0].startswith("vqfast: error: ") and all(p in err for p in parts)
    )


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def same_images(folder, wanted):
    got = [np.array(Image.open(p)) for p in sorted(folder.glob("*.png"))]
    return len(got) == len(wanted) and all(map(np.array_equal, got, map(np.array, wanted)))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    """model(condition) -> (folder, pipeline): random, 16 x 16 images of 8 x 8 codes."""
    tokenizer, made = vqfast.VQGAN.from_pretrained(tiny_tokenizer), {}

    def make(condition):
        key = json.dumps(condition, sort_keys=True)
        if key not in made:
            torch.manual_seed(3)
            stage = conditioning.build(condition, tokenizer)
            length = stage.length((8, 8))
            gpt = vqfast.GPT(vqfast.GPTConfig(16, 63 + length, n_layer=1, n_head=2, n_embd=16))
            with torch.no_grad():
                for p in [*gpt.parameters()]:
                    p.normal_(0, 0.5)
                if condition["kind"] == "tokenizer":
                    stage.quantize.embedding.weight.normal_()
            folder = tmp_path_factory.mktemp("models") / "pipeline"
            vqfast.Pipeline(tokenizer, gpt, stage).save_pretrained(folder)
            made[key] = folder, vqfast.Pipeline.from_pretrained(folder)
        return made[key]

    return make


CLASSES = {"kind": "class", "n_classes": 3, "null_class": 3}


def stage_of(channels, tiny_tokenizer):
    config = vqfast.VQGAN.from_pretrained(tiny_tokenizer).config.to_dict()
    return {
        "kind": "tokenizer",
        "config": {**config, "in_channels": channels, "out_ch": channels},
    }


# ---- guidance


def test_the_interval_of_guidance_is_the_one_of_the_api(run_cli, tmp_path, model):
    folder, pipe = model(CLASSES)
    base = ("sample", "--model", folder, "-n", 3, "--seed", 5, "--cfg-scale", 9)
    spans = {"5:40": (5, 40), ":9": (0, 9), "30:": (30, 64)}
    for k, (text, span) in enumerate(spans.items()):
        assert run_cli(*base, "--cfg-interval", text, "--out", f"o{k}")[0] == 0
        wanted = pipe.sample(n=3, seed=5, cfg_scale=9.0, cfg_interval=span)
        assert same_images(tmp_path / f"o{k}", wanted)
    a, b, c = (contents(tmp_path / f"o{k}") for k in range(3))
    assert a != b != c != a


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cfg-interval", "1:4"], "--cfg-scale"),
        (["--cfg-scale", "2", "--cfg-interval", "4:1"], "begin before"),
        (["--cfg-scale", "2", "--cfg-interval", ":"], "BEGIN:END"),
        (["--cfg-scale", "2", "--cfg-interval", "64:"], "64"),
        (["--keep", "3"], "--complete"),
        (["--complete", "x.png", "--keep", "1.5"], "--keep"),
        (["--complete", "x.png", "--keep", "-1"], "--keep"),
        (["--complete", "x.png", "--keep", "nan"], "--keep"),
        (["--resume", "--overwrite"], "--resume"),
        (["--resume", "--grid", "g.png"], "--out"),
    ],
)
def test_flags_that_do_not_go_together(run_cli, tmp_path, model, arguments, says):
    code, _, err = run_cli("sample", "--model", model(CLASSES)[0], "-n", 1, *arguments)
    assert code == 2 and complains(err, says) and listing(tmp_path) == []


# ---- pictures to start from


@pytest.mark.parametrize(
    ("keep", "rows"),
    [([], 4), (["--keep", 3], 3), (["--keep", "0.3"], 2), (["--keep", "25%"], 2),
     (["--keep", "1.0"], 8), (["--keep", 1], 1), (["--keep", 0], 0)],
)  # fmt: skip
def test_completion_keeps_the_top_rows_of_codes(run_cli, tmp_path, model, two_pictures, keep, rows):
    folder, pipe = model(CLASSES)
    base = ("sample", "--model", folder, "-n", 3, "--classes", 1, "--complete", *two_pictures)
    assert run_cli(*base, *keep, "--out", "o")[0] == 0
    x = torch.stack([images.to_tensor(images.load_image(p), 16) for p in two_pictures])
    with torch.no_grad():
        given = pipe.tokenizer.encode(x)
    wanted = pipe.sample(n=3, classes=[1], prefix=given[:, :rows].flatten(1))
    assert same_images(tmp_path / "o", wanted)
    codes = pipe.sample_codes(n=3, classes=[1], prefix=given[:, :rows].flatten(1))
    for i in range(3):
        assert torch.equal(codes[i, :rows], given[i % 2, :rows])


def test_completion_says_what_is_wrong(run_cli, tmp_path, model, two_pictures):
    base = ("sample", "--model", model(CLASSES)[0], "--out", "o", "--complete")
    code, _, err = run_cli(*base, two_pictures[0], "--keep", 9)
    assert code == 2 and complains(err, "at most the 8 rows", "9")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code, _, err = run_cli(*base, two_pictures[0], "bad.png")
    assert code == 1 and complains(err, "DataError", "bad.png")
    assert listing(tmp_path) == ["bad.png"]


@pytest.fixture
def maps(tmp_path):
    """A map of labels 0..4 with a palette, one in grey, and a map of depths of 16 bits: 16 x 20."""
    rng = np.random.default_rng(1)
    labels = np.kron(rng.integers(0, 5, (4, 5)), np.ones((4, 4))).astype(np.uint8)
    palette = Image.fromarray(labels).convert("P")
    palette.putdata(labels.flatten().tolist())
    palette.putpalette([255, 0, 0] * 3 + [7, 8, 9] * 253)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(labels).save(tmp_path / "grey.png")
    depths = (labels.astype(np.uint16) * 10 + 1000).astype(np.uint16)
    Image.fromarray(depths).save(tmp_path / "depth.png")
    Image.fromarray(labels).convert("RGB").save(tmp_path / "rgb.png")
    return labels


def test_a_map_of_labels_conditions_by_its_numbers(run_cli, tmp_path, model, maps, tiny_tokenizer):
    folder, pipe = model(stage_of(5, tiny_tokenizer))
    x = torch.nn.functional.one_hot(torch.from_numpy(maps[:, 2:18]).long(), 5)
    with torch.no_grad():
        cond = pipe.conditioning.encode(x.permute(2, 0, 1)[None].float())
    wanted = pipe.sample(n=2, seed=1, cond=cond)
    for name in ("palette", "grey", "rgb"):
        base = ("sample", "--model", folder, "-n", 2, "--seed", 1, "--cond", f"{name}.png")
        assert run_cli(*base, "--out", name)[0] == 0
        assert same_images(tmp_path / name, wanted)
    Image.fromarray(maps + 1).save("shifted.png")
    code, _, err = run_cli("sample", "--model", folder, "--cond", "shifted.png", "--out", "o")
    assert code == 1 and complains(err, "DataError", "0..4", "..5")


def test_a_map_of_depths_is_stretched(run_cli, tmp_path, model, maps, tiny_tokenizer):
    folder, pipe = model(stage_of(1, tiny_tokenizer))
    depth = torch.from_numpy(maps.astype(np.float32)) / 2 - 1  # 1000..1040 of the file
    with torch.no_grad():
        cond = pipe.conditioning.encode(depth[None, None, :, 2:18])
    base = ("sample", "--model", folder, "-n", 2, "--out", "o", "--cond")
    assert run_cli(*base, "depth.png")[0] == 0
    assert same_images(tmp_path / "o", pipe.sample(n=2, cond=cond))
    images.save_png(
        images.array_to_image(np.eye(16, dtype=np.uint8)[..., None] * np.uint8([9, 0, 0])), "c.png"
    )
    code, _, err = run_cli("sample", "--model", folder, "--out", "p", "--cond", "c.png")
    assert code == 1 and complains(err, "DataError", "c.png", "one channel")


@pytest.mark.parametrize("kind", ["first_stage", "tokenizer"])
def test_pictures_condition_in_turn(run_cli, tmp_path, model, two_pictures, kind, tiny_tokenizer):
    config = {"kind": kind} if kind == "first_stage" else stage_of(3, tiny_tokenizer)
    folder, pipe = model(config)
    x = torch.stack([images.to_tensor(images.load_image(p), 16) for p in two_pictures])
    with torch.no_grad():
        cond = pipe.conditioning.encode(x)
    base = ("sample", "--model", folder, "-n", 3, "--cond", *two_pictures, "--out", "o")
    assert run_cli(*base, "--complete", two_pictures[0], "--keep", 1)[0] == 0
    prefix = pipe.tokenizer.encode(x[:1])[:, :1].flatten(1)
    assert same_images(tmp_path / "o", pipe.sample(n=3, cond=cond, prefix=prefix))


def test_a_model_of_classes_takes_no_condition_picture(run_cli, tmp_path, model, two_pictures):
    code, _, err = run_cli(
        "sample", "--model", model(CLASSES)[0], "--cond", two_pictures[0], "--out", "o"
    )
    assert code == 2 and complains(err, "--cond", "'class'") and listing(tmp_path) == []


# ---- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def simulate(progress, clock, images=4, batch=2, steps=5):
    """Each step takes a second."""
    for first in range(0, images, batch):
        for step in range(1, steps + 1):
            clock[0] += 1
            progress.on_step(Step(tuple(range(first, first + batch)), step, steps, torch.empty(0)))
        for _ in range(batch):
            progress.image()
    progress.close()


def test_progress_is_drawn_within_a_batch_on_a_terminal():
    clock, stream = [0.0], Terminal()
    simulate(SampleProgress(4, 50, None, stream, lambda: clock[0]), clock)
    lines = stream.getvalue().rstrip("\n").split("\r")[1:]
    assert len(lines) == 11 and stream.getvalue().endswith("\n")  # every step, and the end
    assert lines[0] == "0/4 images, 20 tokens/s, 0.4 images/s, 0:09 left"
    assert lines[5] == "2/4 images, 20 tokens/s, 0.4 images/s, 0:04 left"
    assert lines[-1] == "4/4 images, 20 tokens/s, 0.4 images/s, 0:00 left"


def test_progress_elsewhere_is_silent_or_a_line_now_and_then():
    clock, stream = [0.0], io.StringIO()
    simulate(SampleProgress(4, 50, None, stream, lambda: clock[0]), clock)
    assert stream.getvalue() == ""
    clock, stream = [0.0], io.StringIO()
    simulate(SampleProgress(12, 50, True, stream, lambda: clock[0]), clock, images=12)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 and lines[0].startswith("2/12") and lines[-1].startswith("12/12")
    assert SampleProgress(4, 50, None, None).shown is sys.stderr.isatty()


def test_progress_that_nobody_can_read_is_given_up():
    class Gone(io.StringIO):
        tries = 0

        def write(self, text):
            self.tries += 1
            raise BrokenPipeError

    clock, stream = [0.0], Gone()
    progress = SampleProgress(4, 50, True, stream, lambda: clock[0])
    simulate(progress, clock)
    assert progress.images == 4 and not progress.shown and stream.tries == 1


def test_the_rates_are_reported(run_cli, model):
    base = ("sample", "--model", model(CLASSES)[0], "-n", 3, "--device", "cpu", "--json")
    code, out, err = run_cli(*base, "--out", "a")
    said = json.loads(out)
    assert code == 0 and not err and said["drawn"] == 3
    assert said["tokens_per_second"] == pytest.approx(64 * said["images_per_second"], rel=1e-2)
    code, out, err = run_cli(*base, "--progress", "--out", "b")
    assert code == 0 and json.loads(out)["n"] == 3
    assert err.startswith("3/3 images, ") and "tokens/s" in err and err.endswith("0:00 left\n")


# ---- many images, and interrupted runs


class Counted:
    """A picture of which we know how many there are."""

    alive = most = 0

    def __init__(self):
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


def test_memory_does_not_grow_with_the_number_of_images(run_cli, monkeypatch, model):
    written, before = 0, 0

    def fake(self, classes, n, **options):
        return (Counted() for _ in range(n))

    def save(image, path):
        nonlocal written, before
        written += 1
        if written == 1000:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()

    monkeypatch.setattr(vqfast.Pipeline, "iter_images", fake)
    monkeypatch.setattr("vqfast.cli.sample.save_png", save)
    tracemalloc.start()
    try:
        code, _, _ = run_cli("sample", "--model", model(CLASSES)[0], "-n", 10**5, "--out", "o")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert code == 0 and written == 10**5 and Counted.most <= 2
    # a path for each is 20 MB; Python's table of interned strings, which pathlib fills, grows once
    assert peak - before < 12 << 20


KILLED = """
import os, signal, sys
from vqfast import cli
replace = os.replace
def kill_before(source, target):
    if str(target).endswith(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill_before
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, model):
    """Arguments of a run, and the folder that a kill -9 left of it while image 4 of 7 was
    written."""
    base = ["sample", "--model", str(model(CLASSES)[0]), "-n", "7", "--seed", "11"]
    base += ["--batch-size", "3", "--cfg-scale", "2", "--device", "cpu"]
    folder = tmp_path_factory.mktemp("killed") / "o"
    command = [sys.executable, "-c", KILLED, "000004.png", *base, "--out", str(folder)]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    return base, folder


@pytest.fixture
def unfinished(killed, tmp_path):
    base, folder = killed
    (tmp_path / "o").mkdir()
    for name, data in contents(folder).items():
        (tmp_path / "o" / name).write_bytes(data)
    return base, tmp_path / "o"


def test_a_killed_run_goes_on_where_it_stopped(run_cli, tmp_path, unfinished):
    base, folder = unfinished
    left = listing(folder)
    assert [p for p in left if p[0] == "0"] == [f"00000{i}.png" for i in range(4)]
    assert REQUEST in left and len(left) == 6  # and a temporary file
    (folder / "000001.png").unlink()  # a gap in the middle is filled too
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("0*.png")}
    code, out, _ = run_cli(*base, "--out", "o", "--resume", "--batch-size", 2, "--json")
    assert code == 0 and json.loads(out)["drawn"] == 4
    for name, identity in before.items():
        assert ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) == identity
    assert run_cli(*base, "--out", "whole")[0] == 0
    assert contents(folder) == contents(tmp_path / "whole") and len(listing(folder)) == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--seed", 12], "seed 11, now 12"),
        (["-n", 8], "n 7, now 8"),
        (["--classes", 1], "classes null, now [1]"),
        (["-t", 0.5], "temperature"),
        (["--cfg-scale", 2.5], "cfg_scale"),
        (["--cfg-interval", "0:3"], "cfg_interval"),
        (["--grid", "g.png"], "grid"),
        (["--precision", "bf16"], "precision"),
    ],
)
def test_another_request_does_not_continue_it(run_cli, unfinished, change, says):
    base, folder = unfinished
    before = contents(folder)
    code, _, err = run_cli(*base, *change, "--out", "o", "--resume")
    assert code == 2 and complains(err, "another request", says)
    assert contents(folder) == before


def test_other_weights_or_pictures_are_another_request(
    run_cli, unfinished, model, tmp_path, two_pictures
):
    base, folder = unfinished
    pipe = vqfast.Pipeline.from_pretrained(model(CLASSES)[0])
    with torch.no_grad():
        pipe.tokenizer.decoder.conv_out.bias[0] += 1
    pipe.save_pretrained(tmp_path / "other")
    code, _, err = run_cli(*base, "--model", "other", "--out", "o", "--resume")
    assert code == 2 and complains(err, "another request", "model")
    code, _, err = run_cli(*base, "--complete", two_pictures[0], "--out", "o", "--resume")
    assert code == 2 and complains(err, "another request", "prefix")


def test_a_damaged_request_is_named(run_cli, unfinished):
    base, folder = unfinished
    for text in ("{", "[]"):
        (folder / REQUEST).write_text(text)
        code, _, err = run_cli(*base, "--out", "o", "--resume")
        assert code == 1 and complains(err, "DataError", REQUEST)


def test_an_unfinished_run_is_refused_or_replaced_without_resume(run_cli, unfinished):
    base, folder = unfinished
    before = contents(folder)
    code, _, err = run_cli(*base, "--out", "o")
    assert code == 1 and complains(err, "--resume", "--overwrite") and contents(folder) == before
    assert run_cli(*base, "-n", 2, "--out", "o", "--overwrite")[0] == 0
    assert listing(folder) == ["000000.png", "000001.png"]


def test_resume_begins_what_was_not_begun_and_refuses_what_is_done(run_cli, tmp_path, model):
    base = ("sample", "--model", model(CLASSES)[0], "-n", 2, "--out", "o", "--resume")
    assert run_cli(*base)[0] == 0
    assert listing(tmp_path / "o") == ["000000.png", "000001.png"]
    code, _, err = run_cli(*base)
    assert code == 1 and complains(err, "no unfinished run")
    (tmp_path / "file").write_text("x")
    code, _, err = run_cli(*base[:-2], "file", "--resume")
    assert code == 1 and complains(err, "file", "no folder")


def test_a_sheet_of_a_continued_run_holds_all_images(run_cli, tmp_path, monkeypatch, model):
    base = ("sample", "--model", model(CLASSES)[0], "-n", 4, "--out")
    assert run_cli(*base, "whole", "--grid", "whole.png")[0] == 0
    save, seen = images.save_png, []

    def interrupted(image, path):
        seen.append(path)
        if len(seen) == 3:
            raise KeyboardInterrupt
        save(image, path)

    with monkeypatch.context() as patched:
        patched.setattr("vqfast.cli.sample.save_png", interrupted)
        assert run_cli(*base, "o", "--grid", "g.png")[0] == 130
    assert run_cli(*base, "o", "--grid", "g.png", "--resume")[0] == 0
    assert (tmp_path / "g.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")
