"""Makes the README's pictures with the project's own scripts; run from the project's folder.

The pictures of activations come from crops of three CC0 photographs of scikit-image (a cat, a cup of coffee, a rocket)
and a MobileNet that starts from its ImageNet weights, which Keras finds in its cache or downloads. The training curves
are those of the textures in data/. The report's picture needs Chromium.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import skimage.data

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
PHOTOS = {"cat": "chelsea", "coffee": "coffee", "rocket": "rocket"}
CROPS = 40


def run(script: str, *arguments: str) -> None:
    """Runs one of the project's scripts and stops where it fails."""
    subprocess.run([sys.executable, script, *arguments], check=True)


def cut_crops(folder: str) -> None:
    """Writes random crops of each photograph, half to nearly all of it, into a folder per class."""
    rng = np.random.default_rng(0)
    for name, source in PHOTOS.items():
        os.makedirs(os.path.join(folder, name))
        photo = getattr(skimage.data, source)()[..., ::-1]
        for number in range(CROPS):
            height, width = (int(side * rng.uniform(0.5, 0.95)) for side in photo.shape[:2])
            top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
            path = os.path.join(folder, name, f"{number:02d}.jpg")
            cv2.imwrite(path, photo[top : top + height, left : left + width])


def draw_augmentations() -> None:
    """Writes docs/augmentations.png: each photograph, and beside it what training makes of it."""
    from augmenter import build_augmenter
    from generator import resize_image

    augmenter = build_augmenter()
    augmenter.seed_(0)
    rows = []
    for source in PHOTOS.values():
        photo = resize_image(getattr(skimage.data, source)(), (150, 150))
        pictures = [photo, *augmenter(images=np.stack([photo] * 6))]
        # A white gap sets the original apart.
        gap = np.full((150, 10, 3), 255, np.uint8)
        rows.append(np.concatenate([pictures[0], gap, *pictures[1:]], axis=1))
    cv2.imwrite("docs/augmentations.png", np.concatenate(rows)[..., ::-1])


def photograph(page: str, picture: str) -> None:
    """Writes the top of a page, as a browser shows it, as a PNG."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1500")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    subprocess.run([chromium, *options, f"--screenshot={os.path.abspath(picture)}", Path(page).as_uri()], check=True)


def main() -> None:
    """Trains both demos in a temporary folder and writes the pictures into docs/."""
    draw_augmentations()
    with tempfile.TemporaryDirectory() as folder:
        cut_crops(os.path.join(folder, "images"))
        table, saved = os.path.join(folder, "all_data.csv"), os.path.join(folder, "photos")
        run("make_csv_from_folders.py", "--folder_path", os.path.join(folder, "images"), "--write_path", table)
        run("split_train_test.py", "--csv_path", table, "--validation_split_fraction", "0.2")
        files = {"train": "training_set.csv", "validation": "validation_set.csv", "test": "testing_set.csv"}
        sets = [word for name, file in files.items() for word in (f"--{name}_csv", os.path.join(folder, file))]
        sets += ["--save_model_path", saved]
        run("train.py", *sets, "--visual_model_name", "MobileNet", "--num_epochs", "4", "--conv_layers_to_train", "0")
        run("test.py", *sets)
        photograph(os.path.join(saved, "evaluation", "report.html"), "docs/report.png")
        run("draw_activations.py", *sets)
        cam_output = os.path.join(saved, "cam_output")
        rows = []
        for name in PHOTOS:
            files = sorted(file for file in os.listdir(cam_output) if file.startswith(name))
            rows.append(np.concatenate([cv2.imread(os.path.join(cam_output, file)) for file in files[:2]], axis=1))
        cv2.imwrite("docs/activations.jpg", np.concatenate(rows), [cv2.IMWRITE_JPEG_QUALITY, 85])
        demo = os.path.join(folder, "demo")
        run("train.py", "--configs", "data/demo.json", "--save_model_path", demo)
        run("plot_training_log.py", "--save_model_path", demo)
        shutil.copy(os.path.join(demo, "training_log.png"), "docs/training_log.png")
        run("test.py", "--save_model_path", demo)


if __name__ == "__main__":
    main()
