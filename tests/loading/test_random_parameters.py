"""The parameters of a whole batch against those that imgaug draws image by image."""

import numpy as np
import pytest
from imgaug import Keypoint, KeypointsOnImage
from imgaug import augmenters as iaa

from finetune.loading.random_parameters import draw_maps, draw_values

HEIGHT, WIDTH, NUMBER = 60, 90, 24
GEOMETRIC = {
    "mirror": lambda: [iaa.Fliplr(0.5)],
    "upside down": lambda: [iaa.Flipud(0.5), iaa.Fliplr(0.3)],
    "turn": lambda: [iaa.Affine(rotate=(-40, 40))],
    "single numbers": lambda: [iaa.Affine(scale=1.3, shear=9, rotate=-10, translate_px=4)],
    "shear of both": lambda: [iaa.Affine(shear={"x": (-20, 20), "y": (-9, 9)})],
    "each side its own": lambda: [iaa.Affine(scale={"x": (0.5, 1.5), "y": (0.9, 2)}, translate_px={"x": (-9, 9)})],
    "share of the sides": lambda: [iaa.Affine(translate_percent={"x": (-0.3, 0.3), "y": (0, 0.2)})],
    "choice": lambda: [iaa.Affine(rotate=[0, 90, 180], shear=(-5, 5))],
    "subclasses": lambda: [iaa.Rotate((-30, 30)), iaa.ScaleX((0.5, 1.5)), iaa.TranslateY(px=(-9, 9))],
    "all of them": lambda: [iaa.Fliplr(0.5), iaa.Affine(rotate=(-15, 15), scale=(0.9, 1.2)), iaa.Affine(shear=(-6, 6))],
}
BY_VALUE = {
    "multiply": lambda: [iaa.Multiply((0.5, 1.7))],
    "multiply each channel": lambda: [iaa.Multiply((0.5, 1.7), per_channel=0.5)],
    "contrast": lambda: [iaa.LinearContrast((0.3, 2))],
    "contrast of each channel": lambda: [iaa.LinearContrast((0.3, 2), per_channel=0.5)],
    "one number": lambda: [iaa.Multiply(1.25), iaa.LinearContrast(0.75)],
    "others between": lambda: [iaa.Multiply((0.5, 1.5)), iaa.GammaContrast((0.5, 2)), iaa.LinearContrast((0.6, 1.4))],
}


@pytest.mark.parametrize("make", GEOMETRIC.values(), ids=GEOMETRIC)
def test_maps_take_points_where_imgaug_takes_them(make):
    points = [Keypoint(0, 0), Keypoint(WIDTH, 0), Keypoint(20, 50)]
    imgaugs, ours = iaa.Sequential(make()), iaa.Sequential(make())
    for augmenters in (imgaugs, ours):
        augmenters.seed_(5)
    before = [KeypointsOnImage(points, shape=(HEIGHT, WIDTH, 3))] * NUMBER
    moved = np.stack([found.to_xy_array() for found in imgaugs.augment_keypoints(before)]).astype(float)
    maps = draw_maps(ours, NUMBER, HEIGHT, WIDTH)
    back = np.einsum("nij,npj->npi", maps, np.concatenate([moved, np.ones((NUMBER, 3, 1))], axis=2))
    np.testing.assert_allclose(back, np.broadcast_to(before[0].to_xy_array(), back.shape), atol=2e-3)


@pytest.mark.parametrize("make", BY_VALUE.values(), ids=BY_VALUE)
def test_values_are_those_of_imgaug(make):
    imgaugs, ours = iaa.Sequential(make()), iaa.Sequential(make())
    for augmenters in (imgaugs, ours):
        augmenters.seed_(5)
    every_value = np.tile(np.arange(256, dtype=np.uint8)[:, None], (NUMBER, 1, 1, 3))
    expected = imgaugs(images=every_value)[:, 0].astype(int)
    found = draw_values(ours, NUMBER).astype(int)
    assert np.abs(found - expected).max() <= 1
    # Where a product is half-way between two values either may come out.
    assert (found != expected).mean() < 0.002


def test_deactivated_and_deterministic_augmenters():
    off = iaa.Affine(rotate=30)
    off.activated = False
    np.testing.assert_array_equal(draw_maps([off], 2, HEIGHT, WIDTH), np.tile(np.eye(3)[:2], (2, 1, 1)))
    same = iaa.Affine(rotate=(-30, 30)).to_deterministic()
    np.testing.assert_array_equal(draw_maps([same], 3, HEIGHT, WIDTH), draw_maps([same], 3, HEIGHT, WIDTH))
