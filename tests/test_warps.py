"""The fused augmenters against imgaug's own."""

import numpy as np
import pytest
from augmented import smooth_photos
from imgaug import augmenters as iaa

from finetune.warps import FusedAugmenter


def default_warp(**options) -> iaa.Augmenter:
    return iaa.Affine(**{"rotate": (-30, 30), "scale": (0.8, 1.3), "order": 1, "mode": "reflect"} | options)


PIPELINES = {
    "mirror and warp": lambda: [iaa.Fliplr(0.5), default_warp(shear=(-8, 8), translate_percent=(-0.1, 0.1))],
    "upside down": lambda: [iaa.Flipud(0.5), iaa.Fliplr(0.5)],
    "far beyond the border": lambda: [default_warp(scale=(0.55, 0.8), translate_percent=(-0.7, 0.7))],
    "values": lambda: [iaa.Multiply((0.7, 1.4), per_channel=0.5), iaa.LinearContrast((0.6, 1.5)), iaa.Add((-30, 30))],
    "gamma": lambda: [iaa.GammaContrast((0.5, 2.0), per_channel=True), iaa.Invert(0.3)],
    "between others": lambda: [iaa.Fliplr(0.5), iaa.GaussianBlur((0, 2)), default_warp(), iaa.Multiply((0.5, 1.5))],
    "other border": lambda: [default_warp(mode="constant", cval=255), iaa.Fliplr(0.5)],
    "now and then": lambda: [iaa.Sometimes(0.5, iaa.Fliplr(1.0)), iaa.Add((-20, 20))],
}


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_fusing_changes_no_image_by_more_than_rounding(pipeline):
    images = smooth_photos(12)
    plain, fused = iaa.Sequential(pipeline()), FusedAugmenter(pipeline())
    plain.seed_(11)
    fused.seed_(11)
    expected, found = plain(images=images).astype(int), fused(images).astype(int)
    assert np.abs(expected - images).mean() > 5
    assert np.abs(found - expected).mean() < 0.3
    assert np.quantile(np.abs(found - expected), 0.999) <= 3


def test_two_warps_beside_each_other_become_one():
    # There and back by 45 degrees: warped twice, a checkerboard would be blurred and its corners lost.
    checks = np.kron(np.indices((12, 12)).sum(axis=0) % 2, np.ones((4, 4))).astype(np.uint8) * 200
    images = np.repeat(checks[None, ..., None], 3, axis=-1)
    there_and_back = [default_warp(rotate=angle, scale=1.0) for angle in (45, -45)]
    np.testing.assert_allclose(FusedAugmenter(there_and_back)(images).astype(int), images, atol=1)
