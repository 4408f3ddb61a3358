"""The caches return what decoding returns, whatever happens to their files."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from picture_sets import SIZE, cache_of, mixing_sequence, one_epoch, pictures, sequence_of  # noqa: F401
from PIL import Image

from finetune.core.options import UserError
from finetune.loading.caches import MemoryCache


def test_mixing_leaves_a_cache_as_it_is(pictures):
    sequence = mixing_sequence(pictures[0], cutmix_alpha=1.0, cache=MemoryCache(10, SIZE))
    first, second = one_epoch(sequence), one_epoch(sequence)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal([sequence.cache.get(row) for row in range(10)], pictures[1])


def test_each_image_size_has_its_own_file(pictures, tmp_path):
    one_epoch(sequence_of(pictures[0], cache=cache_of("disk", pictures[0], tmp_path)))
    other = cache_of("disk", pictures[0], tmp_path, (6, 8))
    assert [other.get(row) for row in range(10)] == [None] * 10


def test_an_image_that_changes_during_reading_is_read_again(pictures, tmp_path):
    paths, images = pictures
    cache = cache_of("disk", paths, tmp_path)
    assert cache.get(3) is None
    Image.fromarray(images[7]).save(paths[3])
    os.utime(paths[3], ns=(1, 1))
    cache.put(3, images[3])
    assert cache.get(3) is None


@pytest.mark.slow
def test_a_disk_cache_is_right_after_its_process_was_killed(pictures, tmp_path):
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


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_cache_that_does_not_fit_is_refused_before_the_start(pictures, tmp_path, monkeypatch, kind):
    usage = shutil.disk_usage(tmp_path)._replace(free=3000)
    monkeypatch.setattr("finetune.loading.caches.free_memory", lambda: 5000)
    monkeypatch.setattr("finetune.loading.caches.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="image_cache: .*0.0 GiB"):
        cache_of(kind, pictures[0], tmp_path)


def test_an_unwritable_cache_folder_is_named(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*image_cache_path"):
        cache_of("disk", pictures[0], tmp_path / "file")
