"""report.html shows an evaluation: self-contained, escaped and sortable."""

import base64
import re
import shlex
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import cv2
import keras
import numpy as np
import PIL.Image
import pytest
from browsers import browse, check_policy, probe
from evaluations import LOG, NAMES, make_curves, multi_label, single_label, with_answers
from sklearn.metrics import log_loss

from configs import Configs
from finetune.core.options import UserError
from finetune.data.images import read_image
from finetune.evaluation.abstention import Abstention
from finetune.evaluation.decision import Decision
from finetune.evaluation.evaluation import Answers
from finetune.evaluation.rule import Nearest
from finetune.reporting import data_uris
from finetune.reporting.cam_pictures import overlay_heatmap
from finetune.reporting.report import (
    build_finder,
    build_gallery,
    build_grad_cam,
    choose_gallery,
    draw_pictures,
    get_image_losses,
    write_report,
)
from finetune.reporting.summaries import list_warnings


def make_item(**changes):
    photo = data_uris.encode_photo(np.full((120, 90, 3), (200, 30, 40), np.uint8))
    item = {"path": "data/images/cat/7.jpg", "true": ["cat"], "predicted": ["owl"], "missed": ["cat"], "loss": 3.5}
    item |= {"is_right": False, "probability": 0.934, "photo": photo, "heatmap": photo} | changes
    return {"answer": item["predicted"], "similarity": None, "nearest": []} | item


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text by the id of the section."""

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


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the figures out of pages: drawing them takes seconds, and few tests look at them."""
    empty = {"light": "data:,", "dark": "data:,", "description": "d", "width": 9, "height": 9, "is_wide": False}
    monkeypatch.setattr(data_uris, "_embed_figure", lambda *_: empty)


@pytest.fixture(scope="module")
def single_path(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("single"), single_label())


@pytest.fixture(scope="module")
def multi_path(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("multi"), multi_label(), log=None, validation_csv="")


@pytest.fixture(scope="module")
def answering_path(tmp_path_factory):
    """A page with a promise, and two galleries of photos with the training photos most like them."""
    photo = make_item()["photo"]
    nearest = [{"path": f"data/<{row}>.jpg", "label": "<cat>", "similarity": 0.7, "photo": photo} for row in range(3)]
    item = make_item(answer=["unsure"], similarity=0.625, nearest=nearest)
    gallery = {"mistakes": [make_item()], "least_confident": [item], "least_similar": [item | {"heatmap": None}]}
    results = with_answers(single_label(), Abstention(0.05, [0.8], images=200))
    return write_page(tmp_path_factory.mktemp("answering"), results, gallery=gallery)


@pytest.fixture
def single_page(single_path):
    return Page(single_path)


@pytest.fixture
def multi_page(multi_path):
    return Page(multi_path)


def test_page_is_self_contained_and_only_its_own_script_may_run(single_page, multi_page, answering_path):
    for page in (single_page, multi_page, Page(answering_path)):
        sources = [
            value
            for _, attributes in page.tags
            for name, value in attributes.items()
            if name in ("src", "srcset", "href", "action", "data", "poster", "background")
        ]
        assert sources
        # The command on the page writes label_errors.html into the same folder.
        known = r"data:image/(jpeg|png|svg\+xml);base64,|#\w+$|label_errors\.html$"
        assert all(re.match(known, source) for source in sources)
        check_policy(page.source, "data:")
        assert len(page.scripts) == 1
        targets = {attributes["href"].removeprefix("#") for attributes in page.all("a")} - {"label_errors.html"}
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
    # The same figures again are the same files.
    assert [light["src"] for light in images[4:6]] == [figure["light"] for figure in data_uris.embed_log(LOG)]


def test_metrics_have_their_intervals_and_the_values_of_other_sets(single_page):
    text = single_page.texts["metrics"].replace("\u00a0", " ")
    assert "Accuracy87.5 % 75.0 % to 100.0 %" in text
    assert "Macro F10.545 0.400 to 0.700" in text
    assert re.search(r"AccuracyImages .{,40}? *87.5 % *90.1 % *99.9 %", text)
    confusions = single_page.texts["confusion"].replace("\u00a0", " ")
    assert re.search(r"cat ?owl ?2 ?16.7 % ?cat ?dog ?1 ?8.3 %", confusions)
    assert "16 test, 16 validation, 1,234 training images." in single_page.texts[""]


