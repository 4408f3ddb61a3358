"""How good, fast and large backbones are on one's own images, by a probe of each; which one to take."""

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
from finetune.evaluation.intervals import get_intervals
from finetune.evaluation.metrics import get_average_precisions, mean_of_defined
from finetune.evaluation.paired_comparison import compare_scores, score_images
from finetune.models.freezing import has_fixed_features
from finetune.training.feature_store import get_features
from finetune.training.phases import changes_images
from finetune.training.probe import build_extractor, cross_validate
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
# A training step goes through the network once, and back at about twice the cost: 2.3 to 4.2 were measured.
STEP_COST = 3
FLOAT_BYTES = 4
# Standard errors of a paired difference, from which on it counts: 95 % of differences by chance are smaller.
TOLD_APART = 1.96


class Candidate(NamedTuple):
    """A backbone at an image size, and what it costs.

    Attributes:
        backbone: a key of `model.BACKBONES`.
        image_size: `(height, width)`.
        probabilities: of the probe, out of fold, `(images, classes)`; NaN for an image that could not be read.
        images_per_second: whose features this machine computes, reading included; the best of several measurements.
        training_seconds: to expect of `num_epochs` epochs on all of train_csv; an estimate.
        parameters: of the model, head included.
        multiply_adds: that its features take of one image; 0 where that is not known.
        speed_noise: as `measure_noise` gives it: how many times its least one the median time of the measurement is.
        timing: what its speed is measured by.
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
        groups: of the images, as `number_groups` gives them.
    """

    candidates: list[Candidate]
    labels: np.ndarray
    groups: np.ndarray | None = None

    def get_common(self) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
        """Returns labels, each candidate's probabilities, and groups, of the images that all of them could read.

        A single label that lies in one group is left out: no probe has learnt it from others.
        """
        kept = np.all([~np.isnan(one.probabilities).any(axis=1) for one in self.candidates], axis=0)
        groups = pick_groups(self.groups, kept)
        if self.labels.ndim == 1:
            lone = find_lone_classes(self.labels[kept], groups, self.labels.max() + 1)
            kept[kept] = ~np.isin(self.labels[kept], lone)
            groups = pick_groups(self.groups, kept)
        return self.labels[kept], [one.probabilities[kept] for one in self.candidates], groups


def draw_images(configs: Configs, most: int) -> tuple[set[int], int]:
    """Draws the images to compare on, with their share of every class, before any is read; then checks their headers.

    Args:
        configs: with `random_seed`.
        most: images; of no more than these, all are taken.

    Returns:
        The line numbers of `train_csv` that are left out, and how many images it has.

    Raises:
        UserError: the table or an image is not usable.
    """
    table = read_table(configs.train_csv, configs.csv_label_column, configs.multi_label_classification)
    rng, rows = np.random.default_rng(configs.random_seed), np.arange(len(table))
    if len(table) > most:
        shares = {"training": most / len(table), "testing": 1 - most / len(table)}
        labels = table[configs.csv_label_column].to_numpy()
        drawn = split_rows(labels, shares, configs.multi_label_classification, rng)["training"]
        # Every class rounds its own share: a few may be too many.
        rows = np.sort(rng.permutation(drawn)[:most])
    paths = [join_path(configs.image_directory, path) for path in table[IMAGE_COLUMN].iloc[rows]]
    limits = (configs.max_image_pixels, configs.generator_workers, configs.skip_bad_images)
    bad = check_images(paths, configs.train_csv, *limits, rows=(rows + 2).tolist())
    used = table.iloc[np.setdiff1d(rows, np.array([*bad], int) - 2)]
    groups = read_groups(used, configs.csv_label_column)
    print(f"Comparing on {len(used)} of the {len(table)} images of {configs.train_csv}{describe_groups(groups)}.")
    tell_lone_classes(used[configs.csv_label_column].tolist(), groups, configs)
    return {*range(2, len(table) + 2)} - {*(rows + 2).tolist()} | {*bad}, len(table)


