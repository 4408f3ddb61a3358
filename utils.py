"""What several scripts share: tables and labels, class weights, seeds, GPU set-up, files, saving and loading models.

TensorFlow, Keras and pandas are imported inside the functions that need them, so that the scripts start at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from configs import Configs, UserError

if TYPE_CHECKING:
    import keras
    import pandas as pd

    from generator import AugmentedImageSequence
    from metrics import Decision

IMAGE_COLUMN = "path"
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LABEL_SEPARATOR = "$"
MODEL_SUFFIXES = (".keras", ".h5", ".hdf5")
LONGEST_LIST = 5
TEMPORARY_PREFIX = ".tmp-"


# Files


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """Yields the name of a temporary file, which takes the place of `path` once it is whole and on the disk.

    It has the same name in a temporary folder beside `path`: some writers tell the format by the ending. The
    folder's name begins with this process's number, so that what a killed process leaves can be told.

    Raises:
        UserError: the folder cannot be made or written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary_folder = os.path.join(folder, f"{TEMPORARY_PREFIX}{os.getpid()}-{name}")
    temporary = os.path.join(temporary_folder, name)
    try:
        os.makedirs(temporary_folder, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}. Free the space or choose another path."
        ) from error
    finally:
        shutil.rmtree(temporary_folder, ignore_errors=True)


def sync_folder(folder: str) -> None:
    """Brings a folder's list of names to the disk, where the system has that (Windows has not)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def write_json(path: str, content: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: str, table: pd.DataFrame) -> None:
    """Writes a table as CSV, without its index, atomically."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8")


def walk_visible(folder_path: str) -> Iterator[str]:
    """Yields the files below a folder; hidden files and folders are left out.

    Raises:
        UserError: a name is no text, so that a CSV file cannot hold it.
    """
    for folder, subfolders, files in os.walk(folder_path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            path = os.path.join(folder, file)
            check_file_name(path)
            if not file.startswith("."):
                yield path


def check_file_name(path: str) -> None:
    """Raises UserError where a path is no text, so that a CSV file cannot hold it."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The file name {path!a} is not UTF-8. Rename the file.") from error


# Tables and labels


def read_table(csv_path: str, label_column: str, multi_label: bool = False) -> pd.DataFrame:
    """Reads a CSV file of images.

    Args:
        csv_path: a CSV file with the columns `path` and `label_column`; more columns are kept.
        label_column: name of the column with the labels.
        multi_label: whether a label may hold several class names; none of them may be empty then.

    Returns:
        A table of texts, one row an image.

    Raises:
        UserError: the file is missing, empty or no CSV, or lacks a column, a path or a label.
    """
    import pandas as pd

    try:
        table = pd.read_csv(csv_path, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"Cannot read the CSV file {csv_path}: {error.strerror}. Check the path.") from error
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise UserError(f"{csv_path} is not a UTF-8 CSV file: {str(error).strip()}. Save it as one.") from error
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{csv_path} is empty. Expected the columns {IMAGE_COLUMN} and {label_column}.") from error
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(f"{csv_path} has rows with more fields than its header. Quote the fields that hold a comma.")
    blank = (table == "").all(axis=1).to_numpy()
    table = table.iloc[: len(table) - int(np.argmin(blank[::-1])) if not blank.all() else 0]
    for column, remedy in ((IMAGE_COLUMN, "Rename the column with the images"), (label_column, "Set csv_label_column")):
        if column not in table.columns:
            columns = ", ".join(table.columns)
            raise UserError(f"{csv_path} has no column '{column}'. Its columns: {columns}. {remedy} accordingly.")
        if empty := np.flatnonzero(table[column].str.strip() == "").tolist():
            raise UserError(f"{csv_path}, row {empty[0] + 2}: the column '{column}' is empty. Fill it or drop the row.")
    empty_name = rf"(?:^|\{LABEL_SEPARATOR})\s*(?:\{LABEL_SEPARATOR}|$)"
    if multi_label and (wrong := np.flatnonzero(table[label_column].str.contains(empty_name)).tolist()):
        raise UserError(
            f"{csv_path}, row {wrong[0] + 2}: the label '{table[label_column].iloc[wrong[0]]}' has an empty class "
            f"name beside a '{LABEL_SEPARATOR}'. Correct it."
        )
    if table.empty:
        raise UserError(f"{csv_path} has no rows. Expected one row an image, with {IMAGE_COLUMN} and {label_column}.")
    return table


def split_label(label: str, multi_label: bool) -> list[str]:
    """Returns the class names in one label: `class1$class2` holds two where `multi_label` is set."""
    return label.split(LABEL_SEPARATOR) if multi_label else [label]


def find_class_names(labels: Sequence[str], multi_label: bool) -> list[str]:
    """Returns the class names in labels, sorted, so that every process agrees on their order."""
    return sorted({name for label in set(labels) for name in split_label(label, multi_label)})


def resolve_class_names(
    classes: Sequence[str] | None, train_csv: str, label_column: str, multi_label: bool
) -> list[str]:
    """Returns the class names in their order: those given, or those found in the training CSV, sorted.

    Raises:
        UserError: the given classes are not those of the training CSV, or there are fewer than two.
    """
    found = find_class_names(read_table(train_csv, label_column, multi_label)[label_column], multi_label)
    if classes is not None and set(classes) != set(found):
        missing, surplus = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
        faults = [f"it lacks {join_names(missing)}"] * bool(missing)
        faults += [f"{train_csv} has no image of {join_names(surplus)}"] * bool(surplus)
        raise UserError(f"classes does not match {train_csv}: {'; '.join(faults)}. Correct it, or set it to none.")
    if len(found) < (1 if multi_label else 2):
        raise UserError(f"{train_csv} holds one class, {join_names(found)}. Expected at least two to tell apart.")
    return list(classes) if classes is not None else found


def join_names(names: Sequence[Any]) -> str:
    """Returns the first few names joined by commas, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:LONGEST_LIST])
    return shown + (f" and {len(names) - LONGEST_LIST} more" if len(names) > LONGEST_LIST else "")


