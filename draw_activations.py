"""Draws Grad-CAM of the predicted class over every test image, into cam_output in the run's folder."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from configs import Configs, run_script

if TYPE_CHECKING:
    import numpy as np

    from generator import AugmentedImageSequence
    from gradcam import GradCam

WRITABLE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
WRITERS = 2


def main(configs: Configs) -> dict:
    """Loads the model, explains the test images batch by batch, writes the pictures; returns their paths."""
    # Imported here, so that --help does not wait for TensorFlow.
    from tqdm import tqdm

    from gradcam import GradCam
    from utils import (
        find_trained_model,
        get_generator,
        keep_freed_memory,
        load_fitting_model,
        naming_bad_images,
        set_gpu_usage,
    )

    set_gpu_usage(configs.gpu_percentage)
    keep_freed_memory()
    model_path, configs = find_trained_model(configs)
    class_names = configs.classes
    sequence = get_generator(configs.test_csv, class_names, configs, training=False)
    grad_cam = GradCam(load_fitting_model(model_path, class_names, configs.image_target_size[:2]))
    folder = os.path.join(configs.save_model_path, "cam_output")
    paths = [os.path.join(folder, name) for name in name_outputs(list(sequence.paths))]
    with tqdm(total=len(paths), unit="image", desc="Grad-CAM") as progress, naming_bad_images(sequence):
        draw_all(grad_cam, sequence, paths, class_names, progress.update)
    print(f"Wrote {len(paths)} pictures to {folder}")
    return {"paths": paths}


def draw_all(
    grad_cam: GradCam,
    sequence: AugmentedImageSequence,
    paths: Sequence[str],
    class_names: Sequence[str],
    report: Callable[[int], object],
) -> None:
    """Explains a sequence's images and writes the pictures; drawing and writing go on while the network runs.

    Args:
        grad_cam: explains a batch.
        sequence: the images, in order.
        paths: of the pictures.
        class_names: in the model's order.
        report: is told how many pictures more are written.
    """
    pending, done = deque(), 0
    with ThreadPoolExecutor(WRITERS) as pool:
        for images, _ in sequence.to_dataset().as_numpy_iterator():
            heatmaps, probabilities = grad_cam(images)
            targets = paths[done : done + len(images)]
            pending.append(pool.submit(draw_batch, targets, images, heatmaps, probabilities, class_names))
            done += len(images)
            # A bounded backlog: memory does not grow where the network is faster than the disk.
            while len(pending) > WRITERS:
                report(pending.popleft().result())
        while pending:
            report(pending.popleft().result())


def draw_batch(
    paths: Sequence[str],
    images: np.ndarray,
    heatmaps: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
) -> int:
    """Writes the pictures of a batch; returns how many."""
    for path, image, heatmap, scores in zip(paths, images, heatmaps, probabilities, strict=True):
        best = int(scores.argmax())
        write_image(path, draw(image, heatmap, f"{class_names[best]} {scores[best]:.2f}"))
    return len(paths)


def name_outputs(paths: list[str]) -> list[str]:
    """Gives each image a file name of its own: its path below the images' common folder, joined by hyphens.

    Returns:
        Names without folders, in the order of `paths`; a name met again gets a number.
    """
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names, taken = [], set()
    for path in absolute:
        stem, suffix = os.path.splitext(os.path.relpath(path, common).replace(os.sep, "-"))
        if suffix.lower() not in WRITABLE_SUFFIXES:
            suffix += ".png"
        name, number = stem + suffix, 2
        while name in taken:
            name, number = f"{stem}_{number}{suffix}", number + 1
        taken.add(name)
        names.append(name)
    return names


def draw(image: np.ndarray, heatmap: np.ndarray, caption: str) -> np.ndarray:
    """Lays the image and its heatmap side by side over a caption; uint8 RGB."""
    import numpy as np

    from gradcam import overlay_heatmap, write_caption

    return write_caption(np.concatenate([image, overlay_heatmap(image, heatmap)], axis=1), caption)


def write_image(path: str, image: np.ndarray) -> None:
    """Writes a uint8 RGB image in the format of the path's ending."""
    import cv2

    from utils import atomic_path

    with atomic_path(path) as temporary:
        encoded = cv2.imencode(os.path.splitext(path)[1], cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
        encoded.tofile(temporary)


if __name__ == "__main__":
    run_script(main)
