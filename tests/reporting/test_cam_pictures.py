"""cam_output/index.html: offline, escaped, filtered, sorted, its links lead to pictures of whatever name."""

import base64
import hashlib
import html
import json
import re
import urllib.parse

import cv2
import numpy as np
import pytest
from browsers import browse

from configs import CAM_COLORMAPS
from finetune.data.images import read_image
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

# Names that would be code, or end an attribute, where they are not escaped.
CLASSES = ["<script>missing()</script>", "\"b' & c", "plain"]
# Names of files that a link has to quote.
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


def make_page(folder, y_true, probabilities, multi_label=False, pictures=PICTURES):
    for name in pictures:
        cv2.imencode(".png", np.full((20, 40, 3), 99, np.uint8))[1].tofile(folder / name)
    decision = Decision(CLASSES, multi_label, exact_match_threshold=0.5)
    images = [f'<b onclick="missing()">{name}' for name in pictures]
    paths = [str(folder / name) for name in pictures]
    write_page(str(folder), paths, Answers(images, y_true, probabilities, decision), "<i>model</i>", "Believe them.")
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


def test_page_loads_nothing_but_the_pictures_beside_it_and_runs_its_own_script_alone(page):
    source = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|<form", source)
    sources = [html.unescape(one) for one in re.findall(r' src="([^"]+)"', source)]
    assert [urllib.parse.unquote(one) for one in sources] == PICTURES
    assert source.count('loading="lazy"') == len(PICTURES)
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert policy in source


def test_names_that_would_be_code_are_text(page):
    source = page.read_text(encoding="utf-8")
    assert "<script>missing" not in source
    assert "<b onclick" not in source
    assert "<i>" not in source
    assert "&lt;script&gt;missing()&lt;/script&gt;" in source


def read_cards(page):
    """Returns of each card its answer and its confidence, and the texts that people read: predicted, true."""
    found = []
    for card in re.findall(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.S):
        answer, confidence = (re.search(f'data-{key}="([^"]*)"', card)[1] for key in ("answer", "confidence"))
        texts = re.findall(r"<dd>(.*?)(?: <span.*?)?</dd>", card)[:2]
        found.append((answer, round(float(confidence), 6), *map(html.unescape, texts)))
    return found


def test_cards_tell_each_answer(page):
    assert read_cards(page) == [
        ("right" if true == predicted else "wrong", confidence, CLASSES[predicted], CLASSES[true])
        for true, predicted, confidence in zip(TRUE, PREDICTED, CONFIDENCES, strict=True)
    ]


def test_of_several_labels_right_is_exactly_those_above_the_threshold(multi_page):
    first, second, third = CLASSES
    # The least certain answers: yes at 0.6, yes at 0.7, no at 0.4, no at 0.4.
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


def probe(page, steps, *flags):
    """Opens a copy of a page, beside its pictures, with a script of the test in it; returns what that found."""
    # What the script waits for would be cut off by the end of loading; pictures that are not lazy load before that.
    source = page.read_text(encoding="utf-8").replace(' loading="lazy"', "")
    loosened = re.sub(r"script-src [^;]+", "script-src 'unsafe-inline'", source, count=1)
    script = PROBE.replace("STEPS", json.dumps(steps))
    (page.parent / "probed.html").write_text(loosened.replace("</body>", script), encoding="utf-8")
    document, console = browse(page.parent / "probed.html", *flags)
    assert console == []
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", document, re.DOTALL)[1]))
    assert "error" not in found
    assert (found["overflow"], {*found["widths"]}, found["focusable"]) == (0, {40}, True)
    return found


def test_browser_opens_the_page_without_an_error(page):
    document, console = browse(page)
    assert "8 of 8 pictures" in document
    assert console == []


def test_pictures_are_filtered_and_sorted_on_a_desktop(page):
    steps = [("true", "0"), ("answer", "wrong"), ("predicted", "2"), ("true", ""), ("answer", "right")]
    steps += [("predicted", ""), ("order", "-1"), ("answer", ""), ("order", "1"), ("order", "0")]
    found = probe(page, steps, "--window-size=1280,4000")
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
    found = probe(multi_page, steps, "--window-size=390,4000", "--force-dark-mode")
    assert [shown for shown, _ in found["steps"]] == [[0, 1], [2], [0, 1, 2, 3], [2, 3], [3]]
    assert found["choices"] == [["any", "no label", *CLASSES]] * 2
    assert found["dark"] is True


def test_overlay_is_blue_at_0_and_red_at_1():
    image = np.full((6, 8, 3), 100, np.uint8)
    for value, colour in [(0, (0, 0, 128)), (1, (128, 0, 0))]:
        overlay = overlay_heatmap(image, np.full((2, 3), value, np.float32))
        assert overlay.dtype == np.uint8
        assert overlay.shape == image.shape
        np.testing.assert_allclose(overlay, np.broadcast_to(0.6 * 100 + 0.4 * np.array(colour), image.shape), atol=1)


@pytest.mark.parametrize("heatmap_shape", [(1, 1), (2, 5), (6, 8), (50, 40)])
def test_overlay_takes_a_heatmap_of_any_size_and_type(heatmap_shape):
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    original = image.copy()
    assert overlay_heatmap(image, np.random.default_rng(0).random(heatmap_shape)).shape == (6, 8, 3)
    np.testing.assert_array_equal(image, original)


