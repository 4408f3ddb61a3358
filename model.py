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
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from configs import BACKBONE_NAMES, Configs, UserError
from utils import get_class_weights, get_multilabel_class_weights, get_optimizer

if TYPE_CHECKING:
    from callbacks import Interruption
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
        configs: for `optimizer_type`, `learning_rate` and `multi_label_classification`.
        loss: takes the place of the mode's stock loss.
        optimizer: takes the place of a fresh one.

    Returns:
        The same model.
    """
    stock, metric = "sparse_categorical_crossentropy", keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    if configs.multi_label_classification:
        stock = "binary_crossentropy"
        metric = keras.metrics.AUC(multi_label=True, num_labels=model.output_shape[-1], name="auroc")
    optimizer = optimizer or get_optimizer(configs.optimizer_type, configs.learning_rate)
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if not scales and any(layer.compute_dtype == "float16" for layer in leaf_layers(model)):
        # Small gradients would be zero in float16.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, loss=loss or stock, weighted_metrics=[], metrics=[metric])
    return model


class DistributedModel(keras.Model):
    """Trains on several devices, in this process or in many, as one device would train on all their images.

    It has a loop of its own, because under `tf.distribute` the `fit` of Keras 3.15 ends with an error on several
    hosts (keras-team/keras issue 20585), takes the mean of uneven shares as if they were even, and leaves to each
    device the batch normalisation's statistics of its own images. Build it, and what it is made of, in the scope of
    a strategy; its batches are those of `AugmentedImageSequence.get_shares`.
    """

    def compile(self, optimizer: keras.optimizers.Optimizer, loss: Callable, metrics: list, **_: Any) -> None:
        """Keeps what training needs: an optimizer, a loss of each image, and metrics that have their variables."""
        super().compile(optimizer)
        self.loss_of_images = keras.losses.get(loss)
        self._own_metrics = metrics
        # Of the epoch's images: the sum of their losses and their number, in every process the same.
        self.loss_sums = np.zeros(2)
        self._has_spread_seeds = False
        self._forward, self._add = self._build_forward(), self._build_addition()
        # Variables cannot come into being within a step of several devices.
        if not optimizer.built:
            optimizer.build(self.trainable_variables)

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
        class_weight: dict[int, float] | None = None,
    ) -> None:
        """Trains as Keras's `fit` does; what `interruption` notes in one process holds for all after the same step."""
        steps = int(batches.cardinality())
        self._step = self._build_step(class_weight)
        self._interruption = interruption
        self.train_function = self._train_on_next
        self.stop_training = False
        called = keras.callbacks.CallbackList(callbacks, add_progbar=True, verbose=1, epochs=epochs, steps=steps)
        called.set_model(self)
        called.on_train_begin()
        self._spread_seeds()
        for epoch in range(initial_epoch, epochs):
            self.reset_metrics()
            self.loss_sums = np.zeros(2)
            called.on_epoch_begin(epoch)
            iterator = iter(batches)
            for step in range(steps):
                called.on_train_batch_begin(step)
                logs = self.train_function(iterator)
                called.on_train_batch_end(step, logs)
            called.on_epoch_end(epoch, logs | {metric.name: float(metric.result()) for metric in self.metrics})
            if self.stop_training:
                break
        called.on_train_end()

    def predict_sequence(self, sequence: AugmentedImageSequence) -> tuple[np.ndarray, np.ndarray]:
        """Predicts a sequence's images, each on one device of one process.

        Returns:
            Probabilities `(images, classes)` in the sequence's order, of the images that could be read, and which of
            all images these are, bool `(all images,)`; the same in every process.
        """
        found = np.zeros((len(sequence.paths), self.output_shape[-1] + 1), np.float32)
        for step, (images, _) in enumerate(sequence.to_dataset().as_numpy_iterator()):
            if len(images):
                rows = sequence.get_rows(step)
                found[rows, :-1], found[rows, -1] = self._predict(images), 1
        if sequence.shares.local < sequence.shares.devices:
            found = self.distribute_strategy.experimental_local_results(self._add(found))[0].numpy()
        is_read = found[:, -1] > 0
        return found[is_read, :-1], is_read

    def _train_on_next(self, iterator: Iterator) -> dict[str, float]:
        outputs = self._step(*iterator.get_next(), self._interruption.get_flags())
        sums = self.distribute_strategy.experimental_local_results(outputs)[0].numpy()
        self.loss_sums = self.loss_sums + sums[:2]
        self._interruption.note_flags(sums[2:])
        return {"loss": self.loss_sums[0] / self.loss_sums[1]}

    def _build_step(self, class_weight: dict[int, float] | None) -> Callable:
        strategy = self.distribute_strategy
        class_weights = None if class_weight is None else np.array(list(class_weight.values()), np.float32)

        def train_on_share(*batch: tf.Tensor) -> tf.Tensor:
            *parts, bounds, total, signals = batch
            images, labels, is_real = self._get_own_images(parts, bounds)
            weights = is_real if class_weights is None else is_real * tf.gather(class_weights, labels)
            with tf.GradientTape() as tape:
                probabilities = self(images, training=True)
                losses = self.loss_of_images(labels, probabilities) * weights
                loss = tf.reduce_sum(losses) / total
                scaled = self.optimizer.scale_loss(loss)
            self._update_weights(tape.gradient(scaled, self.trainable_variables))
            self._share_statistics(tf.reduce_sum(is_real) / total)
            for metric in self.metrics:
                metric.update_state(tf.boolean_mask(labels, is_real > 0), tf.boolean_mask(probabilities, is_real > 0))
            sums = tf.concat([[tf.reduce_sum(losses), tf.reduce_sum(is_real)], signals], axis=0)
            return tf.distribute.get_replica_context().all_reduce("sum", sums)

        @functools.partial(tf.function, autograph=False, reduce_retracing=True)
        def train(*batch: tf.Tensor) -> Any:
            return strategy.run(train_on_share, args=batch)

        return train

    @staticmethod
    def _get_own_images(parts: Sequence[tf.Tensor], bounds: tf.Tensor) -> list[tf.Tensor]:
        """Cuts a device's own images, labels and weights out of its process's, before they go to the device."""
        device = tf.distribute.get_replica_context().replica_id_in_sync_group % (bounds.shape[0] - 1)
        with tf.device("/CPU:0"):
            return [part[bounds[device] : bounds[device + 1]] for part in parts]

    def _update_weights(self, gradients: list[tf.Tensor]) -> None:
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            # Each device leaves a step out where its own gradients are not finite: all must do what one does.
            is_finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
            poison = tf.distribute.get_replica_context().all_reduce("sum", tf.where(is_finite, 0.0, np.nan))
            gradients = [gradients[0] + poison, *gradients[1:]]
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))

    def _share_statistics(self, share: tf.Tensor) -> None:
        """Takes the batch normalisations' statistics of all images: each device has moved them by those of its own."""
        norms = [layer for layer in leaf_layers(self) if isinstance(layer, layers.BatchNormalization)]
        variables = [v.value for norm in norms if norm.trainable for v in (norm.moving_mean, norm.moving_variance)]
        if variables:
            parts = [tf.identity(variable) * share for variable in variables]
            sums = tf.distribute.get_replica_context().all_reduce("sum", parts)
            for variable, value in zip(variables, sums, strict=True):
                variable.assign(value)

    def _predict(self, images: np.ndarray) -> np.ndarray:
        local, number = len(self.distribute_strategy.extended.worker_devices), len(images)
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

    def _build_addition(self) -> Callable:
        """Builds the sum of an array over the processes; each device has its process's, so the first one's counts."""
        strategy = self.distribute_strategy

        @functools.partial(tf.function, autograph=False)
        def add(values: tf.Tensor) -> Any:
            def add_once() -> tf.Tensor:
                context = tf.distribute.get_replica_context()
                is_first = context.replica_id_in_sync_group % len(strategy.extended.worker_devices) == 0
                return context.all_reduce("sum", values * tf.cast(is_first, values.dtype))

            return strategy.run(add_once)

        return add

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

        if states:
            self.distribute_strategy.run(spread)


