"""Whether a batch of images is like the validation images: a test of how many are unknown or unsure."""

from __future__ import annotations

from typing import NamedTuple

from scipy import stats

from finetune.core.texts import show_count
from finetune.evaluation.abstention import UNKNOWN, UNSURE, Abstention

# Of fewer images, a test says little.
FEWEST_IMAGES = 30
# Share of batches like the validation images for which it speaks, over both tests.
FALSE_ALARMS = 0.01


class Excess(NamedTuple):
    """Significantly more images without an answer than in the validation set.

    Attributes:
        kind: `unknown` or `unsure`.
        number: of these images in the batch.
        images: of the batch.
        expected: the share of the validation images.
        chance: of so many in a batch like the validation images.
    """

    kind: str
    number: int
    images: int
    expected: float
    chance: float


def find_excess(rule: Abstention, unknown: int, unsure: int, images: int) -> list[Excess]:
    """Tests whether a batch has more unknown or unsure images than the validation set.

    Unknown images are counted against a threshold that is an order statistic of the validation images: the number in
    another batch has a beta-binomial distribution. Unsure images are compared by Fisher's exact test.

    Args:
        rule: with the numbers of the validation set.
        unknown: number of unknown images in the batch.
        unsure: number of unsure images in the batch.
        images: of the batch, without unreadable ones.
    """
    if images < FEWEST_IMAGES or not rule.images:
        return []
    chances = {UNKNOWN: 1.0, UNSURE: 1.0}
    if rule.unknown_threshold is not None:
        below = rule.unknown + 1
        chances[UNKNOWN] = float(stats.betabinom.sf(unknown - 1, images, below, max(rule.images - rule.unknown, 1)))
    if rule.thresholds is not None:
        total = images + rule.images
        chances[UNSURE] = float(stats.hypergeom.sf(unsure - 1, total, unsure + rule.unsure, images))
    numbers = {UNKNOWN: (unknown, rule.unknown), UNSURE: (unsure, rule.unsure)}
    return [
        Excess(kind, numbers[kind][0], images, numbers[kind][1] / rule.images, chance)
        for kind, chance in chances.items()
        if chance <= FALSE_ALARMS / len(chances)
    ]


def describe_excess(excess: Excess, promises: bool) -> str:
    """Returns the warning about an excess; with a promise, that it does not cover these images."""
    return (
        f"Warning: {excess.number} of {show_count(excess.images, 'image')} are {excess.kind}, "
        f"{excess.number / excess.images:.1%} instead of {excess.expected:.1%} in the validation set: these images "
        "differ from those that the model was validated on." + " The promised error does not cover them." * promises
    )
