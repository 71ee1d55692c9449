"""`vqfast convert`: any known checkpoint to the native format, or back to one that can be
written."""

import argparse
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import vqfast
from vqfast import checkpoints
from vqfast.checkpoints import Checkpoint
from vqfast.cli import _packing
from vqfast.cli._outputs import refuse_existing
from vqfast.cli._parser import Report, UsageError
from vqfast.engine.packing import BITS, empty_packed
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
    if args.precision and args.to != "native":
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
    made, stored = _in_precision(found, tensors, args)
    metadata = made.metadata | ({"partial": changed} if changed else {})
    try:
        known[args.to].write(dst, made.kind, made.config, made.tensors, metadata, **stored)
    except ValueError as error:
        raise UsageError(f"{args.src} cannot be written as {args.to}: {error}") from None
    lines = [f"{args.src} ({found.format} {found.kind}, {len(tensors)} tensors) -> {dst}"]
    precision = made.config.get("packed", {}).get("precision")
    lines += [f"transformer packed in {precision}"] if precision else []
    lines += [f"changed: {line}" for line in changed]
    values = {
        "source_format": found.format,
        "format": args.to,
        "kind": found.kind,
        "out": str(dst),
        "tensors": len(made.tensors),
        "packed": precision,
        "ignored": found.ignored,
        "changed": changed,
    }
    return Report(values, "\n".join(lines))


def _in_precision(
    found: Checkpoint, tensors: dict[str, Tensor], args: argparse.Namespace
) -> tuple[Checkpoint, dict[str, Any]]:
    """What is to be written, and the dtype that the writer shall give its tensors.

    A pipeline's transformer is packed in the precisions of the engine. float16 is none of them: it,
    and every precision of a tokenizer, is the dtype of all weights.
    """
    precision, is_packed = args.precision, "packed" in found.config
    made = dataclasses.replace(found, tensors=tensors)
    if found.kind == "pipeline" and precision in BITS:
        return _packing.pack(made, tensors, precision, args.src), {}
    if precision is not None and precision not in _DTYPES:
        raise UsageError(f"--precision {precision} is of a transformer, {args.src} has none")
    if is_packed and (precision or args.to != "native"):
        made = _packing.unpack(made, tensors, args.src)
    return made, {"dtype": _DTYPES[precision]} if precision else {}


def _model(found: Checkpoint, path: str) -> nn.Module:
    """The model of a checkpoint's configuration, without memory for its weights."""
    try:
        with torch.device("meta"):
            if found.kind == "tokenizer":
                return vqfast.VQGAN(vqfast.VQGANConfig.from_dict(found.config))
            tokenizer = vqfast.VQGAN(vqfast.VQGANConfig.from_dict(found.config["tokenizer"]))
            gpt = vqfast.GPTConfig.from_dict(found.config["transformer"])
            packed = found.config.get("packed")
            return nn.ModuleDict(
                {
                    "tokenizer": tokenizer,
                    "transformer": empty_packed(gpt, packed, what=path)
                    if packed is not None
                    else vqfast.GPT(gpt),
                    "conditioning": conditioning.build(found.config["conditioning"], tokenizer),
                }
            )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
