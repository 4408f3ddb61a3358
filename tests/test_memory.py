import ctypes
import resource

import numpy as np
import pytest

from finetune.memory import MOST_KEPT, keep_freed_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_the_memory_of_a_dropped_picture_serves_the_next_one():
    keep_freed_memory()

    def draw_pictures():
        for side in range(300, 400):
            np.ones((side, 400, 3), np.uint8)

    draw_pictures()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    draw_pictures()
    # Anew, each takes 88 pages or more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000
    assert MOST_KEPT < 2**31, "mallopt takes an int"


@pytest.mark.parametrize("library", [object(), None], ids=["without mallopt", "that cannot be asked"])
def test_another_c_library_goes_on_as_it_is(library, monkeypatch):
    def load(name):
        if library is None:
            raise OSError("no such library")
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    keep_freed_memory()
