"""Augmentation: the random changes to training images that a model should learn to ignore."""

from __future__ import annotations

from collections.abc import Callable

from imgaug import augmenters as iaa

from configs import Configs
from finetune.loading.augmentation import AugmentationFunction, FusedAugmenter, Saturation


def build_augmenter(strength: str = "default") -> FusedAugmenter | None:
    """Builds the augmenter for uint8 RGB batches `(batch, height, width, 3)`; it keeps their shape and type.

    To remove a change, delete its line below. To add one, add a line with an augmenter of imgaug that keeps an image's
    size (https://imgaug.readthedocs.io/en/latest/source/overview_of_augmenters.html), or with a function that takes
    uint8 images `(batch, height, width, 3)` and a `numpy.random.Generator`, and returns changed images.

    Args:
        strength: a key of `STRENGTHS`.

    Returns:
        The augmenter, or None if nothing changes.

    Raises:
        UserError: the strength is unknown.
    """
    Configs.check_values(augmentation_strength=strength)
    augmenters = STRENGTHS[strength]()
    return FusedAugmenter(augmenters) if augmenters else None


def _light() -> list[iaa.Augmenter]:
    return [
        iaa.Fliplr(0.5),
        iaa.Affine(
            scale=(0.95, 1.05),
            translate_percent={"x": (-0.04, 0.04), "y": (-0.04, 0.04)},
            order=1,
            mode="reflect",
        ),
    ]


def _default() -> list[iaa.Augmenter]:
    return [
        iaa.Fliplr(0.5),
        iaa.Affine(
            rotate=(-15, 15),
            scale=(0.9, 1.15),
            shear=(-6, 6),
            translate_percent={"x": (-0.08, 0.08), "y": (-0.08, 0.08)},
            order=1,
            mode="reflect",
        ),
        # Brightness; for half of the images, each channel separately.
        iaa.Multiply((0.9, 1.1), per_channel=0.5),
        iaa.LinearContrast((0.8, 1.25)),
    ]


def _strong() -> list[iaa.Augmenter]:
    return [
        iaa.Fliplr(0.5),
        iaa.Affine(
            rotate=(-30, 30),
            scale=(0.8, 1.35),
            shear=(-12, 12),
            translate_percent={"x": (-0.15, 0.15), "y": (-0.15, 0.15)},
            order=1,
            mode="reflect",
        ),
        iaa.Multiply((0.75, 1.25), per_channel=0.5),
        iaa.LinearContrast((0.6, 1.6)),
        # Random erasing (Zhong et al., AAAI 2020, arXiv:1708.04896): a box of random colour hides a part of half of the
        # images, so that the model does not rely on a single detail.
        iaa.Sometimes(
            0.5,
            iaa.Cutout(nb_iterations=1, size=(0.15, 0.45), squared=False, cval=(0, 255), fill_per_channel=True),
        ),
    ]


def _photo() -> list[iaa.Augmenter]:
    # Without translation and scaling, which random_crop_area provides.
    return [
        iaa.Fliplr(0.5),
        iaa.Affine(rotate=(-15, 15), shear=(-8, 8), order=1, mode="reflect"),
        iaa.Multiply((0.8, 1.2)),
        iaa.LinearContrast((0.8, 1.2)),
        Saturation((0.8, 1.2)),
    ]


STRENGTHS: dict[str, Callable[[], list[iaa.Augmenter | AugmentationFunction]]] = {
    "none": list,
    "light": _light,
    "default": _default,
    "strong": _strong,
    "photo": _photo,
}
