"""Figures hold what was measured, and report.html shows all of it: offline, escaped, sortable, without an error."""

import base64
import hashlib
import html
import json
import re
import shlex
import shutil
import subprocess
import warnings
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import cv2
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import log_loss

from configs import Configs
from finetune.figures import (
    draw_confusion_matrix,
    draw_precision_recall_curves,
    draw_reliability,
    draw_roc_curves,
    save_figures,
)
from finetune.gallery import choose_gallery, get_image_losses
from finetune.log_figures import draw_learning_rate, draw_log
from finetune.report import write_report
from finetune.summaries import list_warnings
from finetune.texts import show

NAMES = ["cat", "dog", "owl"]
LOG = pd.DataFrame({"epoch": [1, 2], "accuracy": [0.5, 0.7], "loss": [1.1, 0.9], "val_accuracy": [0.4, 0.6]})
BINS = [{"confidence": 0.6, "accuracy": 0.5, "count": 4}, {"confidence": 0.9, "accuracy": 1.0, "count": 12}]
RAW_BINS = [{"confidence": 0.97, "accuracy": 0.875, "count": 16}]
CALIBRATION = {
    "expected_calibration_error": 0.1,
    "expected_calibration_error_uncalibrated": 0.095,
    "bins": BINS,
    "bins_uncalibrated": RAW_BINS,
}
CURVE = {
    "false_positive_rate": [0.0, 0.0, 1.0],
    "true_positive_rate": [0.0, 0.5, 1.0],
    "precision": [0.5, 1.0, 1.0],
    "recall": [1.0, 0.5, 0.0],
    "auroc": 0.75,
    "average_precision": 0.75,
}
UNDEFINED = {key: [] for key in CURVE} | {"auroc": None, "average_precision": None}
DECISION = {
    "temperature": 1.5,
    "temperature_fitted_on": "validation",
    "exact_match_threshold": 0.5,
    "best_f1_thresholds": None,
    "thresholds_fitted_on": None,
    "model": "best_model.keras",
}


def single_label(names=NAMES):
    """Results of 16 images, 14 of them right, of one label each, written by hand."""
    rows = [(0.9, 0.75, 0.82, 12), (0.5, 1.0, 2 / 3, 1), (0.1, 0.3, 0.15, 3)]
    columns = ("precision", "recall", "f1", "support")
    figures = {
        "images": 16,
        "accuracy": 0.875,
        "balanced_accuracy": 0.683,
        "macro_f1": 0.545,
        "per_class": {name: dict(zip(columns, row, strict=True)) for name, row in zip(names, rows, strict=True)},
        "confusion_matrix": [[9, 1, 2], [0, 1, 0], [0, 0, 3]],
        "calibration": CALIBRATION,
    }
    intervals = {"accuracy": [0.75, 1.0], "balanced_accuracy": [0.5, 0.8], "macro_f1": [0.4, 0.7]}
    return {
        "model": "saved_model/best_model.keras",
        "classes": list(names),
        "multi_label": False,
        "decision": DECISION | {"classes": list(names), "multi_label": False},
        "sets": {
            "training": figures | {"images": 1234, "accuracy": 0.999},
            "validation": figures | {"accuracy": 0.901},
            "test": figures | {"intervals": intervals},
        },
    }


