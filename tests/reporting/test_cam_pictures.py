"""Grad-CAM pictures, and cam_output/index.html: self-contained, escaped, filtered and sorted."""

import dataclasses
import html
import json
import re
import urllib.parse

import cv2
import numpy as np
import pytest
from browsers import browse, check_policy, probe

from configs import CAM_COLORMAPS
from finetune.data.images import read_image
from finetune.evaluation.abstention import Abstention
from finetune.evaluation.decision import Decision
from finetune.evaluation.evaluation import Answers
from finetune.reporting.cam_pictures import (
    arrange,
    overlay_heatmap,
    place_heatmap,
    read_photo,
    write_caption,
    write_page,
)

# Names that would be code, or end an attribute, unless they are escaped.
CLASSES = ["<script>missing()</script>", "\"b' & c", "plain"]
# File names that a link must quote.
PICTURES = [
    "two words.png",
    "grün.png",
    "a#b.png",
    "who?.png",
    "100%25.png",
    'it\'s "so".png',
    "<b>&amp;.png",
    "a+b.png",
]
TRUE = [0, 0, 0, 1, 1, 1, 2, 2]
PREDICTED = [0, 1, 0, 1, 1, 2, 2, 0]
CONFIDENCES = [0.5, 0.9, 0.8, 0.45, 0.95, 0.6, 0.7, 0.55]


def make_page(folder, y_true, probabilities, multi_label=False, pictures=PICTURES, rule=None, similarities=None):
    for name in pictures:
        cv2.imencode(".png", np.full((20, 40, 3), 99, np.uint8))[1].tofile(folder / name)
    decision = Decision(CLASSES, multi_label, exact_match_threshold=0.5, abstention=rule)
    images = [f'<b onclick="missing()">{name}' for name in pictures]
    paths = [str(folder / name) for name in pictures]
    answers = Answers(images, y_true, probabilities, decision, similarities)
    write_page(str(folder), paths, answers, "<i>model</i>", "Believe them.")
    return folder / "index.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    probabilities = np.repeat((1 - np.array([CONFIDENCES]).T) / 2, 3, axis=1)
    probabilities[range(8), PREDICTED] = CONFIDENCES
    return make_page(tmp_path_factory.mktemp("single"), np.array(TRUE), probabilities)


@pytest.fixture(scope="module")
def multi_page(tmp_path_factory):
    truth = np.array([[1, 0, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]])
    probabilities = np.array([[0.9, 0.2, 0.6], [0.9, 0.7, 0.8], [0.1, 0.3, 0.4], [0.2, 0.4, 0.1]])
    return make_page(tmp_path_factory.mktemp("multi"), truth, probabilities, True, PICTURES[:4])


def test_page_loads_only_its_pictures_runs_only_its_script_and_shows_names_as_text(page):
    source = page.read_text(encoding="utf-8")
    check_policy(source, "'self' file:")
    sources = [html.unescape(one) for one in re.findall(r' src="([^"]+)"', source)]
    assert [urllib.parse.unquote(one) for one in sources] == PICTURES
    assert source.count('loading="lazy"') == len(PICTURES)
    assert not any(code in source for code in ("<script>missing", "<b onclick", "<i>"))
    assert "&lt;script&gt;missing()&lt;/script&gt;" in source


def read_cards(page):
    """Returns each card's data and texts: answer, confidence, predicted, true."""
    found = []
    for card in re.findall(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.S):
        answer, confidence = (re.search(f'data-{key}="([^"]*)"', card)[1] for key in ("answer", "confidence"))
        texts = re.findall(r"<dd>(.*?)(?: <span.*?)?</dd>", card)[:2]
        found.append((answer, round(float(confidence), 6), *map(html.unescape, texts)))
    return found


def test_cards_have_the_predictions_of_single_and_of_several_labels(page, multi_page):
    assert read_cards(page) == [
        ("right" if true == predicted else "wrong", confidence, CLASSES[predicted], CLASSES[true])
        for true, predicted, confidence in zip(TRUE, PREDICTED, CONFIDENCES, strict=True)
    ]
    first, second, third = CLASSES
    # The least certain labels: yes at 0.6, yes at 0.7, no at 0.4, no at 0.4.
    assert read_cards(multi_page) == [
        ("right", 0.6, f"{first}, {third}", f"{first}, {third}"),
        ("wrong", 0.7, f"{first}, {second}, {third}", f"{first}, {third}"),
        ("right", 0.6, "no label", "no label"),
        ("wrong", 0.6, "no label", second),
    ]


