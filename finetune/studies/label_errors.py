"""Which labels are probably wrong: probabilities by those who have not learnt from an image, judged by cleanlab."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from configs import Configs
from finetune.core.devices import set_seed
from finetune.core.options import UserError
from finetune.core.texts import join_names
from finetune.core.values import get_input_size
from finetune.data.data_check import check_images
from finetune.data.groups import (
    count_groups_of_classes,
    describe_groups,
    is_single_group,
    read_groups,
    refuse_lone_classes,
)
from finetune.data.pixel_range import resolve_pixel_range, tell_assumed_range, tell_unfit_range
from finetune.data.stores import join_path
from finetune.data.tables import IMAGE_COLUMN, LABEL_SEPARATOR, read_table, resolve_class_names
from finetune.evaluation.decision_file import read_decision
from finetune.models.heads import has_parts
from finetune.models.model_files import has_views, load_fitting_model, strip_views
from finetune.studies.label_scores import (
    Estimate,
    count_errors,
    rank_suspects,
)
from finetune.training.feature_store import get_features
from finetune.training.probe import cross_validate, split_head
from finetune.training.run_data import IMAGES_FILE, READING_OPTIONS, find_trained_images
from finetune.training.trained_model import find_trained_model, name_model
from generator import get_generator, tell_bad_images
from model import ModelFactory

NEIGHBOURS = 3
# A regression learns little of a class from fewer images.
FEW = 5
# Rows whose similarities to all images are in memory at a time.
CHUNK = 64


class Judge(NamedTuple):
    """What answers for the images: a backbone whose features a regression is fitted to, or a run's trained model.

    Attributes:
        model: as it was built or loaded.
        path: of the run's model; empty for a regression.
    """

    model: keras.Model
    path: str


class Evidence(NamedTuple):
    """Images that can be judged, in the order of the table.

    Attributes:
        rows: int `(images,)`, line numbers in the table.
        names: paths as the table has them.
        files: the files that these mean.
        texts: the labels as the table has them.
        labels: as `encode_labels` gives them.
        features: float32 `(images, channels)`.
        probabilities: `(images, classes)`, of images that the judge has not learnt from.
        groups: as `number_groups` gives them.
    """

    rows: np.ndarray
    names: list[str]
    files: list[str]
    texts: list[str]
    labels: np.ndarray
    features: np.ndarray
    probabilities: np.ndarray
    groups: np.ndarray | None = None


def get_judge(configs: Configs, csv_path: str) -> tuple[Judge, Configs]:
    """Builds the backbone that the configs describe or, where `load_model_path` is given, loads that run's model.

    Returns:
        The judge, and the configs with `classes`: of the table, or of the run.

    Raises:
        UserError: there is no such model, or the table is not usable.
    """
    if configs.load_model_path:
        path, configs = find_trained_model(configs, READING_OPTIONS)
        model = load_fitting_model(path, configs.classes, get_input_size(configs))
        if not has_parts(strip_views(model)):
            raise UserError(f"{path} has no parts 'backbone' and 'classifier'. Name a model that train.py has written.")
        refuse_one_label(configs.classes, csv_path)
        print(name_model(configs, path))
        return Judge(model, path), configs.replace(train_csv=csv_path)
    configs = resolve_pixel_range(configs, [csv_path])
    class_names = resolve_class_names(
        configs.classes, csv_path, configs.csv_label_column, configs.multi_label_classification
    )
    refuse_one_label(class_names, csv_path)
    configs = configs.replace(train_csv=csv_path, classes=class_names)
    set_seed(configs.random_seed)
    return Judge(ModelFactory().get_model(configs), ""), configs


def refuse_one_label(class_names: Sequence[str], csv_path: str) -> None:
    """Raises UserError if there is one label, which every image has then."""
    if len(class_names) == 1:
        raise UserError(
            f"{csv_path}: every image has the only label, {class_names[0]}. Expected at least two to judge."
        )


def refuse_labels_of_all(labels: np.ndarray, class_names: Sequence[str], csv_path: str) -> None:
    """Raises UserError if every image has every label, so that no other image shows what it is to lack one."""
    if labels.ndim == 2 and labels.all():
        raise UserError(
            f"{csv_path}: every image has the same labels, {LABEL_SEPARATOR.join(class_names)}. Expected images that "
            "lack one of them, or a run that knows such images: name it by load_model_path."
        )


def gather_evidence(judge: Judge, configs: Configs, csv_path: str) -> Evidence:
    """Reads the images of a table and answers for each by what has not learnt from it.

    Images that cannot be read are left out under `skip_bad_images`, and with a run's model those that it was trained
    on, and all of their groups; either number is printed.

    Raises:
        UserError: the table or an image is not usable, or no image is left.
    """
    table = read_table(csv_path, configs.csv_label_column, configs.multi_label_classification)
    names, texts = table[IMAGE_COLUMN].tolist(), table[configs.csv_label_column].tolist()
    files = [join_path(configs.image_directory, name) for name in names]
    left_out = {
        *check_images(files, csv_path, configs.max_image_pixels, configs.generator_workers, configs.skip_bad_images)
    }
    tell_assumed_range(csv_path, files, configs.pixel_range)
    if judge.path:
        tell_unfit_range(csv_path, files, configs.pixel_range)
        groups = read_groups(table, configs.csv_label_column)
        left_out |= find_learnt_rows(judge.path, csv_path, files, left_out, groups)
    sequence = get_generator(csv_path, configs.classes, configs, training=False, bad_rows=left_out)
    if not judge.path:
        refuse_labels_of_all(sequence.labels, configs.classes, csv_path)
        refuse_lone_classes(sequence.labels, sequence.get_groups(), len(configs.classes), csv_path)
    rows = np.setdiff1d(np.arange(2, len(names) + 2), np.array(sorted(left_out), int))
    model = strip_views(judge.model)
    features, is_read = get_features(model, sequence, configs.image_cache_path)
    tell_bad_images(sequence)
    if not is_read.any():
        raise UserError(f"{csv_path}: none of the {len(rows)} images can be read. Check image_directory.")
    labels, groups = sequence.labels[is_read], sequence.get_groups(is_read)
    if not is_read.all():
        features, rows = features[is_read], rows[is_read]
    if not np.isfinite(features).all():
        raise UserError("The backbone's features are not finite: its weights are damaged. Name another model.")
    if judge.path:
        mirrored = None
        if has_views(judge.model):
            mirrored = get_features(model, sequence, configs.image_cache_path, mirrored=True)[0][is_read]
        probabilities = answer(judge, features, mirrored, configs)
    else:
        probabilities = answer_out_of_fold(
            features, labels, configs.multi_label_classification, configs.classes, configs.random_seed or 0, groups
        )
    names, files, texts = ([values[row - 2] for row in rows] for values in (names, files, texts))
    return Evidence(rows, names, files, texts, labels, features, probabilities, groups)


def find_learnt_rows(
    model_path: str, csv_path: str, files: Sequence[str], bad_rows: set[int], groups: np.ndarray | None
) -> set[int]:
    """Returns the line numbers of the images that a run was trained on, and of their groups; prints their number.

    Raises:
        UserError: no other image is left.
    """
    folder = os.path.dirname(os.path.abspath(model_path))
    usable = {row: file for row, file in enumerate(files, start=2) if row not in bad_rows}
    found = find_trained_images(folder, list(usable.values()), ["training"])
    if found is None:
        print(
            f"Warning: the run has no {IMAGES_FILE}: which images it was trained on, whose labels it believes, is not "
            "known."
        )
        return set()
    learnt, what = {row for row, file in usable.items() if file in found}, ""
    if groups is not None:
        known = {groups[row - 2] for row in learnt}
        of_groups = {row for row in usable if groups[row - 2] in known} - learnt
        what = f" or on others of their groups ({len(of_groups)})" * bool(of_groups)
        learnt |= of_groups
    if len(learnt) == len(usable):
        raise UserError(
            f"{csv_path}: the model was trained on all {len(usable)} images{what}, and believes their labels. Leave "
            "out load_model_path to judge them."
        )
    if learnt:
        print(f"Left out {len(learnt)} of {len(usable)} images, which the model was trained on{what}.")
    return learnt


def answer(judge: Judge, features: np.ndarray, mirrored: np.ndarray | None, configs: Configs) -> np.ndarray:
    """Returns a run's calibrated probabilities of images, `(images, classes)`, by their features."""
    head = split_head(strip_views(judge.model))
    views = [features] if mirrored is None else [features, mirrored]
    probabilities = np.mean([head.predict(view, batch_size=1024, verbose=0) for view in views], axis=0)
    folder = os.path.dirname(os.path.abspath(judge.path))
    return read_decision(folder, configs.classes, configs.multi_label_classification, judge.path).calibrate(
        probabilities
    )


