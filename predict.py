"""Predicts unlabelled images - a photo, a folder, a pattern or a CSV file of paths - and writes a CSV file."""

from __future__ import annotations

import dataclasses
import re

from configs import Configs
from finetune.core.options import define
from finetune.core.scripts import run_script, script
from finetune.core.values import get_input_size

MOST_COPIES = 100


def views_fault(value: str) -> str:
    """Returns what is wrong with a value of `test_time_augmentation`; empty if nothing is."""
    if value in ("none", "flip") or (re.fullmatch(r"[0-9]{1,9}", value) and 1 <= int(value) <= MOST_COPIES):
        return ""
    return f"expected none, flip, or a whole number of augmented copies from 1 to {MOST_COPIES}. Received: {value!r}"


@dataclasses.dataclass
class PredictConfigs(Configs):
    """The options of this script, in addition to those of every script."""

    input: str = define("", "An image, its URL, a folder, a quoted pattern ('photos/**/*.jpg') or a CSV file of paths")
    write_path: str = define("./predictions.csv", "CSV file to write")
    top_k: int = define(
        0, "Also write this many of the most probable classes of each image, in order; 0 writes none", at_least=0
    )
    test_time_augmentation: str = define(
        "none",
        "Average over each image and its mirror image (flip) or n augmented copies; none answers as the run does",
        check=views_fault,
    )
    sort_into: str = define(
        "", "New folder into which the photos are copied, into a folder per answer; empty sorts nothing"
    )
    sort_links: bool = define(False, "Link the photos in sort_into instead of copying them")
    threshold_type: str = define(
        "exact_match",
        "Multi-label thresholds from test.py: one for all classes (exact_match), or one per class (best_f1)",
        choices=("exact_match", "best_f1"),
    )


@script
def main(configs: PredictConfigs) -> dict:
    """Lists the images, loads the model, predicts and writes the table.

    Returns:
        `predictions`, the table as written, and `failed`, how many of its images could not be read.
    """
    # Imported here, so that --help does not wait for pandas, and a user's mistake not for TensorFlow.
    from finetune.core.files import write_csv
    from finetune.predicting import answers, prediction_files
    from finetune.training.trained_model import find_trained_model, name_model

    is_given = "image_directory" in configs.given
    model_path, configs = find_trained_model(configs, ("image_directory",))
    # Printed after the first line, which names the device and so needs TensorFlow.
    notes: list[str] = []
    names, paths = prediction_files.list_inputs(configs.input, configs.image_directory, notes.append)
    paths = paths if is_given else prediction_files.prefer_existing(paths, names, notes.append)
    prediction_files.check_write_path(configs.write_path, configs.input)
    answers.check_sort_into(configs.sort_into, configs.input)

    from finetune.core.devices import start_devices
    from finetune.evaluation.decision import find_decision_folder, read_decision
    from finetune.evaluation.novelty import find_reference
    from finetune.predicting.kept_answers import KeptAnswers, list_facts
    from finetune.predicting.predicting import build_views, gives_features, load_predictor, predict_missing

    start_devices(configs.gpu_percentage)
    prediction_files.check_top_k(configs.top_k, configs.classes)
    model = load_predictor(model_path, configs.classes, get_input_size(configs))
    folder = find_decision_folder(model_path, configs.save_model_path)
    decision = read_decision(folder, configs.classes, configs.multi_label_classification, model_path)
    print(*notes, name_model(configs, model_path), sep="\n")
    print(prediction_files.describe_decision(decision, configs.threshold_type))
    answers.check_rule(decision, configs, configs.test_time_augmentation)
    reference = find_reference(folder, model_path, decision.calls_unknown, gives_features(model))
    facts = list_facts(configs, model_path) | {"reference": reference.digest() if reference else ""}
    with KeptAnswers(configs.write_path, paths, configs.batch_size, len(configs.classes), facts) as kept:
        views = build_views(configs.test_time_augmentation, configs.random_seed or 0)
        predict_missing(model, kept, views, configs, reference)
        errors = prediction_files.explain_errors(kept.errors, paths)
        calibrated, kind = decision.calibrate(kept.probabilities), configs.threshold_type
        table = prediction_files.make_table(names, kept.probabilities, errors, decision, kind, configs.top_k)
        found = answers.name_answers(decision, calibrated, kept.similarities, errors, kind)
        table = answers.insert_answers(table, found)
        write_csv(configs.write_path, table)
    prediction_files.summarize(configs.write_path, len(paths), errors)
    answers.summarize_answers(found, decision)
    answers.sort_photos(configs.sort_into, paths, found.names, configs.sort_links)
    return {"predictions": table, "failed": len(errors)}


if __name__ == "__main__":
    run_script(main)
