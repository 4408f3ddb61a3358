"""The training loop, and the signals that end it after a step."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from configs import Configs
from finetune.core.texts import choose_keras_verbosity, show_progress
from finetune.core.values import get_input_size
from finetune.models.backbones import leaf_layers
from finetune.models.compiling import build_optimizer, compile_model, find_averages
from finetune.models.heads import BACKBONE
from generator import AugmentedImageSequence


class Interruption:
    """Records signals while it is entered, so that training ends after its step; a second SIGINT or SIGTERM kills it.

    SIGHUP, which a closing terminal sends, stays ignored if this process was started so, as nohup does.

    Args:
        is_shared: all processes of the run must agree on the signal, by `get_flags` and `note_flags`.
    """

    # Windows has no SIGHUP.
    HANGUP = getattr(signal, "SIGHUP", None)
    NUMBERS = (signal.SIGINT, signal.SIGTERM, *[HANGUP] * (HANGUP is not None))

    def __init__(self, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self.signal = 0
        self._received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Only the main thread of Python handles signals.
        if threading.current_thread() is threading.main_thread():
            for number in self.NUMBERS:
                if number != self.HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self.NUMBERS:
            self._restore(number)

    def get_flags(self) -> np.ndarray:
        """Returns which of the signals this process has received, as zeros and ones."""
        return np.array([self._received == number for number in self.NUMBERS], np.float32)

    def note_flags(self, flags: Sequence[float]) -> None:
        """Takes the sum of all processes' flags: a signal to one process stops all."""
        self.signal = next((number for number, flag in zip(self.NUMBERS, flags, strict=True) if flag), self.signal)

    def _note(self, number: int, _: object) -> None:
        self._received = number
        if not self.is_shared:
            self.signal = number
        # SIGHUP often comes twice, from the terminal and the shell, and service managers send it after SIGTERM.
        if self.HANGUP in self._previous:
            signal.signal(self.HANGUP, signal.SIG_IGN)
        for other in (signal.SIGINT, signal.SIGTERM):
            self._restore(other)

    def _restore(self, number: int) -> None:
        if number in self._previous:
            signal.signal(number, self._previous.pop(number))


def get_training_model(
    model: keras.Model, configs: Configs, loss: Callable, optimizer: keras.optimizers.Optimizer | None = None
) -> TrainingModel:
    """Builds the training model of a model, or of its head on features, in the scope of a strategy.

    Args:
        model: returns probabilities `(batch, classes)`.
        configs: for the optimizer and the steps.
        loss: of labels and probabilities, `(batch,)`.
        optimizer: to continue with; None for a fresh one.
    """
    training_model = TrainingModel(model.inputs, model.outputs, name=model.name)
    if configs.gradient_accumulation_steps > 1:
        training_model.batch_size = configs.batch_size
    if get_input_size(configs) != configs.image_target_size[:2]:
        accept_any_size(training_model)
    training_model.multiplier = configs.backbone_learning_rate_multiplier
    training_model.mirrors = configs.test_time_augmentation == "flip"
    training_model.slow_layers = tuple(layer for layer in model.layers if layer.name == BACKBONE)
    optimizer = optimizer or build_optimizer(configs)
    return compile_model(training_model, optimizer, configs.multi_label_classification, loss)


def accept_any_size(model: keras.Model) -> None:
    """Lets a model, and its inner models, take images of any size, for training at another size.

    The layers of `keras.applications` only depend on the channels; a saved model keeps the size it was built for.
    """
    # A Sequential contains a functional model.
    for layer in (model, getattr(model, "_functional", None)):
        if isinstance(layer, keras.Model) and not isinstance(layer, keras.Sequential):
            layer.input_spec = keras.InputSpec(ndim=len(layer.input_shape))
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            accept_any_size(layer)


