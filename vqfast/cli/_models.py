"""The model and the device that the flags ask for, and pictures made fit for a tokenizer."""

import sys
from pathlib import Path

import torch
from torch import Tensor

import vqfast
from vqfast.cli._parser import UsageError
from vqfast.errors import BackendError, CheckpointError, DataError
from vqfast.images import load_image, to_pil, to_tensor
from vqfast.models import tiled

__all__ = [
    "choose_device",
    "model_path",
    "read_picture",
    "reconstruct",
    "refuse_memory",
    "show",
    "tokenizer",
]


def model_path(given: str | None) -> Path:
    """The path of --model, or of the model that comes with the package."""
    if given is not None:
        return Path(given)
    shipped = Path(vqfast.__file__).parent / "assets" / "emoji64"
    if not shipped.is_dir():
        raise CheckpointError(f"{shipped}: the shipped model is missing; give --model")
    return shipped


def choose_device(name: str) -> torch.device:
    """The device of --device; "auto" is the first GPU, and says so when there is none.

    Raises:
        BackendError: a GPU was asked for that this machine or this torch does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        print("vqfast: no GPU found, using the CPU", file=sys.stderr)
        return torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise BackendError(f"device {name} is not there: torch sees {seen} CUDA devices")
    return device


def tokenizer(path: str | None, device: torch.device) -> "vqfast.VQGAN":
    """The tokenizer of --model (of a pipeline its first stage), ready for pictures."""
    model = vqfast.VQGAN.from_pretrained(model_path(path)).to(device)
    if model.config.in_channels != 3 or model.config.out_ch != 3:
        raise UsageError(
            f"--model: pictures have 3 channels, this tokenizer takes {model.config.in_channels} "
            f"and gives {model.config.out_ch}"
        )
    return model


def read_picture(path: str, size: tuple[int, int] | None, factor: int) -> Tensor:
    """[1, 3, H, W] in [-1, 1]: resized and cropped to `size`, or else its middle, cut to multiples
    of `factor`.

    Raises:
        UsageError: `size` is not a multiple of `factor`. DataError: bad or too small a picture.
    """
    if size is not None and (size[0] % factor or size[1] % factor):
        raise UsageError(f"--size must be multiples of {factor}, got {size[0]}x{size[1]}")
    image = load_image(path)
    if size is None:
        width, height = image.width // factor * factor, image.height // factor * factor
        if not width or not height:
            raise DataError(f"{path}: {image.width}x{image.height} is smaller than {factor} pixels")
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return to_tensor(image, size).unsqueeze(0)


def refuse_memory(
    limit: int | None,
    model: "vqfast.VQGAN",
    size: tuple[int, int],
    what: str,
    *,
    encodes: bool = False,
    decodes: bool = False,
) -> None:
    """UsageError if --max-memory is less than a picture of `size` pixels, named `what`, needs."""
    needs, (H, W), f = 0, size, model.config.factor
    itemsize = model.decoder.conv_out.weight.element_size()
    if encodes:
        needs = tiled.least_memory(model.encoder, (H, W), itemsize)
    if decodes:
        needs = max(needs, tiled.least_memory(model.decoder, (H // f, W // f), itemsize))
    if limit is not None and limit < needs:
        raise UsageError(
            f"--max-memory must be at least {needs} bytes for {what} of {H}x{W}, got {limit}"
        )


def reconstruct(
    model: "vqfast.VQGAN", x: Tensor, max_memory: int | None = None
) -> tuple[Tensor, Tensor]:
    """x [1, 3, H, W] -> its codes [1, h, w] and its reconstruction [1, 3, H, W] on the CPU."""
    with torch.inference_mode():
        x = x.to(next(model.parameters()).device)
        codes = model.encode(x, max_memory=max_memory)
        return codes.cpu(), model.decode(codes, max_memory=max_memory).float().cpu()


def show(x: Tensor) -> Tensor:
    """[1, 3, H, W] as the viewer of its PNG sees it: clamped to [-1, 1], 8 bits."""
    return to_tensor(to_pil(x[0])).unsqueeze(0)
