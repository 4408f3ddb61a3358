"""Measures ways to read a folder of photos as training batches, each in its own process on the given cores.

python benchmarks/loaders.py NAME FOLDER CORES    prints images/s; FOLDER has one folder per class
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SIZE, BATCH, SECONDS = 224, 16, 3


def list_images(folder: str) -> list[str]:
    """Returns the files below a folder."""
    return sorted(str(path) for path in Path(folder).glob("*/*"))


def decode_full(folder: str, cores: int) -> Iterator[int]:
    """The limit: the decoder alone, on whole images."""
    import cv2

    cv2.setNumThreads(1)
    for path in itertools.cycle(list_images(folder)):
        cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
        yield 1


def decode_scaled(folder: str, cores: int) -> Iterator[int]:
    """The stricter limit: the decoder alone, at the scale that the generator uses."""
    from finetune.data.images import read_image

    for path in itertools.cycle(list_images(folder)):
        read_image(path, (SIZE, SIZE))
        yield 1


def classical(folder: str, cores: int) -> Iterator[int]:
    """The loader of old tutorials: Pillow, float64, scikit-image's resize, imgaug on float32, image by image."""
    from imgaug import augmenters as iaa
    from PIL import Image
    from skimage.transform import resize

    augmenter = iaa.Sequential(
        [
            iaa.Fliplr(0.5),
            iaa.Affine(rotate=(-15, 15)),
            iaa.Affine(scale=(0.9, 1.15)),
            iaa.Affine(shear=(-6, 6)),
            iaa.Affine(translate_percent=(-0.08, 0.08)),
            iaa.Multiply((0.9, 1.1), per_channel=0.5),
            iaa.LinearContrast((0.8, 1.25)),
        ]
    )
    for path in itertools.cycle(list_images(folder)):
        image = np.asarray(Image.open(path).convert("RGB")) / 255.0
        augmenter.augment_image(resize(image, (SIZE, SIZE)).astype(np.float32))
        yield 1


def tf_data(folder: str, cores: int) -> Iterator[int]:
    """Keras's own: image_dataset_from_directory with Keras's augmentation layers, mapped by tf.data."""
    import keras
    import tensorflow as tf

    layers = keras.layers
    augment = keras.Sequential(
        [
            layers.RandomFlip("horizontal"),
            layers.RandomRotation(15 / 360),
            layers.RandomZoom((-0.15, 0.1)),
            layers.RandomTranslation(0.08, 0.08),
            layers.RandomBrightness(0.1),
            layers.RandomContrast(0.2),
        ]
    )
    images = keras.utils.image_dataset_from_directory(folder, image_size=(SIZE, SIZE), batch_size=BATCH, verbose=0)
    images = images.map(lambda x, y: (augment(x, training=True), y), num_parallel_calls=tf.data.AUTOTUNE)
    for batch, _ in images.repeat().prefetch(tf.data.AUTOTUNE):
        yield len(batch)


def tf_data_once(folder: str, cores: int) -> Iterator[int]:
    """The same with one warp instead of resizing and three layers: TensorFlow's ImageProjectiveTransformV3."""
    import tensorflow as tf

    def draw(path: tf.Tensor) -> tf.Tensor:
        picture = tf.image.decode_jpeg(tf.io.read_file(path), channels=3)
        sides = tf.cast(tf.shape(picture)[:2], tf.float32)
        angle, zoom = tf.random.uniform([], -15, 15) * np.pi / 180, tf.random.uniform([], 0.87, 1.1)
        mirror = tf.where(tf.random.uniform([]) < 0.5, -1.0, 1.0)
        x, y = sides[1] / SIZE * zoom, sides[0] / SIZE * zoom
        a, b = x * tf.cos(angle) * mirror, x * tf.sin(angle)
        c, d = -y * tf.sin(angle) * mirror, y * tf.cos(angle)
        shift_x, shift_y = (tf.random.uniform([], -0.08, 0.08) * side for side in (sides[1], sides[0]))
        left, top = sides[1] / 2 + shift_x - (a + b) * SIZE / 2, sides[0] / 2 + shift_y - (c + d) * SIZE / 2
        zero = tf.zeros([])
        image = tf.raw_ops.ImageProjectiveTransformV3(
            images=picture[None],
            transforms=tf.stack([a, b, left, c, d, top, zero, zero])[None],
            output_shape=[SIZE, SIZE],
            interpolation="BILINEAR",
            fill_mode="REFLECT",
            fill_value=0.0,
        )[0]
        image = tf.image.random_contrast(tf.cast(image, tf.float32), 0.8, 1.25)
        return tf.clip_by_value(image * tf.random.uniform([], 0.9, 1.1), 0, 255)

    paths = tf.data.Dataset.from_tensor_slices(list_images(folder)).repeat()
    batches = paths.map(draw, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH)
    for batch in batches.prefetch(tf.data.AUTOTUNE):
        yield len(batch)


