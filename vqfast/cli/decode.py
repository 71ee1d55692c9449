"""`vqfast decode`: a file of codes to pictures."""

import argparse

import torch
from tqdm import tqdm

from vqfast.cli import _models
from vqfast.cli._outputs import number_width, picture_folder, refuse_existing
from vqfast.cli._parser import Report
from vqfast.data.codes import read_codes
from vqfast.images import save_png, to_pil


def run(args: argparse.Namespace) -> Report:
    """One PNG per grid, named by its number."""
    out = refuse_existing(args.out, args.overwrite)
    device = _models.choose_device(args.device)
    model = _models.tokenizer(args.model, device)
    # of several encodings of a picture the first, of the picture as it is
    found = read_codes(args.codes, model.n_codes).grids
    grids = [codes[0].long() for batch in found for codes in batch]
    f, limit = model.config.factor, args.max_memory
    for grid in grids:
        size = (f * grid.shape[0], f * grid.shape[1])
        _models.refuse_memory(limit, model, size, "a picture", decodes=True)
    width = number_width(len(grids))
    with picture_folder(out, args.overwrite) as folder:
        for i, grid in enumerate(tqdm(grids, unit="image", disable=None)):
            with torch.inference_mode():
                x = model.decode(grid.unsqueeze(0).to(device), max_memory=limit)[0]
            save_png(to_pil(x), folder / f"{i:0{width}d}.png")
    return Report({"out": str(out), "images": len(grids)}, f"{len(grids)} images: {out}")
