"""The command line: exit codes and one-line errors."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

import vqfast
from vqfast import cli, config, images
from vqfast.cli import _models, _parser
from vqfast.errors import NonFiniteError

VERBS = ["sample", "reconstruct", "encode", "decode", "train", "eval", "convert", "info", "check"]
NO_SIZES = [
    "",
    "0",
    "0GB",
    "-1",
    "1e9",
    "nan",
    "2G",
    "GB",
    "1iB",
    "1.5.2MB",
    "2 G B",
    "0x10",
    "0.5",
]


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
def test_every_verb_explains_itself(run_cli, verb):
    code, out, err = run_cli(*verb, "--help")
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
        *((["decode", "c", "--max-memory", size], "--max-memory") for size in NO_SIZES),
        (["encode", "p.png", "--max-memory", "2GX"], "2GB, 512MiB or bytes"),
        (["reconstruct", "p.png", "--max-memory", "0"], "at least one byte"),
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
def test_bad_usage_is_exit_2_one_line_and_writes_nothing(run_cli, tmp_path, arguments, says):
    code, out, err = run_cli(*arguments)
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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("123456", 123456), ("12B", 12), ("2GB", 2 * 10**9), ("2GiB", 2 << 30),
        ("512MiB", 512 << 20), ("512 mib", 512 << 20), ("1.5kB", 1500), ("0.5KiB", 512),
        ("1TB", 10**12), ("0.1GB", 10**8),
    ],
)  # fmt: skip
def test_memory_is_read_in_its_unit(text, size):
    for verb in ("reconstruct", "encode", "decode"):
        assert _parser.parse([verb, "x", "--max_memory", text]).max_memory == size
    assert _parser.parse(["decode", "x"]).max_memory is None


# ---- failures while running


def test_failures_are_exit_1_one_line_and_write_nothing(
    run_cli, tmp_path, tiny_tokenizer, two_pictures
):
    (tmp_path / "junk.ckpt").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    before = listing(tmp_path)
    model = ("--model", tiny_tokenizer)
    table = [
        (["sample", "--model", "nothing", "--out", "x"], "CheckpointError", "nothing"),
        (["sample", "--model", "junk.ckpt", "--out", "x"], "CheckpointError", "junk.ckpt"),
        (["sample", *model, "--out", "x"], "CheckpointError", "a pipeline is needed"),
        (["encode", "no.png", *model, "--out", "x"], "DataError", "no.png"),
        (["encode", two_pictures[0], "empty.png", *model, "--out", "x"], "DataError", "empty.png"),
        (["encode", "pipe.png", *model, "--out", "x"], "DataError", "regular file"),
        (["decode", "junk.ckpt", *model, "--out", "x"], "DataError", "junk.ckpt"),
        (["decode", "pipe.png", *model, "--out", "x"], "DataError", "regular file"),
        (["decode", "no.safetensors", *model, "--out", "x"], "DataError", "no.safetensors"),
        (["eval", "--real", "nowhere", *model], "DataError", "nowhere"),
        (["convert", "pipe.png", "x"], "CheckpointError", "pipe.png"),
    ]
    for arguments, *says in table:
        code, out, err = run_cli(*arguments)
        assert code == 1 and not out and complains(err, *says), (arguments, err)
        assert listing(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_line_and_auto_says_it_falls_back(
    run_cli, tiny_tokenizer, two_pictures
):
    for device in ("cuda", "cuda:7"):
        code, _, err = run_cli(
            "encode", two_pictures[0], "--model", tiny_tokenizer, "--device", device
        )
        assert code == 1 and complains(err, "BackendError", device)
    code, _, err = run_cli("encode", two_pictures[0], "--model", tiny_tokenizer)
    assert code == 0 and err.count("no GPU found") == 1


def test_an_unforeseen_error_is_one_line_with_its_place(run_cli, monkeypatch):
    def broken():
        return {}["key"]

    monkeypatch.setattr(vqfast, "info", broken)
    code, out, err = run_cli("info")
    assert code == 1 and not out and complains(err, "KeyError", ".py:")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_signals_leave_finished_images_and_no_half_ones(
    run_cli, tmp_path, monkeypatch, tiny_pipeline, number, code
):
    save, count = images.save_png, []

    def third_time_lucky(image, path):
        count.append(path)
        if len(count) == 3:
            os.kill(os.getpid(), number)
        save(image, path)

    monkeypatch.setattr("vqfast.cli.sample.save_png", third_time_lucky)
    before = signal.getsignal(signal.SIGTERM)
    got, out, err = run_cli(
        "sample", "--model", tiny_pipeline, "-n", 10**9, "--out", "o", "--batch-size", 2
    )
    assert got == code and not out and err.splitlines()[-1].startswith("vqfast: ")
    finished = ["000000000.png", "000000001.png"]
    assert listing(tmp_path / "o") == [*finished, "vqfast-request.json"]
    assert all(images.load_image(tmp_path / "o" / p).size == (16, 16) for p in finished)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_reaches_a_job_that_was_started_with_it_ignored(
    run_cli, tmp_path, monkeypatch, tiny_pipeline
):
    def interrupt(image, path):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("vqfast.cli.sample.save_png", interrupt)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        got = run_cli("sample", "--model", tiny_pipeline, "-n", 3, "--out", "o")[0]
        assert got == 130 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reader_that_leaves_is_no_error(monkeypatch, capfd):
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["--help"]) == 0
        assert cli.main(["info", "--json"]) == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(monkeypatch, capfd):
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["--help"]) == 1
    assert complains(capfd.readouterr().err, "standard output", "No space")


# ---- the rest


def test_info_and_check_print_one_object(run_cli):
    code, out, _ = run_cli("info", "--json")
    assert code == 0 and json.loads(out)["torch"] == torch.__version__
    code, out, _ = run_cli("check", "--op", "nearest", "--device", "cpu", "--json")
    said = json.loads(out)
    assert code == 0 and said["failed"] == 0 and said["passed"] == len(said["rows"])


def test_check_fails_when_a_kernel_does(run_cli, monkeypatch):
    from vqfast.testing import Row

    rows = [
        Row("nearest", "tiny", "float32", "cpu", True, 0.5),
        Row("nearest", "tiny", "float16", "cpu", False, float("inf"), "3 differ"),
    ]
    monkeypatch.setattr("vqfast.cli.check.check_ops", lambda device, op: iter(rows))
    code, out, _ = run_cli("check", "--device", "cpu", "--json")
    assert code == 1 and json.loads(out)["rows"][1]["error"] is None
    code, out, _ = run_cli("check", "--device", "cpu")
    assert code == 1 and "3 differ" in out and "1 passed, 1 failed" in out


def test_train_hands_everything_over(run_cli, monkeypatch):
    from vqfast.train import tokenizer, transformer

    calls = []

    def fake(path, overrides, **options):
        calls.append((path, overrides, options))
        return 143

    monkeypatch.setattr(tokenizer, "run", fake)
    monkeypatch.setattr(transformer, "run", fake)
    more = ("--data", "d=1", "--out", "o", "--max_steps", 5, "--device", "cpu", "--dry-run")
    assert run_cli("train", "tokenizer", "c.yaml", "a.b=1", *more, "c.d=x=y")[0] == 143
    path, overrides, options = calls[0]
    assert path == "c.yaml" and overrides == ["a.b=1", "c.d=x=y"]
    assert options == {
        "data": "d=1", "out": "o", "resume": "auto", "max_steps": 5, "device": "cpu",
        "precision": None, "dry_run": True, "print_config": False,
    }  # fmt: skip
    assert run_cli("train", "transformer", "c.yaml", "--tokenizer", "t")[0] == 143
    assert calls[1][2]["tokenizer"] == "t"


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_the_precision_flag_offers_what_training_can_do(run_cli, tmp_path, stage):
    from vqfast.train.settings import TrainSection

    rules = TrainSection.__dataclass_fields__["precision"].metadata
    path = tmp_path / "c.yaml"
    path.write_text("train: {precision: bf16}\n")
    for given in ("auto", *rules["choices"]):
        code, out, err = run_cli("train", stage, path, "--precision", given, "--print-config")
        assert code == 0, err
        assert yaml.safe_load(out)["train"]["precision"] == ("bf16" if given == "auto" else given)
    code, out, err = run_cli("train", stage, path, "--precision", "int8", "--print-config")
    assert code == 2 and not out and complains(err, "--precision", "int8", "bf16")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (config.ConfigError("model.n_embedd: unknown key"), 2, "model.n_embedd"),
        (NonFiniteError("rec is nan"), 1, "NonFiniteError: rec"),
        (OSError(28, "No space left on device", "o/last"), 1, "o/last: No space"),
        (MemoryError(), 1, "memory"),
    ],
)
def test_errors_of_a_training_become_exit_codes(run_cli, monkeypatch, error, code, says):
    from vqfast.train import tokenizer

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(tokenizer, "run", fail)
    got, out, err = run_cli("train", "tokenizer", "c.yaml")
    assert got == code and not out and complains(err, says)


def test_the_default_model_is_the_shipped_one(monkeypatch, tmp_path):
    shipped = os.path.join(os.path.dirname(vqfast.__file__), "assets", "emoji64")
    if os.path.isdir(shipped):
        assert str(_models.model_path(None)) == shipped
    monkeypatch.setattr(vqfast, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(vqfast.CheckpointError, match="emoji64"):
        _models.model_path(None)
