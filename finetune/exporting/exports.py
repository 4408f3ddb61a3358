"""The artefacts that compress_weights.py writes, what they need, and how they compare with the original."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from configs import Configs
from finetune.core.devices import is_installed
from finetune.core.files import atomic_path, check_folder, list_files, write_json, write_text
from finetune.core.options import UserError
from finetune.core.values import get_input_size
from finetune.data.groups import count_groups
from finetune.data.images import build_reader, fit_image
from finetune.evaluation.decision import Decision, find_decision_folder, read_decision
from finetune.evaluation.metrics import check_finite, to_indicators
from finetune.models import compressed
from finetune.models.description import hash_model, select_described
from finetune.models.exported import Calibration, ExportedModel
from finetune.models.formats import (
    FORMATS,
    WEIGHTS_DTYPES,
    WEIGHTS_ENDING,
    Format,
    importing,
    labels_path,
    metadata_path,
    name_accepted,
    name_candidate,
)
from finetune.models.model_files import load_fitting_model, load_model
from finetune.predicting.predicting import compile_predictor, load_predictor, predict
from finetune.predicting.prediction_files import describe_decision
from finetune.training.run_folder import COMPRESSION_FILE
from finetune.training.speeds import time_in_turns
from finetune.training.trained_model import find_output_folder, name_model
from generator import AugmentedImageSequence, get_generator

SIDES = ("before", "after")
# Longest comparison of two speeds, in seconds.
TIMING_LIMIT = 20.0


class Subject(NamedTuple):
    """The original on its test set, for comparison with each artefact.

    Attributes:
        model: the original.
        sequence: the test images.
        probabilities: the original's, raw, `(images, classes)`.
        decision: turns them into answers.
    """

    model: keras.Model
    sequence: AugmentedImageSequence
    probabilities: np.ndarray
    decision: Decision


def load_subject(model_path: str, configs: Configs) -> tuple[keras.Model, Decision | None, Subject | None]:
    """Loads the model, reads its decision and predicts the test set if there is one.

    It is called before anything is written, so that an unreadable image stops the script first.
    """
    if configs.classes is None:
        print(f"Model: {model_path}")
        return load_model(model_path), None, None
    print(name_model(configs, model_path))
    model = load_fitting_model(model_path, configs.classes, get_input_size(configs))
    folder = find_decision_folder(model_path, configs.save_model_path)
    decision = read_decision(folder, configs.classes, configs.multi_label_classification, model_path)
    if decision.multi_label:
        # Without fitted thresholds, 0.5 is used.
        print(describe_decision(decision, "exact_match"))
    if not configs.test_csv:
        return model, decision, None
    sequence = get_generator(configs.test_csv, configs.classes, configs, training=False)
    return model, decision, Subject(model, sequence, predict(model, sequence), decision)


def judge(paths: Sequence[str], subject: Subject | None, tolerance: float) -> dict[str, Any]:
    """Compares an artefact with the original, and gives it its final name unless it loses too much accuracy.

    Returns:
        `path`, `files`, `rejected` and `comparison` of the report.
    """
    comparison = compare_artefact(paths[0], subject) if subject else None
    rejected = comparison is not None and comparison["accuracy_drop"] > tolerance
    if not rejected:
        paths = accept(paths)
    files = {file: os.path.getsize(file) for path in paths for file in list_files(path)}
    return {"path": paths[0], "files": files, "rejected": rejected, "comparison": comparison}


def accept(paths: Sequence[str]) -> tuple[str, ...]:
    """Gives files and folders their final names, without `.rejected`, and returns these."""
    accepted = tuple(map(name_accepted, paths))
    for path, name in zip(paths, accepted, strict=True):
        with atomic_path(name) as temporary:
            os.replace(path, temporary)
    return accepted


def compare_artefact(path: str, subject: Subject) -> dict[str, Any]:
    """Loads an artefact in its own runtime and runs it on the test set.

    Returns:
        The result of `compare`, with `images_per_second` of both.
    """
    model, sequence, before, decision = subject
    artefact = load_predictor(path, decision.class_names, sequence.image_size)
    after = predict(artefact, sequence, f"Verifying {os.path.basename(path)}")
    comparison = compare(sequence.get_y_true(), before, after, decision, sequence.get_read_groups())
    speeds = measure_speeds((model, artefact), sequence)
    return comparison | {"images_per_second": dict(zip(SIDES, speeds, strict=True))}


def compare(
    y_true: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    decision: Decision,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compares the answers of a model and of its compressed form.

    Args:
        before: the original's raw probabilities, `(images, classes)`.
        after: those of the compressed model.

    Returns:
        `images`, and `groups` if there are fewer; `largest_difference` and `mean_difference` of the probabilities;
        `changed_predictions`, images with another answer; `measure`, the name of the metric; `accuracy`, before and
        after: the share of images with the right label, multi-label: with exactly the right labels; `accuracy_drop` in
        points, negative for a gain, and its 95 % confidence interval `accuracy_drop_interval`.

    Raises:
        UserError: a probability is not finite.
    """
    for probabilities in (before, after):
        check_finite(probabilities)
    differences = np.abs(before.astype(np.float64) - after)
    chosen = [decision.choose(decision.calibrate(probabilities)) for probabilities in (before, after)]
    truth = to_indicators(y_true, before.shape[1])
    is_right = [(labels == truth).all(axis=1) for labels in chosen]
    right = [int(images.sum()) for images in is_right]
    return {
        "images": len(y_true),
        **({} if groups is None else {"groups": count_groups(groups, len(groups))}),
        "largest_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        "changed_predictions": int((chosen[0] != chosen[1]).any(axis=1).sum()),
        "measure": "exact match" if decision.multi_label else "accuracy",
        "accuracy": dict(zip(SIDES, [count / len(y_true) for count in right], strict=True)),
        # From counts: a difference of two shares is rounded, and 1 point could become more than 1.
        "accuracy_drop": 100 * (right[0] - right[1]) / len(y_true),
        "accuracy_drop_interval": find_drop_interval(*is_right, groups),
    }


