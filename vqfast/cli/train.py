"""`vqfast train tokenizer|transformer`: hands over to `vqfast.train`."""

import argparse

from vqfast.cli._parser import Report


def run(args: argparse.Namespace) -> Report:
    """Trains; the exit code is the loop's (0, or 130 and 143 after a signal and a save)."""
    options = {
        "data": args.data,
        "out": args.out,
        "resume": args.resume,
        "max_steps": args.max_steps,
        "device": args.device,
        "precision": args.precision,
        "dry_run": args.dry_run,
        "print_config": args.print_config,
    }
    # only the stage that is asked for is loaded
    if args.stage == "tokenizer":
        from vqfast.train import tokenizer

        return Report({}, "", tokenizer.run(args.config, args.overrides, **options))
    from vqfast.train import transformer

    options["tokenizer"] = args.tokenizer
    return Report({}, "", transformer.run(args.config, args.overrides, **options))
