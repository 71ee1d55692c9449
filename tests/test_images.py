"""Reading, resizing and writing pictures: hostile files, modes, orientation, exact pixels."""

import contextlib
import io
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vqfast import images
from vqfast.errors import DataError
from vqfast.images import load_image


def _photo(height=40, width=48, seed=0):
    """Smooth colours, all channels different, no symmetry."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    rng = np.random.default_rng(seed)
    planes = [127 + 120 * np.sin(a * x + b * y + c) for a, b, c in rng.uniform(1, 6, (3, 3))]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def _pixels(image):
    return np.asarray(image)


def _png_chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def _png(width, height, depth, colour, *chunks):
    head = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _png_chunk(b"IEND", b"")


# ---- what is refused


@pytest.mark.parametrize("content", [b"", b"not a picture\n" * 50, b"\x89PNG\r\n\x1a\n"])
def test_junk_is_a_data_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match="bad.png: "):
        load_image(path)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm"])
def test_every_truncation_is_a_data_error_or_the_whole_picture(tmp_path, kind):
    whole = io.BytesIO()
    _photo().save(whole, format=kind)
    data, good = whole.getvalue(), _pixels(load_image(io.BytesIO(whole.getvalue())))
    refused = 0
    for cut in range(0, len(data), max(1, len(data) // 40)):
        try:
            shown = load_image(io.BytesIO(data[:cut]), "cut")
        except DataError:
            refused += 1
        else:
            assert np.array_equal(_pixels(shown), good), f"cut at {cut} gave other pixels"
    assert refused >= 35


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff"])
def test_flipped_bytes_never_raise_anything_but_data_error(kind):
    whole = io.BytesIO()
    _photo().save(whole, format=kind)
    data, rng = bytearray(whole.getvalue()), np.random.default_rng(1)
    for _ in range(150):
        bad = bytearray(data)
        for at in rng.integers(0, min(len(data), 400), 3):
            bad[at] = rng.integers(256)
        with contextlib.suppress(DataError):
            assert load_image(io.BytesIO(bytes(bad)), "flipped").mode == "RGB"


def test_missing_folder_and_broken_link(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="No such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="not a regular file"):
        load_image(tmp_path / "folder.png")
    with pytest.raises(DataError, match="No such file"):
        load_image(tmp_path / "link.png")


def test_no_permission(tmp_path):
    path = tmp_path / "secret.png"
    _photo().save(path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("runs as root, who may read everything")
    with pytest.raises(DataError, match="Permission denied"):
        load_image(path)


@pytest.mark.parametrize("target", ["fifo", "/dev/zero"])
def test_fifo_and_device_are_not_opened(tmp_path, target, monkeypatch):
    path = tmp_path / "pipe.png"
    if target == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda p, *a, **k: (opened.append(p), real(p, *a, **k))[1])
    with pytest.raises(DataError, match="not a regular file"):
        load_image(path)
    assert not opened


def test_file_exchanged_for_a_fifo_after_the_check_does_not_hang(tmp_path, monkeypatch):
    path = tmp_path / "pipe.png"
    _photo().save(path)
    real = os.stat

    def exchange(p, *args, **kwargs):
        result = real(p, *args, **kwargs)
        path.unlink()
        os.mkfifo(path)
        return result

    monkeypatch.setattr(os, "stat", exchange)
    with pytest.raises(DataError, match="not a regular file"):
        load_image(path)


def _bombs():
    rows = zlib.compress(b"\0" * (50_000 // 8 + 1) * 20)
    png = _png(50_000, 50_000, 1, 0, _png_chunk(b"IDAT", rows))
    just_over = _png(9_460, 9_460, 8, 2, _png_chunk(b"IDAT", zlib.compress(b"\0" * 9_460)))
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + (16_000).to_bytes(3, "little") * 2
    webp = b"RIFF" + struct.pack("<I", 4 + len(vp8x) + 20) + b"WEBP" + vp8x + b"\0" * 20
    text = _png(8, 8, 8, 0, _png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 120_000_000, 1)))
    return {"png": png, "just over": just_over, "webp": webp, "text": text}


_BOMB_CHILD = """
import resource, sys, time
from vqfast.errors import DataError
from vqfast.images import load_image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in sys.argv[1:]:
    before, start = peak(), time.process_time()
    try:
        load_image(path)
    except DataError as error:
        print("refused", peak() - before, time.process_time() - start, error)
