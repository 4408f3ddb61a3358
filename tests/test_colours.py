"""Changes of colour."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from finetune.colours import Saturation


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.4])
def test_saturation_is_that_of_pillow(factor):
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    expected = np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor)).astype(int)
    found = Saturation(factor)(images=image[None])[0]
    assert found.dtype == np.uint8
    # Pillow rounds the grey first.
    assert np.abs(found - expected).max() <= 1


def test_each_image_has_a_factor_of_its_own_that_follows_from_the_seed():
    images = np.random.default_rng(0).integers(0, 256, (1, 30, 40, 3), np.uint8).repeat(3, axis=0)
    augmenter = Saturation((0.2, 0.9))
    augmenter.seed_(4)
    first = augmenter(images=images.copy())
    assert (first[0] != first[1]).any()
    augmenter.seed_(4)
    np.testing.assert_array_equal(augmenter(images=images.copy()), first)
