"""Pictures in and out: safe reading, modes to RGB, resize and crop, tensors, grids, PNG. The only
importer of Pillow.

A picture file is hostile until read: only regular files are opened, only listed formats are parsed,
the number of pixels is judged from the header, and every failure of a decoder becomes one DataError
with the name and the reason.
"""

import contextlib
import os
import random
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor

from vqfast import _check
from vqfast._files import atomic_file
from vqfast.errors import DataError

__all__ = [
    "EXTENSIONS",
    "MAX_PIXELS",
    "Picture",
    "array_to_image",
    "crop",
    "fit",
    "grid",
    "image_to_array",
    "load_image",
    "load_levels",
    "printable",
    "resize_center_crop",
    "save_png",
    "to_pil",
    "to_tensor",
]

Picture = Image.Image  # the one name of Pillow that other files may use

# decoders that Pillow links in; no format here starts another program or reads a second file
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# fmt: off
EXTENSIONS = frozenset([
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
])
# fmt: on
MAX_PIXELS = 89_478_485  # 256 MiB of 3-byte pixels: the limit at which Pillow itself begins to warn
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}

# what Pillow's parsers raise on damaged files: they index, unpack and convert before they validate
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION_TAG = 0x0112
_PHOTOMETRIC_TAG = 0x0106
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def printable(name: str | bytes | os.PathLike) -> str:
    """The name on one line: what a terminal or a log cannot show is escaped."""
    text = os.fsdecode(name)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ---- reading