def multi_label(names=NAMES):
    """Results of a multi-label model without a validation set, where the last class has no image."""
    row = {"precision": 0.8, "recall": 0.6, "f1": 0.686, "support": 20, "auroc": 0.91, "average_precision": 0.72}
    row |= {"best_f1_threshold": 0.37, "f1_at_best_f1_threshold": 0.7}
    empty = row | {"support": 0, "auroc": None, "average_precision": None}
    figures = {
        "images": 40,
        "mean_auroc": 0.91,
        "mean_average_precision": 0.72,
        "exact_match_accuracy": 0.55,
        "hamming_loss": 0.125,
        "macro_f1": 0.46,
        "threshold": 0.41,
        "per_class": {names[0]: row, names[1]: row | {"support": 9, "auroc": 0.7}, names[2]: empty},
        "calibration": CALIBRATION | {"bins_uncalibrated": BINS},
    }
    intervals = {"mean_auroc": [0.8, 0.95], "hamming_loss": [0.1, 0.15], "macro_f1": [None, None]}
    intervals["per_class"] = {names[0]: {"precision": [0.7, 0.9], "recall": [0.5, 0.7], "f1": [0.6, 0.75]}}
    optimistic = {"threshold": 0.53, "exact_match_accuracy": 0.6, "note": "chosen on the test set itself: optimistic"}
    decision = DECISION | {"temperature": 1.0, "temperature_fitted_on": None, "exact_match_threshold": 0.41}
    decision |= {"thresholds_fitted_on": "training", "best_f1_thresholds": dict.fromkeys(names, 0.37)}
    return {
        "model": "saved_model/best_model.keras",
        "classes": list(names),
        "multi_label": True,
        "decision": decision | {"classes": list(names), "multi_label": True},
        "sets": {"training": figures, "test": figures | {"intervals": intervals, "optimistic": optimistic}},
    }


def make_item(**changes):
    photo = np.full((120, 90, 3), (200, 30, 40), np.uint8)
    item = {"path": "data/images/cat/7.jpg", "true": ["cat"], "predicted": ["owl"], "probability": 0.934, "loss": 3.5}
    return item | {"photo": photo, "heatmap": photo[::-1]} | changes


def make_curves(names=NAMES):
    return dict.fromkeys(names, CURVE)


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text below any element that has an id."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.scripts, self.styles = [], {}, [], []
        self._section, self._inside = "", ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.texts = {key: re.sub(r"\s+", " ", text) for key, text in self.texts.items()}

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        self._section = dict(attributes).get("id", self._section)

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, text):
        if self._inside in ("script", "style"):
            {"script": self.scripts, "style": self.styles}[self._inside].append(text)
        else:
            self.texts[self._section] = self.texts.get(self._section, "") + text

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def write_page(folder, results, names=NAMES, gallery=None, log=LOG, **options):
    path = folder / "report.html"
    gallery = gallery or {"mistakes": [make_item()], "least_confident": [make_item(heatmap=None)]}
    configs = Configs(validation_csv="validation.csv", classes=list(names)).replace(**options).to_dict()
    write_report(str(path), results, make_curves(names), gallery, log, configs)
    return path


@pytest.fixture(scope="module")
def single_path(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("single"), single_label())


@pytest.fixture(scope="module")
def multi_path(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("multi"), multi_label(), validation_csv="")


@pytest.fixture
def single_page(single_path):
    return Page(single_path)


@pytest.fixture
def multi_page(multi_path):
    return Page(multi_path)


# Gallery


def test_gallery_of_single_labels():
    y_true = np.array([0, 1, 2, 0])
    probabilities = np.array([[0.9, 0.05, 0.05], [0.8, 0.15, 0.05], [0.05, 0.93, 0.02], [0.4, 0.3, 0.3]])
    chosen = probabilities == probabilities.max(axis=1, keepdims=True)
    mistakes, least_confident = choose_gallery(y_true, probabilities, chosen, 2)
    # Wrong are the rows 1 (0.15 for the true class) and 2 (0.02); the surest answers have 0.9, 0.8, 0.93, 0.4.
    assert mistakes.tolist() == [2, 1]
    assert least_confident.tolist() == [3, 1]


def test_gallery_of_several_labels_follows_the_thresholds():
    y_true = np.array([[1, 0], [1, 0], [0, 0]])
    probabilities = np.array([[0.3, 0.01], [0.99, 0.25], [0.05, 0.02]])
    chosen = probabilities >= 0.2
    mistakes, least_confident = choose_gallery(y_true, probabilities, chosen, 5)
    # At 0.2 row 0 is right in spite of its loss, and row 1 wrong; the product of each answer's probabilities is
    # 0.3 x 0.99 = 0.297, 0.99 x 0.25 = 0.2475, 0.95 x 0.98 = 0.931.
    assert mistakes.tolist() == [1]
    assert least_confident.tolist() == [1, 0, 2]