class TrainingModel(keras.Model):
    """A model, or a part of one, with its training loop; several devices train it exactly as one would.

    The loop replaces Keras's `fit`: under `tf.distribute`, Keras 3.15 fails on several hosts (keras-team/keras issue
    20585), averages uneven shares as if they were even, and gives each device its own statistics of batch
    normalisation. Build the model and its layers in the scope of a strategy; the batches must be those of
    `AugmentedImageSequence.get_shares`.

    Attributes:
        batch_size: images at a time in a device's memory; the gradients of a larger batch are accumulated.
        multiplier: of the learning rate of `slow_layers`.
        mirrors: predict an image together with its mirror image.
        slow_layers: they learn at the learning rate times `multiplier`.
        loss_sums: the sum of the losses of the epoch's images, and their number, the same in every process.
        seconds_waited: for batches, in the epoch.
    """

    batch_size = 0
    multiplier = 1.0
    mirrors = False
    slow_layers: tuple[keras.Layer, ...] = ()
    seconds_waited = 0.0
    _forward = None

    def compile(self, optimizer: keras.optimizers.Optimizer, loss: Callable, metrics: list, **_: Any) -> None:
        """Takes an optimizer, a loss of each image, and built metrics."""
        super().compile(optimizer)
        self.loss_of_images = keras.losses.get(loss)
        self._own_metrics = metrics
        self.loss_sums = np.zeros(2)
        self._has_spread_seeds = False
        # A step of several devices cannot create variables.
        if not optimizer.built:
            optimizer.build(self.trainable_variables)
        self._step, self._forward = self._build_step(), None

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics given to `compile`; each device counts its own images, and their sum is exact."""
        return self._own_metrics

    def fit(
        self,
        batches: tf.data.Dataset,
        epochs: int,
        initial_epoch: int,
        callbacks: list[keras.callbacks.Callback],
        interruption: Interruption,
    ) -> None:
        """Trains as Keras's `fit` does; a signal in `interruption` stops all processes after the same step."""
        steps = int(batches.cardinality())
        self.stop_training = False
        verbose = choose_keras_verbosity()
        called = keras.callbacks.CallbackList(callbacks, add_progbar=True, verbose=verbose, epochs=epochs, steps=steps)
        called.set_model(self)
        called.on_train_begin()
        self._spread_seeds()
        for epoch in range(initial_epoch, epochs):
            self.reset_metrics()
            self.loss_sums, self.seconds_waited = np.zeros(2), 0.0
            called.on_epoch_begin(epoch)
            # An epoch that was stopped after its last step already has its sums.
            logs = {"loss": self.loss_sums[0] / max(self.loss_sums[1], 1)}
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

    def predict_sequence(self, sequence: AugmentedImageSequence, title: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Predicts the images of a sequence that is not shuffled, each on one device of one process.

        Args:
            sequence: of the images.
            title: of the progress bar; empty for none.

        Returns:
            The outputs of the readable images, float32 `(images, outputs)` in the sequence's order, and which of all
            images are readable, bool `(all images,)`; the same in every process.
        """
        found = np.zeros((len(sequence.paths), self.output_shape[-1] + 1), np.float32)
        with show_progress(len(sequence.paths) * sequence.shares.local // sequence.shares.devices, title) as progress:
            for step, (images, _) in enumerate(sequence.to_dataset().as_numpy_iterator()):
                if len(images):
                    rows = sequence.get_rows(step)
                    found[rows, :-1], found[rows, -1] = self._predict(images), 1
                    progress.update(len(images))
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
        """Returns the gradients of the weighted sum of the images' losses, the probabilities, and the sum."""
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
        scalar = tf.TensorShape([])
        shapes = (scalar, [zero.shape for zero in zeros], tf.TensorShape(self.output_shape), scalar)
        # One part after the other, to save memory.
        return tf.while_loop(lambda end, *_: end < number, add, start, shapes, parallel_iterations=1)[1:]

    @staticmethod
    def _get_own_images(parts: Sequence[tf.Tensor], bounds: tf.Tensor) -> list[tf.Tensor]:
        """Slices a device's images, labels and weights from those of its process, before they go to the device."""
        device = tf.distribute.get_replica_context().replica_id_in_sync_group % (bounds.shape[0] - 1)
        with tf.device("/CPU:0"):
            return [part[bounds[device] : bounds[device + 1]] for part in parts]

    def _update_weights(self, gradients: list[tf.Tensor]) -> None:
        variables, slow = self.trainable_variables, []
        is_scaled = isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)
        if is_scaled and self.distribute_strategy.num_replicas_in_sync > 1:
            # A device skips the step if its own gradients are not finite: then all must skip it.
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
        """Combines the statistics of batch normalisation, which each device has updated from its own images."""
        norms = [layer for layer in leaf_layers(self) if isinstance(layer, layers.BatchNormalization)]
        variables = [v.value for norm in norms if norm.trainable for v in (norm.moving_mean, norm.moving_variance)]
        if variables:
            parts = [tf.identity(variable) * share for variable in variables]
            sums = tf.distribute.get_replica_context().all_reduce("sum", parts)
            for variable, value in zip(variables, sums, strict=True):
                variable.assign(value)

    def _update_metrics(self, labels: tf.Tensor, probabilities: tf.Tensor, is_real: tf.Tensor) -> None:
        """Counts images, mixed ones by their main labels."""
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
            """Predicts one device's images, as the mean over their views."""
            (images,) = self._get_own_images([images], bounds)
            views = [images]
            if self.mirrors:
                is_features = len(images.shape) == 3
                views = tf.unstack(images, axis=1) if is_features else [images, tf.reverse(images, axis=[2])]
            return tf.add_n([self(view, training=False) for view in views]) / len(views)

        @functools.partial(tf.function, autograph=False, reduce_retracing=True)
        def forward(images: tf.Tensor, bounds: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return strategy.experimental_local_results(strategy.run(predict_share, args=(images, bounds)))

        return forward

    @functools.partial(tf.function, autograph=False)
    def _add_over_processes(self, values: tf.Tensor) -> Any:
        """Adds an array over the processes; only the first device of each process counts."""
        local = self._local_devices

        def add_once() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            is_first = context.replica_id_in_sync_group % local == 0
            return context.all_reduce("sum", values * tf.cast(is_first, values.dtype))

        return self.distribute_strategy.run(add_once)

    def _spread_seeds(self) -> None:
        """Gives each device its own random states: dropout would drop the same units on all of them."""
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
