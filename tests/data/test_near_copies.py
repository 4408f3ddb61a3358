"""Which photos are near copies of each other, and groups of them."""

import cv2
import numpy as np
import pytest
import skimage.data

from finetune.data.near_copies import NearPair, find_near_pairs, group_near_pairs, make_thumbnail, stack_thumbnails


def photos():
    """Returns parts of scikit-image's photos that share nothing."""
    whole = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    return [np.ascontiguousarray(photo[:, part]) for photo in whole for part in (np.s_[:200], np.s_[220:420])]


def compress(photo, quality):
    return cv2.imdecode(cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def turn(photo, degrees):
    height, width = photo.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return cv2.warpAffine(photo, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)


ALTERATIONS = {
    "smaller": lambda photo: cv2.resize(photo, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "larger": lambda photo: cv2.resize(photo, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC),
    "compressed": lambda photo: compress(photo, 30),
    "cropped about the middle": lambda photo: photo[len(photo) // 20 : -len(photo) // 20, 10:-10],
    "cropped on one side": lambda photo: photo[len(photo) // 10 :],
    "cropped at a corner": lambda photo: photo[len(photo) // 10 :, :-20],
    "brighter": lambda photo: np.clip(photo.astype(int) + 30, 0, 255).astype(np.uint8),
    "of less contrast": lambda photo: (photo * 0.7 + 38).astype(np.uint8),
    "grey": lambda photo: np.repeat(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2),
    "mirrored": lambda photo: photo[:, ::-1],
    "turned": lambda photo: turn(photo, 2),
}


def find(images):
    return find_near_pairs(stack_thumbnails([make_thumbnail(np.ascontiguousarray(image)) for image in images])).pairs


@pytest.mark.parametrize("name", ALTERATIONS)
def test_every_altered_copy_is_found_and_nothing_else(name):
    originals = photos()
    copies = [compress(np.ascontiguousarray(ALTERATIONS[name](photo)), 80) for photo in originals]
    found = find([*originals, *copies])
    assert [(pair.first, pair.second) for pair in found] == [(row, row + 8) for row in range(8)]
    assert all(0.9 <= pair.correlation <= 1 for pair in found)


def test_photos_of_one_composition_are_not_taken_for_copies():
    rng = np.random.default_rng(0)
    images = []
    for _ in range(20):
        # A bright disc of one place and size on dark ground, with a texture of its own.
        image = cv2.circle(np.full((128, 128), 60, np.uint8), (64, 64), 40, 190, -1)
        image = image + cv2.GaussianBlur(rng.normal(0, 120, image.shape), (0, 0), 2)
        images.append(np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2))
    assert find(images) == []


def test_result_does_not_depend_on_the_order_nor_on_the_number_of_workers():
    images = [make_thumbnail(photo) for photo in [*photos(), *map(ALTERATIONS["turned"], photos())]]
    pairs = find_near_pairs(stack_thumbnails(images), workers=1).pairs
    assert find_near_pairs(stack_thumbnails(images), workers=4).pairs == pairs
    turned_first = find_near_pairs(stack_thumbnails(images[::-1])).pairs
    assert {(15 - pair.second, 15 - pair.first) for pair in turned_first} == {pair[:2] for pair in pairs}


def test_a_search_without_time_says_how_much_it_left_out():
    images = stack_thumbnails([make_thumbnail(photo) for photo in photos() * 2])
    found = find_near_pairs(images, seconds=0)
    assert found.pairs == []
    assert found.left_out >= 8


def test_image_of_one_tone_has_no_thumbnail():
    assert make_thumbnail(np.full((50, 50, 3), 90, np.uint8)) is None


def members(groups, number):
    return [{other for other in range(number) if groups.connected(other, one)} for one in range(number)]


def test_strong_pairs_form_chains_and_weak_ones_do_not():
    strong = group_near_pairs(4, [NearPair(0, 1, 0.97), NearPair(1, 2, 0.96), NearPair(2, 3, 0.95)])
    assert members(strong, 4)[0] == {0, 1, 2, 3}
    # 0-1 joins first; 1-2 is then one of the two pairs between {0, 1} and {2}; 2-3 is one of three.
    weak = group_near_pairs(4, [NearPair(0, 1, 0.93), NearPair(1, 2, 0.92), NearPair(2, 3, 0.91)])
    assert members(weak, 4)[0] == {0, 1, 2}
    assert members(weak, 4)[3] == {3}


def test_weak_pairs_join_large_groups_where_they_are_half_of_all():
    inside = [NearPair(0, 1, 0.99), NearPair(2, 3, 0.99)]
    assert len({frozenset(one) for one in members(group_near_pairs(4, [*inside, NearPair(1, 2, 0.91)]), 4)}) == 2
    half = [*inside, NearPair(0, 2, 0.91), NearPair(1, 3, 0.91)]
    assert len({frozenset(one) for one in members(group_near_pairs(4, half), 4)}) == 1
