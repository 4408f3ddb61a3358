"""Draws class activation maps (Grad-CAM) over every test image, into cam_output in the run's folder."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from configs import Configs, run_script

if TYPE_CHECKING:
    from finetune.gradcam import GradCam
    from finetune.metrics import Decision
    from generator import AugmentedImageSequence

WRITABLE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
WRITERS = 2
PANELS_A_ROW = 6
# What Windows forbids in the name of a file, and the names that it keeps for devices.
FORBIDDEN = frozenset('<>:"/\\|?*')
RESERVED = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))})
# Bytes: systems allow 255 for a name, of which the temporary one needs some more, and so may a number.
LONGEST_STEM = 200
# Each takes two more passes of the network; as many tell the mean drop to about 0.02.
MOST_MEASURED = 200


class Explained(NamedTuple):
    """A batch with the heatmaps of pairs of an image and a class.

    Attributes:
        positions: int `(batch,)`, of the images in their sequence.
        images: uint8 RGB `(batch, height, width, 3)`.
        labels: `(batch,)` class positions or `(batch, classes)` of zeros and ones.
        probabilities: calibrated, `(batch, classes)`.
        rows: int `(pairs,)`, rising positions in the batch.
        class_indices: int `(pairs,)`.
        heatmaps: float32 `(pairs, h, w)` in `[0, 1]`.
    """

    positions: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    rows: np.ndarray
    class_indices: np.ndarray
    heatmaps: np.ndarray


def main(configs: Configs) -> dict:
    """Loads the model, explains the test images batch by batch, writes the pictures; returns paths and faithfulness."""
    # Imported here, so that --help does not wait for TensorFlow.
    from tqdm import tqdm

    from finetune.gradcam import GradCam, describe_faithfulness, overlay_heatmap, summarise_faithfulness
    from finetune.metrics import read_decision
    from utils import (
        find_trained_model,
        get_generator,
        keep_freed_memory,
        load_fitting_model,
        naming_bad_images,
        set_gpu_usage,
        tell_bad_images,
    )

    set_gpu_usage(configs.gpu_percentage)
    keep_freed_memory()
    model_path, configs = find_trained_model(configs)
    class_names, multi_label = configs.classes, configs.multi_label_classification
    decision = read_decision(os.path.dirname(os.path.abspath(model_path)), class_names, multi_label, model_path)
    sequence = get_generator(configs.test_csv, class_names, configs, training=False)
    model = load_fitting_model(model_path, class_names, configs.image_target_size[:2])
    grad_cam = GradCam(model, configs.cam_method)
    folder = os.path.join(configs.save_model_path, "cam_output")
    paths = [os.path.join(folder, name) for name in name_outputs(list(sequence.paths))]

    choose = functools.partial(CHOOSERS[configs.cam_classes], decision=decision, top_k=configs.cam_top_k)
    overlay = functools.partial(overlay_heatmap, opacity=configs.cam_alpha, colormap=configs.cam_colormap)
    drops = []
    with tqdm(total=len(paths), unit="image", desc=configs.cam_method) as progress, naming_bad_images(sequence):
        batches = explain_all(grad_cam, sequence, decision, choose)
        batches = measure_some(batches, len(paths), grad_cam, decision, configs.random_seed or 0, drops)
        draw_all(batches, paths, class_names, overlay, progress.update)
    tell_bad_images(sequence)
    paths = [path for row, path in enumerate(paths) if row not in sequence.bad_images]
    faithfulness = summarise_faithfulness(np.array(drops))
    print(f"Wrote {len(paths)} pictures to {folder}\n{describe_faithfulness(faithfulness, len(paths))}")
    return {"paths": paths, "faithfulness": faithfulness}


# What to explain


def choose_predicted(probabilities: np.ndarray, labels: np.ndarray, decision: Decision, top_k: int) -> np.ndarray:
    """Chooses the most probable class of each image, of several labels as well."""
    return _choose_most_probable(probabilities, 1)


def choose_true(probabilities: np.ndarray, labels: np.ndarray, decision: Decision, top_k: int) -> np.ndarray:
    """Chooses the classes that the CSV gives each image."""
    return labels > 0 if labels.ndim == 2 else labels[:, None] == np.arange(probabilities.shape[1])


def choose_top_k(probabilities: np.ndarray, labels: np.ndarray, decision: Decision, top_k: int) -> np.ndarray:
    """Chooses the `top_k` most probable classes of each image, or all where there are fewer."""
    return _choose_most_probable(probabilities, top_k)


def choose_above_threshold(probabilities: np.ndarray, labels: np.ndarray, decision: Decision, top_k: int) -> np.ndarray:
    """Chooses each image's classes that hold: multi-label those above their threshold, else the predicted one."""
    return decision.choose(probabilities)


