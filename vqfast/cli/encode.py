"""`vqfast encode`: pictures to a file of codes."""

import argparse

import torch
from tqdm import tqdm

from vqfast.cli import _models
from vqfast.cli._outputs import refuse_existing
from vqfast.cli._parser import Report
from vqfast.data.codes import encoder_digest, save_codes
from vqfast.images import printable


def run(args: argparse.Namespace) -> Report:
    """One grid per picture, in the order given; nothing is written if one picture is bad."""
    out = refuse_existing(args.out, args.overwrite)
    device = _models.choose_device(args.device)
    model = _models.tokenizer(args.model, device)
    grids = []
    for path in tqdm(args.images, unit="image", disable=None):
        x = _models.read_picture(path, args.size, model.config.factor)
        _models.refuse_memory(args.max_memory, model, (x.shape[2], x.shape[3]), path, encodes=True)
        with torch.inference_mode():
            grids.append(model.encode(x.to(device), max_memory=args.max_memory)[0].cpu())
    names = [printable(path) for path in args.images]
    save_codes(out, grids, n_codes=model.n_codes, encoder=encoder_digest(model), names=names)
    total = sum(grid.numel() for grid in grids)
    values = {
        "out": str(out),
        "images": len(grids),
        "codes": total,
        "n_codes": model.n_codes,
        "grids": [list(grid.shape) for grid in grids],
    }
    return Report(values, f"{len(grids)} images, {total} codes of {model.n_codes}: {out}")
