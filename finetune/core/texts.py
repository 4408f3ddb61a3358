"""Text output: counts, sizes, lists, escapes, durations and progress."""

from __future__ import annotations

import datetime
import os
import sys
import time
import unicodedata
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

LONGEST_LIST = 5
# With more classes than this, only the most informative ones are shown.
MOST_LISTED = 100
MOST_TELLING = 20
# Seconds between two progress lines.
LINE_EVERY = 60.0
# In the style of the Keras progress bar.
BAR = {
    "bar_format": "{desc}: {n_fmt}/{total_fmt} {bar:20} {elapsed}, {remaining} to go, {rate_fmt}",
    "ascii": " ━",
    "colour": "green",
}


def join_names(names: Sequence[Any], longest: int = LONGEST_LIST) -> str:
    """Returns the first few names joined by commas, and the number of the others."""
    shown = ", ".join(str(name) for name in names[:longest])
    return shown + (f" and {len(names) - longest} more" if len(names) > longest else "")


def show_count(number: int, noun: str) -> str:
    """Returns a number and a noun: `1 image`, `2 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show_bytes(number: int) -> str:
    """Returns a number of bytes in MiB or GiB: `12.5 MiB`, `1.2 GiB`."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def show_text(text: str) -> str:
    """Returns a text on one line, escaped if it has unprintable characters."""
    return text if text.isprintable() else ascii(text)


def shorten(text: str) -> str:
    """Returns a text without unprintable characters and cut to 300 characters."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= 300 else f"{shown[:300]}..."


BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def show(text: str) -> str:
    """Returns a text with escapes for control characters and for characters that reorder others."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs") or character in BIDI_CONTROLS
        else character
        for character in text
    )


def show_duration(seconds: float) -> str:
    """Returns a duration in its two largest units: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def show_moment(seconds: float) -> str:
    """Returns the local time this many seconds from now: `14:05`, or `Sat 28 Nov 14:05` on another day."""
    now = datetime.datetime.now()
    moment = now + datetime.timedelta(seconds=seconds)
    return moment.strftime("%H:%M" if moment.date() == now.date() else "%a %d %b %H:%M")


def draws_bars(stream: TextIO | None) -> bool:
    """Returns whether a stream is a terminal that can redraw a line."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        # The stream is None or closed.
        return False


def begin_line() -> str:
    """Returns the line break to print before a line while Keras draws a progress bar; empty without a bar."""
    return "\n" if draws_bars(sys.stdout) else ""


def choose_keras_verbosity() -> int:
    """Returns the Keras verbosity: 1 (a bar) in a terminal, else 2 (a line per epoch)."""
    return 1 if draws_bars(sys.stdout) else 2


def show_progress(
    total: int, title: str, initial: int = 0, delay: float = 0.0, unit: str = "image"
) -> tqdm | ProgressLines:
    """Shows progress on stderr: a bar in a terminal, else lines. Use it in a `with` block and call `update`.

    Args:
        total: the number of images.
        title: the current task; nothing is shown if it is empty.
        initial: the number of images that are already done.
        delay: seconds before a bar appears.
        unit: what the bar counts.
    """
    if draws_bars(sys.stderr) or not title:
        return tqdm(total=total, initial=initial, unit=unit, desc=title, delay=delay, disable=not title, **BAR)
    return ProgressLines(total, title, initial)


class ProgressLines:
    """Prints a progress line every minute, and so nothing for tasks under a minute.

    Args:
        total: the number of images.
        title: the current task.
        initial: the number of images that are already done.
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