# In a browser


PROBE = """<script>
const choose = (id, value) => {
  const select = document.getElementById(id);
  select.value = value;
  select.dispatchEvent(new Event("change"));
};
const all = Array.from(document.querySelectorAll("article"));
const shown = () => Array.from(document.querySelectorAll("article"))
  .filter(card => card.getBoundingClientRect().height).map(card => all.indexOf(card));
const texts = id => Array.from(document.getElementById(id).options, option => option.textContent);
window.addEventListener("load", () => {
  const found = {steps: []};
  try {
    for (const [id, value] of STEPS) {
      choose(id, value);
      found.steps.push([shown(), document.getElementById("count").textContent]);
    }
    found.choices = [texts("true"), texts("predicted")];
    found.links = Array.from(document.querySelectorAll("article a"), link => link.href);
    found.focusable = Array.from(document.querySelectorAll("select, a")).every(one => one.tabIndex === 0);
    found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    found.widths = Array.from(document.images, image => image.naturalWidth);
    found.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  } catch (error) { found.error = String(error); }
  document.title = JSON.stringify(found);
});
</script></body>"""


def run_steps(page, steps, *flags):
    """Returns what `PROBE` finds on a page after each choice."""
    found = probe(page, page.parent, PROBE.replace("STEPS", json.dumps(steps)), *flags)
    assert (found["overflow"], {*found["widths"]}, found["focusable"]) == (0, {40}, True)
    return found


def test_browser_opens_the_page_without_an_error(page):
    document, console = browse(page)
    assert "8 of 8 pictures" in document
    assert console == []


def test_pictures_are_filtered_and_sorted_on_a_desktop(page):
    steps = [("true", "0"), ("answer", "wrong"), ("predicted", "2"), ("true", ""), ("answer", "right")]
    steps += [("predicted", ""), ("order", "-1"), ("answer", ""), ("order", "1"), ("order", "0")]
    found = run_steps(page, steps, "--window-size=1280,4000")
    assert found["steps"] == [
        [[0, 1, 2], "3 of 8 pictures"],
        [[1], "1 of 8 pictures"],
        [[], "0 of 8 pictures"],
        [[5], "1 of 8 pictures"],
        [[6], "1 of 8 pictures"],
        [[0, 2, 3, 4, 6], "5 of 8 pictures"],
        [[4, 2, 6, 0, 3], "5 of 8 pictures"],
        [[4, 1, 2, 6, 5, 7, 0, 3], "8 of 8 pictures"],
        [[3, 0, 7, 5, 6, 2, 1, 4], "8 of 8 pictures"],
        [[0, 1, 2, 3, 4, 5, 6, 7], "8 of 8 pictures"],
    ]
    assert found["choices"] == [["any", *CLASSES]] * 2
    assert found["dark"] is False
    assert [urllib.parse.unquote(link) for link in found["links"]] == [
        f"file://{page.parent}/{name}" for name in PICTURES
    ]


def test_pictures_of_several_labels_are_filtered_on_a_dark_phone(multi_page):
    steps = [("true", "0"), ("true", "-1"), ("true", ""), ("predicted", "-1"), ("answer", "wrong")]
    found = run_steps(multi_page, steps, "--window-size=390,4000", "--force-dark-mode")
    assert [shown for shown, _ in found["steps"]] == [[0, 1], [2], [0, 1, 2, 3], [2, 3], [3]]
    assert found["choices"] == [["any", "no label", *CLASSES]] * 2
    assert found["dark"] is True


# Of three classes, the certainty of 0.5 is log(0.5 / 0.5), of 0.9 log(0.9 / 0.1), and so on.
RULE = Abstention(0.05, [0.75], 0.01, 0.0, [0.0, 1.0, 0.0, 1.0], 100)
SIMILARITIES = np.array([1, 1, -2, 1, -4, 1, 1, 1.0])


