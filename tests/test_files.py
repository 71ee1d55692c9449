"""Atomic writes, stale files and the owner of a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqfast import _files


def test_a_file_appears_whole_with_the_mode_that_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        with _files.atomic_file(tmp_path / "x") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as some writers do
            temporary.write_text("new")
            assert not (tmp_path / "x").exists()
    finally:
        os.umask(before)
    assert (tmp_path / "x").read_text() == "new"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(OSError, match="full"), _files.atomic_file(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_is_replaced_as_a_whole_and_only_when_asked(tmp_path):
    target = tmp_path / "run"
    with _files.atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(FileExistsError), _files.atomic_folder(target):
        pass
    with _files.atomic_folder(target, overwrite=True) as temporary:
        (temporary / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    with pytest.raises(KeyError), _files.atomic_folder(target, overwrite=True) as temporary:
        raise KeyError
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def _dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_only_what_a_dead_process_left_is_removed(tmp_path):
    stale = tmp_path / "sub" / f".tmp-{_dead_pid()}-aa-x"
    stale.mkdir(parents=True)
    (stale / "inside").write_text("x")
    living = tmp_path / f".tmp-{os.getppid()}-bb-y"
    living.write_text("y")
    other = tmp_path / ".tmp-notapid"
    other.write_text("z")
    assert _files.remove_stale(tmp_path) == [stale]
    assert living.exists() and other.exists() and not stale.exists()


def test_a_second_owner_is_refused_by_pid_and_a_dead_one_is_taken_over(tmp_path):
    code = (
        "import sys, vqfast._files as f\n"
        "with f.FolderLock(sys.argv[1]):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(RuntimeError, match=str(owner.pid)), _files.FolderLock(tmp_path):
        pass
    owner.kill()
    owner.wait()
    with _files.FolderLock(tmp_path):
        assert Path(tmp_path / ".lock").read_text().strip() == str(os.getpid())
