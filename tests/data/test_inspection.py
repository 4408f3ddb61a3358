"""What is found in image files before they are decoded, and in their pixels."""

import functools
import os

import cv2
import numpy as np
import pytest
import skimage.data
from checked_tables import (
    EXPECTED,
    corpus,  # noqa: F401
)
from corpus import BOMB_SIDES, UNREADABLE, encode, photo
from fsspec.implementations.memory import MemoryFileSystem

from finetune.core.options import UserError
from finetune.data import stores
from finetune.data.images import read_image
from finetune.data.inspection import inspect_image
from finetune.data.stores import FIRST_PART

# What only decoding finds.
DEEP = ("damaged_png", "truncated_gif", "truncated_tiff", "cut_with_mark_jpeg", "zeroed_jpeg", "random_jpeg")
DEEP += ("missing_part_jpeg",)


def test_a_large_jpeg_that_is_cut_short_is_refused_at_every_length(tmp_path):
    data = encode("JPEG", cv2.resize(skimage.data.astronaut(), (900, 900)), quality=90)
    path = tmp_path / "cut.jpg"
    for share in (0.05, 0.3, 0.6, 0.9, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        for size in (None, (100, 100)):
            with pytest.raises(UserError, match=r"cut\.jpg"):
                read_image(str(path), size)
        assert inspect_image(str(path)).fault[0] in ("truncated", "unreadable")


def test_end_mark_of_a_thumbnail_is_not_that_of_the_photo(tmp_path):
    data = encode("JPEG", photo(0, (120, 160)))
    thumbnail = encode("JPEG", photo(1, (30, 40)))
    segment = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    path = tmp_path / "photo.jpg"
    whole = data[:2] + segment + data[2:]
    path.write_bytes(whole)
    assert inspect_image(str(path)).fault is None
    path.write_bytes(whole[:-200])
    assert inspect_image(str(path)).fault[0] == "truncated"


def test_the_check_and_training_agree_on_each_file_of_the_corpus(corpus):
    for name, path in corpus.items():
        for decode in (False, True):
            found = inspect_image(str(path), decode)
            kinds = [found.fault[0]] if found.fault else [kind for kind, _ in found.remarks]
            expected = [] if name in DEEP and not decode else EXPECTED.get(name, [])
            assert kinds == [kind for kind in expected if decode or kind != "nearly_uniform"], name
        assert (found.fault is not None) == (name in UNREADABLE), name
        if name in UNREADABLE:
            with pytest.raises(UserError, match=path.name):
                read_image(str(path))
        else:
            assert read_image(str(path)).ndim == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert inspect_image(str(tmp_path / "pipe.jpg"), decode=True).fault[0] == "missing"
    with pytest.raises(UserError, match=r"pipe\.jpg"):
        read_image(str(tmp_path / "pipe.jpg"))


def test_the_limit_of_pixels_is_the_last_number_allowed(corpus):
    height, width = read_image(str(corpus["good_jpeg"])).shape[:2]
    assert inspect_image(str(corpus["good_jpeg"]), max_pixels=height * width).fault is None
    assert inspect_image(str(corpus["good_jpeg"]), max_pixels=height * width - 1).fault[0] == "too_many_pixels"
    pixels = BOMB_SIDES[0] * BOMB_SIDES[1]
    assert inspect_image(str(corpus["bomb_png"]), max_pixels=pixels).fault is None


@functools.cache
def large_files():
    """Returns files of every kind, by name, that are larger than the part of a header that is read first."""
    noisy = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    files = {f"large.{kind.lower()}": encode(kind, noisy) for kind in ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")}
    files["trailing.jpeg"] = files["large.jpeg"] + bytes(9000)
    files["large.hdr"] = cv2.imencode(".hdr", noisy.astype(np.float32))[1].tobytes()
    files["large.txt"] = b"no image " * 20_000
    assert min(map(len, files.values())) > FIRST_PART
    return files | {f"cut_{name}": data[:-5000] for name, data in files.items()}


@pytest.mark.parametrize("decode", [False, True])
def test_each_object_is_told_for_what_the_file_is(corpus, store, tmp_path, decode):
    files = {path.name: path for path in corpus.values()}
    for name, data in large_files().items():
        files[name] = tmp_path / name
        files[name].write_bytes(data)
    for name, path in files.items():
        if path.is_file():
            store.put(f"memory://bucket/{name}", path.read_bytes())
    store.put("memory://bucket/folder.jpg/a.jpg", b"")
    for name, path in files.items():
        assert inspect_image(f"memory://bucket/{name}", decode) == inspect_image(str(path), decode), name


def test_header_and_end_of_a_large_object_are_all_that_is_read(store):
    data = large_files()["large.jpeg"]
    store.put("memory://bucket/a.jpg", data)
    assert inspect_image("memory://bucket/a.jpg").sides == (400, 300)
    parts = [(0, 2**16), (len(data) - 4096, len(data))]
    assert store.asked == [("info", "/bucket/a.jpg"), *(("bytes", "/bucket/a.jpg", *part) for part in parts)]
    small = encode("JPEG", photo(0))
    for content, decode in ((data, True), (small, False), (small, True)):
        store.put("memory://bucket/a.jpg", content)
        store.asked.clear()
        assert inspect_image("memory://bucket/a.jpg", decode).fault is None
        assert store.asked == [("info", "/bucket/a.jpg"), ("bytes", "/bucket/a.jpg", 0, len(content))]


def test_a_header_that_is_longer_is_read_to_its_end(store):
    data = encode("JPEG", photo(0, (120, 160)))
    comment = b"\xff\xfe" + (60_000).to_bytes(2, "big") + bytes(59_998)
    store.put("memory://bucket/a.jpg", data[:2] + comment * 5 + data[2:-2] + bytes(10**6) + data[-2:])
    found = inspect_image("memory://bucket/a.jpg")
    assert (found.fault, found.remarks, found.sides) == (None, [], (160, 120))
    # Before the sides are 300,000 bytes: parts of 1, 2 and 4 times the first one.
    assert sum(end - start for _, _, start, end in store.asked[1:]) == 7 * 2**16 + 4096


def test_an_object_of_unknown_size_is_read_whole(store, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *_: {"type": "file", "size": None})
    files = large_files()
    for name, fault in (("large.jpeg", None), ("cut_large.jpeg", "truncated"), ("large.txt", "not_an_image")):
        store.put("memory://bucket/a", files[name])
        found = inspect_image("memory://bucket/a").fault
        assert (found and found[0]) == fault
    assert store.asked == [("bytes", "/bucket/a", None, None)] * 3


def test_an_object_that_changes_while_it_is_read_is_no_damaged_image(store, monkeypatch):
    store.put("memory://bucket/a.jpg", large_files()["large.jpeg"])
    monkeypatch.setattr(stores, "_ask_store", lambda *_: {"type": "file", "size": 10**7})
    assert inspect_image("memory://bucket/a.jpg").fault[0] == "unreachable"


def test_damaged_animation_does_not_reach_opencv_which_crashes(corpus, tmp_path, monkeypatch):
    data = bytearray(corpus["animated_png"].read_bytes())
    data[len(data) // 3] ^= 0xFF
    path = tmp_path / "animated.png"
    path.write_bytes(data)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded by OpenCV"))
    with pytest.raises(UserError, match=r"animated\.png"):
        read_image(str(path))
    assert inspect_image(str(path), decode=True).fault[0] == "unreadable"