def test_overlay_puts_the_heat_where_it_belongs():
    heatmap = np.zeros((2, 3), np.float32)
    heatmap[0, 2] = 1
    overlay = overlay_heatmap(np.full((20, 30, 3), 128, np.uint8), heatmap).astype(int)
    redness = overlay[..., 0] - overlay[..., 2]
    assert redness[0, -1] > 0
    assert redness[0, 0] < 0
    assert redness[-1, -1] < 0


def test_a_heatmap_covers_the_whole_photo_whatever_its_aspect_ratio():
    heatmap = np.array([[0, 1], [0, 0]], np.float32)
    placed = place_heatmap(heatmap, (100, 300))
    assert placed.shape == (100, 300)
    # The middles of the four quarters are those of the values; between them it rises evenly.
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
def test_photos_keep_their_aspect_ratio_and_are_no_larger_than_wanted(size, expected, tmp_path):
    path = str(tmp_path / "photo.png")
    cv2.imwrite(path, np.zeros((*size, 3), np.uint8))
    assert read_photo(path, 640, read_image).shape == (*expected, 3)


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size_with_the_same_result(tmp_path):
    path, ramp = str(tmp_path / "photo.jpg"), np.linspace(0, 255, 2000)
    cv2.imwrite(path, np.broadcast_to(ramp[None, :, None], (1500, 2000, 3)).astype(np.uint8))
    photo = read_photo(path, 400, read_image)
    assert photo.shape == (300, 400, 3)
    expected = cv2.resize(cv2.imread(path), (400, 300), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(photo.astype(int), expected, atol=3)


def test_images_of_different_sizes_stand_in_cells_of_one_size():
    sizes = [(100, 300), (40, 200), (10, 10)]
    images = [np.full((*size, 3), 40 * position, np.uint8) for position, size in enumerate(sizes)]
    picture = arrange([(image, "") for image in images])
    assert picture.shape[1] == 900
    for position, (height, width) in enumerate(sizes):
        cell = picture[:, 300 * position : 300 * (position + 1)]
        left = (300 - width) // 2
        assert (cell[:height, left : left + width] == 40 * position).all()
        assert (cell[..., 0] == 255).sum() == cell.shape[0] * 300 - height * width


def test_a_narrow_image_has_room_for_its_caption():
    picture = arrange([(np.zeros((640, 6, 3), np.uint8), "0.98 sunflowers")])
    assert picture.shape[1] == 160
    assert (picture[640:, 80:].min(axis=(1, 2)) < 128).any()


@pytest.mark.parametrize("width", [8, 32, 96, 640])
@pytest.mark.parametrize("caption", ["rose 0.98", "ruža poľná 0.98", "花", "", "a very long class name " * 20])
def test_caption_stands_in_a_bar_below_the_unchanged_image(width, caption):
    image = np.random.default_rng(0).integers(0, 256, (40, width, 3), np.uint8)
    captioned = write_caption(image, caption)
    assert captioned.dtype == np.uint8
    assert captioned.shape[0] > 40
    assert captioned.shape[1:] == (width, 3)
    np.testing.assert_array_equal(captioned[:40], image)
    assert (captioned[40:].min() < 255) == bool(caption)


@pytest.mark.parametrize("width", [96, 224, 448])
def test_caption_is_shortened_to_what_fits(width):
    captioned = write_caption(np.zeros((40, width, 3), np.uint8), "W" * 300)
    assert (captioned[40:, -1] == 255).all()
    assert (captioned[40:, width // 2 :] < 128).any()


@pytest.mark.parametrize("name", ["ruža", "Äpfel", "λεμόνι", "яблоко"])
def test_caption_shows_latin_greek_and_cyrillic_letters(name):
    image = np.zeros((40, 200, 3), np.uint8)
    box, question = write_caption(image, "花"), write_caption(image, "?")
    pictures = [write_caption(image, character) for character in dict.fromkeys(name)] + [box, question]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_caption_reads_the_same_whether_an_accent_is_apart_or_not():
    image = np.zeros((40, 200, 3), np.uint8)
    np.testing.assert_array_equal(write_caption(image, "ru\u007a\u030ca"), write_caption(image, "ru\u017ea"))


@pytest.mark.parametrize("control", ["\n", "\r", "\t", "\0", "\ud800"], ids=ascii)
def test_caption_shows_control_characters_as_question_marks(control):
    image = np.zeros((40, 200, 3), np.uint8)
    np.testing.assert_array_equal(write_caption(image, f"a{control}b"), write_caption(image, "a?b"))


@pytest.mark.parametrize("colormap", CAM_COLORMAPS)
def test_overlay_of_every_colormap_is_opencvs(colormap):
    heatmap = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    code = {name: getattr(cv2, f"COLORMAP_{name.upper()}") for name in CAM_COLORMAPS}[colormap]
    expected = cv2.applyColorMap((255 * heatmap).astype(np.uint8), code)[..., ::-1]
    np.testing.assert_array_equal(overlay_heatmap(image, heatmap, 1, colormap), expected)
    np.testing.assert_array_equal(overlay_heatmap(image, heatmap, 0, colormap), image)
    half = expected / 2 + image / 2
    np.testing.assert_allclose(overlay_heatmap(image, heatmap, 0.5, colormap), half, atol=0.51)
