"""Compares recipes of training on the same photos, backbone weights and time budgets; writes benchmarks/recipes.json.

pip install -r benchmarks/requirements.txt
python benchmarks/recipes.py --data flowers=FOLDER --data voc=CSV:IMAGE_FOLDER

FOLDER holds one folder per class; the CSV has the columns path and class, the labels of an image joined by $.
The backbone's weights are those that Keras finds or downloads (KERAS_HOME).

recommended  the options of data/recommended.json
probe        a logistic regression on the frozen backbone's features of the photos at 224x224
probe320     the same on them and their mirror images at 320x320, which was recommended before
default      train.py without options: eight epochs of train.py as configs.py has it
keras        plain_keras.py: the head alone, then everything, as Keras's guides teach

The test photos chose nothing. Each data set is divided once, for all seeds, into three pools with the same share of
each label: a fifth always trains, two fifths may choose, two fifths may report. Each seed halves the latter two: one
half trains as well (of 100 photos a class, 20 + 20 + 20), the other halves are the validation set, which chooses the
best epoch, and the test set. So no photo of any seed's test set is in a validation set of any seed, and what was
chosen by validation sets, data/recommended.json among it, has not seen it do so.

What has been run stands in recipes_runs.json until all is: started again with the same arguments, it goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

from configs import BACKBONE_NAMES, Configs  # noqa: E402
from finetune.files import IMAGE_SUFFIXES, write_csv, write_json  # noqa: E402
from finetune.options import UserError  # noqa: E402
from finetune.selection import compare_scores, score_images  # noqa: E402
from finetune.tables import IMAGE_COLUMN, LABEL_SEPARATOR  # noqa: E402

RECIPES = ("recommended", "probe", "probe320", "default", "keras")
PROBE = ("--head_initialization", "linear_probe", "--conv_layers_to_train", "0", "--augmentation_strength", "none")
# train.py trains for an epoch at least: at this rate that leaves the regression as it is.
PROBE += ("--num_epochs", "1", "--learning_rate", "1e-7")
PROBE_320 = ("--head_initialization", "linear_probe", "--conv_layers_to_train", "0", "--augmentation_strength", "light")
PROBE_320 += ("--image_target_size", "320", "320", "3", "--num_epochs", "1", "--learning_rate", "1e-7")
DEFAULT = ("--num_epochs", "8")
RUNS_FILE = HERE / "recipes_runs.json"
# By whether an image may have several labels.
FIGURES = {False: "accuracy", True: "mean_average_precision"}
LABEL_COLUMN = "class"
POOL_SEED = 77
FIRST_SPLIT_SEED = 1000
STOPPED = 128 + signal.SIGTERM


class Photos(NamedTuple):
    """A data set.

    Attributes:
        name: on the command line and in the tables.
        paths: of the photos.
        truth: float64 `(photos, classes)` of zeros and ones.
        class_names: sorted.
        multi_label: whether a photo may have several labels.
    """

    name: str
    paths: np.ndarray
    truth: np.ndarray
    class_names: list[str]
    multi_label: bool


class Run(NamedTuple):
    """What a recipe gave on one split.

    Attributes:
        score: of the test photos together.
        seconds: of training.
        photos: the score of each test photo, as `score_images` gives it, for differences photo by photo.
    """

    score: float
    seconds: float
    photos: list[float]


Figures = dict[str, dict[str, dict[str, list]]]


def main() -> None:
    """Runs every recipe on every data set and seed, prints the tables and writes the results."""
    arguments = parse_arguments()
    options = Configs.read_json(arguments.recipe) if "recommended" in arguments.recipes else None
    data = [read_photos(name, place) for name, place in arguments.data]
    figures = run_all(data, arguments)
    results = {
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        "backbone": arguments.backbone,
        "budget_s": arguments.budget,
        "seeds": arguments.seeds,
        "recommended": options,
        "photos": {photos.name: describe_split(photos) for photos in data},
        "runs": figures,
    }
    print(f"\n{format_scores(figures, {photos.name: FIGURES[photos.multi_label] for photos in data})}")
    if "probe" in arguments.recipes:
        print(f"\n{format_differences(figures, 'probe')}")
    if "recommended" in arguments.recipes:
        print(f"\n{format_paired(figures, 'recommended')}")
    if {"recommended", "probe", "default"} <= set(arguments.recipes):
        print(f"\n{format_targets(list_targets(figures))}")
    write_json(str(HERE / "recipes.json"), results)
    RUNS_FILE.unlink(missing_ok=True)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, action="append", type=parse_data, metavar="NAME=PLACE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the splits and of training")
    parser.add_argument("--budget", type=float, default=300, help="seconds after which training ends")
    parser.add_argument("--recipe", default=str(PROJECT / "data" / "recommended.json"), help="the recommended options")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, help="which of them to run")
    parser.add_argument("--backbone", default="MobileNet", choices=BACKBONE_NAMES, metavar="NAME")
    return parser.parse_args()


def parse_data(text: str) -> tuple[str, str]:
    """Divides a data set's argument into name and place."""
    name, _, place = text.partition("=")
    if not name or not place:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER or NAME=CSV:IMAGE_FOLDER, received {text!r}")
    return name, place