def tell_lone_classes(labels: Sequence[str], groups: np.ndarray | None, configs: Configs) -> None:
    """Prints which classes cannot be judged, since they lie in one group; raises UserError where all do."""
    if groups is None:
        return
    multi_label = configs.multi_label_classification
    encoded = encode_labels(labels, configs.classes, multi_label, configs.train_csv)
    refuse_lone_classes(encoded, groups, len(configs.classes), configs.train_csv)
    lone = find_lone_classes(encoded, groups, len(configs.classes))
    if lone.size:
        print(describe_lone_classes([configs.classes[position] for position in lone]))


def probe_backbones(
    configs: Configs,
    names: Collection[str],
    image_sizes: Sequence[tuple[int, int]],
    left_out_rows: Collection[int],
    training_images: int,
) -> tuple[Probed, dict[str, str]]:
    """Probes each backbone at each size; one model at a time is in memory.

    Args:
        configs: with `classes` and `random_seed`.
        names: of backbones.
        image_sizes: `(height, width)` of each.
        left_out_rows: line numbers of `train_csv`.
        training_images: that `train_csv` has.

    Returns:
        What could be probed, and why the others could not, by name and size.

    Raises:
        UserError: none could, an image cannot be read and `skip_bad_images` is not set, or features cannot be written.
    """
    combinations = [(name, size) for name in names for size in image_sizes]
    candidates, left_out, bad_images, sequence = [], {}, {}, None
    for number, (name, size) in enumerate(combinations, start=1):
        place = f"{name} at {show_size(*size)}"
        # The pictures themselves are needed once for each size: their features are kept.
        chosen = configs.replace(visual_model_name=name, image_target_size=(*size, 3), image_cache="none")
        # Random weights, where they are asked for, are those that train.py starts from.
        set_seed(configs.random_seed)
        try:
            model = ModelFactory().get_model(chosen)
        except UserError as error:
            # Weights may be of one size: those of MobileNet are.
            left_out[place] = str(error)
            continue
        sequence = get_generator(configs.train_csv, configs.classes, chosen, False, left_out_rows)
        title = f"[{number}/{len(combinations)}] {place}"
        try:
            with unadvised_on_tracing():
                candidates.append(probe_backbone(model, sequence, chosen, training_images, title))
        except (FloatingPointError, tf.errors.ResourceExhaustedError) as error:
            left_out[place] = str(error)
        bad_images |= sequence.bad_images
        del model
        release_memory([one.timing for one in candidates])
    refuse_none(candidates, left_out)
    sequence.bad_images = bad_images
    tell_bad_images(sequence)
    return Probed(add_speeds(candidates), sequence.labels, sequence.get_groups()), left_out


def refuse_none(candidates: Sequence[Candidate], left_out: dict[str, str]) -> None:
    """Raises UserError where all were left out."""
    if not candidates:
        place, reason = next(iter(left_out.items()))
        raise UserError(f"None of the backbones can be compared. {place}: {reason}")


@contextlib.contextmanager
def unadvised_on_tracing() -> Iterator[None]:
    """Holds back TensorFlow's advice against many graphs: each backbone needs its own."""

    def is_other(record: logging.LogRecord) -> bool:
        return "retracing" not in record.getMessage()

    tf.get_logger().addFilter(is_other)
    try:
        yield
    finally:
        tf.get_logger().removeFilter(is_other)


