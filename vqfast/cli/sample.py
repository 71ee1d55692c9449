"""`vqfast sample`: images from a model, written as they are finished."""

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

import vqfast
from vqfast.cli import _models
from vqfast.cli._outputs import number_width, picture_folder, refuse_existing
from vqfast.cli._parser import Report, UsageError
from vqfast.images import Image, grid, save_png

_MAX_ON_GRID = 4096  # a sheet is held in memory; a folder is not


def run(args: argparse.Namespace) -> Report:
    """Writes batch after batch, so that memory does not grow with -n and an interruption leaves
    finished images: image i of a request depends on (seed, i) alone."""
    if args.grid is not None and not 1 <= args.n <= _MAX_ON_GRID:
        raise UsageError(f"--grid takes 1 to {_MAX_ON_GRID} images, got -n {args.n}")
    out = None if args.out is None and args.grid is not None else Path(args.out or "samples")
    for path in (out, args.grid):
        if path is not None:
            refuse_existing(path, args.overwrite)
    model = _models.model_path(args.model)
    device = _models.choose_device(args.device)
    pipe = vqfast.Pipeline.from_pretrained(model).to(device)
    request = _request(args)
    _try_arguments(pipe, request)
    started = time.monotonic()
    kept: list[Image.Image] = []
    with picture_folder(out, args.overwrite) if out else contextlib.nullcontext() as folder:
        for i, image in _images(pipe, request, args.n, args.batch_size):
            if folder is not None:
                save_png(image, folder / f"{i:0{number_width(args.n)}d}.png")
            if args.grid is not None:
                kept.append(image)
    if args.grid is not None:
        Path(args.grid).parent.mkdir(parents=True, exist_ok=True)
        save_png(grid(kept), args.grid)
    seconds = time.monotonic() - started
    values = {
        "n": args.n,
        "out": None if out is None else str(out),
        "grid": args.grid,
        "model": str(model),
        "device": str(device),
        "seed": args.seed,
        "classes": args.classes,
        "seconds": round(seconds, 3),
        "images_per_second": round(args.n / seconds, 3) if seconds else None,
    }
    places = ", ".join(str(p) for p in (out, args.grid) if p is not None)
    return Report(values, f"{args.n} images in {seconds:.1f} s: {places}")


def _request(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "classes": args.classes,
        "seed": args.seed,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "cfg_scale": args.cfg_scale,
        "size": args.size,
        "precision": args.precision,
    }


def _try_arguments(pipe: "vqfast.Pipeline", request: dict[str, Any]) -> None:
    """Lets the pipeline judge what depends on the model (class, size, guidance) before any output.

    Raises:
        UsageError: the pipeline refuses an argument.
    """
    try:
        pipe.sample_codes(n=0, **request)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None


def _images(
    pipe: "vqfast.Pipeline", request: dict[str, Any], n: int, batch_size: int
) -> Iterator[tuple[int, Image.Image]]:
    """(number, image) in order; at most `batch_size` of them are held."""
    with tqdm(total=n, unit="image", disable=None) as progress:
        for first in range(0, n, batch_size):
            count = min(batch_size, n - first)
            images = pipe.sample(n=count, first=first, batch_size=batch_size, **request)
            yield from enumerate(images, first)
            progress.update(count)
