"""Standard output and error that never end the work: what they cannot show is escaped, what they lose is ignored."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

STANDARD = ("stdout", "stderr")
UTF8_VARIABLE = "PYTHONUTF8"
ASCII_NAMES = f"Python takes file names as ASCII here. For files with other names, start it with {UTF8_VARIABLE}=1 set."


class LastingStream:
    """A text stream whose writing never fails; all else is that of the stream itself.

    Terminals close, pipes lose their readers, disks fill up, and redirected output has 256 characters on Windows. None
    of that is a reason to lose an hour of training.

    Args:
        stream: where text goes. None, which Python has where the process was started without one, shows nothing.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes text, with escapes for the characters that the stream's encoding lacks."""
        # Streams that are not files, such as those of notebooks and windows, have errors of their own.
        with contextlib.suppress(Exception):
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self.stream, "encoding", None) or "ascii"
                # Bars are redrawn too often to be escapes.
                shown = text.replace("━", "=").encode(encoding, "backslashreplace")
                self.stream.write(shown.decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Brings what was written to its place, where there still is one."""
        with contextlib.suppress(Exception):
            self.stream.flush()

    def isatty(self) -> bool:
        """Returns whether the stream leads to a terminal; a closed one does not."""
        with contextlib.suppress(Exception):
            return self.stream.isatty()
        return False


def protect_output() -> None:
    """Replaces the standard streams by such as never fail, for the rest of the process."""
    fill_descriptors()
    for name in STANDARD:
        stream = getattr(sys, name)
        if not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream))


@contextlib.contextmanager
def protecting_output() -> Iterator[None]:
    """Does the same while it is entered: for a script's `main`, which a program of the user's may call."""
    before = {name: getattr(sys, name) for name in STANDARD}
    protect_output()
    if has_ascii_names():
        print(f"Warning: {ASCII_NAMES}", file=sys.stderr)
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def fill_descriptors() -> None:
    """Opens the standard descriptors that are closed: else the next file has their number, and gets what C++ prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The system takes the lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def has_ascii_names() -> bool:
    """Returns whether this Python takes file names as ASCII, so that it can neither read nor write others as text."""
    return codecs.lookup(sys.getfilesystemencoding()).name == "ascii"


def restart_in_utf8() -> None:
    """Starts this program again in Python's UTF-8 mode where file names could only be ASCII.

    That is so in the locale C, as with LC_ALL=C, where that mode is switched off: most systems' file names are UTF-8.
    """
    if has_ascii_names() and sys.executable and os.environ.get(UTF8_VARIABLE) != "1":
        # The processes that this one starts read the variable; the option also counts under -E and -I.
        os.environ[UTF8_VARIABLE] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8=1", *sys.orig_argv[1:]])
