"""The artefacts that compress_weights.py writes, what they need, and the report on them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs import Configs
from finetune.core.devices import is_installed
from finetune.core.files import check_folder, write_json, write_text
from finetune.core.options import UserError
from finetune.core.texts import show_count
from finetune.core.values import get_input_size
from finetune.data.images import build_reader, fit_image
from finetune.evaluation.decision import Decision, find_decision_folder, read_decision
from finetune.evaluation.novelty import DIGEST, REFERENCE_FILE, Reference, find_reference
from finetune.exporting.parity import SIDES, Original, Subject, judge
from finetune.models import compressed
from finetune.models.description import hash_model, select_described
from finetune.models.exported import Calibration
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
    reference_path,
)
from finetune.models.model_files import build_with_features, load_fitting_model, load_model
from finetune.predicting.predicting import gives_features
from finetune.predicting.prediction_files import describe_decision
from finetune.training.run_folder import COMPRESSION_FILE
from finetune.training.trained_model import find_output_folder, name_model
from generator import get_generator

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


def load_original(model_path: str, configs: Configs, export_features: bool) -> Original:
    """Loads a model, its decision and its reference.

    Raises:
        UserError: a file is damaged, or features are to be exported of a model without them or without a reference.
    """
    if configs.classes is None:
        print(f"Model: {model_path}")
        model = load_model(model_path)
        return Original(model, model)
    print(name_model(configs, model_path))
    model = load_fitting_model(model_path, configs.classes, get_input_size(configs))
    folder = find_decision_folder(model_path, configs.save_model_path)
    decision = read_decision(folder, configs.classes, configs.multi_label_classification, model_path)
    if decision.multi_label:
        # Without fitted thresholds, 0.5 is used.
        print(describe_decision(decision, "exact_match"))
    exported = build_with_features(model) if export_features else model
    reference = find_reference(folder, model_path, decision.calls_unknown, gives_features(model))
    if export_features and reference is None:
        raise UserError(
            f"export_features: expected the {REFERENCE_FILE} of {model_path} in {folder}, with which features are "
            "compared. Received: none. Run test.py on the model with its training table, or leave out export_features."
        )
    if export_features and not decision.calls_unknown:
        print("The decision calls no photo unknown. test.py fits that on the validation set, by unknown_rate.")
    return Original(model, exported, decision, reference)


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


def write_metadata(
    model_path: str, configs: Configs, decision: Decision, has_exports: bool, reference: Reference | None = None
) -> None:
    """Writes the class names, and the options and the decision, so that the artefacts work without the run's folder.

    The digest of the reference says which features of training photos the decision's rule needs.
    """
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
    if reference is not None:
        content |= {"features": "of files with two outputs, float32, (batch, channels)", DIGEST: reference.digest()}
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
        "images": len(subject.results.probabilities) if subject else None,
        "tolerance": tolerance,
        "artefacts": [],
    }


def write_artefacts(
    report: dict[str, Any],
    kinds: Sequence[tuple[str, str]],
    original: Original,
    model_path: str,
    calibrate: Calibration,
    subject: Subject | None,
) -> None:
    """Writes each artefact and adds it to the report. If one fails, the report is printed so far.

    With features, the reference of training photos is written first.

    Args:
        model_path: the artefacts are written next to it and named after it.
        calibrate: reads images for the ranges of 8-bit activations.
        subject: the original on its test set; None compares nothing.
    """
    if original.has_features:
        original.reference.write_file(reference_path(model_path))
    try:
        for kind, precision in kinds:
            form = FORMATS.get(kind, WEIGHTS)
            model = original.model if form is WEIGHTS else original.exported
            path = name_candidate(model_path, form.endings[precision])
            print(f"Writing {kind} ({precision})", flush=True)
            with importing(f"--export {kind}", form.writer_packages):
                paths = form.runtime().write(model, path, precision, calibrate)
            artefact = {"kind": kind, "precision": precision, "features": model is not original.model}
            report["artefacts"].append(artefact | judge(paths, subject, report["tolerance"]))
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
        if "changed_answers" in comparison:
            print(f"  {_describe_changes(comparison)}")


def _describe_changes(comparison: dict[str, Any]) -> str:
    """Returns a line on the answers that change and on the wrong ones, for a model that does not answer every photo."""
    images, changed, unknown = (comparison[name] for name in ("images", "changed_answers", "unknown"))
    (wrong, answered), (wrong_before, answered_before) = (
        [comparison[name][side] for name in ("wrong", "answered")] for side in reversed(SIDES)
    )
    line = (
        f"Another answer (class, unsure or unknown): {changed} of {images} images, {changed / images:.1%}. Wrong: "
        f"{wrong} of {answered} answers, the original's {wrong_before} of {answered_before}."
    )
    if unknown["before"] and "largest_similarity_difference" not in comparison:
        line += f" It gives no features, and so calls none of {show_count(unknown['before'], 'unknown image')} so."
    return line


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
