"""Between the weights that fine-tuning starts from and those that it ends with: which average of them to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from finetune.data.groups import describe_groups, pick_groups
from finetune.evaluation.paired_comparison import (
    compare_scores,
    describe_choice,
    describe_errors,
    describe_rival,
    is_better,
)
from finetune.training.callbacks import Validation

# Of the way from the start to the end, which is validated anyway; 0.75 beside them was kept seldom, and gained nothing.
SHARES = (0.0, 0.25, 0.5)


class Kept(NamedTuple):
    """The model to keep.

    Attributes:
        share: of the way from the start (0) to the last epoch (1).
        is_refitted: its head stands as far on the way to the refitted one.
        weights: of the model.
        logs: its validation metrics, as `Validation` names them.
        aurocs: multi-label: of each class.
    """

    share: float
    is_refitted: bool
    weights: list[np.ndarray]
    logs: dict[str, float]
    aurocs: np.ndarray | None


def mix_weights(start: Sequence[np.ndarray], end: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """Returns the weights that stand at `share` of the way from `start` to `end`."""
    return [(1 - share) * one + share * other for one, other in zip(start, end, strict=True)]


def choose_weights(
    model: keras.Model,
    start: Sequence[np.ndarray],
    validation: Validation,
    logs: dict[str, float],
    refit: Callable[[], Any] | None = None,
) -> Kept:
    """Validates averages of the weights before and after fine-tuning, and chooses by the images' log loss.

    Where both lie in one basin an average is often better than either, above all on few photos like those that the
    backbone has learnt from. The batch normalisation's statistics are averaged too: recomputed from the training
    images, they cost 2 points of accuracy on 300 photos of flowers.

    The average of two heads belongs to no features, and one refitted to an average's features is too sure of itself,
    the more so where the network has learnt its photos by heart: where `refit` is given, the head of the weights at a
    share of the way is that share of the way from the one to the other, the last epoch's the fitted one. On 20 and 60
    photos of a class what was kept had 0.9 points more by heads that were all fitted, and on 20 flowers 0.4 on top.

    Source: Wortsman et al., CVPR 2022 (arXiv:2109.01903), section 4; Kumar et al., ICLR 2022 (arXiv:2202.10054).

    Args:
        model: has the last epoch's weights, and has them again in the end.
        start: the weights that training started from.
        validation: has just measured the last epoch's model.
        logs: the metrics that it found.
        refit: refits the model's head to the training images.

    Returns:
        The start, or of the averages, from the start on, the last one that is better than the one kept so far, by more
        than a quarter of the standard error of the paired difference. Why is printed.
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
    told, told_losses = (kept, losses) if kept.share else (best, lowest)
    print(describe_choice(told.share, told.is_refitted, kept.share > 0, *_compare(tried[0][1], told_losses, groups)))
    if kept.share not in (0, best.share):
        print(describe_rival(best.share, best.is_refitted, *_compare(losses, lowest, groups)[:2]))
    return kept


def _compare(losses: np.ndarray, others: np.ndarray, groups: np.ndarray | None) -> tuple[float, float, int]:
    """Returns by how much the others are lower on average, the standard error, and of how many images."""
    # An image may have become unreadable meanwhile.
    both = ~np.isnan(losses + others)
    return *compare_scores(-losses[both], -others[both], pick_groups(groups, both)), int(both.sum())


def _measure_averages(
    model: keras.Model,
    start: Sequence[np.ndarray],
    validation: Validation,
    refit: Callable[[], Any] | None,
) -> list[tuple[Kept, np.ndarray]]:
    """Validates the start's weights, first, and averages; returns each with the losses of the images."""
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
