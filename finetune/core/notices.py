"""The libraries' own notices: kept from the screen, where they bury the lines that matter; errors never are.

TensorFlow's C++ writes some of them while it is loaded, before any setting of its own can keep it from that. What it
writes meanwhile goes through a process that leaves them out: should loading crash, its last words are still told. That
process runs this file, which therefore imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, BinaryIO

# 0 shows all, 2 errors alone.
LEVEL_VARIABLE = "TF_CPP_MIN_LOG_LEVEL"
# Loggers of Python that TensorFlow and Keras use.
LOGGERS = ("tensorflow", "absl")
NOTICE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog|To enable the following instructions: "
    # TensorFlow Lite, when it converts and when it loads.
    rb"|fully_quantize: |INFO: "
    # Information and warnings, as C++ marks them.
    rb"|[IW]\d{4} \d\d:\d\d:|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IW] "
    # Called errors, and none: the machine has no driver or no GPU, or two parts of TensorFlow bring the same one.
    rb"|E\d{4} .*(failed call to cuInit: .*(UNKNOWN ERROR \(303\)|CUDA_ERROR_NO_DEVICE)|Unable to register cu)"
)
# How long the process may take to write the rest, in seconds: a program that was started meanwhile may hold it up.
PATIENCE = 5.0


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
    if "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, QuietLoading())


class QuietLoading:
    """Finds TensorFlow in the place of Python's own finders, once, and has it loaded without its notices."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Returns how TensorFlow is loaded; None of all else, which the other finders find."""
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(load_quietly, spec.loader.exec_module)
        return spec


def load_quietly(load: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Loads a module without the notices of what it brings."""
    with hiding_notices():
        load(module)
    # Not before: the second is of a class of its own, which its package makes.
    for name in LOGGERS if is_quiet() else ():
        logging.getLogger(name).setLevel(logging.ERROR)


def is_quiet() -> bool:
    """Tells whether notices are kept from the screen: not in a program that has not asked for it."""
    return os.environ.get(LEVEL_VARIABLE, "0") != "0"


@contextlib.contextmanager
def hiding_notices() -> Iterator[None]:
    """Leaves out the notices that C++ writes to stderr while it is entered, unless they are wanted."""
    try:
        sink = _start_sink() if is_quiet() else None
    except OSError:
        # Without stderr, or a process to spare.
        sink = None
    if sink is None:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(sink.stdin.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        sink.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            sink.wait(PATIENCE)


def _start_sink() -> subprocess.Popen | None:
    if not sys.executable or sys.stderr is None:
        return None
    # Raises OSError where it is closed.
    os.fstat(2)
    # In a session of its own, so that Ctrl-C leaves it to write the rest.
    command = [sys.executable, "-I", "-S", __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, start_new_session=True)


def leave_out_notices(source: BinaryIO, target: BinaryIO) -> None:
    """Copies lines but for the notices, each as soon as it is there."""
    for line in source:
        if not NOTICE.match(line):
            target.write(line)
            target.flush()


if __name__ == "__main__":
    leave_out_notices(sys.stdin.buffer, sys.stdout.buffer)
