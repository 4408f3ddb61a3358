"""The registry of optimizers, weight decay, and compiling a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
from keras import optimizers

from configs import ADAM_BETA_2, ADAM_EPSILON, Configs
from finetune.core.arguments import look_up
from finetune.core.options import UserError
from finetune.models.backbones import leaf_layers


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
