"""Compares backbones on the user's images by a probe of each: quality, speed and size, and which one to take."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from sklearn.metrics import recall_score

from configs import Configs
from finetune.core.devices import set_seed
from finetune.core.options import UserError
from finetune.data.data_check import check_images
from finetune.data.groups import (
    count_groups,
    describe_groups,
    describe_lone_classes,
    find_lone_classes,
    pick_groups,
    read_groups,
    refuse_lone_classes,
)
from finetune.data.splitting import split_rows
from finetune.data.stores import join_path
from finetune.data.tables import IMAGE_COLUMN, encode_labels, read_table
from finetune.evaluation.decision import Decision
from finetune.evaluation.intervals import compare_scores, get_intervals, score_images
from finetune.evaluation.metrics import get_average_precisions, mean_of_defined
from finetune.models.backbones import has_fixed_features
from finetune.training.feature_store import get_features
from finetune.training.probe import build_extractor, cross_validate
from finetune.training.run import changes_images
from finetune.training.speeds import (
    Timing,
    choose_fastest,
    count_multiply_adds,
    limit_memory,
    prepare_timing,
    time_together,
)
from generator import AugmentedImageSequence, get_generator, tell_bad_images
from model import ModelFactory

FEWEST_IMAGES = 10
# A training step is one pass forward and one backward, at about twice the cost: 2.3 to 4.2 were measured.
STEP_COST = 3
FLOAT_BYTES = 4
# A paired difference of more standard errors than this is significant: chance makes 95 % of differences smaller.
SIGNIFICANT = 1.96


class Candidate(NamedTuple):
    """A backbone at an image size, and what it costs.

    Attributes:
        backbone: a key of `model.BACKBONES`.
        image_size: `(height, width)`.
        probabilities: of the probe, out of fold, `(images, classes)`; NaN for an image that could not be read.
        images_per_second: at which this machine computes features, reading included; the best of several measurements.
        training_seconds: estimate for `num_epochs` epochs on all of train_csv.
        parameters: of the model, head included.
        multiply_adds: for the features of one image; 0 if unknown.
        speed_noise: the median time of the measurement over the least one, as `measure_noise` returns it.
        timing: measures the speed.
    """

    backbone: str
    image_size: tuple[int, int]
    probabilities: np.ndarray
    images_per_second: float
    training_seconds: float
    parameters: int
    multiply_adds: int = 0
    speed_noise: float = 1.0
    timing: Timing | None = None


class Probed(NamedTuple):
    """Candidates, and the images that they were compared on.

    Attributes:
        candidates: those that could be built.
        labels: of the images, int `(images,)`, or `(images, classes)` of zeros and ones.
        groups: of the images, as `number_groups` returns them.
    """

    candidates: list[Candidate]
    labels: np.ndarray
    groups: np.ndarray | None = None

    def get_common(self) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
        """Returns labels, each candidate's probabilities, and groups, of the images that all candidates could read.

        Images of a class that lies in one group are left out: no probe could learn the class from other groups.
        """
        kept = np.all([~np.isnan(one.probabilities).any(axis=1) for one in self.candidates], axis=0)
        if self.labels.ndim == 1:
            lone = find_lone_classes(self.labels[kept], pick_groups(self.groups, kept), self.labels.max() + 1)
            kept[kept] = ~np.isin(self.labels[kept], lone)
        return self.labels[kept], [one.probabilities[kept] for one in self.candidates], pick_groups(self.groups, kept)


def draw_images(configs: Configs, most: int) -> tuple[set[int], int]:
    """Draws the images to compare on, a share of every class, then checks the headers of these images.

    Args:
        configs: with `classes` and `random_seed`.
        most: the most images to draw; a table of fewer is used whole.

    Returns:
        The line numbers of `train_csv` that are left out, and its number of images.

    Raises:
        UserError: the table or an image is not usable, or every class lies in one group.
    """
    csv_path, multi_label = configs.train_csv, configs.multi_label_classification
    table = read_table(csv_path, configs.csv_label_column, multi_label)
    rng, rows = np.random.default_rng(configs.random_seed), np.arange(len(table))
    if len(table) > most:
        shares = {"training": most / len(table), "testing": 1 - most / len(table)}
        drawn = split_rows(table[configs.csv_label_column].to_numpy(), shares, multi_label, rng)["training"]
        # Each class rounds its share, so there may be a few too many.
        rows = np.sort(rng.permutation(drawn)[:most])
    paths = [join_path(configs.image_directory, path) for path in table[IMAGE_COLUMN].iloc[rows]]
    limits = (configs.max_image_pixels, configs.generator_workers, configs.skip_bad_images)
    bad = check_images(paths, csv_path, *limits, rows=(rows + 2).tolist())
    used = table.iloc[np.setdiff1d(rows, np.array([*bad], int) - 2)]
    groups = read_groups(used, configs.csv_label_column)
    print(f"Comparing on {len(used)} of the {len(table)} images of {csv_path}{describe_groups(groups)}.")
    if groups is not None:
        labels = encode_labels(used[configs.csv_label_column].tolist(), configs.classes, multi_label, csv_path)
        refuse_lone_classes(labels, groups, len(configs.classes), csv_path)
        lone = find_lone_classes(labels, groups, len(configs.classes))
        if lone.size:
            print(describe_lone_classes([configs.classes[position] for position in lone]))
    return {*range(2, len(table) + 2)} - {*(rows + 2).tolist()} | {*bad}, len(table)


def probe_backbones(
    configs: Configs,
    names: Collection[str],
    image_sizes: Sequence[tuple[int, int]],
    left_out_rows: Collection[int],
    training_images: int,
) -> tuple[Probed, dict[str, str]]:
    """Probes each backbone at each size, with one model in memory at a time.

    Args:
        configs: with `classes` and `random_seed`.
        names: of backbones.
        image_sizes: `(height, width)` of each.
        left_out_rows: line numbers of `train_csv`.
        training_images: the number of images in `train_csv`.

    Returns:
        What was probed, and by name and size why the others were not.

    Raises:
        UserError: none could be probed, an image cannot be read without `skip_bad_images`, or a file not be written.
    """
    combinations = [(name, size) for name in names for size in image_sizes]
    candidates, left_out, bad_images, sequence = [], {}, {}, None
    for number, (name, size) in enumerate(combinations, start=1):
        place = f"{name} at {show_size(*size)}"
        # Images are read once for each size, since features are stored: caching the images would be useless.
        chosen = configs.replace(visual_model_name=name, image_target_size=(*size, 3), image_cache="none")
        # Random weights are then those that train.py starts from.
        set_seed(configs.random_seed)
        try:
            model = ModelFactory().get_model(chosen)
        except UserError as error:
            # Such as MobileNet's ImageNet weights, which exist for some image sizes only.
            left_out[place] = str(error)
            continue
        sequence = get_generator(configs.train_csv, configs.classes, chosen, False, left_out_rows)
        try:
            title = f"[{number}/{len(combinations)}] {place}"
            candidates.append(probe_backbone(model, sequence, chosen, training_images, title))
        except (FloatingPointError, tf.errors.ResourceExhaustedError) as error:
            left_out[place] = str(error)
        bad_images |= sequence.bad_images
        del model
        release_memory(candidates)
    if not candidates:
        raise UserError(f"None of the backbones can be compared. {': '.join(next(iter(left_out.items())))}")
    sequence.bad_images = bad_images
    tell_bad_images(sequence)
    return Probed(add_speeds(candidates), sequence.labels, sequence.get_groups()), left_out


def release_memory(candidates: Sequence[Candidate]) -> None:
    """Frees models that are no longer used, and times the last one if those still to be timed fill the memory."""
    limit_memory([one.timing for one in candidates])
    keras.utils.clear_session()
    gc.collect()


@contextlib.contextmanager
def without_retracing_warnings() -> Iterator[None]:
    """Suppresses TensorFlow's warning about many graphs: each backbone needs its own."""

    def is_other(record: logging.LogRecord) -> bool:
        return "retracing" not in record.getMessage()

    tf.get_logger().addFilter(is_other)
    try:
        yield
    finally:
        tf.get_logger().removeFilter(is_other)