def test_decision_names_the_sets_that_it_was_fitted_on(single_page, multi_page):
    assert "Temperature1.500 fitted on the validation set" in single_page.texts["decision"]
    text = multi_page.texts["decision"].replace("\u00a0", " ")
    assert "Temperature1.000 not fitted" in text
    assert re.search(r"Threshold0.410 [^;]* training set; 55.0 % on the test set", text)
    assert "Optimistic threshold0.530 60.0 %" in text
    assert multi_page.texts["classes"].count("undefined") == 2
    # The undefined interval of macro F1 makes no tile.
    assert len(multi_page.all("svg")) == 2
    assert "0.600 to 0.750" in multi_page.texts["classes"]


def test_warnings_follow_from_the_results():
    found = "\n".join(list_warnings(multi_label(), {"validation_csv": ""}))
    for words in ("selected on the test set", "no temperature", "training set", "undefined AUROC: owl."):
        assert re.search(words, found)
    assert re.search(r"without test images: owl\.\n.*fewer than 10 test images: dog\.", found)
    fine = single_label()
    for row in fine["sets"]["test"]["per_class"].values():
        row["support"] = 10
    assert list_warnings(fine, {"validation_csv": "validation.csv"}) == []
    # Metrics of images that did not select the model, whatever the run had.
    fine["sets"]["test"]["selected_the_model"] = False
    assert list_warnings(fine, {"validation_csv": ""}) == []
    fine["sets"]["test"]["selected_the_model"] = True
    assert "selected on the test set" in list_warnings(fine, {"validation_csv": "validation.csv"})[0]


def test_few_groups_are_a_reason_to_doubt():
    results = single_label()
    test = results["sets"]["test"] | {"selected_the_model": False}
    test["per_class"] = {name: row | {"support": 10, "groups": 10} for name, row in test["per_class"].items()}
    test["per_class"]["owl"]["groups"] = 3
    for groups, words in {1: "one group", 9: "9 groups", 20: "fewer than 10 groups"}.items():
        results["sets"]["test"] = test | {"groups": groups}
        (found,) = list_warnings(results, {})
        assert words in found
    assert found.endswith(": owl.")


def test_page_has_groups_and_a_line_for_each_value(tmp_path, undrawn):
    results = single_label()
    row = {"images": 8, "accuracy": 0.5, "balanced_accuracy": 0.25}
    values = {"north": row | {"intervals": {"accuracy": [0.25, 0.75], "balanced_accuracy": None}}}
    values["<south>"] = values["north"] | {"groups": 3}
    results["sets"]["test"] |= {"groups": 11, "by": {"column": "site", "values": values}}
    for row in results["sets"]["test"]["per_class"].values():
        row["groups"] = 1
    page = Page(write_page(tmp_path, results))
    text = page.texts["breakdown"].replace("\u00a0", " ")
    assert "in 11 groups." in page.texts[""]
    assert "over groups of images" in page.texts["metrics"]
    assert re.search(r"north *8 *8 *50.0 % *25.0 % to 75.0 % *25.0 %", text)
    assert re.search(r"<south> *8 *3 *50.0 %", text)


def test_page_of_many_classes_lists_confusions_but_shortens_lists_of_names(tmp_path, undrawn):
    names = [f"class {number:03d}" for number in range(101)]
    results = single_label() | {"classes": names}
    row = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    cells = {name: {name: 1, names[0]: 1} for name in names[1:]} | {names[0]: {names[0]: 2}}
    test = results["sets"]["test"] | {"per_class": dict.fromkeys(names, row), "confusion_matrix": cells}
    results["sets"] = {"test": test}
    page = Page(write_page(tmp_path, results, names))
    assert len(re.findall(r"class \d+ ?class 000 ?1 ?50.0", page.texts["confusion"].replace("\u00a0", " "))) == 30
    assert "class 000, class 001, class 002, class 003, class 004 and 96 more: all are in" in page.texts["options"]
    assert "class 019 and 81 more." in page.texts["metrics"]
    assert len(re.findall(r"class \d", page.texts["classes"])) == 101


