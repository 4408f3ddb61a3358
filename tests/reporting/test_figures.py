"""Figures of an evaluation."""

import warnings

import cv2
import numpy as np
import pandas as pd
import pytest
from evaluations import BINS, CALIBRATION, CURVE, LOG, NAMES, make_curves, multi_label, single_label, with_answers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finetune.reporting.figures import (
    draw_confusion_matrix,
    draw_heat_map,
    draw_learning_rate,
    draw_log,
    draw_precision_recall_curves,
    draw_reliability,
    draw_risk_coverage,
    draw_roc_curves,
    save_figures,
)

UNDEFINED = {key: [] for key in CURVE} | {"auroc": None, "average_precision": None}


def test_confusion_matrix_shows_counts_and_shares_of_the_row():
    (axes,) = draw_confusion_matrix([[9, 1, 2], [0, 1, 0], [0, 0, 0]], NAMES).axes
    counts = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "9", (0, 1): "1", (0, 2): "2", (1, 1): "1"}
    np.testing.assert_allclose(
        axes.images[0].get_array()[..., 3], [[0.75, 1 / 12, 1 / 6], [0, 1, 0], [0, 0, 0]], rtol=1e-6
    )
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert [label.get_text() for label in axes.get_xticklabels()] == NAMES
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("True", "Predicted")


@pytest.mark.parametrize("number", [2, 20, pytest.param(100, marks=pytest.mark.slow)])
def test_class_names_at_the_confusion_matrix_are_legible(number):
    names = [f"a class with a long name {position}" for position in range(number)]
    figure = draw_confusion_matrix(np.eye(number, dtype=int) * 40, names)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    page = figure.bbox.padded(1)
    for labels, side in ((axes.get_yticklabels(), "y"), (axes.get_xticklabels(), "x")):
        boxes = [label.get_window_extent() for label in labels]
        assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
        centres = [getattr(box, f"{side}1") for box in boxes]
        points = np.abs(np.diff(centres)) / figure.dpi * 72
        assert min(label.get_fontsize() for label in labels) >= 8
        assert points.min() > 1.2 * 8
    assert len(axes.texts) == number
    assert min(text.get_fontsize() for text in axes.texts) >= 5


def test_counts_that_do_not_fit_are_left_out():
    (axes,) = draw_confusion_matrix(np.full((100, 100), 1_000_000), [str(number) for number in range(100)]).axes
    assert not axes.texts


def test_heat_map_of_many_classes_shows_every_confusion_and_lists_the_most_frequent():
    # 401 classes make blocks of 3 x 3 cells. One of the 1,000 images of class 400 is confused.
    names = [f"class {number}" for number in range(401)]
    stored = {name: {name: 2} for name in names} | {"class 400": {"class 400": 999, "class 7": 1}}
    stored["class 9"] = {"class 9": 1, "class 10": 3}
    axes, beside, bar = draw_heat_map(stored, names).axes
    blocks = axes.images[0].get_array()
    expected = {(place, place): 1 for place in range(134)} | {(133, 2): 0.001}
    assert {tuple(place): blocks[tuple(place)] for place in np.argwhere(~blocks.mask).tolist()} == pytest.approx(
        expected
    )
    colours = axes.images[0].to_rgba(blocks)
    assert colours[133, 2, 3] >= 0.3
    assert colours[0, 1, 3] == 0
    assert len(axes.get_yticklabels()) <= 12
    assert [text.get_text() for text in beside.texts] == [
        *("Images", "Of the class", "True", "Predicted"),
        *("3", "75.0%", "class 9", "class 10"),
        *("1", "0.1%", "class 400", "class 7"),
    ]
    assert "3 x 3" in bar.get_xlabel()
    assert len(draw_heat_map(stored, names, pairs_listed=0).axes) == 2


def test_heat_map_of_101_classes_has_a_cell_each():
    names = [f"class {number}" for number in range(101)]
    axes, _ = draw_heat_map({name: {name: 1} for name in names}, names).axes
    np.testing.assert_array_equal(axes.images[0].get_array().filled(0), np.eye(101))


def test_roc_curves_name_each_class_with_its_area():
    (axes,) = draw_roc_curves({"cat": CURVE, "none": UNDEFINED, "_dog": CURVE | {"auroc": 0.5}}).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0.750  cat", "0.500  _dog"]
    assert [line.get_xydata().tolist() for line in axes.lines[1:]] == [[[0, 0], [0, 0.5], [1, 1]]] * 2


