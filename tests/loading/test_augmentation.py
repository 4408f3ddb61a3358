"""The warp against exact means over the area of each pixel, and fused augmenters against imgaug."""

import numpy as np
import pytest
import skimage.data
from augmented import smooth_photos
from imgaug import Keypoint, KeypointsOnImage
from imgaug import augmenters as iaa
from PIL import Image, ImageEnhance

from finetune.data.images import resize_image
from finetune.loading.augmentation import FusedAugmenter, Saturation, draw_maps, draw_values, resample

ASTRONAUT = skimage.data.astronaut()


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.4])
def test_saturation_is_that_of_pillow(factor):
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    expected = np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor)).astype(int)
    found = Saturation(factor)(images=image[None])[0]
    assert found.dtype == np.uint8
    # Pillow rounds the grey first.
    assert np.abs(found - expected).max() <= 1


def test_each_image_has_a_factor_of_its_own_that_follows_from_the_seed():
    images = np.random.default_rng(0).integers(0, 256, (1, 30, 40, 3), np.uint8).repeat(3, axis=0)
    augmenter = Saturation((0.2, 0.9))
    augmenter.seed_(4)
    first = augmenter(images=images.copy())
    assert (first[0] != first[1]).any()
    augmenter.seed_(4)
    np.testing.assert_array_equal(augmenter(images=images.copy()), first)


def affine(angle=0.0, zoom=1.0, shift=(0.0, 0.0), side=96) -> np.ndarray:
    """From the result to the picture, around the middle of a square of `side`."""
    turn = np.deg2rad(angle)
    linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / zoom
    middle = np.full(2, side / 2)
    return np.column_stack([linear, middle - linear @ middle + shift])


def mirror_index(positions: np.ndarray, side: int) -> np.ndarray:
    """Mirrors pixels beyond the border: ... 2 1 0 1 2 ..."""
    period = 2 * (side - 1)
    folded = np.abs(positions) % period
    return np.where(folded >= side, period - folded, folded)