def test_tables_are_described(single_page, multi_page, answering_path):
    for page in (single_page, multi_page, Page(answering_path)):
        assert len(page.all("caption")) == len(page.all("table"))
        assert len(page.all("h1")) == 1
        assert all("scope" in attributes for attributes in page.all("th"))
        assert {attributes["type"] for attributes in page.all("button")} == {"button"}


def test_code_in_names_and_paths_is_shown_as_text(tmp_path, undrawn):
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


def test_gallery_shows_each_image_with_its_prediction(tmp_path, undrawn):
    right = make_item(true=["owl"], missed=[], is_right=True)
    gallery = {
        "mistakes": [make_item(heatmap=None)],
        "least_confident": [make_item(true=["cat", "dog"], predicted=[], missed=["cat", "dog"]), right],
    }
    page = Page(write_page(tmp_path, multi_label(), gallery=gallery))
    assert "data/images/cat/7.jpg" in page.texts["mistakes"]
    text = page.texts["doubts"].replace("\u00a0", " ")
    assert "Predictedno label ✗ wrong Truecat, dog Missedcat, dog Least certain93.4 % Loss3.500" in text
    assert "Predictedowl ✓ right Trueowl Least certain93.4 %" in text
    assert len([attributes for attributes in page.all("img") if "jpeg" in attributes["src"]]) == 5


def test_page_says_what_is_not_answered_and_shows_the_nearest_training_photos(answering_path, single_page):
    page = Page(answering_path)
    text = page.texts["unanswered"].replace("\u00a0", " ")
    for words in ("Answered50.0 %", "Wrong answers12.5 %", "Promisedat most 5.0 %", "another camera"):
        assert words in text
    assert re.search(
        r"1 % *nothing is answered *2 % *nothing is answered *5 % *50.0 %8 of 16 *12.5 %0.3 % to 52.7 %", text
    )
    assert "risk_coverage.png" in page.texts["files"]
    assert "Risk-coverage" in " ".join(attributes["alt"] for attributes in page.all("img"))
    for section in ("doubts", "unlike"):
        assert "Answerunsure Probability93.4 % Similarity0.625" in page.texts[section].replace("\u00a0", " ")
        assert page.texts[section].count("<cat>0.700") == 3
    assert "three are below" in page.texts["unlike"]
    assert "Answer" not in page.texts["mistakes"]
    for section in ("unanswered", "unlike"):
        assert section not in single_page.texts
    assert "risk_coverage.png" not in single_page.texts["files"]
    assert "Similarity" not in single_page.texts["doubts"]


def test_empty_gallery_and_no_log(tmp_path, undrawn):
    page = Page(
        write_page(tmp_path, single_label(), gallery={"mistakes": [], "least_confident": []}, log=None, num_epochs=7)
    )
    assert "None." in page.texts["mistakes"]
    assert "training" not in page.texts
    assert re.search(r"num_epochs\D+7 ?100", page.texts["options"])
    assert f"The other {len(Configs.options()) - 3} options" in page.texts["options"]


def test_command_repeats_the_evaluation(tmp_path, undrawn):
    options = {"test_csv": "my data/test's.csv", "multilabel_threshold_range": [0.1, 0.9], "random_seed": None}
    page = Page(write_page(tmp_path, multi_label(), **options))
    command = page.texts["files"].partition("python test.py ")[2]
    configs = Configs.from_command_line(arguments=shlex.split(command))
    assert configs.load_model_path == "saved_model/best_model.keras"
    assert configs.test_csv == "my data/test's.csv"
    assert configs.multilabel_threshold_range == [0.1, 0.9]
    assert configs.random_seed is None


def test_page_is_reproducible(tmp_path, undrawn):
    first = write_page(tmp_path, single_label()).read_text()
    # The command for suspected label errors has the page's own folder.
    assert f"--write_path {tmp_path}/label_errors.csv" in first
    assert write_page(tmp_path, single_label()).read_text() == first
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


def test_violations_of_the_page_policy_are_written_to_the_console(tmp_path, single_path):
    faults = '<script>missing()</script><b onclick="missing()">b</b>'
    source = single_path.read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(source.replace("</main>", f"{faults}</main>"), encoding="utf-8")
    _, console = browse(tmp_path / "page.html")
    assert console
    assert all("Content Security Policy" in line for line in console)


