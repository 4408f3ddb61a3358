"""Draws Grad-CAM of the predicted class over every test image, into cam_output in the run's folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from configs import Configs, run_script

if TYPE_CHECKING:
    import numpy as np

WRITABLE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


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
    names = name_outputs(list(sequence.paths))
    written = []
    with tqdm(total=len(names), unit="image", desc="Grad-CAM") as progress, naming_bad_images(sequence):
        for index in range(sequence.steps):
            images, _ = sequence[index]
            heatmaps, probabilities = grad_cam(images)
            for image, heatmap, scores in zip(images, heatmaps, probabilities, strict=True):
                path = os.path.join(folder, names[len(written)])
                best = int(scores.argmax())
                write_image(path, draw(image, heatmap, f"{class_names[best]} {scores[best]:.2f}"))
                written.append(path)
            progress.update(len(images))
    print(f"Wrote {len(written)} pictures to {folder}")
    return {"paths": written}


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
