"""Texts for people: short lists, one line, nothing that cannot be seen."""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Sequence
from typing import Any

LONGEST_LIST = 5
# Where there are more classes, people are shown the most telling ones, and told where all are.
MOST_LISTED = 100
MOST_TELLING = 20


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