@pytest.mark.parametrize(
    ("name", "column", "flags", "ascending"),
    [
        ("single", "Precision", ("--window-size=1280,900",), ["owl", "dog", "cat"]),
        # Undefined values come last in both directions.
        ("multi", "AUROC", ("--window-size=390,800", "--force-dark-mode"), ["dog", "cat", "owl"]),
        ("answering", "Precision", ("--window-size=390,800",), ["owl", "dog", "cat"]),
    ],
)
def test_click_sorts_on_a_desktop_and_a_dark_phone(tmp_path, request, name, column, flags, ascending):
    path = request.getfixturevalue(f"{name}_path")
    directions = [["ascending", ascending], ["descending", ["cat", "dog", "owl"]], ["ascending", ["cat", "dog", "owl"]]]
    expected = {"broken": 0, "dark": name == "multi", "overflow": 0, "sorted": directions}
    assert probe(path, tmp_path, PROBE.replace("COLUMN", column), *flags) == expected


def test_gallery_of_single_labels():
    y_true = np.array([0, 1, 2, 0])
    probabilities = np.array([[0.9, 0.05, 0.05], [0.8, 0.15, 0.05], [0.05, 0.93, 0.02], [0.4, 0.3, 0.3]])
    chosen = probabilities == probabilities.max(axis=1, keepdims=True)
    mistakes, least_confident = choose_gallery(y_true, probabilities, chosen, 2)
    # Rows 1 (0.15 for the true class) and 2 (0.02) are wrong; the predictions have 0.9, 0.8, 0.93, 0.4.
    assert mistakes.tolist() == [2, 1]
    assert least_confident.tolist() == [3, 1]


def test_gallery_of_several_labels_follows_the_thresholds():
    y_true = np.array([[1, 0], [1, 0], [0, 0]])
    probabilities = np.array([[0.3, 0.01], [0.99, 0.25], [0.05, 0.02]])
    chosen = probabilities >= 0.2
    mistakes, least_confident = choose_gallery(y_true, probabilities, chosen, 5)
    # With a threshold of 0.2 row 0 is right despite its loss, and row 1 is wrong. The products of the probabilities are
    # 0.3 x 0.99 = 0.297, 0.99 x 0.25 = 0.2475, 0.95 x 0.98 = 0.931.
    assert mistakes.tolist() == [1]
    assert least_confident.tolist() == [1, 0, 2]


def test_gallery_without_a_mistake_is_empty_and_ties_keep_their_order():
    y_true, probabilities = np.array([0, 0, 1]), np.array([[0.7, 0.3], [0.7, 0.3], [0.3, 0.7]])
    mistakes, least_confident = choose_gallery(y_true, probabilities, probabilities > 0.5, 2)
    assert mistakes.tolist() == []
    assert least_confident.tolist() == [0, 1]


def test_gallery_has_the_predictions_and_shrunken_photos_as_data_uris():
    photo = np.zeros((500, 1000, 3), np.uint8)
    photo[..., 0] = 255
    truth, probabilities = np.array([[1, 1], [0, 1]]), np.array([[0.9, 0.2], [0.3, 0.8]])
    answers = Answers(["a.jpg", "b.jpg"], truth, probabilities, Decision(["cat", "dog"], True))
    gallery = build_gallery(lambda paths: [(photo, photo if path == "a.jpg" else None) for path in paths], answers)
    (mistake,) = gallery["mistakes"]
    assert [mistake[key] for key in ("path", "true", "predicted", "missed", "is_right")] == [
        *("a.jpg", ["cat", "dog"], ["cat"], ["dog"], False)
    ]
    other = next(item for item in gallery["least_confident"] if item["path"] == "b.jpg")
    assert (other["is_right"], other["missed"], other["heatmap"]) == (True, [], None)
    assert other["probability"] == pytest.approx(0.7)
    kind, content = mistake["photo"].split(",")
    assert kind == "data:image/jpeg;base64"
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (160, 320, 3)
    # OpenCV reads blue, green, red: the photo is still red.
    np.testing.assert_allclose(decoded[80, 160], [0, 0, 254], atol=3)


