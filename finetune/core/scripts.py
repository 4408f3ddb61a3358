"""Running a script: its options and exit status, and output that never fails it."""

from __future__ import annotations

import codecs
import contextlib
import faulthandler
import functools
import logging
import os
import signal
import sys
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

from finetune.core.options import UserError


def script(main: Callable[[Any], dict]) -> Callable[[Any], dict]:
    """Makes a script's `main` safe to call from a user's own code: it checks its configs and protects its output.

    Args:
        main: takes `configs`, annotated with their class.
    """

    @functools.wraps(main)
    def run(configs: Any) -> dict:
        with protecting_output():
            return main(typing.get_type_hints(main)["configs"].check(configs))

    return run


def run_script(main: Callable[[Any], dict]) -> None:
    """Runs a script's `main` with configs from the command line.

    A user's mistake prints its message on stderr and exits with status 2, Ctrl-C with 130. A bug keeps its traceback.
    Failing output does not end the script.

    Args:
        main: takes `configs`, annotated with their class; the docstring of its module begins `--help`.
    """
    restart_in_utf8()
    protect_output()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        configs = typing.get_type_hints(main)["configs"].from_command_line(sys.modules[main.__module__].__doc__)
        silence_libraries(configs.verbose)
        # OpenCV reads this variable when it is imported.
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(configs.max_image_pixels))
        main(configs)
    except UserError as error:
        sys.stdout.flush()
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt on Ctrl-C; ends at once during an import, where libraries turn it into other errors."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            sys.stdout.flush()
            with contextlib.suppress(OSError):
                os.write(screen, b"Interrupted.\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


STANDARD = ("stdout", "stderr")
UTF8_VARIABLE = "PYTHONUTF8"
ASCII_NAMES = f"Python takes file names as ASCII here. Set {UTF8_VARIABLE}=1 to use files with other names."


class LastingStream:
    """Wraps a text stream such that writing never fails.

    Terminals close, pipes lose their readers, disks fill up, and redirected output on Windows has 256 characters. None
    of this should end hours of training.

    Args:
        stream: the stream to wrap. None, as Python has it if the process started without one, discards all text.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes text, and escapes characters that the encoding of the stream lacks."""
        # The streams of notebooks and windows raise errors of their own.
        with contextlib.suppress(Exception):
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self.stream, "encoding", None) or "ascii"
                # Progress bars are redrawn often, and escapes would make them long.
                shown = text.replace("━", "=").encode(encoding, "backslashreplace")
                self.stream.write(shown.decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, if it still works."""
        with contextlib.suppress(Exception):
            self.stream.flush()

    def isatty(self) -> bool:
        """Returns whether the stream is an open terminal."""
        with contextlib.suppress(Exception):
            return self.stream.isatty()
        return False


def protect_output() -> None:
    """Replaces the standard streams by streams that never fail, for the rest of the process."""
    fill_descriptors()
    for name in STANDARD:
        stream = getattr(sys, name)
        if not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream))


@contextlib.contextmanager
def protecting_output() -> Iterator[None]:
    """Protects the output in a `with` block, for a `main` that a user's own program calls."""
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
    """Opens closed standard descriptors; otherwise the next file gets their number, and the output of C++ libraries."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The system assigns the lowest free number.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def has_ascii_names() -> bool:
    """Returns whether this Python takes file names as ASCII and therefore cannot handle other names."""
    return codecs.lookup(sys.getfilesystemencoding()).name == "ascii"


def restart_in_utf8() -> None:
    """Restarts this program in Python's UTF-8 mode if file names could only be ASCII.

    That happens in the C locale (LC_ALL=C) with UTF-8 mode switched off. Most systems have UTF-8 file names.
    """
    if has_ascii_names() and sys.executable and os.environ.get(UTF8_VARIABLE) != "1":
        # Child processes read the variable. The option also works with -E and -I.
        os.environ[UTF8_VARIABLE] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8=1", *sys.orig_argv[1:]])


# 0 shows all messages, 2 only errors.
LEVEL_VARIABLE = "TF_CPP_MIN_LOG_LEVEL"
# The descriptor of the real stderr, also while it is hidden.
screen = 2


def silence_libraries(verbose: bool) -> None:
    """Hides the log messages of the libraries, or shows all of them; to be called before they are loaded.

    Without `verbose`, the user's own settings for TensorFlow and Python's warnings win.
    """
    if verbose:
        os.environ[LEVEL_VARIABLE] = "0"
        return
    os.environ.setdefault(LEVEL_VARIABLE, "2")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    if not sys.warnoptions:
        # After the existing filters, which may turn warnings into errors.
        warnings.simplefilter("ignore", append=True)


@contextlib.contextmanager
def hiding_stderr() -> Iterator[None]:
    """Hides what TensorFlow's C++ code writes to stderr at any log level, unless wanted; shows it on an exception."""
    global screen
    if os.environ.get(LEVEL_VARIABLE, "0") == "0":
        yield
        return
    with tempfile.TemporaryFile() as hidden:
        screen = os.dup(2)
        if tells_crashes := not faulthandler.is_enabled():
            # After a crash nothing else could explain it.
            faulthandler.enable(screen)
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            os.write(screen, hidden.read())
            raise
        finally:
            os.dup2(screen, 2)
            if tells_crashes:
                faulthandler.disable()
            os.close(screen)
            screen = 2
    for name in ("tensorflow", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
