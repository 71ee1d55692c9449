"""A source made into equal-sized pictures: fit, crop, flip, an optional cache in memory, and a way
round bad files.
"""

import itertools
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vqfast import _check
from vqfast.data.order import augmentation, order
from vqfast.data.source import NO_LABEL, Source
from vqfast.errors import DataError
from vqfast.images import array_to_image, crop, fit, image_to_array

CROPS = ("center", "random")


def to_float(pixels: Tensor) -> Tensor:
    """[..., H, W, 3] uint8 to [..., 3, H, W] float32 in [-1, 1], on the device of `pixels`."""
    return pixels.movedim(-1, -3).contiguous().float().div_(127.5).sub_(1)


class ImageDataset(torch.utils.data.Dataset):
    """Pictures of one size, as `dict(image [3, H, W] float32 in [-1, 1], label, index)`.

    Args:
        source: where the pictures come from (`open_source`).
        size: side, or (height, width). Smaller pictures are enlarged.
        crop: "center", or "random" (position).
        min_crop: with "random", the least fraction of the largest window that a crop may show,
            in (0, 1].
        flip: mirror half of the pictures, at random.
        filter: "lanczos", "bicubic", "bilinear" or "nearest".
        cache: True reads all pictures now and keeps them, shrunk as far as `size` and `min_crop`
            allow, at 3 bytes a pixel. It changes speed alone: samples, order and the count of bad
            files stay the same.
    """

    def __init__(
        self,
        source: Source,
        size: int | Sequence[int],
        *,
        crop: str = "center",
        min_crop: float = 1.0,
        flip: bool = False,
        filter: str = "lanczos",
        cache: bool = False,
    ):
        _check.choice("crop", crop, CROPS)
        _check.number("min_crop", min_crop, low=0, low_open=True, high=1)
        if not len(source):
            raise DataError(f"{source.root}: 0 pictures")
        self.source = source
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.crop, self.flip, self.filter = crop, flip, filter
        self.min_crop = min_crop if crop == "random" else 1.0
        self._cache = _Cache(self) if cache else None
        self._bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    @property
    def class_names(self) -> list[str] | None:
        return self.source.class_names

    def __getitem__(self, index: int) -> dict:
        """Picture `index` of the source. A random crop or flip depends on `index` alone here.

        Raises:
            DataError: the picture is bad.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in {-len(self)}..{len(self) - 1}, got {index}")
        index %= len(self)
        pixels = self._pixels(index, augmentation(0, index))
        image = to_float(torch.from_numpy(pixels))
        return {"image": image, "label": self.source.label(index), "index": index}

    def fitted(self, index: int) -> np.ndarray:
        """[h, w, 3] uint8: the part of the preparation that may be cached. DataError for a bad
        picture.
        """
        image = self.source.read(index)
        return image_to_array(fit(image, self.size, min_crop=self.min_crop, filter=self.filter))

    def _pixels(self, index: int, rng: random.Random) -> np.ndarray:
        array = self._cache[index] if self._cache else self.fitted(index)
        moving = rng if self.crop == "random" else None
        if array.shape[:2] != self.size or self.min_crop < 1:
            image = array_to_image(array)
            image = crop(image, self.size, rng=moving, min_crop=self.min_crop, filter=self.filter)
            array = image_to_array(image)
        if self.flip and rng.random() < 0.5:
            array = array[:, ::-1]
        return np.ascontiguousarray(array)

    def draw(
        self, ordinal: int, *, seed: int, shuffle: bool = True, max_bad: int = 0
    ) -> tuple[np.ndarray | None, int, int, list[tuple[int, str]]]:
        """Sample number `ordinal` of the endless stream of epochs.

        A bad picture leaves its place to another one of the same epoch: the one half an epoch
        ahead, or the next good one after that. All other places keep their pictures, whatever is
        bad.

        Returns:
            pixels [H, W, 3] uint8, label, index, and (index, reason) of the bad pictures met. When
            these are more than `max_bad`, or all, the search ends and the pixels are None.
        """
        n = len(self)
        epoch, position = divmod(ordinal, n)
        places = order(seed, epoch, n) if shuffle else range(n)
        others = ((position + n // 2 + k) % n for k in range(n))
        bad: list[tuple[int, str]] = []
        for place in itertools.chain([position], (p for p in others if p != position)):
            index = int(places[place])
            if index not in self._bad:
                try:
                    pixels = self._pixels(index, augmentation(seed, ordinal))
                    return pixels, self.source.label(index), index, bad
                except DataError as error:
                    self._bad[index] = str(error)
            bad.append((index, self._bad[index]))
            if len(bad) > max_bad:
                break
        return None, NO_LABEL, -1, bad


class _Cache:
    """The fitted pictures in one block that forked workers share; a bad one raises its DataError
    when asked for.
    """

    def __init__(self, dataset: ImageDataset):
        arrays: list[np.ndarray] = []
        self._errors: dict[int, str] = {}
        for index in range(len(dataset)):
            try:
                arrays.append(dataset.fitted(index))
            except DataError as error:
                self._errors[index] = str(error)
                arrays.append(np.empty((0, 0, 3), dtype=np.uint8))
        self._shapes = np.array([a.shape for a in arrays], dtype=np.int64)
        self._ends = np.cumsum(self._shapes.prod(axis=1))
        self._block = np.concatenate([a.reshape(-1) for a in arrays])

    def __getitem__(self, index: int) -> np.ndarray:
        if index in self._errors:
            raise DataError(self._errors[index])
        shape, end = self._shapes[index], int(self._ends[index])
        return self._block[end - int(shape.prod()) : end].reshape(shape)
