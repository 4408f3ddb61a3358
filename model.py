"""The table of backbones, and the factory that builds a classifier on one.

A model takes raw RGB `[0, 255]` of any numeric type at `image_target_size`. By name, its parts are
`[downscaling ->] preprocessing -> backbone -> classifier`: the backbone's own ImageNet preprocessing is inside, so
that no script can get it wrong. Only stock Keras layers: `keras.models.load_model` reads the file anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from scipy import special

from configs import BACKBONE_NAMES, Configs, UserError
from utils import (
    exclude_from_weight_decay,
    get_class_weights,
    get_multilabel_class_weights,
    get_optimizer,
    naming_bad_images,
)

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

    from finetune.callbacks import Interruption
    from generator import AugmentedImageSequence

CONVOLUTIONS = (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)


class Backbone(NamedTuple):
    """Facts about one of Keras's applications.

    Attributes:
        input_size: height and width that its ImageNet weights were trained at.
        minimum_size: the smallest height and width that it takes.
        preprocessing: how Keras scales its input: `torch`, `tf` or `caffe`; None where the backbone does so itself.
        last_layer: name of its last spatial layer. Those that Keras numbers by the order of building get this name.
    """

    input_size: int
    minimum_size: int
    preprocessing: str | None
    last_layer: str


LAST_LAYER_OF_FAMILY = {
    "VGG": "block5_pool",
    "DenseNet": "relu",
    "Xception": "block14_sepconv2_act",
    "ResNet": "conv5_block3_out",
    "ResNetV2": "post_relu",
    "InceptionV3": "mixed10",
    "InceptionResNetV2": "conv_7b_ac",
    "NASNet": "last_activation",
    "MobileNet": "conv_pw_13_relu",
    "MobileNetV2": "out_relu",
    "MobileNetV3": "last_activation",
    "EfficientNet": "top_activation",
    "ConvNeXt": "last_normalization",
}
_EFFICIENTNET_SIZES = (224, 240, 260, 300, 380, 456, 528, 600)
_EFFICIENTNET_V2_SIZES = {"B0": 224, "B1": 240, "B2": 260, "B3": 300, "S": 384, "M": 480, "L": 480}


def _family(names: Sequence[str], family: str, preprocessing: str | None, size: int, minimum: int) -> dict:
    return dict.fromkeys(names, Backbone(size, minimum, preprocessing, LAST_LAYER_OF_FAMILY[family]))


BACKBONES: dict[str, Backbone] = {
    **_family(("VGG16", "VGG19"), "VGG", "caffe", 224, 32),
    **_family(("DenseNet121", "DenseNet169", "DenseNet201"), "DenseNet", "torch", 224, 32),
    **_family(("Xception",), "Xception", "tf", 299, 71),
    **_family(("ResNet50", "ResNet101", "ResNet152"), "ResNet", "caffe", 224, 32),
    **_family(("ResNet50V2", "ResNet101V2", "ResNet152V2"), "ResNetV2", "tf", 224, 32),
    **_family(("InceptionV3",), "InceptionV3", "tf", 299, 75),
    **_family(("InceptionResNetV2",), "InceptionResNetV2", "tf", 299, 75),
    **_family(("NASNetMobile",), "NASNet", "tf", 224, 32),
    **_family(("NASNetLarge",), "NASNet", "tf", 331, 32),
    **_family(("MobileNet",), "MobileNet", "tf", 224, 32),
    **_family(("MobileNetV2",), "MobileNetV2", "tf", 224, 32),
    **_family(("MobileNetV3Small", "MobileNetV3Large"), "MobileNetV3", None, 224, 32),
    **{
        f"EfficientNetB{step}": Backbone(size, 32, None, LAST_LAYER_OF_FAMILY["EfficientNet"])
        for step, size in enumerate(_EFFICIENTNET_SIZES)
    },
    **{
        f"EfficientNetV2{variant}": Backbone(size, 32, None, LAST_LAYER_OF_FAMILY["EfficientNet"])
        for variant, size in _EFFICIENTNET_V2_SIZES.items()
    },
    **_family([name for name in BACKBONE_NAMES if name.startswith("ConvNeXt")], "ConvNeXt", None, 224, 32),
}

# Per channel of the backbone's input: `scale * pixel + offset`, where Keras computes `(pixel / 255 - mean) / std`
# (torch), `pixel / 127.5 - 1` (tf) or, with the channels turned to BGR, `pixel - mean` (caffe).
_TORCH_MEAN, _TORCH_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
AFFINE_PREPROCESSING = {
    "torch": (1 / (255 * _TORCH_STD), -_TORCH_MEAN / _TORCH_STD),
    "tf": (np.full(3, 1 / 127.5), np.full(3, -1.0)),
    "caffe": (np.ones(3), -np.array([103.939, 116.779, 123.68])),
}


class ModelFactory:
    """Builds classifiers as the configs describe them."""

    def get_input_size(self, name: str) -> tuple[int, int]:
        """Returns the `(height, width)` that a backbone's ImageNet weights were trained at."""
        return BACKBONES[name].input_size, BACKBONES[name].input_size

    def get_last_conv_layer(self, name: str) -> str:
        """Returns the name of a backbone's last spatial layer, which Grad-CAM reads."""
        return BACKBONES[name].last_layer

    def get_model(self, configs: Configs) -> keras.Model:
        """Builds and compiles the classifier.

        Args:
            configs: with `classes` resolved.

        Returns:
            A model from RGB `(batch, height, width, 3)`, `[0, 255]`, to probabilities `(batch, classes)`.

        Raises:
            UserError: the image is too small for the backbone, more layers are to be dropped or trained than there
                are, or the ImageNet weights cannot be had.
        """
        name = configs.visual_model_name
        height, width, _ = configs.image_target_size
        factor = 2**configs.cnn_downscaling_factor
        backbone_size = (math.ceil(height / factor), math.ceil(width / factor))
        if min(backbone_size) < BACKBONES[name].minimum_size:
            raise UserError(
                f"image_target_size: {name} takes images from {BACKBONES[name].minimum_size} pixels a side on. "
                f"Received: {height}x{width}, {backbone_size[0]}x{backbone_size[1]} after downscaling. Enlarge it."
            )
        with precision_policy(configs.mixed_precision):
            backbone = build_backbone(name, backbone_size, configs.use_imagenet_weights, configs.pop_conv_layers)
            classifier = build_classifier(
                len(configs.classes),
                configs.multi_label_classification,
                configs.classifier_layer_sizes,
                configs.final_layer_pooling,
            )
        prepare_backbone(backbone, configs.conv_layers_to_train, configs.batch_norm_momentum)
        inputs = outputs = keras.Input((height, width, 3), name="image")
        if configs.cnn_downscaling_factor:
            outputs = downscale(outputs, configs.cnn_downscaling_factor, configs.cnn_downscaling_filters)
        outputs = build_preprocessing(BACKBONES[name].preprocessing)(outputs)
        model = keras.Model(inputs, classifier(backbone(outputs)), name="image_classifier")
        compile_model(model, configs)
        return model


