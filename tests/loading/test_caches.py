"""The caches return what decoding returns, whatever happens to their files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from picture_sets import (
    SIZE,
    assert_same_batch,
    augmented_sequence,
    cache_of,
    mixing_sequence,
    one_epoch,
    pictures,  # noqa: F401
    sequence_of,
)
from PIL import Image

from finetune.core.options import UserError
from finetune.data.stores import read_version
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


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_cache_gives_the_same_batches_without_reading_again(pictures, tmp_path, kind, monkeypatch):
    expected = augmented_sequence(pictures[0])
    cached = augmented_sequence(pictures[0], cache=cache_of(kind, pictures[0], tmp_path / "cache"), workers=2)
    one_epoch(cached)
    cached.epoch = expected.epoch = 1
    with monkeypatch.context() as patch:
        patch.setattr("finetune.loading.batches.read_image", lambda *_: pytest.fail("an image was read again"))
        batches = one_epoch(cached)
    assert_same_batch(batches, one_epoch(expected))


def test_a_changed_image_is_read_again(pictures, tmp_path):
    paths, images = pictures
    one_epoch(sequence_of(paths, cache=cache_of("disk", paths, tmp_path)))
    Image.fromarray(images[7]).save(paths[3])
    os.utime(paths[3], ns=(1, 1))
    batches, _ = one_epoch(sequence_of(paths, cache=cache_of("disk", paths, tmp_path)))
    np.testing.assert_array_equal(batches, images[[0, 1, 2, 7, 4, 5, 6, 7, 8, 9]])


def test_half_written_pixels_are_read_again(pictures, tmp_path):
    paths, images = pictures
    cache = cache_of("disk", paths, tmp_path)
    one_epoch(sequence_of(paths, cache=cache))
    with open(cache.path, "r+b") as file:
        file.seek(-images[0].nbytes, os.SEEK_END)
        file.write(b"\0" * 40)
    again = cache_of("disk", paths, tmp_path)
    assert again.get(9) is None
    assert again.get(8) is not None
    np.testing.assert_array_equal(one_epoch(sequence_of(paths, cache=again))[0], images)


def test_two_processes_that_fill_one_cache_agree(pictures, tmp_path):
    paths, images = pictures
    first, second = (sequence_of(paths, cache=cache_of("disk", paths, tmp_path)) for _ in range(2))
    first[0], second[1], first[2]
    for sequence in (first, second):
        np.testing.assert_array_equal(one_epoch(sequence)[0], images)


# Images in stores


@pytest.fixture
def urls(pictures, store):
    """The URLs of the pictures in a store, and the pictures."""
    found = [f"memory://bucket/{number}.png" for number in range(10)]
    for url, path in zip(found, pictures[0], strict=True):
        store.put(url, Path(path).read_bytes())
    return found, pictures[1]


def test_batches_of_urls_are_those_of_files(urls, pictures):
    of_urls, of_files = augmented_sequence(urls[0], workers=3), augmented_sequence(pictures[0])
    for index, batch in enumerate(of_urls.to_dataset().as_numpy_iterator()):
        assert_same_batch(batch, of_files[index])


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://bucket/lost.png", "not exist"),
        ("memory://bucket", "not exist"),
        ("memory://bucket/text.png", "no image"),
        ("htps://host/a.png", "Protocol not known: htps"),
        ("zip://a.png::memory://bucket/a.zip", "'::'"),
    ],
)
def test_a_url_without_an_image_is_named(urls, store, url, reason):
    store.put("memory://bucket/text.png", b"no image")
    sequence = sequence_of([*urls[0][:8], url], cache=None)
    with pytest.raises(UserError) as caught:
        sequence[2]
    assert sequence.error is caught.value
    (line,) = str(caught.value).splitlines()
    assert url in line
    assert reason in line


def test_a_disk_cache_asks_a_store_once_an_image_and_fetches_only_what_is_new(urls, tmp_path, store, pictures):
    paths, images = urls
    names, expected = [f"/bucket/{number}.png" for number in range(10)], images
    versions = [("info", name) for name in names]
    for fetched in (names, [], ["/bucket/3.png"]):
        if len(fetched) == 1:
            store.put(paths[3], Path(pictures[0][7]).read_bytes())
            expected = images[[0, 1, 2, 7, 4, 5, 6, 7, 8, 9]]
        store.asked.clear()
        sequence = sequence_of(paths, cache=cache_of("disk", paths, tmp_path))
        for sequence.epoch in range(2):
            np.testing.assert_array_equal(one_epoch(sequence)[0], expected)
        assert sorted(store.asked) == sorted(versions + [("bytes", name, None, None) for name in fetched])
    assert len(list(tmp_path.glob("*.cache"))) == 1


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"ETag": '"a"'}, {"ETag": '"b"'}, False),
        ({"last_modified": "2026-01-01"}, {"last_modified": "2026-01-02"}, False),
        ({"Last-Modified": "Thu"}, {"Last-Modified": "Fri"}, False),
        ({"size": 1}, {"size": 2}, False),
        ({"StorageClass": "STANDARD", "time": 1}, {"StorageClass": "GLACIER", "time": 2}, True),
    ],
)
def test_the_version_of_an_object_changes_with_its_bytes(urls, monkeypatch, first, second, same):
    versions = []
    for told in (first, second):
        monkeypatch.setattr(MemoryFileSystem, "info", lambda *_, told=told: {"type": "file", "size": 9} | told)
        versions.append(read_version(urls[0][0]))
    assert (versions[0] == versions[1]) is same


def test_an_image_without_a_version_is_read_in_every_run(urls, tmp_path, store, monkeypatch):
    def refuse(*_):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    paths, images = urls
    for _ in range(2):
        store.asked.clear()
        sequence = sequence_of(paths, cache=cache_of("disk", paths, tmp_path))
        for _ in range(2):
            np.testing.assert_array_equal(one_epoch(sequence)[0], images)
        assert len(store.asked) == 10
