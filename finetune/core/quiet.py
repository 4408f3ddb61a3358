"""Hiding log messages of the libraries, which would bury the lines that matter."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

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
