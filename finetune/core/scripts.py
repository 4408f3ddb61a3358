"""Running a script: its options, output and exit status."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import typing
from collections.abc import Callable
from types import FrameType
from typing import Any

from finetune.core import streams
from finetune.core.options import UserError
from finetune.core.streams import protect_output, protecting_output, restart_in_utf8


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
        streams.silence_libraries(configs.verbose)
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
                os.write(streams.screen, b"Interrupted.\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt
