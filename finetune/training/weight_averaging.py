"""Averaging the weights before and after fine-tuning (WiSE-FT), and choosing the average to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from finetune.data.groups import describe_groups, pick_groups
from finetune.evaluation.intervals import (
    compare_scores,
    describe_choice,
    describe_errors,
    describe_rival,
    is_better,
)
from finetune.training.callbacks import Validation

# The shares of the last epoch in the averages. A further share of 0.75 was rarely kept, and gained nothing.
SHARES = (0.0, 0.25, 0.5)


class Kept(NamedTuple):
    """The model to keep.

    Attributes:
        share: of the last epoch in the average; 0 is the start.
        is_refitted: whether its head is interpolated by the same factor towards the refitted head.
        weights: of the model.
        logs: its validation metrics, by the names of `Validation`.
        aurocs: multi-label: of each class.
    """

    share: float
    is_refitted: bool
    weights: list[np.ndarray]
    logs: dict[str, float]
    aurocs: np.ndarray | None


def mix_weights(start: Sequence[np.ndarray], end: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """Returns the weights interpolated from `start` (share 0) to `end` (share 1)."""
    return [(1 - share) * one + share * other for one, other in zip(start, end, strict=True)]


def choose_weights(
    model: keras.Model,
    start: Sequence[np.ndarray],
    validation: Validation,
    logs: dict[str, float],
    refit: Callable[[], Any] | None = None,
) -> Kept:
    """Validates averages of the weights before and after fine-tuning, and chooses one by its log loss.

    If both lie in one basin, an average is often better than either, especially with few images that resemble those of
    the pretraining. The statistics of batch normalisation are averaged too: recomputed from the training images, they
    cost 2 points of accuracy on 300 photos of flowers.

    An averaged head fits no features, and a head refitted to averaged features is overconfident, most of all if the
    network has memorised its images. With `refit`, an average therefore interpolates between both heads by its own
    share. With 20 and 60 photos a class, refitting gained 0.9 points, and the interpolation 0.4 more on 20 flowers.

    Source: Wortsman et al., CVPR 2022 (arXiv:2109.01903), section 4; Kumar et al., ICLR 2022 (arXiv:2202.10054).

    Args:
        model: has the last epoch's weights, before and after the call.
        start: the weights that training started from.
        validation: has just measured the last epoch's model.
        logs: the metrics of the last epoch.
        refit: refits the model's head to the training images.

    Returns:
        The model to keep: each average, beginning with the start, is replaced by a later one that is better by more
        than a quarter of the standard error of the paired difference. The reason is printed.
    """
    last = Kept(1.0, False, model.get_weights(), logs, validation.aurocs), validation.get_losses()
    tried = _measure_averages(model, start, validation, refit)
    if refit is None:
        tried.append(last)
    shown = "; ".join(f"{kept.share:.0%} {np.nanmean(losses):.4f}" for kept, losses in tried)
    head, groups = " with a refitted head" if refit else "", validation.get_groups()
    print(f"\nLog loss of the validation images, from the start (0%) to the last epoch{head} (100%): {shown}.")
    if groups is not None:
        print(f"The validation images lie{describe_groups(groups)}: {describe_errors(groups)}.")
    kept, losses = tried[0]
    for further, further_losses in tried[1:]:
        if is_better(*_compare(losses, further_losses, groups)[:2]):
            kept, losses = further, further_losses
    best, lowest = min(tried[1:], key=lambda one: np.nanmean(one[1]))
    chosen, chosen_losses = (kept, losses) if kept.share else (best, lowest)
    difference = _compare(tried[0][1], chosen_losses, groups)
    print(describe_choice(chosen.share, chosen.is_refitted, kept.share > 0, *difference))
    if kept.share not in (0, best.share):
        print(describe_rival(best.share, best.is_refitted, *_compare(losses, lowest, groups)[:2]))
    return kept


def _compare(losses: np.ndarray, others: np.ndarray, groups: np.ndarray | None) -> tuple[float, float, int]:
    """Returns how much lower the others are on average, the standard error, and the number of images."""
    # An image may have become unreadable in between.
    both = ~np.isnan(losses + others)
    return *compare_scores(-losses[both], -others[both], pick_groups(groups, both)), int(both.sum())


def _measure_averages(
    model: keras.Model, start: Sequence[np.ndarray], validation: Validation, refit: Callable[[], Any] | None
) -> list[tuple[Kept, np.ndarray]]:
    """Validates the start and the averages; returns each with the losses of the images."""
    end, measured = model.get_weights(), []
    for share in SHARES if refit is None else (*SHARES, 1.0):
        mixed = mix_weights(start, end, share)
        model.set_weights(mixed)
        if is_refitted := refit is not None and share > 0:
            refit()
            model.set_weights(mix_weights(mixed, model.get_weights(), share))
        logs: dict[str, float] = {}
        validation.on_epoch_end(-1, logs)
        kept = Kept(share, is_refitted, model.get_weights(), logs, validation.aurocs)
        measured.append((kept, validation.get_losses()))
    model.set_weights(end)
    return measured
