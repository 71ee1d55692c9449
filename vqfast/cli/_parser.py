"""Every verb and flag. Imports no torch: `--help` and a wrong flag answer at once."""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NoReturn

from vqfast import __version__

__all__ = ["Report", "UsageError", "parse"]

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
_PRECISIONS = ("auto", "fp32", "bf16", "int8", "int4")
_WINDOW_RULES = ("make_samples", "scene")
_TRAIN_PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class UsageError(Exception):
    """What was asked for makes no sense: exit code 2."""


@dataclass
class Report:
    """What a verb has to say: `values` for --json, `text` otherwise, and its exit code."""

    values: dict[str, Any]
    text: str = ""
    code: int = 0


@dataclass
class _Flags:
    """Shared flags, added where `wanted` names them."""

    parser: argparse.ArgumentParser
    wanted: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for name in self.wanted:
            getattr(self, name)()

    def model(self) -> None:
        self.parser.add_argument(
            "--model",
            metavar="PATH",
            help="checkpoint folder or file; default: the small emoji model of this package",
        )

    def device(self) -> None:
        self.parser.add_argument(
            "--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N (auto)"
        )

    def size(self) -> None:
        self.parser.add_argument(
            "--size", type=_size, metavar="HxW", help="picture size, as 256x256 or 256"
        )

    def max_memory(self) -> None:
        about = "for what a picture takes beyond model and result, as 2GB or 512MiB: bands of rows"
        self.parser.add_argument("--max-memory", type=_bytes, metavar="SIZE", help=about)

    def overwrite(self) -> None:
        self.parser.add_argument("--overwrite", action="store_true", help="replace the output")

    def json(self) -> None:
        self.parser.add_argument(
            "--json", action="store_true", help="print one JSON object and nothing else"
        )

    def images(self) -> None:
        self.parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one verb; `module` names the file that runs it.

    Raises:
        UsageError: unknown verb or flag, a missing argument, a value out of range.
        SystemExit: --help and --version.
    """
    args, rest = _parser().parse_known_args([_dashes(a) for a in argv])
    overrides = [a for a in rest if args.module == "train" and _OVERRIDE.match(a)]
    rest = [a for a in rest if a not in overrides]
    if rest:
        raise UsageError(f"unrecognized arguments: {' '.join(rest)} (see `vqfast --help`)")
    if overrides:
        args.overrides += overrides
    return args


def _dashes(argument: str) -> str:
    """--batch_size is --batch-size; what follows a = stays as it is."""
    if not argument.startswith("--"):
        return argument
    name, sign, value = argument.partition("=")
    return name.replace("_", "-") + sign + value


# ---- values


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def _at_least(low: int, high: int | None = None) -> Any:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if value < low or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"in {low}..{high}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
        return value

    return integer


def _temperature(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def _top_p(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})(?:[xX](\d{1,6}))?", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"must be HxW with both at least 1, got {text!r}")
    return height, width


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?(?:([kmgt])?(i)?b)?", text, re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"must be a size as 2GB, 512MiB or bytes, got {text!r}")
    power = " kmgt".index((match[2] or " ").lower())
    size = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be at least one byte, got {text!r}")
    return size


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def _classes(text: str) -> list[int | str]:
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise argparse.ArgumentTypeError(f"must be ids or names with commas between, got {text!r}")
    return [int(item) if re.fullmatch(r"[+-]?\d+", item) else item for item in items]


def _interval(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{0,12}):(\d{0,12})", text)
    if not match or text == ":":
        raise argparse.ArgumentTypeError(f"must be BEGIN:END, BEGIN: or :END, got {text!r}")
    begin, end = int(match[1] or 0), int(match[2] or 10**12)
    if begin > end:
        raise argparse.ArgumentTypeError(f"must begin before it ends, got {text!r}")
    return begin, end


def _keep(text: str) -> int | float:
    """Rows as an int, a share as a float."""
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    value = _number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be rows, or a share in 0.0..1.0, got {text!r}")
    return value


def _weights(text: str) -> tuple[str, str]:
    kind, sign, path = text.partition("=")
    if not sign or kind not in ("vgg", "alex", "squeeze", "inception") or not path:
        raise argparse.ArgumentTypeError(
            f"must be KIND=FILE, KIND vgg, alex, squeeze or inception, got {text!r}"
        )
    return kind, path


# ---- verbs


def _parser() -> _Parser:
    parser = _Parser(
        prog="vqfast",
        description="VQGAN: sample, reconstruct, train.",
        epilog="Flags take - or _. Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted, "
        "143 terminated.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vqfast {__version__}")
    verbs = parser.add_subparsers(
        metavar="VERB", required=True, title="verbs", parser_class=_Parser
    )
    for name, (about, flags) in _VERBS.items():
        verb = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
        flags(verb)
    return parser


def _sample(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module="sample")
    add = parser.add_argument
    _Flags(parser, ["model"])
    add("--classes", type=_classes, metavar="A,B", help="class ids or names; image i gets i-th")
    add("-n", type=_at_least(0, 10**12), default=16, metavar="N", help="number of images (16)")
    add("--batch-size", type=_at_least(1), default=8, metavar="B", help="images at a time (8)")
    add("-k", "--top-k", type=_at_least(1), metavar="K", help="draw from the K likeliest codes")
    add("-t", "--temperature", type=_temperature, default=1.0, metavar="T", help="0: likeliest (1)")
    add("-p", "--top-p", type=_top_p, metavar="P", help="draw from the likeliest P of the mass")
    add("--cfg-scale", type=_number, default=1.0, metavar="S", help="guidance; 1 is none (1)")
    where = "guide these codes of an image alone, counted row by row from 0; END is not guided"
    add("--cfg-interval", type=_interval, metavar="BEGIN:END", help=where)
    add("--complete", nargs="+", metavar="IMAGE", help="keep the top of pictures, draw the rest")
    kept = "top rows of codes that --complete keeps, or their share as 0.5 or 50%% (0.5)"
    add("--keep", type=_keep, metavar="ROWS", help=kept)
    about = "pictures that condition the model (depths: grey; labels: grey level or palette number)"
    add("--cond", nargs="+", metavar="IMAGE", help=about)
    add("--seed", type=_at_least(0, 2**64 - 1), default=0, help="image i depends on (seed, i) (0)")
    large = "HxW or one side; above the model's own, codes are drawn in sliding windows"
    add("--size", type=_size, metavar="HxW", help=large)
    rule = "where a window stands around its code; scene: a code further down and right"
    add("--window-rule", choices=_WINDOW_RULES, default="make_samples", help=rule)
    add("--precision", choices=_PRECISIONS, default="auto", help="of the transformer (as stored)")
    _Flags(parser, ["device"])
    add("--out", metavar="DIR", help="one PNG per image (default: samples, unless --grid)")
    add("--grid", metavar="FILE.png", help="all images on one sheet")
    add("--resume", action="store_true", help="draw what an interrupted run left in --out")
    add("--progress", action="store_true", help="rates and time left, also without a terminal")
    _Flags(parser, ["overwrite", "json"])


def _reconstruct(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module="reconstruct")
    _Flags(parser, ["images", "model", "size"])
    parser.add_argument(
        "--out",
        metavar="FILE.png",
        default="reconstruction.png",
        help="sheet of inputs and reconstructions, unscaled (reconstruction.png)",
    )
    _Flags(parser, ["device", "max_memory", "overwrite", "json"])


def _encode(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module="encode")
    _Flags(parser, ["images", "model", "size"])
    parser.add_argument(
        "--out",
        metavar="FILE.safetensors",
        default="codes.safetensors",
        help="one [h, w] grid of codes per image (codes.safetensors)",
    )
    _Flags(parser, ["device", "max_memory", "overwrite", "json"])


def _decode(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module="decode")
    parser.add_argument("codes", metavar="FILE", help="what `vqfast encode` wrote")
    _Flags(parser, ["model"])
    parser.add_argument(
        "--out", metavar="DIR", default="decoded", help="one PNG per image (decoded)"
    )
    _Flags(parser, ["device", "max_memory", "overwrite", "json"])


def _train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module="train", json=False)
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for stage, about in (
        ("tokenizer", "stage 1: pictures to codes and back"),
        ("transformer", "stage 2: the codes of a frozen tokenizer"),
    ):
        one = stages.add_parser(stage, help=about, description=about, allow_abbrev=False)
        add = one.add_argument
        add("config", metavar="CONFIG", help="YAML file")
        add("overrides", nargs="*", metavar="key=value", help="keys set over the file's")
        codes = ", or what `vqfast encode` wrote" if stage == "transformer" else ""
        kinds = f"folder, list file or tar of pictures{codes} (data.path)"
        add("--data", metavar="PATH", help=kinds)
        if stage == "transformer":
            add("--tokenizer", metavar="PATH", help="checkpoint of stage 1")
        add("--out", metavar="DIR", help="run folder")
        add("--resume", metavar="auto|PATH|none", default="auto", help="where to go on (auto)")
        add("--max-steps", type=_at_least(0), metavar="N", help="stop after step N")
        _Flags(one, ["device"])
        add("--precision", choices=_TRAIN_PRECISIONS, help="auto: as train.precision says")
        add("--dry-run", action="store_true", help="one batch forward, sizes; write nothing")
        meanings = "print the merged configuration, every key with its meaning"
        add("--print-config", action="store_true", help=meanings)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module="evaluate")
    add = parser.add_argument
    add("--real", required=True, metavar="PATH", help="folder, list file or tar of pictures")
    add("--fake", metavar="PATH", help="pictures to hold against them, unpaired")
    _Flags(parser, ["model"])
    add(
        "--weights",
        type=_weights,
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="network for perceptual and Frechet distances: vgg, alex, squeeze (torchvision's "
        "file) or inception (FID's file); may be given twice",
    )
    add("--heads", metavar="FILE", help="LPIPS heads that belong to the vgg, alex or squeeze file")
    _Flags(parser, ["size"])
    add("--batch-size", type=_at_least(1), default=8, metavar="B", help="images at a time (8)")
    add("--limit", type=_at_least(2), metavar="N", help="use the first N pictures")
    _Flags(parser, ["device", "json"])


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module="convert")
    add = parser.add_argument
    add("src", metavar="SRC", help="checkpoint of any known format")
    add("dst", metavar="DST", help="folder (native) or file (taming: its YAML goes beside it)")
    add("--from", dest="source_format", metavar="FORMAT", help="format of SRC (by content)")
    add("--to", default="native", metavar="FORMAT", help="native or taming (native)")
    add("--config", metavar="YAML", help="SRC's configuration, if it does not lie beside it")
    add(
        "--allow-partial",
        action="store_true",
        help="drop unexpected weights and set missing ones to zero",
    )
    add(
        "--precision",
        choices=["fp32", "fp16", "bf16", "int8", "int4"],
        help="of the stored weights (native): fp32, bf16, int8 and int4 pack a pipeline's "
        "transformer as it is sampled from; fp16, and any of a tokenizer, is a dtype",
    )
    _Flags(parser, ["overwrite", "json"])


def _info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module="info")
    _Flags(parser, ["json"])


def _check(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module="check")
    parser.add_argument("--op", metavar="NAME", help="one op; default: all")
    _Flags(parser, ["device", "json"])


_VERBS = {
    "sample": ("images from a model", _sample),
    "reconstruct": ("encode and decode pictures: sheet, PSNR, SSIM, code usage", _reconstruct),
    "encode": ("pictures to codes", _encode),
    "decode": ("codes to pictures", _decode),
    "train": ("train a tokenizer or a transformer", _train),
    "eval": ("FID-style distances, PSNR, SSIM, LPIPS, usage, perplexity", _eval),
    "convert": ("any known checkpoint to the native format, or to taming's", _convert),
    "info": ("versions, devices, and which backend each op takes", _info),
    "check": ("every kernel against its reference on this machine", _check),
}