# Photos


def read_photos(name: str, place: str) -> Photos:
    """Lists the photos of a folder of class folders, or those of a CSV file of several labels an image.

    Raises:
        UserError: there are no photos, or the CSV file cannot be read.
    """
    csv_stem, is_csv, folder = place.partition(".csv:")
    if is_csv:
        from finetune.tables import read_table

        table = read_table(f"{csv_stem}.csv", LABEL_COLUMN, multi_label=True)
        paths = [os.path.join(folder, path) for path in table[IMAGE_COLUMN]]
        labels = [label.split(LABEL_SEPARATOR) for label in table[LABEL_COLUMN]]
    else:
        found = sorted(path for path in Path(place).glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
        paths, labels = [str(path) for path in found], [[path.parent.name] for path in found]
    if not paths:
        raise UserError(f"--data {name}: expected a folder with one folder per class. {place} holds no such photos.")
    class_names = sorted({label for row in labels for label in row})
    truth = np.array([[class_name in row for class_name in class_names] for row in labels], float)
    return Photos(name, np.array([os.path.abspath(path) for path in paths]), truth, class_names, bool(is_csv))


def split_photos(truth: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Divides photos into three sets, so that no seed's test photo is any seed's validation photo.

    Args:
        truth: `(photos, classes)` of zeros and ones.
        seed: of the halves; the pools are the same for all.

    Returns:
        The rows of `training`, `validation` and `test`, ascending: about three fifths, one and one.
    """
    number = len(truth)
    pool = number * 2 // 5
    sizes = [number - 2 * pool, pool, pool]
    always, choosing, reporting = deal(truth, np.arange(number), sizes, np.random.default_rng(POOL_SEED))
    rng = np.random.default_rng(FIRST_SPLIT_SEED + seed)
    halves = [pool // 2, pool - pool // 2]
    first, validation = deal(truth, choosing, halves, rng)
    second, test = deal(truth, reporting, halves, rng)
    return {"training": np.sort(np.concatenate([always, first, second])), "validation": validation, "test": test}


def deal(truth: np.ndarray, rows: np.ndarray, sizes: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Deals photos out to parts of given sizes, the rarest label first, each to the part that lacks it the most.

    Source: Sechidis et al., ECML PKDD 2011, algorithm 1, with sizes that hold exactly.

    Args:
        truth: `(photos, classes)` of zeros and ones, of all photos; each has a label.
        rows: which photos to deal out.
        sizes: of the parts; their sum is the number of rows.
        rng: draws the order, and which of equal parts.

    Returns:
        The rows of each part, ascending.
    """
    room = np.array(sizes, float)
    lacking = (room / room.sum())[:, None] * truth[rows].sum(axis=0)
    parts: list[list[int]] = [[] for _ in sizes]
    left = np.sort(rows)
    while len(left):
        counts = truth[left].sum(axis=0)
        rarest = np.argmin(np.where(counts > 0, counts, np.inf))
        has_rarest = truth[left, rarest] > 0
        for row in rng.permutation(left[has_rarest]):
            # Less than any true difference, it decides between equal parts.
            wishes = lacking[:, rarest] + 1e-3 * rng.uniform(size=len(sizes))
            part = np.argmax(np.where(room > 0, wishes, -np.inf))
            parts[part].append(row)
            lacking[part] -= truth[row]
            room[part] -= 1
        left = left[~has_rarest]
    return [np.array(sorted(part), int) for part in parts]


def describe_split(photos: Photos) -> dict[str, int]:
    """Returns the sizes of a data set's sets and the number of its classes; they are the same for all seeds."""
    sizes = {name: len(rows) for name, rows in split_photos(photos.truth, 0).items()}
    return {"classes": len(photos.class_names), **sizes}


# Running


def run_all(data: Sequence[Photos], arguments: argparse.Namespace) -> Figures:
    """Runs each recipe in a process of its own; they take turns, so that all share the machine's moods.

    Returns:
        By data set and recipe the `scores`, `seconds` and `photos` of each run, in the order of the seeds.
    """
    figures = {
        photos.name: {recipe: {"scores": [], "seconds": [], "photos": []} for recipe in arguments.recipes}
        for photos in data
    }
    setting = describe_setting(arguments)
    runs = read_runs(setting)
    for seed in arguments.seeds:
        for photos in data:
            for recipe in arguments.recipes:
                name = f"{photos.name}, seed {seed}, {recipe}"
                if name not in runs:
                    with tempfile.TemporaryDirectory() as folder:
                        run = run_peer if recipe == "keras" else run_train
                        runs[name] = run(recipe, photos, seed, folder, arguments)
                    write_json(str(RUNS_FILE), {"setting": setting, "runs": runs})
                for key, value in zip(("scores", "seconds", "photos"), runs[name], strict=True):
                    figures[photos.name][recipe][key].append(value)
                print(f"{name}: {runs[name][0]:.4f} in {runs[name][1]:.0f} s", flush=True)
    return figures


def describe_setting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what has to be the same for runs to belong together."""
    recipe = Configs.read_json(arguments.recipe) if "recommended" in arguments.recipes else None
    places = {name: os.path.abspath(place) for name, place in arguments.data}
    return {"data": places, "budget": arguments.budget, "backbone": arguments.backbone, "recommended": recipe}


def read_runs(setting: dict[str, Any]) -> dict[str, Run]:
    """Returns the runs of an earlier, unfinished call in the same setting, by what they are called."""
    if not RUNS_FILE.is_file():
        return {}
    stored = json.loads(RUNS_FILE.read_text(encoding="utf-8"))
    if stored["setting"] != json.loads(json.dumps(setting)):
        return {}
    return {name: Run(*run) for name, run in stored["runs"].items()}


def run_train(recipe: str, photos: Photos, seed: int, folder: str, arguments: argparse.Namespace) -> Run:
    """Trains by train.py and tests by test.py."""
    flags = {"recommended": ("--configs", arguments.recipe), "probe": PROBE, "probe320": PROBE_320, "default": DEFAULT}
    flags = flags[recipe]
    tables = ["--random_seed", str(seed)]
    options = {"training": "--train_csv", "validation": "--validation_csv", "test": "--test_csv"}
    for name, path in write_tables(photos, seed, folder).items():
        tables += [options[name], path]
    model = ["--visual_model_name", arguments.backbone, "--multi_label_classification", str(photos.multi_label)]
    run = f"{folder}/run"
    seconds = run_script(
        [PROJECT / "train.py", *flags, *model, *tables, "--save_model_path", run, "--show_model_summary", "False"],
        arguments.budget,
    )
    run_script([PROJECT / "test.py", *tables, "--load_model_path", run])
    results = json.loads(Path(run, "evaluation", "metrics.json").read_text(encoding="utf-8"))
    table = pd.read_csv(Path(run, "evaluation", "predictions.csv"))
    probabilities = table[[f"probability_{name}" for name in photos.class_names]].to_numpy()
    scores = score_images(select_truth(photos, seed), probabilities).tolist()
    return Run(results["sets"]["test"][FIGURES[photos.multi_label]], seconds, scores)


def select_truth(photos: Photos, seed: int) -> np.ndarray:
    """Returns the labels of the test photos: `(photos,)` class positions, or `(photos, classes)` of zeros and ones."""
    truth = photos.truth[split_photos(photos.truth, seed)["test"]]
    return truth if photos.multi_label else truth.argmax(axis=1)


def write_tables(photos: Photos, seed: int, folder: str) -> dict[str, str]:
    """Writes the tables of the three sets into a folder; returns their paths by the sets' names."""
    labels = np.array([LABEL_SEPARATOR.join(np.array(photos.class_names)[row > 0]) for row in photos.truth])
    tables = {}
    for name, rows in split_photos(photos.truth, seed).items():
        tables[name] = f"{folder}/{name}.csv"
        write_csv(tables[name], pd.DataFrame({IMAGE_COLUMN: photos.paths[rows], LABEL_COLUMN: labels[rows]}))
    return tables


def run_peer(recipe: str, photos: Photos, seed: int, folder: str, arguments: argparse.Namespace) -> Run:
    """Trains and predicts by plain_keras.py; the score comes from the same functions."""
    from finetune.decision import Decision
    from finetune.evaluation import evaluate_set

    truth = photos.truth if photos.multi_label else photos.truth.argmax(axis=1)
    rows = split_photos(photos.truth, seed)
    sets = {name: {"paths": photos.paths[part].tolist(), "labels": truth[part].tolist()} for name, part in rows.items()}
    task = {"backbone": arguments.backbone, "classes": len(photos.class_names), "multi_label": photos.multi_label}
    task |= {"seed": seed, "budget": arguments.budget, "sets": sets}
    write_json(f"{folder}/task.json", task)
    seconds = run_script([HERE / "plain_keras.py", "train", folder])
    run_script([HERE / "plain_keras.py", "predict", folder])
    decision = Decision(photos.class_names, photos.multi_label)
    probabilities = np.load(f"{folder}/probabilities.npy")
    figures = evaluate_set(truth[rows["test"]], probabilities, decision)
    scores = score_images(select_truth(photos, seed), probabilities).tolist()
    return Run(figures[FIGURES[photos.multi_label]], seconds, scores)


def run_script(command: Sequence[str | Path], budget: float | None = None) -> float:
    """Runs a script in a process of its own, and asks it to end after `budget` seconds; returns the process's seconds.

    Raises:
        UserError: it fails, or has nothing to keep by then.
    """
    start = time.perf_counter()
    words = [sys.executable, *map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    expected = {0}
    try:
        output, _ = process.communicate(timeout=budget)
    except subprocess.TimeoutExpired:
        process.terminate()
        # Stopped by anyone else, a run is not the whole recipe.
        expected.add(STOPPED)
        output, _ = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode == -signal.SIGTERM and STOPPED in expected:
        raise UserError(f"{command[0]} had not begun to train after {budget:.0f} s. Raise --budget.")
    if process.returncode not in expected:
        raise UserError(f"{' '.join(words)} ended with status {process.returncode}:\n{output}")
    return seconds


# Tables


def summarize(values: Sequence[float], form: str) -> str:
    """Returns the mean of values and their range as text: mean [lowest, highest]."""
    return f"{np.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def get_differences(figures: Figures, name: str, recipe: str, base: str) -> np.ndarray:
    """Returns by how many points a recipe is above another on one data set, float64 `(seeds,)`."""
    return 100 * np.subtract(*(figures[name][key]["scores"] for key in (recipe, base)))


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def format_scores(figures: Figures, measures: dict[str, str]) -> str:
    """Lays out each recipe's scores and seconds, means and ranges over the seeds.

    Args:
        figures: as `run_all` returns them.
        measures: the name of each data set's score.
    """
    head = ["recipe"]
    for name, measure in measures.items():
        head += [f"{name}, {measure.replace('_', ' ')}", f"{name}, s"]
    rows = {recipe: [recipe] for by_recipe in figures.values() for recipe in by_recipe}
    for by_recipe in figures.values():
        for recipe, runs in by_recipe.items():
            rows[recipe] += [summarize(runs["scores"], ".3f"), summarize(runs["seconds"], ".0f")]
    return format_table(head, list(rows.values()))


def format_differences(figures: Figures, base: str) -> str:
    """Lays out by how many points each recipe is above the one called `base`, photo split by photo split."""
    rows = {recipe: [recipe] for by_recipe in figures.values() for recipe in by_recipe if recipe != base}
    for name in figures:
        for recipe in rows:
            rows[recipe].append(summarize(get_differences(figures, name, recipe, base), "+.1f"))
    return format_table([f"points above {base}", *figures], list(rows.values()))


def format_paired(figures: Figures, recipe: str) -> str:
    """Lays out by how many points a recipe is above each other one, photo by photo, all splits together.

    A photo counts by its score: whether its class is right, of several labels their ranking average precision. The
    interval is the mean and 1.96 standard errors to each side.
    """
    others = {other: [other] for by_recipe in figures.values() for other in by_recipe if other != recipe}
    for by_recipe in figures.values():
        own = np.concatenate(by_recipe[recipe]["photos"])
        for other, row in others.items():
            difference, error = compare_scores(np.concatenate(by_recipe[other]["photos"]), own)
            low, high = (100 * (difference + side * 1.96 * error) for side in (-1, 1))
            row.append(f"{100 * difference:+.1f} ({low:+.1f} to {high:+.1f})")
    return format_table([f"{recipe} above, photo by photo", *figures], list(others.values()))


Target = tuple[str, float, str, float]


def list_targets(figures: Figures) -> list[Target]:
    """Returns what was promised of the recommended recipe: what, measured, `at least` or `at most`, and the bound."""
    targets, above = [], []
    for name, by_recipe in figures.items():
        recommended, default = by_recipe["recommended"], by_recipe["default"]
        above.append(float(get_differences(figures, name, "recommended", "probe").mean()))
        errors = [1 - np.mean(runs["scores"]) for runs in (recommended, default)]
        seconds = [np.mean(runs["seconds"]) for runs in (recommended, default)]
        targets.append((f"{name}: points above the probe", above[-1], "at least", 1))
        targets.append((f"{name}: error / the default's", float(errors[0] / errors[1]), "at most", 2 / 3))
        targets.append((f"{name}: seconds / the default's", float(seconds[0] / seconds[1]), "at most", 0.5))
    return [*targets, ("points above the probe, the lowest of the data sets", min(above), "at least", -0.5)]


def format_targets(targets: Sequence[Target]) -> str:
    """Lays out measured figures beside their bounds."""
    rows = []
    for what, value, sign, bound in targets:
        holds = value >= bound if sign == "at least" else value <= bound
        rows.append([what, f"{value:.3g}", f"{sign} {bound:.3g}", "holds" if holds else "missed"])
    return format_table(["recommended", "measured", "promised", ""], rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
