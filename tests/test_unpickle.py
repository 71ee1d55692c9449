"""Foreign pickles: nothing runs, what is refused is named, damage is an error, memory bounded."""

import argparse
import collections
import contextlib
import io
import os
import pickle
import random
import resource
import subprocess
import sys
import tarfile
import timeit
import types
import zipfile

import numpy as np
import pytest
import torch

from vqfast.checkpoints import _unpickle
from vqfast.errors import CheckpointError

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.ones(5)}


class Call:
    """Pickles as a call of fn(*args) at load time."""

    def __init__(self, fn, *args):
        self.fn, self.args = fn, args

    def __reduce__(self):
        return self.fn, self.args


def evil(marker):
    python, shell = f"open({str(marker)!r}, 'w').close()", f"touch {marker}"
    return {
        "system": Call(os.system, shell),
        "exec": Call(exec, python),
        "Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "timeit": Call(timeit.timeit, python, "pass"),
        "map": Call(list, Call(map, Call(eval, "print"), [python])),
    }


def patch_pickle(path, edit):
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for record in source.infolist():
            data = source.read(record)
            target.writestr(record, edit(data) if record.filename.endswith("data.pkl") else data)


def write(path, extra, layout):
    tree = {"state_dict": STATE, "extra": extra}
    if layout == "raw":
        path.write_bytes(pickle.dumps(tree["extra"], 4))
    elif layout == "tar":
        with tarfile.open(path, "w") as archive:
            data = pickle.dumps(extra, 2)
            for name in ("sys_info", "storages", "tensors", "pickle"):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        protocol = 4 if layout == "zip4" else 2
        torch.save(
            tree,
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=layout != "legacy",
        )
    return path


@pytest.mark.parametrize("layout", ["zip", "zip4", "legacy", "raw", "tar"])
@pytest.mark.parametrize("name", ["system", "exec", "Popen", "timeit", "map"])
def test_nothing_in_a_file_runs_and_its_global_is_named(tmp_path, name, layout):
    marker = tmp_path / "marker"
    path = write(tmp_path / "model.safetensors", evil(marker)[name], layout)
    with pytest.raises(CheckpointError) as caught:
        _unpickle.load(path)
    assert str(path) in str(caught.value)
    if layout != "tar":
        assert f".{name}," in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["inst", "obj", "ext", "stack_global"])
def test_hand_made_opcodes_are_refused(tmp_path, form):
    marker, path = tmp_path / "marker", tmp_path / "m.ckpt"
    argument = b"S" + repr(f"touch {marker}").encode() + b"\n"
    evil_pickle = {
        "inst": b"(" + argument + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + argument + b"o.",
        "ext": b"\x80\x02\x82\x01.",
        # the two names come out of the memo
        "stack_global": b"\x80\x04\x8c\x02os\x940\x8c\x06system\x940h\x00h\x01\x93"
        + argument
        + b"\x85R.",
    }[form]
    torch.save({"state_dict": STATE}, path)
    patch_pickle(path, lambda _: evil_pickle)
    with pytest.raises(CheckpointError, match="EXT1" if form == "ext" else r"os\.system"):
        _unpickle.load(path)
    assert not marker.exists()


def test_what_torch_or_others_allow_is_not_allowed_here(tmp_path):
    path = tmp_path / "m.ckpt"
    for extra, name in ((bytearray(b"x"), "bytearray"), (collections.Counter("x"), "Counter")):
        torch.save({"extra": extra}, path)
        with pytest.raises(CheckpointError, match=name):
            _unpickle.load(path)
    torch.save({"extra": Call(os.getcwd)}, path)
    with (
        torch.serialization.safe_globals([(os.getcwd, "posix.getcwd")]),
        pytest.raises(CheckpointError, match=r"posix\.getcwd"),
    ):
        _unpickle.load(path)


def test_never_a_second_try_and_the_global_list_is_put_back(tmp_path, monkeypatch):
    calls, load = [], torch.load

    def spy(*args, **kwargs):
        calls.append(kwargs["weights_only"])
        return load(*args, **kwargs)

    before = set(torch.serialization.get_safe_globals())
    monkeypatch.setattr(torch, "load", spy)
    path = write(tmp_path / "m.ckpt", None, "zip")
    _unpickle.load(path)
    assert calls == [True]
    path = write(tmp_path / "four.ckpt", None, "zip4")  # torch itself refuses protocol 4
    with pytest.raises(CheckpointError):
        _unpickle.load(path)
    assert calls == [True, True]
    assert set(torch.serialization.get_safe_globals()) == before


# ---- what old trainers left in their files


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_lightning_numpy_and_argparse_leave_the_weights_readable(tmp_path, monkeypatch, layout):
    module = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": module})
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", module]
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[module].ModelCheckpoint = callback
        extra = {
            "callbacks": {callback: {"best": torch.tensor(0.5), "current": np.float64(0.25)}},
            "metric": np.float32(1.5),
            "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.95)),
            "counts": collections.defaultdict(int, {"a": 1}),
            "kinds": {dict: list},
            "names": {"a", "b"},
        }
        path = write(tmp_path / "m.ckpt", extra, layout)
    before = set(sys.modules)
    tree = _unpickle.load(path)
    assert all(torch.equal(tree["state_dict"][k], v) for k, v in STATE.items())
    assert not {m for m in set(sys.modules) - before if "lightning" in m}
    if layout == "zip":  # as numpy 1 spelled it
        patch_pickle(path, lambda d: d.replace(b"cnumpy._core.multi", b"cnumpy.core.multi"))
        assert torch.equal(_unpickle.load(path)["state_dict"]["b.bias"], STATE["b.bias"])


