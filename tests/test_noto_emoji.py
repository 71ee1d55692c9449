"""Emoji classes: the table, its generator, and the archive they are made for."""

import io
import os
import tarfile

import pytest
import torch
from PIL import Image

from vqfast.data import ImageDataset, noto_emoji, open_source
from vqfast.data._noto_classes import CLASSES
from vqfast.errors import DataError

_EMOJI_TEST = "/usr/share/unicode/emoji/emoji-test.txt"


def _archive(path, stems):
    with tarfile.open(path, "w") as tar:
        for stem in stems:
            data = io.BytesIO()
            Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(data, format="PNG")
            info = tarfile.TarInfo(f"noto/{stem}.png")
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
    return path


def test_no_emoji_is_in_two_classes_and_no_class_is_small():
    keys = [key for text in CLASSES.values() for key in text.split()]
    assert len(keys) == len(set(keys)) > 1300
    assert min(len(text.split()) for text in CLASSES.values()) >= 20
    assert len(CLASSES) >= 12


@pytest.mark.skipif(not os.path.exists(_EMOJI_TEST), reason="no emoji-test.txt on this machine")
def test_table_is_what_the_generator_makes(capsys):
    with open(_EMOJI_TEST, encoding="utf-8") as file:
        text = file.read()
    if "# Version: 15.0" not in text:
        pytest.skip("another Unicode version than that of the table")
    noto_emoji._print_table(text)
    with open(noto_emoji.__file__.replace("noto_emoji.py", "_noto_classes.py")) as file:
        assert capsys.readouterr().out == file.read()


def test_generator_drops_tones_and_presentation_and_unknown_subgroups():
    lines = [
        "# group: People & Body",
        "# subgroup: hands",
        "1F44F ; fully-qualified # a",
        "1F44F 1F3FB ; fully-qualified # tone",
        "270D FE0F ; fully-qualified # b",
        "270D ; unqualified # b again",
        "# subgroup: sky & weather",
        "2600 FE0F ; fully-qualified # sun",
        "# subgroup: no such",
        "0023 FE0F 20E3 ; fully-qualified # c",
    ]
    classes = noto_emoji.build_classes("\n".join(lines))
    assert classes["hands"] == ["1f44f", "270d"] and classes["sky and weather"] == ["2600"]
    assert sum(map(len, classes.values())) == 3


def test_archive_of_emoji_is_recognised_and_labelled(tmp_path):
    stems = ["emoji_u1f600", "emoji_u1f44f", "emoji_u1f44f_1f3fb", "emoji_u1f1e6", "emoji_u2764"]
    path = _archive(tmp_path / "e.tar", stems)
    source = open_source(path)
    found = {source.name(i): source.class_names[source.label(i)] for i in range(len(source))}
    assert found == {
        b"noto/emoji_u1f44f.png": "hands",
        b"noto/emoji_u1f600.png": "faces",
        b"noto/emoji_u2764.png": "hearts",
    }
    assert source.read(0).getpixel((0, 0)) == (255, 255, 255)
    assert len(open_source(path, kind="archive")) == 5
    toned = noto_emoji.emoji_source(open_source(path, kind="archive"), skin_tones=True)
    assert len(toned) == 4


def test_subset_chooses_classes_and_their_order(tmp_path):
    path = _archive(tmp_path / "e.tar", ["emoji_u1f600", "emoji_u1f44f", "emoji_u2764"])
    source = open_source(path, subset="hearts; faces")
    assert source.class_names == ["hearts", "faces"]
    assert [source.label(i) for i in range(len(source))] == [1, 0]
    with pytest.raises(DataError, match="classes must be out of .* got 'cars'"):
        open_source(path, subset="cars")
    with pytest.raises(DataError, match="0 pictures"):
        open_source(path, subset="clocks")


def test_folder_of_emoji_is_recognised_and_other_folders_are_not(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "emoji_u1f600.png")
    assert open_source(tmp_path).class_names[0] == "faces"
    (tmp_path / "emoji_u1f600.png").rename(tmp_path / "photo.png")
    assert open_source(tmp_path).class_names is None


def test_shared_archive_has_1380_labelled_pictures(shared_data):
    source = open_source(os.path.join(shared_data, "noto_emoji128.tar"))
    assert len(source) == 1380
    counts = torch.bincount(torch.tensor([source.label(i) for i in range(len(source))]))
    assert len(counts) == len(CLASSES) and counts.min() >= 20
    assert ImageDataset(source, 64)[100]["image"].shape == (3, 64, 64)