def make_answering_page(folder, rule, similarities=None):
    probabilities = np.repeat((1 - np.array([CONFIDENCES]).T) / 2, 3, axis=1)
    probabilities[range(8), PREDICTED] = CONFIDENCES
    return make_page(folder, np.array(TRUE), probabilities, rule=rule, similarities=similarities)


def test_pictures_are_filtered_by_answer(tmp_path):
    page = make_answering_page(tmp_path, RULE, SIMILARITIES)
    steps = [("given", "answered"), ("given", "unsure"), ("answer", "wrong"), ("given", "unknown"), ("answer", "")]
    found = run_steps(page, [*steps, ("given", "")], "--window-size=390,6000")
    # Answered from 0.75 on: 0.9, and 0.8 and 0.95, which are unknown: log(4) - 2 and log(19) - 4 are below 0.
    assert [shown for shown, _ in found["steps"]] == [[1], [0, 3, 5, 6, 7], [5, 7], [], [2, 4], [*range(8)]]
    source = page.read_text(encoding="utf-8")
    assert re.findall(r"<dt>Answer</dt><dd>(\w+)</dd>", source) == [
        "unsure",
        "unknown",
        "unsure",
        "unknown",
        *["unsure"] * 3,
    ]


@pytest.mark.parametrize(
    ("rule", "similarities", "names"),
    [
        (None, None, []),
        (Abstention(), None, []),
        # Without a reference no photo is known to be unknown.
        (RULE, None, ["answered", "unsure"]),
        (dataclasses.replace(RULE, max_error=0.0, thresholds=None), SIMILARITIES, ["answered", "unknown"]),
        (dataclasses.replace(RULE, max_error=0.0, thresholds=None), None, []),
    ],
    ids=["no rule", "no promise", "no reference", "unknown alone", "nothing to tell"],
)
def test_the_filter_has_the_answers_between_which_the_rule_tells(tmp_path, rule, similarities, names):
    source = make_answering_page(tmp_path, rule, similarities).read_text(encoding="utf-8")
    choice = re.findall(r'<select id="given">(.*?)</select>', source, re.S)
    assert len(choice) == bool(names)
    assert re.findall(r'value="(\w+)"', "".join(choice)) == names
    assert source.count(" data-given=") == 8 * bool(names)
    if not names:
        assert "8 of 8 pictures" in browse(tmp_path / "index.html")[0]


@pytest.mark.parametrize("colormap", CAM_COLORMAPS)
def test_overlay_blends_the_photo_with_opencvs_colormap(colormap):
    heatmap = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    original = image.copy()
    code = getattr(cv2, f"COLORMAP_{colormap.upper()}")
    colours = cv2.applyColorMap((255 * heatmap).astype(np.uint8), code)[..., ::-1]
    np.testing.assert_array_equal(overlay_heatmap(image, heatmap, 1, colormap), colours)
    np.testing.assert_array_equal(overlay_heatmap(image, heatmap, 0, colormap), image)
    np.testing.assert_allclose(overlay_heatmap(image, heatmap, 0.5, colormap), colours / 2 + image / 2, atol=0.51)
    np.testing.assert_array_equal(image, original)


@pytest.mark.parametrize("heatmap_shape", [(1, 1), (50, 40)])
def test_overlay_takes_a_heatmap_of_any_size(heatmap_shape):
    image = np.full((6, 8, 3), 100, np.uint8)
    # The default is jet, which is red at 1, with an opacity of 0.4.
    overlay = overlay_heatmap(image, np.ones(heatmap_shape))
    assert (overlay.dtype, overlay.shape) == (np.uint8, image.shape)
    np.testing.assert_allclose(overlay, np.broadcast_to((0.6 * 100 + 0.4 * 128, 60, 60), image.shape), atol=1)


def test_a_heatmap_covers_the_whole_photo_of_any_aspect_ratio():
    heatmap = np.array([[0, 1], [0, 0]], np.float32)
    placed = place_heatmap(heatmap, (100, 300))
    assert placed.shape == (100, 300)
    # The values are those of the centres of the four quarters, with linear interpolation between them.
    np.testing.assert_allclose(placed[[0, 24, 75], :][:, [0, 299]], [[0, 1], [0, 1], [0, 0]], atol=0.01)
    np.testing.assert_allclose(placed[0, [75, 150, 225]], [0, 0.5, 1], atol=0.01)
    np.testing.assert_allclose(placed[50, 299], 0.5, atol=0.01)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 60), (160, 96)),
        ((160, 20), (160, 20)),
        ((300, 640), (300, 640)),
        ((641, 640), (640, 639)),
        ((1000, 3000), (213, 640)),
        ((1, 3000), (1, 640)),
    ],
)
def test_photos_keep_their_aspect_ratio_within_the_largest_size(size, expected, tmp_path):
    path = str(tmp_path / "photo.png")
    cv2.imwrite(path, np.zeros((*size, 3), np.uint8))
    assert read_photo(path, 640, read_image).shape == (*expected, 3)