def answer_out_of_fold(
    features: np.ndarray,
    labels: np.ndarray,
    multi_label: bool,
    class_names: Sequence[str],
    seed: int,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Returns what a regression on the other images says of each one, `(images, classes)`.

    It is fitted twice, the second time without the images whose labels the first answers say are wrong, since these
    spoil the answers for others; the result is the mean. Of images in groups, neither has seen the image's own group.
    The only image of a class, or its only group, has no other one to be known by: its label is taken as right, which is
    printed.
    """
    one_hot = labels if multi_label else np.eye(len(class_names), dtype=np.uint8)[labels]
    lone = _tell_lone_labels(one_hot, class_names, groups)
    first = cross_validate([features], labels, len(class_names), seed, groups=groups)
    if groups is not None:
        # Else the second fit would know nothing of a class whose group is large.
        _trust_labels(first, one_hot, lone, multi_label)
    wrong = rank_suspects(labels, first, multi_label)[0][: count_errors(labels, first, multi_label)]
    probabilities = first
    # Where most labels seem wrong, nothing is known of which.
    if 0 < len(wrong) < len(labels) // 2:
        second = cross_validate([features], labels, len(class_names), seed + 1, wrong, groups)
        probabilities = (first + second) / 2
    _trust_labels(probabilities, one_hot, lone, multi_label)
    return probabilities


def _trust_labels(probabilities: np.ndarray, one_hot: np.ndarray, classes: np.ndarray, multi_label: bool) -> None:
    """Makes the labels of some classes certain."""
    for position in classes:
        rows = np.flatnonzero(one_hot[:, position])
        if not multi_label:
            probabilities[rows] = 0
        probabilities[rows, position] = 1


def _tell_lone_labels(one_hot: np.ndarray, class_names: Sequence[str], groups: np.ndarray | None) -> np.ndarray:
    """Prints which classes lie in one image or group, or in few; returns those in one."""
    counts = one_hot.sum(axis=0)
    units = counts if groups is None else count_groups_of_classes(one_hot, groups, len(class_names))
    for other, places in {"image": counts == 1, "group of images": (units == 1) & (counts > 1)}.items():
        if places.any():
            shown = join_names([class_names[place] for place in np.flatnonzero(places)])
            print(f"Not judged, as no other {other} has the label: {shown}")
    what = "images" if groups is None else "groups of images"
    if few := [f"{class_names[place]} ({units[place]})" for place in np.flatnonzero((units > 1) & (units < FEW))]:
        print(f"Hardly judged, as fewer than {FEW} {what} have the label: {join_names(few)}")
    return np.flatnonzero(units == 1)


def name_labels(labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Returns labels as a table has them, several joined by `$`."""
    if labels.ndim == 1:
        return [class_names[position] for position in labels]
    return [LABEL_SEPARATOR.join(class_names[position] for position in np.flatnonzero(row)) for row in labels]


def list_suspects(evidence: Evidence, class_names: Sequence[str], most: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Lists the labels that are probably wrong, the most doubtful first.

    Args:
        evidence: the images.
        class_names: in the order of the probabilities.
        most: how many to list.

    Returns:
        A table of `row`, the line number; `path`, `given_label`, `likely_label`; `confidence` that the given label is
        wrong, in `[0, 1]`, one minus cleanlab's quality of the label; and `rank`, from 1 on. And the suspects'
        positions among the images.
    """
    multi_label = evidence.labels.ndim == 2
    suspects, qualities, likely = rank_suspects(evidence.labels, evidence.probabilities, multi_label)
    suspects = suspects[:most]
    columns = {
        "row": evidence.rows[suspects],
        IMAGE_COLUMN: [evidence.names[position] for position in suspects],
        "given_label": [evidence.texts[position] for position in suspects],
        "likely_label": name_labels(likely[suspects], class_names),
        "confidence": np.round(1 - qualities[suspects], 4),
        "rank": np.arange(1, len(suspects) + 1),
    }
    return pd.DataFrame(columns), suspects


def find_neighbours(features: np.ndarray, positions: np.ndarray, number: int = NEIGHBOURS) -> np.ndarray:
    """Finds the images that are most like some of them, by the angle between their features around the mean.

    Args:
        features: float32 `(images, channels)`; they are not copied.
        positions: of the images to find neighbours of.
        number: of neighbours.

    Returns:
        Positions of the others, int `(len(positions), number)`, fewer columns where there are fewer images; the
        nearest first.
    """
    mean = features.mean(axis=0)
    # The angle around the mean, without a copy of all features less their mean.
    squares = np.einsum("ij,ij->i", features, features) - 2 * features @ mean + mean @ mean
    lengths = np.sqrt(np.maximum(squares, np.finfo(np.float32).tiny))
    number = min(number, len(features) - 1)
    found = np.zeros((len(positions), number), int)
    for start in range(0, len(positions), CHUNK):
        rows = positions[start : start + CHUNK]
        centred = features[rows] - mean
        likeness = (centred @ features.T - (centred @ mean)[:, None]) / lengths
        likeness[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-likeness, max(number - 1, 0), axis=1)[:, :number]
        order = np.argsort(-np.take_along_axis(likeness, nearest, axis=1), axis=1, kind="stable")
        found[start : start + CHUNK] = np.take_along_axis(nearest, order, axis=1)
    return found


def summarize(estimate: Estimate, images: int, listed: int, groups: np.ndarray | None = None) -> str:
    """Returns in sentences how many labels are expected to be wrong, and what that is worth."""
    what = f"{images} labels{describe_groups(groups)}"
    narrow = " The interval is over images, and too narrow for one group." * is_single_group(groups)
    return (
        f"Of {what}, about {estimate.number} are expected to be wrong (95 % interval {estimate.low} to "
        f"{estimate.high}); {listed} suspects are listed.{narrow} This is an estimate and no proof: look at each photo."
    )
