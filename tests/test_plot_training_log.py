"""A training log becomes a picture; any other file is an error of one line."""

import cv2
import matplotlib
import matplotlib.pyplot as plt
import pytest

from finetune.core.options import UserError
from plot_training_log import PlotConfigs, main

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    # Figures of other tests.
    plt.close("all")
    yield
    plt.close("all")


def write_log(tmp_path, content):
    path = tmp_path / "training_log.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


SINGLE_LABEL = "epoch,accuracy,loss,val_loss,val_accuracy\n1,0.5,1.1,1.2,0.4\n2,0.7,0.9,1.0,0.6\n"


@pytest.mark.parametrize(
    ("content", "title", "curves"),
    [
        (SINGLE_LABEL, "Accuracy", {"training": [[1, 0.5], [2, 0.7]], "validation": [[1, 0.4], [2, 0.6]]}),
        (
            "epoch,auroc,loss,val_loss,val_auroc\n1,0.6,0.7,0.6,0.55\n2,0.9,0.5,0.4,0.8\n",
            "Mean AUROC",
            {"training": [[1, 0.6], [2, 0.9]], "validation": [[1, 0.55], [2, 0.8]]},
        ),
        ("epoch,loss\n1,0.7\n", "Loss", {"training": [[1, 0.7]]}),
        ("epoch,auroc,loss,val_loss,val_auroc\n1,0.5,0.7,0.6,\n", "Mean AUROC", None),
    ],
)
def test_curves_are_drawn_beside_the_log(tmp_path, content, title, curves):
    # An existing picture is replaced. The log is also found by its folder.
    (tmp_path / "training_log.png").write_bytes(b"old")
    path = write_log(tmp_path, content)
    results = main(PlotConfigs(train_log_path=path) if curves else PlotConfigs(save_model_path=str(tmp_path)))
    assert results == {"path": str(tmp_path / "training_log.png")}
    assert min(cv2.imread(results["path"]).shape[:2]) > 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_log.csv", "training_log.png"]
    (number,) = plt.get_fignums()
    panels = {panel.get_title(): panel for panel in plt.figure(number).axes}
    assert set(panels) == {title, "Loss"}
    assert curves in (None, {line.get_label(): line.get_xydata().tolist() for line in panels[title].lines})


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
def test_file_without_a_training_log_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"training_log\.csv is not a training log"):
        main(PlotConfigs(train_log_path=write_log(tmp_path, content)))
    assert not (tmp_path / "training_log.png").exists()
