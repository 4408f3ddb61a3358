"""Predicts images that have no labels - a photo, a folder, a pattern or a CSV file of them - into a CSV file."""

from __future__ import annotations

import copy
import dataclasses
import glob
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from configs import MAX_IMAGE_PIXELS, Configs, UserError, define, run_script
from utils import (
    IMAGE_COLUMN,
    IMAGE_SUFFIXES,
    LABEL_SEPARATOR,
    check_file_name,
    is_url,
    join_names,
    join_path,
    read_table,
    walk_visible,
    write_csv,
)

if TYPE_CHECKING:
    import keras
    import pandas as pd

    from augmenter import FusedAugmenter
    from finetune.metrics import Decision
    from generator import AugmentedImageSequence
    from utils import ExportedModel

MOST_COPIES = 100


@dataclasses.dataclass
class PredictConfigs(Configs):
    """The options of this script, beside those of every script."""

    input: str = define("", "An image, its URL, a folder, a quoted pattern ('photos/**/*.jpg'), or a CSV file of paths")
    write_path: str = define("./predictions.csv", "The CSV file to write")
    top_k: int = define(0, "Also write that many most probable classes of each image, the first one first", at_least=0)
    tta: str = define(
        "none", "Average each image's probabilities with its mirror image's (flip), or with those of n augmented copies"
    )
    threshold_type: str = define(
        "exact_match",
        "Multi-label: the thresholds of test.py that decide, one for all classes or the best F1's for each",
        choices=("exact_match", "best_f1"),
    )

    def validate(self) -> PredictConfigs:
        """Checks `tta` as well, whose values no single type describes; returns and raises as `Configs` does."""
        super().validate()
        if self.tta not in ("none", "flip") and not 1 <= _whole_number(self.tta) <= MOST_COPIES:
            raise UserError(
                f"tta: expected none, flip, or a whole number of augmented copies from 1 to {MOST_COPIES}. "
                f"Received: {self.tta!r}"
            )
        return self


def main(configs: PredictConfigs) -> dict:
    """Lists the images, loads the model, predicts and writes the table.

    Returns:
        `predictions`, the table as written, and `failed`, how many of its images could not be read.
    """
    # Imported here, so that --help does not wait for TensorFlow.
    from finetune.metrics import check_finite, read_decision
    from utils import find_trained_model, keep_freed_memory, load_predictor, set_gpu_usage

    names, paths = list_inputs(configs.input, configs.image_directory)
    check_write_path(configs.write_path, configs.input)
    set_gpu_usage(configs.gpu_percentage)
    keep_freed_memory()
    model_path, configs = find_trained_model(configs)
    check_top_k(configs.top_k, configs.classes)
    model = load_predictor(model_path, configs.classes, configs.image_target_size[:2])
    folder = os.path.dirname(os.path.abspath(model_path))
    decision = read_decision(folder, configs.classes, configs.multi_label_classification, model_path)
    print(f"Model: {model_path}\n{describe_decision(decision, configs.threshold_type)}")
    reader = ForgivingReader(paths, configs.image_target_size[:2], configs.max_image_pixels)
    probabilities = predict_images(model, build_sequence(reader, configs))
    check_finite(probabilities)
    table = make_table(names, probabilities, reader.errors, decision, configs.threshold_type, configs.top_k)
    write_csv(configs.write_path, table)
    summarize(configs.write_path, len(paths), reader.errors)
    return {"predictions": table, "failed": len(reader.errors)}


# Input and output


def list_inputs(given: str, image_directory: str = "") -> tuple[list[str], list[str]]:
    """Lists the images that `input` means. Whether each is one shows when it is decoded.

    Args:
        given: an image, or its URL; a folder, of which the files count that end as images do, subfolders included; a
            pattern, of which every file counts; or a CSV file with the column `path`. Hidden files count where they
            are named.
        image_directory: put in front of the paths in a CSV file.

    Returns:
        The images as the output names them, and their files: sorted, or in the order of the CSV file.

    Raises:
        UserError: there is no such file, it lists no image, or a file name is not UTF-8.
    """
    if os.path.isfile(given) and given.lower().endswith(".csv"):
        names = read_table(given, IMAGE_COLUMN)[IMAGE_COLUMN].tolist()
        return names, [join_path(image_directory, name) for name in names]
    if os.path.isdir(given):
        names = list_folder(given)
    elif os.path.isfile(given) or is_url(given):
        names = [given]
    elif glob.has_magic(given):
        names = sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
    else:
        raise UserError(
            f"input: expected an image, a folder, a pattern in quotes, or a CSV file with a column '{IMAGE_COLUMN}'. "
            f"Received: {given!r}, and there is no such file."
        )
    if not names:
        raise UserError(f"input: no file matches the pattern {given}. Check it, and put it in quotes.")
    for name in names:
        check_file_name(name)
    return names, names


