"""The training loop of both stages: signals, resume, refused steps, checkpoints, logs.

A step is numbered from 0 inside and counted from 1 in what is written: `step` N in metrics.jsonl
and in a checkpoint's name means that N updates are done. All randomness is either part of the
checkpoint or a function of (seed, step), so a run that was stopped anywhere and resumed ends with
the bits of one that never was.
"""

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vqfast._files import FolderLock, atomic_file, remove_stale
from vqfast.config import ConfigError
from vqfast.errors import CheckpointError, NonFiniteError
from vqfast.train import state
from vqfast.train.distributed import World
from vqfast.train.log import Log, Rate, summary
from vqfast.train.settings import TrainSection
from vqfast.train.stage import BadStep, Stage

__all__ = ["Feed", "Signals", "find_checkpoint", "open_folder", "seed_everything", "train"]


class Feed(Protocol):
    """The batches of a run. `take(step)` is a function of (seed, step, rank) and of the data
    alone.
    """

    manifest: str

    def take(self, step: int) -> Sequence[Mapping[str, Any]]: ...

    @property
    def skipped(self) -> int: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Signals:
    """SIGTERM and SIGINT ask for a stop after the present step; a second SIGINT leaves at once.

    `code` is 0, 143 or 130. The handlers that were there come back at the end. Python takes signals
    in its main thread only; in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.code = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.code == 130:
            raise KeyboardInterrupt
        self.code = 130 if number == signal.SIGINT else 143


@contextlib.contextmanager
def seed_everything(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch; afterwards put back the random state that was there."""
    kept = state.rng_tensors(0)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        state.restore_rng(0, kept)


@contextlib.contextmanager
def open_folder(out: Path | None, world: World) -> Iterator[None]:
    """`out` made, owned by this run alone and cleared of what a killed run left. ConfigError if it
    cannot be written.
    """
    if out is None or not world.main:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(out)
        lock.__enter__()
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    except RuntimeError as error:  # another trainer owns it
        raise ConfigError(f"--out: {error}") from None
    try:
        remove_stale(out)
        yield
    finally:
        lock.__exit__()


def find_checkpoint(
    out: Path, resume: str, say: Callable[[str], None]
) -> tuple[Path, dict, dict] | None:
    """(folder, tensors, values) to go on from, or None for a fresh start.

    Args:
        resume: "auto" takes the newest valid checkpoint under `out`; "none" insists on a fresh
            start; else the path of a checkpoint, or of a run folder.

    Raises:
        ConfigError: `out` holds a run that this one would mix with.
        CheckpointError: the checkpoint at PATH is not valid, or under auto none of them is.
    """
    existing = state.candidates(out)
    if resume == "none":
        if existing:
            raise ConfigError(
                f"--resume none: {out} holds a run already; choose another --out or remove that run"
            )
        return None
    if resume != "auto":
        path = Path(resume)
        inside = state.candidates(path)
        if inside and not (path / state.STATE_FILE).exists():
            path = inside[0][1]
        if existing and path.resolve() != existing[0][1].resolve():
            raise ConfigError(
                f"--resume {resume}: {out} holds a newer run; choose another --out to branch off"
            )
        return path, *state.read(path)
    reasons = []
    for _, path in existing:
        try:
            return path, *state.read(path)
        except CheckpointError as error:
            reasons.append(str(error))
            say(f"vqfast: passed over a checkpoint that is not valid: {error}")
    if reasons:
        raise CheckpointError(f"no valid checkpoint in {out}: {'; '.join(reasons)}")
    return None


def _refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """What a resume may not change is equal in both; ConfigError names the first key that is
    not.
    """
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: this run has {now.get(key)!r}, the checkpoint {path} was trained with "
                f"{before.get(key)!r}; go on with that, or start in another --out"
            )


def _restore(
    found: tuple[Path, dict, dict],
    stage: Stage,
    feed: Feed,
    world: World,
    identity: Mapping[str, Any],
    say: Callable[[str], None],
) -> tuple[int, int]:
    """Put a checkpoint into stage, feed and random state; its step, and its refused steps."""
    path, tensors, values = found
    _refuse_changes(values["identity"], identity, path)
    if values["manifest"] != feed.manifest:
        say(
            f"vqfast: WARNING: the data are not those that {path} was trained on; "
            "the run goes on with the new ones and is no longer repeatable"
        )
    stage.load(tensors, str(path))
    feed.load_state(values["feed"])
    state.restore_rng(world.rank, tensors)
    say(f"vqfast: resumed from {path} at step {values['step']}")
    return values["step"], values["bad"]