def find_drop_interval(before: np.ndarray, after: np.ndarray, groups: np.ndarray | None = None) -> list[float]:
    """Returns the 95 % confidence interval of the drop in accuracy on the same images, `[low, high]` in points.

    Half an image is added to each of the four outcomes of a pair, so that a few images without a difference do not seem
    to prove that there is none. With groups, the number of groups counts instead of the number of images.

    Source: Agresti and Min, Statistics in Medicine 24, 2005, section 3.

    Args:
        before: bool `(images,)`, whether the original is right.
        after: bool `(images,)`, whether the artefact is right.
    """
    units = count_groups(groups, len(before))
    lost, won = (one.sum() * units / len(before) + 0.5 for one in (before & ~after, after & ~before))
    number = units + 2
    difference = (lost - won) / number
    margin = 1.96 * np.sqrt(lost + won - (lost - won) ** 2 / number) / number
    return [float(100 * (difference - margin)), float(100 * (difference + margin))]


def measure_speeds(models: Sequence[keras.Model | ExportedModel], sequence: AugmentedImageSequence) -> list[float]:
    """Returns how many images of the first batch each model predicts per second, in the best of several runs."""
    images, predictors = sequence[0][0], [compile_predictor(model) for model in models]
    steps = [lambda predictor=predictor: np.asarray(predictor(images)) for predictor in predictors]
    for step in steps:
        # The first run compiles.
        step()
    return (len(images) / time_in_turns(steps, TIMING_LIMIT).min(axis=0)).tolist()


CALIBRATION_IMAGES = 200
# Always written. Keras reads them.
WEIGHTS = Format(
    title="compressed weights",
    endings=dict.fromkeys(WEIGHTS_DTYPES, WEIGHTS_ENDING),
    runtime=lambda: compressed,
    loading=(
        "Keras and this project on the path",
        'from utils import custom_load_model\n\nmodel = custom_load_model(".", {stem})\n'
        "probabilities = model.predict(image[None])",
    ),
)


