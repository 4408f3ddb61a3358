"""Faithfulness of maps: parts of images, the effect of removing them, its size and the verdict."""

import cv2
import numpy as np
import pytest
from drawn_runs import CLASS_NAMES

from finetune.evaluation.decision import Decision
from finetune.evaluation.explaining import (
    CHOOSERS,
    REMOVALS,
    Removal,
    choose_removal,
    describe_faithfulness,
    fill_part,
    find_highlighted,
    find_parts,
    predict_without,
    summarise_faithfulness,
)

BLUR_A_FIFTH = REMOVALS[0]
SIDE, SPOT = 60, 12


# Parts of images


def test_the_random_part_is_the_highlighted_one_moved_around_the_edges():
    heatmaps = np.random.default_rng(0).random((40, 4, 5))
    highlighted, moved = find_parts(heatmaps, (20, 20), 0.2, np.random.default_rng(1))
    for part, other in zip(highlighted, moved, strict=True):
        shifts = [shift for shift in np.ndindex(20, 20) if (np.roll(part, shift, axis=(0, 1)) == other).all()]
        assert shifts
    # Every pixel is equally likely to be in it.
    assert 0 < moved.mean(axis=0).min() < 0.2 < moved.mean(axis=0).max() < 0.5


@pytest.mark.parametrize("image_size", [(7, 7), (224, 160)])
@pytest.mark.parametrize(("heatmap_size", "share"), [((1, 1), 0.2), ((4, 5), 0.05), ((40, 60), 0.2)])
def test_exactly_the_share_is_highlighted_where_the_heatmap_is_highest(image_size, heatmap_size, share):
    rng = np.random.default_rng(0)
    heatmap = rng.random(heatmap_size).astype(np.float32)
    mask = find_highlighted(heatmap, image_size, share, rng)
    assert mask.shape == image_size
    assert mask.dtype == bool
    assert mask.sum() == round(image_size[0] * image_size[1] * share)
    smooth = cv2.resize(heatmap, image_size[::-1], interpolation=cv2.INTER_LINEAR)
    assert smooth[mask].min() >= smooth[~mask].max()


