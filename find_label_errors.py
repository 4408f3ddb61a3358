"""Finds labels that are probably wrong, by a regression on a frozen backbone's features or by a run's trained model.

It writes label_errors.csv, and label_errors.html to review the photos and to save your findings as corrections.csv.
With apply it writes a corrected copy of the table.
"""

from __future__ import annotations

import dataclasses
import os

from configs import Configs
from finetune.core.options import define
from finetune.core.scripts import run_script, script

MOST_SUSPECTS = 2000


@dataclasses.dataclass
class LabelErrorConfigs(Configs):
    """The options of this script, in addition to those of every script."""

    csv_path: str = define("./data/all_data.csv", "CSV file whose labels are checked")
    write_path: str = define(
        "./label_errors.csv",
        "CSV file of suspected label errors, or with apply of corrected labels, by default csv_path with "
        "_corrected added",
    )
    max_suspects: int = define(
        500,
        "Largest number of suspected label errors to list, the most doubtful first",
        at_least=1,
        at_most=MOST_SUSPECTS,
    )
    apply: str = define("", "The corrections.csv that the page saved; with it, a corrected copy of csv_path is written")


@script
def main(configs: LabelErrorConfigs) -> dict:
    """Judges every label of the table and writes the suspected errors with their page, or writes the corrected table.

    Returns:
        `suspects`, the table as written, and `estimate`, the number of wrong labels; with `apply`, how many rows have
        each mark.
    """
    # Imported here, so that --help does not wait for pandas, nor an error in the table for TensorFlow.
    from finetune.data.label_tables import apply_corrections, name_corrected

    csv_path, multi_label = configs.csv_path, configs.multi_label_classification
    if configs.apply:
        write_path = configs.write_path if "write_path" in configs.given else name_corrected(csv_path)
        return apply_corrections(csv_path, configs.apply, write_path, configs.csv_label_column, multi_label)

    from finetune.core.files import write_csv
    from finetune.data.tables import read_table
    from finetune.predicting.prediction_files import check_write_path
    from finetune.training.run_folder import READING_OPTIONS
    from finetune.training.trained_model import resolve_model_path, take_data_options

    check_write_path(configs.write_path, csv_path)
    if configs.load_model_path:
        configs = take_data_options(configs, resolve_model_path(configs.load_model_path), READING_OPTIONS)
    read_table(csv_path, configs.csv_label_column, multi_label)

    from finetune.core.devices import start_devices
    from finetune.studies.label_errors import gather_evidence, get_judge, list_suspects, summarize, write_page
    from finetune.studies.label_scores import estimate_errors

    start_devices(configs.gpu_percentage)
    judge, configs = get_judge(configs, csv_path)
    evidence = gather_evidence(judge, configs, csv_path)
    suspects, _ = found = list_suspects(evidence, configs.classes, configs.max_suspects)
    multi_label, seed = configs.multi_label_classification, configs.random_seed or 0
    estimate = estimate_errors(evidence.labels, evidence.probabilities, multi_label, seed, evidence.groups)
    summary = summarize(estimate, len(evidence.rows), len(suspects), evidence.groups)
    page_path = f"{os.path.splitext(configs.write_path)[0]}.html"
    try:
        write_csv(configs.write_path, suspects)
        write_page(page_path, found, evidence, summary, csv_path, configs)
    finally:
        print(summary)
    print(f"Wrote {configs.write_path} and the page to review them, {page_path}")
    return {"suspects": suspects, "estimate": estimate}


if __name__ == "__main__":
    run_script(main)
