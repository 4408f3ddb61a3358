"""Writes a trained model without its optimizer's state, and tells whether it still answers the same.

The weights go into an .h5 file, the layers into a .json file. Both are read back and run on the test set beside the
original: where the accuracy falls by more than --tolerance, they keep a .rejected name and the exit status is 1.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from configs import Configs, define, run_script
from utils import WEIGHTS_DTYPES, custom_save_model, load_model, resolve_model_path, sync_folder, write_json

if TYPE_CHECKING:
    import keras

    from generator import AugmentedImageSequence
    from metrics import Decision

# Where a run's images are: its own configs.json knows.
DATA_OPTIONS = ("test_csv", "image_directory", "csv_label_column")
REPORT_FILE = "compression_report.json"
SIDES = ("before", "after")
TIMED_RUNS = 3


@dataclasses.dataclass
class CompressConfigs(Configs):
    """The options of this script, beside those of every script."""

    model_path: str = define("", "The model file or the run's folder; empty takes load_model_path or save_model_path")
    weights_dtype: str = define(
        "float32", "What the compressed weights are: exact, a half or a quarter of that", choices=WEIGHTS_DTYPES
    )
    tolerance: float = define(
        1.0, "Points of accuracy that compression may cost on the test set", at_least=0, at_most=100
    )


def main(configs: CompressConfigs) -> dict[str, Any]:
    """Compresses the model, compares it with the original on the test set, prints the table and writes the report.

    Returns:
        The content of `compression_report.json`: `model`, `model_bytes`, `test_csv` and `images` (None where nothing
        was compared), `tolerance`, and `artefacts`. Each of these has `kind`, `weights_dtype`, `path`, `files` (bytes
        by path), `rejected`, and `comparison`, as `compare` returns it, or None.

    Raises:
        UserError: there is no model, or the test set cannot be used or is not the model's.
    """
    from utils import set_gpu_usage

    set_gpu_usage(configs.gpu_percentage)
    model_path = resolve_model_path(configs.model_path or configs.load_model_path or configs.save_model_path)
    configs = take_data_of_run(configs, model_path)
    report = {"model": model_path, "model_bytes": os.path.getsize(model_path)}
    report |= {"test_csv": configs.test_csv or None, "images": None, "tolerance": configs.tolerance}
    artefact: dict[str, Any] = {"kind": "weights", "weights_dtype": configs.weights_dtype}
    if configs.test_csv:
        paths, artefact["comparison"] = compress_and_compare(model_path, configs)
        report["images"] = artefact["comparison"]["images"]
        artefact["rejected"] = artefact["comparison"]["accuracy_drop"] > configs.tolerance
    else:
        paths = write_candidate(load_model(model_path), model_path, configs.weights_dtype)
        artefact |= {"comparison": None, "rejected": False}
    paths = paths if artefact["rejected"] else accept(paths)
    artefact |= {"path": paths[0], "files": {path: os.path.getsize(path) for path in paths}}
    report["artefacts"] = [artefact]
    print_report(report)
    write_json(os.path.join(os.path.dirname(model_path), REPORT_FILE), report)
    return report


def take_data_of_run(configs: CompressConfigs, model_path: str) -> CompressConfigs:
    """Takes the test set from the `configs.json` beside the model, where the user gives none.

    Returns:
        The configs; their `test_csv` is empty, which is printed with its reason, where there is nothing to compare on.
    """
    stored_path = os.path.join(os.path.dirname(model_path), "configs.json")
    stored = Configs.read_json(stored_path) if os.path.isfile(stored_path) else {}
    is_given = "test_csv" in configs.given
    configs = configs.replace(
        **{name: stored[name] for name in DATA_OPTIONS if name in stored and name not in configs.given}
    )
    reason = ""
    if not configs.test_csv:
        reason = "test_csv is empty"
    elif not is_given and "test_csv" not in stored:
        reason = f"no {stored_path} names the test set of this model"
    elif not is_given and not os.path.isfile(configs.test_csv):
        reason = f"{configs.test_csv} does not exist"
    if reason:
        print(f"Not compared with the original: {reason}. Give --test_csv to compare on labelled images.")
    return configs.replace(test_csv="") if reason else configs


def write_candidate(model: keras.Model, model_path: str, weights_dtype: str) -> tuple[str, ...]:
    """Writes the compressed model under the name of a rejected one: nothing unproven takes the name that ships."""
    folder, file_name = os.path.split(model_path)
    name = f"{os.path.splitext(file_name)[0]}_compressed.rejected"
    return custom_save_model(model, folder, name, weights_dtype)


def accept(paths: Sequence[str]) -> tuple[str, ...]:
    """Takes `.rejected` out of the names of files, and returns these."""
    parts = [os.path.splitext(path) for path in paths]
    accepted = tuple(stem.removesuffix(".rejected") + suffix for stem, suffix in parts)
    for path, name in zip(paths, accepted, strict=True):
        os.replace(path, name)
    sync_folder(os.path.dirname(os.path.abspath(accepted[0])))
    return accepted


def compress_and_compare(model_path: str, configs: CompressConfigs) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Writes the compressed model, reads it back and runs it on the test set beside the original.

    Returns:
        The files that were written, and what `compare` found, with `images_per_second` of both.
    """
    from metrics import read_decision
    from utils import find_trained_model, get_generator, keep_freed_memory, load_fitting_model, predict

    keep_freed_memory()
    _, configs = find_trained_model(configs.replace(load_model_path=model_path))
    model = load_fitting_model(model_path, configs.classes, configs.image_target_size[:2])
    sequence = get_generator(configs.test_csv, configs.classes, configs, training=False)
    decision = read_decision(
        os.path.dirname(model_path), configs.classes, configs.multi_label_classification, model_path
    )
    # Before anything is written: what is wrong with an image shows here.
    before = predict(model, sequence)
    paths = write_candidate(model, model_path, configs.weights_dtype)
    compressed = load_model(paths[0])
    comparison = compare(sequence.get_y_true(), before, predict(compressed, sequence), decision)
    speeds = measure_speeds((model, compressed), sequence)
    comparison["images_per_second"] = dict(zip(SIDES, speeds, strict=True))
    return paths, comparison


