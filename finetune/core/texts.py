"""How text is shown: counts, sizes, lists and escapes, progress bars, and lines in a log."""

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
# Where there are more classes, people are shown the most telling ones, and told where all are.
MOST_LISTED = 100
MOST_TELLING = 20
# Between two lines, in seconds.
LINE_EVERY = 60.0
# As Keras draws the bar of an epoch.
BAR = {
    "bar_format": "{desc}: {n_fmt}/{total_fmt} {bar:20} {elapsed}, {remaining} to go, {rate_fmt}",
    "ascii": " ━",
    "colour": "green",
}


def join_names(names: Sequence[Any], longest: int = LONGEST_LIST) -> str:
    """Returns the first few names joined by commas, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:longest])
    return shown + (f" and {len(names) - longest} more" if len(names) > longest else "")


def show_count(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 image`, `2 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show_bytes(number: int) -> str:
    """Returns a number of bytes in the unit that suits it: `12.5 MiB`, `1.2 GiB`."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def show_text(text: str) -> str:
    """Returns a text on one line: as it is, or with escapes where it holds what cannot be printed."""
    return text if text.isprintable() else ascii(text)


def shorten(text: str) -> str:
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= 300 else f"{shown[:300]}..."


BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def show(text: str) -> str:
    """Returns a text with the characters that cannot be seen, or that reorder others, written as their escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs") or character in BIDI_CONTROLS
        else character
        for character in text
    )


def show_duration(seconds: float) -> str:
    """Returns a duration in the two largest units that it has: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def show_moment(seconds: float) -> str:
    """Returns when it will be so many seconds from now, local time: `14:05`, `Sat 28 Nov 14:05` on another day."""
    now = datetime.datetime.now()
    moment = now + datetime.timedelta(seconds=seconds)
    return moment.strftime("%H:%M" if moment.date() == now.date() else "%a %d %b %H:%M")


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
