"""Compares training recipes on the same photos, backbone weights and time budget; writes benchmarks/recipes.json.

pip install -r benchmarks/requirements.txt
python benchmarks/recipes.py --data flowers=FOLDER --data voc=CSV:IMAGE_FOLDER

FOLDER has one folder per class. The CSV has the columns path and class; several labels of an image are joined by $.
PLACE@N resizes that data set's images to N pixels a side, instead of 224 or the size in the recommended options.
Keras has separate weights for MobileNet at 128, 160 and 192 pixels; it finds or downloads them (KERAS_HOME).

recommended  the options of data/recommended.json
probe        a logistic regression on the frozen backbone's features at 224x224
probe320     the same with mirror images too, at 320x320 or 320 / 224 of N
crop, pad    the probe with images cropped or padded (resize_mode) instead of stretched
default      train.py without options, for as many epochs as the recommended options have
keras        plain_keras.py: the head alone, then everything, as Keras's guides teach
fastai       fastai_peer.py: fastai's vision_learner and fine_tune, for as many epochs; MobileNet only
fastai_tta   the same run, with fastai's test-time augmentation

Test photos never choose anything. Each data set is divided once, for all seeds, into three pools with the same share of
each label: a fifth always trains, two fifths may choose, two fifths may test. Each seed halves the last two pools. One
half of each trains too (of 100 photos a class, 20 + 20 + 20). The other halves are the validation set, which chooses
the best epoch, and the test set. So no test photo of any seed is a validation photo of any seed, and choices made on
validation sets, such as data/recommended.json, have not seen test photos. Identical files are left out, whatever their
labels.

--train_per_class 20 60 takes 20, then 60 photos a class of each seed's training set, and a third as many (at least 4)
of its validation set. The test set stays whole. Data sets with several labels an image are not reduced, nor
are those of --together, whose near copies stay in one set. If one class has more than half of the photos, the score
is the balanced accuracy.

Finished runs are kept next to the results until all are done: started again with the same arguments, it continues.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.recipe_photos import (  # noqa: E402
    IMAGE_SIZE,
    Photos,
    describe_split,
    keep_near_copies_together,
    read_photos,
    score_test_photos,
    select,
    vary_size,
    write_tables,
)
from benchmarks.recipe_tables import (  # noqa: E402
    Metrics,
    format_differences,
    format_paired,
    format_scores,
    format_targets,
    list_targets,
)
from configs import Configs  # noqa: E402
from finetune.core.files import write_json  # noqa: E402
from finetune.core.options import UserError  # noqa: E402

FASTAI = "fastai_peer.py"
# For each script, the file with the probabilities of each recipe.
PEERS = {
    "plain_keras.py": {"keras": "probabilities.npy"},
    FASTAI: {"fastai": "probabilities.npy", "fastai_tta": "probabilities_tta.npy"},
}
RECIPES = ("recommended", "probe", "probe320", "crop", "pad", "default")
RECIPES += tuple(recipe for peer in PEERS.values() for recipe in peer)
PROBE = ("--head_initialization", "linear_probe", "--conv_layers_to_train", "0", "--augmentation_strength", "none")
# train.py trains for at least an epoch; this learning rate leaves the regression unchanged.
PROBE += ("--num_epochs", "1", "--learning_rate", "1e-7")
PROBE_320 = ("--head_initialization", "linear_probe", "--conv_layers_to_train", "0", "--augmentation_strength", "light")
PROBE_320 += ("--num_epochs", "1", "--learning_rate", "1e-7")
# Keras's backbones take no smaller images.
SMALLEST_IMAGE = 32
STOPPED = 128 + signal.SIGTERM


class Place(NamedTuple):
    """A data set's argument.

    Attributes:
        name: in the tables.
        path: a folder, or CSV:IMAGE_FOLDER.
        image_size: pixels a side; None leaves it to the recipes.
    """

    name: str
    path: str
    image_size: int | None


class Run(NamedTuple):
    """The result of a recipe on one split.

    Attributes:
        score: of the whole test set.
        seconds: training time.
        photos: the score of each test photo, from `score_images`, for paired differences.
    """

    score: float
    seconds: float
    photos: list[float]


def main() -> None:
    """Runs every recipe on every data set and seed, prints the tables and writes the results."""
    arguments = parse_arguments()
    check_peers(arguments)
    options = Configs.read_json(arguments.recipe) if "recommended" in arguments.recipes else None
    read = [read_photos(*place) for place in arguments.data]
    read = [keep_near_copies_together(photos) if photos.name in arguments.together else photos for photos in read]
    data = [varied for photos in read for varied in vary_size(photos, arguments.train_per_class, arguments.seeds)]
    metrics = run_all(data, arguments)
    results = {
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        "backbone": arguments.backbone,
        "budget_s": arguments.budget,
        "seeds": arguments.seeds,
        "recommended": options,
        "photos": {photos.name: describe_split(photos) for photos in data},
        "epochs": {photos.name: count_run_epochs(photos, arguments.recipe) for photos in data},
        "runs": metrics,
    }
    write_json(arguments.write, results)
    name_runs_file(arguments).unlink(missing_ok=True)
    print(f"\n{format_scores(metrics, {photos.name: photos.metric for photos in data})}")
    if "probe" in arguments.recipes:
        print(f"\n{format_differences(metrics, 'probe')}")
    if "recommended" in arguments.recipes:
        groups = {
            photos.name: np.concatenate([photos.groups[select(photos, seed)["test"]] for seed in arguments.seeds])
            for photos in data
            if photos.groups is not None
        }
        print(f"\n{format_paired(metrics, 'recommended', groups)}")
    if "recommended" in arguments.recipes and len(set(arguments.recipes)) > 1:
        print(f"\n{format_targets(list_targets(metrics))}")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, action="append", type=parse_data, metavar="NAME=PLACE[@N]")
    parser.add_argument(
        "--train_per_class",
        type=parse_number,
        nargs="+",
        default=[],
        metavar="N",
        help="training photos of each class",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the splits and of training")
    parser.add_argument("--budget", type=float, default=300, help="seconds after which training ends")
    parser.add_argument("--recipe", default=str(PROJECT / "data" / "recommended.json"), help="the recommended options")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, help="which of them to run")
    parser.add_argument("--together", nargs="+", default=[], metavar="NAME", help="data sets with near copies")
    parser.add_argument("--backbone", default="MobileNet", metavar="NAME")
    parser.add_argument("--backbone_preprocessing", default="", help="of a backbone that is a file")
    parser.add_argument("--write", default=str(HERE / "recipes.json"), metavar="FILE", help="the results")
    return parser.parse_args()


def parse_data(text: str) -> Place:
    """Splits the argument of a data set into name, place and image size."""
    name, _, rest = text.partition("=")
    path, size = re.fullmatch(r"(.*?)(?:@(\d+))?", rest).groups()
    if not name or not path:
        raise argparse.ArgumentTypeError(
            f"expected NAME=FOLDER or NAME=CSV:IMAGE_FOLDER, either with @PIXELS or without, received {text!r}"
        )
    if size and int(size) < SMALLEST_IMAGE:
        raise argparse.ArgumentTypeError(
            f"expected images of at least {SMALLEST_IMAGE} pixels a side, received {text!r}"
        )
    return Place(name, path, int(size) if size else None)


def parse_number(text: str) -> int:
    """Reads a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, received {text!r}")
    return int(text)


