"""Whether a compressed or exported model still answers the same as the original."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from configs import Configs
from finetune.core.files import atomic_path, list_files
from finetune.data.groups import count_groups
from finetune.evaluation.abstention import measure_answers
from finetune.evaluation.decision import Decision
from finetune.evaluation.metrics import check_finite, to_indicators
from finetune.evaluation.novelty import Reference
from finetune.models.exported import ExportedModel
from finetune.models.formats import name_accepted
from finetune.predicting.predicting import compile_predictor, load_predictor, predict, predict_outputs
from finetune.training.speeds import time_in_turns
from generator import AugmentedImageSequence, get_generator

SIDES = ("before", "after")
# Longest comparison of two speeds, in seconds.
TIMING_LIMIT = 20.0


class Original(NamedTuple):
    """The model to compress.

    Attributes:
        model: compressed weights are written of it.
        exported: exports are written of it: the model, or the same one with features.
        decision: turns its probabilities into answers; None if the classes are not known.
        reference: the training photos that images are compared with, or None.
    """

    model: keras.Model
    exported: keras.Model
    decision: Decision | None = None
    reference: Reference | None = None

    @property
    def has_features(self) -> bool:
        return self.exported is not self.model


class Results(NamedTuple):
    """What a model gives for the test images: raw probabilities `(images, classes)`, and similarities or None."""

    probabilities: np.ndarray
    similarities: np.ndarray | None = None


class Subject(NamedTuple):
    """The original on its test set, for comparison with each artefact."""

    original: Original
    sequence: AugmentedImageSequence
    results: Results


def predict_results(
    model: keras.Model | ExportedModel, sequence: AugmentedImageSequence, original: Original, title: str = "Predicting"
) -> Results:
    """Returns the results of the original or of an artefact; similarities only if the rule needs them."""
    if original.reference is None or not original.decision.calls_unknown:
        return Results(predict(model, sequence, title))
    probabilities, features = predict_outputs(model, sequence, title)
    if features is None:
        return Results(probabilities)
    return Results(probabilities, original.reference.find_neighbours(features).similarities.mean(axis=1))


def predict_original(original: Original, configs: Configs) -> Subject | None:
    """Predicts the test set if there is one.

    It is called before anything is written, so that an unreadable image stops the script first.
    """
    if original.decision is None or not configs.test_csv:
        return None
    sequence = get_generator(configs.test_csv, configs.classes, configs, training=False)
    return Subject(original, sequence, predict_results(original.model, sequence, original))


def judge(paths: Sequence[str], subject: Subject | None, tolerance: float) -> dict[str, Any]:
    """Compares an artefact with the original, and gives it its final name unless it loses too much accuracy.

    Returns:
        `path`, `files`, `rejected` and `comparison` of the report.
    """
    comparison = compare_artefact(paths[0], subject) if subject else None
    rejected = comparison is not None and comparison["accuracy_drop"] > tolerance
    if not rejected:
        paths = accept(paths)
    files = {file: os.path.getsize(file) for path in paths for file in list_files(path)}
    return {"path": paths[0], "files": files, "rejected": rejected, "comparison": comparison}


def accept(paths: Sequence[str]) -> tuple[str, ...]:
    """Gives files and folders their final names, without `.rejected`, and returns these."""
    accepted = tuple(map(name_accepted, paths))
    for path, name in zip(paths, accepted, strict=True):
        with atomic_path(name) as temporary:
            os.replace(path, temporary)
    return accepted


def compare_artefact(path: str, subject: Subject) -> dict[str, Any]:
    """Loads an artefact in its own runtime and runs it on the test set.

    Returns:
        The result of `compare`; with a rule that of `compare_answers`; and `images_per_second` of both.
    """
    original, sequence, before = subject
    decision = original.decision
    artefact = load_predictor(path, decision.class_names, sequence.image_size)
    after = predict_results(artefact, sequence, original, f"Verifying {os.path.basename(path)}")
    probabilities = before.probabilities, after.probabilities
    comparison = compare(sequence.get_y_true(), *probabilities, decision, sequence.get_read_groups())
    if decision.abstention is not None:
        comparison |= compare_answers(sequence.get_y_true(), before, after, decision)
    speeds = measure_speeds((original.model, artefact), sequence)
    return comparison | {"images_per_second": dict(zip(SIDES, speeds, strict=True))}


def compare_answers(y_true: np.ndarray, before: Results, after: Results, decision: Decision) -> dict[str, Any]:
    """Compares the answers of a model with a rule, and of its compressed form: labels, unsure or unknown.

    Returns:
        `changed_answers`, images with another answer; before and after: `unknown`, how many are unknown, `answered`,
        how many answers are given (several labels: labels), and `wrong`, how many of these are wrong; and
        `largest_similarity_difference`, if both give similarities.
    """
    answers = [
        decision.decide(decision.calibrate(probabilities), similarities)
        for probabilities, similarities in (before, after)
    ]
    kinds = [np.column_stack([one.labels, one.is_unknown, one.is_unsure]) for one in answers]
    found: dict[str, Any] = {"changed_answers": int((kinds[0] != kinds[1]).any(axis=1).sum())}
    measured = [measure_answers(one, y_true) for one in answers]
    for name in ("unknown", "answered", "wrong"):
        found[name] = dict(zip(SIDES, (one[name] for one in measured), strict=True))
    if before.similarities is None or after.similarities is None:
        return found
    return found | {"largest_similarity_difference": float(np.abs(before.similarities - after.similarities).max())}


def compare(
    y_true: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    decision: Decision,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compares the answers of a model and of its compressed form.

    Args:
        before: the original's raw probabilities, `(images, classes)`.
        after: those of the compressed model.

    Returns:
        `images`, and `groups` if there are fewer; `largest_difference` and `mean_difference` of the probabilities;
        `changed_predictions`, images with another answer; `measure`, the name of the metric; `accuracy`, before and
        after: the share of images with the right label, multi-label: with exactly the right labels; `accuracy_drop` in
        points, negative for a gain, and its 95 % confidence interval `accuracy_drop_interval`.

    Raises:
        UserError: a probability is not finite.
    """
    for probabilities in (before, after):
        check_finite(probabilities)
    differences = np.abs(before.astype(np.float64) - after)
    chosen = [decision.choose(decision.calibrate(probabilities)) for probabilities in (before, after)]
    truth = to_indicators(y_true, before.shape[1])
    is_right = [(labels == truth).all(axis=1) for labels in chosen]
    right = [int(images.sum()) for images in is_right]
    return {
        "images": len(y_true),
        **({} if groups is None else {"groups": count_groups(groups, len(groups))}),
        "largest_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        "changed_predictions": int((chosen[0] != chosen[1]).any(axis=1).sum()),
        "measure": "exact match" if decision.multi_label else "accuracy",
        "accuracy": dict(zip(SIDES, [count / len(y_true) for count in right], strict=True)),
        # From counts: a difference of two shares is rounded, and 1 point could become more than 1.
        "accuracy_drop": 100 * (right[0] - right[1]) / len(y_true),
        "accuracy_drop_interval": find_drop_interval(*is_right, groups),
    }


