"""Losses, and the weights that balance classes in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np

from configs import Configs
from finetune.core.arguments import look_up, take_flag, take_labels, take_number, take_table
from finetune.core.options import UserError


class Losses(NamedTuple):
    """A run's losses of `(labels, probabilities)`, each `(batch,)`: one number an image.

    Attributes:
        training: of labels as batches have them: weighted by class, smoothed and focused as the configs say.
        validation: of the true labels; what selects the best model does not change with the way of training.
    """

    training: Callable
    validation: Callable


def find_loss(name: str, multi_label: bool) -> Callable[[np.ndarray, float], Callable]:
    """Returns what builds a loss of the registry in one of the modes.

    Raises:
        UserError: there is no such loss, or not in this mode.
    """
    entry = look_up(LOSSES, "loss", name)
    build = entry.multi_label if multi_label else entry.single_label
    if build is None:
        raise UserError(
            f"loss: {name} is only for multi_label_classification {not multi_label}. Received: {name} with "
            f"multi_label_classification {multi_label}. Choose cross_entropy, or change that."
        )
    return build


def get_losses(configs: Configs, labels: np.ndarray) -> Losses:
    """Chooses the losses of the mode and balances the classes, where `use_class_balancing` says so.

    Args:
        configs: with `classes` resolved.
        labels: of the training images, as the generator has them: int `(images,)`, or multi-label `(images, classes)`.

    Returns:
        Functions of labels and probabilities `(batch, classes)`. The validation loss is the plain cross-entropy in
        single-label mode, and in multi-label mode the one weighted by class.

    Raises:
        UserError: `loss` is one of the other mode.
    """
    build = find_loss(configs.loss, configs.multi_label_classification)
    if configs.multi_label_classification:
        weights = get_multilabel_class_weights(labels, configs.positive_weights_multiply, configs.use_class_balancing)
        return Losses(build(weights, configs.label_smoothing), weighted_binary_crossentropy(weights))
    class_weights = np.ones(len(configs.classes), np.float32)
    if configs.use_class_balancing:
        class_weights[:] = list(get_class_weights(labels, len(configs.classes)).values())
    return Losses(build(class_weights, configs.label_smoothing), keras.losses.sparse_categorical_crossentropy)


def weighted_crossentropy(class_weights: np.ndarray, label_smoothing: float = 0.0) -> Callable:
    """Returns a loss: the cross-entropy of single labels, times the weight of the image's class.

    Its labels are int `(batch,)`, or float `(batch, classes)` of shares that add up to 1: an image of several classes
    has the mean of their weights by its shares. Smoothing does not change the weights.

    Source of smoothing: Szegedy et al., CVPR 2016, section 7 (arXiv:1512.00567).

    Args:
        class_weights: float32 `(classes,)`.
        label_smoothing: the share of each label, in `[0, 1)`, that is spread evenly over all classes.
    """

    def loss(y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Returns the loss of each image, `(batch,)`."""
        # Keras's own functions find the logits behind the probabilities, which keep their gradients at certainty.
        if len(y_true.shape) == 1:
            positions = keras.ops.cast(y_true, "int32")
            weights = keras.ops.take(class_weights, positions)
            if not label_smoothing:
                return weights * keras.losses.sparse_categorical_crossentropy(positions, y_pred)
            y_true = keras.ops.one_hot(positions, len(class_weights))
        else:
            weights = keras.ops.sum(keras.ops.cast(y_true, "float32") * class_weights, axis=-1)
        return weights * keras.losses.categorical_crossentropy(y_true, y_pred, label_smoothing=label_smoothing)

    return loss


