"""`vqfast convert`: any known checkpoint to the native format, or back to one that can be
written."""

import argparse

import torch
from torch import nn

import vqfast
from vqfast import checkpoints
from vqfast.checkpoints import Checkpoint
from vqfast.cli._outputs import refuse_existing
from vqfast.cli._parser import Report, UsageError
from vqfast.errors import CheckpointError
from vqfast.models import conditioning

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(args: argparse.Namespace) -> Report:
    """Reads, holds the weights against the model that the configuration describes, writes."""
    known = checkpoints.formats()
    writers = [name for name, module in known.items() if hasattr(module, "write")]
    if args.to not in writers:
        raise UsageError(f"--to must be one of {', '.join(writers)}, got {args.to}")
    if args.source_format is not None and args.source_format not in known:
        raise UsageError(f"--from must be one of {', '.join(known)}, got {args.source_format}")
    dst = refuse_existing(args.dst, args.overwrite)
    stored = {"dtype": _DTYPES[args.precision]} if args.precision else {}
    if stored and args.to != "native":
        raise UsageError(f"--precision is for --to native, got --to {args.to}")
    if args.to == "taming":
        refuse_existing(dst.with_suffix(".yaml"), args.overwrite)
    found = checkpoints.read(args.src, args.config, format=args.source_format)
    tensors, changed = checkpoints.fit(
        _model(found, args.src),
        found.tensors,
        allow_partial=args.allow_partial,
        what=args.src,
    )
    metadata = found.metadata | ({"partial": changed} if changed else {})
    try:
        known[args.to].write(dst, found.kind, found.config, tensors, metadata, **stored)
    except ValueError as error:
        raise UsageError(f"{args.src} cannot be written as {args.to}: {error}") from None
    lines = [f"{args.src} ({found.format} {found.kind}, {len(tensors)} tensors) -> {dst}"]
    lines += [f"changed: {line}" for line in changed]
    values = {
        "source_format": found.format,
        "format": args.to,
        "kind": found.kind,
        "out": str(dst),
        "tensors": len(tensors),
        "ignored": found.ignored,
        "changed": changed,
    }
    return Report(values, "\n".join(lines))


def _model(found: Checkpoint, path: str) -> nn.Module:
    """The model of a checkpoint's configuration, without memory for its weights."""
    try:
        with torch.device("meta"):
            if found.kind == "tokenizer":
                return vqfast.VQGAN(vqfast.VQGANConfig.from_dict(found.config))
            tokenizer = vqfast.VQGAN(vqfast.VQGANConfig.from_dict(found.config["tokenizer"]))
            return nn.ModuleDict(
                {
                    "tokenizer": tokenizer,
                    "transformer": vqfast.GPT(
                        vqfast.GPTConfig.from_dict(found.config["transformer"])
                    ),
                    "conditioning": conditioning.build(found.config["conditioning"], tokenizer),
                }
            )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