def interpolate(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear in float64, at places where the first pixel is from 0 to 1."""
    x, y = x - 0.5, y - 0.5
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    value = 0
    for dx in (0, 1):
        for dy in (0, 1):
            weight = np.abs(1 - dx - (x - left)) * np.abs(1 - dy - (y - top))
            rows, columns = mirror_index(top + dy, picture.shape[0]), mirror_index(left + dx, picture.shape[1])
            value = value + weight[..., None] * picture[rows, columns].astype(float)
    return value


def draw_exactly(picture: np.ndarray, matrix: np.ndarray, side: int, points: int) -> np.ndarray:
    """The mean of `points` by `points` places in each pixel of the result."""
    places = (np.arange(side * points) + 0.5) / points
    x, y = np.meshgrid(places, places)
    source = np.einsum("ij,jkl->ikl", matrix, np.stack([x, y, np.ones_like(x)]))
    found = interpolate(picture, *(source * np.array(picture.shape[1::-1])[:, None, None] / side))
    return found.reshape(side, points, side, points, 3).mean(axis=(1, 3))


def draw(picture: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
    target = np.empty((side, side, 3), np.uint8)
    resample(picture, matrix, target)
    return target


@pytest.mark.parametrize("matrix", [affine(), affine(20), affine(-7, 1.3, (9, -4)), affine(45, 0.85, (-30, 12))])
@pytest.mark.parametrize("shape", [(110, 140), (33, 120)])
def test_less_than_a_half_is_bilinear_in_the_picture_itself(matrix, shape):
    picture = ASTRONAUT[100 : 100 + shape[0], 100 : 100 + shape[1]]
    difference = np.abs(draw(picture, matrix, 96) - draw_exactly(picture, matrix, 96, 1))
    # OpenCV knows a place to a 32nd of a pixel.
    assert difference.mean() < 1
    assert np.quantile(difference, 0.999) < 8


def find_inside(matrix: np.ndarray, side: int) -> np.ndarray:
    """Returns which pixels of the result come from inside the picture, not from its mirrored border."""
    x, y = np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5)
    source = np.einsum("ij,jkl->ikl", matrix, np.stack([x, y, np.ones_like(x)]))
    return ((source > 2) & (source < side - 2)).all(axis=0)


@pytest.mark.parametrize("sides", [(50, 240), (256, 256), (215, 194), (80, 80), (50, 60)])
def test_it_is_closer_to_the_exact_picture_than_resizing_first(sides):
    picture = resize_image(ASTRONAUT, sides)
    once, twice = [], []
    for matrix in (affine(12, 1.15, (3, 5), 48), affine(-15, 0.9, side=48), affine(4, 1.05, (-6, 2), 48)):
        exact, inside = draw_exactly(picture, matrix, 48, 12), find_inside(matrix, 48)
        for found, source in ((once, picture), (twice, resize_image(picture, (48, 48)))):
            found.append(np.square(draw(source, matrix, 48) - exact)[inside].mean())
    assert np.mean(once) < 0.97 * np.mean(twice)
    assert np.sqrt(np.max(once)) < 12


def test_without_change_it_is_the_picture_itself():
    picture = ASTRONAUT[:96, :96]
    np.testing.assert_array_equal(draw(picture, affine(), 96), picture)
    np.testing.assert_array_equal(draw(picture, np.array([[-1.0, 0, 96], [0, 1, 0]]), 96), picture[:, ::-1])


def test_whole_blocks_are_averaged():
    picture = ASTRONAUT[:192, :288]
    blocks = picture.reshape(96, 2, 96, 3, 3).mean(axis=(1, 3))
    assert np.abs(draw(picture, affine(), 96) - blocks).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("shape", [(1, 1), (400, 1), (3, 1000)])
def test_pictures_of_any_shape_are_drawn(shape):
    picture = np.full((*shape, 3), 77, np.uint8)
    assert (draw(picture, affine(10, 0.9), 96) == 77).all()


def default_warp(**options) -> iaa.Augmenter:
    return iaa.Affine(**{"rotate": (-30, 30), "scale": (0.8, 1.3), "order": 1, "mode": "reflect"} | options)


PIPELINES = {
    "mirror and warp": lambda: [iaa.Fliplr(0.5), default_warp(shear=(-8, 8), translate_percent=(-0.1, 0.1))],
    "upside down": lambda: [iaa.Flipud(0.5), iaa.Fliplr(0.5)],
    "far beyond the border": lambda: [default_warp(scale=(0.55, 0.8), translate_percent=(-0.7, 0.7))],
    "values": lambda: [iaa.Multiply((0.7, 1.4), per_channel=0.5), iaa.LinearContrast((0.6, 1.5)), iaa.Add((-30, 30))],
    "gamma": lambda: [iaa.GammaContrast((0.5, 2.0), per_channel=True), iaa.Invert(0.3)],
    "between others": lambda: [iaa.Fliplr(0.5), iaa.GaussianBlur((0, 2)), default_warp(), iaa.Multiply((0.5, 1.5))],
    "other border": lambda: [default_warp(mode="constant", cval=255), iaa.Fliplr(0.5)],
    "now and then": lambda: [iaa.Sometimes(0.5, iaa.Fliplr(1.0)), iaa.Add((-20, 20))],
}


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_fusing_changes_no_image_by_more_than_rounding(pipeline):
    images = smooth_photos(12)
    plain, fused = iaa.Sequential(pipeline()), FusedAugmenter(pipeline())
    plain.seed_(11)
    fused.seed_(11)
    expected, found = plain(images=images).astype(int), fused(images).astype(int)
    assert np.abs(expected - images).mean() > 5
    assert np.abs(found - expected).mean() < 0.3
    assert np.quantile(np.abs(found - expected), 0.999) <= 3


def test_two_neighbouring_warps_become_one():
    # By 45 degrees and back: two warps would blur a checkerboard and lose its corners.
    checks = np.kron(np.indices((12, 12)).sum(axis=0) % 2, np.ones((4, 4))).astype(np.uint8) * 200
    images = np.repeat(checks[None, ..., None], 3, axis=-1)
    there_and_back = [default_warp(rotate=angle, scale=1.0) for angle in (45, -45)]
    np.testing.assert_allclose(FusedAugmenter(there_and_back)(images).astype(int), images, atol=1)


HEIGHT, WIDTH, NUMBER = 60, 90, 24
GEOMETRIC = {
    "mirror": lambda: [iaa.Fliplr(0.5)],
    "upside down": lambda: [iaa.Flipud(0.5), iaa.Fliplr(0.3)],
    "turn": lambda: [iaa.Affine(rotate=(-40, 40))],
    "single numbers": lambda: [iaa.Affine(scale=1.3, shear=9, rotate=-10, translate_px=4)],
    "shear of both": lambda: [iaa.Affine(shear={"x": (-20, 20), "y": (-9, 9)})],
    "each side its own": lambda: [iaa.Affine(scale={"x": (0.5, 1.5), "y": (0.9, 2)}, translate_px={"x": (-9, 9)})],
    "share of the sides": lambda: [iaa.Affine(translate_percent={"x": (-0.3, 0.3), "y": (0, 0.2)})],
    "choice": lambda: [iaa.Affine(rotate=[0, 90, 180], shear=(-5, 5))],
    "subclasses": lambda: [iaa.Rotate((-30, 30)), iaa.ScaleX((0.5, 1.5)), iaa.TranslateY(px=(-9, 9))],
    "all of them": lambda: [iaa.Fliplr(0.5), iaa.Affine(rotate=(-15, 15), scale=(0.9, 1.2)), iaa.Affine(shear=(-6, 6))],
}
BY_VALUE = {
    "multiply": lambda: [iaa.Multiply((0.5, 1.7))],
    "multiply each channel": lambda: [iaa.Multiply((0.5, 1.7), per_channel=0.5)],
    "contrast": lambda: [iaa.LinearContrast((0.3, 2))],
    "contrast of each channel": lambda: [iaa.LinearContrast((0.3, 2), per_channel=0.5)],
    "one number": lambda: [iaa.Multiply(1.25), iaa.LinearContrast(0.75)],
    "others between": lambda: [iaa.Multiply((0.5, 1.5)), iaa.GammaContrast((0.5, 2)), iaa.LinearContrast((0.6, 1.4))],
}


@pytest.mark.parametrize("make", GEOMETRIC.values(), ids=GEOMETRIC)
def test_maps_take_points_where_imgaug_takes_them(make):
    points = [Keypoint(0, 0), Keypoint(WIDTH, 0), Keypoint(20, 50)]
    imgaugs, ours = iaa.Sequential(make()), iaa.Sequential(make())
    for augmenters in (imgaugs, ours):
        augmenters.seed_(5)
    before = [KeypointsOnImage(points, shape=(HEIGHT, WIDTH, 3))] * NUMBER
    moved = np.stack([found.to_xy_array() for found in imgaugs.augment_keypoints(before)]).astype(float)
    maps = draw_maps(ours, NUMBER, HEIGHT, WIDTH)
    back = np.einsum("nij,npj->npi", maps, np.concatenate([moved, np.ones((NUMBER, 3, 1))], axis=2))
    np.testing.assert_allclose(back, np.broadcast_to(before[0].to_xy_array(), back.shape), atol=2e-3)


@pytest.mark.parametrize("make", BY_VALUE.values(), ids=BY_VALUE)
def test_values_are_those_of_imgaug(make):
    imgaugs, ours = iaa.Sequential(make()), iaa.Sequential(make())
    for augmenters in (imgaugs, ours):
        augmenters.seed_(5)
    every_value = np.tile(np.arange(256, dtype=np.uint8)[:, None], (NUMBER, 1, 1, 3))
    expected = imgaugs(images=every_value)[:, 0].astype(int)
    found = draw_values(ours, NUMBER).astype(int)
    assert np.abs(found - expected).max() <= 1
    # Where a product is half-way between two values either may come out.
    assert (found != expected).mean() < 0.002


def test_deactivated_and_deterministic_augmenters():
    off = iaa.Affine(rotate=30)
    off.activated = False
    np.testing.assert_array_equal(draw_maps([off], 2, HEIGHT, WIDTH), np.tile(np.eye(3)[:2], (2, 1, 1)))
    same = iaa.Affine(rotate=(-30, 30)).to_deterministic()
    np.testing.assert_array_equal(draw_maps([same], 3, HEIGHT, WIDTH), draw_maps([same], 3, HEIGHT, WIDTH))