def weighted_binary_crossentropy(
    class_weights: np.ndarray,
    label_smoothing: float = 0.0,
    gamma_present: float = 0.0,
    gamma_absent: float = 0.0,
    margin: float = 0.0,
) -> Callable:
    """Returns a loss: the mean over classes of the binary cross-entropy, weighted by class and presence.

    With `p` the probability and `q = max(p - margin, 0)`, a present label costs `-(1 - p)^gamma_present log(p)`, and an
    absent one `-q^gamma_absent log(1 - q)`: what is easy already counts less, or below the margin nothing.

    Source: the focal loss has one gamma and no margin, Lin et al., ICCV 2017, eq. 4 (arXiv:1708.02002), here with the
    class weights in the place of its alpha; the asymmetric loss is that of Ridnik et al., ICCV 2021 (arXiv:2009.14119).

    Args:
        class_weights: float32 `(2, classes)`, for absent and present labels.
        label_smoothing: the share of each label, in `[0, 1)`, that is spread evenly over all classes: an image's labels
            add up to their number still, as in `weighted_crossentropy`.
        gamma_present: from 0 on; 0 is the plain cross-entropy.
        gamma_absent: likewise.
        margin: in `[0, 1)`.
    """

    def loss(y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        """Returns the loss of each image, `(batch,)`."""
        y_pred = keras.ops.clip(y_pred, keras.config.epsilon(), 1 - keras.config.epsilon())
        y_true = keras.ops.cast(y_true, y_pred.dtype)
        if label_smoothing:
            spread = keras.ops.mean(y_true, axis=-1, keepdims=True)
            y_true = y_true * (1 - label_smoothing) + spread * label_smoothing
        shifted = keras.ops.maximum(y_pred - margin, 0.0) if margin else y_pred
        present = class_weights[1] * y_true * keras.ops.log(y_pred)
        absent = class_weights[0] * (1 - y_true) * keras.ops.log(1 - shifted)
        # A power of 0 has no gradient where its base is 0, as it is below the margin.
        present = present * (1 - y_pred) ** gamma_present if gamma_present else present
        absent = absent * shifted**gamma_absent if gamma_absent else absent
        return -keras.ops.mean(present + absent, axis=-1)

    return loss


class Loss(NamedTuple):
    """An entry of the registry: functions from class weights and label smoothing to a loss `(batch,)`, by mode.

    None where a mode has no such loss.
    """

    single_label: Callable[[np.ndarray, float], Callable] | None
    multi_label: Callable[[np.ndarray, float], Callable] | None


# The numbers are those of the papers.
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(weighted_crossentropy, weighted_binary_crossentropy),
    "focal": Loss(None, functools.partial(weighted_binary_crossentropy, gamma_present=2.0, gamma_absent=2.0)),
    "asymmetric": Loss(None, functools.partial(weighted_binary_crossentropy, gamma_absent=4.0, margin=0.05)),
}


def get_class_weights(labels: np.ndarray, number_of_classes: int) -> dict[int, float]:
    """Weighs rare classes more in the loss, by the logarithm of their inverse frequency.

    A class with the mean number of images or more weighs 1, one with a fraction `f` of the mean `1 + ln(1 / f)`.

    Args:
        labels: int `(images,)`, class positions.
        number_of_classes: classes in total; one without images weighs 1.

    Returns:
        The weight, never under 1, of each class position.

    Raises:
        UserError: a label is no class position.
    """
    labels = take_labels("labels", labels, take_number("number_of_classes", number_of_classes))
    counts = np.bincount(labels, minlength=number_of_classes)
    weights = damped_inverse(counts, np.full(number_of_classes, len(labels) / number_of_classes))
    return dict(enumerate(weights.tolist()))


def get_multilabel_class_weights(
    labels: np.ndarray, positive_weights_multiply: float = 1.0, balance: bool = True
) -> np.ndarray:
    """Weighs the rarer of present and absent more in each class's binary cross-entropy.

    Args:
        labels: `(images, classes)` of zeros and ones.
        positive_weights_multiply: multiplies the weight of the labels that are present.
        balance: False leaves the weights at 1, times `positive_weights_multiply`.

    Returns:
        float32 `(2, classes)`: the weights of an absent and of a present label.

    Raises:
        UserError: the labels are not zeros and ones, or the factor is not above 0.
    """
    labels = take_table("labels", labels, is_binary=True)
    balance = take_flag("balance", balance)
    Configs.check_values(positive_weights_multiply=positive_weights_multiply)
    positives = labels.sum(axis=0)
    negatives = len(labels) - positives
    if balance:
        weights = np.stack([damped_inverse(negatives, positives), damped_inverse(positives, negatives)])
    else:
        weights = np.ones((2, labels.shape[1]))
    return (weights * [[1.0], [positive_weights_multiply]]).astype(np.float32)


def damped_inverse(counts: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns `1 + ln(reference / counts)` where that is above 1 and both are above 0, else 1; float64."""
    known = (counts > 0) & (reference > 0)
    ratio = np.where(known, reference, 1) / np.where(known, counts, 1)
    return 1 + np.log(np.maximum(ratio, 1))
