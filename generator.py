"""The Keras sequence of a table: batches of uint8 RGB images, which workers read and augment."""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from augmenter import build_augmenter
from configs import Configs
from finetune.core.arguments import take_flag, take_names, take_path, take_rows
from finetune.core.options import UserError
from finetune.core.texts import join_names, show_count
from finetune.core.values import get_input_size
from finetune.data.data_check import check_images
from finetune.data.groups import pick_groups, read_group_names, read_groups
from finetune.data.inspection import tell_assumed_range, tell_unfit_range
from finetune.data.stores import join_path
from finetune.data.tables import IMAGE_COLUMN, encode_labels, read_table
from finetune.loading.batch_processes import BatchProcesses
from finetune.loading.batches import ImageBatches, Shares
from finetune.loading.caches import build_cache

# More threads would wait for Python's lock, which an image holds for an eighth of its time: benchmarks/lock.py.
MOST_THREADS = 4
# Seconds that Python's exit waits for unfinished batches.
PATIENCE = 10

_making: set[int] = set()
_has_ended = threading.Event()


@atexit.register
def _end_batches() -> None:
    """Lets threads finish their batches and refuses new ones before Python exits.

    Otherwise a thread would wait for Python's lock for ever, and TensorFlow for its batch.
    """
    _has_ended.set()
    end = time.monotonic() + PATIENCE
    while _making and time.monotonic() < end:
        time.sleep(0.01)
    # Meanwhile, batches that TensorFlow has already requested are refused.
    time.sleep(0.05)