@contextlib.contextmanager
def _open_regular(path: str | bytes | os.PathLike) -> Iterator[BinaryIO]:
    """The open file, if the path leads to a regular one. Anything else (FIFO, device, folder) is
    not opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    # the file may have been exchanged since: O_NONBLOCK keeps a FIFO from blocking, fstat finds it
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("not a regular file")
        yield file


def _refuse_large_webp(file: BinaryIO) -> None:
    """Pillow allocates the canvas of a WebP (up to 2 GiB) when it opens the file, so its header is
    read here.
    """
    head = file.read(30)
    file.seek(0)
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return
    kind = head[12:16]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(head[24:27], "little")
        height = 1 + int.from_bytes(head[27:30], "little")
    elif kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (v & 0x3FFF for v in struct.unpack("<HH", head[26:30]))
    _refuse_large(width, height)


def _refuse_large(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise OSError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")
    if width < 1 or height < 1:
        raise OSError(f"{width} x {height} pixels")


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits, v >> 8. Pillow's own conversion would clip every level above 255."""
    values = np.asarray(image).astype(np.uint16)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if tags.get(_PHOTOMETRIC_TAG) == 0:
        values = 65535 - values  # white is zero; Pillow inverts 8 bits only
    level = (values >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # PNG: one grey level means transparent
        level[values == clear] = 255
    return Image.fromarray(level)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB at 8 bits: 16-bit levels keep their high byte, transparency is laid over white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _high_byte(image)
    elif image.mode in ("I", "F"):
        raise OSError(f"mode {image.mode} (32 bits per pixel) has no defined 8-bit levels")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation, or None; damaged EXIF does not spoil good pixels."""
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except _DECODER_ERRORS:
        return None


def _one_channel(image: Image.Image) -> Image.Image:
    """Mode I: palette numbers, or grey levels at the depth of the file."""
    if image.mode in ("LA", "La", "PA"):
        image = image.convert(image.mode[0])
    if image.mode == "F":
        raise OSError("mode F (32-bit floats) has no levels")
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        image = image.convert("RGB")
        red, green, blue = np.moveaxis(np.asarray(image), 2, 0)
        if not (np.array_equal(red, green) and np.array_equal(green, blue)):
            raise OSError("a picture with one channel is needed, this one has colours")
        image = image.getchannel(0)
    return Image.fromarray(np.asarray(image).astype(np.int32))


def _decode(file: BinaryIO, reduce: Callable[[Image.Image], Image.Image] = _to_rgb) -> Image.Image:
    _refuse_large_webp(file)
    with warnings.catch_warnings():
        # Pillow warns of large sizes and odd metadata; the size is judged below, the rest changes
        # no pixel
        warnings.simplefilter("ignore")
        with Image.open(file, formats=FORMATS) as image:
            _refuse_large(*image.size)
            image.load()  # the first frame only
            # TIFF turns itself and drops the tag while loading, so the tag is read after that
            return _upright(reduce(image), _orientation(image))


def load_image(
    source: str | bytes | os.PathLike | BinaryIO, name: str | None = None
) -> Image.Image:
    """Read one picture as 8-bit RGB, upright.

    EXIF orientation is applied, 16-bit levels become v >> 8, CMYK, L, LA, 1 and P become RGB, alpha
    is laid over white, and of an animation the first frame is taken.

    Args:
        source: a path, or a seekable binary file that holds the picture (`io.BytesIO` for bytes in
            memory).
        name: what to call it in errors; the path by default.

    Returns:
        A PIL image of mode "RGB".

    Raises:
        DataError: missing, unreadable, not a regular file, empty, truncated, of no listed format,
            or larger than `MAX_PIXELS`, which is judged from the header. FIFOs and devices are
            never opened.
    """
    return _load(source, name, _to_rgb)


def load_levels(path: str | bytes | os.PathLike) -> Image.Image:
    """Read the one channel of a picture as it is stored: a map of labels or of depths, upright.

    Palette numbers of a picture with a palette, else grey levels of 1, 8 or 16 bits. A picture in
    colours that are all grey counts as grey; transparency is dropped.

    Returns:
        A PIL image of mode "I", 32-bit integers.

    Raises:
        DataError: as `load_image`, or the picture has colours or floats.
    """
    return _load(path, None, _one_channel)


def _load(
    source: str | bytes | os.PathLike | BinaryIO,
    name: str | None,
    reduce: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    if isinstance(source, (str, bytes, os.PathLike)):
        shown = printable(source if name is None else name)
    else:
        shown = printable("picture" if name is None else name)
    try:
        if not isinstance(source, (str, bytes, os.PathLike)):
            return _decode(source, reduce)
        with _open_regular(source) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise OSError("empty file")
            return _decode(file, reduce)
    except Image.UnidentifiedImageError:
        known = ", ".join(f for f in FORMATS if f != "MPO")
        raise DataError(f"{shown}: not a picture in one of the formats {known}") from None
    except _DECODER_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{shown}: {printable(reason)}") from None


# ---- sizes


def _side_pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    _check.integer("size", height, low=1)
    _check.integer("size", width, low=1)
    return int(height), int(width)


def fit(
    image: Image.Image, size: int | Sequence[int], *, min_crop: float = 1.0, filter: str = "lanczos"
) -> Image.Image:
    """Shrink a picture to the smallest size that still covers `size / min_crop`; never enlarges it.

    This is the part of the preparation that no random number touches, so its result may be cached.

    Args:
        image: an RGB picture.
        size: side, or (height, width) of the later crop.
        min_crop: least fraction of the picture that a later `crop` may show, in (0, 1].
        filter: "lanczos", "bicubic", "bilinear" or "nearest".
    """
    height, width = _side_pair(size)
    _check.number("min_crop", min_crop, low=0, low_open=True, high=1)
    _check.choice("filter", filter, FILTERS)
    scale = max(height / image.height, width / image.width) / min_crop
    if scale >= 1:
        return image
    new = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    return image if new == image.size else image.resize(new, FILTERS[filter])


def crop(
    image: Image.Image,
    size: int | Sequence[int],
    *,
    rng: random.Random | None = None,
    min_crop: float = 1.0,
    filter: str = "lanczos",
) -> Image.Image:
    """Cut a window of the aspect of `size` out of the picture and bring it to `size`.

    The largest such window, in the centre; with `rng` at a random place, and of a random fraction
    in [min_crop, 1] of the largest. A picture smaller than `size` is enlarged. A window that
    already has `size` is copied, not resampled.
    """
    height, width = _side_pair(size)
    _check.number("min_crop", min_crop, low=0, low_open=True, high=1)
    _check.choice("filter", filter, FILTERS)
    scale = min(image.height / height, image.width / width)
    if rng is not None and min_crop < 1:
        scale *= rng.uniform(min_crop, 1)
    window_h, window_w = min(height * scale, image.height), min(width * scale, image.width)
    room_y, room_x = image.height - window_h, image.width - window_w
    exact = abs(window_h - height) < 0.5 and abs(window_w - width) < 0.5
    if exact and image.height >= height and image.width >= width:
        rows, columns = image.height - height, image.width - width
        top = rng.randint(0, rows) if rng else rows // 2
        left = rng.randint(0, columns) if rng else columns // 2
        return image.crop((left, top, left + width, top + height))
    y, x = (rng.uniform(0, room_y), rng.uniform(0, room_x)) if rng else (room_y / 2, room_x / 2)
    box = (x, y, min(x + window_w, image.width), min(y + window_h, image.height))
    return image.resize((width, height), FILTERS[filter], box=box)


def resize_center_crop(
    image: Image.Image, size: int | Sequence[int], *, filter: str = "lanczos"
) -> Image.Image:
    """The smallest side resized to fit, then the centre cut out: exactly `size` = side or (height,
    width).
    """
    return crop(fit(image, size, filter=filter), size, filter=filter)


# ---- arrays and tensors


def image_to_array(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8, a copy that may be written to."""
    return np.array(image.convert("RGB"), dtype=np.uint8)


def array_to_image(array: np.ndarray) -> Image.Image:
    """The picture of an [H, W, 3] uint8 array."""
    return Image.fromarray(np.ascontiguousarray(array), "RGB")


def to_tensor(image: Image.Image, size: int | Sequence[int] | None = None) -> Tensor:
    """[3, H, W] float32 in [-1, 1], v / 127.5 - 1; with `size` after `resize_center_crop`."""
    if size is not None:
        image = resize_center_crop(image, size)
    values = torch.from_numpy(image_to_array(image)).permute(2, 0, 1).contiguous()
    return values.float().div_(127.5).sub_(1)


def to_pil(x: Tensor) -> Image.Image:
    """The picture of a [3, H, W] tensor: clamped to [-1, 1], levels truncated as
    taming-transformers writes them.

    A thousandth of a level is added first, so that `to_pil(to_tensor(image))` gives every pixel
    back.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x is not [3, H, W].
    """
    _check.floating("x", x)
    _check.ndim("x", x, 3)
    if x.shape[0] != 3:
        raise ValueError(f"x must be [3, H, W], got {list(x.shape)}")
    levels = (x.detach().float().nan_to_num(0).clamp(-1, 1) + 1) * 127.5 + 1e-3
    return array_to_image(levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def grid(images: Sequence[Image.Image], columns: int | None = None, pad: int = 2) -> Image.Image:
    """One white sheet with the pictures row by row, unscaled, in cells of the largest one's size.

    Args:
        images: at least one picture.
        columns: pictures per row; by default as near to a square as it goes.
        pad: white pixels around each picture.
    """
    if not images:
        raise ValueError("images must hold at least one picture, got none")
    columns = columns or max(1, round(len(images) ** 0.5))
    _check.integer("columns", columns, low=1)
    columns = min(columns, len(images))
    cell_w = max(i.width for i in images) + pad
    cell_h = max(i.height for i in images) + pad
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_w + pad, rows * cell_h + pad), (255, 255, 255))
    for n, image in enumerate(images):
        row, column = divmod(n, columns)
        sheet.paste(image.convert("RGB"), (pad + column * cell_w, pad + row * cell_h))
    return sheet


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a PNG that appears whole or not at all. The bytes depend on the pixels alone."""
    with atomic_file(Path(path)) as temporary:
        image.save(temporary, format="PNG")
