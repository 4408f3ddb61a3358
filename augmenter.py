"""The random changes that training makes to its images, so that the model learns to ignore them.

To remove one, delete its line; to add one, add a line with any augmenter of imgaug that keeps an image's size
(https://imgaug.readthedocs.io/en/latest/source/overview_of_augmenters.html), or change a range.
"""

from __future__ import annotations

from imgaug import augmenters as iaa


def build_augmenter() -> iaa.Augmenter:
    """Builds the pipeline for uint8 RGB batches `(batch, height, width, 3)`; it keeps shape and type."""
    return iaa.Sequential(
        [
            iaa.Fliplr(0.5),
            # Rotation, scaling, shear and translation are one warp: four would blur the image four times.
            iaa.Affine(
                rotate=(-15, 15),
                scale=(0.9, 1.15),
                shear=(-6, 6),
                translate_percent={"x": (-0.08, 0.08), "y": (-0.08, 0.08)},
                order=1,
                mode="reflect",
            ),
            # Colour: each channel is made up to a tenth brighter or darker on its own.
            iaa.Multiply((0.9, 1.1), per_channel=0.5),
            iaa.LinearContrast((0.8, 1.25)),
        ]
    )