@without_retracing_warnings()
def probe_backbone(
    model: keras.Model, sequence: AugmentedImageSequence, configs: Configs, training_images: int, title: str
) -> Candidate:
    """Cross-validates a regression on the features of a model's backbone.

    `training_images` is the number of images in an epoch of the training to come, and `title` that of the progress bar.

    Returns:
        The candidate, its speed still to be measured.

    Raises:
        UserError: an image cannot be read without `skip_bad_images`, fewer than 10 can, or a file cannot be written.
        FloatingPointError: a feature is not finite.
    """
    views, is_read = [], np.ones(len(sequence.paths), bool)
    for mirrored in (False,) if configs.augmentation_strength == "none" else (False, True):
        heading = f"{title}, mirrored" if mirrored else title
        features, is_known = get_features(model, sequence, configs.image_cache_path, mirrored, heading)
        views.append(features)
        is_read &= is_known
    if is_read.sum() < FEWEST_IMAGES:
        raise UserError(
            f"{configs.train_csv}: expected at least {FEWEST_IMAGES} readable images to compare on. "
            f"Received: {is_read.sum()}."
        )
    views = [view[is_read] for view in views]
    if not all(np.isfinite(view).all() for view in views):
        raise FloatingPointError("its features are not finite")
    number, groups = len(configs.classes), sequence.get_groups(is_read)
    probabilities = np.full((len(is_read), number), np.nan)
    probabilities[is_read] = cross_validate(views, sequence.labels[is_read], number, configs.random_seed, groups=groups)
    passes = count_passes(model, changes_images(configs), configs.num_epochs)
    return Candidate(
        configs.visual_model_name,
        tuple(sequence.image_size),
        probabilities,
        images_per_second=np.nan,
        training_seconds=np.nan,
        parameters=model.count_params(),
        multiply_adds=count_multiply_adds(build_extractor(model)),
        timing=prepare_timing(model, sequence, passes * training_images),
    )


