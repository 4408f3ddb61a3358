"""Photos of other shapes than the model's input: stretched, cropped or padded alike by all that reads them."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skimage.data
from exported_runs import (
    build_colour_model,
    export,
    run_folder,  # noqa: F401
)
from PIL import Image, ImageOps
from probed_photos import build

import predict
import test
import train
from configs import Configs
from finetune.core.options import UserError
from finetune.data.images import fit_image, place_image, read_image, resize_image
from finetune.exporting.exports import read_calibration_images
from finetune.loading.caches import DiskCache
from finetune.loading.mixing import choose_shape, draw_crop, enlarge_for_crops
from finetune.models.description import describe_model
from finetune.reporting.cam_pictures import overlay_heatmap, place_heatmap
from finetune.reporting.gallery import draw_pictures
from finetune.reporting.model_card import write_model_card
from finetune.training.feature_store import find_features, get_features
from finetune.training.probe import compute_features
from generator import AugmentedImageSequence, get_generator
from predict import PredictConfigs
from utils import classify_image, load_model

ASTRONAUT = skimage.data.astronaut()
MODES = ["stretch", "crop", "pad"]
# Where the input's pixels come from the picture as it is when stretched to its size.
IDENTITY, MIRROR = np.eye(2, 3), np.array([[-1.0, 0, 40], [0, 1, 0]])
SIZE = (32, 40)
SHAPES = [(300, 400), (400, 300), (90, 500), (500, 90), (320, 400), (20, 26), (1, 500), (500, 1), (1, 1)]


def bounds(part):
    return [(side.start, side.stop) for side in part]


@pytest.mark.parametrize(
    ("picture_size", "image_size", "seen", "filled"),
    [
        # Crops: of 240x320 a square of 240, 80 columns are left out; twice as wide as high, 400x200 of 300x400.
        ((240, 320), (224, 224), [(0, 240), (40, 280)], None),
        ((320, 240), (224, 224), [(40, 280), (0, 240)], None),
        ((300, 400), (100, 200), [(50, 250), (0, 400)], None),
        ((500, 1), (224, 224), [(249, 250), (0, 1)], None),
        ((1, 500), (224, 100), [(0, 1), (249, 250)], None),
        ((240, 320), (120, 160), [(0, 240), (0, 320)], None),
        # Padded: 240 rows of 320 columns become 168 of 224, which leaves 56; 300x400 becomes 100x133 of 100x200.
        ((240, 320), (224, 224), None, [(28, 196), (0, 224)]),
        ((320, 240), (224, 224), None, [(0, 224), (28, 196)]),
        ((300, 400), (100, 200), None, [(0, 100), (33, 166)]),
        ((500, 1), (224, 224), None, [(0, 224), (111, 112)]),
        ((1, 500), (224, 100), None, [(111, 112), (0, 100)]),
        ((10, 10), (224, 224), None, [(0, 224), (0, 224)]),
    ],
)
def test_the_rectangles_are_those_worked_out_by_hand(picture_size, image_size, seen, filled):
    placement = place_image(picture_size, image_size, "crop" if seen else "pad")
    whole_picture, whole_image = ([(0, side) for side in size] for size in (picture_size, image_size))
    assert bounds(placement.seen) == (seen or whole_picture)
    assert bounds(placement.filled) == (filled or whole_image)
    stretched = place_image(picture_size, image_size, "stretch")
    assert (bounds(stretched.seen), bounds(stretched.filled)) == (whole_picture, whole_image)


def draw_smooth(shape):
    """A picture in which half a pixel, which Pillow crops too, and the way of interpolating are no large difference."""
    return np.asarray(Image.fromarray(ASTRONAUT).resize((6, 6), Image.Resampling.BOX).resize(shape[::-1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fitted_picture_is_pillows(shape):
    image, size = draw_smooth(shape), (SIZE[1], SIZE[0])
    photo = Image.fromarray(image)
    np.testing.assert_array_equal(fit_image(image, SIZE, "stretch"), resize_image(image, SIZE))
    expected = {"crop": ImageOps.fit(photo, size), "pad": ImageOps.pad(photo, size, color=(127, 127, 127))}
    for mode, reference in expected.items():
        found = fit_image(image, SIZE, mode).astype(float)
        assert found.shape == (*SIZE, 3)
        assert np.abs(found - np.asarray(reference)).mean() < 5, mode
    grey = np.ones(SIZE, bool)
    grey[place_image(shape, SIZE, "pad").filled] = False
    assert (fit_image(image, SIZE, "pad")[grey] == 127).all()


def test_a_crop_is_a_slice_and_padding_surrounds_the_whole():
    rows = ASTRONAUT[:96, :300]
    np.testing.assert_array_equal(fit_image(rows, (96, 96), "crop"), rows[:, 102:198])
    np.testing.assert_array_equal(fit_image(rows, (300, 300), "pad")[102:198], rows)
    assert fit_image(rows.astype(np.float32), (50, 60), "pad").dtype == np.float32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_augmentation_starts_from_the_fitted_picture(tmp_path, mode, shape):
    picture = draw_smooth(shape)
    Image.fromarray(picture).save(tmp_path / "a.png")
    sequence = AugmentedImageSequence([str(tmp_path / "a.png")], np.zeros(1, int), SIZE, 1, resize_mode=mode)
    plain, warped, mirrored = np.zeros((3, *SIZE, 3), np.uint8)
    sequence._load(0, plain, 0, None)
    sequence._load(0, warped, 0, IDENTITY)
    sequence._load(0, mirrored, 0, MIRROR)
    np.testing.assert_array_equal(plain, fit_image(picture, SIZE, mode))
    np.testing.assert_array_equal(mirrored[:, ::-1], warped)
    assert np.abs(warped.astype(int) - plain).mean() < (0.5 if mode == "pad" else 2)


@pytest.mark.parametrize("image_size", [(224, 224), (100, 200), (200, 100)])
@pytest.mark.parametrize("shape", [(1791, 3000), (3000, 400), (448, 640), (900, 300), (400, 900)])
def test_what_is_decoded_at_a_part_of_its_size_is_not_enlarged(tmp_path, shape, image_size):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(ASTRONAUT).resize(shape[::-1]).save(path)
    image = read_image(path, image_size)
    for mode in ("crop", "pad"):
        whole, decoded = (place_image(size, image_size, mode) for size in (shape, image.shape[:2]))
        for before, now, filled in zip(whole.seen, decoded.seen, decoded.filled, strict=True):
            wanted = filled.stop - filled.start
            assert now.stop - now.start >= min(wanted, before.stop - before.start)


def test_crops_at_random_keep_the_shape_that_test_images_have():
    # Drawn around the square, the input's shape, and the picture's.
    assert [choose_shape((200, 240), (20, 40), mode) for mode in MODES] == [1, 2, 1.2]
    rng = np.random.default_rng(0)
    for shape, size in ((2.0, (500, 500)), (0.25, (500, 500)), (1.2, (200, 240))):
        drawn = [draw_crop(size, (0.1, 0.2), rng, shape) for _ in range(500)]
        ratios = [(columns.stop - columns.start) / (rows.stop - rows.start) for rows, columns in drawn]
        assert 0.72 * shape < min(ratios) < 0.8 * shape
        assert 1.25 * shape < max(ratios) < 1.4 * shape


@pytest.mark.parametrize(
    ("mode", "lowest", "highest"), [("stretch", 0.75, 1.34), ("crop", 1.5, 2.67), ("pad", 0.9, 1.6)]
)
def test_training_shows_crops_from_the_whole_photo_and_pads_them(tmp_path, mode, lowest, highest):
    """In a picture whose red tells the column and whose green the row."""
    picture = np.zeros((200, 240, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.arange(240), np.arange(200)[:, None]
    Image.fromarray(picture).save(tmp_path / "ramp.png")
    facts = {"shuffle": True, "crop_area": (0.1, 0.3), "resize_mode": mode}
    sequence = AugmentedImageSequence([str(tmp_path / "ramp.png")] * 80, np.zeros(80, int), (40, 80), 80, **facts)
    images = sequence[0][0]
    assert (images[..., 2] == 127).any() == (mode == "pad")
    shown = np.ma.masked_array(images[..., :2], np.repeat(images[..., 2:] != 0, 2, axis=3))
    high, low = shown.max(axis=(1, 2)).astype(float), shown.min(axis=(1, 2)).astype(float)
    ratios = (high - low)[:, 0] / (high - low)[:, 1]
    assert lowest * 0.93 < ratios.min() < ratios.max() < highest * 1.07
    # A part of the sides that test images do not show is seen at times.
    assert (low.min(axis=0) < 12).all()
    assert (high.max(axis=0) > [227, 187]).all()
    sequence.shuffle = sequence.crops = False
    np.testing.assert_array_equal(sequence[0][0][0], fit_image(picture, (40, 80), mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("image_size", [(224, 224), (100, 200)])
@pytest.mark.parametrize("shape", [(1, 1), (0.4, 1), (1, 3)])
def test_the_smallest_crop_is_not_enlarged(mode, image_size, shape):
    """Of the smallest picture that a JPEG may be decoded at: each side as long as the longer one that is asked for."""
    sides = [round(side * max(enlarge_for_crops(image_size, (0.2, 1.0))) / min(shape)) for side in shape]
    around, rng = choose_shape(sides, image_size, mode), np.random.default_rng(0)
    for _ in range(200):
        crop = [part.stop - part.start for part in draw_crop(sides, (0.2, 0.2), rng, around)]
        wanted = bounds(place_image(crop, image_size, mode).filled)
        assert all(side >= stop - start - 1 for side, (start, stop) in zip(crop, wanted, strict=True))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_cache_knows_the_pictures_of_its_mode_alone(photo_folder, tmp_path, kind):
    paths = [str(path) for path in sorted(photo_folder.glob("red/*.jpg"))]
    pd.DataFrame({"path": paths, "class": "red"}).to_csv(tmp_path / "red.csv", index=False)
    facts = {"image_target_size": (32, 32, 3), "image_cache_path": str(tmp_path / "cache")}
    for mode in (*MODES, *MODES):
        configs = Configs(resize_mode=mode, image_cache=kind, **facts)
        sequence = get_generator(str(tmp_path / "red.csv"), ["red"], configs, training=False)
        expected = [fit_image(read_image(path, (32, 32)), (32, 32), mode) for path in paths]
        for _ in range(2):
            np.testing.assert_array_equal(sequence[0][0], expected)
    # That of an older version is still found.
    folder = str(tmp_path / "cache")
    named = {mode: DiskCache(paths, (32, 32), folder, mode).path for mode in MODES}
    assert named["stretch"] == DiskCache(paths, (32, 32), folder).path
    assert named["pad"] == named["stretch"].replace("32x32", "32x32_pad")


def test_features_of_another_mode_are_not_used(photo_folder, tmp_path):
    paths, model = [str(path) for path in sorted(photo_folder.glob("*/*.jpg"))][:6], build()
    facts = {"image_size": (32, 32), "batch_size": 4}
    found = {}
    for mode in MODES:
        sequence = AugmentedImageSequence(paths, np.zeros(6, int), resize_mode=mode, **facts)
        images = np.stack([fit_image(read_image(path, (32, 32)), (32, 32), mode) for path in paths])
        expected = model.layers[-1].layers[0](model.layers[-2](model.layers[-3](images)))
        found[mode] = get_features(model, sequence, str(tmp_path))[0]
        np.testing.assert_allclose(found[mode], expected, atol=1e-5)
        np.testing.assert_array_equal(find_features(model, sequence, str(tmp_path))[0], found[mode])
    np.testing.assert_allclose(compute_features(model, sequence)[0], expected, atol=1e-5)
    assert np.abs(found["crop"] - found["pad"]).max() > 1e-3
    assert len(list(tmp_path.glob("features_*.bin"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_a_trained_run_is_tested_and_predicted_alike(photo_folder, small_run, tmp_path, mode):
    rows = [(str(path), path.parent.name) for path in sorted(photo_folder.glob("*/*.jpg"))]
    for number, name in enumerate(("train", "test")):
        pd.DataFrame(rows[number::2], columns=["path", "class"]).to_csv(tmp_path / f"{name}.csv", index=False)
    options = {"resize_mode": mode, "num_epochs": 1, "random_crop_area": [0.6, 1.0]}
    configs = small_run(tmp_path / "train.csv", tmp_path / "test.csv", **options)
    train.main(configs)
    folder = Path(configs.save_model_path)
    assert f"| Resizing | {mode} |" in (folder / "MODEL_CARD.md").read_text()
    # An epoch leaves a network to which all photos are alike.
    build_colour_model().save(folder / "best_model.keras")
    tested, predicted = evaluate_and_predict(folder, tmp_path / "test.csv")
    np.testing.assert_allclose(predicted, tested, atol=1e-6)
    paths = pd.read_csv(tmp_path / "test.csv")["path"]
    images = [read_image(path, (32, 32)) for path in paths]
    model, names = load_model(str(folder / "best_model.keras")), ["blue", "green", "red"]
    by_hand, stretched = (
        model.predict(np.stack([fit_image(image, (32, 32), way) for image in images]), verbose=0)
        for way in (mode, "stretch")
    )
    np.testing.assert_allclose(predicted, by_hand, atol=1e-6)
    assert np.abs(by_hand - stretched).max() > 1e-3
    answers = classify_image(model, images[0], names, resize_mode=mode)[1]
    np.testing.assert_allclose([answers[name] for name in names], predicted[0], atol=1e-6)


def evaluate_and_predict(folder, csv_path):
    """Returns the probabilities that test.py and predict.py give."""
    test.main(Configs(load_model_path=str(folder)).validate())
    options = {"load_model_path": str(folder), "input": str(csv_path)}
    predict.main(PredictConfigs(write_path=str(folder / "predictions.csv"), **options).validate())
    tables = [pd.read_csv(folder / name) for name in ("evaluation/predictions.csv", "predictions.csv")]
    return [table.filter(like="probability_").to_numpy() for table in tables]


def write_mode(folder, mode):
    stored = json.loads((folder / "configs.json").read_text())
    stored.pop("resize_mode", None)
    (folder / "configs.json").write_text(json.dumps(stored | ({"resize_mode": mode} if mode else {})))


@pytest.mark.parametrize(("script", "configs_of"), [(test.main, Configs), (predict.main, PredictConfigs)])
def test_another_mode_than_the_runs_is_refused(run_folder, script, configs_of):
    write_mode(run_folder, "pad")
    given = configs_of.from_command_line(arguments=["--load_model_path", str(run_folder), "--resize_mode", "stretch"])
    with pytest.raises(UserError, match="resize_mode is 'pad' for the model .* Received: 'stretch'"):
        script(given)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_the_card_tells_how_to_fit_a_photo(run_folder, photo_folder, monkeypatch, mode):
    write_mode(run_folder, mode)
    mode = mode or "stretch"
    write_model_card(str(run_folder))
    card = (run_folder / "MODEL_CARD.md").read_text()
    assert f"| Resizing | {mode} |" in card
    words = {"stretch": "stretched to", "crop": "cropped to that shape", "pad": "on grey (127)"}
    assert words[mode] in card
    Image.open(photo_folder / "red" / "00.jpg").save(run_folder / "photo.jpg", quality=95)
    monkeypatch.chdir(run_folder)
    names = {}
    exec(re.search(r"```python\n(import numpy.*?)```", card, re.DOTALL)[1], names)
    expected = fit_image(read_image("photo.jpg"), (32, 32), mode)
    assert np.abs(names["image"].astype(float) - expected).mean() < 8


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_exports_carry_their_mode(run_folder, mode, tmp_path):
    write_mode(run_folder, mode)
    report = export(run_folder, "tflite")
    assert report["artefacts"][1]["comparison"]["changed_predictions"] == 0
    metadata = json.loads((run_folder / "best_model_metadata.json").read_text())
    assert metadata["options"]["resize_mode"] == mode
    # Away from the run, predict.py takes it from there.
    for name in ("best_model.tflite", "best_model_metadata.json"):
        (run_folder / name).rename(tmp_path / name)
    stored = json.loads((run_folder / "configs.json").read_text())
    options = {"load_model_path": str(tmp_path / "best_model.tflite"), "input": stored["test_csv"]}
    options |= {"image_directory": stored["image_directory"], "write_path": str(tmp_path / "predictions.csv")}
    found = predict.main(PredictConfigs(**options).validate())["predictions"]
    paths = [f"{stored['image_directory']}/{name}" for name in pd.read_csv(stored["test_csv"])["path"]]
    images = np.stack([fit_image(read_image(path, (32, 32)), (32, 32), mode) for path in paths])
    expected = build_colour_model().predict(images, verbose=0)
    np.testing.assert_allclose(found[[f"probability_{name}" for name in stored["classes"]]], expected, atol=1e-5)
    calibration = read_calibration_images(Configs(resize_mode=mode, **stored_options(stored)))
    by_hand = [fit_image(read_image(path, (32, 32)), (32, 32), mode) for path in list_training(stored)]
    assert sorted(image.tobytes() for image in calibration) == sorted(image.tobytes() for image in by_hand)


def stored_options(stored):
    size = {"image_target_size": tuple(stored["image_target_size"])}
    return {name: stored[name] for name in ("train_csv", "image_directory", "classes")} | size


def list_training(stored):
    return [f"{stored['image_directory']}/{name}" for name in pd.read_csv(stored["train_csv"])["path"]]


def test_a_legacy_model_is_one_of_stretched_photos(run_folder):
    write_mode(run_folder, None)
    path = str(run_folder / "best_model.keras")
    assert describe_model(Configs(), path).resize_mode == "stretch"
    # Whatever the default has become since.
    edited = Configs(resize_mode="crop")
    edited.given = set()
    assert describe_model(edited, path).resize_mode == "stretch"
    with pytest.raises(UserError, match="resize_mode is 'stretch' for the model .* Received: 'pad'"):
        describe_model(Configs().replace(resize_mode="pad"), path)


def test_a_mode_that_there_is_not_is_told(run_folder):
    write_mode(run_folder, "squeeze")
    with pytest.raises(UserError, match=r"configs.json: resize_mode: expected .*stretch, crop, pad.*'squeeze'"):
        describe_model(Configs(), str(run_folder / "best_model.keras"))


@pytest.mark.parametrize("mode", MODES)
def test_a_heatmap_lies_where_the_model_looked(tmp_path, mode):
    """A white photo, 90 wide and 30 high, that is red in its right third: a map of what is red in the input."""
    photo = np.full((30, 90, 3), 255, np.uint8)
    photo[:, 60:, 1:] = 0
    Image.fromarray(photo).save(tmp_path / "a.png")

    def find_red(images):
        return (images[..., 0] > 200).astype(np.float32) * (images[..., 1] < 100), None

    def place(image, heatmap):
        return place_heatmap(heatmap, image.shape[:2], (60, 60), mode)

    ((_, found),) = draw_pictures(find_red, (60, 60), mode, read_image, place, [str(tmp_path / "a.png")])
    expected = np.zeros((30, 90))
    expected[:, 60:] = 1
    if mode == "crop":
        # Of the middle third, all that the model saw, nothing is red.
        expected[:, np.r_[0:30, 60:90]] = np.nan
    np.testing.assert_allclose(found[:, np.r_[0:58, 62:90]], expected[:, np.r_[0:58, 62:90]], atol=0.01)


def test_what_a_model_has_not_seen_keeps_its_colours():
    photo = np.full((30, 90, 3), 200, np.uint8)
    shown = overlay_heatmap(photo, np.zeros((2, 2)), 0.5, "jet", (60, 60), "crop")
    is_changed = (shown != photo).any(axis=2)
    assert is_changed[:, 30:60].all()
    assert is_changed.sum() == 30 * 30
