"""The head on a frozen backbone's features: logistic regression, its strength by cross-validation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from scipy import special
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from finetune.core.options import UserError
from finetune.core.texts import show_progress
from finetune.data.groups import deal_groups, find_lone_classes, pick_groups, refuse_lone_classes
from finetune.models.features import read_plainly
from finetune.models.heads import Parts, compute_logit_inputs, has_parts, list_kernels, split_model
from finetune.training.trainer import TrainingModel
from generator import AugmentedImageSequence, naming_bad_images

# The strengths C that are compared: half decades, the strongest regularisation first.
STRENGTHS = 10.0 ** np.arange(-2.5, 1.25, 0.5)
# Where no class has images enough to compare: what photos' features of MobileNet prefer.
USUAL_STRENGTH = 10.0**-1.5
FOLDS = 5
MOST_COMPARED_IMAGES = 2000
# Numbers that are computed with in double precision out of fold: 256 MiB.
MOST_DOUBLED = 2**25
# How near to its end a regression is fitted, and in single precision, which comes no nearer.
TOLERANCE, SINGLE_TOLERANCE = 1e-7, 1e-4


class FeaturesNotFinite(UserError):
    """A backbone has no regression: its features are infinite or not numbers."""


def compute_features(
    model: keras.Model, sequence: AugmentedImageSequence, mirrored: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Computes once what the head sees of each image, while the backbone is frozen; in the scope of a strategy.

    Args:
        model: a model of this collection.
        sequence: its images are read without augmentation. Under `skip_bad_images` those that cannot be read are
            noted in its `bad_images`.
        mirrored: take the mirror images.

    Returns:
        What the pooling gives, float32 `(images, channels)` in the order of `paths`, and which images could be read,
        bool `(images,)`; the rows of the others are NaN. The devices that train together share the work.

    Raises:
        UserError: an image cannot be read, or the model has no head.
    """
    return extract_features(build_extractor(model, mirrored), sequence, mirrored)


