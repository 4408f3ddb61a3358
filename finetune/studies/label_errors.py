"""Finds labels that are probably wrong: a model that was not trained on an image predicts, and cleanlab compares."""

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
from finetune.core.texts import join_names, show_count
from finetune.core.values import get_input_size
from finetune.data.data_check import check_images
from finetune.data.groups import (
    count_groups_of_classes,
    describe_groups,
    is_single_group,
    read_groups,
    refuse_lone_classes,
)
from finetune.data.inspection import resolve_pixel_range, tell_assumed_range, tell_unfit_range
from finetune.data.stores import join_path
from finetune.data.tables import IMAGE_COLUMN, LABEL_SEPARATOR, read_table, resolve_class_names
from finetune.evaluation.decision import read_decision
from finetune.models.heads import has_parts
from finetune.models.model_files import has_views, load_fitting_model, strip_views
from finetune.reporting.label_page import NEIGHBOUR_SIDE, PHOTO_SIDE, embed_photos, write_label_page
from finetune.studies.label_scores import Estimate, count_errors, rank_suspects
from finetune.training.feature_store import get_features
from finetune.training.probe import cross_validate, split_head
from finetune.training.run_folder import IMAGES_FILE, READING_OPTIONS, find_trained_images
from finetune.training.trained_model import find_trained_model, name_model
from generator import get_generator, tell_bad_images
from model import ModelFactory

NEIGHBOURS = 3
# A regression learns little about a class from fewer images.
FEW = 5
# Images whose similarities to all others are in memory at a time.
CHUNK = 64


class Judge(NamedTuple):
    """Predicts the labels: a backbone with a regression on its features, or a run's trained model.

    Attributes:
        model: as built or loaded.
        path: of the run's model; empty for a regression.
    """

    model: keras.Model
    path: str


class Evidence(NamedTuple):
    """Images that can be judged, in the order of the table.

    Attributes:
        rows: int `(images,)`, line numbers in the table.
        names: paths as the table has them.
        files: the paths of the files.
        texts: the labels as the table has them.
        labels: as `encode_labels` returns them.
        features: float32 `(images, channels)`.
        probabilities: `(images, classes)`, each by a model that was not trained on the image.
        groups: as `number_groups` returns them.
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
    """Builds the backbone that the configs describe, or loads the model of `load_model_path` if given.

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
    else:
        path, configs = "", resolve_pixel_range(configs, [csv_path])
        options = (configs.csv_label_column, configs.multi_label_classification)
        configs = configs.replace(classes=resolve_class_names(configs.classes, csv_path, *options))
    if len(configs.classes) == 1:
        raise UserError(
            f"{csv_path}: every image has the only label, {configs.classes[0]}. Expected at least two labels to judge."
        )
    configs = configs.replace(train_csv=csv_path)
    if path:
        print(name_model(configs, path))
        return Judge(model, path), configs
    set_seed(configs.random_seed)
    return Judge(ModelFactory().get_model(configs), ""), configs


def gather_evidence(judge: Judge, configs: Configs, csv_path: str) -> Evidence:
    """Reads the images of a table and predicts each with a model that was not trained on it.

    Leaves out images that cannot be read under `skip_bad_images` and, with a run's model, those that it was trained on
    and the rest of their groups; prints how many.

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
        if sequence.labels.ndim == 2 and sequence.labels.all():
            raise UserError(
                f"{csv_path}: every image has the same labels, {LABEL_SEPARATOR.join(configs.classes)}. Expected "
                "images that lack one of them, or the model of a run with such images: set load_model_path."
            )
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
        raise UserError("The backbone's features are not finite: its weights are damaged. Use another model.")
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
    """Returns the line numbers of the images that a run was trained on and of their groups; prints how many.

    Raises:
        UserError: no other image is left.
    """
    folder = os.path.dirname(os.path.abspath(model_path))
    usable = {row: file for row, file in enumerate(files, start=2) if row not in bad_rows}
    found = find_trained_images(folder, list(usable.values()), ["training"])
    if found is None:
        print(f"Warning: the run has no {IMAGES_FILE}. Errors in labels that the model was trained on may be missed.")
        return set()
    learnt, what = {row for row, file in usable.items() if file in found}, ""
    if groups is not None:
        known = {groups[row - 2] for row in learnt}
        of_groups = {row for row in usable if groups[row - 2] in known} - learnt
        what = f" or on others of their groups ({len(of_groups)})" * bool(of_groups)
        learnt |= of_groups
    if len(learnt) == len(usable):
        raise UserError(
            f"{csv_path}: the model was trained on all {len(usable)} images{what}, so it cannot judge their labels. "
            "Leave out load_model_path."
        )
    if learnt:
        print(f"Left out {len(learnt)} of {len(usable)} images, which the model was trained on{what}.")
    return learnt


def answer(judge: Judge, features: np.ndarray, mirrored: np.ndarray | None, configs: Configs) -> np.ndarray:
    """Returns a run's calibrated probabilities from features, `(images, classes)`."""
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
    """Returns cross-validated probabilities of a regression on features, `(images, classes)`.

    It is the mean of two fits. The second one leaves out the labels that look wrong after the first, since they bias
    the probabilities of other images. Whole groups are held out. A class of one image or group cannot be judged: its
    label counts as right, and the class is printed.
    """
    one_hot = labels if multi_label else np.eye(len(class_names), dtype=np.uint8)[labels]
    lone = _find_lone_labels(one_hot, class_names, groups)
    first = cross_validate([features], labels, len(class_names), seed, groups=groups)
    if groups is not None:
        # Otherwise the second fit could leave out a whole class, if its only group is large.
        _trust_labels(first, one_hot, lone, multi_label)
    wrong = rank_suspects(labels, first, multi_label)[0][: count_errors(labels, first, multi_label)]
    probabilities = first
    # If most labels look wrong, the first fit is useless.
    if 0 < len(wrong) < len(labels) // 2:
        second = cross_validate([features], labels, len(class_names), seed + 1, wrong, groups)
        probabilities = (first + second) / 2
    _trust_labels(probabilities, one_hot, lone, multi_label)
    return probabilities


