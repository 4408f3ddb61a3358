"""Optimizers, which weights decay, and compiling a model with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
from keras import optimizers

from configs import ADAM_BETA_2, ADAM_EPSILON, Configs
from finetune.core.arguments import look_up
from finetune.core.options import UserError
from finetune.models.freezing import leaf_layers


class Optimizer(NamedTuple):
    """An entry of the registry.

    Attributes:
        build: takes `learning_rate`, `weight_decay` where that is not 0, and what `takes` names.
        takes: the arguments of `build` by the options that only some optimizers have.
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
    """Builds the Keras optimizer of that name.

    Args:
        optimizer_type: a key of `OPTIMIZERS`.
        learning_rate: above 0, or a schedule of Keras.
        weight_decay: in `[0, 1)`. Each step takes it times the learning rate away from the weights, apart from the
            gradients: Loshchilov and Hutter, ICLR 2019 (arXiv:1711.05101). See `exclude_from_weight_decay`.
        ema_decay: in `[0, 1)`: of the moving average of the weights that the optimizer keeps; 0 keeps none.
        adam_beta_2: in `[0, 0.9999]`, the decay of the squared gradients' average, of the Adam family
            alone: Kingma and Ba, ICLR 2015 (arXiv:1412.6980), algorithm 1.
        adam_epsilon: from 1e-12 on, what these add to the root of that average: the `epsilon hat` of section 2, which
            in the first steps holds back more than the epsilon of algorithm 1, and of PyTorch.

    Raises:
        UserError: a value is not as described.
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
    # Keras's AdamW has a decay of its own, and takes no None.
    options = {"weight_decay": weight_decay} if weight_decay or entry.build is optimizers.AdamW else {}
    options |= {argument: values[option] for option, argument in entry.takes.items()}
    if ema_decay:
        options |= {"use_ema": True, "ema_momentum": ema_decay, "ema_overwrite_frequency": None}
    return entry.build(learning_rate=learning_rate, **options)


def check_optimizer(configs: Configs) -> None:
    """Raises UserError where there is no such optimizer, or an option is set that it does not take."""
    takes = look_up(OPTIMIZERS, "optimizer_type", configs.optimizer_type).takes
    for option in ADAM_OPTIONS.keys() - takes.keys():
        if (value := getattr(configs, option)) != Configs.defaults()[option]:
            having = ", ".join(name for name, other in OPTIMIZERS.items() if option in other.takes)
            raise UserError(
                f"{option}: expected an optimizer_type that has it, one of {having}: set it, or leave this out. "
                f"Received: {value} with optimizer_type {configs.optimizer_type}."
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
    """Leaves biases and what normalisations learn without weight decay: all weights of fewer than two axes.

    A model file does not bring this back: to be called again after loading, before the first step.

    Args:
        model: whose weights the optimizer changes.
        optimizer: built or not.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    optimizer.exclude_from_weight_decay([weight for weight in model.weights if len(weight.shape) < 2])


def find_averages(optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> list[keras.Variable]:
    """Returns the moving averages that an optimizer with `use_ema` keeps of a model's variables."""
    by_name = {variable.name: variable for variable in optimizer.variables}
    return [by_name[f"{variable.path.replace('/', '_')}_average"] for variable in variables]


def compile_model(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, multi_label: bool, loss: Callable | None = None
) -> keras.Model:
    """Compiles a model with an optimizer, and the loss and the metric of its mode.

    Args:
        model: gives probabilities `(batch, classes)`.
        optimizer: fresh, or one that has trained the model before.
        multi_label: the mode.
        loss: takes the place of the mode's stock loss.

    Returns:
        The same model.
    """
    stock, metric = "sparse_categorical_crossentropy", keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    if multi_label:
        stock = "binary_crossentropy"
        metric = keras.metrics.AUC(multi_label=True, num_labels=model.output_shape[-1], name="auroc")
    # A file does not say what is left out.
    exclude_from_weight_decay(model, optimizer)
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if not scales and any(layer.compute_dtype == "float16" for layer in leaf_layers(model)):
        # Small gradients would be zero in float16.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, loss=loss or stock, weighted_metrics=[], metrics=[metric])
    return model