def find_drop_interval(before: np.ndarray, after: np.ndarray, groups: np.ndarray | None = None) -> list[float]:
    """Returns the 95 % confidence interval of the drop in accuracy on the same images, `[low, high]` in points.

    Half an image is added to each of the four outcomes of a pair, so that a few images without a difference do not seem
    to prove that there is none. With groups, the number of groups counts instead of the number of images.

    Source: Agresti and Min, Statistics in Medicine 24, 2005, section 3.

    Args:
        before: bool `(images,)`, whether the original is right.
        after: bool `(images,)`, whether the artefact is right.
    """
    units = count_groups(groups, len(before))
    lost, won = (one.sum() * units / len(before) + 0.5 for one in (before & ~after, after & ~before))
    number = units + 2
    difference = (lost - won) / number
    margin = 1.96 * np.sqrt(lost + won - (lost - won) ** 2 / number) / number
    return [float(100 * (difference - margin)), float(100 * (difference + margin))]


def measure_speeds(models: Sequence[keras.Model | ExportedModel], sequence: AugmentedImageSequence) -> list[float]:
    """Returns how many images of the first batch each model predicts per second, in the best of several runs."""
    images, predictors = sequence[0][0], [compile_predictor(model) for model in models]
    steps = [lambda predictor=predictor: np.asarray(predictor(images)) for predictor in predictors]
    for step in steps:
        # The first run compiles.
        step()
    return (len(images) / time_in_turns(steps, TIMING_LIMIT).min(axis=0)).tolist()
