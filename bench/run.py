"""Benches: python bench/run.py --suite micro --op nearest

Suites: micro (one op), model (encode, decode), train (a step of each stage), sample (cached
decoding, and the command `vqfast sample`; all of it takes a quarter of an hour, --case chooses),
quality (what packed weights cost in loss; needs --data). The op's checks run first; without them
passed there is no number (--no-gate prints UNVERIFIED). Opponents in bench/baselines run in the
same interleaved rounds, those that are not installed are listed as absent. Times are p50 [p20-p80].
The last line is one JSON object.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import against
import baselines
import micro
import networks
import picture
import quality
import report
import roofline
import sampling
import torch

from vqfast.errors import CheckpointError, DataError
from vqfast.testing.timing import environment

SUITES = ("micro", "model", "train", "sample", "quality")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--suite", choices=SUITES, default="micro")
    p.add_argument("--op", help="micro: one op (all by default)")
    p.add_argument(
        "--case", help="by its id, or a pattern as gpt_small* (all of the suite by default)"
    )
    p.add_argument("--backend", help="micro: one of ours: cuda, triton, cpu, reference")
    p.add_argument(
        "--dtype",
        help="fp32 (the default), fp16, bf16; sample and quality: our precisions fp32, bf16, int8, "
        "int4 (all by default), opponents in fp32 and bf16 accordingly; several with commas",
    )
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--threads", type=int, help="of torch, and so of our kernels")
    p.add_argument("--rounds", type=int, default=7, help="interleaved rounds, at most")
    p.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help=f"seconds per case (20), sample: per contestant of a case ({sampling.BUDGET_S:g})",
    )
    p.add_argument("--data", metavar="PATH", help="quality: pictures of the recipe, or their codes")
    p.add_argument("--model", metavar="PATH", default=quality.MODEL, help="quality (the shipped)")
    p.add_argument("--config", metavar="YAML", default=quality.RECIPE, help="quality: the recipe")
    p.add_argument("--base", metavar="REF", help="micro: another commit, built and run beside this")
    p.add_argument(
        "--memory",
        action="store_true",
        help="model, train: peak memory of a call, too, each contestant in a process of its own",
    )
    p.add_argument("--no-gate", action="store_true", help="skip the checks; prints UNVERIFIED")
    p.add_argument("--json", action="store_true", help="stdout holds the JSON object alone")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw roofline and ratios")
    p.add_argument("--record", action="store_true", help="append to bench/results/SUITE.jsonl")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        print('bench: --plot needs matplotlib: pip install "vqfast[bench]"', file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    shown = sys.stderr if args.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    where = environment(args.device)
    print("  ".join(f"{k} {v}" for k, v in where.items()), file=shown)
    rows: list[report.Row] = []
    absent: dict[str, str] = {}
    failure = ""
    try:
        # some opponents print: that may not mix with the JSON
        with contextlib.redirect_stdout(shown):
            for part, missing in _suite(args, say):
                rows += part
                absent |= missing
                print(report.table(part), flush=True)
    except (ValueError, DataError, CheckpointError) as error:
        say(f"bench: {error}")
        return 2
    except (micro.RefusedError, against.BaseError) as error:
        failure = str(error)
        say(f"bench: REFUSED {failure}")
    for why in dict.fromkeys(absent.values()):
        names = ", ".join(name for name, reason in absent.items() if reason == why)
        print(f"absent: {names}: {why}", file=shown)
    gate = "UNVERIFIED" if args.no_gate else "REFUSED" if failure else "passed"
    known = {r.dtype for r in rows if r.roofline is not None}
    ceilings = {d: roofline.measure(args.device, micro.DTYPES[d]) for d in sorted(known)}
    line = report.record(rows, where, _versions(rows, args.device), gate, ceilings)
    if args.base:
        line["base"] = report.commit(f"{args.base}^{{commit}}")
    if args.plot and rows:
        try:
            picture.draw(line, args.plot)
            print(f"drawn: {args.plot}", file=shown)
        except ValueError as error:
            say(f"bench: {error}")
    if args.record and rows and not args.no_gate:
        print(f"recorded: {report.append(args.suite, line)}", file=shown)
    print(json.dumps(line))
    return 1 if failure else 0


def _suite(args: argparse.Namespace, say: Any) -> Any:
    decodes = args.suite in ("sample", "quality")
    known = tuple(sampling.BYTES if decodes else micro.DTYPES)
    dtypes = tuple(args.dtype.split(",")) if args.dtype else known if decodes else ("fp32",)
    budget = args.budget or (sampling.BUDGET_S if args.suite == "sample" else 20.0)
    for name in dtypes:
        if name not in known:
            raise ValueError(f"--dtype must be out of {', '.join(known)}, got {name!r}")
    options = micro.Options(
        op=args.op,
        case=args.case,
        backend=args.backend,
        dtypes=dtypes,
        device=args.device,
        rounds=args.rounds,
        budget_s=budget,
        gate=not args.no_gate,
        memory=args.memory,
    )
    if args.memory and args.suite not in ("model", "train"):
        raise ValueError("--memory belongs to the suites model and train")
    if args.suite != "micro":
        if args.base or args.op or args.backend:
            raise ValueError("--base, --op and --backend belong to the suite micro")
        if args.suite == "quality":
            return quality.run(options, say, data=args.data, model=args.model, recipe=args.config)
        suite = args.suite
        return (
            sampling.run(options, say) if suite == "sample" else networks.run(suite, options, say)
        )
    if args.base:
        return against.run(args.base, options, say)
    return micro.run(options, say)


def _versions(rows: list[report.Row], device: str) -> dict[str, str]:
    """What each opponent in the rows was."""
    names = {r.contestant.split()[0] for r in rows if not r.ours}  # without their format
    found = {}
    for measure in {r.measure for r in rows}:
        for name, module in baselines.opponents(measure, device)[0].items():
            if name in names:
                found[name] = module.version()
    return found


if __name__ == "__main__":
    sys.exit(main())
