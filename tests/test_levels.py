"""Maps of labels and depths: the numbers that a file stores, whatever its mode."""

import numpy as np
import pytest
from PIL import Image

from vqfast.errors import DataError
from vqfast.images import load_levels

LEVELS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def stored(mode):
    image = Image.fromarray(LEVELS)
    if mode == "P":  # numbers that no colour tells apart
        image = Image.frombytes("P", (4, 3), LEVELS.tobytes())
        image.putpalette([200, 0, 0] * 256)
        return image
    if mode == "I;16":
        return Image.fromarray(LEVELS.astype(np.uint16))
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(LEVELS * 20))
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "LA", "RGB", "RGBA"])
def test_levels_are_those_of_the_file(tmp_path, mode):
    stored(mode).save(tmp_path / "a.png")
    image = load_levels(tmp_path / "a.png")
    assert image.mode == "I" and np.array_equal(np.asarray(image), LEVELS)


def test_all_sixteen_bits_are_kept(tmp_path):
    levels = LEVELS.astype(np.uint16) * 5000 + 3
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_levels(tmp_path / "a.png")), levels)


def test_one_bit_is_zero_and_one(tmp_path):
    Image.fromarray(LEVELS % 2 == 1).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_levels(tmp_path / "a.png")), LEVELS % 2)


def test_the_orientation_is_applied(tmp_path):
    image = Image.fromarray(LEVELS)
    image.getexif()[0x0112] = 6  # turn clockwise to see it upright
    image.save(tmp_path / "a.png", exif=image.getexif())
    assert np.array_equal(np.asarray(load_levels(tmp_path / "a.png")), np.rot90(LEVELS, -1))


def test_colours_floats_and_junk_are_data_errors(tmp_path):
    colours = np.zeros((3, 4, 3), np.uint8)
    colours[1, 2, 1] = 1
    Image.fromarray(colours).save(tmp_path / "colours.png")
    Image.fromarray(LEVELS.astype(np.float32)).save(tmp_path / "floats.tiff")
    (tmp_path / "cut.png").write_bytes((tmp_path / "colours.png").read_bytes()[:50])
    (tmp_path / "empty.png").touch()
    for name in ("colours.png", "floats.tiff", "cut.png", "empty.png", "absent.png"):
        with pytest.raises(DataError, match=f"{name}: "):
            load_levels(tmp_path / name)