@contextlib.contextmanager
def precision_policy(mixed: bool) -> Iterator[None]:
    """Makes the layers built inside it compute in 16 bits, where `mixed` says so; weights stay float32."""
    before = keras.config.dtype_policy()
    if mixed:
        keras.config.set_dtype_policy(choose_mixed_policy())
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def choose_mixed_policy() -> str:
    """Returns `mixed_bfloat16` where every visible GPU computes in bfloat16 (or there is none), else `mixed_float16`.

    NVIDIA's GPUs do from compute capability 8.0 (Ampere) on.
    """
    details = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices("GPU"))
    is_new = all(gpu.get("compute_capability", (8, 0)) >= (8, 0) for gpu in details)
    return "mixed_bfloat16" if is_new else "mixed_float16"


def compile_model(
    model: keras.Model,
    configs: Configs,
    loss: Callable | None = None,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> keras.Model:
    """Compiles a model with the configs' optimizer and the loss of its mode.

    Args:
        model: gives probabilities `(batch, classes)`.
        configs: for the optimizer's options and `multi_label_classification`.
        loss: takes the place of the mode's stock loss.
        optimizer: takes the place of a fresh one.

    Returns:
        The same model.
    """
    stock, metric = "sparse_categorical_crossentropy", keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    if configs.multi_label_classification:
        stock = "binary_crossentropy"
        metric = keras.metrics.AUC(multi_label=True, num_labels=model.output_shape[-1], name="auroc")
    optimizer = optimizer or get_optimizer(
        configs.optimizer_type, configs.learning_rate, configs.weight_decay, configs.ema_decay
    )
    # A file does not say what is left out.
    exclude_from_weight_decay(model, optimizer)
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if not scales and any(layer.compute_dtype == "float16" for layer in leaf_layers(model)):
        # Small gradients would be zero in float16.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, loss=loss or stock, weighted_metrics=[], metrics=[metric])
    return model


def get_training_model(
    model: keras.Model,
    configs: Configs,
    loss: Callable,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> TrainingModel:
    """Builds what trains a classifier, or its head on features; see `compile_model`. In the scope of a strategy."""
    training_model = TrainingModel(model.inputs, model.outputs, name=model.name)
    if configs.gradient_accumulation_steps > 1:
        training_model.batch_size = configs.batch_size
    training_model.multiplier = configs.backbone_learning_rate_multiplier
    training_model.slow_layers = tuple(layer for layer in model.layers if layer.name == "backbone")
    return compile_model(training_model, configs, loss, optimizer)


def find_averages(optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> list[keras.Variable]:
    """Returns the moving averages that an optimizer with `use_ema` keeps of a model's variables."""
    by_name = {variable.name: variable for variable in optimizer.variables}
    return [by_name[f"{variable.path.replace('/', '_')}_average"] for variable in variables]


class TrainingModel(keras.Model):
    """A classifier, or a part of one, with the loop that trains it: on one device, or on several as on one.

    The loop is not Keras's `fit`, because under `tf.distribute` that of Keras 3.15 ends with an error on several hosts
    (keras-team/keras issue 20585), takes the mean of uneven shares as if they were even, and leaves to each device
    the batch normalisation's statistics of its own images. Build it, and what it is made of, in the scope of a
    strategy; its batches are those of `AugmentedImageSequence.get_shares`.

    Attributes:
        batch_size: images at a time in a device's memory; the gradients of a larger batch are added up.
        slow_layers: what learns at the learning rate times `multiplier`.
        loss_sums: of the epoch's images, the sum of their losses and their number, in every process the same.
        seconds_waited: of the epoch, for batches.
    """

    batch_size = 0
    multiplier = 1.0
    slow_layers: tuple[keras.Layer, ...] = ()
    seconds_waited = 0.0
    _forward = None

    def compile(self, optimizer: keras.optimizers.Optimizer, loss: Callable, metrics: list, **_: Any) -> None:
        """Keeps what training needs: an optimizer, a loss of each image, and metrics that have their variables."""
        super().compile(optimizer)
        self.loss_of_images = keras.losses.get(loss)
        self._own_metrics = metrics
        self.loss_sums = np.zeros(2)
        self._has_spread_seeds = False
        # Variables cannot come into being within a step of several devices.
        if not optimizer.built:
            optimizer.build(self.trainable_variables)
        self._step, self._forward = self._build_step(), None

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Those given to `compile`; each device counts its own images, and their sum is exact."""
        return self._own_metrics

    def fit(
        self,
        batches: tf.data.Dataset,
        epochs: int,
        initial_epoch: int,
        callbacks: list[keras.callbacks.Callback],
        interruption: Interruption,
    ) -> None:
        """Trains as Keras's `fit` does; what `interruption` notes in one process holds for all after the same step."""
        steps = int(batches.cardinality())
        self.stop_training = False
        called = keras.callbacks.CallbackList(callbacks, add_progbar=True, verbose=1, epochs=epochs, steps=steps)
        called.set_model(self)
        called.on_train_begin()
        self._spread_seeds()
        for epoch in range(initial_epoch, epochs):
            self.reset_metrics()
            self.loss_sums, self.seconds_waited = np.zeros(2), 0.0
            called.on_epoch_begin(epoch)
            iterator = iter(batches)
            for step in range(steps):
                called.on_train_batch_begin(step)
                start = time.perf_counter()
                batch = iterator.get_next()
                self.seconds_waited += time.perf_counter() - start
                logs = self._train_on(batch, interruption)
                called.on_train_batch_end(step, logs)
                if self.stop_training:
                    break
            called.on_epoch_end(epoch, logs | {metric.name: float(metric.result()) for metric in self.metrics})
            if self.stop_training:
                break
        called.on_train_end()

    def predict_sequence(self, sequence: AugmentedImageSequence) -> tuple[np.ndarray, np.ndarray]:
        """Predicts the images of a sequence that is not shuffled, each on one device of one process.

        Returns:
            Outputs float32 `(images, outputs)` in the sequence's order, of the images that could be read, and which
            of all images these are, bool `(all images,)`; the same in every process.
        """
        found = np.zeros((len(sequence.paths), self.output_shape[-1] + 1), np.float32)
        for step, (images, _) in enumerate(sequence.to_dataset().as_numpy_iterator()):
            if len(images):
                rows = sequence.get_rows(step)
                found[rows, :-1], found[rows, -1] = self._predict(images), 1
        if sequence.shares.local < sequence.shares.devices:
            found = self.distribute_strategy.experimental_local_results(self._add_over_processes(found))[0].numpy()
        is_read = found[:, -1] > 0
        return found[is_read, :-1], is_read

    @property
    def _local_devices(self) -> int:
        strategy = self.distribute_strategy
        return len(strategy.extended.worker_devices) if strategy.num_replicas_in_sync > 1 else 1

    def _train_on(self, batch: Sequence[tf.Tensor], interruption: Interruption) -> dict[str, float]:
        outputs = self._step(*batch, interruption.get_flags())
        sums = self.distribute_strategy.experimental_local_results(outputs)[0].numpy()
        self.loss_sums = self.loss_sums + sums[:2]
        interruption.note_flags(sums[2:])
        return {"loss": self.loss_sums[0] / self.loss_sums[1]}

    def _build_step(self) -> Callable:
        strategy = self.distribute_strategy

        def train_on_share(*batch: tf.Tensor) -> tf.Tensor:
            *parts, bounds, total, signals = batch
            images, labels, is_real = self._get_own_images(parts, bounds)
            gradients, probabilities, loss_sum = self._get_gradients(images, labels, is_real / total)
            self._update_weights(gradients)
            if strategy.num_replicas_in_sync > 1:
                self._share_statistics(tf.reduce_sum(is_real) / total)
            self._update_metrics(labels, probabilities, is_real > 0)
            sums = tf.concat([[loss_sum * total, tf.reduce_sum(is_real)], signals], axis=0)
            return tf.distribute.get_replica_context().all_reduce("sum", sums)

        @functools.partial(tf.function, autograph=False, reduce_retracing=True)
        def train(*batch: tf.Tensor) -> Any:
            return strategy.run(train_on_share, args=batch)

        return train

    def _get_gradients(
        self, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """Returns the gradients of the weighted sum of the images' losses, their probabilities, and that sum."""
        variables = self.trainable_variables

        def get(images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> tuple:
            with tf.GradientTape() as tape:
                probabilities = self(images, training=True)
                loss = tf.reduce_sum(self.loss_of_images(labels, probabilities) * weights)
                scaled = self.optimizer.scale_loss(loss)
            return tape.gradient(scaled, variables, unconnected_gradients="zero"), probabilities, loss

        if not self.batch_size:
            return get(images, labels, weights)
        number = tf.shape(images)[0]

        def add(start: tf.Tensor, gradients: list[tf.Tensor], probabilities: tf.Tensor, loss: tf.Tensor) -> tuple:
            end = tf.minimum(start + self.batch_size, number)
            more, part, more_loss = get(images[start:end], labels[start:end], weights[start:end])
            gradients = [one + other for one, other in zip(gradients, more, strict=True)]
            return end, gradients, tf.concat([probabilities, part], axis=0), loss + more_loss

        zeros = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
        start = (tf.constant(0), zeros, tf.zeros((0, *self.output_shape[1:])), tf.constant(0.0))
        shapes = (
            tf.TensorShape([]),
            [zero.shape for zero in zeros],
            tf.TensorShape(self.output_shape),
            tf.TensorShape([]),
        )
        # One after the other, and without keeping anything for a gradient of the loop: memory is what this saves.
        found = tf.while_loop(lambda end, *_: end < number, add, start, shapes, parallel_iterations=1)
        return found[1], found[2], found[3]

    @staticmethod
    def _get_own_images(parts: Sequence[tf.Tensor], bounds: tf.Tensor) -> list[tf.Tensor]:
        """Cuts a device's own images, labels and weights out of its process's, before they go to the device."""
        device = tf.distribute.get_replica_context().replica_id_in_sync_group % (bounds.shape[0] - 1)
        with tf.device("/CPU:0"):
            return [part[bounds[device] : bounds[device + 1]] for part in parts]

    def _update_weights(self, gradients: list[tf.Tensor]) -> None:
        variables, slow = self.trainable_variables, []
        is_scaled = isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)
        if is_scaled and self.distribute_strategy.num_replicas_in_sync > 1:
            # Each device leaves a step out where its own gradients are not finite: all must do what one does.
            is_finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
            poison = tf.distribute.get_replica_context().all_reduce("sum", tf.where(is_finite, 0.0, np.nan))
            gradients = [gradients[0] + poison, *gradients[1:]]
        if self.multiplier != 1:
            slow = [variable for layer in self.slow_layers for variable in layer.trainable_variables]
        before = [tf.identity(variable.value) for variable in slow]
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        is_first = tf.equal(tf.identity(optimizer.iterations.value), 0)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        averages = find_averages(optimizer, slow) if optimizer.use_ema else [None] * len(slow)
        for variable, value, average in zip(slow, before, averages, strict=True):
            excess = (1 - self.multiplier) * (variable.value - value)
            variable.assign_sub(excess)
            if average is not None:
                # The optimizer has averaged the whole step.
                average.assign_sub(excess * tf.where(is_first, 1.0, 1 - optimizer.ema_momentum))

    def _share_statistics(self, share: tf.Tensor) -> None:
        """Takes the batch normalisations' statistics of all images: each device has moved them by those of its own."""
        norms = [layer for layer in leaf_layers(self) if isinstance(layer, layers.BatchNormalization)]
        variables = [v.value for norm in norms if norm.trainable for v in (norm.moving_mean, norm.moving_variance)]
        if variables:
            parts = [tf.identity(variable) * share for variable in variables]
            sums = tf.distribute.get_replica_context().all_reduce("sum", parts)
            for variable, value in zip(variables, sums, strict=True):
                variable.assign(value)

    def _update_metrics(self, labels: tf.Tensor, probabilities: tf.Tensor, is_real: tf.Tensor) -> None:
        """Counts images, mixed ones by the label or labels that they mostly show."""
        for metric in self.metrics:
            is_sparse = isinstance(metric, keras.metrics.SparseCategoricalAccuracy)
            shown = labels
            if len(labels.shape) == 2:
                shown = tf.argmax(labels, axis=-1) if is_sparse else tf.round(labels)
            metric.update_state(tf.boolean_mask(shown, is_real), tf.boolean_mask(probabilities, is_real))

    def _predict(self, images: np.ndarray) -> np.ndarray:
        if self._forward is None:
            self._forward = self._build_forward()
        local, number = self._local_devices, len(images)
        # Not every layer takes an empty batch.
        padded = np.concatenate([images, *[images[-1:]] * (local - number)])
        bounds = np.array([len(padded) * device // local for device in range(local + 1)], np.int32)
        return np.concatenate([part.numpy() for part in self._forward(padded, bounds)])[:number]

    def _build_forward(self) -> Callable:
        strategy = self.distribute_strategy

        def predict_share(images: tf.Tensor, bounds: tf.Tensor) -> tf.Tensor:
            (images,) = self._get_own_images([images], bounds)
            return self(images, training=False)

        @functools.partial(tf.function, autograph=False, reduce_retracing=True)
        def forward(images: tf.Tensor, bounds: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return strategy.experimental_local_results(strategy.run(predict_share, args=(images, bounds)))

        return forward

    @functools.partial(tf.function, autograph=False)
    def _add_over_processes(self, values: tf.Tensor) -> Any:
        """Adds an array over the processes; each device has its process's, so that of the first one counts."""
        local = self._local_devices

        def add_once() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            is_first = context.replica_id_in_sync_group % local == 0
            return context.all_reduce("sum", values * tf.cast(is_first, values.dtype))

        return self.distribute_strategy.run(add_once)

    def _spread_seeds(self) -> None:
        """Gives each device random states of its own: dropout would leave out the same units on all of them."""
        if self._has_spread_seeds:
            return
        self._has_spread_seeds = True
        states = [variable.value for variable in self.variables if variable.name == "seed_generator_state"]

        @tf.function(autograph=False)
        def spread() -> None:
            device = tf.distribute.get_replica_context().replica_id_in_sync_group
            for state in states:
                state.assign_add(tf.cast(tf.stack([device, 0]), state.dtype))

        if states and self.distribute_strategy.num_replicas_in_sync > 1:
            self.distribute_strategy.run(spread)


class Losses(NamedTuple):
    """A run's losses of `(labels, probabilities)`, each `(batch,)`: one number an image.

    Attributes:
        training: of labels as batches have them: weighted by class, smoothed and focused as the configs say.
        validation: of the true labels; what selects the best model does not change with the way of training.
    """

    training: Callable
    validation: Callable


# What `weighted_binary_crossentropy` takes for each choice of the option `loss`; the values are the papers'.
MULTILABEL_LOSSES = {
    "cross_entropy": {},
    "focal": {"gamma_present": 2.0, "gamma_absent": 2.0},
    "asymmetric": {"gamma_absent": 4.0, "margin": 0.05},
}


def get_losses(configs: Configs, labels: np.ndarray) -> Losses:
    """Chooses the losses of the mode and balances the classes, where `use_class_balancing` says so.

    Args:
        configs: with `classes` resolved.
        labels: of the training images, as the generator has them: int `(images,)`, or multi-label `(images, classes)`.

    Returns:
        Functions of labels and probabilities `(batch, classes)`. The validation loss is the plain cross-entropy in
        single-label mode, and in multi-label mode the one weighted by class.

    Raises:
        UserError: `loss` is one of multi-label mode only.
    """
    if configs.multi_label_classification:
        weights = get_multilabel_class_weights(labels, configs.positive_weights_multiply, configs.use_class_balancing)
        training = weighted_binary_crossentropy(weights, configs.label_smoothing, **MULTILABEL_LOSSES[configs.loss])
        return Losses(training, weighted_binary_crossentropy(weights))
    if configs.loss != "cross_entropy":
        raise UserError(
            f"loss: expected cross_entropy, for single labels are told apart by it alone. Received: {configs.loss}. "
            "Choose cross_entropy, or set multi_label_classification."
        )
    class_weights = np.ones(len(configs.classes), np.float32)
    if configs.use_class_balancing:
        class_weights[:] = list(get_class_weights(labels, len(configs.classes)).values())
    training = weighted_crossentropy(class_weights, configs.label_smoothing)
    return Losses(training, keras.losses.sparse_categorical_crossentropy)


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
        label_smoothing: a label `y` counts as `y (1 - label_smoothing) + label_smoothing / 2`; in `[0, 1)`.
        gamma_present: from 0 on; 0 is the plain cross-entropy.
        gamma_absent: likewise.
        margin: in `[0, 1)`.
    """

    def loss(y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        y_pred = keras.ops.clip(y_pred, keras.config.epsilon(), 1 - keras.config.epsilon())
        y_true = keras.ops.cast(y_true, y_pred.dtype)
        if label_smoothing:
            y_true = y_true * (1 - label_smoothing) + label_smoothing / 2
        shifted = keras.ops.maximum(y_pred - margin, 0.0) if margin else y_pred
        present = class_weights[1] * y_true * keras.ops.log(y_pred)
        absent = class_weights[0] * (1 - y_true) * keras.ops.log(1 - shifted)
        # A power of 0 has no gradient where its base is 0, as it is below the margin.
        present = present * (1 - y_pred) ** gamma_present if gamma_present else present
        absent = absent * shifted**gamma_absent if gamma_absent else absent
        return -keras.ops.mean(present + absent, axis=-1)

    return loss


def build_preprocessing(mode: str | None) -> keras.Layer:
    """Builds the layer `preprocessing`: Keras's `preprocess_input` of a backbone, for raw RGB `[0, 255]`.

    Args:
        mode: `torch`, `tf` or `caffe`; None leaves the pixels to the backbone's own layers.
    """
    if mode is None:
        return layers.Rescaling(1.0, name="preprocessing")
    scale, offset = AFFINE_PREPROCESSING[mode]
    if mode != "caffe":
        return layers.Rescaling(scale.tolist(), offset.tolist(), name="preprocessing")
    # Turning RGB to BGR is a permutation of channels: one fixed 1x1 convolution says it together with the means.
    layer = layers.Conv2D(3, 1, trainable=False, name="preprocessing")
    layer.build((None, None, None, 3))
    layer.set_weights([np.eye(3)[::-1][None, None] * scale, offset])
    return layer


def downscale(images: keras.KerasTensor, factor: int, filters: int) -> keras.KerasTensor:
    """Halves images `factor` times by trained convolutions; RGB `[0, 255]` in and out.

    The convolutions see pixels in `[-1, 1]`, and their tanh is spread over `[0, 255]` again: whatever range the
    backbone's preprocessing then makes of it is the one that the backbone knows.
    """
    stack = keras.Sequential(name="downscaling")
    for _ in range(factor):
        stack.add(layers.Conv2D(filters, 4, strides=2, padding="same", activation="relu"))
        stack.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
    stack.add(layers.Conv2D(3, 3, padding="same", activation="tanh"))
    images = layers.Rescaling(1 / 127.5, -1.0, name="to_unit_range")(images)
    return layers.Rescaling(127.5, 127.5, name="to_pixel_range")(stack(images))


def build_backbone(name: str, image_size: Sequence[int], use_imagenet_weights: bool, pop_layers: int) -> keras.Model:
    """Builds the model `backbone`, from preprocessed images to a feature map `(batch, h, w, channels)`.

    Args:
        name: a key of `BACKBONES`.
        image_size: `(height, width)`.
        use_imagenet_weights: False starts from random ones.
        pop_layers: layers dropped from its end.

    Raises:
        UserError: the weights cannot be had, or too many layers are dropped.
    """
    with _explaining_missing_weights(name):
        application = getattr(keras.applications, name)(
            include_top=False,
            weights="imagenet" if use_imagenet_weights else None,
            input_shape=(*image_size, 3),
        )
    application.layers[-1].name = BACKBONES[name].last_layer
    if pop_layers >= len(application.layers) - 1:
        raise UserError(
            f"pop_conv_layers: {name} has {len(application.layers) - 1} layers after its input. "
            f"Received: {pop_layers}. Choose a smaller number."
        )
    maps = [n for n in range(pop_layers + 1) if _is_feature_map(application.layers[-1 - n].output, application.output)]
    if maps[-1] != pop_layers:
        raise UserError(
            f"pop_conv_layers: without its last {pop_layers} layers, {name} ends in "
            f"'{application.layers[-1 - pop_layers].name}', which is no feature map. Choose {maps[-1]}."
        )
    return keras.Model(application.input, application.layers[-1 - pop_layers].output, name="backbone")


def _is_feature_map(output: keras.KerasTensor, last: keras.KerasTensor) -> bool:
    """Tells feature maps from the pooled vectors inside attention blocks, which have less height and width."""
    return len(output.shape) == 4 and output.shape[1] >= last.shape[1] and output.shape[2] >= last.shape[2]


@contextlib.contextmanager
def _explaining_missing_weights(name: str) -> Iterator[None]:
    """Turns Keras's failed download into the file that is missing and what to do."""
    try:
        yield
    except Exception as error:  # Keras raises a bare Exception where an address cannot be reached
        unreachable = re.search(r"URL fetch failure on (\S+): ", str(error))
        broken_off = isinstance(error, OSError | http.client.HTTPException) or "corrupted file" in str(error)
        if not unreachable and not broken_off:
            raise
        folder = os.path.join(os.environ.get("KERAS_HOME", os.path.expanduser("~/.keras")), "models")
        file_name = unreachable.group(1).rsplit("/", 1)[-1] if unreachable else f"of {name}"
        # Keras stores this family's files under another spelling than it downloads them.
        if file_name.startswith("NASNet-"):
            file_name = file_name.replace("NASNet-", "nasnet_").replace("-", "_")
        source = f" from {unreachable.group(1)}" if unreachable else f" whole ({error})"
        raise UserError(
            f"The ImageNet weights {file_name} are not in {folder} and could not be downloaded{source}. "
            "Put the file there, or train without it: --use_imagenet_weights False."
        ) from error


def prepare_backbone(
    backbone: keras.Model,
    conv_layers_to_train: int,
    batch_norm_momentum: float | None,
    freeze_batch_norm: bool = False,
) -> None:
    """Makes a backbone trainable as a run wants it: see `freeze_layers` and `set_batch_norm_momentum`."""
    # Keras passes on to the layers only what changes.
    backbone.trainable = False
    backbone.trainable = True
    freeze_layers(backbone, conv_layers_to_train)
    set_batch_norm_momentum(backbone, batch_norm_momentum)
    if freeze_batch_norm:
        for layer in leaf_layers(backbone):
            layer.trainable = layer.trainable and not isinstance(layer, layers.BatchNormalization)


def has_fixed_features(classifier: keras.Model) -> bool:
    """Tells whether what comes before the head is frozen, and gives an image the same features in training."""
    *before, head = classifier.layers
    if head.name != "classifier" or "backbone" not in [layer.name for layer in before]:
        return False
    leaves = [leaf for layer in before for leaf in ([layer] if not hasattr(layer, "layers") else leaf_layers(layer))]
    # Frozen or not, dropout drops.
    is_random = any(isinstance(leaf, layers.Dropout) and leaf.rate for leaf in leaves)
    return not is_random and not any(layer.trainable_variables for layer in before)


def freeze_layers(backbone: keras.Model, conv_layers_to_train: int) -> None:
    """Freezes a backbone up to the n-th convolution from its end.

    A frozen batch normalisation runs in inference mode: Keras does so where `trainable` is False.

    Args:
        backbone: changed in place.
        conv_layers_to_train: -1 leaves everything trainable, 0 freezes everything.

    Raises:
        UserError: there are fewer convolutions.
    """
    if conv_layers_to_train < 0:
        return
    every_layer = leaf_layers(backbone)
    convolutions = [position for position, layer in enumerate(every_layer) if isinstance(layer, CONVOLUTIONS)]
    if conv_layers_to_train > len(convolutions):
        raise UserError(
            f"conv_layers_to_train: the backbone has {len(convolutions)} convolutions. "
            f"Received: {conv_layers_to_train}. Choose -1 to train them all."
        )
    first_trained = convolutions[-conv_layers_to_train] if conv_layers_to_train else len(every_layer)
    for layer in every_layer[:first_trained]:
        layer.trainable = False


def leaf_layers(model: keras.Model) -> list[keras.Layer]:
    """Returns a model's layers in their order, with those of its blocks in the blocks' place."""
    leaves = []
    for layer in model.layers:
        leaves += leaf_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return leaves


def set_batch_norm_momentum(backbone: keras.Model, momentum: float | None) -> None:
    """Sets how slowly the moving statistics follow the batches; None keeps the backbone's own.

    The backbones' own momentum suits the thousands of steps of an ImageNet epoch: on a few hundred images the
    statistics would trail the weights for tens of epochs.
    """
    if momentum is None:
        return
    for layer in leaf_layers(backbone):
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = momentum


def build_classifier(
    number_of_classes: int, multi_label: bool, layer_sizes: Sequence[float], pooling: str | None
) -> keras.Sequential:
    """Builds the model `classifier`, from a feature map to probabilities `(batch, classes)`.

    Its last two layers are `logits` and `probabilities`, so that Grad-CAM can explain unsaturated scores.

    Args:
        number_of_classes: the output's width.
        multi_label: sigmoid instead of softmax.
        layer_sizes: each a hidden ReLU layer of that many units (1 or more) or a dropout rate (less than 1).
        pooling: `avg`, `max`, or None to flatten.
    """
    poolings = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D, None: layers.Flatten}
    classifier = keras.Sequential([poolings[pooling](name="pooling")], name="classifier")
    for size in layer_sizes:
        classifier.add(layers.Dense(int(size), activation="relu") if size >= 1 else layers.Dropout(size))
    classifier.add(layers.Dense(number_of_classes, dtype="float32", name="logits"))
    classifier.add(layers.Activation("sigmoid" if multi_label else "softmax", dtype="float32", name="probabilities"))
    return classifier


# The classifier on a frozen backbone's features

# The strengths C that are compared: half decades, the strongest regularisation first.
STRENGTHS = 10.0 ** np.arange(-2.5, 1.25, 0.5)
# Where no class has images enough to compare: what photos' features of MobileNet prefer.
USUAL_STRENGTH = 10.0**-1.5
FOLDS = 5
MOST_COMPARED_IMAGES = 2000


def compute_features(
    model: keras.Model, sequence: AugmentedImageSequence, mirrored: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Computes once what the classifier sees of each image, while the backbone is frozen; in the scope of a strategy.

    Args:
        model: a model of this collection.
        sequence: its images are read without augmentation. Under `skip_bad_images` those that cannot be read are
            noted in its `bad_images`.
        mirrored: take the mirror images.

    Returns:
        What the pooling gives, float32 `(images, channels)` in the order of `paths`, and which images could be read,
        bool `(images,)`; the rows of the others are NaN. The devices that train together share the work.

    Raises:
        UserError: an image cannot be read, or the model has no `classifier`.
    """
    from generator import read_plainly

    pooling, plain = _get_classifier(model).layers[0], read_plainly(sequence)
    inputs = keras.Input(model.input_shape[1:])
    outputs = keras.ops.flip(inputs, axis=2) if mirrored else inputs
    for layer in (*model.layers[1:-1], pooling):
        outputs = layer(outputs)
    with naming_bad_images(plain):
        known, is_read = TrainingModel(inputs, outputs).predict_sequence(plain)
    features = np.full((len(is_read), known.shape[1]), np.nan, np.float32)
    features[is_read] = known
    sequence.bad_images.update(plain.bad_images)
    return features, is_read


def split_head(model: keras.Model) -> keras.Model:
    """Returns the part of a model behind its pooling, from features `(batch, channels)` to probabilities.

    It shares the model's layers: to train it is to train them.

    Raises:
        UserError: the model has no `classifier`.
    """
    pooling, *head = _get_classifier(model).layers
    outputs = inputs = keras.Input(pooling.compute_output_shape(model.layers[-2].output_shape)[1:], name="features")
    for layer in head:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs, name="head")


def initialize_head(
    model: keras.Model,
    features: np.ndarray,
    labels: np.ndarray,
    multi_label: bool,
    seed: int,
    mirrored: np.ndarray | None = None,
) -> float:
    """Makes a model's classifier the logistic regression on the backbone's features: it starts from the best answers
    that a frozen backbone allows, where a random one would first pull the backbone's weights apart.

    Single-label: one multinomial regression; a class without images keeps its smoothed frequency. Multi-label: one
    regression a label; a label that no image has, or every one, keeps its smoothed frequency whatever the features.
    How strongly the kernels are drawn to zero is chosen by the log loss in stratified cross-validation.

    Source: Kumar et al., ICLR 2022 (arXiv:2202.10054).

    Args:
        model: its classifier is pooling, dropout (any or none), and the dense layer `logits`, which is changed.
        features: float32 `(images, channels)`, as `compute_features` gives them, of images that could be read.
        labels: int `(images,)`, or `(images, classes)` of zeros and ones.
        multi_label: which of the two.
        seed: of the cross-validation's folds.
        mirrored: the features of the mirror images, in the order of `features`: each image then counts half as itself
            and half as that. They have no part in the choice of the strength.

    Returns:
        The strength C, the variance of the kernels' prior on features of variance 1.

    Raises:
        UserError: the classifier has hidden layers, or a feature is not finite.
    """
    from threadpoolctl import threadpool_limits

    logits = _get_only_dense_layer(model)
    views = [features] if mirrored is None else [features, mirrored]
    if not all(np.isfinite(view).all() for view in views):
        raise UserError("The backbone's features are not finite: its weights are damaged. Load another model.")
    # One scale for all channels: the grid of strengths then suits every backbone.
    mean = features.mean(axis=0, dtype=np.float64)
    scaled = np.concatenate(views) - mean
    scale = np.sqrt(np.mean(scaled**2)) or 1.0
    scaled /= scale
    # The matrices are small: the threads of BLAS would wait for each other.
    with threadpool_limits(1):
        scaled, directions = _reduce_columns(scaled)
        targets = list(labels.T.astype(int)) if multi_label else [labels]
        strength = _choose_strength(scaled[: len(labels)], targets, seed)
        fit = _fit_labels if multi_label else _fit_classes
        # The loss is a sum over rows: a share of C is the weight of a row.
        repeated = np.concatenate([labels] * len(views))
        kernel, bias = fit(scaled, repeated, logits.units, strength / len(views))
    kernel = directions @ kernel / scale
    logits.set_weights([kernel, bias - mean @ kernel])
    return strength


def _get_classifier(model: keras.Model) -> keras.Sequential:
    """Returns a model's last part; raises UserError where it is none of this collection's."""
    names = [layer.name for layer in model.layers]
    if names[-2:] != ["backbone", "classifier"]:
        raise UserError(
            "Training the classifier alone needs a model that ends in the parts 'backbone' and 'classifier'. "
            f"Received: {', '.join(names)}. Set head_epochs to 0 and head_initialization to random."
        )
    return model.layers[-1]


def _get_only_dense_layer(model: keras.Model) -> keras.layers.Dense:
    _, *hidden, logits, _ = _get_classifier(model).layers
    if hidden := [layer for layer in hidden if not isinstance(layer, layers.Dropout)]:
        raise UserError(
            "head_initialization linear_probe: expected a classifier without hidden layers. Received: "
            f"{', '.join(f'{layer.units} units' for layer in hidden)}. Leave sizes of 1 and more out of "
            "classifier_layer_sizes, or set head_initialization to random."
        )
    return logits


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


def _choose_strength(features: np.ndarray, targets: Sequence[np.ndarray], seed: int) -> float:
    """Chooses the strength with the lowest mean log loss over the folds of all targets, each int `(images,)`."""
    # The best strength does not depend on the number of images: it is the variance of the kernel's prior.
    rows = np.random.default_rng(seed).permutation(len(features))[:MOST_COMPARED_IMAGES]
    trials = [trial for target in targets for trial in _make_trials(features[rows], target[rows], seed)]
    if not trials:
        return USUAL_STRENGTH
    losses = []
    for strength in STRENGTHS:
        losses.append(np.mean([trial(strength) for trial in trials]))
        # Once it rises it goes on rising, and weak regularisation takes the longest to compute.
        if losses[-1] > min(losses):
            break
    return float(STRENGTHS[np.argmin(losses)])


def _make_trials(features: np.ndarray, target: np.ndarray, seed: int) -> list[Callable[[float], float]]:
    """Returns for each fold a function from a strength to the log loss of the fold's images; none for too few images.

    Each goes on from the solution of the strength before.
    """
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold

    classes, positions, counts = np.unique(target, return_inverse=True, return_counts=True)
    if (counts > 1).sum() < 2:
        return []
    # The only image of a class is always learnt from: without it the class would be unknown.
    is_single = counts[positions] == 1
    several, singles = np.flatnonzero(~is_single), np.flatnonzero(is_single)
    folds = StratifiedKFold(min(FOLDS, int(counts.max())), shuffle=True, random_state=seed)

    def try_fold(regression: LogisticRegression, learnt: np.ndarray, held_out: np.ndarray, strength: float) -> float:
        regression.set_params(C=strength).fit(features[learnt], target[learnt])
        return log_loss(target[held_out], regression.predict_proba(features[held_out]), labels=classes)

    with warnings.catch_warnings():
        # A class of fewer images than folds is in as many of them as it has images.
        warnings.filterwarnings("ignore", "The least populated class")
        pairs = list(folds.split(several, target[several]))
    return [
        functools.partial(
            try_fold, _build_regression(tol=1e-3), np.concatenate([several[learnt], singles]), several[held_out]
        )
        for learnt, held_out in pairs
    ]


def _build_regression(**options: Any) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    # lbfgs takes ten times as long where the regularisation is weak, newton-cholesky where the classes are several.
    return LogisticRegression(solver="newton-cg", max_iter=1000, warm_start=True, **options)


def _fit_classes(
    features: np.ndarray, labels: np.ndarray, number: int, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fits one regression to labels `(images,)`; returns kernel `(columns, number)` and bias `(number,)`."""
    counts = np.bincount(labels, minlength=number)
    kernel, bias = np.zeros((features.shape[1], number)), np.log((counts + 1) / (len(labels) + number))
    known = np.flatnonzero(counts)
    if len(known) == 1:
        return kernel, bias
    regression = _build_regression(C=strength, tol=1e-6).fit(features, labels)
    # Of two classes it gives one score: half of it for the one, and half against the other.
    signs = np.array([[-0.5], [0.5]]) if len(known) == 2 else 1.0
    kernel[:, known] = (regression.coef_ * signs).T
    scores = features @ kernel[:, known] + (regression.intercept_ * np.ravel(signs))
    bias += special.logsumexp(scores, axis=1).mean()
    bias[known] = regression.intercept_ * np.ravel(signs)
    return kernel, bias


def _fit_labels(
    features: np.ndarray, labels: np.ndarray, number: int, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fits a regression to each column of labels; returns kernel `(columns, number)` and bias `(number,)`."""
    present = labels.sum(axis=0)
    kernel, bias = np.zeros((features.shape[1], number)), np.log((present + 1) / (len(labels) - present + 1))
    for position in np.flatnonzero((present > 0) & (present < len(labels))):
        regression = _build_regression(C=strength, tol=1e-6).fit(features, labels[:, position].astype(int))
        kernel[:, position], bias[position] = regression.coef_[0], regression.intercept_[0]
    return kernel, bias
