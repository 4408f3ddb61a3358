"""What the C library does with memory that is given back to it."""

from __future__ import annotations

import contextlib
import ctypes

# Numbers of glibc's mallopt. It takes blocks that are smaller than the one from what it keeps, and keeps as much as the
# other of what is free at the end of a thread's memory.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_KEPT_BLOCK = 2**25
MOST_KEPT = 2**28


def keep_freed_memory() -> None:
    """Lets glibc keep the memory of pictures that are decoded and dropped, for the next ones.

    Of itself it gives most back to the system at once, which fills new pages with zeros for the next picture, 71 for a
    photo of 320x240, while other threads wait that do the same. Other C libraries go on as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
        library.mallopt(TRIM_THRESHOLD, MOST_KEPT)
