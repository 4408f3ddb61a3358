"""Tells how well a trained model does on its training, validation and test images, where it is wrong, and why.

It prints the figures and writes them with pictures and a report into evaluation/ in the run's folder, and into
decision.json the thresholds and the temperature that predict.py uses.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from configs import Configs, UserError, run_script

if TYPE_CHECKING:
    import keras
    import pandas as pd

    from finetune.gradcam import GradCam
    from finetune.metrics import Decision
    from generator import AugmentedImageSequence
    from utils import ExportedModel

CSV_OPTIONS = {"training": "train_csv", "validation": "validation_csv", "test": "test_csv"}
GALLERIES = ("mistakes", "least_confident")
GALLERY_IMAGES = 12
PHOTO_SIDE = 320


def main(configs: Configs) -> dict:
    """Loads the model, predicts each set, evaluates, prints and writes; returns the content of metrics.json."""
    # Imported here, so that --help does not wait for TensorFlow.
    from finetune.callbacks import fingerprint
    from finetune.report import write_model_card
    from utils import find_trained_model, keep_freed_memory, load_predictor, predict, set_gpu_usage

    set_gpu_usage(configs.gpu_percentage)
    keep_freed_memory()
    model_path, configs = find_trained_model(configs)
    stored = read_run_configs(model_path)
    configs = take_validation_of_run(configs, stored)
    sequences = get_sequences(configs)
    model = load_predictor(model_path, configs.classes, configs.image_target_size[:2])
    print(f"Model: {model_path}")
    predictions = {name: predict(model, sequence) for name, sequence in sequences.items()}
    # After the images have been read: under skip_bad_images those that could not be have no part.
    truths = {name: sequence.get_y_true() for name, sequence in sequences.items()}
    threshold_range = configs.multilabel_threshold_range
    decision = get_decision(model_path, configs, truths, predictions)
    results = {
        "model": model_path,
        "classes": configs.classes,
        "multi_label": configs.multi_label_classification,
        "decision": decision.to_dict(),
        "sets": evaluate_sets(truths, predictions, decision, threshold_range, configs.random_seed or 0),
    }
    for name, sequence in sequences.items():
        results["sets"][name] |= {"csv": getattr(configs, CSV_OPTIONS[name]), "sha256": fingerprint(sequence)}
    print_results(results)
    options = configs.to_dict() | stored | {name: getattr(configs, name) for name in configs.given}
    folder = os.path.join(configs.save_model_path, name_evaluation(model_path))
    write_evaluation(folder, configs, model, sequences["test"], predictions["test"], decision, results, options)
    write_model_card(configs.save_model_path)
    return results


def read_run_configs(model_path: str) -> dict[str, Any]:
    """Returns the options of a model's run, from the `configs.json` beside it; empty where there is none."""
    path = os.path.join(os.path.dirname(model_path), "configs.json")
    return Configs.read_json(path) if os.path.isfile(path) else {}


def take_validation_of_run(configs: Configs, stored: dict[str, Any]) -> Configs:
    """Takes the validation set that the run was trained with, where none is given: thresholds are fitted on it."""
    path = stored.get("validation_csv", "")
    if configs.validation_csv or not os.path.isfile(path):
        return configs
    print(f"validation_csv is that of the run: {path}")
    return configs.replace(validation_csv=path)


def get_sequences(configs: Configs) -> dict[str, AugmentedImageSequence]:
    """Builds the generator of each set that has a CSV file, by the set's name."""
    from utils import get_generator

    csv_paths = {name: getattr(configs, option) for name, option in CSV_OPTIONS.items()}
    return {
        name: get_generator(path, configs.classes, configs, training=False) for name, path in csv_paths.items() if path
    }


def get_decision(
    model_path: str, configs: Configs, truths: dict[str, np.ndarray], predictions: dict[str, np.ndarray]
) -> Decision:
    """Fits temperature and thresholds and writes them into `decision.json`.

    An exported model keeps those that it ships with, and so gives the labels of the model that it was made of.
    """
    from finetune.metrics import fit_decision, read_decision, write_decision
    from utils import is_exported

    class_names, multi_label = configs.classes, configs.multi_label_classification
    folder = os.path.dirname(os.path.abspath(model_path))
    if is_exported(model_path):
        return read_decision(folder, class_names, multi_label, model_path)
    threshold_range = configs.multilabel_threshold_range
    decision = fit_decision(truths, predictions, class_names, multi_label, threshold_range, model_path)
    write_decision(folder, decision)
    return decision