def test_omegaconf_containers_load_as_inert_things(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"model": {"n_embed": 16, "ch_mult": [1, 2]}})
    path = write(tmp_path / "m.ckpt", config, "zip")
    tree = _unpickle.load(path)
    assert not isinstance(tree["extra"], omegaconf.DictConfig)
    assert torch.equal(tree["state_dict"]["b.bias"], STATE["b.bias"])


# ---- damage


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_a_cut_file_is_an_error_at_any_length(tmp_path, layout):
    good = write(tmp_path / "good.ckpt", None, layout).read_bytes()
    path, rng = tmp_path / "cut.ckpt", random.Random(0)
    for n in {0, 1, 2, len(good) - 1, *(rng.randrange(len(good)) for _ in range(60))}:
        path.write_bytes(good[:n])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
            _unpickle.load(path)


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_a_flipped_bit_is_an_error_or_changes_a_value_never_more(tmp_path, layout):
    good = write(tmp_path / "good.ckpt", {"step": 3}, layout).read_bytes()
    path, rng = tmp_path / "flip.ckpt", random.Random(1)
    outcomes = collections.Counter()
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            _unpickle.load(path)
            outcomes["loads"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 10, outcomes


@pytest.mark.parametrize(
    "data", [b"<html>404 Not Found</html>" * 50, b"\x00" * 600, b"\x80\x02.", b"PK"]
)
def test_what_is_no_checkpoint_is_refused_with_its_path(tmp_path, data):
    path = tmp_path / "page.ckpt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"page\.ckpt"):
        _unpickle.load(path)


# ---- lies about sizes


class _Lying(pickle._Pickler):
    """Writes tensors whose storages and views are what the test says."""

    def __init__(self, file, storage):
        super().__init__(file, 2)
        self._storage = storage

    def persistent_id(self, obj):
        return self._storage if isinstance(obj, torch.UntypedStorage) else None


def lying(path, *, numel, view=(0, (4,), (1,)), record=16, kind=torch.FloatStorage):
    stream = io.BytesIO()
    storage = ("storage", kind, "0", "cpu", numel)
    fake = Call(torch._utils._rebuild_tensor_v2, torch.UntypedStorage(0), *view, False, {})
    _Lying(stream, storage).dump({"state_dict": {"w": fake}})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/data/0", b"\0" * record)
        archive.writestr("archive/version", "3")
    return path


def test_the_crafted_file_is_fine_when_it_does_not_lie(tmp_path):
    tree = _unpickle.load(lying(tmp_path / "m.ckpt", numel=4))
    assert torch.equal(tree["state_dict"]["w"], torch.zeros(4))


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        ({"numel": 5}, "asks for 20 bytes"),
        ({"numel": 1 << 40}, "asks for"),
        ({"numel": 1 << 63}, "no plain type or size"),
        ({"numel": 4, "record": 0}, "asks for 16 bytes"),
        ({"numel": 4, "view": (1, (4,), (1,))}, "reaches element 4"),
        ({"numel": 4, "view": (0, (1 << 40,), (1,))}, "reaches element"),
        ({"numel": 4, "view": (0, (1 << 31, 1 << 31), (1 << 31, 1))}, "reaches element"),
        ({"numel": 4, "view": (-1, (4,), (1,))}, "not plain integers"),
        ({"numel": 4, "view": (0, (4,), (1, 1))}, "not plain integers"),
    ],
)
def test_a_storage_or_view_that_exceeds_its_record_is_refused(tmp_path, lie, says):
    with pytest.raises(CheckpointError, match=says):
        _unpickle.load(lying(tmp_path / "m.ckpt", **lie))


def test_legacy_storages_may_not_exceed_the_file(tmp_path):
    path = write(tmp_path / "m.ckpt", None, "legacy")
    data = path.read_bytes()
    # the pickled element count of a.weight: BININT1 12 before the end of its storage record
    at = data.index(b"K\x0c", data.index(b"FloatStorage"))
    path.write_bytes(data[:at] + b"J\xff\xff\xff\x7f" + data[at + 2 :])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="cut: its storages need"):
        _unpickle.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_zip_tricks_are_refused(tmp_path):
    good = write(tmp_path / "good.ckpt", None, "zip")
    source, path = zipfile.ZipFile(good), tmp_path / "m.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(CheckpointError, match="compressed"):
        _unpickle.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
        target.writestr("good/data.pkl2/data.pkl", b"\x80\x02N.")
    with pytest.raises(CheckpointError, match="one pickle"):
        _unpickle.load(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as target:
        for record in [*source.infolist(), source.infolist()[0]]:
            target.writestr(record.filename, source.read(record))
    with pytest.raises(CheckpointError, match="two records"):
        _unpickle.load(path)


@pytest.mark.parametrize("member", ["../../climbed", "m/../../climbed", "/tmp/climbed"])
def test_a_member_that_climbs_out_writes_nothing(tmp_path, member):
    path = write(tmp_path / "m.ckpt", None, "zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(member, b"x")
    with contextlib.suppress(CheckpointError):
        _unpickle.load(path)
    assert not list(tmp_path.parent.rglob("climbed"))
    assert not os.path.exists("/tmp/climbed")


def test_tuples_too_deep_to_hash_do_not_crash_the_process(tmp_path):
    path = write(tmp_path / "m.ckpt", None, "zip")
    deep = b"\x80\x02}N" + b"\x85" * 300_000 + b"Ns."
    patch_pickle(path, lambda _: deep)
    with pytest.raises(CheckpointError, match="tuples"):
        _unpickle.load(path)