def _choose_most_probable(probabilities: np.ndarray, number: int) -> np.ndarray:
    # Stable, so that the first of equal ones is the predicted class.
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :number]
    chosen = np.zeros(probabilities.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


# Of calibrated probabilities, labels, the decision and `cam_top_k`; returns bool `(batch, classes)`.
CHOOSERS: dict[str, Callable[..., np.ndarray]] = {
    "predicted": choose_predicted,
    "true": choose_true,
    "top_k": choose_top_k,
    "threshold": choose_above_threshold,
}


def explain_all(
    grad_cam: GradCam, sequence: AugmentedImageSequence, decision: Decision, choose: Callable[..., np.ndarray]
) -> Iterator[Explained]:
    """Explains a sequence's images batch by batch, each image's classes by falling probability.

    Args:
        grad_cam: explains.
        sequence: the images, in order.
        decision: calibrates the probabilities.
        choose: a value of `CHOOSERS`, of probabilities and labels.

    Raises:
        UserError: the model's probabilities are no numbers.
    """
    from finetune.metrics import check_finite

    for index, (images, labels) in enumerate(sequence.to_dataset().as_numpy_iterator()):
        features, probabilities = grad_cam.read(images)
        check_finite(probabilities)
        probabilities = decision.calibrate(probabilities)
        rows, class_indices = np.nonzero(choose(probabilities, labels))
        order = np.lexsort((-probabilities[rows, class_indices], rows))
        rows, class_indices = rows[order], class_indices[order]
        heatmaps = grad_cam.explain(features, rows, class_indices)
        yield Explained(sequence.get_rows(index), images, labels, probabilities, rows, class_indices, heatmaps)


def measure_some(
    batches: Iterable[Explained],
    number_of_images: int,
    grad_cam: GradCam,
    decision: Decision,
    seed: int,
    drops: list[np.ndarray],
) -> Iterator[Explained]:
    """Passes batches on, and measures how faithful the maps of some images are, those of their most probable class.

    Args:
        batches: of all images, in order.
        number_of_images: of all; at most `MOST_MEASURED` of them, evenly taken, are measured.
        grad_cam: runs the network.
        decision: calibrates its probabilities.
        seed: of the random fifths.
        drops: receives what `measure_faithfulness` returns, an item an image; images without a class have none.
    """
    from finetune.gradcam import measure_faithfulness

    measured = np.zeros(number_of_images, bool)
    measured[np.linspace(0, number_of_images - 1, min(number_of_images, MOST_MEASURED)).round().astype(int)] = True
    rng = np.random.default_rng(seed)
    for batch in batches:
        yield batch
        rows, first_pairs = np.unique(batch.rows, return_index=True)
        pairs = first_pairs[measured[batch.positions[rows]]]
        if not len(pairs):
            continue
        rows, class_indices = batch.rows[pairs], batch.class_indices[pairs]
        drops += measure_faithfulness(
            lambda images: decision.calibrate(grad_cam.read(images)[1]),
            batch.images[rows],
            batch.heatmaps[pairs],
            class_indices,
            batch.probabilities[rows, class_indices],
            rng,
        ).tolist()


# Pictures


def draw_all(
    batches: Iterable[Explained],
    paths: Sequence[str],
    class_names: Sequence[str],
    overlay: Callable[[np.ndarray, np.ndarray], np.ndarray],
    report: Callable[[int], object],
) -> None:
    """Writes the pictures of explained batches; drawing and writing go on while the network runs.

    Args:
        batches: in order.
        paths: of the pictures of all images.
        class_names: in the model's order.
        overlay: colours an image by a heatmap.
        report: is told how many pictures more are written.
    """
    pending = deque()
    with ThreadPoolExecutor(WRITERS) as pool:
        for batch in batches:
            targets = [paths[position] for position in batch.positions]
            pending.append(pool.submit(draw_batch, targets, batch, class_names, overlay))
            # A bounded backlog: memory does not grow where the network is faster than the disk.
            while len(pending) > WRITERS:
                report(pending.popleft().result())
        while pending:
            report(pending.popleft().result())


def draw_batch(
    paths: Sequence[str],
    batch: Explained,
    class_names: Sequence[str],
    overlay: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> int:
    """Writes the pictures of a batch, each the image and beside it its maps; returns how many."""
    for row, (path, image) in enumerate(zip(paths, batch.images, strict=True)):
        label = batch.labels[row]
        true_positions = np.flatnonzero(label) if label.ndim else [label]
        panels = [(image, "true: " + ", ".join(class_names[position] for position in true_positions))]
        for pair in np.flatnonzero(batch.rows == row):
            position = batch.class_indices[pair]
            # The number comes first: a long name is cut.
            caption = f"{batch.probabilities[row, position]:.2f} {class_names[position]}"
            panels.append((overlay(image, batch.heatmaps[pair]), caption))
        if len(panels) == 1:
            panels.append((image, "no label above its threshold"))
        write_image(path, arrange(panels))
    return len(paths)


def arrange(panels: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """Lays images of one size side by side, each over its caption, and many in rows; uint8 RGB."""
    from finetune.gradcam import write_caption

    pictures = [write_caption(image, caption) for image, caption in panels]
    columns = min(len(pictures), max(PANELS_A_ROW, math.isqrt(len(pictures))))
    pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
    starts = range(0, len(pictures), columns)
    return np.concatenate([np.concatenate(pictures[start : start + columns], axis=1) for start in starts])


def name_outputs(paths: list[str]) -> list[str]:
    """Gives each image a file name of its own: its path or URL below the images' common folder, joined by hyphens.

    Returns:
        Names without folders, in the order of `paths`, that every system can write: what one of them forbids in a
        name becomes an underscore, a long name is cut and ends in a digest; a name met again gets a number.
    """
    # A URL's protocol stands for a folder.
    absolute = [os.path.abspath(path.replace("://", os.sep, 1)) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names, taken = [], set()
    for path in absolute:
        stem, suffix = os.path.splitext(os.path.relpath(path, common).replace(os.sep, "-"))
        if suffix.lower() not in WRITABLE_SUFFIXES:
            stem, suffix = stem + suffix, ".png"
        stem = make_writable(stem)
        name, number = stem + suffix, 2
        # Some systems hold names that differ in case alone for the same.
        while name.casefold() in taken:
            name, number = f"{stem}_{number}{suffix}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def make_writable(stem: str) -> str:
    """Returns a file name without its ending as every system can write it: visible, not reserved, not too long."""
    safe = "".join("_" if character in FORBIDDEN or not character.isprintable() else character for character in stem)
    if safe.startswith(".") or safe.split(".")[0].upper() in RESERVED:
        safe = f"_{safe}"
    if len(safe.encode()) <= LONGEST_STEM:
        return safe
    digest = hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{safe.encode()[: LONGEST_STEM - 17].decode(errors='ignore')}~{digest}"


def write_image(path: str, image: np.ndarray) -> None:
    """Writes a uint8 RGB image in the format of the path's ending."""
    import cv2

    from utils import atomic_path

    with atomic_path(path) as temporary:
        encoded = cv2.imencode(os.path.splitext(path)[1], cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
        encoded.tofile(temporary)


if __name__ == "__main__":
    run_script(main)
