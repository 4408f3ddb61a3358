"""All scripts on 1,100 classes: their output and their files stay small."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from small_runs import TINY

import draw_activations
import make_csv_from_folders
import predict
import split_train_test
import test as evaluation
import train
from configs import Configs

CLASSES = 1100
MOST_LINES = 120


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three images of each of 1,100 classes, and tables with one label and with two labels per image."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    names = [f"species {number:04d}" for number in range(CLASSES)]
    for name in names:
        (folder / "images" / name).mkdir(parents=True)
        for number in range(3):
            cv2.imwrite(str(folder / "images" / name / f"{number}.png"), rng.integers(0, 256, (32, 32, 3), np.uint8))
    made = make_csv_from_folders.FolderConfigs(folder_path=str(folder / "images"), write_path=str(folder / "all.csv"))
    make_csv_from_folders.main(made)
    header, *rows = (folder / "all.csv").read_text().splitlines()
    several = [f"{row}${names[(number // 3 + 1) % CLASSES]}" for number, row in enumerate(rows)]
    (folder / "several").mkdir()
    (folder / "several" / "all.csv").write_text("\n".join([header, *several]) + "\n")
    return {False: folder, True: folder / "several"}


def run(capsys, main, configs):
    """Runs a script; returns its printed lines without Keras's progress bars."""
    capsys.readouterr()
    main(configs.validate())
    printed = capsys.readouterr().out
    return [line for line in printed.splitlines() if "\x08" not in line and "\r" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_every_script_copes_with_1100_classes(folders, several, tmp_path, capsys):
    folder, options = folders[several], {"multi_label_classification": several}
    split = {"csv_path": str(folder / "all.csv"), "test_split_fraction": 0.33, "validation_split_fraction": 0.33}
    split = split_train_test.SplitConfigs(**split, **options)
    printed = {"split": run(capsys, split_train_test.main, split)}
    sets = {"train": "training", "validation": "validation", "test": "testing"}
    options |= {f"{name}_csv": str(folder / f"{file}_set.csv") for name, file in sets.items()}
    options |= TINY | {"image_target_size": (32, 32, 3), "use_imagenet_weights": False, "batch_size": 64}
    options |= {"num_epochs": 1, "show_model_summary": False, "save_model_path": str(tmp_path / "run")}
    if not several:
        printed["find"] = run(capsys, train.main, Configs(**options, find_learning_rate=True))
    printed["train"] = run(capsys, train.main, Configs(**options))
    printed["test"] = run(capsys, evaluation.main, Configs(**options))
    few = folder / "few.csv"
    few.write_text("\n".join((folder / "testing_set.csv").read_text().splitlines()[:5]) + "\n")
    printed["cam"] = run(capsys, draw_activations.main, Configs(**options | {"test_csv": str(few)}))
    asked = {"input": str(few), "write_path": str(tmp_path / "predictions.csv"), "top_k": 5}
    printed["predict"] = run(capsys, predict.main, predict.PredictConfigs(**options, **asked))
    for lines in printed.values():
        assert len(lines) < MOST_LINES
        assert max(map(len, lines)) < 500
    check_evaluation(tmp_path / "run" / "evaluation", several)
    assert sum(line.startswith("The report is ") for line in printed["test"]) == 1
    assert "Classes (1100): species 0000, species 0001" in "\n".join(printed["train"])


def check_evaluation(folder, several):
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    metrics = SimpleNamespace(**results["sets"]["test"])
    assert len(metrics.per_class) == CLASSES
    for path in folder.glob("*.png"):
        assert min(cv2.imread(str(path)).shape[:2]) > 400
    assert (folder / "report.html").stat().st_size < 3_000_000
    assert (folder / "metrics.json").stat().st_size < 3_000_000
    if not several:
        counts = [count for row in metrics.confusion_matrix.values() for count in row.values()]
        assert sum(counts) == metrics.images
        assert min(counts) > 0
        right = sum(row.get(name, 0) for name, row in metrics.confusion_matrix.items())
        assert right / metrics.images == pytest.approx(metrics.accuracy)
