"""Makes the README's pictures with the project's own scripts; run from the project's folder.

The Grad-CAM pictures show crops of three CC0 photographs of scikit-image (a cat, a cup of coffee, a rocket), explained
by a MobileNet that starts from ImageNet weights. The training curves and the report show the textures in data/.
Pictures of pages need Chromium. compare_backbones.py drew docs/backbones.png from 500 photos of flowers, which are not
part of the project.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import skimage.data

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
PHOTOS = {"cat": "chelsea", "coffee": "coffee", "rocket": "rocket"}
CROPS = 40
ACTIVATIONS_WIDTH = 1200


def run(script: str, *arguments: str) -> None:
    """Runs one of the project's scripts, and stops if it fails."""
    subprocess.run([sys.executable, PROJECT / script, *arguments], check=True)


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
    """Writes docs/augmentations.png: each photograph, next to what training makes of it."""
    from augmenter import build_augmenter
    from finetune.data.images import resize_image

    augmenter = build_augmenter()
    augmenter.seed_(0)
    rows = []
    for source in PHOTOS.values():
        photo = resize_image(getattr(skimage.data, source)(), (150, 150))
        pictures = [photo, *augmenter(images=np.stack([photo] * 6))]
        # A white gap separates the original.
        gap = np.full((150, 10, 3), 255, np.uint8)
        rows.append(np.concatenate([pictures[0], gap, *pictures[1:]], axis=1))
    cv2.imwrite(str(PROJECT / "docs" / "augmentations.png"), np.concatenate(rows)[..., ::-1])


def draw_activations() -> None:
    """Writes docs/activations.jpg: crops of photographs next to their Grad-CAM."""
    cut_crops("images")
    run("make_csv_from_folders.py", "--folder_path", "images", "--write_path", "all_data.csv")
    run("split_train_test.py", "--csv_path", "all_data.csv")
    sets = ("--train_csv", "training_set.csv", "--test_csv", "testing_set.csv", "--save_model_path", "photos")
    run("train.py", *sets, "--visual_model_name", "MobileNet", "--num_epochs", "4", "--conv_layers_to_train", "0")
    run("draw_activations.py", *sets)
    rows = []
    for name in PHOTOS:
        files = sorted(Path("photos", "cam_output").glob(f"{name}*"))
        # Side by side at one height, and each row as wide as the others.
        pictures = [cv2.imread(str(file)) for file in files[:2]]
        ratios = [one.shape[1] / one.shape[0] for one in pictures]
        height = ACTIVATIONS_WIDTH / sum(ratios)
        sizes = [(round(ratio * height), round(height)) for ratio in ratios]
        row = np.concatenate([cv2.resize(one, size) for one, size in zip(pictures, sizes, strict=True)], axis=1)
        rows.append(cv2.resize(row, (ACTIVATIONS_WIDTH, round(height))))
    picture = str(PROJECT / "docs" / "activations.jpg")
    cv2.imwrite(picture, np.concatenate(rows), [cv2.IMWRITE_JPEG_QUALITY, 85])


def draw_demo() -> None:
    """Writes docs/training_log.png, of the demo's run, and docs/report.png, of one that was stopped early."""
    shutil.copytree(PROJECT / "data", "data", dirs_exist_ok=True)
    run("train.py", "--configs", "data/demo.json")
    run("plot_training_log.py")
    shutil.copy(Path("saved_model", "training_log.png"), PROJECT / "docs" / "training_log.png")
    run("test.py")
    # After four epochs it still makes mistakes to show.
    run("train.py", "--configs", "data/demo.json", "--num_epochs", "4", "--overwrite", "True")
    run("test.py", "--load_model_path", "saved_model/latest_model.keras")
    photograph(Path("saved_model", "evaluation", "report.html"), PROJECT / "docs" / "report.png")


def draw_label_errors() -> None:
    """Writes docs/label_errors.png: of the crops, in `all_data.csv`, with four labels changed."""
    table = pd.read_csv("all_data.csv")
    for row in range(5, len(table), 31):
        names = sorted(PHOTOS)
        table.loc[row, "class"] = names[(names.index(table.loc[row, "class"]) + 1) % len(names)]
    table.to_csv("changed.csv", index=False)
    run("find_label_errors.py", "--csv_path", "changed.csv", "--visual_model_name", "MobileNet")
    photograph(Path("label_errors.html"), PROJECT / "docs" / "label_errors.png", 900)


def photograph(page: Path, picture: Path, height: int = 1900) -> None:
    """Writes the top of a page, so many pixels, as a browser shows it, as a PNG."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1200,{height}")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    subprocess.run([chromium, *options, f"--screenshot={picture}", page.resolve().as_uri()], check=True)


def main() -> None:
    """Trains both demos in a temporary folder and writes the pictures into docs/."""
    draw_augmentations()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        draw_activations()
        draw_label_errors()
        draw_demo()
        os.chdir(PROJECT)


if __name__ == "__main__":
    main()
