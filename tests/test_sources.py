"""Folders, lists, archives and code files as sources: order, labels, confinement, damage."""

import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from vqfast.data import open_source, split
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


def test_folder_is_sorted_recursive_and_labelled_by_first_subfolder(tmp_path):
    for name in ("b/2.png", "a/x/1.jpg", "a/0.PNG", "b/.hidden.png", "b/notes.txt", ".git/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / name).write_text("x")
        else:
            _plain(5).save(tmp_path / name, format="PNG")
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(len(source))] == [b"a/0.PNG", b"a/x/1.jpg", b"b/2.png"]
    assert [source.label(i) for i in range(3)] == [0, 0, 1]
    assert source.class_names == ["a", "b"]
    assert open_source(tmp_path, subset="a/x").class_names is None
    with pytest.raises(DataError, match="leaves"):
        open_source(tmp_path, subset="../..")


def test_pictures_beside_the_class_folders_have_no_label(tmp_path):
    _folder(tmp_path, 2)
    _folder(tmp_path / "cats", 1)
    source = open_source(tmp_path)
    assert [source.label(i) for i in range(3)] == [-1, -1, 0]


def test_link_loops_end_and_linked_folders_count(tmp_path):
    _folder(tmp_path / "root" / "a", 2)
    _folder(tmp_path / "elsewhere", 3)
    (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    assert len(open_source(tmp_path / "root")) == 5


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "no pictures"])
def test_nothing_to_read_is_a_data_error_with_the_path(tmp_path, kind):
    path = tmp_path / "set"
    if kind in ("empty", "no pictures"):
        path.mkdir()
    if kind == "file":
        path.write_bytes(b"x" * 2000)
    if kind == "no pictures":
        (path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="set: "):
        open_source(path)


def test_list_file_gives_its_order_its_labels_and_stays_under_its_folder(tmp_path):
    folder = _folder(tmp_path / "set", 4)
    _plain(9).save(folder / "with space.png")
    absolute = folder / "001.png"
    lines = f"003.png 7\n\n  000.png\t2\r\nwith space.png\n./{'x/..'}/002.png 1\n{absolute}\n"
    (folder / "list.txt").write_text(lines)
    source = open_source(folder / "list.txt")
    names = [source.name(i) for i in range(len(source))]
    assert names == [b"003.png", b"000.png", b"with space.png", b"002.png", b"001.png"]
    assert [source.label(i) for i in range(5)] == [7, 2, -1, 1, -1]
    assert np.asarray(source.read(2))[0, 0, 0] == 9


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/secret.png"])
def test_list_line_that_leaves_its_folder_is_refused_with_its_number(tmp_path, name):
    folder = _folder(tmp_path / "set", 1)
    _plain(1).save(tmp_path / "secret.png")
    (folder / "list.txt").write_text(f"000.png\n{name}\n")
    with pytest.raises(DataError, match="line 2: .*secret.png leaves"):
        open_source(folder / "list.txt")


def _tar(path, members, mode="w", kinds=None):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = (kinds or {}).get(name, tarfile.REGTYPE)
            if info.type == tarfile.SYMTYPE:
                info.linkname, info.size = "/etc/passwd", 0
            tar.addfile(info, io.BytesIO(data) if info.size else None)
    return path


def _bytes(index):
    out = io.BytesIO()
    _plain(index).save(out, format="PNG")
    return out.getvalue()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar_reads_in_place_sorted_with_classes(tmp_path, mode):
    members = {"top/b/1.png": _bytes(1), "top/a/2.png": _bytes(2), "top/SOURCE.txt": b"words"}
    source = open_source(_tar(tmp_path / "t.tar", members, mode))
    assert [source.name(i) for i in range(2)] == [b"top/a/2.png", b"top/b/1.png"]
    assert source.class_names == ["a", "b"] and [source.label(i) for i in range(2)] == [0, 1]
    assert [np.asarray(source.read(i))[0, 0, 0] for i in range(2)] == [2, 1]
    assert len(open_source(tmp_path / "t.tar", subset="b")) == 1
    with pytest.raises(DataError, match="0 pictures"):
        open_source(tmp_path / "t.tar", subset="c")


def test_tar_member_that_leaves_it_is_a_bad_picture_and_links_are_none(tmp_path):
    members = {"a/0.png": _bytes(0), "../x.png": _bytes(1), "/y.png": _bytes(2), "a/l.png": b""}
    path = _tar(tmp_path / "t.tar", members, kinds={"a/l.png": tarfile.SYMTYPE})
    source = open_source(path)
    assert len(source) == 3
    for i in range(3):
        if source.name(i).startswith(b"a/"):
            source.read(i)
        else:
            with pytest.raises(DataError, match="leaves the archive"):
                source.read(i)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.tar"]


def test_cut_or_damaged_tar_is_a_data_error(tmp_path):
    members = {f"{i}.png": _bytes(i) for i in range(6)}
    data = _tar(tmp_path / "t.tar", members).read_bytes()
    second = 512 + -(-len(members["0.png"]) // 512) * 512
    for name, bad in {
        "cut in data": data[: second + 512 + 20],
        "cut in header": data[: second + 100],
        "bad checksum": data[: second + 20] + b"\xff" + data[second + 21 :],
        "empty": b"",
        "no tar": b"x" * 4000,
    }.items():
        (tmp_path / "bad.tar").write_bytes(bad)
        with pytest.raises(DataError, match=r"bad.tar: "):
            open_source(tmp_path / "bad.tar", kind="archive")
            pytest.fail(name)


def test_tar_cut_after_indexing_gives_data_errors(tmp_path):
    path = _tar(tmp_path / "t.tar", {f"{i}.png": _bytes(i) for i in range(6)})
    source = open_source(path)
    os.truncate(path, 1000)
    with pytest.raises(DataError, match="the archive was cut"):
        source.read(5)


def test_manifest_tells_names_and_labels_apart(tmp_path):
    a, b = _folder(tmp_path / "a", 3), _folder(tmp_path / "b", 3)
    assert open_source(a).manifest() == open_source(b).manifest()
    (b / "001.png").rename(b / "001x.png")
    assert open_source(a).manifest() != open_source(b).manifest()
    one, other = split(open_source(a), 0.5)
    assert one.manifest() != other.manifest()


def test_split_is_disjoint_complete_and_stable_when_pictures_are_added(tmp_path):
    path = _folder(tmp_path / "a", 60)
    train, held = split(open_source(path), 0.25)
    names = [{s.name(i) for i in range(len(s))} for s in (train, held)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 60
    assert 5 <= len(held) <= 25
    _plain(3).save(path / "999.png")
    _, again = split(open_source(path), 0.25)
    assert names[1] <= {again.name(i) for i in range(len(again))}


@pytest.mark.slow
def test_two_million_paths_stay_small(tmp_path):
    """A flat folder cannot be made in a test: the names come from a patched listing."""
    script = """
import os, resource
from vqfast.data import folder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
os.listdir = lambda p: [b"n%08d/image_%08d.jpeg" % (i // 1000, i) for i in range(2_000_000)]
source = folder.FolderSource(".")
assert len(source) == 2_000_000 and len(source.class_names) == 2000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert int(run.stdout) < 400, run.stderr
