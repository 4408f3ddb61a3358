"""Runs the script commands and Python examples of the README and docs/, in one process: TensorFlow starts once.

python tests/page_commands.py    in an empty folder, which becomes the working directory of a new user
"""

import os
import re
import runpy
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
# A page may use what the commands of earlier ones have written.
PAGES = [
    f"docs/{name}.md" for name in ("data", "backbones", "label_errors", "better_models", "run_folder", "distributed")
]
EXPORT_PAGE = "docs/export.md"
PHOTOS_A_CLASS = 12
# Training is cut short, and nothing is downloaded. All else is as the pages have it.
SMALL = "--visual_model_name MobileNet --use_imagenet_weights False --pop_conv_layers 66 --image_target_size 32 32 3"
ADDED = {
    "train.py": f"{SMALL} --min_steps 0 --overwrite True",
    "compare_backbones.py": f"{SMALL} --backbones MobileNet --image_sizes 32 --max_images 20",
    "find_label_errors.py": SMALL,
    # So little training leaves answers that rounding changes.
    "compress_weights.py": "--tolerance 100",
}


def read_blocks(page: str, language: str) -> list[str]:
    """Returns the code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", (PROJECT / page).read_text(encoding="utf-8"), re.S)


def list_commands(page: str) -> list[str]:
    """Returns the lines of a page's shell blocks that run one of the scripts."""
    lines = [line for block in read_blocks(page, "bash") for line in block.splitlines()]
    commands = [line for line in lines if re.match(r"python \w+\.py", line)]
    assert commands, page
    return commands


def list_all_commands() -> Iterator[str]:
    """Yields the commands of all pages; those about exported files while the README's run still has them."""
    for command in list_commands("README.md"):
        yield command
        if "--export" in command:
            yield from list_commands(EXPORT_PAGE)
    for page in PAGES:
        yield from list_commands(page)


def shorten(command: str) -> list[str]:
    """Returns a command's script and arguments, with options that make it quick."""
    words = command.split()[1:]
    if words[0] != "find_label_errors.py" or not {"--load_model_path", "--apply"} & set(words):
        words += ADDED.get(words[0], "").split()
    if words[0] == "train.py":
        words += ["--num_epochs", "2" if "--load_model_path" in words else "1"]
    return ["32" if word == "224" else word for word in words]


def copy_photos() -> None:
    """Copies some of the demo's photos and all configs, and makes a table of labels of the photos."""
    names, rows = ["brick", "grass", "gravel"], []
    for name in names:
        os.makedirs(f"data/images/{name}")
        photos = sorted((PROJECT / "data" / "images" / name).iterdir())
        for photo in photos[:: len(photos) // PHOTOS_A_CLASS][:PHOTOS_A_CLASS]:
            shutil.copy(photo, f"data/images/{name}")
            rows.append([f"{name}/{photo.stem}", *(str(int(name == other)) for other in names)])
    table = [["id", *names], *rows]
    Path("data", "labels.csv").write_text("".join(f"{','.join(row)}\n" for row in table), encoding="utf-8")
    for configs in (PROJECT / "data").glob("*.json"):
        shutil.copy(configs, "data")


def prepare(command: str) -> None:
    """Makes the files that a user has by the time of some commands."""
    if "--apply" in command:
        path, label = Path("data", "all_data.csv").read_text(encoding="utf-8").splitlines()[1].split(",")
        lines = f"row,path,given_label,mark,corrected_label\n2,{path},{label},right,{label}\n"
        Path("corrections.csv").write_text(lines, encoding="utf-8")
    if "--load_model_path best_model.tflite" in command:
        # Away from the run nothing else says what the model is.
        for name in ("best_model.tflite", "best_model_labels.txt"):
            shutil.copy(Path("saved_model", name), name)
        shutil.copy(next(Path("data", "images").rglob("*.jpg")), "photo.jpg")


def run_examples() -> None:
    """Runs the Python examples on photo.jpg; the exported models give the same answer as the compressed one."""
    from finetune.data.images import read_image, resize_image

    (first,) = read_blocks("README.md", "python")
    names: dict = {}
    exec(first, names)
    assert names["names"][0] in names["probabilities"].keys() == {"brick", "grass", "gravel"}
    image = resize_image(read_image("photo.jpg", (32, 32)), (32, 32)).astype(np.float32)
    expected = names["model"].predict(image[None], verbose=0)
    compressed, *exported = read_blocks(EXPORT_PAGE, "python")
    names = {}
    exec(compressed, names)
    # Its weights have 8 bits, which such a hasty training does not bear: only the form is compared.
    assert names["model"].predict(image[None], verbose=0).shape == expected.shape
    assert len(exported) == 3
    for example in exported:
        names = {"image": image}
        exec(example, names)
        np.testing.assert_allclose(names["probabilities"], expected, atol=1e-5)


def main() -> None:
    """Runs each command once; prints it, and stops at the first that fails."""
    sys.path.insert(0, str(PROJECT))
    copy_photos()
    done = set()
    for command in list_all_commands():
        if command in done:
            continue
        done.add(command)
        prepare(command)
        sys.argv = shorten(command)
        print(command, file=sys.stderr, flush=True)
        start = time.monotonic()
        runpy.run_path(str(PROJECT / sys.argv[0]), run_name="__main__")
        print(f"{time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        if "--load_model_path best_model.tflite" in command:
            run_examples()


if __name__ == "__main__":
    main()
