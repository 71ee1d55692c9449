"""Sample order, bad files and exact resume of the data stream."""

import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vqfast.data import Batches, ImageDataset, open_source, order
from vqfast.errors import DataError


def _plain(index, side=12):
    """A picture of one colour that tells its number."""
    return Image.new("RGB", (side, side), (index, 255 - index, 7 * index % 256))


def _folder(path, n=12, bad=()):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        if i in bad:
            (path / f"{i:03d}.png").write_bytes(b"no picture")
        else:
            _plain(i).save(path / f"{i:03d}.png")
    return path


def _batches(path, size=8, batch_size=4, seed=3, **more):
    lines = []
    options = {"max_bad_fraction": 0.9, "warn": lines.append, **more}
    cache = options.pop("cache", False)
    dataset = ImageDataset(open_source(path), size, crop="random", flip=True, cache=cache)
    batches = Batches(dataset, batch_size, seed=seed, **options)
    return batches, lines


def _take(batches, n):
    out = [next(batches) for _ in range(n)]
    batches.close()
    return out


def _equal(a, b):
    return all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


# ---- order and samples


def test_order_is_a_permutation_and_depends_on_seed_and_epoch():
    seen = {tuple(order(s, e, 50).tolist()) for s in (0, 1, 2**62) for e in (0, 1)}
    assert len(seen) == 6
    assert all(sorted(p) == list(range(50)) for p in seen)
    # recorded 2026-11-23: a resume on another machine must continue the same epoch
    assert order(7, 0, 10).tolist() == [0, 2, 5, 4, 3, 6, 9, 8, 7, 1]


def test_every_epoch_shows_every_picture_once(tmp_path):
    batches, _ = _batches(_folder(tmp_path / "a", 12))
    shown = torch.cat([b["index"] for b in _take(batches, 9)]).tolist()
    for epoch in range(3):
        assert sorted(shown[epoch * 12 : epoch * 12 + 12]) == list(range(12))


def test_item_has_image_label_and_index(tmp_path):
    _folder(tmp_path / "s" / "a", 2)
    _folder(tmp_path / "s" / "b", 2)
    item = ImageDataset(open_source(tmp_path / "s"), (8, 6))[3]
    assert item["image"].shape == (3, 8, 6) and item["image"].dtype == torch.float32
    assert item["label"] == 1 and item["index"] == 3
    want = torch.tensor([1.0, 254, 7]).view(3, 1, 1) / 127.5 - 1
    assert torch.equal(item["image"], want.expand(3, 8, 6))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_gives_the_batches_of_an_uninterrupted_run(tmp_path, cache, workers):
    path = _folder(tmp_path / "a", 13, bad=(2, 5, 11))
    whole, lines = _batches(path)
    want, skipped = [], []
    for _ in range(10):
        want.append(next(whole))
        skipped.append((whole.skipped, whole.bad.tolist()))
    for stop in (0, 1, 3, 4, 7):  # the epoch ends inside batch 3
        bad = skipped[stop - 1][1] if stop else []
        part, _ = _batches(path, start_step=stop, bad=bad, cache=cache, num_workers=workers)
        for step in range(stop, 10):
            assert _equal([next(part)], [want[step]]), f"stopped at {stop}, batch {step}"
            assert (part.skipped, part.bad.tolist()) == skipped[step]
        part.close()


