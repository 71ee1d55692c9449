"""Checkpoints: the native format, strictness, paths, and saves that are always whole."""

import errno
import json
import os
import random
import struct
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vqfast import checkpoints
from vqfast.checkpoints import native
from vqfast.errors import CheckpointError

CONFIG = {"ch": 32, "n_embed": 7, "embed_dim": 3}


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "quantize.embedding.weight": torch.randn(7, 3, generator=g),
        "encoder.mid.block_1.norm1.weight": torch.randn(8, generator=g),
        "step": torch.tensor(3),
    }


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def saved(folder, seed=0, **more):
    native.write(folder, "tokenizer", CONFIG, tensors(seed), {"steps": 5}, **more)
    return folder


# ---- native


def test_native_gives_back_what_was_written(tmp_path):
    found = checkpoints.read(saved(tmp_path / "m"))
    assert (found.format, found.kind, found.config) == ("native", "tokenizer", CONFIG)
    assert found.metadata == {"steps": 5} and equal(found.tensors, tensors())
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    said = json.loads((tmp_path / "m/config.json").read_text())
    assert said["config"] == CONFIG and said["metadata"] == {"steps": 5}


def test_the_weights_file_stands_for_itself(tmp_path):
    saved(tmp_path / "m")
    (tmp_path / "m/config.json").write_text("not json")
    assert equal(checkpoints.read(tmp_path / "m").tensors, tensors())
    assert equal(checkpoints.read(tmp_path / "m/model.safetensors").tensors, tensors())


def test_native_stores_half_precision_and_refuses_what_does_not_fit_it(tmp_path):
    found = checkpoints.read(saved(tmp_path / "m", dtype=torch.float16)).tensors
    assert found["quantize.embedding.weight"].dtype == torch.float16
    assert found["step"].dtype == torch.int64
    big = {"w": torch.tensor([1e6])}
    with pytest.raises(ValueError, match=r"w must be finite.*float16"):
        native.write(tmp_path / "big", "tokenizer", {}, big, dtype=torch.float16)
    assert not (tmp_path / "big").exists()


def test_native_saves_tied_and_strided_tensors(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    native.write(tmp_path / "m", "tokenizer", {}, {"a": w, "b": w, "c": w.t()})
    found = checkpoints.read(tmp_path / "m").tensors
    assert torch.equal(found["a"], w) and torch.equal(found["b"], w)
    assert torch.equal(found["c"], w.t())


def test_every_flipped_bit_is_found(tmp_path):
    path = saved(tmp_path / "m") / "model.safetensors"
    good, rng = path.read_bytes(), random.Random(0)
    places = list(range(len(good)))
    for at in [*rng.sample(places, 400), *range(8, 40), len(good) - 1]:
        data = bytearray(good)
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoints.read(tmp_path / "m")


def test_every_cut_is_found(tmp_path):
    path = saved(tmp_path / "m") / "model.safetensors"
    good = path.read_bytes()
    for n in [*range(0, len(good), 37), len(good) - 1]:
        path.write_bytes(good[:n])
        with pytest.raises(CheckpointError, match=r"m.*model\.safetensors|m: "):
            checkpoints.read(tmp_path / "m")


def header_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({}, 1 << 40),
        ({}, (1 << 64) - 1),
        (b'{"a":1,"a":2}', None),
        (b"{" * 100_000, None),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, None),
        ({"__metadata__": {"format": "pt"}}, None),
        ({"__metadata__": {"format": "vqfast", "version": "1"}}, None),
    ],
)
def test_headers_that_lie_or_lack_are_refused(tmp_path, header, length):
    header_file(tmp_path / "model.safetensors", header, b"\0" * 16, length)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoints.read(tmp_path / "model.safetensors")


def test_overlaps_and_holes_in_the_data_are_refused(tmp_path):
    path = saved(tmp_path / "m") / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name, shift in (("step", 8), ("step", -8)):
        changed = json.loads(json.dumps(header))
        begin, end = changed[name]["data_offsets"]
        changed[name]["data_offsets"] = [begin + shift, end + shift]
        header_file(path, changed, data[8 + length :])
        with pytest.raises(CheckpointError):
            checkpoints.read(tmp_path / "m")


def test_a_newer_version_is_named_and_the_way_out_too(tmp_path):
    path = saved(tmp_path / "m") / "model.safetensors"
    with safe_open(path, "pt") as file:
        said = file.metadata() | {"version": "2"}
    save_file(tensors(), path, metadata=said)
    with pytest.raises(CheckpointError, match=r"version 2.*up to 1.*upgrade"):
        checkpoints.read(tmp_path / "m")