def list_kinds(weights_dtype: str, exports: Sequence[str], quantization: str) -> list[tuple[str, str]]:
    """Returns the kind of each artefact to write, weights or a name in `FORMATS`, and its precision."""
    return [("weights", weights_dtype)] + [
        (name, quantization if quantization in FORMATS[name].endings else "float32") for name in dict.fromkeys(exports)
    ]


def require_packages(exports: Sequence[str]) -> None:
    """Raises UserError if an export needs a package that is not installed; called before any work."""
    for name in exports:
        packages = {**FORMATS[name].writer_packages, **FORMATS[name].reader_packages}
        with importing(f"--export {name}", packages):
            for package in packages:
                if not is_installed(package):
                    raise ImportError(f"No module named {package!r}")


def read_calibration_images(configs: Configs) -> list[np.ndarray]:
    """Reads up to `CALIBRATION_IMAGES` random training images, uint8 RGB `(height, width, 3)`.

    Raises:
        UserError: the training table is unknown or does not exist, or an image cannot be read.
    """
    purpose = "train_csv: --export_quantization int8 takes its ranges from training images"
    if "train_csv" not in configs.given:
        raise UserError(f"{purpose}, and no configs.json names those of this model. Give --train_csv.")
    if not os.path.isfile(configs.train_csv):
        received = f"Received: {configs.train_csv!r}, and there is none."
        raise UserError(f"{purpose}. Expected a CSV file. {received} Give --train_csv.")
    paths = get_generator(configs.train_csv, configs.classes, configs, training=False).paths
    rng = np.random.default_rng(configs.random_seed or 0)
    chosen = rng.permutation(len(paths))[:CALIBRATION_IMAGES]
    size, read = get_input_size(configs), build_reader(configs)
    print(f"int8: ranges from {len(chosen)} images of {configs.train_csv}")
    return [fit_image(read(paths[row], size), size, configs.resize_mode) for row in chosen]


def write_metadata(model_path: str, configs: Configs, decision: Decision, has_exports: bool) -> None:
    """Writes the class names, and the options and the decision, so that the artefacts work without the run's folder."""
    if has_exports and not (decision.temperature_fitted_on or decision.thresholds_fitted_on):
        print("The exports have no temperature and no thresholds. test.py fits them on the validation set.")
    # If no file describes the model, only the given options are known.
    known = {name: value for name, value in configs.to_dict().items() if name in configs.given or name == "classes"}
    content = {
        "model": os.path.basename(model_path),
        "input": "RGB, float32, (batch, height, width, 3), pixels from 0 to 255; the preprocessing is inside; "
        "resize_mode in the options says how a photo is resized",
        "output": "raw probabilities, float32, (batch, classes)",
        "options": select_described(known),
        "decision": decision.to_dict(),
    }
    write_json(metadata_path(model_path), content)
    lines = [" ".join(name.splitlines()) + "\n" for name in configs.classes]
    write_text(labels_path(model_path), "".join(lines))