def test_augmentation_differs_between_epochs_and_samples(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (10, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path / "a.png")
    batches, _ = _batches(path, size=10, batch_size=6)
    x = torch.cat([b["image"] for b in _take(batches, 2)])
    assert len({bytes(i.numpy().tobytes()) for i in x}) > 8


def test_ranks_share_the_epoch_without_overlap(tmp_path):
    path = _folder(tmp_path / "a", 16)
    one = _take(_batches(path, batch_size=8)[0], 4)
    parts = [_take(_batches(path, batch_size=4, rank=r, world=2)[0], 4) for r in (0, 1)]
    for step in range(4):
        both = torch.cat([parts[0][step]["index"], parts[1][step]["index"]])
        assert torch.equal(both, one[step]["index"])


def test_batch_larger_than_the_data_set_runs(tmp_path):
    batches, _ = _batches(_folder(tmp_path / "a", 3), batch_size=8)
    (batch,) = _take(batches, 1)
    assert torch.bincount(batch["index"]).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_the_stream_leaves_the_global_random_state_alone(tmp_path):
    path = _folder(tmp_path / "a", 6)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        _take(_batches(path, num_workers=workers)[0], 2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_dataset_travels_to_a_spawned_worker(tmp_path):
    path = _folder(tmp_path / "a", 5, bad=(2,))
    for cache in (False, True):
        dataset = ImageDataset(open_source(path), 8, cache=cache)
        copy = pickle.loads(pickle.dumps(dataset))
        for ordinal in range(10):
            one, other = (d.draw(ordinal, seed=0, max_bad=2) for d in (dataset, copy))
            assert np.array_equal(one[0], other[0]) and one[1:] == other[1:]


# ---- bad files


def test_good_pictures_keep_their_places_when_others_are_bad(tmp_path):
    clean, _ = _batches(_folder(tmp_path / "a", 20))
    spoilt, lines = _batches(_folder(tmp_path / "b", 20, bad=(3, 4, 17)))
    clean, spoilt_list = _take(clean, 10), _take(spoilt, 10)
    replaced = 0
    for x, y in zip(clean, spoilt_list, strict=True):
        for i in range(4):
            if x["index"][i] in (3, 4, 17):
                assert y["index"][i] not in (3, 4, 17)
                replaced += 1
            else:
                assert torch.equal(x["image"][i], y["image"][i])
    assert replaced == 6 and spoilt.skipped == 3
    assert sorted(line.split("/")[-1][:7] for line in lines) == ["003.png", "004.png", "017.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_bad_files_than_allowed_is_a_data_error(tmp_path, workers):
    path = _folder(tmp_path / "a", 20, bad=(3, 4, 17))
    batches, lines = _batches(path, max_bad_fraction=0.15, num_workers=workers)
    _take(batches, 10)
    batches, lines = _batches(path, max_bad_fraction=0.14, num_workers=workers)
    with pytest.raises(DataError, match="3 of 20 pictures are bad, max_bad_fraction is 0.14"):
        _take(batches, 10)
    assert len(lines) == 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("n", [1, 5])
def test_only_bad_files_is_a_data_error_not_an_endless_search(tmp_path, n, workers):
    path = _folder(tmp_path / "a", n, bad=range(n))
    batches, _ = _batches(path, max_bad_fraction=1.0, num_workers=workers)
    with pytest.raises(DataError, match=f"{n} of {n} pictures are bad"):
        next(batches)
    batches.close()


def test_hostile_entries_are_counted_once_each(tmp_path, capfd):
    path = _folder(tmp_path / "a", 8)
    os.mkfifo(path / "fifo.png")
    (path / "device.png").symlink_to("/dev/zero")
    (path / "gone.png").symlink_to(path / "nothing")
    (path / "folder.png").mkdir()
    (path / "empty.png").write_bytes(b"")
    dataset = ImageDataset(open_source(path), 8)
    batches = Batches(dataset, 5, seed=0, max_bad_fraction=0.5)
    _take(batches, 8)
    assert batches.skipped == 5
    said = capfd.readouterr().err.splitlines()
    for name in ("fifo", "device", "gone", "folder", "empty"):
        assert sum(f"{name}.png: " in line for line in said) == 1
    assert len(said) == 5


def test_file_removed_during_the_epoch_is_skipped(tmp_path):
    path = _folder(tmp_path / "a", 8)
    batches, lines = _batches(path)
    first = next(batches)
    gone = next(i for i in range(8) if i not in first["index"])
    (path / f"{gone:03d}.png").unlink()
    next(batches)
    assert batches.bad.tolist() == [gone] and "No such file" in lines[0]
    batches.close()


_KILL_CHILD = """
import multiprocessing, os, signal, sys
from vqfast.data import Batches, ImageDataset, open_source
batches = Batches(ImageDataset(open_source(sys.argv[1]), 8), 4, seed=0, num_workers=1)
next(batches)
os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
for _ in range(20):
    next(batches)
print("not noticed")
"""


def test_killed_worker_is_an_error_not_a_hang(tmp_path):
    # in a process of its own: torch raises from a signal handler, wherever the program then is,
    # also where it handles the error of the batch that did not come
    command = [sys.executable, "-c", _KILL_CHILD, _folder(tmp_path / "a", 8)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "not noticed" not in run.stdout, run.stderr
    assert "DataLoader worker" in run.stderr


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError()]
)
def test_a_batch_whose_worker_is_gone_is_a_data_error(tmp_path, error):
    batches, _ = _batches(_folder(tmp_path / "a", 8))
    batches._iterator = (_raise(error) for _ in range(1))
    with pytest.raises(DataError, match=f"worker died: {type(error).__name__}"):
        next(batches)
    told = FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0.")
    batches._iterator = (_raise(told) for _ in range(1))
    with pytest.raises(FileNotFoundError, match="Caught"):
        next(batches)


def _raise(error):
    raise error


def test_close_ends_the_workers(tmp_path):
    before = set(multiprocessing.active_children())
    batches, _ = _batches(_folder(tmp_path / "a", 8), num_workers=2)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("num_workers", -1), ("start_step", -1), ("rank", 2), ("world", 0)],
)
def test_batches_names_the_bad_argument(tmp_path, name, value):
    dataset = ImageDataset(open_source(_folder(tmp_path / "a", 2)), 8)
    with pytest.raises(ValueError, match=name):
        Batches(dataset, **{"batch_size": 1, "seed": 0, name: value})


@pytest.mark.parametrize("bad", [{"crop": "left"}, {"min_crop": 0}, {"min_crop": 1.5}])
def test_dataset_names_the_bad_argument(tmp_path, bad):
    source = open_source(_folder(tmp_path / "a", 2))
    with pytest.raises(ValueError, match=next(iter(bad))):
        ImageDataset(source, 8, **bad)


def test_cache_reads_each_file_once_and_changes_nothing(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(30, 40), (9, 9), (64, 20), (5, 60)]):
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(path / f"{i}.png")
    source = open_source(path)
    for options in ({}, {"crop": "random", "flip": True}, {"crop": "random", "min_crop": 0.4}):
        plain, cached = (ImageDataset(source, 16, cache=c, **options) for c in (False, True))
        runs = [_take(Batches(d, 4, seed=1), 3) for d in (plain, cached)]
        assert _equal(*runs), options
    for file in path.iterdir():
        file.unlink()
    assert len(_take(Batches(cached, 4, seed=1), 1)[0]["image"]) == 4