def compare(y_true: np.ndarray, before: np.ndarray, after: np.ndarray, decision: Decision) -> dict[str, Any]:
    """Compares the answers of a model with those of its compressed form.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        before: the original's raw probabilities, `(images, classes)`.
        after: those of the compressed model.
        decision: turns either into answers.

    Returns:
        `images`; `largest_difference` and `mean_difference` of the probabilities; `changed_predictions`, images with
        another answer; `measure`, what `accuracy` is: the share of images with the right label, or multi-label with
        exactly their labels; `accuracy`, before and after; `accuracy_drop` in points, negative for a gain.

    Raises:
        UserError: a probability is not finite.
    """
    from metrics import check_finite

    for probabilities in (before, after):
        check_finite(probabilities)
    differences = np.abs(before.astype(np.float64) - after)
    chosen = [decision.choose(decision.calibrate(probabilities)) for probabilities in (before, after)]
    truth = y_true.astype(bool) if decision.multi_label else y_true[:, None] == np.arange(before.shape[1])
    right = [int((labels == truth).all(axis=1).sum()) for labels in chosen]
    return {
        "images": len(y_true),
        "largest_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        "changed_predictions": int((chosen[0] != chosen[1]).any(axis=1).sum()),
        "measure": "exact match" if decision.multi_label else "accuracy",
        "accuracy": dict(zip(SIDES, [count / len(y_true) for count in right], strict=True)),
        # Of counts: a difference of shares is rounded, and 1 point may come out above 1.
        "accuracy_drop": 100 * (right[0] - right[1]) / len(y_true),
    }


def measure_speeds(models: Sequence[keras.Model], sequence: AugmentedImageSequence) -> list[float]:
    """Returns the images a second that each model predicts of the first batch, at its best of `TIMED_RUNS` runs."""
    import tensorflow as tf

    images = tf.convert_to_tensor(sequence[0][0])
    steps = [tf.function(functools.partial(model, training=False)) for model in models]
    times = []
    # The first run compiles. The models take turns, so that whatever else the computer does meets both.
    for _ in range(1 + TIMED_RUNS):
        for step in steps:
            start = time.perf_counter()
            step(images).numpy()
            times.append(time.perf_counter() - start)
    best = np.reshape(times, (-1, len(models)))[1:].min(axis=0)
    return (len(images) / best).tolist()


def print_report(report: dict[str, Any]) -> None:
    """Prints the sizes and, where the models were compared, the table and the verdict."""
    print(f"{report['model']}: {report['model_bytes'] / 1e6:.2f} MB")
    for artefact in report["artefacts"]:
        for path, size in artefact["files"].items():
            print(f"{path}: {size / 1e6:.2f} MB")
        if artefact["comparison"]:
            print(format_comparison(artefact["comparison"], report["model_bytes"], artefact))
            verdict = "Rejected" if artefact["rejected"] else "Accepted"
            change, measure = -artefact["comparison"]["accuracy_drop"], artefact["comparison"]["measure"]
            limit = f"it may fall by {report['tolerance']:g}"
            print(f"{verdict}: {artefact['path']}: {measure} changes by {change:+.2f} points, {limit}.")


def format_comparison(comparison: dict[str, Any], model_bytes: int, artefact: dict[str, Any]) -> str:
    """Lays out a comparison as a table."""
    sizes = (model_bytes / 1e6, artefact["files"][artefact["path"]] / 1e6)
    pairs = {
        "size, MB": [f"{size:.2f}" for size in sizes],
        comparison["measure"]: [f"{accuracy:.4f}" for accuracy in comparison["accuracy"].values()],
        "images/s": [f"{speed:.1f}" for speed in comparison["images_per_second"].values()],
    }
    lines = [f"\n{'':<12}{'original':>12}{artefact['weights_dtype']:>12}"]
    lines += [f"{name:<12}{before:>12}{after:>12}" for name, (before, after) in pairs.items()]
    largest, mean = comparison["largest_difference"], comparison["mean_difference"]
    lines += [
        f"\nprobability difference: {largest:.2g} at most, {mean:.2g} in the mean",
        f"changed predictions: {comparison['changed_predictions']} of {comparison['images']}",
    ]
    return "\n".join(lines)


def compress(configs: CompressConfigs) -> dict[str, Any]:
    """Runs `main`; where an artefact is rejected, the exit status is 1."""
    report = main(configs)
    if any(artefact["rejected"] for artefact in report["artefacts"]):
        sys.stdout.flush()
        raise SystemExit(1)
    return report


if __name__ == "__main__":
    run_script(compress, CompressConfigs)