def encode_labels(labels: Sequence[str], class_names: Sequence[str], multi_label: bool, csv_path: str) -> np.ndarray:
    """Turns labels into what the model is trained on.

    Returns:
        int32 `(images,)`, positions in `class_names`; multi-label: uint8 `(images, classes)` of zeros and ones.

    Raises:
        UserError: a label that is none of `class_names`, with its row in `csv_path`.
    """
    import pandas as pd

    positions = {name: position for position, name in enumerate(class_names)}
    codes, distinct = pd.factorize(np.asarray(labels, dtype=object))
    encoded = np.zeros((len(distinct), len(class_names)), np.uint8)
    for row, label in enumerate(distinct):
        for name in split_label(label, multi_label):
            if name not in positions:
                line = int(np.flatnonzero(codes == row)[0]) + 2
                raise UserError(
                    f"{csv_path}, row {line}: the label '{name}' is none of the {len(class_names)} classes of the "
                    f"training set ({join_names(class_names)}). Correct it, drop the row, or train with it."
                )
            encoded[row, positions[name]] = 1
    return encoded[codes] if multi_label else encoded.argmax(axis=1).astype(np.int32)[codes]


def check_images(paths: Sequence[str], csv_path: str) -> None:
    """Checks that every path is a file that starts as an image does; decoding waits until it is read.

    Raises:
        UserError: names the first few files that are missing, empty or no images, with their rows.
    """
    import cv2

    faults = []
    for row, path in enumerate(paths, start=2):
        if not os.path.isfile(path):
            faults.append(f"row {row}: {path} does not exist")
        elif not os.path.getsize(path):
            faults.append(f"row {row}: {path} is empty")
        elif not cv2.haveImageReader(path):
            faults.append(f"row {row}: {path} is no image that OpenCV reads")
    if faults:
        more = f" (and {len(faults) - LONGEST_LIST} more rows)" if len(faults) > LONGEST_LIST else ""
        raise UserError(
            f"{csv_path}: {'; '.join(faults[:LONGEST_LIST])}{more}. Correct image_directory or the paths, "
            "or drop the rows."
        )


# Class weights


