"""A training log becomes a picture, and anything else one clear line."""

import cv2
import matplotlib
import matplotlib.pyplot as plt
import pytest

from finetune.core.options import UserError
from plot_training_log import PlotConfigs, main

matplotlib.use("agg")

LOGS = {
    "single-label": (
        "epoch,accuracy,loss,val_loss,val_accuracy,learning_rate\n1,0.5,1.1,1.2,0.4,0.001\n2,0.7,0.9,1.0,0.6,0.001\n"
    ),
    "multi-label": (
        "epoch,auroc,loss,val_loss,val_auroc,learning_rate\n1,0.6,0.7,0.6,0.55,0.001\n2,0.9,0.5,0.4,0.8,0.001\n"
    ),
    "one epoch": "epoch,loss,val_loss\n1,0.7,0.6\n",
    "without validation": "epoch,loss\n1,0.7\n2,0.6\n",
    "undefined AUROC": "epoch,auroc,loss,val_loss,val_auroc\n1,0.5,0.7,0.6,\n2,0.5,0.5,0.4,\n",
}


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    yield
    plt.close("all")


def write_log(tmp_path, content):
    path = tmp_path / "training_log.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def panels_of_the_figure():
    (number,) = plt.get_fignums()
    return {panel.get_title(): panel for panel in plt.figure(number).axes}


@pytest.mark.parametrize("content", LOGS.values(), ids=LOGS.keys())
def test_picture_is_written_beside_the_log(tmp_path, content):
    # An earlier one is replaced.
    (tmp_path / "training_log.png").write_bytes(b"old")
    results = main(PlotConfigs(train_log_path=write_log(tmp_path, content)))
    assert results == {"path": str(tmp_path / "training_log.png")}
    height, width, _ = cv2.imread(results["path"]).shape
    assert min(height, width) > 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_log.csv", "training_log.png"]


def test_log_is_looked_for_in_the_run_s_folder(tmp_path):
    write_log(tmp_path, LOGS["single-label"])
    assert main(PlotConfigs(save_model_path=str(tmp_path)))["path"] == str(tmp_path / "training_log.png")


@pytest.mark.parametrize(
    ("kind", "title", "training", "validation"),
    [
        ("single-label", "Accuracy", [[1, 0.5], [2, 0.7]], [[1, 0.4], [2, 0.6]]),
        ("multi-label", "Mean AUROC", [[1, 0.6], [2, 0.9]], [[1, 0.55], [2, 0.8]]),
    ],
)
def test_curves(tmp_path, kind, title, training, validation):
    main(PlotConfigs(train_log_path=write_log(tmp_path, LOGS[kind])))
    panels = panels_of_the_figure()
    assert set(panels) == {title, "Loss"}
    curves = {line.get_label(): line.get_xydata().tolist() for line in panels[title].lines}
    assert curves == {"training": training, "validation": validation}


def test_missing_log_is_named_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"training_log\.csv: No such file.*Train first"):
        main(PlotConfigs(save_model_path=str(tmp_path)))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "epoch,loss\n",
        "path,class\na.jpg,cat\n",
        "loss,val_loss\n1,2\n",
        "epoch,loss\n1,2\n3,4,5\n",
        "epoch,loss\n1,high\n2,low\n",
        b"\x89PNG\r\n\x1a\n\xff\x00",
    ],
)
def test_file_that_is_no_training_log_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"training_log\.csv is not a training log"):
        main(PlotConfigs(train_log_path=write_log(tmp_path, content)))
    assert not (tmp_path / "training_log.png").exists()
