"""The libraries' own notices: kept from the screen, where they bury the lines that matter."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

# 0 shows all, 2 errors alone.
LEVEL_VARIABLE = "TF_CPP_MIN_LOG_LEVEL"
# Where stderr leads, also while it is hidden.
screen = 2


def silence_libraries(verbose: bool) -> None:
    """Keeps the libraries' notices from the screen, or lets all of them through; to be called before they are loaded.

    Without `verbose`, what the user has set for TensorFlow or for Python's warnings wins.
    """
    if verbose:
        os.environ[LEVEL_VARIABLE] = "0"
        return
    os.environ.setdefault(LEVEL_VARIABLE, "2")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    if not sys.warnoptions:
        # Behind the filters that are there: what is made an error stays one.
        warnings.simplefilter("ignore", append=True)


@contextlib.contextmanager
def hiding_stderr() -> Iterator[None]:
    """Hides what TensorFlow's C++ writes to stderr at any log level, unless it is wanted; shows it on an exception."""
    global screen
    if os.environ.get(LEVEL_VARIABLE, "0") == "0":
        yield
        return
    with tempfile.TemporaryFile() as hidden:
        screen = os.dup(2)
        if tells_crashes := not faulthandler.is_enabled():
            # A crash leaves nobody to show what is hidden.
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
