"""The training log, and its curves."""

import warnings

import cv2
import numpy as np
import pandas as pd
import pytest
from evaluations import LOG
from matplotlib.figure import Figure

from finetune.reporting.log_figures import draw_learning_rate, draw_log


def test_log_is_drawn_without_a_window():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = draw_log(LOG)
    assert [panel.get_title() for panel in figure.axes] == ["Accuracy", "Loss"]
    assert plt.get_fignums() == before


def test_learning_rate_figure_holds_the_losses_and_the_suggestion(tmp_path, monkeypatch):
    rates, losses = np.geomspace(1e-6, 1, 50), np.append(np.linspace(1.6, 0.4, 49), np.nan)
    drawn, savefig = [], Figure.savefig

    def note_and_save(figure, *values, **facts):
        drawn.append(figure)
        savefig(figure, *values, **facts)

    monkeypatch.setattr(Figure, "savefig", note_and_save)
    draw_learning_rate(rates, losses, 1e-3, str(tmp_path / "learning_rate.png"))
    (axes,) = drawn[0].axes
    steps, smooth, mark = axes.lines
    np.testing.assert_allclose(steps.get_xydata(), np.stack([rates, losses], axis=1)[:49])
    assert len(smooth.get_xydata()) == 49
    assert list(mark.get_xdata()) == [1e-3, 1e-3]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().texts] == ["each step", "smoothed", "suggestion: 0.001"]
    assert cv2.imread(str(tmp_path / "learning_rate.png")).shape[1] == 930
    assert [path.name for path in tmp_path.iterdir()] == ["learning_rate.png"]


@pytest.mark.parametrize("losses", [[np.nan] * 3, [1.0, 1.0, 1e30]])
def test_learning_rate_figure_without_a_suggestion(tmp_path, losses):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_learning_rate([1e-3, 1e-2, 1e-1], losses, None, str(tmp_path / "learning_rate.png"))
    assert (tmp_path / "learning_rate.png").stat().st_size > 5000


def test_a_run_of_one_epoch_has_whole_epochs_on_its_axis():
    figure = draw_log(pd.DataFrame({"epoch": [1], "loss": [0.1], "accuracy": [0.5]}))
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert all(float(label.replace("\N{MINUS SIGN}", "-")).is_integer() for label in labels)