"""


def test_bombs_are_refused_from_the_header(tmp_path):
    _photo().save(tmp_path / "warm-up.png")
    paths = [tmp_path / "warm-up.png"]
    for name, data in _bombs().items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(data)
    # -W error: Pillow's own warning of large pictures must not reach the user
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", _BOMB_CHILD, *paths]
    run = subprocess.run(command, capture_output=True, text=True)
    assert not run.stderr
    rows = [line.split() for line in run.stdout.splitlines()]
    assert [row[0] for row in rows] == ["refused"] * 4
    for _, grown_mib, seconds, *what in rows:
        assert int(grown_mib) < 100 and float(seconds) < 1, what


def test_gif_of_many_frames_gives_the_first(tmp_path):
    frames = [Image.new("RGB", (8, 8), (255, n % 256, n // 256)) for n in range(2000)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    start = time.process_time()
    assert _pixels(load_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "head",
    [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1" + b"\0" * 40, b"<svg>"],
)
def test_formats_off_the_list_start_no_program(tmp_path, head, monkeypatch):
    marker, tool = tmp_path / "ran", tmp_path / "bin" / "gs"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ntouch {marker}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    (tmp_path / "a.png").write_bytes(head)
    with pytest.raises(DataError, match="not a picture in one of the formats"):
        load_image(tmp_path / "a.png")
    assert not marker.exists()


@pytest.mark.parametrize("name", [b"new\nline.png", b"\xff\xfe.png", b"x" * 251 + b".png"])
def test_odd_names_work_and_are_shown_on_one_line(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        _photo().save(file, format="PNG")
    assert load_image(path).size == (48, 40)
    with open(path, "wb"):
        pass
    with pytest.raises(DataError) as caught:
        load_image(path)
    assert str(caught.value).isprintable()


# ---- what the pixels become


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_sixteen_bit_grey_keeps_256_levels(tmp_path, kind):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / f"a.{kind}", format=kind)
    shown = _pixels(load_image(tmp_path / f"a.{kind}"))
    assert np.array_equal(shown, np.repeat((ramp >> 8)[..., None], 3, -1))


def test_sixteen_bit_rgb_png_keeps_the_high_byte(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (7, 5, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(_png(5, 7, 16, 2, _png_chunk(b"IDAT", zlib.compress(rows))))
    assert np.array_equal(_pixels(load_image(tmp_path / "a.png")), values >> 8)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_sixteen_bit_tiff_rgb_and_white_is_zero(tmp_path, byteorder):
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 65536, (7, 5, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, byteorder=byteorder, photometric="rgb")
    assert np.array_equal(_pixels(load_image(tmp_path / "a.tif")), values >> 8)
    grey = values[..., 0]
    tifffile.imwrite(tmp_path / "b.tif", grey, byteorder="<", photometric="miniswhite")
    assert np.array_equal(_pixels(load_image(tmp_path / "b.tif"))[..., 0], (65535 - grey) >> 8)


def test_sixteen_bit_transparent_level_becomes_white(tmp_path):
    values = np.array([[0, 513, 65535]], dtype=">u2")
    rows = zlib.compress(b"\0" + values.tobytes())
    clear = _png_chunk(b"tRNS", struct.pack(">H", 513))
    (tmp_path / "a.png").write_bytes(_png(3, 1, 16, 0, clear, _png_chunk(b"IDAT", rows)))
    assert _pixels(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255, 255]


def test_32_bit_levels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="32 bits"):
        load_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("kind", ["jpeg", "tiff", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, kind, orientation):
    # corners of the upright picture: red, green / blue, white
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:] = (255, 0, 0), (0, 255, 0)
    upright[16:, :24], upright[16:, 24:] = (0, 0, 255), (255, 255, 255)
    stored = {  # what a camera stores, by the definition of the tag (EXIF 2.32, 4.6.4 A)
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpeg" else {}
    picture = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    picture.save(tmp_path / "a", format=kind, exif=exif, **options)
    shown = _pixels(load_image(tmp_path / "a")).astype(int)
    assert shown.shape == upright.shape
    assert np.abs(shown - upright)[4:12, 4:20].max() < 12
    assert np.abs(shown - upright)[20:28, 28:44].max() < 12
    assert np.abs(shown - upright)[20:28, 4:20].max() < 12


def test_damaged_exif_does_not_spoil_the_picture(tmp_path):
    path = tmp_path / "a.jpg"
    _photo().save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 30)
    assert load_image(path).size == (48, 40)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGB"])
def test_opaque_modes_become_rgb(tmp_path, mode):
    picture = _photo().convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture.save(path, quality=95) if mode == "CMYK" else picture.save(path)
    shown, want = load_image(path), picture.convert("RGB")
    assert shown.mode == "RGB"
    close = 12 if mode == "CMYK" else 0
    assert np.abs(_pixels(shown).astype(int) - _pixels(want)).max() <= close


def test_adobe_cmyk_is_not_inverted(tmp_path):
    # Photoshop writes CMYK JPEG inverted and says so in an Adobe marker, which Pillow writes too
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = _pixels(load_image(tmp_path / "a.jpg"))[8, 8]
    assert red > 240 and green < 15 and blue < 15


def _alpha_picture(mode):
    grey = np.full((4, 4), 100, np.uint8)
    alpha = np.array([[0, 64, 128, 255]] * 4, np.uint8)
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    return Image.merge("RGBA", [Image.fromarray(grey)] * 3 + [Image.fromarray(alpha)])


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_laid_over_white(tmp_path, mode):
    _alpha_picture(mode).save(tmp_path / "a.png")
    want = [round(100 * a / 255 + 255 * (1 - a / 255)) for a in (0, 64, 128, 255)]
    assert _pixels(load_image(tmp_path / "a.png"))[2, :, 1].tolist() == want


def test_palette_with_transparency_is_laid_over_white(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.save(tmp_path / "one.png", transparency=1)
    picture.save(tmp_path / "all.png", transparency=b"\xff\x00\xff")
    for name in ("one.png", "all.png"):
        shown = _pixels(load_image(tmp_path / name))[0].tolist()
        assert shown == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


# ---- sizes


def test_picture_of_the_right_size_is_not_resampled():
    picture = _photo(40, 48)
    assert np.array_equal(_pixels(images.resize_center_crop(picture, (40, 48))), _pixels(picture))
    middle = _pixels(images.resize_center_crop(picture, 40))
    assert np.array_equal(middle, _pixels(picture)[:, 4:44])


@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (10_000, 1), (31, 33), (300, 451)])
@pytest.mark.parametrize("size", [32, (16, 48)])
def test_any_size_becomes_exactly_the_asked_one(shape, size):
    out = images.resize_center_crop(Image.new("RGB", shape[::-1], (9, 80, 200)), size)
    height, width = (size, size) if isinstance(size, int) else size
    assert out.size == (width, height)
    assert np.abs(_pixels(out).astype(int) - [9, 80, 200]).max() <= 1


def test_smallest_side_is_resized_then_the_centre_cut():
    picture = _photo(120, 200)
    want = picture.resize((100, 60), Image.Resampling.LANCZOS).crop((20, 0, 80, 60))
    assert np.array_equal(_pixels(images.resize_center_crop(picture, 60)), _pixels(want))


def test_random_crop_moves_and_zooms_and_repeats_with_its_seed():
    picture = _photo(60, 90)
    seen = {images.crop(picture, 40, rng=random.Random(s)).tobytes() for s in range(8)}
    assert len(seen) == 8
    one, two = (images.crop(picture, 40, rng=random.Random(5), min_crop=0.5) for _ in range(2))
    assert one.tobytes() == two.tobytes()
    ramp = np.arange(60, dtype=np.uint8)[:, None, None].repeat(60, 1).repeat(3, 2)
    flat = Image.fromarray(ramp)
    for seed in range(30):  # rows of a window show the part of the ramp that it spans
        shown = _pixels(images.crop(flat, 30, rng=random.Random(seed), min_crop=0.5)).astype(int)
        assert 14 <= int(shown.max()) - int(shown.min()) + 1 <= 60


@pytest.mark.parametrize("bad", [0, -3, (4, 0)])
def test_size_below_one_is_a_value_error(bad):
    with pytest.raises(ValueError, match="size"):
        images.fit(_photo(), bad)


# ---- tensors, grids, files


def test_tensor_round_trip_gives_every_level_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    x = images.to_tensor(Image.fromarray(levels))
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    assert np.array_equal(_pixels(images.to_pil(x)), levels)


def test_to_pil_clamps_truncates_and_survives_non_finite_values():
    x = torch.tensor([-9.0, 9.0, (10.9 / 127.5) - 1, float("inf"), float("nan")])
    shown = _pixels(images.to_pil(x.expand(3, 1, 5)))[0, :, 0].tolist()
    assert shown == [0, 255, 10, 255, 127]


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 4), torch.zeros(3, 4), torch.zeros(2, 3, 4, 4)])
def test_to_pil_names_the_wrong_shape(x):
    with pytest.raises(ValueError, match="x must"):
        images.to_pil(x)


def test_grid_holds_every_picture_unscaled():
    pictures = [_photo(10 + i, 20 - i, seed=i) for i in range(5)]
    sheet = _pixels(images.grid(pictures, columns=2, pad=3))
    assert sheet.shape == (3 * (14 + 3) + 3, 2 * (20 + 3) + 3, 3)
    for i, picture in enumerate(pictures):
        y, x = 3 + i // 2 * 17, 3 + i % 2 * 23
        assert np.array_equal(sheet[y : y + 10 + i, x : x + 20 - i], _pixels(picture))
    with pytest.raises(ValueError, match="at least one"):
        images.grid([])


def test_save_png_is_whole_or_absent_and_repeats_its_bytes(tmp_path):
    images.save_png(_photo(), tmp_path / "a.png")
    images.save_png(_photo(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert np.array_equal(_pixels(load_image(tmp_path / "a.png")), _pixels(_photo()))
    before, old = (tmp_path / "a.png").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        with pytest.raises(OSError):
            images.save_png(_photo(400, 400), tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
