"""The rule by which a model does not answer: unsure below a promised error rate, unknown if unlike the training photos.

Selective classification: of the answered photos, the share of wrong answers (the risk) is promised to be at most
`max_error`; the share of photos that are answered is the coverage.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from finetune.evaluation.novelty import get_certainty

UNSURE, UNKNOWN = "unsure", "unknown"
# With this probability the promise holds, over the draw of the validation photos.
ASSURANCE = 0.95
METHOD = "fixed-sequence test of Clopper-Pearson bounds"


@dataclasses.dataclass(frozen=True)
class Abstention:
    """When a model does not answer.

    Attributes:
        max_error: the promised share of wrong answers among the answered photos; 0 promises nothing and answers all.
        thresholds: the lowest certainty, a probability, at which a photo is answered; multi-label one per class, at
            which it gets the label. None in it: nothing can be promised, so none is answered. None: none is fitted.
        unknown_rate: the share of validation photos below `unknown_threshold`; 0 calls no photo unknown.
        unknown_threshold: the lowest familiarity of a known photo; None without a reference.
        scales: mean and standard deviation of the validation photos' certainty, then of their similarity.
        images: validation photos that it was fitted on, or their groups.
    """

    max_error: float = 0.0
    thresholds: list[float | None] | None = None
    unknown_rate: float = 0.0
    unknown_threshold: float | None = None
    scales: list[float] | None = None
    images: int = 0

    def measure_familiarity(self, calibrated: np.ndarray, similarities: np.ndarray, multi_label: bool) -> np.ndarray:
        """Returns how familiar images look, float64 `(images,)`: the standardised sum of certainty and similarity."""
        centre, spread, other_centre, other_spread = self.scales
        certainty = (get_certainty(calibrated, multi_label) - centre) / spread
        return certainty + (similarities - other_centre) / other_spread
