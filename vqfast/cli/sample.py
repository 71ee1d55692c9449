"""`vqfast sample`: images from a model, written as they are finished."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vqfast
from vqfast import _files
from vqfast.cli import _models, _resume
from vqfast.cli._outputs import REQUEST, number_width, picture_folder, refuse_existing
from vqfast.cli._parser import Report, UsageError
from vqfast.cli._progress import SampleProgress
from vqfast.images import Picture, grid, load_image, save_png

_MAX_ON_GRID = 4096  # a sheet is held in memory; a folder is not


def run(args: argparse.Namespace) -> Report:
    """Writes image after image, so that memory does not grow with -n and an interruption leaves
    finished images: image i of a request depends on (seed, i) alone."""
    _check_flags(args)
    out = None if args.out is None and args.grid is not None else Path(args.out or "samples")
    _refuse_outputs(args, out)
    model = _models.model_path(args.model)
    device = _models.choose_device(args.device)
    pipe = vqfast.Pipeline.from_pretrained(model).to(device)
    options = _options(pipe, args)
    _images(pipe, args, options, 0, args.n)  # what does not suit the model is refused now
    width = number_width(args.n)
    with contextlib.nullcontext() if out is None else _folder(pipe, args, options, out) as folder:
        missing = [(0, args.n)] if folder is None else list(_resume.gaps(folder, args.n))
        progress = SampleProgress(
            sum(count for _, count in missing), _tokens(pipe, options), args.progress or None
        )
        on_step = progress.on_step if progress.shown else None
        kept: dict[int, Picture] = {}
        try:
            for first, count in missing:
                images = _images(pipe, args, options, first, count, on_step)
                for i, image in enumerate(images, first):
                    if folder is not None:
                        save_png(image, folder / f"{i:0{width}d}.png")
                    if args.grid is not None:
                        kept[i] = image
                    progress.image()
        finally:
            progress.close()
        if args.grid is not None:
            if folder is not None:
                for i in set(range(args.n)) - kept.keys():
                    kept[i] = load_image(folder / f"{i:0{width}d}.png")
            Path(args.grid).parent.mkdir(parents=True, exist_ok=True)
            save_png(grid([kept[i] for i in range(args.n)]), args.grid)
    return _report(args, out, model, device, progress)


def _check_flags(args: argparse.Namespace) -> None:
    if args.grid is not None and not 1 <= args.n <= _MAX_ON_GRID:
        raise UsageError(f"--grid takes 1 to {_MAX_ON_GRID} images, got -n {args.n}")
    if args.keep is not None and args.complete is None:
        raise UsageError("--keep needs --complete")
    if args.cfg_interval is not None and args.cfg_scale == 1:
        raise UsageError("--cfg-interval needs a --cfg-scale that is not 1")
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude one another")
    if args.resume and args.out is None and args.grid is not None:
        raise UsageError("--resume needs --out: a sheet alone cannot be continued")


def _refuse_outputs(args: argparse.Namespace, out: Path | None) -> None:
    unfinished = args.resume and out is not None and (out / REQUEST).is_file()
    if out is not None and args.resume:
        _resume.refuse_unless_unfinished(out)
    elif out is not None:
        refuse_existing(out, args.overwrite)
    if args.grid is not None:  # an unfinished run has found its place free, and may have filled it
        refuse_existing(args.grid, args.overwrite or unfinished)


@contextlib.contextmanager
def _folder(
    pipe: "vqfast.Pipeline", args: argparse.Namespace, options: dict[str, Any], out: Path
) -> Iterator[Path]:
    """The folder to fill, which holds its request until it is full."""
    sheet = None if args.grid is None else str(Path(args.grid).absolute())
    request = _resume.describe(pipe, options, classes=args.classes, n=args.n, grid=sheet)
    with contextlib.ExitStack() as stack:
        if args.resume:
            out.mkdir(parents=True, exist_ok=True)
            folder = out
        else:
            folder = stack.enter_context(picture_folder(out, args.overwrite))
        _resume.same_request(folder, request)
        _files.remove_stale(folder)
        yield folder
        (folder / REQUEST).unlink(missing_ok=True)
        _files.fsync_path(folder)


def _options(pipe: "vqfast.Pipeline", args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline that decide pixels, classes and number aside."""
    options: dict[str, Any] = {
        "seed": args.seed,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "cfg_scale": args.cfg_scale,
        "cfg_interval": args.cfg_interval,
        "size": args.size,
        "window_rule": args.window_rule,
        "precision": args.precision,
    }
    if args.complete or args.cond:
        from vqfast.cli import _sample_inputs  # most requests have no pictures

        if args.complete:
            keep = 0.5 if args.keep is None else args.keep
            options["prefix"] = _sample_inputs.known_codes(pipe, args.complete, keep, args.size)
        if args.cond:
            options["cond"] = _sample_inputs.condition_tokens(pipe, args.cond, args.size)
    return options


def _images(
    pipe: "vqfast.Pipeline",
    args: argparse.Namespace,
    options: dict[str, Any],
    first: int,
    count: int,
    on_step: Any = None,
) -> Iterator[Picture]:
    """Images first..first + count - 1 one by one; the pipeline holds one batch of codes.

    Raises:
        UsageError: at once, when an argument does not suit the model (class, size, guidance).
    """
    more = {"batch_size": args.batch_size, "first": first, "on_step": on_step}
    try:
        return pipe.iter_images(args.classes, count, **options, **more)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None


def _tokens(pipe: "vqfast.Pipeline", options: dict[str, Any]) -> int:
    """Codes of an image that are drawn, not given."""
    config, (h, w) = pipe.tokenizer.config, pipe.grid
    if options["size"] is not None:
        h, w = (side // config.factor for side in options["size"])
    return h * w - (options["prefix"].shape[1] if "prefix" in options else 0)


def _report(
    args: argparse.Namespace, out: Path | None, model: Path, device: Any, progress: SampleProgress
) -> Report:
    seconds, drawn = progress.seconds, progress.images
    rate = drawn / seconds if seconds else None
    values = {
        "n": args.n,
        "drawn": drawn,
        "out": None if out is None else str(out),
        "grid": args.grid,
        "model": str(model),
        "device": str(device),
        "seed": args.seed,
        "classes": args.classes,
        "seconds": round(seconds, 3),
        "images_per_second": rate and round(rate, 3),
        "tokens_per_second": rate and round(rate * progress.tokens, 3),
    }
    places = ", ".join(str(p) for p in (out, args.grid) if p is not None)
    there = f", {args.n - drawn} were there" if drawn < args.n else ""
    return Report(values, f"{drawn} images in {seconds:.1f} s{there}: {places}")