def test_galleries_of_doubtful_and_unfamiliar_photos_have_the_nearest_training_photos():
    photo = np.zeros((50, 100, 3), np.uint8)
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.1, 0.9]], np.float32)
    # Certainties are logits: log(9), log(1.5), log(9). The threshold makes the second unsure, and the third unknown.
    rule = Abstention(0.05, [0.8], 0.01, 2.0, [0.0, 1.0, 0.0, 1.0], 100)
    decision, similarities = Decision(["cat", "dog"], False, abstention=rule), np.array([0.5, 1.7, -0.5])
    answers = Answers(["a.jpg", "b.jpg", "c.jpg"], np.array([0, 0, 1]), probabilities, decision, similarities)
    gallery = build_gallery(lambda paths: [(photo, photo) for _ in paths], answers, lambda row: [{"path": row}])
    assert [item["path"] for item in gallery["least_confident"]] == ["b.jpg", "a.jpg", "c.jpg"]
    assert [item["path"] for item in gallery["least_similar"]] == ["c.jpg", "a.jpg", "b.jpg"]
    assert [item["answer"] for item in gallery["least_similar"]] == [["unknown"], ["cat"], ["unsure"]]
    assert [item["similarity"] for item in gallery["least_similar"]] == [-0.5, 0.5, 1.7]
    assert [item["nearest"] for item in gallery["least_similar"]] == [[{"path": 2}], [{"path": 0}], [{"path": 1}]]
    assert [item["heatmap"] for item in gallery["least_similar"]] == [None] * 3
    assert gallery["least_confident"][0]["heatmap"]
    assert gallery["mistakes"] == []
    without = build_gallery(lambda paths: [(photo, photo) for _ in paths], answers._replace(similarities=None))
    assert [*without] == ["mistakes", "least_confident"]
    assert {item["similarity"] for item in without["least_confident"]} == {None}


def test_training_photos_are_small_and_read_once(tmp_path, monkeypatch):
    for name in ("wide", "damaged"):
        PIL.Image.fromarray(np.full((300, 600, 3), 90, np.uint8)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "damaged.jpg").write_bytes((tmp_path / "damaged.jpg").read_bytes()[:700])
    asked = []

    def read(path, size, **options):
        asked.append(path)
        return read_image(path, size, **options)

    monkeypatch.setattr("finetune.data.images.read_image", read)
    row = [Nearest(str(tmp_path / f"{name}.jpg"), "cat", 0.5) for name in ("wide", "damaged", "gone")]
    show = build_finder([row, row], Configs())
    ((shown,), again) = show(0), show(1)
    assert again == [shown]
    assert (shown["path"], shown["label"], shown["similarity"]) == (str(tmp_path / "wide.jpg"), "cat", 0.5)
    content = base64.b64decode(shown["photo"].split(",")[1])
    assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).shape == (48, 96, 3)
    assert len(asked) == 3
    assert build_finder(None, Configs()) is None


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


def small_network():
    pixels = keras.Input((8, 8, 3))
    backbone = keras.Model(pixels, keras.layers.AveragePooling2D(4, name="blocks")(pixels), name="backbone")
    head = [keras.layers.Flatten(), keras.layers.Dense(1, name="logits"), keras.layers.Activation("sigmoid")]
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, keras.Sequential(head, name="classifier")(backbone(image)))
    model.get_layer("classifier").get_layer("logits").set_weights([np.full((12, 1), 0.01), np.zeros(1)])
    return model


@pytest.mark.parametrize(("size", "shown"), [((40, 400), (32, 320)), ((400, 40), (320, 32)), ((20, 30), (20, 30))])
def test_heatmaps_lie_over_photos_of_their_own_aspect_ratio(size, shown, tmp_path):
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[: size[0] // 2, size[1] // 2 :] = 200
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    grad_cam = build_grad_cam(small_network(), "hirescam", "")
    ((photo, heatmap),) = draw_pictures(
        grad_cam, (8, 8), "stretch", read_image, overlay_heatmap, [str(tmp_path / "photo.png")]
    )
    assert photo.shape == heatmap.shape == (*shown, 3)
    # Only the top right one of the four blocks that the network sees is not black.
    np.testing.assert_array_equal(heatmap, overlay_heatmap(photo, np.array([[0, 1], [0, 0]])))


def test_an_unsuitable_model_has_no_heatmaps_and_an_unknown_layer_is_refused(capsys):
    foreign = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    assert build_grad_cam(foreign, "gradcam", "") is None
    assert "have no heatmaps" in capsys.readouterr().out
    with pytest.raises(UserError, match="blocks"):
        build_grad_cam(small_network(), "gradcam", "block")