def choose_target(configs: Configs, model_path: str) -> str:
    """Returns the model's path in the output folder, after which the artefacts are named.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = check_folder(find_output_folder(configs, model_path), "save_model_path")
    return os.path.join(folder, os.path.basename(model_path))


def start_report(model_path: str, test_csv: str, tolerance: float, subject: Subject | None) -> dict[str, Any]:
    """Returns the report without artefacts; see `compress_weights.main`."""
    return {
        "model": model_path,
        "model_bytes": os.path.getsize(model_path),
        "model_sha256": hash_model(model_path).hex(),
        "test_csv": test_csv or None,
        "images": len(subject.probabilities) if subject else None,
        "tolerance": tolerance,
        "artefacts": [],
    }


def write_artefacts(
    report: dict[str, Any],
    kinds: Sequence[tuple[str, str]],
    model: keras.Model,
    model_path: str,
    calibrate: Calibration,
    subject: Subject | None,
) -> None:
    """Writes each artefact and adds it to the report. If one fails, the report is printed so far.

    Args:
        model_path: the artefacts are written next to it and named after it.
        calibrate: reads images for the ranges of 8-bit activations.
        subject: the original on its test set; None compares nothing.
    """
    try:
        for kind, precision in kinds:
            form = FORMATS.get(kind, WEIGHTS)
            path = name_candidate(model_path, form.endings[precision])
            print(f"Writing {kind} ({precision})", flush=True)
            with importing(f"--export {kind}", form.writer_packages):
                paths = form.runtime().write(model, path, precision, calibrate)
            artefact = {"kind": kind, "precision": precision} | judge(paths, subject, report["tolerance"])
            report["artefacts"].append(artefact)
    except UserError:
        if report["artefacts"]:
            print_report(report)
        raise


def find_earlier(folder: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the accepted artefacts of an earlier report that come from the same model and still exist."""
    try:
        with open(os.path.join(folder, COMPRESSION_FILE), encoding="utf-8") as file:
            earlier = json.load(file)
        now = {name_accepted(artefact["path"]) for artefact in report["artefacts"]}
        is_same = all(earlier[name] == report[name] for name in ("model_sha256", "test_csv"))
        return [
            artefact
            for artefact in (earlier["artefacts"] if is_same else ())
            if not artefact["rejected"]
            and artefact["path"] not in now
            and all(os.path.isfile(path) and os.path.getsize(path) == size for path, size in artefact["files"].items())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # There is no report, or it is invalid.
        return []


def print_report(report: dict[str, Any]) -> None:
    """Prints the table and the verdict on each artefact."""
    print(f"\n{format_table(report)}\n")
    for artefact in report["artefacts"]:
        comparison = artefact["comparison"]
        if comparison is None:
            print(f"Written, not compared: {artefact['path']}")
            continue
        verdict, change = "Rejected" if artefact["rejected"] else "Accepted", -comparison["accuracy_drop"] or 0.0
        least, most = (-bound for bound in reversed(comparison["accuracy_drop_interval"]))
        limit = f"--tolerance allows a drop of {report['tolerance']:g}."
        if not artefact["rejected"] and -least > report["tolerance"]:
            limit += f" The {comparison['images']} test images do not rule out a larger one."
        print(
            f"{verdict}: {artefact['path']}: {comparison['measure']} changes by {change:+.2f} points (95 % interval "
            f"{least:+.2f} to {most:+.2f}), {limit}"
        )


def format_table(report: dict[str, Any]) -> str:
    """Formats a table with a row for the original and one for each artefact.

    The original's speed differs between rows, because it is measured again with each artefact.
    """
    compared = [artefact["comparison"] for artefact in report["artefacts"] if artefact["comparison"]]
    measure = compared[0]["measure"] if compared else "accuracy"
    rows = [("", "size, MB", measure, "images/s", "original's", "largest diff.", "mean diff.", "changed")]
    accuracy = f"{compared[0]['accuracy']['before']:.4f}" if compared else ""
    rows.append(("original", f"{report['model_bytes'] / 1e6:.2f}", accuracy, *[""] * 5))
    for artefact in report["artefacts"]:
        cells = [f"{artefact['kind']} {artefact['precision']}", f"{sum(artefact['files'].values()) / 1e6:.2f}"]
        if found := artefact["comparison"]:
            before, after = found["images_per_second"].values()
            cells += [f"{found['accuracy']['after']:.4f}", f"{after:.1f}", f"{before:.1f}"]
            cells += [f"{found['largest_difference']:.2g}", f"{found['mean_difference']:.2g}"]
            cells += [f"{found['changed_predictions']} of {found['images']}"]
        rows.append((*cells, *[""] * (8 - len(cells))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Without a test set the other columns are empty.
    shown = 8 if compared else 2
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:shown], widths[1:shown])]).rstrip() for row in rows
    )