def warp_once(picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Resizes, mirrors, turns, scales and shifts an image at random by one OpenCV warp."""
    import cv2

    mirror = generator.choice([-1, 1])
    matrix = cv2.getRotationMatrix2D((SIZE / 2, SIZE / 2), generator.uniform(-15, 15), generator.uniform(0.87, 1.1))
    matrix[:, 2] += generator.uniform(-0.08, 0.08, 2) * SIZE + SIZE * matrix[:, 0] * (mirror < 0)
    matrix[:, 0] *= mirror
    matrix *= np.array(picture.shape[1::-1])[:, None] / SIZE
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(picture, matrix, (SIZE, SIZE), flags=flags, borderMode=cv2.BORDER_REFLECT_101)


def pytorch(folder: str, cores: int, once: bool = False) -> Iterator[int]:
    """A DataLoader with Pillow and albumentations, one worker process per core.

    Args:
        folder: one folder per class.
        cores: worker processes, if more than one.
        once: OpenCV warps each image once, instead of albumentations' Resize, HorizontalFlip and Affine.
    """
    import albumentations
    import cv2
    import torch
    from PIL import Image

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    colours = albumentations.RandomBrightnessContrast(0.1, 0.2, p=1.0)
    places = [
        albumentations.Resize(SIZE, SIZE, interpolation=cv2.INTER_AREA),
        albumentations.HorizontalFlip(p=0.5),
        albumentations.Affine(
            rotate=(-15, 15), scale=(0.9, 1.15), shear=(-6, 6), translate_percent=(-0.08, 0.08), p=1.0
        ),
    ]
    augment = albumentations.Compose([*([] if once else places), colours])
    generator = np.random.default_rng(0)

    class Photos(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.paths = list_images(folder)

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, row: int) -> torch.Tensor:
            image = np.asarray(Image.open(self.paths[row]).convert("RGB"))
            return torch.from_numpy(augment(image=warp_once(image, generator) if once else image)["image"])

    workers = {"num_workers": cores, "persistent_workers": True} if cores > 1 else {}
    loader = torch.utils.data.DataLoader(Photos(), batch_size=BATCH, shuffle=True, **workers)
    while True:
        for batch in loader:
            yield len(batch)


def ours(folder: str, cores: int, augmented: bool = True, cache: str = "none", known: bool = False) -> Iterator[int]:
    """The project's generator, one thread per core.

    Args:
        folder: one folder per class.
        cores: threads.
        augmented: with the default augmentation.
        cache: as the option `image_cache`.
        known: every image has been cached.
    """
    from augmenter import build_augmenter
    from finetune.core.devices import keep_freed_memory
    from finetune.loading.caches import DiskCache, MemoryCache
    from generator import AugmentedImageSequence

    keep_freed_memory()  # as every script does
    paths = list_images(folder)
    with tempfile.TemporaryDirectory() as cache_folder:
        caches = {
            "none": lambda: None,
            "memory": lambda: MemoryCache(len(paths), (SIZE, SIZE)),
            "disk": lambda: DiskCache(paths, (SIZE, SIZE), cache_folder),
        }
        sequence = AugmentedImageSequence(
            paths,
            np.zeros(len(paths), np.int32),
            (SIZE, SIZE),
            BATCH,
            build_augmenter() if augmented else None,
            shuffle=True,
            workers=cores,
            cache=caches[cache](),
        )
        if known:
            for index in range(len(sequence)):
                sequence[index]
        for batch, _ in sequence.to_dataset().repeat():
            yield len(batch)


def decode_processes(folder: str, cores: int) -> Iterator[int]:
    """The limit of all cores: one process per core, each as `decode_scaled`."""
    from multiprocessing import get_context

    context = get_context("spawn")
    counts = [context.Value("q", 0, lock=False) for _ in range(cores)]
    for count in counts:
        context.Process(target=_count_decoded, args=(folder, count), daemon=True).start()
    while not all(count.value for count in counts):
        time.sleep(0.01)
    before = sum(count.value for count in counts)
    while True:
        time.sleep(0.1)
        after = sum(count.value for count in counts)
        yield after - before
        before = after


def _count_decoded(folder: str, count: object) -> None:
    for number in decode_scaled(folder, 1):
        count.value += number


def processes(folder: str, cores: int) -> Iterator[int]:
    """The project's generator with processes, as it works above `generator.MOST_THREADS` workers."""
    import generator

    generator.MOST_THREADS = 0
    return ours(folder, cores)


CONTENDERS: dict[str, Callable[[str, int], Iterator[int]]] = {
    "decode_full": decode_full,
    "decode_scaled": decode_scaled,
    "classical": classical,
    "tf_data": tf_data,
    "tf_data_once": tf_data_once,
    "pytorch": pytorch,
    "pytorch_once": functools.partial(pytorch, once=True),
    "ours": ours,
    "ours_plain": lambda folder, cores: ours(folder, cores, augmented=False),
    "ours_memory": lambda folder, cores: ours(folder, cores, augmented=False, cache="memory", known=True),
    "ours_disk": lambda folder, cores: ours(folder, cores, augmented=False, cache="disk", known=True),
    "processes": processes,
    "decode_processes": decode_processes,
}


def main() -> None:
    """Measures one contender and prints images/s."""
    name, folder, cores = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    batches = CONTENDERS[name](folder, cores)
    # Warm up: fill the page cache, trace graphs, fill the queues and use a part of them.
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS / 2:
        next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        images += next(batches)
    print(images / (time.perf_counter() - start))
    sys.stdout.flush()
    for worker in multiprocessing.active_children():
        worker.terminate()
    os._exit(0)  # some contenders have threads and processes that would not end


if __name__ == "__main__":
    main()
