"""From a configuration file to a finished run: what both stages do before and after the loop."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vqfast import config as configuration
from vqfast.config import ConfigError
from vqfast.train import distributed, loop
from vqfast.train.stage import Stage

__all__ = ["Kind", "Options", "quoted", "run"]


@dataclass(frozen=True)
class Kind:
    """A stage: its schema, how to build it from (config, world, run folder), what a resume may not
    change.
    """

    schema: type
    build: Callable[[Any, distributed.World, Path | None], tuple[Stage, loop.Feed]]
    identity: Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Options:
    """The flags of `vqfast train`; see `vqfast.train.tokenizer.run`."""

    data: str | Path | None = None
    out: str | Path | None = None
    resume: str = "auto"
    max_steps: int | None = None
    device: str = "auto"
    precision: str | None = None
    dry_run: bool = False
    print_config: bool = False
    extra: Sequence[str] = field(default_factory=tuple)  # overrides made of other flags


def _overrides(options: Options) -> list[str]:
    made = list(options.extra)
    if options.data is not None:
        made.append(f"data.path={quoted(os.fspath(options.data))}")
    if options.precision not in (None, "auto"):
        made.append(f"train.precision={quoted(str(options.precision))}")
    return made


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def run(kind: Kind, config_path: str | Path, overrides: Sequence[str], options: Options) -> int:
    """Train as the configuration and the flags say; the exit code. Errors as `tokenizer.run`."""
    config: Any = configuration.load(config_path, [*overrides, *_overrides(options)], kind.schema)
    if options.print_config:
        print(configuration.dump(config, explain=True), end="")
        return 0
    stop = config.train.max_steps if options.max_steps is None else int(options.max_steps)
    if stop < 1:
        raise ConfigError(f"--max-steps must be >= 1, got {stop}")
    if options.out is None and not options.dry_run:
        raise ConfigError("--out: not given; name the folder of the run")
    world = distributed.setup(options.device)
    try:
        # ranks draw different noise; the weights are made equal by DistributedDataParallel
        with loop.Signals() as signals, loop.seed_everything(config.train.seed + world.rank):
            out = None if options.dry_run else Path(options.out or "")
            with loop.open_folder(out, world):
                stage, feed = kind.build(config, world, out)
                with contextlib.closing(feed):
                    if out is None:
                        return _dry_run(stage, feed, world, stop)
                    return loop.train(
                        stage,
                        feed,
                        config.train,
                        world,
                        out=out,
                        resume=str(options.resume),
                        stop=stop,
                        identity=kind.identity(stage),
                        config_text=configuration.dump(config),
                        signals=signals,
                    )
    except KeyboardInterrupt:
        return 130
    finally:
        distributed.leave(world)


def _dry_run(stage: Stage, feed: loop.Feed, world: distributed.World, stop: int) -> int:
    lines = stage.describe(feed.take(0)[0])
    if world.main:
        for line in [*lines, f"steps: {stop:,} on {world.size} x {world.device}"]:
            print(line)
        if world.device.type == "cuda":
            print(f"peak memory: {torch.cuda.max_memory_allocated(world.device) / 2**20:.0f} MiB")
        print("dry run: nothing was trained or written")
    return 0
