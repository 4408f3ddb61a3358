"""How far something is: a bar in a terminal, and now and then a line in a file or a pipe, which keep what is drawn."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from finetune.texts import show_duration

# Between two lines, in seconds.
LINE_EVERY = 60.0
# As Keras draws the bar of an epoch.
BAR = {
    "bar_format": "{desc}: {n_fmt}/{total_fmt} {bar:20} {elapsed}, {remaining} to go, {rate_fmt}",
    "ascii": " ━",
    "colour": "green",
}


def draws_bars(stream: TextIO | None) -> bool:
    """Tells whether a stream leads to a terminal that can draw over what it shows."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        # There is none, or it is closed.
        return False


def begin_line() -> str:
    """Returns what goes before a line that is printed while Keras draws a bar: the end of the bar's own line."""
    return "\n" if draws_bars(sys.stdout) else ""


def choose_keras_verbosity() -> int:
    """Returns what Keras calls a bar (1) in a terminal, and a line an epoch (2) where there is none."""
    return 1 if draws_bars(sys.stdout) else 2


def show_progress(
    total: int, title: str, initial: int = 0, delay: float = 0.0, unit: str = "image"
) -> tqdm | ProgressLines:
    """Shows how many images are done, on stderr; to be entered, and told of more by `update`.

    Args:
        total: of the images.
        title: what is done with them; nothing is shown without one.
        initial: of them, done before.
        delay: seconds before a bar appears.
        unit: what a bar counts in the place of images.
    """
    if draws_bars(sys.stderr) or not title:
        return tqdm(total=total, initial=initial, unit=unit, desc=title, delay=delay, disable=not title, **BAR)
    return ProgressLines(total, title, initial)


class ProgressLines:
    """Says every minute how many images are done; nothing where all are done within the first one.

    Args:
        total: of the images.
        title: what is done with them.
        initial: of them, done before.
    """

    def __init__(self, total: int, title: str, initial: int = 0) -> None:
        self.total = total
        self.title = title
        self.done = initial
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        return None

    def update(self, number: int = 1) -> None:
        """Counts more images as done."""
        self.done += number
        now = time.monotonic()
        if now - self._last >= LINE_EVERY:
            self._last = now
            took = show_duration(now - self._start)
            print(f"{self.title}: {self.done} of {self.total} after {took}", file=sys.stderr, flush=True)