def probe_backbone(
    model: keras.Model, sequence: AugmentedImageSequence, configs: Configs, training_images: int, title: str
) -> Candidate:
    """Judges a model's backbone by a regression on its features, each image by one that was fitted without it.

    Args:
        model: of this collection.
        sequence: of the images.
        configs: of the model.
        training_images: that an epoch will have.
        title: of the progress bar.

    Returns:
        The candidate, with what its speed is measured by.

    Raises:
        UserError: an image cannot be read and `skip_bad_images` is not set, fewer than 10 can, or the features cannot
            be written.
        FloatingPointError: a feature is not finite.
    """
    mirrors, folder = configs.augmentation_strength != "none", configs.image_cache_path
    views, is_read = get_views(model, sequence, mirrors, folder, title)
    if is_read.sum() < FEWEST_IMAGES:
        raise UserError(
            f"{configs.train_csv}: expected at least {FEWEST_IMAGES} images that can be read, to compare on. "
            f"Received: {is_read.sum()}."
        )
    if not all(np.isfinite(view).all() for view in views):
        raise FloatingPointError("its features are not finite")
    probabilities = np.full((len(is_read), len(configs.classes)), np.nan)
    probabilities[is_read] = cross_validate(
        views,
        sequence.labels[is_read],
        len(configs.classes),
        configs.random_seed,
        groups=sequence.get_groups(is_read),
    )
    size, computation = tuple(sequence.image_size), count_multiply_adds(build_extractor(model))
    views = count_passes(model, changes_images(configs), configs.num_epochs) * training_images
    timing = prepare_timing(model, sequence, views)
    facts = (model.count_params(), computation, 1.0, timing)
    return Candidate(configs.visual_model_name, size, probabilities, np.nan, np.nan, *facts)


