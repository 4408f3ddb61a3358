"""Between the weights that fine-tuning starts from and those that it ends with: which average of them to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np

from finetune.callbacks import Validation
from finetune.selection import compare_scores, describe_choice, is_clearly_better

# Of the way from the start to the end.
SHARES = (0.25, 0.5, 0.75)


class Kept(NamedTuple):
    """The model to keep.

    Attributes:
        share: of the way from the start (0) to the last epoch (1).
        weights: of the classifier.
        logs: its validation figures, as `Validation` names them.
        aurocs: multi-label: of each class.
    """

    share: float
    weights: list[np.ndarray]
    logs: dict[str, float]
    aurocs: np.ndarray | None


def mix_weights(start: Sequence[np.ndarray], end: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """Returns the weights that stand at `share` of the way from `start` to `end`."""
    return [(1 - share) * one + share * other for one, other in zip(start, end, strict=True)]


def choose_weights(
    classifier: keras.Model,
    start: Sequence[np.ndarray],
    start_losses: Sequence[float],
    validation: Validation,
    logs: dict[str, float],
) -> Kept | None:
    """Validates averages of the weights before and after fine-tuning, and chooses by the images' log loss.

    Where both lie in one basin an average is often better than either, above all on few photos like those that the
    backbone has learnt from. The batch normalisation's statistics are averaged too: taken anew from the training
    images, they cost 2 points of accuracy on 300 photos of flowers.

    Source: Wortsman et al., CVPR 2022 (arXiv:2109.01903), section 4.

    Args:
        classifier: has the last epoch's weights, and has them again in the end.
        start: the weights that training started from.
        start_losses: those of the validation images with these, as `get_log_losses` gives them.
        validation: has just measured the last epoch's model.
        logs: the figures that it found.

    Returns:
        The best one, where it is better than the start by more than a standard error of the paired difference; None
        where the start is to be kept. Why is printed.
    """
    end = classifier.get_weights()
    best, best_losses = Kept(1.0, end, logs, validation.aurocs), validation.get_losses()
    means = {0.0: np.mean(start_losses), 1.0: best_losses.mean()}
    for share in SHARES:
        classifier.set_weights(mix_weights(start, end, share))
        logs = {}
        validation.on_epoch_end(-1, logs)
        losses = validation.get_losses()
        means[share] = losses.mean()
        if means[share] < best_losses.mean():
            best, best_losses = Kept(share, classifier.get_weights(), logs, validation.aurocs), losses
    classifier.set_weights(end)
    shown = "; ".join(f"{share:.0%} {means[share]:.4f}" for share in sorted(means))
    print(f"\nLog loss of the validation images, from the start's weights (0%) to the last epoch's (100%): {shown}.")
    gain, error = compare_scores(-np.asarray(start_losses), -best_losses)
    print(describe_choice(best.share, gain, error, len(best_losses)))
    return best if is_clearly_better(gain, error) else None
