"""Prints how well a trained model does on the training and on the test images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs import Configs, run_script

if TYPE_CHECKING:
    import numpy as np


def main(configs: Configs) -> dict:
    """Loads the model, predicts each set and prints its metrics; returns them by set."""
    # Imported here, so that --help does not wait for TensorFlow.
    from metrics import format_evaluation, get_evaluation_metrics
    from utils import find_trained_model, get_generator, keep_freed_memory, load_fitting_model, predict, set_gpu_usage

    set_gpu_usage(configs.gpu_percentage)
    keep_freed_memory()
    model_path, configs = find_trained_model(configs)
    class_names = configs.classes
    csv_paths = {"training": configs.train_csv, "validation": configs.validation_csv, "test": configs.test_csv}
    sequences = {
        name: get_generator(path, class_names, configs, training=False) for name, path in csv_paths.items() if path
    }
    model = load_fitting_model(model_path, class_names, configs.image_target_size[:2])
    print(f"Model: {model_path}")
    predictions = {name: predict(model, sequence) for name, sequence in sequences.items()}
    truths = {name: sequence.get_y_true() for name, sequence in sequences.items()}
    if configs.multi_label_classification:
        results = evaluate_multilabel(truths, predictions, class_names, configs.multilabel_threshold_range)
    else:
        results = {name: get_evaluation_metrics(truths[name], predictions[name], class_names) for name in truths}
    for name, metrics in results.items():
        print(f"\n{name} set: {len(truths[name])} images of {csv_paths[name]}\n{format_evaluation(metrics)}")
    return results


def evaluate_multilabel(
    truths: dict[str, np.ndarray],
    predictions: dict[str, np.ndarray],
    class_names: list[str],
    threshold_range: list[float],
) -> dict[str, dict]:
    """Evaluates each set at one threshold, which the test set has no part in choosing.

    Args:
        truths: `(images, classes)` of zeros and ones by set; holds `training`, and may hold `validation`.
        predictions: probabilities of the same shapes.
        class_names: in the order of the columns.
        threshold_range: lowest and highest threshold to try.
    """
    from metrics import find_exact_match_threshold, get_multilabel_evaluation_metrics

    fitted_on = "validation" if "validation" in truths else "training"
    threshold, accuracy = find_exact_match_threshold(truths[fitted_on], predictions[fitted_on], threshold_range)
    print(f"Threshold {threshold:.2f} gives the best exact-match accuracy on the {fitted_on} set, {accuracy:.4f}.")
    return {
        name: get_multilabel_evaluation_metrics(truths[name], predictions[name], class_names, threshold)
        for name in truths
    }


if __name__ == "__main__":
    run_script(main)