def test_gallery_without_a_mistake_is_empty_and_ties_keep_their_order():
    y_true, probabilities = np.array([0, 0, 1]), np.array([[0.7, 0.3], [0.7, 0.3], [0.3, 0.7]])
    mistakes, least_confident = choose_gallery(y_true, probabilities, probabilities > 0.5, 2)
    assert mistakes.tolist() == []
    assert least_confident.tolist() == [0, 1]


def test_losses_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), size=6)
    y_true = rng.integers(0, 4, 6)
    expected = [log_loss([label], [row], labels=range(4)) for label, row in zip(y_true, probabilities, strict=True)]
    np.testing.assert_allclose(get_image_losses(y_true, probabilities), expected, rtol=1e-6)
    labels = rng.integers(0, 2, (6, 4))
    expected = [log_loss(truth, row, labels=[0, 1]) for truth, row in zip(labels, probabilities, strict=True)]
    np.testing.assert_allclose(get_image_losses(labels, probabilities), expected, rtol=1e-6)


def test_loss_of_an_impossible_answer_is_finite():
    probabilities = np.array([[1, 0]], np.float32)
    np.testing.assert_allclose(get_image_losses(np.array([1]), probabilities), 16.118, rtol=1e-4)
    np.testing.assert_allclose(get_image_losses(np.array([[0, 1]]), probabilities), 16.118, rtol=1e-4)


# Figures


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


@pytest.mark.parametrize("number", [2, 5, 20, 100])
def test_names_at_the_confusion_matrix_are_legible(number):
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


def test_curves_that_are_all_undefined_say_so():
    (axes,) = draw_roc_curves({"cat": UNDEFINED}).axes
    assert [text.get_text() for text in axes.texts] == ["AUROC is undefined for every class"]


def test_reliability_diagram_shows_before_and_after():
    upper, lower = draw_reliability(CALIBRATION).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in upper.lines}
    assert lines["before the temperature: error 0.095"] == [[0.97, 0.875]]
    assert lines["after the temperature: error 0.100"] == [[0.6, 0.5], [0.9, 1.0]]
    assert [bar.get_height() for bar in lower.patches] == [1, 0.25, 0.75]


def test_reliability_diagram_without_a_temperature_shows_one_line():
    upper, _ = draw_reliability(CALIBRATION | {"bins_uncalibrated": BINS}).axes
    assert [line.get_label() for line in upper.lines] == ["perfect calibration", "this model: error 0.100"]


def test_log_is_drawn_without_a_window():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = draw_log(LOG)
    assert [panel.get_title() for panel in figure.axes] == ["Accuracy", "Loss"]
    assert plt.get_fignums() == before


@pytest.mark.parametrize(("results", "extra"), [(single_label(), {"confusion_matrix"}), (multi_label(), set())])
def test_figures_are_written_as_png(tmp_path, results, extra):
    paths = save_figures(str(tmp_path), results, make_curves())
    expected = {"roc_curves", "precision_recall_curves", "reliability_diagram"} | extra
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.png" for name in expected)
    for path in paths:
        image = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        assert min(image.shape[:2]) > 400
        assert (image[0, 0] == 255).all()