def test_a_large_jpeg_is_decoded_at_a_reduced_size_with_the_same_result(tmp_path):
    path, ramp = str(tmp_path / "photo.jpg"), np.linspace(0, 255, 2000)
    cv2.imwrite(path, np.broadcast_to(ramp[None, :, None], (1500, 2000, 3)).astype(np.uint8))
    photo = read_photo(path, 400, read_image)
    assert photo.shape == (300, 400, 3)
    expected = cv2.resize(cv2.imread(path), (400, 300), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(photo.astype(int), expected, atol=3)


@pytest.mark.parametrize(("number", "columns", "rows"), [(1, 1, 1), (6, 6, 1), (7, 6, 2), (50, 7, 8)])
def test_many_panels_are_arranged_in_rows(number, columns, rows):
    photos = [np.full((16, 200, 3), value, np.uint8) for value in range(number)]
    picture = arrange([(photo, "") for photo in photos])
    height = picture.shape[0] // rows
    assert picture.shape == (height * rows, columns * 200, 3)
    for value in range(columns * rows):
        top, left = height * (value // columns), 200 * (value % columns)
        panel = picture[top : top + 16, left : left + 200]
        assert (panel == (value if value < number else 255)).all()


def test_images_of_different_sizes_are_centred_in_cells_of_one_size():
    sizes = [(100, 300), (40, 200), (10, 10)]
    images = [np.full((*size, 3), 40 * position, np.uint8) for position, size in enumerate(sizes)]
    picture = arrange([(image, "") for image in images])
    assert picture.shape[1] == 900
    for position, (height, width) in enumerate(sizes):
        cell = picture[:, 300 * position : 300 * (position + 1)]
        left = (300 - width) // 2
        assert (cell[:height, left : left + width] == 40 * position).all()
        assert (cell[..., 0] == 255).sum() == cell.shape[0] * 300 - height * width
    picture = arrange([(np.zeros((640, 6, 3), np.uint8), "0.98 sunflowers")])
    # A narrow image gets room for its caption.
    assert picture.shape[1] == 160
    assert (picture[640:, 80:].min(axis=(1, 2)) < 128).any()


@pytest.mark.parametrize("width", [8, 96, 640])
@pytest.mark.parametrize("caption", ["ruža poľná 0.98", "花", "", "W" * 300])
def test_caption_is_in_a_bar_below_the_unchanged_image(width, caption):
    image = np.random.default_rng(0).integers(0, 256, (40, width, 3), np.uint8)
    captioned = write_caption(image, caption)
    assert captioned.dtype == np.uint8
    assert captioned.shape[0] > 40
    assert captioned.shape[1:] == (width, 3)
    np.testing.assert_array_equal(captioned[:40], image)
    assert (captioned[40:].min() < 255) == bool(caption)
    if len(caption) > width / 3 > 8:
        # Shortened to fit.
        assert (captioned[40:, -1] == 255).all()
        assert (captioned[40:, width // 2 :] < 128).any()


def test_caption_distinguishes_latin_greek_and_cyrillic_letters_and_normalises_others():
    image = np.zeros((40, 200, 3), np.uint8)
    for name in ("ruža", "Äpfel", "λεμόνι", "яблоко"):
        characters = {*name, "花", "?"}
        assert len({write_caption(image, one).tobytes() for one in characters}) == len(characters)
    # An accent apart from its letter, and control characters.
    same = {"ru\u007a\u030ca": "ru\u017ea"} | dict.fromkeys(("a\nb", "a\tb", "a\0b", "a\ud800b"), "a?b")
    for text, shown in same.items():
        np.testing.assert_array_equal(write_caption(image, text), write_caption(image, shown))
