"""What a model is compiled with: the registries of losses and optimizers, class weights and weight decay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np
from keras import optimizers

from configs import ADAM_BETA_2, ADAM_EPSILON, Configs
from finetune.core.arguments import look_up, take_flag, take_labels, take_number, take_table
from finetune.core.options import UserError
from finetune.models.backbones import leaf_layers


class Losses(NamedTuple):
    """A run's losses: functions of `(labels, probabilities)` that return one number per image, `(batch,)`.

    Attributes:
        training: with class weights, smoothing and focus from the configs.
        validation: without smoothing and focus, so that it does not depend on how the model is trained.
    """

    training: Callable
    validation: Callable


def find_loss(name: str, multi_label: bool) -> Callable[[np.ndarray, float], Callable]:
    """Returns the builder of a loss; raises UserError if there is none of this name or not in this mode."""
    entry = look_up(LOSSES, "loss", name)
    build = entry.multi_label if multi_label else entry.single_label
    if build is None:
        raise UserError(
            f"loss: {name} is only for multi_label_classification {not multi_label}. Received: {name} with "
            f"multi_label_classification {multi_label}. Set loss to cross_entropy, or change the mode."
        )
    return build


def get_losses(configs: Configs, labels: np.ndarray) -> Losses:
    """Returns the losses of the mode, with class weights from the training labels if `use_class_balancing` is set.

    The validation loss is the cross-entropy, plain for single labels and weighted by class for multiple labels.

    Args:
        configs: with `classes` resolved.
        labels: of the training images: int `(images,)`, or multi-label `(images, classes)`.

    Raises:
        UserError: `loss` belongs to the other mode.
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
    """Returns the cross-entropy of single labels, times the weight of the image's class.

    Labels are int `(batch,)`, or shares that add up to 1, float `(batch, classes)`. An image of several classes has the
    mean of their weights by its shares. Smoothing does not change the weights.

    Source of smoothing: Szegedy et al., CVPR 2016, section 7 (arXiv:1512.00567).

    Args:
        class_weights: float32 `(classes,)`.
        label_smoothing: the share of each label, in `[0, 1)`, to spread evenly over all classes.
    """

    def loss(y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        # Keras's functions find the logits behind the probabilities; their gradients don't vanish at certainty.
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
    """Returns the mean over classes of the binary cross-entropy, weighted by class and presence.

    With `p` the probability and `q = max(p - margin, 0)`, a present label costs `-(1 - p)^gamma_present log(p)`, and an
    absent one `-q^gamma_absent log(1 - q)`. So easy labels count less, and absent labels below the margin not at all.

    Source: the focal loss (one gamma, no margin) is Lin et al., ICCV 2017, eq. 4 (arXiv:1708.02002), with class weights
    instead of its alpha; the asymmetric loss is Ridnik et al., ICCV 2021 (arXiv:2009.14119).

    Args:
        class_weights: float32 `(2, classes)`, for absent and present labels.
        label_smoothing: the share of each label, in `[0, 1)`, to spread evenly over all classes. The sum of an image's
            labels stays the same.
        gamma_present: 0 or more; 0 is the plain cross-entropy.
        gamma_absent: 0 or more.
        margin: in `[0, 1)`.
    """

    def loss(y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        y_pred = keras.ops.clip(y_pred, keras.config.epsilon(), 1 - keras.config.epsilon())
        y_true = keras.ops.cast(y_true, y_pred.dtype)
        if label_smoothing:
            spread = keras.ops.mean(y_true, axis=-1, keepdims=True)
            y_true = y_true * (1 - label_smoothing) + spread * label_smoothing
        shifted = keras.ops.maximum(y_pred - margin, 0.0) if margin else y_pred
        present = class_weights[1] * y_true * keras.ops.log(y_pred)
        absent = class_weights[0] * (1 - y_true) * keras.ops.log(1 - shifted)
        # A power of 0 has no gradient at base 0, which absent labels below the margin have.
        present = present * (1 - y_pred) ** gamma_present if gamma_present else present
        absent = absent * shifted**gamma_absent if gamma_absent else absent
        return -keras.ops.mean(present + absent, axis=-1)

    return loss


class Loss(NamedTuple):
    """A registered loss: by mode, a function that builds it from class weights and label smoothing, or None."""

    single_label: Callable[[np.ndarray, float], Callable] | None
    multi_label: Callable[[np.ndarray, float], Callable] | None


# With the papers' numbers.
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(weighted_crossentropy, weighted_binary_crossentropy),
    "focal": Loss(None, functools.partial(weighted_binary_crossentropy, gamma_present=2.0, gamma_absent=2.0)),
    "asymmetric": Loss(None, functools.partial(weighted_binary_crossentropy, gamma_absent=4.0, margin=0.05)),
}


def get_class_weights(labels: np.ndarray, number_of_classes: int) -> dict[int, float]:
    """Returns the weight of each class position in the loss: rare classes weigh more.

    A class with a fraction `f` of the mean number of images weighs `1 + ln(1 / f)`. Classes with the mean number or
    more, or without images, weigh 1.

    Args:
        labels: int `(images,)`, class positions.
        number_of_classes: in total.

    Raises:
        UserError: a label is not a class position.
    """
    labels = take_labels("labels", labels, take_number("number_of_classes", number_of_classes))
    counts = np.bincount(labels, minlength=number_of_classes)
    weights = damped_inverse(counts, np.full(number_of_classes, len(labels) / number_of_classes))
    return dict(enumerate(weights.tolist()))


def get_multilabel_class_weights(
    labels: np.ndarray, positive_weights_multiply: float = 1.0, balance: bool = True
) -> np.ndarray:
    """Returns the weights of absent and present labels, float32 `(2, classes)`: the rarer of the two weighs more.

    Args:
        labels: zeros and ones, `(images, classes)`.
        positive_weights_multiply: factor for the weights of present labels.
        balance: False starts from weights of 1.

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
    """Returns `1 + ln(reference / counts)`, float64, or 1 if that is less or if one of the two is 0."""
    known = (counts > 0) & (reference > 0)
    ratio = np.where(known, reference, 1) / np.where(known, counts, 1)
    return 1 + np.log(np.maximum(ratio, 1))


class Optimizer(NamedTuple):
    """A registered optimizer.

    Attributes:
        build: takes `learning_rate`, `weight_decay` if it is not 0, and the arguments in `takes`.
        takes: arguments of `build` by the options that only some optimizers have.
    """

    build: Callable[..., optimizers.Optimizer]
    takes: Mapping[str, str] = {}


ADAM_OPTIONS = {"adam_beta_2": "beta_2", "adam_epsilon": "epsilon"}
OPTIMIZERS: dict[str, Optimizer] = {
    "Adam": Optimizer(optimizers.Adam, ADAM_OPTIONS),
    "Adamax": Optimizer(optimizers.Adamax, ADAM_OPTIONS),
    "Nadam": Optimizer(optimizers.Nadam, ADAM_OPTIONS),
    "AdamW": Optimizer(optimizers.AdamW, ADAM_OPTIONS),
    "SGD": Optimizer(optimizers.SGD),
    "RMSprop": Optimizer(optimizers.RMSprop),
    "Adagrad": Optimizer(optimizers.Adagrad),
    "Adadelta": Optimizer(optimizers.Adadelta),
    "Lion": Optimizer(optimizers.Lion),
}


def get_optimizer(
    optimizer_type: str,
    learning_rate: float,
    weight_decay: float = 0.0,
    ema_decay: float = 0.0,
    adam_beta_2: float = ADAM_BETA_2,
    adam_epsilon: float = ADAM_EPSILON,
) -> keras.optimizers.Optimizer:
    """Builds a Keras optimizer.

    Args:
        optimizer_type: a key of `OPTIMIZERS`.
        learning_rate: above 0, or a Keras schedule.
        weight_decay: decoupled from the gradients, in `[0, 1)`: each step subtracts it times the learning rate from the
            weights. Loshchilov and Hutter, ICLR 2019 (arXiv:1711.05101). See `exclude_from_weight_decay`.
        ema_decay: decay of the moving average of the weights, in `[0, 1)`; 0 keeps no average.
        adam_beta_2: decay of the squared gradients' average, in `[0, 0.9999]`, for the Adam family alone. Kingma and
            Ba, ICLR 2015 (arXiv:1412.6980), algorithm 1.
        adam_epsilon: 1e-12 or more; the `epsilon hat` of their section 2. In the first steps it dampens more than the
            epsilon of algorithm 1 and of PyTorch.

    Raises:
        UserError: a value is invalid.
    """
    entry = look_up(OPTIMIZERS, "optimizer_type", optimizer_type)
    values = Configs.check_values(
        weight_decay=weight_decay,
        ema_decay=ema_decay,
        adam_beta_2=adam_beta_2,
        adam_epsilon=adam_epsilon,
    )
    if not callable(learning_rate):
        learning_rate = Configs.check_values(learning_rate=learning_rate)["learning_rate"]
    # Keras's AdamW decays by default.
    options = {"weight_decay": weight_decay} if weight_decay or entry.build is optimizers.AdamW else {}
    options |= {argument: values[option] for option, argument in entry.takes.items()}
    if ema_decay:
        options |= {"use_ema": True, "ema_momentum": ema_decay, "ema_overwrite_frequency": None}
    return entry.build(learning_rate=learning_rate, **options)


def check_optimizer(configs: Configs) -> None:
    """Raises UserError if the optimizer is unknown, or does not take an option that is set."""
    takes = look_up(OPTIMIZERS, "optimizer_type", configs.optimizer_type).takes
    for option in ADAM_OPTIONS.keys() - takes.keys():
        if (value := getattr(configs, option)) != Configs.defaults()[option]:
            having = ", ".join(name for name, other in OPTIMIZERS.items() if option in other.takes)
            raise UserError(
                f"{option}: only for optimizer_type {having}. Received: {value} with optimizer_type "
                f"{configs.optimizer_type}. Leave {option} out, or set optimizer_type to one of them."
            )


def build_optimizer(configs: Configs) -> keras.optimizers.Optimizer:
    """Builds the optimizer of a run, by `get_optimizer`."""
    return get_optimizer(
        configs.optimizer_type,
        configs.learning_rate,
        configs.weight_decay,
        configs.ema_decay,
        configs.adam_beta_2,
        configs.adam_epsilon,
    )


def exclude_from_weight_decay(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Excludes biases and normalisation weights, which have fewer than two axes, from weight decay.

    A model file does not store this: call it again after loading, before the first step.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    optimizer.exclude_from_weight_decay([weight for weight in model.weights if len(weight.shape) < 2])


def find_averages(optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> list[keras.Variable]:
    """Returns an optimizer's moving averages of a model's variables, in the order of `variables`."""
    by_name = {variable.name: variable for variable in optimizer.variables}
    return [by_name[f"{variable.path.replace('/', '_')}_average"] for variable in variables]


def compile_model(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, multi_label: bool, loss: Callable | None = None
) -> keras.Model:
    """Compiles a model with the metric of its mode, and returns it.

    Args:
        model: with probabilities `(batch, classes)` as its output.
        optimizer: a new one, or one that has trained the model before.
        multi_label: the mode.
        loss: None takes the mode's cross-entropy from Keras.
    """
    stock, metric = "sparse_categorical_crossentropy", keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    if multi_label:
        stock = "binary_crossentropy"
        metric = keras.metrics.AUC(multi_label=True, num_labels=model.output_shape[-1], name="auroc")
    exclude_from_weight_decay(model, optimizer)
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if not scales and any(layer.compute_dtype == "float16" for layer in leaf_layers(model)):
        # In float16, small gradients would be zero.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, loss=loss or stock, weighted_metrics=[], metrics=[metric])
    return model