def check_peers(arguments: argparse.Namespace) -> None:
    """Raises UserError if a peer cannot run, or --together names other data."""
    if unknown := set(arguments.together) - {place.name for place in arguments.data}:
        raise UserError(f"--together: expected names of --data, received {', '.join(sorted(unknown))}.")
    if not set(PEERS[FASTAI]) & set(arguments.recipes):
        return
    if arguments.backbone != "MobileNet":
        raise UserError(f"The recipe fastai has MobileNet only, not {arguments.backbone}. Leave it out of --recipes.")
    if not importlib.util.find_spec("fastai"):
        raise UserError("fastai is not installed. pip install -r benchmarks/requirements.txt, or set --recipes.")


def read_epochs(recipe: str, images: int) -> int:
    """Returns the number of epochs of the recommended options for so many training images.

    Raises:
        UserError: the file cannot be read.
    """
    from finetune.training.run import count_epochs

    options = Configs(**Configs.read_json(recipe))
    steps = math.ceil(images / (options.batch_size * options.gradient_accumulation_steps))
    return count_epochs(options.num_epochs, options.min_steps, steps)


def count_run_epochs(photos: Photos, recipe: str) -> int:
    """Returns the number of epochs of each recipe that trains, from the first seed's training photos."""
    return read_epochs(recipe, len(select(photos, 0)["training"]))