def get_loss(configs: Configs, labels: np.ndarray) -> tuple[Callable, dict[int, float] | None]:
    """Chooses the loss of the mode and balances the classes, where `use_class_balancing` says so.

    Args:
        configs: with `classes` resolved.
        labels: of the training images, as the generator has them.

    Returns:
        The loss of `(labels, probabilities)`, weighted by class in multi-label mode; and the class weights for `fit`
        in single-label mode.
    """
    if configs.multi_label_classification:
        weights = get_multilabel_class_weights(labels, configs.positive_weights_multiply, configs.use_class_balancing)
        return weighted_binary_crossentropy(weights), None
    class_weights = get_class_weights(labels, len(configs.classes)) if configs.use_class_balancing else None
    return keras.losses.sparse_categorical_crossentropy, class_weights


def weighted_binary_crossentropy(class_weights: np.ndarray) -> Callable:
    """Returns a loss: the mean over classes of the binary cross-entropy, weighted by class and presence.

    Args:
        class_weights: float32 `(2, classes)`, for absent and present labels.
    """

    def loss(y_true: keras.KerasTensor, y_pred: keras.KerasTensor) -> keras.KerasTensor:
        y_pred = keras.ops.clip(y_pred, keras.config.epsilon(), 1 - keras.config.epsilon())
        y_true = keras.ops.cast(y_true, y_pred.dtype)
        present = class_weights[1] * y_true * keras.ops.log(y_pred)
        absent = class_weights[0] * (1 - y_true) * keras.ops.log(1 - y_pred)
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


def prepare_backbone(backbone: keras.Model, conv_layers_to_train: int, batch_norm_momentum: float | None) -> None:
    """Makes a backbone trainable as a run wants it: see `freeze_layers` and `set_batch_norm_momentum`."""
    backbone.trainable = True
    freeze_layers(backbone, conv_layers_to_train)
    set_batch_norm_momentum(backbone, batch_norm_momentum)


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