def list_folder(folder: str) -> list[str]:
    """Returns the files below a folder that end as images do, sorted; names the others that are not hidden.

    Raises:
        UserError: there is none.
    """
    paths = sorted(walk_visible(os.path.normpath(folder)))
    images = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise UserError(f"input: the folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    if others := [path for path in paths if not path.lower().endswith(IMAGE_SUFFIXES)]:
        print(f"Left out {len(others)} files that do not end as images do: {join_names(others)}")
    return images


def check_write_path(write_path: str, given: str) -> None:
    """Checks, before any work, that the output can be written and replaces no input.

    Raises:
        UserError: says why not.
    """
    if os.path.isdir(write_path) or not write_path or write_path.lower().endswith(IMAGE_SUFFIXES):
        raise UserError(f"write_path: expected the name of a CSV file. Received: {write_path!r}")
    if os.path.isfile(write_path) and os.path.isfile(given) and os.path.samefile(write_path, given):
        raise UserError(f"write_path: {write_path} is the input itself. Choose another file.")
    folder = os.path.dirname(os.path.abspath(write_path))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"write_path: cannot make the folder {folder}: {error.strerror}. Choose another.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"write_path: the folder {folder} is not writable. Choose another.")


def check_top_k(top_k: int, class_names: Sequence[str]) -> None:
    """Raises UserError where more classes are asked for than there are."""
    if top_k > len(class_names):
        raise UserError(f"top_k: expected at most {len(class_names)}, the model's number of classes. Received: {top_k}")


def describe_decision(decision: Decision, threshold_type: str) -> str:
    """Returns in a line or two where the probabilities and thresholds come from."""
    lines = ["Probabilities: the model's own; test.py calibrates them where there is a validation set"]
    if decision.temperature_fitted_on:
        lines = [
            f"Probabilities: calibrated with temperature {decision.temperature:.2f}, "
            f"fitted on the {decision.temperature_fitted_on} set"
        ]
    if decision.multi_label:
        thresholds = sorted({f"{threshold:.2f}" for threshold in decision.thresholds(threshold_type)})
        fitted = "not fitted: run test.py first"
        if decision.thresholds_fitted_on:
            fitted = f"{threshold_type}, fitted on the {decision.thresholds_fitted_on} set"
        lines.append(f"Thresholds: {' to '.join(dict.fromkeys((thresholds[0], thresholds[-1])))} ({fitted})")
    return "\n".join(lines)


def make_table(
    names: Sequence[str],
    raw_probabilities: np.ndarray,
    errors: dict[int, str],
    decision: Decision,
    threshold_type: str = "exact_match",
    top_k: int = 0,
) -> pd.DataFrame:
    """Lays out the predictions, a row an image.

    Args:
        names: of the images.
        raw_probabilities: the model's own, float32 `(images, classes)`; of no account in the rows of `errors`.
        errors: what was wrong with an image, by its row.
        decision: turns the probabilities into an answer.
        threshold_type: multi-label: which of its thresholds decide.
        top_k: how many of the most probable classes get columns.

    Returns:
        The columns `path`; `predicted`, a class name (multi-label: any number of them, joined by `$`); `probability`,
        of the class (multi-label: the lowest among the predicted ones); `top_1`, `top_1_probability` and so on;
        `probability_<class>`, calibrated, in `[0, 1]`; `error`, one line, with all but `path` empty, or nothing.
    """
    import pandas as pd

    class_names, failed = np.asarray(decision.class_names, dtype=object), sorted(errors)
    probabilities = decision.calibrate(raw_probabilities).copy()
    chosen = decision.choose(probabilities, threshold_type)
    chosen[failed] = False
    probabilities[failed] = np.nan
    lowest = probabilities.min(axis=1, where=chosen, initial=np.inf)
    columns = {
        IMAGE_COLUMN: names,
        "predicted": [LABEL_SEPARATOR.join(class_names[row]) for row in chosen],
        "probability": np.where(chosen.any(axis=1), lowest, np.float32(np.nan)),
    }
    for rank, positions in enumerate(find_top_classes(probabilities, top_k).T, start=1):
        columns[f"top_{rank}"] = np.where(np.isnan(probabilities[:, 0]), "", class_names[positions])
        columns[f"top_{rank}_probability"] = probabilities[np.arange(len(names)), positions]
    by_class = pd.DataFrame(probabilities, columns=[f"probability_{name}" for name in decision.class_names])
    error = pd.Series([" ".join(errors.get(row, "").split()) for row in range(len(names))], name="error")
    return pd.concat([pd.DataFrame(columns), by_class, error], axis=1)


def find_top_classes(probabilities: np.ndarray, top_k: int) -> np.ndarray:
    """Returns the positions of each row's `top_k` highest values, the highest first; int `(images, top_k)`."""
    parts = np.array_split(probabilities, len(probabilities) // 10_000 + 1)
    return np.concatenate([np.argsort(-part, axis=1, kind="stable")[:, :top_k] for part in parts])


def summarize(write_path: str, number: int, errors: dict[int, str]) -> None:
    """Prints how many images were predicted and how many could not be read.

    Raises:
        UserError: none could.
    """
    if len(errors) == number:
        none_could = "The image could not" if number == 1 else f"None of the {number} images could"
        raise UserError(f"{none_could} be read; {write_path} says why. {errors[min(errors)]}")
    print(f"Predicted {number - len(errors)} of {number} images; wrote {write_path}")
    if errors:
        print(f"{len(errors)} of {number} images could not be read: the column error of {write_path} says why")


# From files to probabilities


class ForgivingReader:
    """Reads images for the generator, in the place of its cache: it notes what cannot be read and gives black then.

    Args:
        paths: image files.
        image_size: `(height, width)` that images are resized to.
        max_pixels: what an image may have.
    """

    def __init__(self, paths: Sequence[str], image_size: Sequence[int], max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        self.paths = paths
        self.image_size = tuple(image_size)
        self.max_pixels = max_pixels
        self.errors: dict[int, str] = {}

    def get(self, row: int) -> np.ndarray:
        """Returns the image of a row, uint8 `(height, width, 3)`; zeros, and an entry in `errors`, on failure."""
        from generator import read_image, resize_image

        try:
            return resize_image(read_image(self.paths[row], self.image_size, self.max_pixels), self.image_size)
        except UserError as error:
            self.errors[int(row)] = str(error)
            return np.zeros((*self.image_size, 3), np.uint8)


class Views:
    """Makes the views of each image whose probabilities are averaged, in the place of the generator's augmenter.

    Every image gets the same changes, so that its answer depends neither on the other images nor on the batch size.

    Args:
        copies: changed ones of each image.
        augmenter: makes them; None mirrors the image left to right.
        seed: of the augmenter.
    """

    def __init__(self, copies: int, augmenter: FusedAugmenter | None = None, seed: int = 0) -> None:
        self.number = 1 + copies
        self._augmenter = augmenter
        self._seed = seed

    def deepcopy(self) -> Views:
        """Returns a copy for another thread."""
        return copy.deepcopy(self)

    def seed_(self, seed: int) -> None:
        """Does nothing: the generator's seed is another one in every batch."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns all images as they are, then all of them changed, and so on; uint8.

        Args:
            images: uint8 RGB `(batch, height, width, 3)`; the result has `number` times as many.
        """
        views = np.repeat(images[None], self.number, axis=0)
        if self._augmenter is None:
            views[1:] = images[:, :, ::-1]
        else:
            for position in range(len(images)):
                self._augmenter.seed_(self._seed)
                views[1:, position] = self._augmenter(images=views[1:, position].copy())
        return views.reshape(-1, *images.shape[1:])


def build_views(tta: str, seed: int) -> Views | None:
    """Builds what the option `tta` means; None where images are taken as they are."""
    if tta in ("none", "flip"):
        return Views(1) if tta == "flip" else None
    from augmenter import build_augmenter

    return Views(int(tta), build_augmenter(), seed % 2**31)


def build_sequence(reader: ForgivingReader, configs: PredictConfigs) -> AugmentedImageSequence:
    """Builds the generator of the reader's images in their order; in the place of labels it has their rows."""
    from generator import AugmentedImageSequence

    views = build_views(configs.tta, configs.random_seed or 0)
    return AugmentedImageSequence(
        reader.paths,
        np.arange(len(reader.paths)),
        image_size=reader.image_size,
        batch_size=configs.batch_size,
        augmenter=views,
        workers=configs.generator_workers,
        # Batches of several views take that many times the memory.
        max_queue_size=max(1, configs.generator_queue_length // (views.number if views else 1)),
        cache=reader,
    )


def predict_images(model: keras.Model | ExportedModel, sequence: AugmentedImageSequence) -> np.ndarray:
    """Runs the model over a sequence that has rows for labels.

    Returns:
        The model's own probabilities in the order of the rows, float32 `(images, classes)`; means over the views.
    """
    import tensorflow as tf
    from tqdm import tqdm

    from utils import compile_model

    network = compile_model(model)
    views = sequence.augmenter.number if sequence.augmenter else 1
    probabilities = np.empty((len(sequence.paths), model.output_shape[-1]), np.float32)
    with tqdm(total=len(sequence.paths), unit="image", desc="Predicting") as progress:
        for images, rows in sequence.to_dataset():
            of_views = [network(view) for view in tf.split(images, views)]
            probabilities[rows.numpy()] = np.mean(of_views, axis=0)
            progress.update(len(rows))
    return probabilities


def _whole_number(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1


if __name__ == "__main__":
    run_script(main, PredictConfigs)