def test_names_that_matplotlib_could_stumble_over(tmp_path):
    names = ["$\\frac$ $1", "_hidden", "花\n\x00"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = save_figures(str(tmp_path), single_label(names), make_curves(names))
    assert sorted(map(str, tmp_path.iterdir())) == sorted(paths)
    assert len(paths) == 4


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


# Page


def test_page_loads_nothing_from_outside(single_page, multi_page):
    for page in (single_page, multi_page):
        sources = [
            value
            for _, attributes in page.tags
            for name, value in attributes.items()
            if name in ("src", "srcset", "href", "action", "data", "poster", "background")
        ]
        assert sources
        assert all(re.match(r"data:image/(jpeg|png|svg\+xml);base64,|#\w+$", source) for source in sources)
        assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
        assert not re.search(r"https?:|@import|url\(", re.sub(r"base64,[\w+/=]+", "", page.source))


def test_only_the_page_s_own_script_may_run(single_page):
    (policy,) = [attributes["content"] for attributes in single_page.all("meta") if "http-equiv" in attributes]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = base64.b64encode(hashlib.sha256(single_page.scripts[0].encode()).digest()).decode()
    assert len(single_page.scripts) == 1
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"


def test_every_link_leads_to_a_section(single_page, multi_page):
    for page in (single_page, multi_page):
        targets = {attributes["href"].removeprefix("#") for attributes in page.all("a")}
        assert targets == {attributes["id"] for attributes in page.all("section")}
    assert "#confusion" in str(single_page.all("a"))
    assert "#confusion" not in str(multi_page.all("a"))


def test_every_figure_is_there_for_both_themes_and_described(single_page):
    sources, images = single_page.all("source"), single_page.all("img")
    assert len(sources) == 6
    assert {attributes["media"] for attributes in sources} == {"screen and (prefers-color-scheme: dark)"}
    assert all(attributes["alt"] for attributes in images)
    descriptions = " ".join(attributes["alt"] for attributes in images)
    for words in ("Confusion matrix", "ROC", "Precision", "Reliability", "Accuracy over", "Loss over", "Grad-CAM"):
        assert words in descriptions
    for attributes in [*sources, *images]:
        kind, content = (attributes.get("src") or attributes["srcset"]).split(";base64,")
        content = base64.b64decode(content, validate=True)
        if kind == "data:image/svg+xml":
            assert ElementTree.fromstring(content).tag.endswith("svg")
        else:
            assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is not None
    for light, dark in zip(images[:6], sources, strict=True):
        assert light["src"] != dark["srcset"]


def test_headlines_have_their_intervals_and_the_other_sets_beside(single_page):
    text = single_page.texts["figures"].replace("\u00a0", " ")
    assert "Accuracy87.5 % 75.0 % to 100.0 %" in text
    assert "Macro F10.545 0.400 to 0.700" in text
    assert re.search(r"AccuracyImages whose most probable class is right *87.5 % *90.1 % *99.9 %", text)
    assert "Calibration errorDistance of probabilities from how often they hold; lower is better 0.100" in text
    assert "16 test, 16 validation, 1,234 training images." in single_page.texts[""]


def test_undefined_figures_are_shown_as_such(multi_page):
    assert "0.910" in multi_page.texts["figures"]
    assert multi_page.texts["classes"].count("undefined") == 2
    values = [attributes["data-value"] for attributes in multi_page.all("td") if "data-value" in attributes]
    assert values.count("") == 2
    # The undefined interval of macro F1 makes no tile.
    assert len(multi_page.all("svg")) == 2


def test_decision_says_what_was_fitted_where(single_page, multi_page):
    assert "Temperature1.500 fitted on the validation set" in single_page.texts["decision"]
    text = multi_page.texts["decision"].replace("\u00a0", " ")
    assert "Temperature1.000 not fitted: there is no validation set" in text
    assert "Threshold0.410 best exact match on the training set; 55.0 % on the test set" in text
    assert "Optimistic threshold0.530 60.0 % exact match: chosen on the test set itself: optimistic" in text
    assert "0.600 to 0.750" in multi_page.texts["classes"]


def test_warnings_are_honest():
    found = " ".join(list_warnings(multi_label(), {"validation_csv": ""}))
    for words in (
        "the test set chose the epoch",
        "No temperature was fitted",
        "The thresholds were fitted on the training set",
        "nothing is known of them: owl.",
        "figures are rough: dog.",
        "AUROC is undefined for these classes and left out of the mean: owl.",
    ):
        assert words in found
    fine = single_label()
    for row in fine["sets"]["test"]["per_class"].values():
        row["support"] = 10
    assert list_warnings(fine, {"validation_csv": "validation.csv"}) == []


def test_most_frequent_confusions_come_first(single_page):
    text = single_page.texts["confusion"].replace("\u00a0", " ")
    assert re.search(r"cat ?owl ?2 ?16.7 % ?cat ?dog ?1 ?8.3 %", text)


def test_tables_are_described(single_page, multi_page):
    for page in (single_page, multi_page):
        assert len(page.all("caption")) == len(page.all("table"))
        assert len(page.all("h1")) == 1
        assert all("scope" in attributes for attributes in page.all("th"))
        buttons = page.all("button")
        assert buttons
        assert all(attributes["type"] == "button" for attributes in buttons)


def test_what_a_name_or_path_holds_is_shown_not_run(tmp_path):
    names = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>", "a\x00b\x1b\n\u202ec"]
    path = "photos/{{ 7 * 7 }}</p><script>alert(3)</script>\udcff.jpg"
    item = make_item(path=path, true=[names[0]], predicted=[names[1], names[2]])
    for results in (single_label(names), multi_label(names)):
        results["model"] = f"runs/{names[0]}/best_model.keras"
        page = Page(
            write_page(tmp_path, results, names, {"mistakes": [item], "least_confident": []}, image_directory=names[1])
        )
        assert len(page.scripts) == 1
        assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
        for section in ("classes", "mistakes", "options"):
            assert names[0] in page.texts[section]
            assert names[1] in page.texts[section]
            assert "a\\x00b\\x1b\\n\\u202ec" in page.texts[section]
        assert "photos/{{ 7 * 7 }}</p><script>alert(3)</script>\\udcff.jpg" in page.texts["mistakes"]
        assert not {"\x00", "\x1b", "\u202e"} & set(page.source)


def test_hidden_characters_are_written_out():
    assert show("é 花 👩‍🚀") == "é 花 👩‍🚀"
    assert show("\t\x7f\u2066") == "\\t\\x7f\\u2066"


def test_gallery_shows_each_image_with_its_answer(tmp_path):
    large = np.zeros((500, 1000, 3), np.uint8)
    large[..., 0] = 255
    gallery = {
        "mistakes": [make_item(photo=large, heatmap=None)],
        "least_confident": [make_item(true=["cat", "dog"], predicted=[]), make_item(true=["owl"])],
    }
    page = Page(write_page(tmp_path, multi_label(), gallery=gallery))
    assert "data/images/cat/7.jpg" in page.texts["mistakes"]
    text = page.texts["doubts"].replace("\u00a0", " ")
    assert "Predictedno label ✗ wrong Truecat, dog Missedcat, dog Least certain93.4 % Loss3.500" in text
    assert "Predictedowl ✓ right Trueowl Least certain93.4 %" in text
    photos = [attributes for attributes in page.all("img") if "jpeg" in attributes["src"]]
    assert len(photos) == 5
    first = base64.b64decode(photos[0]["src"].split(",")[1])
    decoded = cv2.imdecode(np.frombuffer(first, np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (160, 320, 3)
    # OpenCV reads blue, green, red: the photo is still red.
    np.testing.assert_allclose(decoded[80, 160], [0, 0, 254], atol=3)


def test_empty_gallery_and_no_log(tmp_path):
    page = Page(
        write_page(tmp_path, single_label(), gallery={"mistakes": [], "least_confident": []}, log=None, num_epochs=7)
    )
    assert "None." in page.texts["mistakes"]
    assert "training" not in page.texts
    assert re.search(r"num_epochsEpochs in total, those before a resume included ?7 ?100", page.texts["options"])
    assert f"The other {len(Configs.options()) - 3} options" in page.texts["options"]


def test_command_makes_the_evaluation_again(tmp_path):
    options = {"test_csv": "my data/test's.csv", "multilabel_threshold_range": [0.1, 0.9], "random_seed": None}
    page = Page(write_page(tmp_path, multi_label(), **options))
    command = page.texts["files"].partition("python test.py ")[2]
    configs = Configs.from_command_line(arguments=shlex.split(command))
    assert configs.load_model_path == "saved_model/best_model.keras"
    assert configs.test_csv == "my data/test's.csv"
    assert configs.multilabel_threshold_range == [0.1, 0.9]
    assert configs.random_seed is None


def test_same_input_makes_the_same_page(tmp_path, single_path):
    assert write_page(tmp_path, single_label()).read_bytes() == single_path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# In a browser

PROBE = """<script>
addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const order = () => Array.from(table.tBodies[0].rows, row => row.cells[0].textContent);
  const sort = title => {
    const button = Array.from(table.querySelectorAll("button")).find(one => one.textContent === title);
    button.click();
    return [button.parentElement.getAttribute("aria-sort"), order()];
  };
  const figure = document.querySelector("picture");
  const found = {
    "broken": Array.from(document.images).filter(image => !image.naturalWidth).length,
    "dark": figure.querySelector("img").currentSrc === figure.querySelector("source").srcset,
    "overflow": document.documentElement.scrollWidth - document.documentElement.clientWidth,
    "sorted": [sort("COLUMN"), sort("COLUMN"), sort("Class")],
  };
  document.title = JSON.stringify(found);
});
</script></body>"""


def browse(page, *flags):
    """Opens a page in headless Chromium; returns its document after loading and what it wrote to the console."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no Chromium on the path to open the report in")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={page.parent / 'profile'}", *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def probe(page, folder, column, *flags):
    """Opens a copy of a page with a script of the test in it; returns what that found."""
    source = page.read_text(encoding="utf-8")
    loosened = re.sub(r"script-src [^;]+", "script-src 'unsafe-inline'", source, count=1)
    (folder / "probed.html").write_text(loosened.replace("</body>", PROBE.replace("COLUMN", column)), encoding="utf-8")
    document, console = browse(folder / "probed.html", *flags)
    assert console == []
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", document, re.DOTALL)[1]))


def test_browser_opens_the_page_without_an_error(single_path):
    document, console = browse(single_path)
    assert "How good is it?" in document
    assert console == []


def test_what_the_page_s_policy_forbids_shows_on_the_console(tmp_path, single_path):
    faults = '<script>missing()</script><img src="http://127.0.0.1:9/a.png" alt=""><b onclick="missing()">b</b>'
    source = single_path.read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(source.replace("</main>", f"{faults}</main>"), encoding="utf-8")
    _, console = browse(tmp_path / "page.html")
    assert len(console) == 3
    assert all("Content Security Policy" in line for line in console)


def test_error_in_a_script_shows_on_the_console(tmp_path):
    (tmp_path / "page.html").write_text("<script>missing()</script>")
    _, console = browse(tmp_path / "page.html")
    assert "missing is not defined" in " ".join(console)


def test_click_sorts_on_a_desktop(tmp_path, single_path):
    assert probe(single_path, tmp_path, "Precision", "--window-size=1280,900") == {
        "broken": 0,
        "dark": False,
        "overflow": 0,
        "sorted": [
            ["ascending", ["owl", "dog", "cat"]],
            ["descending", ["cat", "dog", "owl"]],
            ["ascending", ["cat", "dog", "owl"]],
        ],
    }


def test_click_sorts_on_a_dark_phone_with_the_undefined_last(tmp_path, multi_path):
    assert probe(multi_path, tmp_path, "AUROC", "--window-size=390,800", "--force-dark-mode") == {
        "broken": 0,
        "dark": True,
        "overflow": 0,
        "sorted": [
            ["ascending", ["dog", "cat", "owl"]],
            ["descending", ["cat", "dog", "owl"]],
            ["ascending", ["cat", "dog", "owl"]],
        ],
    }