def get_views(
    model: keras.Model,
    sequence: AugmentedImageSequence,
    mirrors: bool,
    folder: str,
    title: str,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the features of the images that can be read, and of their mirror images or not; and which these are.

    Args:
        model: of this collection.
        sequence: of the images.
        mirrors: the mirror images too.
        folder: of the store.
        title: of the progress bar.
    """
    views, is_read = [], np.ones(len(sequence.paths), bool)
    for mirrored in (False, True) if mirrors else (False,):
        heading = f"{title}, mirrored" if mirrored else title
        features, is_known = get_features(model, sequence, folder, mirrored, heading)
        views.append(features)
        is_read &= is_known
    return [view[is_read] for view in views], is_read


def add_speeds(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns candidates with their speeds; those that are not timed yet are measured in turns."""
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
    """Returns how many times the cost of computing an image's features its training has, about.

    Of a frozen backbone the features are computed once, or where images change in each epoch, once an epoch.
    """
    if has_fixed_features(model):
        return epochs if images_change else 1
    return STEP_COST * epochs


def release_memory(timings: Sequence[Timing]) -> None:
    """Lets go of models that nothing refers to, and of the last one to be timed where the others fill the memory."""
    limit_memory(timings)
    keras.utils.clear_session()
    gc.collect()


def show_size(height: int, width: int) -> str:
    """Returns an image size as a reader wants it: `224`, or where the sides differ height and width, `224x320`."""
    return str(height) if height == width else f"{height}x{width}"


def rank(probed: Probed, class_names: Sequence[str], multi_label: bool, seed: int) -> pd.DataFrame:
    """Lays out the candidates, the best first.

    Args:
        probed: the candidates.
        class_names: in the order of the probabilities.
        multi_label: whether an image may have several labels.
        seed: of the intervals' resamples.

    Returns:
        The columns `backbone`, `height`, `width`; `accuracy`, multi-label `mean_average_precision` over the labels,
        with its 95 % interval `low` and `high`; `images`, compared on, and `groups`, where these are fewer;
        `images_per_second`; `training_seconds`; `parameters`; `multiply_adds`; `speed_noise`; `megabytes`, of float32
        weights; single-label those of `rank_by_balance`; `behind_best`, the mean difference of the images' scores to
        the best one's (of several labels the label ranking average precision), and its `standard_error`; `suggested`;
        `measured_fastest`, of those as good as the best; `not_told_apart`, whether the images do not tell it from the
        suggested one; `on_front`, whether none is both better and faster.
    """
    labels, answers, groups = probed.get_common()
    metric = "mean_average_precision" if multi_label else "accuracy"
    rows = []
    for one, probabilities in zip(probed.candidates, answers, strict=True):
        decision = Decision(list(class_names), multi_label)
        interval = get_intervals(labels, probabilities, decision, seed, groups=groups)[metric]
        value = float(np.mean(probabilities.argmax(axis=1) == labels)) if not multi_label else None
        if multi_label:
            value = mean_of_defined(get_average_precisions(labels, probabilities))
        size = dict(zip(("height", "width"), one.image_size, strict=True))
        row = {"backbone": one.backbone, **size, metric: value, "low": interval[0], "high": interval[1]}
        row |= {"images": len(labels), "images_per_second": one.images_per_second}
        row |= {"training_seconds": one.training_seconds, "parameters": one.parameters}
        row |= {"multiply_adds": one.multiply_adds, "speed_noise": one.speed_noise}
        rows.append(row | {"megabytes": one.parameters * FLOAT_BYTES / 1e6})
    table = pd.DataFrame(rows)
    order = np.lexsort((-table["images_per_second"], -table[metric]))
    scores = np.array([score_images(labels, answers[place]) for place in order])
    table = table.iloc[order].reset_index(drop=True)
    if not multi_label:
        table = table.assign(**rank_by_balance(labels, [answers[place] for place in order]))
    if groups is not None:
        table.insert(table.columns.get_loc("images") + 1, "groups", count_groups(groups, len(groups)))
    return judge(table, metric, scores, groups)


def rank_by_balance(labels: np.ndarray, answers: Sequence[np.ndarray]) -> dict[str, np.ndarray | float]:
    """Returns the columns that show what accuracy hides if most images are of one class.

    Args:
        labels: int `(images,)`.
        answers: probabilities `(images, classes)` of each candidate.

    Returns:
        `balanced_accuracy`, the mean recall of the classes; `balanced_rank`, from 1; `largest_share`, the share of the
        images that are of the most frequent class.
    """
    counts = np.bincount(labels)
    present = np.flatnonzero(counts)
    right = [np.bincount(labels[one.argmax(axis=1) == labels], minlength=len(counts)) for one in answers]
    values = np.array([np.mean(one[present] / counts[present]) for one in right])
    ranks = 1 + (values > values[:, None]).sum(axis=1)
    return {"balanced_accuracy": values, "balanced_rank": ranks, "largest_share": counts.max() / len(labels)}


def judge(table: pd.DataFrame, metric: str, scores: np.ndarray, groups: np.ndarray | None = None) -> pd.DataFrame:
    """Adds to a ranking the differences that count, the suggestion and the front, as `rank` returns them.

    Suggested is the fastest of those that are not told apart from the best, as `choose_fastest` finds it.

    Args:
        table: the best first.
        metric: the column that it is ordered by.
        scores: of each image by each candidate, `(candidates, images)`.
        groups: of the images, as `number_groups` gives them.
    """
    differences, errors = np.array([compare_scores(row, scores[0], groups) for row in scores]).T
    speeds = table["images_per_second"].to_numpy()
    is_as_good = differences <= TOLD_APART * errors
    good = np.flatnonzero(is_as_good)
    facts = (table[name].to_numpy()[good] for name in ("speed_noise", "multiply_adds", "backbone"))
    suggested, fastest = good[[*choose_fastest(speeds[good], *facts)]]
    from_suggested = np.array([compare_scores(scores[suggested], row, groups) for row in scores]).T
    is_same = np.abs(from_suggested[0]) <= TOLD_APART * from_suggested[1]
    places = np.arange(len(table))
    return table.assign(
        behind_best=differences,
        standard_error=errors,
        suggested=places == suggested,
        measured_fastest=places == fastest,
        not_told_apart=is_same & (places != suggested),
        on_front=find_front(table[metric].to_numpy(), speeds),
    )


def find_front(values: np.ndarray, speeds: np.ndarray) -> np.ndarray:
    """Tells which candidates none other beats in one of two numbers without being worse in the other.

    Args:
        values: `(candidates,)`, higher is better.
        speeds: likewise.

    Returns:
        bool `(candidates,)`.
    """
    at_least = (values[:, None] >= values) & (speeds[:, None] >= speeds)
    above = (values[:, None] > values) | (speeds[:, None] > speeds)
    return ~(at_least & above).any(axis=0)
