"""Evaluates a trained model on its training, validation and test images.

It prints the metrics, and writes them with plots and a report to evaluation/ in the run's folder. The temperature and
the thresholds go to decision.json, for predict.py.
"""

from __future__ import annotations

from typing import Any

from configs import Configs
from finetune.core.scripts import run_script, script
from finetune.core.values import get_input_size


@script
def main(configs: Configs) -> dict[str, Any]:
    """Loads the model, predicts and evaluates each set, and writes the results; returns those of metrics.json."""
    # Imported here, so that --help does not wait for TensorFlow.
    from finetune.core.devices import start_devices
    from finetune.evaluation import rule
    from finetune.evaluation.decision import get_decision, store_decision
    from finetune.evaluation.evaluation import check_report_by, evaluate_leak, evaluate_sets
    from finetune.predicting.predicting import load_predictor, predict_sets
    from finetune.reporting.model_card import write_model_card
    from finetune.reporting.report import build_explainer, build_finder, write_evaluation
    from finetune.training import run_folder, trained_model
    from generator import get_generator

    start_devices(configs.gpu_percentage)
    model_path, configs = trained_model.find_trained_model(configs)
    folder = run_folder.choose_evaluation_folder(configs.save_model_path, model_path)
    rule.check_wishes(configs, model_path)
    tables = trained_model.list_tables(configs, model_path)
    sequences = {name: get_generator(path, configs.classes, way, False) for name, (path, way) in tables.items()}
    check_report_by(sequences["test"].table, configs.report_by, configs.test_csv)
    known = trained_model.check_test_images(
        model_path, configs.test_csv, sequences["test"].paths, configs.allow_duplicates
    )
    model = load_predictor(model_path, configs.classes, get_input_size(configs))
    print(trained_model.name_model(configs, model_path))
    predicted = predict_sets(model, sequences)
    threshold_range, multi_label = configs.multilabel_threshold_range, configs.multi_label_classification
    predictions, truths = predicted.predictions, predicted.truths
    decision = get_decision(model_path, truths, predictions, configs.classes, multi_label, threshold_range)
    reference = rule.build_reference(predicted, model_path, decision, configs)
    evidence, neighbours = rule.list_evidence(predicted, decision, reference)
    decision = rule.add_abstention(decision, evidence, configs, model_path)
    sets = evaluate_sets(sequences, predictions, decision, threshold_range, configs.random_seed or 0, configs.report_by)
    for name, sequence in sequences.items():
        sets[name] |= {"csv": tables[name][0], "sha256": run_folder.fingerprint(sequence)}
    sets["test"] |= evaluate_leak(sequences, predictions, decision, configs) | rule.evaluate_rule(decision, evidence)
    sets["test"] |= {"selected_the_model": trained_model.has_selected(model_path, configs.test_csv)}
    sets["test"] |= {"images_trained_on": known} if known else {}
    results = {"model": model_path, "classes": configs.classes, "multi_label": multi_label, "sets": sets}
    results |= {"decision": trained_model.keep_decision(model_path, decision.to_dict(), configs.save_model_path)}
    answers = rule.collect_answers(sequences["test"], evidence["test"], decision)
    explain, options = build_explainer(model, configs), trained_model.list_options(configs, model_path)
    nearest, (_, reading) = rule.list_nearest(predicted, neighbours, reference), tables.get("training", tables["test"])
    write_evaluation(folder, answers, results, explain, options, build_finder(nearest, reading))
    store_decision(configs.save_model_path, decision, model_path)
    rule.print_rule(decision, sets["test"])
    rule.store_reference(configs.save_model_path, reference, model_path)
    write_model_card(configs.save_model_path)
    return results


if __name__ == "__main__":
    run_script(main)