def test_curves_of_many_classes_name_the_mean_and_the_worst():
    curves = {f"class {number}": CURVE | {"average_precision": number / 20} for number in range(11, -1, -1)}
    (axes,) = draw_precision_recall_curves(curves).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "0.275  mean of 12 classes",
        *(f"{number / 20:.3f}  class {number}" for number in range(5)),
    ]
    assert len(axes.lines) == 13
    mean = axes.lines[-1].get_xydata()
    # All twelve are the same curve, which falls from (0.5, 1) to (1, 0.5).
    np.testing.assert_allclose(mean[:, 1], np.minimum(1, 1.5 - mean[:, 0]), atol=1e-9)


def test_curves_of_more_than_a_hundred_classes_are_a_band():
    low = CURVE | {"true_positive_rate": [0.0, 0.0, 1.0], "auroc": 0.5}
    curves = {f"class {number:03d}": low if number < 20 else CURVE for number in range(101)}
    (axes,) = draw_roc_curves(curves).axes
    assert len(axes.lines) == 7
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [
        "0.700  mean of 101 classes",
        *(f"0.500  class {number:03d}" for number in range(5)),
        "the middle 80 % of classes",
    ]
    (band,) = axes.collections
    points = {tuple(point) for point in band.get_paths()[0].vertices.round(6)}
    # The band lies between both curves, here in the middle: more than a tenth of the classes have the lower one.
    assert {(0.5, 0.5), (0.5, 0.75)} <= points


def test_curves_that_are_all_undefined_are_a_text():
    (axes,) = draw_roc_curves({"cat": UNDEFINED}).axes
    assert ["undefined" in text.get_text() for text in axes.texts] == [True]


def test_reliability_diagram_shows_both_temperatures_or_one_line_if_they_are_equal():
    upper, lower = draw_reliability(CALIBRATION).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in upper.lines}
    assert lines["before the temperature: error 0.095"] == [[0.97, 0.875]]
    assert lines["after the temperature: error 0.100"] == [[0.6, 0.5], [0.9, 1.0]]
    assert [bar.get_height() for bar in lower.patches] == [1, 0.25, 0.75]
    upper, _ = draw_reliability(CALIBRATION | {"bins_uncalibrated": BINS}).axes
    assert [line.get_label() for line in upper.lines] == ["perfect calibration", "this model: error 0.100"]


@pytest.mark.parametrize(
    ("make", "names", "extra"),
    [
        # Names that matplotlib would treat in a special way.
        (single_label, ["$\\frac$ $1", "_hidden", "花\n\x00"], {"confusion_matrix"}),
        (multi_label, NAMES, set()),
        (lambda names: with_answers(single_label(names), None), NAMES, {"confusion_matrix", "risk_coverage"}),
    ],
)
def test_figures_are_written_as_png(tmp_path, make, names, extra):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = save_figures(str(tmp_path), make(names), make_curves(names))
    expected = {"roc_curves", "precision_recall_curves", "reliability_diagram"} | extra
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.png" for name in expected)
    for path in paths:
        image = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        assert min(image.shape[:2]) > 400
        assert (image[0, 0] == 255).all()


def test_risk_coverage_curve_has_the_promises_and_a_height_that_the_first_answers_do_not_set():
    test = with_answers(single_label(), None)["sets"]["test"]
    test["risk_coverage"] = {"coverage": [0.05, 0.5, 1.0], "error": [1.0, 0.1, 0.2]}
    (axes,) = draw_risk_coverage(test, False, 0.02).axes
    curve, promised = axes.lines
    np.testing.assert_allclose(curve.get_xydata(), [[0.05, 1], [0.5, 0.1], [1, 0.2]])
    assert [*promised.get_ydata()] == [0.02, 0.02]
    # The promises of 5 and 10 %; nothing is answered with the others.
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[0.5, 0.125], [0.875, 1 / 14]])
    assert [text.get_text() for text in axes.texts] == ["5", "10"]
    assert 0.2 < axes.get_ylim()[1] < 0.3
    assert "images" in axes.get_xlabel()
    # Of several labels, the shares of answers and of images are different.
    (axes,) = draw_risk_coverage(test, True).axes
    assert len(axes.lines) == 1
    assert not axes.collections
    assert "labels" in axes.get_xlabel()


def test_risk_coverage_curve_of_a_perfect_model_and_of_one_that_predicts_no_label():
    (axes,) = draw_risk_coverage({"risk_coverage": {"coverage": [1.0], "error": [0.0]}}, False).axes
    assert axes.get_ylim()[1] == 0.05
    (axes,) = draw_risk_coverage({"risk_coverage": {"coverage": [], "error": []}}, True).axes
    assert "No label" in axes.texts[0].get_text()


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