class AugmentedImageSequence(ImageBatches, keras.utils.Sequence):
    """The batches of `ImageBatches` for Keras, prepared in advance by workers.

    Args:
        workers: threads or processes that prepare batches.
        max_queue_size: batches kept ready.
        facts: the arguments of `ImageBatches`.
    """

    def __init__(self, *facts: Any, workers: int = 1, max_queue_size: int = 12, **named_facts: Any) -> None:
        Configs.check_values(generator_workers=workers, generator_queue_length=max_queue_size)
        keras.utils.Sequence.__init__(self, workers=max(workers, 1), max_queue_size=max_queue_size)
        ImageBatches.__init__(self, *facts, **named_facts)
        self.error: UserError | None = None
        # The table's rows in the order of `paths`, and their groups, if there are any.
        self.table: pd.DataFrame | None = None
        self.groups: np.ndarray | None = None
        self.group_names = np.zeros(0, object)
        self.processes: BatchProcesses | None = None

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """Returns batch `first_step + index` of this epoch, as `ImageBatches` does."""
        return self._make(super().__getitem__, index)

    def _make(self, make: Callable[[int], tuple[np.ndarray, ...]], index: int) -> tuple[np.ndarray, ...]:
        thread = threading.get_ident()
        _making.add(thread)
        try:
            if _has_ended.is_set():
                raise RuntimeError("Python is ending.")
            return make(index)
        except UserError as error:
            # Keras replaces a worker's error by its own: `naming_bad_images` brings this one back.
            self.error = error
            raise
        finally:
            _making.discard(thread)

    def get_groups(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray | None:
        """Returns the groups of the images at these positions in `paths`."""
        return pick_groups(self.groups, rows)

    def get_read_groups(self) -> np.ndarray | None:
        """Returns the groups of the images that could be read."""
        return self.get_groups(self._list_read())

    def get_read_table(self) -> pd.DataFrame:
        """Returns the table's rows whose images could be read."""
        return self.table.drop(index=list(self.bad_images))

    def to_dataset(self) -> tf.data.Dataset:
        """Returns the batches for `fit` or `predict`, prepared in advance by TensorFlow's threads.

        Each pass is one epoch: that of `epoch` when it begins. With `shares` and `shuffle`, a batch is the result of
        `get_shares`.
        """
        return self._make_dataset(tf.TensorSpec((None, *self.image_size, 3), tf.uint8))

    def _make_dataset(self, inputs: tf.TensorSpec) -> tf.data.Dataset:
        labels = self._batch_labels_of(slice(0))
        specs = [inputs, tf.TensorSpec((None, *labels.shape[1:]), labels.dtype)]
        name = "__getitem__"
        if self.gives_shares:
            name = "get_shares"
            specs += [tf.TensorSpec((None,), tf.float32), tf.TensorSpec((self.shares.local + 1,), tf.int32)]
            specs += [tf.TensorSpec((), tf.float32)]

        self._start_processes()
        make = getattr(self, name)
        if self.processes:
            make = functools.partial(self._make, functools.partial(self.processes.make, name))

        def load(index: tf.Tensor) -> tuple[tf.Tensor, ...]:
            # Not stateful: op determinism would otherwise run it in the model's thread.
            types = [spec.dtype for spec in specs]
            batch = tf.numpy_function(make, [index], types, stateful=False)
            return tuple(tf.ensure_shape(part, spec.shape) for part, spec in zip(batch, specs, strict=True))

        options = tf.data.Options()
        options.threading.private_threadpool_size = self.workers
        batches = tf.data.Dataset.range(len(self)).map(load, num_parallel_calls=self.workers, deterministic=True)
        return batches.prefetch(self.max_queue_size).with_options(options)

    def _start_processes(self) -> None:
        """Starts processes instead of threads if many workers augment or crop images.

        Images that are only read hold Python's lock too briefly to matter.
        """
        is_changed = self.augmenter is not None or self.crops
        if self.processes is None and self.workers > MOST_THREADS and is_changed and self.cache is None:
            try:
                self.processes = BatchProcesses(self, self.workers)
            except Exception as error:
                # A user's augmenter that cannot be pickled stays in threads. Pickling raises errors of three types, all
                # with one of these words; the second since Python 3.13.
                if not any(word in str(error) for word in ("pickle", "local object")):
                    raise


def get_generator(
    csv_path: str,
    class_names: Sequence[str],
    configs: Configs,
    training: bool,
    bad_rows: Collection[int] | None = None,
    shares: Shares | None = None,
) -> AugmentedImageSequence:
    """Builds the generator of one CSV file.

    Args:
        csv_path: the table.
        class_names: in the model's order.
        configs: the options.
        training: True augments, mixes and reshuffles the images; False keeps the order of the table.
        bad_rows: line numbers to leave out, as found by the data check. None checks the images now.
        shares: the devices to feed, if several train together.

    Raises:
        UserError: the CSV, a label, an image or an argument is invalid.
    """
    Configs.check(configs)
    csv_path, class_names = take_path("csv_path", csv_path), take_names(class_names)
    training = take_flag("training", training)
    table, paths, labels = _list_images(csv_path, class_names, configs, bad_rows)
    image_size = configs.image_target_size[:2] if training else get_input_size(configs)
    sequence = AugmentedImageSequence(
        paths,
        labels,
        image_size=image_size,
        batch_size=configs.batch_size * (configs.gradient_accumulation_steps if training else 1),
        augmenter=build_augmenter(configs.augmentation_strength) if training else None,
        shuffle=training,
        seed=configs.random_seed or 0,
        workers=configs.generator_workers,
        max_queue_size=configs.generator_queue_length,
        cache=build_cache(configs, paths, image_size),
        max_pixels=configs.max_image_pixels,
        skip_bad_images=configs.skip_bad_images,
        shares=shares,
        mixup_alpha=configs.mixup_alpha,
        cutmix_alpha=configs.cutmix_alpha,
        number_of_classes=len(class_names),
        crop_area=configs.random_crop_area if training else (1.0, 1.0),
        resize_mode=configs.resize_mode,
        pixel_range=configs.pixel_range,
    )
    sequence.table, sequence.groups = table, read_groups(table, configs.csv_label_column)
    sequence.group_names = read_group_names(table, configs.csv_label_column)
    return sequence


def _list_images(
    csv_path: str, class_names: Sequence[str], configs: Configs, bad_rows: Collection[int] | None
) -> tuple[pd.DataFrame, list[str], np.ndarray]:
    """Returns the table's rows with usable images, and the paths and encoded labels of those."""
    bad_rows = bad_rows if bad_rows is None else take_rows("bad_rows", bad_rows)
    table = read_table(csv_path, configs.csv_label_column, configs.multi_label_classification)
    labels = encode_labels(table[configs.csv_label_column], class_names, configs.multi_label_classification, csv_path)
    paths = [join_path(configs.image_directory, path) for path in table[IMAGE_COLUMN]]
    if bad_rows is None:
        bad_rows = check_images(
            paths, csv_path, configs.max_image_pixels, configs.generator_workers, configs.skip_bad_images
        )
        tell_assumed_range(csv_path, paths, configs.pixel_range)
        tell_unfit_range(csv_path, paths, configs.pixel_range)
    kept = np.setdiff1d(np.arange(len(paths)), np.array(sorted(bad_rows), int) - 2)
    if not kept.size:
        raise UserError(f"{csv_path}: none of the {len(paths)} images can be read. Check image_directory.")
    return table.iloc[kept].reset_index(drop=True), [paths[row] for row in kept], labels[kept]


@contextlib.contextmanager
def naming_bad_images(*sequences: AugmentedImageSequence) -> Iterator[None]:
    """Raises a sequence's own error, which names the image, instead of Keras's."""
    try:
        yield
    except Exception as error:
        if reason := next((sequence.error for sequence in sequences if sequence.error), None):
            raise reason from error
        raise


def tell_bad_images(sequence: AugmentedImageSequence) -> None:
    """Prints the images that could not be read and were left out."""
    if bad_rows := sorted(sequence.bad_images):
        paths = join_names([sequence.paths[row] for row in bad_rows])
        print(f"Left out {show_count(len(bad_rows), 'image')} that could not be read: {paths}")
