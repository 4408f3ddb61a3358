"""The linear probe: a logistic regression on a frozen backbone's features, its strength by cross-validation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from scipy import special
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from finetune.core.options import UserError
from finetune.core.texts import show_progress
from finetune.data.groups import deal_groups, find_lone_classes, pick_groups, refuse_lone_classes
from finetune.models.features import read_plainly
from finetune.models.heads import Parts, compute_logit_inputs, has_parts, list_kernels, split_model
from finetune.training.trainer import TrainingModel
from generator import AugmentedImageSequence, naming_bad_images

# The compared strengths C, in half decades from the strongest regularisation.
STRENGTHS = 10.0 ** np.arange(-2.5, 1.25, 0.5)
# Without enough images to compare strengths: the best one for MobileNet's features of photos.
USUAL_STRENGTH = 10.0**-1.5
FOLDS = 5
MOST_COMPARED_IMAGES = 2000
# The most numbers to compute with in double precision out of fold: 256 MiB.
MOST_DOUBLED = 2**25
# Tolerances of a regression, in double and in single precision.
TOLERANCE, SINGLE_TOLERANCE = 1e-7, 1e-4


class FeaturesNotFinite(UserError):
    """The features of a backbone are infinite or NaN."""


def compute_features(
    model: keras.Model, sequence: AugmentedImageSequence, mirrored: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the input of the head for each image, in the scope of a strategy, whose devices share the work.

    Args:
        model: a model of this collection.
        sequence: its images are read without augmentation. With `skip_bad_images`, unreadable images are added to its
            `bad_images`.
        mirrored: use the mirror images.

    Returns:
        The pooled features, float32 `(images, channels)` in the order of `paths`, and which images could be read, bool
        `(images,)`; the rows of unreadable images are NaN.

    Raises:
        UserError: an image cannot be read, or the model has no head.
    """
    return extract_features(build_extractor(model, mirrored), sequence, mirrored)


