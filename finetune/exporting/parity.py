"""Comparing an artefact with its original on the test set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from configs import Configs
from finetune.core.files import atomic_path, list_files
from finetune.core.values import get_input_size
from finetune.data.groups import count_groups
from finetune.evaluation.decision import Decision, find_decision_folder, read_decision
from finetune.evaluation.metrics import check_finite, to_indicators
from finetune.models.exported import ExportedModel
from finetune.models.formats import name_accepted
from finetune.models.model_files import load_fitting_model, load_model
from finetune.predicting.predicting import compile_predictor, load_predictor, predict
from finetune.predicting.prediction_files import describe_decision
from finetune.training.speeds import time_in_turns
from finetune.training.trained_model import name_model
from generator import AugmentedImageSequence, get_generator

SIDES = ("before", "after")
# Longest comparison of two speeds, in seconds.
TIMING_LIMIT = 20.0


class Subject(NamedTuple):
    """The original on its test set, for comparison with each artefact.

    Attributes:
        model: the original.
        sequence: the test images.
        probabilities: the original's, raw, `(images, classes)`.
        decision: turns them into answers.
    """

    model: keras.Model
    sequence: AugmentedImageSequence
    probabilities: np.ndarray
    decision: Decision


def load_subject(model_path: str, configs: Configs) -> tuple[keras.Model, Decision | None, Subject | None]:
    """Loads the model, reads its decision and predicts the test set if there is one.

    It is called before anything is written, so that an unreadable image stops the script first.
    """
    if configs.classes is None:
        print(f"Model: {model_path}")
        return load_model(model_path), None, None
    print(name_model(configs, model_path))
    model = load_fitting_model(model_path, configs.classes, get_input_size(configs))
    folder = find_decision_folder(model_path, configs.save_model_path)
    decision = read_decision(folder, configs.classes, configs.multi_label_classification, model_path)
    if decision.multi_label:
        # Without fitted thresholds, 0.5 is used.
        print(describe_decision(decision, "exact_match"))
    if not configs.test_csv:
        return model, decision, None
    sequence = get_generator(configs.test_csv, configs.classes, configs, training=False)
    return model, decision, Subject(model, sequence, predict(model, sequence), decision)


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
        The result of `compare`, with `images_per_second` of both.
    """
    model, sequence, before, decision = subject
    artefact = load_predictor(path, decision.class_names, sequence.image_size)
    after = predict(artefact, sequence, f"Verifying {os.path.basename(path)}")
    comparison = compare(sequence.get_y_true(), before, after, decision, sequence.get_read_groups())
    speeds = measure_speeds((model, artefact), sequence)
    return comparison | {"images_per_second": dict(zip(SIDES, speeds, strict=True))}


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
