"""Pictures of heatmaps and captions."""

import cv2
import numpy as np
import pytest

from configs import CAM_COLORMAPS
from finetune.cam_pictures import arrange, overlay_heatmap, place_heatmap, read_photo, write_caption
from finetune.images import read_image


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