def add_speeds(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns candidates with their speeds; those without one are measured in turns."""
    time_together([one.timing for one in candidates if one.timing.run])
    return [
        one._replace(
            images_per_second=1 / one.timing.seconds,
            training_seconds=one.timing.views * one.timing.seconds,
            speed_noise=one.timing.noise,
        )
        for one in candidates
    ]


def count_passes(model: keras.Model, images_change: bool, epochs: int) -> int:
    """Estimates the cost of training on an image, in multiples of the cost of its features.

    A frozen backbone computes features once or, if augmentation changes the images, once an epoch.
    """
    if has_fixed_features(model):
        return epochs if images_change else 1
    return STEP_COST * epochs


def show_size(height: int, width: int) -> str:
    """Returns an image size as text: `224`, or `224x320` (height, width) if the sides differ."""
    return str(height) if height == width else f"{height}x{width}"


def rank(probed: Probed, class_names: Sequence[str], multi_label: bool, seed: int) -> pd.DataFrame:
    """Returns a table of the candidates, the best first.

    Args:
        probed: the candidates.
        class_names: in the order of the probabilities.
        multi_label: whether an image may have several labels.
        seed: of the bootstrap.

    Returns:
        The columns `backbone`, `height`, `width`; `accuracy`, or multi-label `mean_average_precision`, with its 95 %
        confidence interval `low` and `high`; `images` compared on, and `groups` of them if there are any;
        `images_per_second`; `training_seconds`; `parameters`; `multiply_adds`; `speed_noise`; `megabytes` of float32
        weights; single-label those of `rank_by_balance`; `behind_best`, the mean difference of the images' scores from
        the best candidate's (multi-label: label ranking average precision), and its `standard_error`; `suggested`;
        `measured_fastest`, of those not significantly worse than the best; `not_told_apart`, whether it is not
        significantly different from the suggested one; `on_front`, whether none is both better and faster.
    """
    labels, answers, groups = probed.get_common()
    metric = "mean_average_precision" if multi_label else "accuracy"
    rows = []
    for one, probabilities in zip(probed.candidates, answers, strict=True):
        decision = Decision(list(class_names), multi_label)
        low, high = get_intervals(labels, probabilities, decision, seed, groups=groups)[metric]
        if multi_label:
            value = mean_of_defined(get_average_precisions(labels, probabilities))
        else:
            value = float(np.mean(probabilities.argmax(axis=1) == labels))
        row = {"backbone": one.backbone, "height": one.image_size[0], "width": one.image_size[1]}
        row |= {metric: value, "low": low, "high": high, "images": len(labels)}
        costs = ("images_per_second", "training_seconds", "parameters", "multiply_adds", "speed_noise")
        row |= {name: getattr(one, name) for name in costs}
        rows.append(row | {"megabytes": one.parameters * FLOAT_BYTES / 1e6})
    table = pd.DataFrame(rows)
    order = np.lexsort((-table["images_per_second"], -table[metric]))
    answers = [answers[place] for place in order]
    table = table.iloc[order].reset_index(drop=True)
    if not multi_label:
        table = table.assign(**rank_by_balance(labels, answers))
    if groups is not None:
        table.insert(table.columns.get_loc("images") + 1, "groups", count_groups(groups, len(groups)))
    return judge(table, metric, np.array([score_images(labels, one) for one in answers]), groups)


def rank_by_balance(labels: np.ndarray, answers: Sequence[np.ndarray]) -> dict[str, np.ndarray | float]:
    """Returns the columns that show what accuracy hides if most images are of one class.

    Returns:
        `balanced_accuracy`, the mean recall of the classes; `balanced_rank`, from 1; `largest_share`, the share of the
        most frequent class.
    """
    present, counts = np.unique(labels, return_counts=True)
    values = np.array([recall_score(labels, one.argmax(axis=1), labels=present, average="macro") for one in answers])
    ranks = 1 + (values > values[:, None]).sum(axis=1)
    return {"balanced_accuracy": values, "balanced_rank": ranks, "largest_share": counts.max() / len(labels)}


def judge(table: pd.DataFrame, metric: str, scores: np.ndarray, groups: np.ndarray | None = None) -> pd.DataFrame:
    """Adds the paired differences, the suggestion and the front to a ranking, as `rank` returns them.

    The suggestion is the fastest candidate that is not significantly worse than the best, as `choose_fastest` finds it.
    `scores` are those of each image by each candidate, `(candidates, images)`.
    """
    differences, errors = np.array([compare_scores(row, scores[0], groups) for row in scores]).T
    speeds = table["images_per_second"].to_numpy()
    good = np.flatnonzero(differences <= SIGNIFICANT * errors)
    facts = (table[name].to_numpy()[good] for name in ("speed_noise", "multiply_adds", "backbone"))
    suggested, fastest = good[[*choose_fastest(speeds[good], *facts)]]
    gaps, gap_errors = np.array([compare_scores(scores[suggested], row, groups) for row in scores]).T
    places = np.arange(len(table))
    return table.assign(
        behind_best=differences,
        standard_error=errors,
        suggested=places == suggested,
        measured_fastest=places == fastest,
        not_told_apart=(np.abs(gaps) <= SIGNIFICANT * gap_errors) & (places != suggested),
        on_front=find_front(table[metric].to_numpy(), speeds),
    )


def find_front(values: np.ndarray, speeds: np.ndarray) -> np.ndarray:
    """Returns which candidates are on the Pareto front, bool `(candidates,)`; higher is better in both arguments.

    A candidate is on the front if no other is better in one number and not worse in the other.
    """
    at_least = (values[:, None] >= values) & (speeds[:, None] >= speeds)
    above = (values[:, None] > values) | (speeds[:, None] > speeds)
    return ~(at_least & above).any(axis=0)
