"""Pictures of heatmaps and captions."""

import cv2
import numpy as np
import pytest

from configs import CAM_COLORMAPS
from finetune.cam_pictures import overlay_heatmap, write_caption


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
