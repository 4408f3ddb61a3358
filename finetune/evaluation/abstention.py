"""The rule by which a model does not answer: unsure below a promised error rate, unknown if unlike the training photos.

Selective classification: of the answered photos, the share of wrong answers (the risk) is promised to be at most
`max_error`; the share of photos that are answered is the coverage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from scipy import stats

from finetune.core.values import convert
from finetune.data.groups import pick_groups
from finetune.evaluation.novelty import get_certainty
from finetune.evaluation.promise import ASSURANCE, METHOD, Promise, choose_threshold

UNSURE, UNKNOWN = "unsure", "unknown"
# The promises that test.py shows what they would cost, even without `max_error`.
SHOWN_ERRORS = (0.01, 0.02, 0.05, 0.1)


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
        images: validation photos that it was fitted on.
        unknown: how many of them are unknown.
        unsure: how many of them are unsure.
    """

    max_error: float = 0.0
    thresholds: list[float | None] | None = None
    unknown_rate: float = 0.0
    unknown_threshold: float | None = None
    scales: list[float] | None = None
    images: int = 0
    unknown: int = 0
    unsure: int = 0

    @classmethod
    def names(cls) -> list[str]:
        """Returns the names of the fields."""
        return [field.name for field in dataclasses.fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `decision.json`, with what the rule promises and how it was found."""
        return {**dataclasses.asdict(self), "fitted_on": "validation", "assurance": ASSURANCE, "method": METHOD}

    @classmethod
    def of(cls, stored: Any, number: int) -> Self | None:
        """Returns the rule that `to_dict` wrote, None for None.

        Args:
            number: of thresholds that it may have.

        Raises:
            ValueError: the content is no rule.
        """
        if stored is None:
            return None
        if not isinstance(stored, dict) or not {*cls.names()} <= stored.keys():
            raise ValueError(stored)
        rule = cls(
            convert(stored["max_error"], float, is_text=False),
            _read_numbers(stored["thresholds"], (number,)),
            convert(stored["unknown_rate"], float, is_text=False),
            *(_read_numbers([stored["unknown_threshold"]], (1,)) or [None]),
            _read_numbers(stored["scales"], (4,)),
            *(convert(stored[name], int, is_text=False) for name in ("images", "unknown", "unsure")),
        )
        counts = rule.unknown >= 0 and rule.unsure >= 0 and rule.unknown + rule.unsure <= rule.images
        if not (0 <= rule.max_error < 1 and 0 <= rule.unknown_rate < 1 and counts):
            raise ValueError(stored)
        is_whole = rule.scales and None not in rule.scales and min(rule.scales[1], rule.scales[3]) > 0
        if rule.unknown_threshold is not None and not is_whole:
            raise ValueError(stored)
        return rule

    def measure_familiarity(self, calibrated: np.ndarray, similarities: np.ndarray, multi_label: bool) -> np.ndarray:
        """Returns how familiar images look, float64 `(images,)`: the standardised sum of certainty and similarity."""
        centre, spread, other_centre, other_spread = self.scales
        certainty = (get_certainty(calibrated, multi_label) - centre) / spread
        return certainty + (similarities - other_centre) / other_spread


class Outcomes(NamedTuple):
    """Whether a model answers images.

    Attributes:
        is_unknown: bool `(images,)`; all False without similarities.
        is_unsure: bool `(images,)`; False for unknown images.
        labels: the answered labels, bool `(images, classes)`; none for unknown and unsure images.
        familiarity: float64 `(images,)`, NaN without similarities.
    """

    is_unknown: np.ndarray
    is_unsure: np.ndarray
    labels: np.ndarray
    familiarity: np.ndarray

    @property
    def is_answered(self) -> np.ndarray:
        return ~(self.is_unknown | self.is_unsure)


def decide(
    abstention: Abstention | None,
    multi_label: bool,
    calibrated: np.ndarray,
    chosen: np.ndarray,
    similarities: np.ndarray | None = None,
) -> Outcomes:
    """Decides which images a model answers, and with which labels.

    Args:
        abstention: the rule; None answers every image.
        multi_label: whether an image may have several labels.
        calibrated: probabilities, float32 `(images, classes)`.
        chosen: the labels without the rule, bool `(images, classes)`.
        similarities: to the training photos, `(images,)`, NaN if unknown; None without a reference.
    """
    number = len(calibrated)
    nothing = np.zeros(number, bool)
    if abstention is None:
        return Outcomes(nothing, nothing, chosen, np.full(number, np.nan))
    familiarity, is_unknown = np.full(number, np.nan), nothing
    if abstention.unknown_threshold is not None and similarities is not None:
        familiarity = abstention.measure_familiarity(calibrated, similarities, multi_label)
        is_unknown = familiarity < abstention.unknown_threshold
    labels = chosen
    if abstention.thresholds is not None:
        # 2 is above every probability.
        lowest = np.array([2 if one is None else one for one in abstention.thresholds], np.float32)
        labels = chosen & (np.asarray(calibrated, np.float32) >= lowest)
    # Multi-label, an image without any label is answered: it has none.
    is_unsure = chosen.any(axis=1) & ~labels.any(axis=1) & ~is_unknown
    return Outcomes(is_unknown, is_unsure, labels & ~is_unknown[:, None], familiarity)


def _read_numbers(values: Any, numbers: Sequence[int]) -> list[float | None] | None:
    """Returns a JSON list of so many finite numbers and nulls, or None for null; raises ValueError."""
    if values is None:
        return None
    if not isinstance(values, list) or len(values) not in numbers:
        raise ValueError(values)
    found = [None if value is None else convert(value, float, is_text=False) for value in values]
    if not all(value is None or np.isfinite(value) for value in found):
        raise ValueError(values)
    return found


class Wishes(NamedTuple):
    """What a user wants: the options `max_error` and `unknown_rate`."""

    max_error: float
    unknown_rate: float


class Evidence(NamedTuple):
    """Labelled photos that a rule is fitted on or tested on.

    Attributes:
        y_true: int `(images,)`, or multi-label `(images, classes)` of zeros and ones.
        calibrated: probabilities, float32 `(images, classes)`.
        chosen: the labels without the rule, bool `(images, classes)`.
        similarities: to the training photos, `(images,)`; None without a reference.
        groups: of the images, from `number_groups`; None if they are independent.
    """

    y_true: np.ndarray
    calibrated: np.ndarray
    chosen: np.ndarray
    similarities: np.ndarray | None = None
    groups: np.ndarray | None = None

    @property
    def multi_label(self) -> bool:
        return self.y_true.ndim == 2


def fit_abstention(evidence: Evidence, wishes: Wishes) -> Abstention:
    """Fits the rule: first the threshold of unknown photos, then on the known ones those of the promise."""
    rule = Abstention(unknown_rate=wishes.unknown_rate, images=len(evidence.calibrated))
    known = np.ones(len(evidence.calibrated), bool)
    if evidence.similarities is not None:
        certainty = get_certainty(evidence.calibrated, evidence.multi_label)
        scales = [
            number for values in (certainty, evidence.similarities) for number in (values.mean(), values.std() or 1.0)
        ]
        rule = dataclasses.replace(rule, scales=[*map(float, scales)])
        if wishes.unknown_rate:
            familiarity = rule.measure_familiarity(evidence.calibrated, evidence.similarities, evidence.multi_label)
            threshold = float(np.quantile(familiarity, wishes.unknown_rate, method="lower"))
            known = familiarity >= threshold
            rule = dataclasses.replace(rule, unknown_threshold=threshold, unknown=int((~known).sum()))
    if not wishes.max_error:
        return rule
    thresholds = [promise.threshold for promise in list_question_promises(evidence, known, wishes.max_error)]
    rule = dataclasses.replace(rule, max_error=wishes.max_error, thresholds=thresholds)
    return dataclasses.replace(rule, unsure=int(answer_evidence(rule, evidence).is_unsure.sum()))


def list_question_promises(evidence: Evidence, known: np.ndarray, max_error: float) -> list[Promise]:
    """Returns what can be promised about each question of `list_questions`, on the `known` images."""
    found = []
    for scores, wrong, given in list_questions(evidence):
        used = known & given
        found.append(choose_threshold(scores[used], wrong[used], max_error, groups=pick_groups(evidence.groups, used)))
    return found


def list_questions(evidence: Evidence) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns certainty, whether the answer is wrong, and whether one is given, `(images,)` each.

    Single-label, there is one question, the class; multi-label one a label, answered if it is given.
    """
    truth, calibrated, chosen = evidence.y_true, evidence.calibrated, evidence.chosen
    if not evidence.multi_label:
        wrong = calibrated.argmax(axis=1) != truth
        return [(calibrated.max(axis=1), wrong, np.ones(len(truth), bool))]
    columns = zip(calibrated.T, truth.T.astype(bool), chosen.T, strict=True)
    return [(scores, ~labels, given) for scores, labels, given in columns]


def measure_answers(outcomes: Outcomes, y_true: np.ndarray) -> dict[str, Any]:
    """Measures what a rule does on labelled images.

    Args:
        outcomes: from `decide`.
        y_true: int `(images,)`, or multi-label `(images, classes)` of zeros and ones.

    Returns:
        `images`; `unknown` and `unsure`, numbers of images; `coverage`, the share answered; `answered`, single-label
        the number of answered images, multi-label of given labels; `wrong`, how many of these are wrong; `error` and
        `error_interval`, its exact 95 % interval (Clopper and Pearson, 1934), None if nothing is answered.
    """
    truth = y_true.astype(bool) if y_true.ndim == 2 else np.arange(outcomes.labels.shape[1]) == y_true[:, None]
    answered, wrong = int(outcomes.labels.sum()), int((outcomes.labels & ~truth).sum())
    interval = list(stats.binomtest(wrong, answered).proportion_ci(method="exact")) if answered else None
    return {
        "images": len(truth),
        "unknown": int(outcomes.is_unknown.sum()),
        "unsure": int(outcomes.is_unsure.sum()),
        "coverage": float(outcomes.is_answered.mean()),
        "answered": answered,
        "wrong": wrong,
        "error": wrong / answered if answered else None,
        "error_interval": interval,
    }


def list_promises(fitted_on: Evidence, tested_on: Evidence, unknown_rate: float) -> list[dict[str, Any]]:
    """Returns what each promise of `SHOWN_ERRORS` would give: `promised`, and `measure_answers` of the test set.

    Args:
        fitted_on: the validation photos.
        tested_on: the test photos.
        unknown_rate: as the option.
    """
    rows = []
    for promised in SHOWN_ERRORS:
        rule = fit_abstention(fitted_on, Wishes(promised, unknown_rate))
        rows.append({"promised": promised, **measure_answers(answer_evidence(rule, tested_on), tested_on.y_true)})
    return rows


def answer_evidence(rule: Abstention | None, evidence: Evidence) -> Outcomes:
    """Returns what a rule answers on labelled images."""
    return decide(rule, evidence.multi_label, evidence.calibrated, evidence.chosen, evidence.similarities)


def trace_risk(evidence: Evidence) -> dict[str, list[float]]:
    """Returns the risk-coverage curve of labelled images: for each number of answers, the surest first.

    Source: El-Yaniv and Wiener, JMLR 2010, section 2. Multi-label, an answer is a given label.

    Returns:
        `coverage`, the share of all answers, and `error`, the share of wrong ones among these.
    """
    scores, wrong, given = (np.concatenate(part) for part in zip(*list_questions(evidence), strict=True))
    order = np.argsort(-scores[given], kind="stable")
    numbers = np.arange(1, len(order) + 1)
    errors = np.cumsum(wrong[given][order]) / numbers
    # Equal scores are answered together.
    last = np.append(np.diff(scores[given][order]) != 0, True) if len(order) else np.zeros(0, bool)
    coverage = numbers / max(len(order), 1)
    return {"coverage": coverage[last].tolist(), "error": errors[last].tolist()}


def describe_shortage(evidence: Evidence, rule: Abstention) -> str:
    """Returns why a rule answers nothing: the smallest promise that the images allow, and how many images it needs."""
    known = ~answer_evidence(rule, evidence).is_unknown
    promises = list_question_promises(evidence, known, rule.max_error)
    best = max(promises, key=lambda promise: promise.units)
    if best.smallest > rule.max_error:
        needed = math.ceil(math.log(1 - ASSURANCE) / math.log1p(-rule.max_error))
        return (
            f"{best.units:.0f} independent validation images can promise an error of {best.smallest:.1%} at best, if "
            f"none of the answers is wrong. Give at least {max(needed, best.needed or 0)}, or allow a larger error."
        )
    if best.needed is None:
        return "even the surest answers are wrong too often. Train a better model, or allow a larger error."
    return (
        f"{best.units:.0f} independent validation images are too few for a model of these errors: about {best.needed} "
        "are needed. Give more, train a better model, or allow a larger error."
    )