def _trust_labels(probabilities: np.ndarray, one_hot: np.ndarray, classes: np.ndarray, multi_label: bool) -> None:
    """Makes the probabilities of the images of some classes those of their labels."""
    for position in classes:
        rows = np.flatnonzero(one_hot[:, position])
        if not multi_label:
            probabilities[rows] = 0
        probabilities[rows, position] = 1


def _find_lone_labels(one_hot: np.ndarray, class_names: Sequence[str], groups: np.ndarray | None) -> np.ndarray:
    """Returns the classes of one image or group; prints them, and the classes of few."""
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


def list_suspects(evidence: Evidence, class_names: Sequence[str], most: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Lists the suspected label errors, the most doubtful label first, at most `most` of them.

    Returns:
        A table of `row`, the line number; `path`, `given_label`, `likely_label`; `confidence` that the given label is
        wrong, in `[0, 1]`, one minus cleanlab's quality of the label; and `rank`, from 1 on. And their positions among
        the images.
    """
    multi_label = evidence.labels.ndim == 2
    suspects, qualities, likely = rank_suspects(evidence.labels, evidence.probabilities, multi_label)
    suspects = suspects[:most]
    rows = [np.flatnonzero(row) if multi_label else [row] for row in likely[suspects]]
    columns = {
        "row": evidence.rows[suspects],
        IMAGE_COLUMN: [evidence.names[position] for position in suspects],
        "given_label": [evidence.texts[position] for position in suspects],
        "likely_label": [LABEL_SEPARATOR.join(class_names[position] for position in row) for row in rows],
        "confidence": np.round(1 - qualities[suspects], 4),
        "rank": np.arange(1, len(suspects) + 1),
    }
    return pd.DataFrame(columns), suspects


def find_neighbours(features: np.ndarray, positions: np.ndarray, number: int = NEIGHBOURS) -> np.ndarray:
    """Finds the images most similar to some others, by the cosine between features around their mean.

    Returns:
        Positions, int `(len(positions), number)`, the nearest first; fewer columns if there are fewer images.
    """
    mean = features.mean(axis=0)
    # Lengths of the centred features, without a centred copy of all of them.
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
    """Returns the estimated number of wrong labels and its limits, in sentences."""
    narrow = " The interval treats the images of the single group as independent: it is too narrow."
    return (
        f"Of {images} labels{describe_groups(groups)}, about {estimate.number} are expected to be wrong (95 % interval "
        f"{estimate.low} to {estimate.high}). {show_count(listed, 'suspected label error')} in the list."
        f"{narrow * is_single_group(groups)} This is an estimate, not a proof: look at each photo."
    )


def write_page(
    path: str,
    found: tuple[pd.DataFrame, np.ndarray],
    evidence: Evidence,
    summary: str,
    csv_path: str,
    configs: Configs,
) -> None:
    """Writes the page, atomically; it is self-contained.

    Args:
        path: the HTML file.
        found: what `list_suspects` returned.
        evidence: the images.
        summary: how many labels are expected to be wrong, in sentences.
        csv_path: the table.
        configs: with `classes`; how photos are read, and the options of the command that corrects the table.

    Raises:
        UserError: a photo can no longer be read, or the page cannot be written.
    """
    suspects, positions = found
    neighbours = find_neighbours(evidence.features, positions)
    files, texts, names = evidence.files, evidence.texts, evidence.names
    photos = embed_photos((files[position] for position in positions), PHOTO_SIDE, configs)
    small = embed_photos((files[other] for other in neighbours.flat), NEIGHBOUR_SIDE, configs)
    cards = suspects.to_dict("records")
    for card, position, others in zip(cards, positions, neighbours, strict=True):
        card["photo"] = photos[files[position]]
        card["neighbours"] = [(small[files[other]], texts[other], names[other]) for other in others]
    write_label_page(path, cards, summary, "the most similar ones, with their own labels", csv_path, configs)