def run_all(data: Sequence[Photos], arguments: argparse.Namespace) -> Metrics:
    """Runs each recipe in its own process, in turns, so that a busy machine affects all alike.

    Returns:
        The `scores`, `seconds` and `photos` of each run by data set and recipe, in the order of the seeds.
    """
    metrics = {
        photos.name: {recipe: {"scores": [], "seconds": [], "photos": []} for recipe in arguments.recipes}
        for photos in data
    }
    setting = describe_setting(arguments)
    runs = read_runs(name_runs_file(arguments), setting)
    for seed in arguments.seeds:
        for photos in data:
            for recipe in arguments.recipes:
                name = f"{photos.name}, seed {seed}, {recipe}"
                if name not in runs:
                    with tempfile.TemporaryDirectory() as folder:
                        found = run_recipe(recipe, photos, seed, folder, arguments)
                    runs |= {f"{photos.name}, seed {seed}, {key}": run for key, run in found.items()}
                    write_json(str(name_runs_file(arguments)), {"setting": setting, "runs": runs})
                for key, value in zip(("scores", "seconds", "photos"), runs[name], strict=True):
                    metrics[photos.name][recipe][key].append(value)
                print(f"{name}: {runs[name][0]:.4f} in {runs[name][1]:.0f} s", flush=True)
    return metrics


def describe_setting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the setting that runs must share to belong together."""
    recipe = Configs.read_json(arguments.recipe)
    return {
        "data": {place.name: [os.path.abspath(place.path), place.image_size] for place in arguments.data},
        "together": arguments.together,
        "train_per_class": arguments.train_per_class,
        "budget": arguments.budget,
        "backbone": [arguments.backbone, arguments.backbone_preprocessing],
        "recommended": recipe if "recommended" in arguments.recipes else None,
        "epochs": [recipe.get(name) for name in ("num_epochs", "min_steps")],
    }


def name_runs_file(arguments: argparse.Namespace) -> Path:
    """Returns the file that keeps finished runs, next to the results."""
    path = Path(arguments.write)
    return path.with_name(f"{path.stem}_runs.json")


def read_runs(file: Path, setting: dict[str, Any]) -> dict[str, Run]:
    """Returns the runs of an earlier, unfinished call with the same setting, by name."""
    if not file.is_file():
        return {}
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored["setting"] != json.loads(json.dumps(setting)):
        return {}
    return {name: Run(*run) for name, run in stored["runs"].items()}


def run_recipe(recipe: str, photos: Photos, seed: int, folder: str, arguments: argparse.Namespace) -> dict[str, Run]:
    """Runs a recipe; returns its run by name, with those of other recipes that share its training."""
    for script, answers in PEERS.items():
        if recipe in answers:
            return run_peer(script, photos, seed, folder, arguments)
    return {recipe: run_train(recipe, photos, seed, folder, arguments)}


def run_train(recipe: str, photos: Photos, seed: int, folder: str, arguments: argparse.Namespace) -> Run:
    """Trains by train.py and tests by test.py."""
    flags = {
        "recommended": ("--configs", arguments.recipe),
        "probe": PROBE,
        "probe320": PROBE_320,
        "crop": (*PROBE, "--resize_mode", "crop"),
        "pad": (*PROBE, "--resize_mode", "pad"),
        "default": ("--num_epochs", str(count_run_epochs(photos, arguments.recipe))),
    }[recipe]
    size = get_image_size(recipe, photos.image_size)
    if size:
        flags += ("--image_target_size", str(size), str(size), "3")
    tables = ["--random_seed", str(seed)]
    options = {"training": "--train_csv", "validation": "--validation_csv", "test": "--test_csv"}
    for name, path in write_tables(photos, seed, folder).items():
        tables += [options[name], path]
    model = ["--visual_model_name", arguments.backbone, "--multi_label_classification", str(photos.multi_label)]
    if arguments.backbone_preprocessing:
        model += ["--backbone_preprocessing", *arguments.backbone_preprocessing.split()]
    run = f"{folder}/run"
    seconds = run_script(
        [PROJECT / "train.py", *flags, *model, *tables, "--save_model_path", run, "--show_model_summary", "False"],
        arguments.budget,
    )
    run_script([PROJECT / "test.py", *tables, "--load_model_path", run])
    results = json.loads(Path(run, "evaluation", "metrics.json").read_text(encoding="utf-8"))
    table = pd.read_csv(Path(run, "evaluation", "predictions.csv"))
    probabilities = table[[f"probability_{name}" for name in photos.class_names]].to_numpy()
    scores = score_test_photos(photos, seed, probabilities)
    return Run(results["sets"]["test"][photos.metric], seconds, scores)


def get_image_size(recipe: str, image_size: int | None) -> int | None:
    """Returns a recipe's pixels a side on a data set with this `image_size`; None leaves it to the recipe."""
    return round((image_size or IMAGE_SIZE) * 320 / 224) if recipe == "probe320" else image_size