def name_evaluation(model_path: str) -> str:
    """Returns the name of the folder for a model's evaluation: an exported one leaves that of the run as it is."""
    from utils import is_exported

    return f"evaluation_{os.path.basename(model_path)}" if is_exported(model_path) else "evaluation"


def evaluate_sets(
    truths: dict[str, np.ndarray],
    predictions: dict[str, np.ndarray],
    decision: Decision,
    threshold_range: Sequence[float],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Evaluates each set, the test set with intervals and, multi-label, beside the optimum by its own labels.

    Args:
        truths: labels by set, `(images,)` or multi-label `(images, classes)`.
        predictions: the model's raw probabilities by set, `(images, classes)`.
        decision: fitted without the test set.
        threshold_range: lowest and highest threshold of that optimum.
        seed: of the bootstrap.
    """
    from finetune.metrics import evaluate_set

    extras = {"test": {"bootstrap": True, "seed": seed, "threshold_range": threshold_range}}
    return {name: evaluate_set(truths[name], predictions[name], decision, **extras.get(name, {})) for name in truths}


def print_results(results: dict[str, Any]) -> None:
    """Prints what was fitted, and the figures of each set."""
    from finetune.metrics import format_evaluation

    decision = results["decision"]
    if decision["temperature_fitted_on"]:
        print(f"Temperature {decision['temperature']:.3f}, fitted on the {decision['temperature_fitted_on']} set.")
    else:
        print("No temperature is fitted on a validation set: probabilities stay as they are.")
    fitted_on, threshold = decision["thresholds_fitted_on"], decision["exact_match_threshold"]
    if results["multi_label"] and fitted_on in results["sets"]:
        accuracy = results["sets"][fitted_on]["exact_match_accuracy"]
        print(f"Threshold {threshold:.2f} gives the best exact-match accuracy on the {fitted_on} set, {accuracy:.4f}.")
    elif results["multi_label"]:
        print(f"Threshold {threshold:.2f}, fitted on {f'the {fitted_on} set' if fitted_on else 'no set'}.")
    for name, figures in results["sets"].items():
        print(f"\n{name} set: {figures['images']} images of {figures['csv']}\n{format_evaluation(figures)}")


def write_evaluation(
    folder: str,
    configs: Configs,
    model: keras.Model | ExportedModel,
    sequence: AugmentedImageSequence,
    predictions: np.ndarray,
    decision: Decision,
    results: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Writes metrics.json, predictions.csv, the figures and report.html of the test set.

    Args:
        folder: where to write.
        configs: where the training log is, and how to draw heatmaps.
        model: explained.
        sequence: the test images.
        predictions: its raw probabilities of them, `(images, classes)`.
        decision: calibrates and chooses.
        results: the content of metrics.json.
        options: of the run, which the report lists.
    """
    from finetune.gradcam import overlay_heatmap
    from finetune.metrics import get_curves
    from finetune.report import save_figures, write_report
    from utils import write_csv, write_json

    paths = sequence.paths[np.setdiff1d(np.arange(len(sequence.paths)), list(sequence.bad_images))]
    probabilities, y_true = decision.calibrate(predictions), sequence.get_y_true()
    write_json(os.path.join(folder, "metrics.json"), results)
    write_csv(os.path.join(folder, "predictions.csv"), list_predictions(paths, y_true, probabilities, decision))
    curves = get_curves(y_true, probabilities, decision.class_names)
    save_figures(folder, results, curves)
    overlay = functools.partial(overlay_heatmap, opacity=configs.cam_alpha, colormap=configs.cam_colormap)
    grad_cam, image_size = build_grad_cam(model, configs.cam_method), configs.image_target_size[:2]
    explain = functools.partial(draw_pictures, grad_cam, image_size, configs.max_image_pixels, overlay)
    gallery = build_gallery(explain, paths, y_true, probabilities, decision)
    path = os.path.join(folder, "report.html")
    write_report(path, results, curves, gallery, read_training_log(configs.save_model_path), options)
    print(f"\nThe report is {path}")


def list_predictions(
    paths: Sequence[str], y_true: np.ndarray, probabilities: np.ndarray, decision: Decision
) -> pd.DataFrame:
    """Returns a row per image: path, true and predicted labels, and the probability of each class."""
    import pandas as pd

    from utils import LABEL_SEPARATOR

    labels = {"true": y_true, "predicted": decision.choose(probabilities)}
    names = {column: name_labels(values, decision.class_names) for column, values in labels.items()}
    table = pd.DataFrame({"path": paths} | {key: [*map(LABEL_SEPARATOR.join, rows)] for key, rows in names.items()})
    columns = {f"probability_{name}": probabilities[:, row] for row, name in enumerate(decision.class_names)}
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def name_labels(labels: np.ndarray, class_names: Sequence[str]) -> list[list[str]]:
    """Returns the class names of labels, positions `(images,)` or zeros and ones `(images, classes)`."""
    if labels.ndim == 1:
        return [[class_names[position]] for position in labels]
    return [[class_names[position] for position in row.nonzero()[0]] for row in labels]


def build_gallery(
    draw: Callable[[Sequence[str]], list[tuple[np.ndarray, np.ndarray | None]]],
    paths: Sequence[str],
    y_true: np.ndarray,
    probabilities: np.ndarray,
    decision: Decision,
) -> dict[str, list[dict[str, Any]]]:
    """Collects the worst mistakes and the least confident images, as `report.write_report` takes them.

    Args:
        draw: from paths to each one's photo and the same with its heatmap.
        paths: of the images.
        y_true: their labels, `(images,)` or multi-label `(images, classes)`.
        probabilities: calibrated, `(images, classes)`.
        decision: chooses the predicted labels.
    """
    from finetune.report import choose_gallery, get_losses

    chosen = decision.choose(probabilities)
    rows = dict(zip(GALLERIES, choose_gallery(y_true, probabilities, chosen, GALLERY_IMAGES), strict=True))
    shown = np.unique(np.concatenate(list(rows.values())))
    photos = dict(zip(shown.tolist(), draw([paths[row] for row in shown]), strict=True))
    columns = {
        "path": list(paths),
        "true": name_labels(y_true, decision.class_names),
        "predicted": name_labels(chosen, decision.class_names),
        # The probability of the answer; where there are several, of the least certain one.
        "probability": (
            np.where(chosen, probabilities, 1 - probabilities).min(axis=1)
            if decision.multi_label
            else probabilities.max(axis=1)
        ).tolist(),
        "loss": get_losses(y_true, probabilities).tolist(),
    }
    return {
        name: [
            {column: values[row] for column, values in columns.items()}
            | dict(zip(("photo", "heatmap"), photos[row], strict=True))
            for row in gallery.tolist()
        ]
        for name, gallery in rows.items()
    }


def build_grad_cam(model: keras.Model | ExportedModel, cam_method: str) -> GradCam | None:
    """Builds what explains a model; None, and a line, where it has not the parts for that."""
    from finetune.gradcam import GradCam
    from utils import ExportedModel

    if isinstance(model, ExportedModel):
        print("The report's photos have no heatmaps: Grad-CAM needs the Keras model that this one was made of.")
        return None
    try:
        return GradCam(model, cam_method)
    except UserError as error:
        print(f"The report's photos have no heatmaps: {error}")
        return None


def draw_pictures(
    grad_cam: GradCam | None,
    image_size: Sequence[int],
    max_pixels: int,
    overlay: Callable[[np.ndarray, np.ndarray], np.ndarray],
    paths: Sequence[str],
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Reads photos and lays over each the heatmap of its most probable class.

    Args:
        grad_cam: explains, or None.
        image_size: `(height, width)` of the model's input.
        max_pixels: what a photo may have.
        overlay: colours a photo by a heatmap.
        paths: of the photos.

    Returns:
        Of each photo uint8 RGB `(height, width, 3)`, its longer side at most `PHOTO_SIDE`, and the same under its
        heatmap, or None.
    """
    from generator import read_image, resize_image

    pictures = []
    for path in paths:
        image = read_image(path, max_pixels=max_pixels)
        scale = min(1, PHOTO_SIDE / max(image.shape[:2]))
        photo = resize_image(image, [max(1, round(side * scale)) for side in image.shape[:2]])
        heatmap = None
        if grad_cam is not None:
            heatmaps, _ = grad_cam(resize_image(read_image(path, image_size, max_pixels), image_size)[None])
            heatmap = overlay(photo, heatmaps[0])
        pictures.append((photo, heatmap))
    return pictures


def read_training_log(folder: str) -> pd.DataFrame | None:
    """Returns the run's training log; None where there is none."""
    from finetune.report import read_log

    path = os.path.join(folder, "training_log.csv")
    try:
        return read_log(path) if os.path.isfile(path) else None
    except UserError as error:
        print(f"The report has no training curves: {error}")
        return None


if __name__ == "__main__":
    run_script(main)