def test_weights_of_other_tools_are_not_taken_for_native(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="without a configuration"):
        checkpoints.read(tmp_path)


# ---- saving


def test_saving_onto_what_was_read_keeps_both_right(tmp_path):
    found = checkpoints.read(saved(tmp_path / "m"))
    found.tensors["step"] += 1
    native.write(tmp_path / "m", "tokenizer", CONFIG, found.tensors)
    want = tensors() | {"step": torch.tensor(4)}
    assert equal(found.tensors, want) and equal(checkpoints.read(tmp_path / "m").tensors, want)


def test_a_failed_save_leaves_the_old_checkpoint_and_no_temporary_file(tmp_path, monkeypatch):
    saved(tmp_path / "m")

    def half(plain, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(native, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path / "m", seed=1)
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert equal(checkpoints.read(tmp_path / "m").tensors, tensors())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE as on Linux")
def test_a_full_disk_raises_and_leaves_the_old_checkpoint(tmp_path):
    saved(tmp_path / "m")
    code = """
import resource, signal, sys, torch
from vqfast.checkpoints import native
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    native.write(sys.argv[1], "tokenizer", {}, {"w": torch.zeros(10000)})
except OSError as error:
    print("OSError")
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True
    )
    assert ran.stdout.strip() == "OSError", ran.stderr
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert equal(checkpoints.read(tmp_path / "m").tensors, tensors())


def test_a_save_syncs_the_file_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(fd):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"
        events.append(f"fsync {kind}")
        fsync(fd)

    def spy_replace(a, b):
        events.append(f"rename {os.path.basename(b)}")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    saved(tmp_path / "m")
    events = [e for e in events if ".tmp-" not in e]  # into place, not between temporary names
    one = ["fsync file", "rename {}", "fsync folder"]
    assert events == [e.format(n) for n in ("model.safetensors", "config.json") for e in one]


def test_a_reader_sees_the_old_or_the_new_never_a_mix(tmp_path):
    folder, stop = saved(tmp_path / "m"), threading.Event()

    def writer():
        seed = 0
        while not stop.is_set():
            seed += 1
            saved(folder, seed % 2)

    thread = threading.Thread(target=writer)
    thread.start()
    try:
        seen = [checkpoints.read(folder).tensors for _ in range(100)]
    finally:
        stop.set()
        thread.join()
    assert all(equal(s, tensors(0)) or equal(s, tensors(1)) for s in seen)


KILLS = """
import os, random, signal, sys, time, torch
from vqfast import checkpoints
from vqfast.checkpoints import native

def save(value):
    native.write(sys.argv[1], "tokenizer", {"v": value}, {"a": torch.full((500,), float(value))})

save(0)
rng, longest, rounds, seen = random.Random(0), 0.01, 0, set()
while rounds < 15 or (len(seen) < 3 and rounds < 100):
    rounds += 1
    child = os.fork()
    if child == 0:  # saves until it is killed
        for value in range(10**9):
            save(value)
    time.sleep(rng.uniform(0.001, longest))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = checkpoints.read(sys.argv[1])
    assert found.tensors["a"].eq(found.config["v"]).all()
    seen.add(found.config["v"])
    longest *= 1.05  # on a busy machine a save takes longer
save(0)
print("kills", rounds, "states", len(seen))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_any_moment_of_a_save_leaves_the_new_or_the_old(tmp_path):
    # in a process of its own: forking one that has threads may hang
    command = [sys.executable, "-c", KILLS, str(tmp_path / "m")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[-1]) >= 3, ran.stdout
    assert names(tmp_path / "m") == ["config.json", "model.safetensors"]


def test_stale_temporary_files_are_ignored_and_removed_later(tmp_path):
    folder = saved(tmp_path / "m")
    stale = folder / ".tmp-999999999-abcdef01-model.safetensors"
    stale.write_bytes(b"half")
    assert equal(checkpoints.read(folder).tensors, tensors())
    saved(folder, seed=1)
    assert not stale.exists()


# ---- strictness


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1, bias=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_load_into_lists_every_bad_key_and_changes_nothing():
    module = Small()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    bad = {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(1, 4), "extra": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_into(module, bad, what="here")
    text = str(caught.value)
    assert text.startswith("here: ")
    for part in ("missing a.bias", "missing count", "unexpected extra", "[1, 4]", "[1, 3]"):
        assert part in text
    assert equal(before, module.state_dict())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_into_fills_a_module_in_its_own_dtypes(device):
    with torch.device(device):
        module = Small()
    values = {
        "a.weight": torch.arange(6).reshape(3, 2).half(),
        "a.bias": torch.ones(3).double(),
        "b.weight": torch.full((1, 3), 2.0),
        "count": torch.tensor(7),
    }
    checkpoints.load_into(module, values)
    state = module.state_dict()
    assert all(torch.equal(state[k], values[k].to(state[k].dtype)) for k in values)
    assert state["a.weight"].dtype == torch.float32 and state["a.weight"].device.type == "cpu"
    assert all(p.requires_grad for p in module.parameters())


def test_fit_with_allow_partial_puts_zeros_and_says_so():
    given = {"a.weight": torch.ones(3, 2), "extra": torch.ones(1), "count": torch.tensor(1)}
    made, changed = checkpoints.fit(Small(), given, allow_partial=True)
    assert made.keys() == Small().state_dict().keys()
    assert torch.equal(made["a.weight"], torch.ones(3, 2)) and not made["b.weight"].any()
    assert changed == ["missing a.bias", "missing b.weight", "unexpected extra"]


def test_unusable_tensors_are_all_named():
    good = torch.ones(3, 3)
    state = {
        "ok": good,
        "nan": torch.tensor([1.0, float("nan")]),
        "inf": torch.tensor([float("inf")]),
        "sparse": good.to_sparse(),
        "meta": good.to("meta"),
        "wide": torch.ones(1).expand(10**9),
        "overlap": torch.ones(10).as_strided((3, 3), (1, 1)),
        "complex": torch.ones(1, dtype=torch.complex64),
        "number": 3,
    }
    with pytest.raises(CheckpointError) as caught:
        checkpoints.clean_tensors(state, "m.ckpt")
    bad = str(caught.value).removeprefix("m.ckpt: unusable tensors: ").split("; ")
    assert sorted(b.split()[0] for b in bad) == sorted(set(state) - {"ok"})


def test_dense_views_are_taken_and_copied():
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.t(), "cut": base[:, ::2], "row": base[1], "empty": torch.ones(0, 3)}
    made, _ = checkpoints.clean_tensors(state, "m.ckpt")
    assert equal(made, state)
    base.zero_()
    assert made["t"][1, 1] == 5


def test_the_ignore_list_is_the_contracts():
    ignored = [
        "loss.discriminator.main.0.weight", "transformer.blocks.0.attn.mask", "colorize",
        "model_ema.decay", "freqs_cis", "quantize.codebook_used",
    ]  # fmt: skip
    kept = ["lossy.weight", "encoder.attn.mask.weight", "my.colorize", "ema.decay", "quantize.x"]
    state = {k: torch.ones(1) for k in ignored + kept}
    state["loss.bad"] = torch.tensor([float("nan")])
    made, dropped = checkpoints.clean_tensors(state, "m")
    assert sorted(made) == sorted(kept) and sorted(dropped) == sorted([*ignored, "loss.bad"])


# ---- paths


@pytest.mark.parametrize("kind", ["missing", "empty", "folder", "fifo", "loop", "null", "long"])
def test_paths_that_are_no_checkpoint_fail_at_once_with_their_name(tmp_path, kind):
    path = tmp_path / "x\u00e9\U0001f600.ckpt"
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "null":
        path = str(tmp_path / "x\0.ckpt")
    elif kind == "long":
        path = tmp_path / ("x" * 300)
    with pytest.raises(CheckpointError, match="x"):
        checkpoints.read(path)


def test_an_unreadable_file_fails_with_its_name(tmp_path):
    path = tmp_path / "m.ckpt"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(CheckpointError, match=r"m\.ckpt: Permission"):
        checkpoints.read(path)


def test_formats_are_found_by_name():
    assert {"native", "taming"} <= set(checkpoints.formats())
    for module in checkpoints.formats().values():
        assert callable(module.claims) and callable(module.read)
    with pytest.raises(ValueError, match="format must be one of"):
        checkpoints.read(".", format="nope")


def test_native_files_are_plain_safetensors(tmp_path):
    assert equal(load_file(saved(tmp_path / "m") / "model.safetensors"), tensors())
