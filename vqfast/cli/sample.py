"""`vqfast sample`: images from a model, written as they are finished."""

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import vqfast
from vqfast.cli import _models
from vqfast.cli._outputs import number_width, picture_folder, refuse_existing
from vqfast.cli._parser import Report, UsageError
from vqfast.images import Image, grid, save_png

_MAX_ON_GRID = 4096  # a sheet is held in memory; a folder is not


def run(args: argparse.Namespace) -> Report:
    """Writes image after image, so that memory does not grow with -n and an interruption leaves
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
    images = _images(pipe, args)
    started = time.monotonic()
    width, kept = number_width(args.n), []
    with picture_folder(out, args.overwrite) if out else contextlib.nullcontext() as folder:
        for i, image in enumerate(tqdm(images, total=args.n, unit="image", disable=None)):
            if folder is not None:
                save_png(image, folder / f"{i:0{width}d}.png")
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


def _images(pipe: "vqfast.Pipeline", args: argparse.Namespace) -> Iterator[Image.Image]:
    """The images one by one; the pipeline holds one batch of codes.

    Raises:
        UsageError: at once, when an argument does not suit the model (class, size, guidance).
    """
    try:
        return pipe.iter_images(
            args.classes,
            args.n,
            seed=args.seed,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            cfg_scale=args.cfg_scale,
            size=args.size,
            batch_size=args.batch_size,
            precision=args.precision,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
