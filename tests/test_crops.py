"""Random crops of a picture at its own size."""

import numpy as np
import pytest
from PIL import Image

from finetune.crops import draw_crop, enlarge_for_crops
from generator import AugmentedImageSequence


@pytest.mark.parametrize("size", [(240, 320), (100, 100), (333, 250)])
def test_crops_keep_to_their_areas_and_ratios_and_reach_everywhere(size):
    rng = np.random.default_rng(0)
    seen, areas = np.zeros(size, int), []
    for _ in range(2000):
        rows, columns = draw_crop(size, (0.6, 1.0), rng)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert min(rows.start, columns.start) >= 0
        assert rows.stop <= size[0]
        assert columns.stop <= size[1]
        assert 0.74 <= width / height <= 1.35
        areas.append(height * width / (size[0] * size[1]))
        seen[rows, columns] += 1
    # Of what is drawn between 0.6 and 1, the largest often do not fit in an allowed ratio.
    assert 0.595 <= min(areas) < 0.61
    assert 0.7 < np.mean(areas) < 0.8
    assert seen.min() > 0


def test_of_a_long_strip_the_middle_is_taken():
    rows, columns = draw_crop((10, 1000), (0.9, 1.0), np.random.default_rng(0))
    assert (rows, columns) == (slice(0, 10), slice(493, 506))


def test_the_whole_is_the_only_crop_of_one_pixel():
    assert draw_crop((1, 1), (0.5, 1.0), np.random.default_rng(0)) == (slice(0, 1), slice(0, 1))


def test_the_smallest_crop_of_an_enlarged_picture_has_the_size():
    height, width = enlarge_for_crops((224, 224), (0.25, 1.0))
    assert min((height * width * 0.25 / ratio) ** 0.5 for ratio in (3 / 4, 4 / 3)) >= 224


@pytest.fixture
def ramp(tmp_path):
    """A picture whose red tells the column and whose green the row."""
    picture = np.zeros((200, 240, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.arange(240), np.arange(200)[:, None]
    Image.fromarray(picture).save(tmp_path / "ramp.png")
    return [str(tmp_path / "ramp.png")] * 6


def sequence_of(paths, **options):
    values = {"image_size": (20, 20), "batch_size": 3, "shuffle": True, "crop_area": (0.3, 0.5)} | options
    return AugmentedImageSequence(paths, np.zeros(len(paths), np.int32), **values)


def test_training_images_are_crops_that_follow_from_seed_and_epoch_alone(ramp):
    sequence = sequence_of(ramp)
    first = np.concatenate([sequence[0][0], sequence[1][0]])
    spans = np.stack(
        [first[..., channel].max(axis=(1, 2)) - first[..., channel].min(axis=(1, 2)) for channel in (0, 1)]
    )
    assert len(np.unique(first[:, 0, 0, 0])) > 1
    areas = spans.prod(axis=0, dtype=float) / (240 * 200)
    assert 0.2 < areas.min() < areas.max() < 0.5
    np.testing.assert_array_equal(sequence_of(ramp, workers=3)[1][0], sequence[1][0])
    sequence.epoch = 1
    assert (sequence[0][0] != first[:3]).any()


def test_images_that_are_not_trained_on_are_shown_whole(ramp):
    whole = sequence_of(ramp, shuffle=False)[0][0]
    assert whole[..., 0].max() - whole[..., 0].min() > 220
