"""A line on stderr that says how far a sampling is: images, tokens/s, images/s, time left."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from vqfast.engine import Step

_REDRAW_SECONDS = 0.1  # on a terminal, where the line is drawn over itself
_LINE_SECONDS = 10.0  # elsewhere, where every line stays


class SampleProgress:
    """Counts tokens and images as they come, and shows them.

    Args:
        total: images to draw.
        tokens: that are drawn for each of them.
        show: True always, None only if the stream is a terminal.
        stream: stderr by default.
        clock: seconds.
    """

    def __init__(
        self,
        total: int,
        tokens: int,
        show: bool | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream is not None and self._stream.isatty()
        self.shown = self._stream is not None and (self._terminal if show is None else show)
        self._total, self.tokens, self._clock = total, tokens, clock
        self.images, self._drawn = 0, 0.0  # finished; drawn, with parts of images
        self._batch = 0.0  # of the images drawn, those of the batch in work
        self._started = self._last = clock()
        self._width = 0

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    def on_step(self, step: Step) -> None:
        """A callback for `Pipeline.iter_images`."""
        now = len(step.images) * step.step / step.steps
        self._drawn += now - self._batch
        self._batch = 0.0 if step.step == step.steps else now
        self._show(False)

    def image(self) -> None:
        """An image is finished."""
        self.images += 1
        self._drawn = max(self._drawn, float(self.images))
        self._show(self.images == self._total)

    def close(self) -> None:
        """Leave the line on the terminal as it is."""
        if self.shown and self._terminal and self._width:
            self._write("\n")

    def text(self) -> str:
        """The line: rates since the start, time left if it goes on like this."""
        seconds = self.seconds
        rate = self._drawn / seconds if seconds > 0 else 0.0  # images/s
        left = _clock_text((self._total - self._drawn) / rate) if rate else "?"
        return (
            f"{self.images}/{self._total} images, {_number(rate * self.tokens)} tokens/s, "
            f"{_number(rate)} images/s, {left} left"
        )

    def _show(self, last: bool) -> None:
        if not self.shown:
            return
        now, pause = self._clock(), _REDRAW_SECONDS if self._terminal else _LINE_SECONDS
        if now - self._last < pause and not last:
            return
        self._last, text = now, self.text()
        if self._terminal:
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._write(text + "\n")

    def _write(self, text: str) -> None:
        """A reader of stderr that has left, or a full disk, is no reason to stop drawing."""
        try:
            print(text, end="", file=self._stream, flush=True)
        except OSError:
            self.shown = False


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _clock_text(seconds: float) -> str:
    minutes, s = divmod(round(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