def test_equal_values_are_highlighted_in_blocks_that_the_seed_chooses():
    heatmap = np.zeros((7, 7), np.float32)
    heatmap[3, 3] = 1
    masks = [find_highlighted(heatmap, (224, 224), 0.2, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()
    for mask in masks:
        assert mask[112, 112]
        assert cv2.connectedComponents(mask.astype(np.uint8))[0] - 1 <= 49


def test_a_part_is_filled_with_what_is_around_it_and_all_else_is_left():
    image = np.full((40, 60, 3), (30, 90, 150), np.uint8)
    image[:, 30:] = (200, 100, 50)
    part = np.zeros((40, 60), bool)
    part[10:20, 5:15] = part[10:20, 45:55] = True
    marked = np.where(part[..., None], np.uint8(255), image)
    # The filling rounds.
    filled = fill_part(marked, part)
    np.testing.assert_allclose(filled.astype(int), image, atol=2)
    np.testing.assert_array_equal(filled[~part], image[~part])


# Which way of removing


def removal_named(name, share=0.2):
    return Removal(name, share, lambda image, part: image)


@pytest.mark.parametrize(
    ("kept", "chosen", "measured"),
    [
        ({"a": 0.67, "b": 0.9, "c": 1.0}, "a", "a"),
        ({"a": 0.66, "b": 0.9, "c": 1.0}, "b", "ab"),
        ({"a": 0.2, "b": 0.6, "c": 0.5}, "b", "abc"),
    ],
)
def test_the_first_removal_that_leaves_answers_mostly_intact_is_chosen(kept, chosen, measured):
    seen = []

    def measure(removal):
        seen.append(removal.name)
        return kept[removal.name]

    assert choose_removal(measure, [removal_named(name) for name in kept]).name == chosen
    assert "".join(seen) == measured


# The size of the effect


def plant_spots(number):
    """Makes grey images with a bright spot, their perfect heatmaps, and a model that answers how bright the spot is."""
    rng = np.random.default_rng(4)
    images = rng.integers(90, 110, (number, SIDE, SIDE, 3)).astype(np.uint8)
    corners, heatmaps = rng.integers(0, SIDE - SPOT, (number, 2)), np.zeros((number, SIDE, SIDE), np.float32)
    for image, heatmap, (row, column) in zip(images, heatmaps, corners, strict=True):
        image[row : row + SPOT, column : column + SPOT] = 240
        heatmap[row : row + SPOT, column : column + SPOT] = 1

    def predict(batch):
        brightness = [
            image[row : row + SPOT, column : column + SPOT].mean()
            for image, (row, column) in zip(batch, corners, strict=True)
        ]
        bright = np.clip((np.array(brightness) - 100) / 140, 0, 1)
        return np.stack([bright, 1 - bright], axis=1)

    return images, heatmaps, predict


def summarise(images, heatmaps, predict, removal):
    classes, rng = np.zeros(len(images), int), np.random.default_rng(0)
    parts = find_parts(heatmaps, images.shape[1:3], removal.share, rng)
    whole = predict(images)[:, 0]
    without = [predict_without(predict, images, part, classes, removal) for part in parts]
    return summarise_faithfulness(np.stack([whole, *without], axis=1), removal)


@pytest.mark.parametrize("removal", [REMOVALS[0], REMOVALS[2]], ids=lambda removal: f"{removal.name} {removal.share}")
def test_the_map_of_a_planted_object_is_faithful_and_others_are_not(removal):
    images, heatmaps, predict = plant_spots(30)
    planted = summarise(images, heatmaps, predict, removal)
    assert planted["verdict"] == "faithful"
    assert planted["explained"] > 0.35
    rng = np.random.default_rng(1)
    for wrong in (heatmaps[np.roll(np.arange(30), 1)], rng.random((30, 7, 7)), 1 - heatmaps):
        found = summarise(images, wrong, predict, removal)
        assert found["verdict"] == "not faithful"
        assert found["low"] < 0.02


def test_maps_of_a_model_whose_answer_any_change_destroys_are_never_faithful():
    images, heatmaps, predict = plant_spots(60)

    def predict_fragile(batch):
        untouched = (batch == images).all(axis=(1, 2, 3))[:, None]
        return np.where(untouched, predict(batch), 0.2 * predict(batch))

    found = summarise(images, heatmaps, predict_fragile, BLUR_A_FIFTH)
    # The map is right, which so harsh a removal cannot show.
    assert found["low"] > 0.1
    assert found["kept"] == pytest.approx(0.2 * 0.93, abs=0.05)
    assert found["verdict"] == "weakly faithful"


def test_the_summary_is_a_ratio_of_means_with_its_error():
    # Left of 0.9 without the highlighted part 0.4 on average, without a random part 0.8: half of the 0.8 is explained.
    probabilities = np.tile([[0.9, 0.3, 0.8], [0.9, 0.5, 0.8], [0.9, 0.4, 0.8]], (4, 1))
    summary = summarise_faithfulness(probabilities, BLUR_A_FIFTH)
    assert summary["images"] == 12
    assert [summary[name] for name in ("highlighted", "random", "kept", "explained")] == pytest.approx(
        [0.5, 0.1, 8 / 9, 0.5]
    )
    # Residuals are 0.1, -0.1 and 0, four of each: variance 0.08 / 11; Student's t of 11 degrees of freedom is 2.201.
    margin = 2.20099 * (0.08 / 11 / 12) ** 0.5 / 0.8
    assert [summary["low"], summary["high"]] == pytest.approx([0.5 - margin, 0.5 + margin], abs=1e-5)
    assert summary["verdict"] == "faithful"


@pytest.mark.parametrize("number", [0, 1, 9])
def test_few_images_have_no_verdict(number):
    summary = summarise_faithfulness(np.tile([0.9, 0.1, 0.9], (number, 1)), BLUR_A_FIFTH)
    assert (summary["images"], summary["verdict"], summary["explained"]) == (number, None, None)
    line = describe_faithfulness(summary, 20)
    assert ("Too few images" if number else "nothing to measure") in line


def test_a_class_of_which_nothing_is_left_is_no_division_by_zero():
    found = summarise_faithfulness(np.tile([0.9, 0.0, 0.0], (20, 1)), BLUR_A_FIFTH)
    assert (found["explained"], found["verdict"]) == (0, "not faithful")
    assert summarise_faithfulness(np.zeros((20, 3)), BLUR_A_FIFTH)["verdict"] == "not faithful"


# The words


def make_summary(**values):
    summary = {"images": 200, "removal": BLUR_A_FIFTH.name, "share": 0.2, "highlighted": 0.31, "random": 0.08}
    return summary | {"kept": 0.9, "explained": 0.25, "low": 0.2, "high": 0.3, "verdict": "faithful"} | values


def test_the_sentence_states_the_removal_and_the_size_of_the_effect():
    described = describe_faithfulness(make_summary(), 300)
    parts = ("200 of 300 images", "blurring the highlighted 20 %", "lowers", "0.31", "0.08", "25 %", "20 to 30 %")
    assert all(part in described for part in (*parts, " Faithful: "))
    filled = make_summary(removal=REMOVALS[-1].name, share=0.02, random=-0.01)
    assert "a random 2 % raises it by 0.01" in describe_faithfulness(filled, 300)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"verdict": "weakly faithful", "low": 0.05}, "Weakly faithful: "),
        ({"verdict": "weakly faithful", "kept": 0.3}, "Weakly faithful at most: "),
        ({"verdict": "not faithful", "low": -0.1}, "Not faithful: the maps"),
        ({"verdict": "not faithful", "low": -0.2, "high": -0.1}, "Not faithful: the answer"),
    ],
)
def test_the_verdict_is_in_words(values, words):
    assert words in describe_faithfulness(make_summary(**values), 300)


def test_copies_of_photos_make_no_map_more_faithful():
    rng = np.random.default_rng(0)
    probabilities = np.stack([np.full(40, 0.9), rng.uniform(0.2, 0.8, 40), rng.uniform(0.5, 0.9, 40)], axis=1)
    alone = summarise_faithfulness(probabilities, BLUR_A_FIFTH)
    copied = summarise_faithfulness(probabilities.repeat(5, axis=0), BLUR_A_FIFTH, np.arange(40).repeat(5))
    assert (copied["images"], copied["groups"]) == (200, 40)
    for name in ("explained", "low", "high"):
        assert copied[name] == pytest.approx(alone[name])
    assert "(200 of 200 images in 40 groups)" in describe_faithfulness(copied, 200)


MULTI_LABELS = np.array([[1, 0, 1], [0, 1, 0]], np.float32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("predicted", [[0, 1, 0], [1, 0, 0]]),
        ("true", [[1, 0, 1], [0, 1, 0]]),
        ("top_k", [[0, 1, 1], [1, 1, 0]]),
        ("threshold", [[0, 1, 1], [0, 0, 0]]),
    ],
)
def test_choosers_by_hand(name, expected):
    # Equal ones: the first is the predicted class.
    probabilities = np.array([[0.1, 0.9, 0.7], [0.3, 0.3, 0.2]], np.float32)
    decision = Decision(CLASS_NAMES, True, exact_match_threshold=0.7)
    chosen = CHOOSERS[name](probabilities, MULTI_LABELS, decision=decision, top_k=2)
    np.testing.assert_array_equal(chosen, np.array(expected, bool))