def run_peer(script: str, photos: Photos, seed: int, folder: str, arguments: argparse.Namespace) -> dict[str, Run]:
    """Trains and predicts with a peer's script; the scores come from the same functions.

    Returns:
        The runs of one training by recipe. fastai's seconds leave out the conversion of Keras's weights.
    """
    from finetune.evaluation.decision import Decision
    from finetune.evaluation.evaluation import evaluate_set

    truth = photos.truth if photos.multi_label else photos.truth.argmax(axis=1)
    rows = select(photos, seed)
    sets = {name: {"paths": photos.paths[part].tolist(), "labels": truth[part].tolist()} for name, part in rows.items()}
    task = {"backbone": arguments.backbone, "classes": len(photos.class_names), "multi_label": photos.multi_label}
    task |= {"image_size": photos.image_size or IMAGE_SIZE, "epochs": count_run_epochs(photos, arguments.recipe)}
    task |= {"seed": seed, "budget": arguments.budget, "sets": sets}
    write_json(f"{folder}/task.json", task)
    if script == FASTAI:
        run_script([HERE / script, "convert", folder])
    seconds = run_script([HERE / script, "train", folder])
    run_script([HERE / script, "predict", folder])
    decision = Decision(photos.class_names, photos.multi_label)
    runs = {}
    for recipe, file in PEERS[script].items():
        probabilities = np.load(f"{folder}/{file}")
        metrics = evaluate_set(truth[rows["test"]], probabilities, decision)
        scores = score_test_photos(photos, seed, probabilities)
        runs[recipe] = Run(metrics[photos.metric], seconds, scores)
    return runs


def run_script(command: Sequence[str | Path], budget: float | None = None) -> float:
    """Runs a script in its own process, asks it to end after `budget` seconds, and returns how long it took.

    Raises:
        UserError: it fails, or had not begun to train by then.
    """
    start = time.perf_counter()
    words = [sys.executable, *map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    expected = {0}
    try:
        output, _ = process.communicate(timeout=budget)
    except subprocess.TimeoutExpired:
        process.terminate()
        # Stopped by anything else, a run is incomplete.
        expected.add(STOPPED)
        output, _ = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode == -signal.SIGTERM and STOPPED in expected:
        raise UserError(f"{command[0]} had not begun to train after {budget:.0f} s. Raise --budget.")
    if process.returncode not in expected:
        raise UserError(f"{' '.join(words)} ended with status {process.returncode}:\n{output}")
    return seconds


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
