"""Exact and near copies of an image within and across sets."""

import cv2
import numpy as np
import skimage.data
from corpus import encode

from finetune.copies import join_near
from finetune.groups import Groups
from finetune.images import decode_image
from finetune.inspection import SMALLEST_SIDES, hash_picture


def make_copies(picture):
    """Yields copies of a picture as they occur: resized, recompressed, slightly cropped, and all three at once."""
    height, width = picture.shape[:2]
    for scale in (0.5, 0.8, 1.3, 2.0):
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        yield cv2.resize(picture, None, fx=scale, fy=scale, interpolation=method), 95
    for quality in (30, 60, 90):
        yield picture, quality
    for top, bottom, left, right in ((0.04, 0.04, 0.04, 0.04), (0.04, 0, 0.02, 0), (0, 0.03, 0, 0.03)):
        rows = slice(int(top * height), height - int(bottom * height))
        yield picture[rows, int(left * width) : width - int(right * width)], 90
    yield cv2.resize(picture[height // 40 :, width // 40 :], None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA), 50


def near_hashes(pictures):
    files = [encode("JPEG", picture, quality=quality) for picture, quality in pictures]
    hashes = [hash_picture(decode_image(np.frombuffer(data, np.uint8), 10**8, SMALLEST_SIDES)) for data in files]
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 5)


def photos():
    """Returns scikit-image's photos, and parts of them that share nothing."""
    whole = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    halves = [np.ascontiguousarray(picture[:, part]) for picture in whole for part in (np.s_[:200], np.s_[220:420])]
    return [*whole, *halves]


def test_resized_recompressed_and_cropped_copies_are_found():
    found = []
    for picture in photos():
        hashes = near_hashes([(picture, 95), *make_copies(picture)])
        found += [bool(join_near(hashes[[0, copy]], ["a", "a"])) for copy in range(1, len(hashes))]
    assert np.mean(found) >= 0.95


def test_different_photos_are_not_taken_for_copies():
    pictures = photos()[4:]
    hashes = near_hashes([(picture, 90) for picture in pictures])
    assert join_near(hashes, ["a"] * len(hashes)) == []


def test_every_chain_of_near_hashes_becomes_one_group():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (700, 5)).astype(np.uint64)
    for copy, original in ((300, 10), (650, 300), (20, 650)):
        hashes[copy] = hashes[original]
        hashes[copy, 1:] ^= np.uint64(3 << copy % 60)
    groups = Groups(700)
    for first, second, distance in join_near(hashes, ["a"] * 700):
        assert distance <= 24
        groups.join(first, second)
    assert {groups.find(position) for position in (10, 20, 300, 650)} == {10}
    assert len({groups.find(position) for position in range(700)}) == 697