def get_class_weights(labels: np.ndarray, number_of_classes: int) -> dict[int, float]:
    """Weighs rare classes more in the loss, by the logarithm of their inverse frequency.

    A class with the mean number of images or more weighs 1, one with a fraction `f` of the mean `1 + ln(1 / f)`.

    Args:
        labels: int `(images,)`, class positions.
        number_of_classes: classes in total; one without images weighs 1.

    Returns:
        The weight, never under 1, of each class position.
    """
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
    """
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


# Seeds and devices


def set_seed(random_seed: int | None, deterministic: bool = False) -> int:
    """Seeds Python, NumPy and Keras; None draws a seed.

    Args:
        random_seed: below 2**32.
        deterministic: also make TensorFlow's operations give the same bits every time, where they can.

    Returns:
        The seed in use.
    """
    import keras

    seed = int.from_bytes(os.urandom(4), "little") if random_seed is None else random_seed
    keras.utils.set_random_seed(seed)
    if deterministic:
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    return seed


def set_gpu_usage(gpu_percentage: float) -> None:
    """Limits TensorFlow to a share of every visible GPU's memory; to be called before TensorFlow uses one.

    Args:
        gpu_percentage: in `[0, 1]`; 0 hides all GPUs.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpu_percentage == 0:
        tf.config.set_visible_devices([], "GPU")
        return
    for gpu, memory in zip(gpus, gpu_memory_sizes(len(gpus)), strict=True):
        limit = tf.config.LogicalDeviceConfiguration(memory_limit=int(memory * gpu_percentage) // 2**20)
        tf.config.set_logical_device_configuration(gpu, [limit])


def keep_freed_memory() -> None:
    """Lets the C library reuse the memory that TensorFlow frees, where it is glibc.

    The first `tf.data` generator of TensorFlow 2.21 tells glibc to give freed memory back to the system at once, and
    every training step then asks for it anew: on 2 cores an epoch of MobileNet took 7.5 s instead of 2.9 s.
    """
    import tensorflow as tf

    for _ in tf.data.Dataset.from_generator(lambda: iter([0]), output_signature=tf.TensorSpec((), tf.int32)):
        pass
    trim_threshold, mmap_threshold, largest_mmap_threshold = -1, -3, 2**25
    with contextlib.suppress(OSError, AttributeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(trim_threshold, 2**31 - 1)
        c_library.mallopt(mmap_threshold, largest_mmap_threshold)


def gpu_memory_sizes(number_of_gpus: int) -> list[int]:
    """Asks the CUDA driver for the memory of its GPUs, in its own order, which TensorFlow shares.

    Returns:
        Bytes of each GPU.

    Raises:
        UserError: the driver does not answer.
    """
    if not number_of_gpus:
        return []
    sizes = []
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        status = cuda.cuInit(0)
        for position in range(number_of_gpus):
            device, size = ctypes.c_int(), ctypes.c_size_t()
            status = status or cuda.cuDeviceGet(ctypes.byref(device), position)
            status = status or cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
            sizes.append(size.value)
    except (OSError, AttributeError) as error:
        raise UserError(
            f"Cannot ask the CUDA driver for the GPUs' memory: {error}. Set gpu_percentage to 0."
        ) from error
    if status:
        raise UserError(f"The CUDA driver answered with error {status}. Check nvidia-smi, or set gpu_percentage to 0.")
    return sizes


# Factories that take configs


def get_generator(
    csv_path: str, class_names: Sequence[str], configs: Configs, training: bool
) -> AugmentedImageSequence:
    """Builds the generator of one CSV file: augmented and reshuffled every epoch for training, else in order.

    Raises:
        UserError: the CSV, a label or an image in it is not usable.
    """
    from augmenter import build_augmenter
    from generator import AugmentedImageSequence, DiskCache, MemoryCache

    table = read_table(csv_path, configs.csv_label_column, configs.multi_label_classification)
    labels = encode_labels(table[configs.csv_label_column], class_names, configs.multi_label_classification, csv_path)
    paths = [os.path.join(configs.image_directory, path) for path in table[IMAGE_COLUMN]]
    check_images(paths, csv_path)
    image_size = configs.image_target_size[:2]
    cache = None
    if configs.image_cache == "memory":
        cache = MemoryCache(len(paths), image_size)
    elif configs.image_cache == "disk":
        cache = DiskCache(paths, image_size, configs.image_cache_path)
    return AugmentedImageSequence(
        paths,
        labels,
        image_size=image_size,
        batch_size=configs.batch_size,
        augmenter=build_augmenter() if training else None,
        shuffle=training,
        seed=configs.random_seed or 0,
        workers=configs.generator_workers,
        max_queue_size=configs.generator_queue_length,
        cache=cache,
    )


def get_optimizer(optimizer_type: str, learning_rate: float) -> keras.optimizers.Optimizer:
    """Builds the Keras optimizer of that name."""
    import keras

    return getattr(keras.optimizers, optimizer_type)(learning_rate=learning_rate)


# Models and the folders of runs


def resolve_model_path(path: str, preferred: Sequence[str] = ("best_model.keras", "latest_model.keras")) -> str:
    """Finds the model file that a path means.

    Args:
        path: a model file, or a run's folder.
        preferred: names of files in a run's folder, the first choice first.

    Returns:
        An existing file; where it is not the named one, the substitution is printed.

    Raises:
        UserError: there is no model.
    """
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        for name in preferred:
            if os.path.isfile(os.path.join(path, name)):
                return os.path.join(path, name)
        raise UserError(f"The folder {path} holds no model. Expected {' or '.join(preferred)}. Train first.")
    stem, suffix = os.path.splitext(path)
    for other in MODEL_SUFFIXES:
        if suffix in MODEL_SUFFIXES and os.path.isfile(stem + other):
            print(f"{path} does not exist: using {stem + other} beside it.")
            return stem + other
    raise UserError(f"There is no model at {path}. Expected a .keras, .h5 or .hdf5 file, or the folder of a run.")


def find_trained_model(configs: Configs) -> tuple[str, Configs]:
    """Finds the trained model that configs name, and what its own `configs.json` says of it.

    Args:
        configs: `load_model_path`, or where that is empty `save_model_path`, leads to the model.

    Returns:
        The model file, and `configs` with the options that describe a model taken from the file beside it, or where
        there is none the classes from the training CSV. Where `load_model_path` alone is given, `save_model_path`
        becomes the model's folder: what is found out about a run belongs there, not into another one.

    Raises:
        UserError: there is no model, or a given option contradicts it.
    """
    model_path = resolve_model_path(configs.load_model_path or configs.save_model_path)
    configs = describe_model(configs, model_path)
    if "save_model_path" not in configs.given:
        configs = configs.replace(save_model_path=os.path.dirname(model_path) or ".")
    if configs.classes is None:
        class_names = resolve_class_names(
            None, configs.train_csv, configs.csv_label_column, configs.multi_label_classification
        )
        configs = configs.replace(classes=class_names)
    return model_path, configs


def describe_model(configs: Configs, model_path: str) -> Configs:
    """Takes the options that describe a model from the `configs.json` beside it, where there is one.

    Raises:
        UserError: an option that the user gave contradicts it.
    """
    stored_path = os.path.join(os.path.dirname(os.path.abspath(model_path)), "configs.json")
    if not os.path.isfile(stored_path):
        return configs
    stored = Configs.read_json(stored_path)
    described = {
        name: stored[name]
        for name, option in Configs.options().items()
        if option.metadata["describes_model"] and name in stored
    }
    for name in sorted(described.keys() & configs.given):
        given = getattr(configs, name)
        # For the classes alone, none means that they are to be found.
        if given != described[name] and not (name == "classes" and given is None):
            raise UserError(
                f"{name} is {described[name]!r} for the model {model_path} (its configs.json says so). "
                f"Received: {given!r}. Leave {name} out, or name another model."
            )
    return configs.replace(**described)


def load_model(path: str, with_optimizer: bool = False) -> keras.Model:
    """Loads a model file, `.keras` or HDF5, or a compressed one; never runs code that the file brings.

    Args:
        path: the file.
        with_optimizer: also restore the optimizer and its state, to go on training.

    Raises:
        UserError: the file is no model.
    """
    import h5py
    import keras

    stem, suffix = os.path.splitext(path)
    try:
        if suffix != ".keras" and os.path.isfile(f"{stem}.json"):
            return custom_load_model(os.path.dirname(path), os.path.basename(stem))
        if suffix in (".h5", ".hdf5"):
            with h5py.File(path) as file:
                if "model_config" not in file.attrs:
                    raise UserError(f"{path} holds weights but no model, and {stem}.json is not beside it.")
        return keras.models.load_model(path, compile=with_optimizer, safe_mode=True)
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path} is not a model that Keras reads: {reason[:300]}") from error


def load_fitting_model(
    path: str, class_names: Sequence[str], image_size: Sequence[int], with_optimizer: bool = False
) -> keras.Model:
    """Loads a model file as `load_model` does, and checks its input and output against configs.

    Raises:
        UserError: the file is no model, or it does not fit; names what differs.
    """
    model = load_model(path, with_optimizer)
    outputs, inputs, expected = model.output_shape[-1], tuple(model.input_shape[1:]), (*image_size, 3)
    if outputs != len(class_names):
        raise UserError(
            f"{path} tells {outputs} classes apart, but the configs name {len(class_names)}: "
            f"{join_names(class_names)}. Use the CSV files and classes that it was trained with."
        )
    if len(inputs) != 3 or any(size not in (None, wanted) for size, wanted in zip(inputs, expected, strict=True)):
        raise UserError(f"{path} takes inputs of shape {inputs}. Expected images of image_target_size, {expected}.")
    return model


def custom_save_model(model: keras.Model, save_path: str, model_name: str) -> tuple[str, str]:
    """Writes a model as `model_name.json` (its layers) and `model_name.h5` (its weights), without optimizer state.

    Args:
        model: any model of stock Keras layers.
        save_path: the folder.
        model_name: the files' name without ending.

    Returns:
        The paths of the HDF5 and the JSON file.
    """
    import h5py

    weights_path, layers_path = (os.path.join(save_path, model_name + suffix) for suffix in (".h5", ".json"))
    with atomic_path(weights_path) as temporary, h5py.File(temporary, "w") as file:
        for position, weight in enumerate(model.weights):
            file.create_dataset(f"weights/{position:05d}", data=weight.numpy()).attrs["path"] = weight.path
    write_text(layers_path, model.to_json())
    return weights_path, layers_path


def custom_load_model(load_path: str, model_name: str) -> keras.Model:
    """Reads a model that `custom_save_model` wrote.

    Args:
        load_path: the folder.
        model_name: the files' name without ending.

    Raises:
        UserError: a file is missing, or the two do not belong together.
    """
    import h5py
    import keras

    weights_path, layers_path = (os.path.join(load_path, model_name + suffix) for suffix in (".h5", ".json"))
    try:
        with open(layers_path, encoding="utf-8") as file:
            model = keras.models.model_from_json(file.read())
        if not isinstance(model, keras.Model):
            raise ValueError("the JSON file describes no model")
        with h5py.File(weights_path) as file:
            stored = [file["weights"][name][...] for name in sorted(file["weights"])]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{weights_path} and {layers_path} are not a compressed model: {error}") from error
    shapes, expected = [weight.shape for weight in stored], [tuple(weight.shape) for weight in model.weights]
    if shapes != expected:
        raise UserError(f"{weights_path} does not belong to {layers_path}: their weights differ in number or shape.")
    model.set_weights(stored)
    return model


@contextlib.contextmanager
def naming_bad_images(*sequences: AugmentedImageSequence) -> Iterator[None]:
    """Raises a sequence's own error, with the path of the image, in place of what Keras makes of it."""
    try:
        yield
    except Exception as error:
        if reason := next((sequence.error for sequence in sequences if sequence.error), None):
            raise reason from error
        raise


def predict(model: keras.Model, sequence: AugmentedImageSequence) -> np.ndarray:
    """Returns the probabilities of a sequence's images in its order, float32 `(images, classes)`.

    Raises:
        UserError: an image cannot be read.
    """
    with naming_bad_images(sequence):
        return model.predict(sequence.to_dataset(), verbose=1)


def classify_image(
    model: keras.Model,
    image: np.ndarray,
    class_names: Sequence[str],
    multi_label: bool = False,
    threshold: float = 0.5,
    decision: Decision | None = None,
    threshold_type: str = "exact_match",
) -> tuple[list[str], dict[str, float]]:
    """Classifies one image, with a run's decision as `predict.py` does.

    The image is resized as the generator does it. `predict.py` decodes large JPEGs at a fraction of their size: to
    have the same answer, read them with `generator.read_image(path, image_size)`. `read_image(path)` gives a picture
    that differs a little, and so do the probabilities then.

    Args:
        model: a model of this collection.
        image: RGB `(height, width, 3)`, pixels in `[0, 255]`, of any size.
        class_names: in the model's order, as `configs.json` has them.
        multi_label: whether several labels may hold.
        threshold: multi-label: lowest probability of a label that holds.
        decision: from `metrics.read_decision`: calibrates the probabilities and chooses the labels, in the place of
            `multi_label` and `threshold`.
        threshold_type: which of the decision's thresholds hold, `exact_match` or `best_f1`.

    Returns:
        The predicted class names (one, or multi-label any number) and the probability of each class.
    """
    from generator import resize_image

    batch = resize_image(image, model.input_shape[1:3])[None]
    probabilities = np.asarray(model(batch, training=False))
    if decision is not None:
        probabilities = decision.calibrate(probabilities)
        chosen = np.flatnonzero(decision.choose(probabilities, threshold_type)[0])
    else:
        chosen = np.flatnonzero(probabilities[0] >= threshold) if multi_label else [int(probabilities[0].argmax())]
    by_class = dict(zip(class_names, probabilities[0].tolist(), strict=True))
    return [class_names[position] for position in chosen], by_class