def extract_features(
    extractor: TrainingModel, sequence: AugmentedImageSequence, mirrored: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Computes features as `compute_features` does, by what `build_extractor` returns."""
    plain = read_plainly(sequence, extractor.input_shape[1:3])
    with naming_bad_images(plain):
        known, is_read = extractor.predict_sequence(plain, "Features of the mirror images" if mirrored else "Features")
    features = np.full((len(is_read), known.shape[1]), np.nan, np.float32)
    features[is_read] = known
    sequence.bad_images.update(plain.bad_images)
    return features, is_read


def build_extractor(model: keras.Model, mirrored: bool = False) -> TrainingModel:
    """Returns the part of a model that gives what its head sees, `(batch, channels)`, of images or mirror images.

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
    """Returns the part of a model behind its pooling, from features `(batch, channels)` to probabilities.

    It shares the model's layers: to train it is to train them.

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
    """Tells whether `initialize_head` takes a model: its head has no kernels before the logits."""
    return has_parts(model) and not list_kernels(_split(model))


def initialize_head(
    model: keras.Model,
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    seed: int,
    class_weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> float:
    """Makes a model's head the logistic regression on the backbone's features: it starts from the best answers
    that a frozen backbone allows, where a random one would first pull the backbone's weights apart.

    Single-label: one multinomial regression; a class without images keeps its smoothed frequency. Multi-label: one
    regression a label; a label that no image has, or every one, keeps its smoothed frequency whatever the features.
    How strongly the kernels are drawn to zero is chosen by the log loss in stratified cross-validation.

    Source: Kumar et al., ICLR 2022 (arXiv:2202.10054).

    Args:
        model: its layer `logits` is changed; what the head has before that learns no kernels.
        views: the features of the images that could be read, float32 `(images, channels)` as `compute_features` gives
            them, and perhaps those of their mirror images: each image then counts half as itself and half as that.
            The mirror images have no part in the choice of the strength.
        labels: int `(images,)`, or multi-label `(images, classes)` of zeros and ones.
        seed: of the cross-validation's folds.
        class_weights: single-label, `(classes,)`: how much an image of each class counts in the loss. They have no part
            in that choice either.
        groups: of the images, as `number_groups` gives them: no fold has images of a group that another has.

    Returns:
        The strength C, the variance of the kernels' prior on features of variance 1.

    Raises:
        UserError: the head has hidden layers, or (`FeaturesNotFinite`) a feature is not finite.
    """
    parts = _refuse_kernels(_split(model))
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
    """Returns what the regression says of each image that was fitted without that image: probabilities out of fold.

    The strength is that which all images prefer. Of five folds each has its share of every class, and whole groups.

    Args:
        views: the features of the images, and of their mirror images or not, each float32 `(images, channels)`. An
            image's answer is the mean over its views.
        labels: as `initialize_head` takes them.
        number: of classes.
        seed: of the folds.
        unlearnt: positions of images that are answered for as the others, and never learnt from unless a fold has
            nothing else to learn from.
        groups: of the images, as `number_groups` gives them; None: no images belong together.

    Returns:
        float64 `(images, number)`.

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
    """Yields for each fold the images that are learnt from, and its own; where none is usable, all others."""
    for held_out in folds:
        learnt = np.setdiff1d(usable, held_out)
        yield learnt if learnt.size else np.setdiff1d(np.arange(images), held_out), held_out


def _scale_views(views: Sequence[np.ndarray]) -> np.ndarray:
    """Returns all views below each other, around the mean of the first, at a scale of 1."""
    # In float32 the search for the best weights may end short of its tolerance; of many images float64 takes gigabytes.
    kind = np.float64 if sum(view.size for view in views) <= MOST_DOUBLED else np.float32
    scaled = np.concatenate(views).astype(kind, copy=False)
    scaled -= views[0].mean(axis=0, dtype=np.float64).astype(kind)
    scaled /= np.sqrt(np.vdot(scaled, scaled) / scaled.size) or 1.0
    return scaled


def _deal_folds(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Deals images out to folds so that each has its share of every class, of several labels of every set of labels."""
    keys = labels if labels.ndim == 1 else np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    order = np.random.default_rng(seed).permutation(len(keys))
    # In the order of their classes, and at random within each, they go to the folds in turns.
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
    """Fits the regression to all views together, its strength chosen on the first; returns kernel, bias, strength."""
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
    """Returns a model's parts; raises UserError where it has none."""
    advice = "Set head_epochs to 0 and head_initialization to random."
    return split_model(model, "Training the head alone", advice)


def _refuse_kernels(parts: Parts) -> Parts:
    """Returns the parts; raises UserError where the head has kernels before its logits."""
    if kernels := list_kernels(parts):
        shown = ", ".join(f"{layer.units} units" if hasattr(layer, "units") else layer.name for layer in kernels)
        raise UserError(
            f"head_initialization linear_probe: expected a head without hidden layers. Received: {shown}. Leave sizes "
            "of 1 and more out of classifier_layer_sizes, or set head_initialization to random."
        )
    return parts


def _reduce_columns(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns features so that they need no more columns than there are images.

    A regression's kernel lies in the space that its images span: in fewer columns the solution is the same, and comes
    many times faster.

    Returns:
        Features `(images, columns)`, and the matrix `(channels, columns)` that leads kernels back.
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
    """Chooses the strength with the lowest mean log loss over the folds of all targets, each int `(images,)`.

    Where `usable` is given, only these rows are compared. Each group of images is in one fold.
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
            # Once it rises it goes on rising, and weak regularisation takes the longest to compute.
            if losses[-1] > min(losses):
                break
    return float(STRENGTHS[np.argmin(losses)])


def _make_trials(
    features: np.ndarray, target: np.ndarray, seed: int, groups: np.ndarray | None
) -> list[Callable[[float], float]]:
    """Returns for each fold a function from a strength to the log loss of the fold's images; none for too few images.

    Each goes on from the solution of the strength before.
    """
    pairs = _split_images(target, seed) if groups is None else _split_groups(target, groups, seed)

    def try_fold(regression: LogisticRegression, learnt: np.ndarray, held_out: np.ndarray, strength: float) -> float:
        regression.set_params(C=strength).fit(features[learnt], target[learnt])
        probabilities = regression.predict_proba(features[held_out])
        return log_loss(target[held_out], probabilities, labels=regression.classes_)

    return [functools.partial(try_fold, _build_regression(tol=1e-3), *pair) for pair in pairs]


def _split_images(target: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns for each fold which images are learnt from, and which are held out; none for too few images."""
    _, positions, counts = np.unique(target, return_inverse=True, return_counts=True)
    if (counts > 1).sum() < 2:
        return []
    # The only image of a class is always learnt from: without it the class would be unknown.
    is_single = counts[positions] == 1
    several, singles = np.flatnonzero(~is_single), np.flatnonzero(is_single)
    folds = StratifiedKFold(min(FOLDS, int(counts.max())), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class of fewer images than folds is in as many of them as it has images.
        warnings.filterwarnings("ignore", "The least populated class")
        pairs = list(folds.split(several, target[several]))
    return [(np.concatenate([several[learnt], singles]), several[held_out]) for learnt, held_out in pairs]


def _split_groups(target: np.ndarray, groups: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns for each fold which images are learnt from, and which are held out, whole groups; none for too few."""
    classes, positions = np.unique(target, return_inverse=True)
    # The only group of a class is always learnt from, with all that it has of others.
    lone = find_lone_classes(positions, groups, len(classes))
    several = np.flatnonzero(~np.isin(groups, groups[np.isin(positions, lone)]))
    _, numbers = np.unique(groups[several], return_inverse=True)
    if len(np.unique(positions[several])) < 2 or numbers.max() == 0:
        return []
    pairs = []
    for fold in deal_groups(positions[several], numbers, len(classes), FOLDS, seed):
        held_out = several[fold]
        learnt = np.setdiff1d(np.arange(len(target)), held_out)
        # Folds may leave a class nothing to be known by where there are as few groups as that.
        held_out = held_out[np.isin(target[held_out], target[learnt])]
        if held_out.size and len(np.unique(target[learnt])) > 1:
            pairs.append((learnt, held_out))
    return pairs


def _build_regression(**options: Any) -> LogisticRegression:
    # lbfgs takes ten times as long where the regularisation is weak, newton-cholesky where the classes are several.
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
    # Of two classes it gives one score: half of it for the one, and half against the other.
    signs = np.array([[-0.5], [0.5]]) if len(known) == 2 else 1.0
    kernel[:, known] = (regression.coef_ * signs).T
    scores = _score(features, kernel[:, known], regression.intercept_ * np.ravel(signs))
    bias += special.logsumexp(scores, axis=1).mean()
    bias[known] = regression.intercept_ * np.ravel(signs)
    return kernel, bias


def _score(features: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Returns logits; the kernel takes the features' type, not these the kernel's, which would copy them."""
    return features @ kernel.astype(features.dtype) + bias


def _fit_labels(
    features: np.ndarray, labels: np.ndarray, number: int, strength: float, tolerance: float = TOLERANCE
) -> tuple[np.ndarray, np.ndarray]:
    """Fits a regression to each column of labels; returns kernel `(columns, number)` and bias `(number,)`."""
    present = labels.sum(axis=0)
    kernel, bias = np.zeros((features.shape[1], number)), np.log((present + 1) / (len(labels) - present + 1))
    for position in np.flatnonzero((present > 0) & (present < len(labels))):
        regression = _build_regression(C=strength, tol=tolerance).fit(features, labels[:, position].astype(int))
        kernel[:, position], bias[position] = regression.coef_[0], regression.intercept_[0]
    return kernel, bias
