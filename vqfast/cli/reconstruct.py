"""`vqfast reconstruct`: encode and decode pictures, and say how near they come."""

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vqfast import metrics
from vqfast.cli import _models
from vqfast.cli._outputs import refuse_existing
from vqfast.cli._parser import Report
from vqfast.images import grid, printable, save_png, to_pil

_SSIM_SIDE = 11  # the window of SSIM


def run(args: argparse.Namespace) -> Report:
    """Writes a sheet of input and reconstruction side by side, unscaled, one row per picture.

    PSNR and SSIM are those of the 8-bit pictures on the sheet.
    """
    out = refuse_existing(args.out, args.overwrite)
    model = _models.tokenizer(args.model, _models.choose_device(args.device))
    counts = torch.zeros(model.n_codes, dtype=torch.int64)
    cells, rows = [], []
    for path in tqdm(args.images, unit="image", disable=None):
        x = _models.read_picture(path, args.size, model.config.factor)
        size = (x.shape[2], x.shape[3])
        _models.refuse_memory(args.max_memory, model, size, path, encodes=True, decodes=True)
        codes, x_hat = _models.reconstruct(model, x, args.max_memory)
        counts += torch.bincount(codes.flatten(), minlength=model.n_codes)
        cells += [to_pil(x[0]), to_pil(x_hat[0])]
        rows.append({"image": printable(path)} | quality(x, x_hat))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(cells, columns=2), out)
    values = {
        "out": str(out),
        "images": rows,
        "psnr_mean": mean(rows, "psnr"),
        "ssim_mean": mean(rows, "ssim"),
        "usage": metrics.usage(counts),
        "perplexity": metrics.perplexity(counts),
    }
    return Report(values, _text(values, out))


def quality(x: torch.Tensor, x_hat: torch.Tensor) -> dict[str, float | None]:
    """PSNR (infinite for equal pictures) and SSIM of one pair as 8-bit pictures; None for those
    smaller than SSIM's window."""
    a, b = _models.show(x), _models.show(x_hat)
    ssim = float(metrics.ssim(a, b)) if min(a.shape[2:]) >= _SSIM_SIDE else None
    return {"psnr": float(metrics.psnr(a, b)), "ssim": ssim}


def mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Mean of what is a number under `key`."""
    numbers = [row[key] for row in rows if row[key] is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _text(values: dict[str, Any], out: Path) -> str:
    def line(name: str, psnr: float | None, ssim: float | None) -> str:
        shown = ["   -   " if v is None else f"{v:7.3f}" for v in (psnr, ssim)]
        return f"PSNR {shown[0]} dB  SSIM {shown[1]}  {name}"

    lines = [line(row["image"], row["psnr"], row["ssim"]) for row in values["images"]]
    lines.append(line("mean", values["psnr_mean"], values["ssim_mean"]))
    lines.append(f"codes used {values['usage']:.2%}, perplexity {values['perplexity']:.1f}")
    lines.append(f"sheet: {out}")
    return "\n".join(lines)
