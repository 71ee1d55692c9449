"""`vqfast decode`: a file of codes to pictures."""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from vqfast.cli import _models
from vqfast.cli._code_files import read_codes
from vqfast.cli._outputs import number_width, picture_folder, refuse_existing
from vqfast.cli._parser import Report
from vqfast.images import save_png, to_pil


def run(args: argparse.Namespace) -> Report:
    """One PNG per grid, named by its number."""
    out = refuse_existing(args.out, args.overwrite)
    device = _models.choose_device(args.device)
    model = _models.tokenizer(args.model, device)
    grids = read_codes(Path(args.codes), model.n_codes)
    width = number_width(len(grids))
    with picture_folder(out, args.overwrite) as folder:
        for i, grid in enumerate(tqdm(grids, unit="image", disable=None)):
            with torch.inference_mode():
                x = model.decode(grid.unsqueeze(0).to(device))[0]
            save_png(to_pil(x), folder / f"{i:0{width}d}.png")
    return Report({"out": str(out), "images": len(grids)}, f"{len(grids)} images: {out}")