def extract_features(
    extractor: TrainingModel, sequence: AugmentedImageSequence, mirrored: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Computes features as `compute_features` does, with the model of `build_extractor`."""
    plain = read_plainly(sequence, extractor.input_shape[1:3])
    with naming_bad_images(plain):
        known, is_read = extractor.predict_sequence(plain, "Features of the mirror images" if mirrored else "Features")
    features = np.full((len(is_read), known.shape[1]), np.nan, np.float32)
    features[is_read] = known
    sequence.bad_images.update(plain.bad_images)
    return features, is_read


def build_extractor(model: keras.Model, mirrored: bool = False) -> TrainingModel:
    """Returns the part of a model before its head, from images or mirror images to features `(batch, channels)`.

    Raises:
        UserError: the model has no head.
    """
    parts = _split(model)
    inputs = keras.Input(model.input_shape[1:])
    outputs = keras.ops.flip(inputs, axis=2) if mirrored else inputs
    for layer in (*parts.before, parts.backbone, parts.pooling):
        outputs = layer(outputs)
    return TrainingModel(inputs, outputs)


def split_head(model: keras.Model) -> keras.Model:
    """Returns the part of a model after its pooling, from features `(batch, channels)` to probabilities.

    It shares the model's layers: training it trains the model.

    Raises:
        UserError: the model has no head.
    """
    parts = _split(model)
    shape = parts.pooling.compute_output_shape(parts.backbone.output_shape)
    outputs = inputs = keras.Input(shape[1:], name="features")
    for layer in (*parts.hidden, parts.logits, parts.probabilities):
        outputs = layer(outputs)
    return keras.Model(inputs, outputs, name="head")


def takes_probe(model: keras.Model) -> bool:
    """Returns whether `initialize_head` takes a model: its head has no kernels before the logits."""
    return has_parts(model) and not list_kernels(_split(model))


def initialize_head(
    model: keras.Model,
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    seed: int,
    class_weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> float:
    """Makes a model's head the logistic regression on the backbone's features; a random head would distort these.

    Single-label: one multinomial regression; a class without images gets its smoothed frequency. Multi-label: one
    regression a label; a label of no image, or of every image, gets its smoothed frequency. The strength of the
    regularisation is chosen by the log loss in stratified cross-validation.

    Source: Kumar et al., ICLR 2022 (arXiv:2202.10054).

    Args:
        model: its layer `logits` is changed; the head must have no other kernels.
        views: the features of the readable images, float32 `(images, channels)` from `compute_features`, and optionally
            those of their mirror images: both then count half, but the strength is chosen without mirror images.
        labels: int `(images,)`, or multi-label `(images, classes)` of zeros and ones.
        seed: of the folds of cross-validation.
        class_weights: single-label, `(classes,)`: the weight of an image of each class in the loss, though not in
            the choice of the strength.
        groups: of the images, from `number_groups`; each group is in one fold.

    Returns:
        The strength C, the variance of the kernels' prior on features of variance 1.

    Raises:
        UserError: the head has hidden layers, or (`FeaturesNotFinite`) a feature is not finite.
    """
    parts = _split(model)
    if kernels := list_kernels(parts):
        shown = ", ".join(f"{layer.units} units" if hasattr(layer, "units") else layer.name for layer in kernels)
        raise UserError(
            f"head_initialization linear_probe: expected a head without hidden layers. Received: {shown}. Remove sizes "
            "of 1 and more from classifier_layer_sizes, or set head_initialization to random."
        )
    views = [compute_logit_inputs(parts, view) for view in views]
    if not all(np.isfinite(view).all() for view in views):
        raise FeaturesNotFinite("The backbone's features are not finite: its weights are damaged. Load another model.")
    kernel, bias, strength = _fit_regression(views, labels, parts.logits.units, seed, class_weights, groups)
    parts.logits.set_weights([kernel, bias])
    return strength


def cross_validate(
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    number: int,
    seed: int,
    unlearnt: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the out-of-fold probabilities of the regression for each image, float64 `(images, number)`.

    One strength is chosen on all images. Each of five folds has its share of every class, and whole groups.

    Args:
        views: the features of the images, and optionally of their mirror images, each float32 `(images, channels)`. An
            image's probabilities are the mean over its views.
        labels: as in `initialize_head`.
        number: of classes.
        seed: of the folds.
        unlearnt: positions of images to predict without learning from them, unless a fold has no others.
        groups: of the images, from `number_groups`; None without groups.

    Raises:
        UserError: each class lies in one group.
    """
    refuse_lone_classes(labels, groups, number, "Cross-validation")
    scaled, images = _scale_views(views), len(labels)
    usable = np.setdiff1d(np.arange(images), [] if unlearnt is None else unlearnt)
    multi_label = labels.ndim == 2
    fit, link = (
        (_fit_labels, special.expit) if multi_label else (_fit_classes, functools.partial(special.softmax, axis=1))
    )
    fit = functools.partial(fit, tolerance=TOLERANCE if scaled.dtype == np.float64 else SINGLE_TOLERANCE)
    probabilities = np.zeros((images, number))
    targets = list(labels.T.astype(int)) if multi_label else [labels]
    with threadpool_limits(1):
        scaled, _ = _reduce_columns(scaled)
        strength = _choose_strength(scaled, targets, seed, usable, groups)
        folds = _deal_folds(labels, seed) if groups is None else deal_groups(labels, groups, number, FOLDS, seed)
        for learnt, held_out in _find_learnt(folds, usable, images):
            rows = np.concatenate([learnt + images * view for view in range(len(views))])
            repeated = np.concatenate([labels[learnt]] * len(views))
            kernel, bias = fit(scaled[rows], repeated, number, strength / len(views))
            for view in range(len(views)):
                probabilities[held_out] += link(_score(scaled[held_out + images * view], kernel, bias)) / len(views)
    return probabilities


def _find_learnt(
    folds: Sequence[np.ndarray], usable: np.ndarray, images: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for each fold the images to learn from, the usable ones or else all others, and its own images."""
    for held_out in folds:
        learnt = np.setdiff1d(usable, held_out)
        yield learnt if learnt.size else np.setdiff1d(np.arange(images), held_out), held_out


def _scale_views(views: Sequence[np.ndarray]) -> np.ndarray:
    """Returns all views below each other, centred on the mean of the first, at a scale of 1."""
    # In float32 the fit may miss its tolerance; with many images float64 takes gigabytes.
    kind = np.float64 if sum(view.size for view in views) <= MOST_DOUBLED else np.float32
    scaled = np.concatenate(views).astype(kind, copy=False)
    scaled -= views[0].mean(axis=0, dtype=np.float64).astype(kind)
    scaled /= np.sqrt(np.vdot(scaled, scaled) / scaled.size) or 1.0
    return scaled


def _deal_folds(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Assigns images to folds so that each has its share of every class, or multi-label of every set of labels."""
    keys = labels if labels.ndim == 1 else np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    order = np.random.default_rng(seed).permutation(len(keys))
    # Sorted by class, and in random order within each, they go to the folds in turns.
    order = order[np.argsort(keys[order], kind="stable")]
    return [np.sort(order[fold::FOLDS]) for fold in range(min(FOLDS, len(order)))]


def _fit_regression(
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    number: int,
    seed: int,
    class_weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fits the regression to all views, with a strength chosen on the first; returns kernel, bias, strength."""
    multi_label = labels.ndim == 2
    # One scale for all channels: the grid of strengths then suits every backbone.
    mean = views[0].mean(axis=0, dtype=np.float64)
    scaled = np.concatenate(views) - mean
    scale = np.sqrt(np.mean(scaled**2)) or 1.0
    scaled /= scale
    # The matrices are small: the threads of BLAS would wait for each other.
    with threadpool_limits(1):
        scaled, directions = _reduce_columns(scaled)
        targets = list(labels.T.astype(int)) if multi_label else [labels]
        strength = _choose_strength(scaled[: len(labels)], targets, seed, groups=groups)
        fit = _fit_labels if multi_label else functools.partial(_fit_classes, class_weights=class_weights)
        # The loss is a sum over rows: a share of C is the weight of a row.
        repeated = np.concatenate([labels] * len(views))
        kernel, bias = fit(scaled, repeated, number, strength / len(views))
    kernel = directions @ kernel / scale
    return kernel, bias - mean @ kernel, strength


def _split(model: keras.Model) -> Parts:
    advice = "Set head_epochs to 0 and head_initialization to random."
    return split_model(model, "Training the head alone", advice)


def _reduce_columns(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotates features into no more columns than images: the fit is the same, and many times faster.

    Returns:
        Features `(images, columns)`, and the matrix `(channels, columns)` that maps kernels back.
    """
    if len(features) >= features.shape[1]:
        return features, np.eye(features.shape[1])
    left, sizes, right = np.linalg.svd(features, full_matrices=False)
    return left * sizes, right.T


def _choose_strength(
    features: np.ndarray,
    targets: Sequence[np.ndarray],
    seed: int,
    usable: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> float:
    """Returns the strength with the lowest mean log loss over the folds of all targets, each int `(images,)`.

    Only `usable` rows are compared, if given. Each group of images is in one fold.
    """
    usable = np.arange(len(features)) if usable is None else usable
    # The best strength does not depend on the number of images: it is the variance of the kernel's prior.
    rows = np.random.default_rng(seed).permutation(usable)[:MOST_COMPARED_IMAGES]
    groups = pick_groups(groups, rows)
    trials = [trial for target in targets for trial in _make_trials(features[rows], target[rows], seed, groups)]
    if not trials:
        return USUAL_STRENGTH
    losses = []
    with show_progress(len(STRENGTHS) * len(trials), "Comparing strengths", delay=1, unit="fit") as progress:
        for strength in STRENGTHS:
            of_trials = []
            for trial in trials:
                of_trials.append(trial(strength))
                progress.update()
            losses.append(np.mean(of_trials))
            # Once the loss rises, it keeps rising, and weaker regularisation takes longest to fit.
            if losses[-1] > min(losses):
                break
    return float(STRENGTHS[np.argmin(losses)])


def _make_trials(
    features: np.ndarray, target: np.ndarray, seed: int, groups: np.ndarray | None
) -> list[Callable[[float], float]]:
    """Returns a function for each fold, from a strength to its log loss, starting from the previous solution."""
    pairs = _split_images(target, seed) if groups is None else _split_groups(target, groups, seed)

    def try_fold(regression: LogisticRegression, learnt: np.ndarray, held_out: np.ndarray, strength: float) -> float:
        regression.set_params(C=strength).fit(features[learnt], target[learnt])
        probabilities = regression.predict_proba(features[held_out])
        columns = np.searchsorted(regression.classes_, target[held_out])
        # Scikit-learn's log_loss gives the same, but takes longer than the fit.
        least = np.finfo(probabilities.dtype).eps
        return -np.log(np.clip(probabilities[np.arange(len(columns)), columns], least, 1 - least)).mean()

    return [functools.partial(try_fold, _build_regression(tol=1e-3), *pair) for pair in pairs]


def _split_images(target: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the images to learn from and to hold out for each fold; empty with too few images."""
    _, positions, counts = np.unique(target, return_inverse=True, return_counts=True)
    if (counts > 1).sum() < 2:
        return []
    # The only image of a class is never held out: without it the class would be unknown.
    is_single = counts[positions] == 1
    several, singles = np.flatnonzero(~is_single), np.flatnonzero(is_single)
    folds = StratifiedKFold(min(FOLDS, int(counts.max())), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        pairs = list(folds.split(several, target[several]))
    return [(np.concatenate([several[learnt], singles]), several[held_out]) for learnt, held_out in pairs]


def _split_groups(target: np.ndarray, groups: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the images to learn from and to hold out for each fold, in whole groups; empty with too few groups."""
    classes, positions = np.unique(target, return_inverse=True)
    # The only group of a class is never held out, nor are its images of other classes.
    lone = find_lone_classes(positions, groups, len(classes))
    several = np.flatnonzero(~np.isin(groups, groups[np.isin(positions, lone)]))
    _, numbers = np.unique(groups[several], return_inverse=True)
    if len(np.unique(positions[several])) < 2 or numbers.max() == 0:
        return []
    pairs = []
    for fold in deal_groups(positions[several], numbers, len(classes), FOLDS, seed):
        held_out = several[fold]
        learnt = np.setdiff1d(np.arange(len(target)), held_out)
        # With few groups, a fold may hold out all learnable images of a class.
        held_out = held_out[np.isin(target[held_out], target[learnt])]
        if held_out.size and len(np.unique(target[learnt])) > 1:
            pairs.append((learnt, held_out))
    return pairs


def _build_regression(**options: Any) -> LogisticRegression:
    # lbfgs takes ten times as long with weak regularisation, newton-cholesky with several classes.
    return LogisticRegression(solver="newton-cg", max_iter=1000, warm_start=True, **options)


def _fit_classes(
    features: np.ndarray,
    labels: np.ndarray,
    number: int,
    strength: float,
    tolerance: float = TOLERANCE,
    class_weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fits one regression to labels `(images,)`; returns kernel `(columns, number)` and bias `(number,)`."""
    counts = np.bincount(labels, minlength=number)
    kernel, bias = np.zeros((features.shape[1], number)), np.log((counts + 1) / (len(labels) + number))
    known = np.flatnonzero(counts)
    if len(known) == 1:
        return kernel, bias
    weights = None if class_weights is None else class_weights[labels]
    regression = _build_regression(C=strength, tol=tolerance).fit(features, labels, sample_weight=weights)
    # Two classes have one score: half of it for one class, half against the other.
    signs = np.array([[-0.5], [0.5]]) if len(known) == 2 else 1.0
    kernel[:, known] = (regression.coef_ * signs).T
    scores = _score(features, kernel[:, known], regression.intercept_ * np.ravel(signs))
    bias += special.logsumexp(scores, axis=1).mean()
    bias[known] = regression.intercept_ * np.ravel(signs)
    return kernel, bias


def _score(features: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Returns logits; the kernel is cast, since casting the features would copy them."""
    return features @ kernel.astype(features.dtype) + bias


def _fit_labels(
    features: np.ndarray, labels: np.ndarray, number: int, strength: float, tolerance: float = TOLERANCE
) -> tuple[np.ndarray, np.ndarray]:
    """Fits a regression to each column of labels; returns as `_fit_classes` does."""
    present = labels.sum(axis=0)
    kernel, bias = np.zeros((features.shape[1], number)), np.log((present + 1) / (len(labels) - present + 1))
    for position in np.flatnonzero((present > 0) & (present < len(labels))):
        regression = _build_regression(C=strength, tol=tolerance).fit(features, labels[:, position].astype(int))
        kernel[:, position], bias[position] = regression.coef_[0], regression.intercept_[0]
    return kernel, bias
