"""Changes of colour that imgaug has not, or slower ones only."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from imgaug import parameters
from imgaug.augmenters import meta

# Of red, green and blue in brightness. Source: ITU-R BT.601.
BRIGHTNESS = np.array([0.299, 0.587, 0.114])


class Saturation(meta.Augmenter):
    """Moves each pixel away from the grey of its brightness, or towards it, by a factor drawn for each image.

    imgaug's own goes through HSV, which takes ten times as long.

    Args:
        factor: 0 gives grey, 1 the image itself; a number, or a pair to draw between.
        seed: of the random numbers.
        name: of the augmenter.
    """

    def __init__(self, factor: float | tuple[float, float], seed: int | None = None, name: str | None = None) -> None:
        super().__init__(seed=seed, name=name)
        self.factor = parameters.handle_continuous_param(factor, "factor", value_range=(0, None))

    def _augment_batch_(self, batch: Any, random_state: Any, parents: Any, hooks: Any) -> Any:
        factors = self.factor.draw_samples((len(batch.images),), random_state=random_state)
        for position, (image, factor) in enumerate(zip(batch.images, factors, strict=True)):
            matrix = factor * np.eye(3) + (1 - factor) * BRIGHTNESS
            batch.images[position] = cv2.transform(image, matrix)
        return batch

    def get_parameters(self) -> list[Any]:
        """Returns the factor."""
        return [self.factor]
