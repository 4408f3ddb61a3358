"""The caches return what decoding returns, whatever happens to their files."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from picture_sets import (
    SIZE,
    cache_of,
    mixing_sequence,
    one_epoch,
    pictures,  # noqa: F401
    sequence_of,
)
from PIL import Image

from finetune.core.options import UserError
from finetune.loading.caches import MemoryCache


def test_mixing_leaves_a_cache_as_it_is(pictures, tmp_path):
    sequence = mixing_sequence(pictures[0], cutmix_alpha=1.0, cache=MemoryCache(10, SIZE))
    first, second = one_epoch(sequence), one_epoch(sequence)
    np.testing.assert_array_equal(first[0], second[0])
    for row in range(10):
        np.testing.assert_array_equal(sequence.cache.get(row), pictures[1][row])


@pytest.mark.slow
def test_a_later_process_uses_the_disk_cache(pictures, tmp_path):
    paths, images = pictures
    sequence = sequence_of(paths, cache=cache_of("disk", paths, tmp_path))
    one_epoch(sequence)
    code = (
        "import sys; from finetune.loading.caches import DiskCache; import numpy as np; "
        f"cache = DiskCache(sys.argv[1:], {SIZE}, {str(tmp_path)!r}); "
        "print(sum(int(cache.get(row).sum()) for row in range(len(sys.argv) - 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert int(done.stdout) == images.sum()


def test_an_image_that_changes_while_it_is_read_is_read_again(pictures, tmp_path):
    paths, images = pictures
    cache = cache_of("disk", paths, tmp_path)
    assert cache.get(3) is None
    Image.fromarray(images[7]).save(paths[3])
    os.utime(paths[3], ns=(1, 1))
    cache.put(3, images[3])
    assert cache.get(3) is None


def test_a_disk_cache_that_is_killed_while_it_is_filled_is_right_afterwards(pictures, tmp_path):
    paths, images = pictures
    code = (
        "import os, signal, sys, threading, time; import numpy as np; from finetune.loading.caches import DiskCache\n"
        "from finetune.data.images import read_image\n"
        f"cache = DiskCache(sys.argv[1:], {SIZE}, {str(tmp_path)!r})\n"
        "threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "while True:\n"
        "    for row, path in enumerate(sys.argv[1:]): cache.put(row, read_image(path))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    cache = cache_of("disk", paths, tmp_path)
    for row, image in enumerate(images):
        assert cache.get(row) is None or (cache.get(row) == image).all()


@pytest.mark.parametrize(
    ("patched", "value", "kind"),
    [
        ("finetune.loading.caches.free_memory", 5000, "memory"),
        ("finetune.loading.caches.shutil.disk_usage", None, "disk"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_before_the_start(pictures, tmp_path, monkeypatch, patched, value, kind):
    usage = shutil.disk_usage(tmp_path)._replace(free=3000)
    monkeypatch.setattr(patched, (lambda: value) if kind == "memory" else (lambda _: usage))
    with pytest.raises(UserError, match="image_cache: .*0.0 GiB"):
        cache_of(kind, pictures[0], tmp_path)


def test_a_cache_folder_that_cannot_be_written_is_named(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write .*file.*another image_cache_path"):
        cache_of("disk", pictures[0], tmp_path / "file")
