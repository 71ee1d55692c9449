"""What a run says: metrics.jsonl always, TensorBoard when installed, a progress bar on a terminal,
lines on stderr.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqfast import images
from vqfast._files import atomic_file

__all__ = ["Log"]


class Log:
    """The writer of one run folder; with `out` None (other ranks, dry runs) it writes nothing.

    metrics.jsonl holds one object per logged step and is flushed each time. On a resume the lines
    after the resumed step are dropped, so no step stands twice. A full disk stops the log, never
    the training.
    """

    def __init__(
        self,
        out: Path | None,
        start: int,
        stop: int,
        *,
        tensorboard: bool = False,
        quiet: bool = False,
    ):
        self.out, self.quiet = out, quiet
        self._file = self._board = self._bar = None
        if out is None:
            return
        path = out / "metrics.jsonl"
        _truncate(path, start)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._board = _summary_writer(out / "tb", start)
        if sys.stderr.isatty():
            from tqdm import tqdm  # only on a terminal

            self._bar = tqdm(total=stop, initial=start, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """One line on stderr."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def tick(self, text: str = "") -> None:
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the line of `step`. Names are `train/...`, `val/...`, `data/...`."""
        if self._file is None:
            return
        row: dict[str, Any] = {"step": step, **values}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        except OSError as error:
            self.say(f"vqfast: metrics are no longer written: {error}")
            self._file = self._board = None

    def pictures(self, step: int, batches: Mapping[str, Tensor]) -> None:
        """Write images/step_N_NAME.png for each [B, 3, H, W] batch in [-1, 1]."""
        if self.out is None:
            return
        for name, batch in batches.items():
            sheet = images.grid([images.to_pil(x) for x in batch])
            path = self.out / "images" / f"step_{step:08d}_{name}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                images.save_png(sheet, path)
            except OSError as error:
                self.say(f"vqfast: {path} was not written: {error}")
                continue
            if self._board is not None:
                pixels = torch.from_numpy(images.image_to_array(sheet))
                self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        for part in (self._file, self._board, self._bar):
            if part is not None:
                part.close()
        self._file = self._board = self._bar = None


class Rate:
    """Units per second since the last reading."""

    def __init__(self) -> None:
        self._since, self._count = time.perf_counter(), 0

    def add(self, count: int) -> None:
        self._count += count

    def read(self) -> float:
        now = time.perf_counter()
        value = self._count / max(now - self._since, 1e-9)
        self._since, self._count = now, 0
        return value


def _truncate(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`, each step once."""
    if not path.exists():
        return
    kept, seen = [], set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            at = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # the line that a killed run left half written
        if isinstance(at, int) and at <= step and at not in seen:
            seen.add(at)
            kept.append(line)
    with atomic_file(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _summary_writer(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # optional: the extra "train"
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


def summary(values: Mapping[str, float], names: Sequence[str]) -> str:
    """The named values for a progress line."""
    return " ".join(f"{n}={values[f'train/{n}']:.4g}" for n in names if f"train/{n}" in values)
