"""Measures what the project promises, as ratios within one run; prints a table and writes benchmarks/results.json.

python benchmarks/run.py --images FOLDER    where FOLDER holds one folder per class; by default data/images
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

EPOCHS = 4


def measure_checkpoint_cost(images: str) -> dict[str, float]:
    """Trains MobileNet at 224x224 from random weights and takes the share of each epoch that checkpointing takes.

    Every epoch writes the best model too, which is the costlier case. The first epoch, which also builds the
    graph, is left out.

    Args:
        images: a folder with one folder per class.

    Returns:
        Medians over the epochs: `epoch_s`, `checkpoint_s`, and `share`, their ratio.
    """
    import numpy as np

    import callbacks
    import make_csv_from_folders
    import split_train_test
    import train
    from configs import Configs

    spent, ends = [], []
    original = callbacks.Checkpoint.on_epoch_end

    def timed(checkpoint: callbacks.Checkpoint, epoch: int, logs: dict[str, float]) -> None:
        start = time.perf_counter()
        original(checkpoint, epoch, logs | {checkpoint.monitor: float(epoch)})
        ends.append(time.perf_counter())
        spent.append(ends[-1] - start)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(callbacks.Checkpoint, "on_epoch_end", timed):
        table = f"{folder}/all_data.csv"
        make_csv_from_folders.main(make_csv_from_folders.FolderConfigs(folder_path=images, write_path=table))
        split_train_test.main(split_train_test.SplitConfigs(csv_path=table))
        configs = Configs(
            train_csv=f"{folder}/training_set.csv",
            test_csv=f"{folder}/testing_set.csv",
            visual_model_name="MobileNet",
            use_imagenet_weights=False,
            num_epochs=EPOCHS,
            show_model_summary=False,
            save_model_path=f"{folder}/saved_model",
        )
        train.main(configs.validate())
    epochs, spent = np.diff(ends), np.array(spent[1:])
    return {
        "epoch_s": float(np.median(epochs)),
        "checkpoint_s": float(np.median(spent)),
        "share": float(np.median(spent / epochs)),
    }


def main() -> None:
    """Runs every benchmark, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default=str(PROJECT / "data" / "images"))
    images = parser.parse_args().images
    cost = measure_checkpoint_cost(images)
    rows = [("checkpoint's share of an epoch, MobileNet 224x224", cost["share"], "at most 0.05", cost["share"] <= 0.05)]
    print("\n| what | measured | promised | |\n|---|---|---|---|")
    for what, value, promised, holds in rows:
        print(f"| {what} | {value:.3f} | {promised} | {'holds' if holds else 'missed'} |")
    results = {"machine": f"{platform.machine()}, {platform.system()}", "checkpoint": cost}
    (PROJECT / "benchmarks" / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