def train(
    stage: Stage,
    feed: Feed,
    settings: TrainSection,
    world: World,
    *,
    out: Path,
    resume: str,
    stop: int,
    identity: Mapping[str, Any],
    config_text: str,
    signals: Signals,
) -> int:
    """Train to step `stop`. The folder is locked by the caller.

    Args:
        identity: what a resume may not change, by full key.
        config_text: the merged configuration, kept as OUT/config.yaml.

    Returns:
        0 when done (also when there was nothing to do), 143 or 130 after a signal and a save.

    Raises:
        ConfigError, CheckpointError: the resume is impossible. NonFiniteError: `max_bad_steps`
            refused in a row.
    """
    quiet = not world.main
    start, bad = 0, 0
    with contextlib.closing(Log(None, 0, stop, quiet=quiet)) as early:
        found = find_checkpoint(out, resume, early.say)
        world.barrier()
        if found is not None:
            start, bad = _restore(found, stage, feed, world, identity, early.say)
        finished = start >= stop
        if finished:
            early.say(f"vqfast: nothing to do: the run is at step {start} of {stop}")
            if state.candidates(out):
                return 0
    if world.main:
        with atomic_file(out / "config.yaml") as temporary:
            temporary.write_text(config_text, encoding="utf-8")
    log = Log(
        out if world.main else None, start, stop, tensorboard=settings.tensorboard, quiet=quiet
    )
    with contextlib.closing(log):
        loop = _Loop(stage, feed, settings, world, out, identity, log, signals)
        if finished:  # and it came from another folder
            loop.save(start, bad)
            return 0
        return loop.run(start, stop, bad)


class _Loop:
    def __init__(
        self,
        stage: Stage,
        feed: Feed,
        settings: TrainSection,
        world: World,
        out: Path,
        identity: Mapping[str, Any],
        log: Log,
        signals: Signals,
    ):
        self.stage, self.feed, self.settings, self.world = stage, feed, settings, world
        self.out, self.identity, self.log, self.signals = out, identity, log, signals

    def run(self, start: int, stop: int, bad: int) -> int:
        every, rate = self.settings, Rate()
        for step in range(start, stop):
            if code := self._stop_code():
                self.save(step, bad)
                return code
            batches = self.feed.take(step)
            rate.add(sum(len(b["label"]) for b in batches) * self.world.size)
            values: dict[str, Tensor | float] = {}
            try:
                values = self.stage.step(step, batches)
                bad = 0
            except BadStep as error:
                if not error.overflow:
                    bad += 1
                    self._refused(step + 1, bad, error)
            done = step + 1
            if done % every.log_every == 0 or done == stop or self._due(every.val_every, done):
                self._log(done, values, rate)
            else:
                self.log.tick()
            if self._due(every.images_every, done) and self.world.main:
                self.log.pictures(done, self.stage.pictures())
            if done % every.save_every == 0 or done == stop:
                self.save(done, bad)
        return 0

    @staticmethod
    def _due(every: int, done: int) -> bool:
        return every > 0 and done % every == 0

    def _stop_code(self) -> int:
        """The signal's exit code, agreed on by all ranks."""
        if self.world.size == 1:
            return self.signals.code
        return int(self.world.max(torch.tensor(self.signals.code, device=self.world.device)))

    def _refused(self, done: int, bad: int, error: BadStep) -> None:
        text = f"{error.component} {error.detail} at step {done}"
        if bad >= self.settings.max_bad_steps:
            raise NonFiniteError(
                f"{text}: {bad} steps in a row refused; the weights are those of the last good step"
            )
        self.log.say(f"vqfast: step refused: {text}")

    def _log(self, done: int, values: Mapping[str, Tensor | float], rate: Rate) -> None:
        row = self._mean({**values, **self.stage.scaling()})
        row["train/images_per_s"] = rate.read()
        if self.stage.tokens_per_image:
            row["train/tokens_per_s"] = row["train/images_per_s"] * self.stage.tokens_per_image
        if self.world.device.type == "cuda":
            row["train/peak_memory"] = float(torch.cuda.max_memory_allocated(self.world.device))
        row["data/skipped"] = self.feed.skipped
        if self._due(self.settings.val_every, done):
            row |= {f"val/{name}": value for name, value in self.stage.validate().items()}
        self.log.metrics(done, row)
        self.log.tick(summary(row, ("loss", "rec_loss", "images_per_s")))

    def _mean(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """The metrics as floats, averaged over the ranks."""
        if not values:
            return {}
        device = self.world.device
        parts = [
            torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values.values()
        ]
        packed = self.world.sum(torch.stack([p.reshape(()) for p in parts])) / self.world.size
        return {f"train/{name}": value for name, value in zip(values, packed.tolist(), strict=True)}

    def save(self, done: int, bad: int) -> None:
        """The checkpoint of step `done`, written by rank 0."""
        rngs = self.world.gather(state.rng_tensors(self.world.rank))
        if self.world.main:
            tensors = self.stage.tensors()
            for rng in rngs:
                tensors |= rng
            meta = {
                "stage": self.stage.kind,
                "step": done,
                "bad": bad,
                "identity": dict(self.identity),
                "manifest": self.feed.manifest,
                "feed": self.feed.state(),
            }

            def fill(folder: Path) -> None:
                state.write(folder, tensors, meta)
                self.stage.write_model(folder, done)

            state.publish(self.out, done, fill)
            state.prune(self.out, self.settings.keep_last)
        self.world.barrier()
