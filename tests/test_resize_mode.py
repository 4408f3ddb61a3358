"""`resize_mode`: every reader stretches, crops or pads photos of another shape in the same way."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import skimage.data
from exported_runs import CLASSES, export, run_folder  # noqa: F401
from PIL import Image, ImageOps
from probed_photos import build

import predict
import test
from configs import Configs
from finetune.core.options import UserError
from finetune.data.images import fit_image, place_image, read_image, resize_image
from finetune.exporting.exports import read_calibration_images
from finetune.loading.augmentation import choose_shape, draw_crop, enlarge_for_crops
from finetune.loading.caches import DiskCache
from finetune.models.description import describe_model
from finetune.reporting.cam_pictures import overlay_heatmap, place_heatmap
from finetune.reporting.model_card import write_model_card
from finetune.reporting.report import draw_pictures
from finetune.training.feature_store import find_features, get_features
from finetune.training.probe import compute_features
from generator import AugmentedImageSequence, get_generator
from predict import PredictConfigs
from utils import classify_image, load_model

ASTRONAUT = skimage.data.astronaut()
MODES = ["stretch", "crop", "pad"]
# Maps from the input to the stretched picture.
IDENTITY, MIRROR = np.eye(2, 3), np.array([[-1.0, 0, 40], [0, 1, 0]])
SIZE = (32, 40)
SHAPES = [(300, 400), (500, 90), (320, 400), (20, 26), (1, 500), (1, 1)]


def bounds(part):
    return [(side.start, side.stop) for side in part]


@pytest.mark.parametrize(
    ("picture_size", "image_size", "seen", "filled"),
    [
        # Crops: a square of 240x320 leaves out 80 columns; a crop of 300x400 twice as wide as high is 200x400.
        ((240, 320), (224, 224), [(0, 240), (40, 280)], None),
        ((320, 240), (224, 224), [(40, 280), (0, 240)], None),
        ((300, 400), (100, 200), [(50, 250), (0, 400)], None),
        ((500, 1), (224, 224), [(249, 250), (0, 1)], None),
        ((240, 320), (120, 160), [(0, 240), (0, 320)], None),
        # Padding: 240x320 becomes 168x224, which leaves 56 rows; 300x400 becomes 100x133 of 100x200.
        ((240, 320), (224, 224), None, [(28, 196), (0, 224)]),
        ((320, 240), (224, 224), None, [(0, 224), (28, 196)]),
        ((300, 400), (100, 200), None, [(0, 100), (33, 166)]),
        ((500, 1), (224, 224), None, [(0, 224), (111, 112)]),
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
    """A smooth picture, on which interpolation and Pillow's crops at half a pixel make little difference."""
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


@pytest.mark.parametrize("image_size", [(224, 224), (100, 200)])
@pytest.mark.parametrize("shape", [(895, 1500), (1500, 400), (448, 640), (400, 900)])
def test_an_image_decoded_at_reduced_size_is_not_enlarged(tmp_path, shape, image_size):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(ASTRONAUT).resize(shape[::-1]).save(path)
    image = read_image(path, image_size)
    for mode in ("crop", "pad"):
        whole, decoded = (place_image(size, image_size, mode) for size in (shape, image.shape[:2]))
        for before, now, filled in zip(whole.seen, decoded.seen, decoded.filled, strict=True):
            wanted = filled.stop - filled.start
            assert now.stop - now.start >= min(wanted, before.stop - before.start)


def test_random_crops_keep_the_shape_of_test_images():
    # Ratios around the square, the input's shape, and the picture's.
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
    """In a picture whose red is the column and whose green is the row."""
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
    # Some crops show the margins that test images leave out.
    assert (low.min(axis=0) < 12).all()
    assert (high.max(axis=0) > [227, 187]).all()
    sequence.shuffle = sequence.crops = False
    np.testing.assert_array_equal(sequence[0][0][0], fit_image(picture, (40, 80), mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("image_size", "shape"), [((224, 224), (1, 1)), ((224, 224), (1, 3)), ((100, 200), (0.4, 1))])
def test_the_smallest_crop_is_not_enlarged(mode, image_size, shape):
    """Tests the smallest size at which a JPEG may be decoded."""
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
    # Caches of older versions are still found.
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


def write_mode(folder, mode):
    stored = json.loads((folder / "configs.json").read_text())
    stored.pop("resize_mode", None)
    (folder / "configs.json").write_text(json.dumps(stored | ({"resize_mode": mode} if mode else {})))


def test_another_mode_than_the_runs_is_refused(run_folder):
    write_mode(run_folder, "pad")
    flags = ["--load_model_path", str(run_folder), "--resize_mode", "stretch"]
    for main, configs_class in ((test.main, Configs), (predict.main, PredictConfigs)):
        with pytest.raises(UserError, match="resize_mode is 'pad' .* 'stretch'"):
            main(configs_class.from_command_line(arguments=flags))


@pytest.mark.parametrize("mode", [None, *MODES])
def test_the_card_says_how_to_resize_a_photo(run_folder, photo_folder, monkeypatch, mode):
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_scripts_and_exports_resize_alike(run_folder, tmp_path, mode):
    write_mode(run_folder, mode)
    stored = json.loads((run_folder / "configs.json").read_text())
    folder, photos = stored["image_directory"], {}
    for name in ("train_csv", "test_csv"):
        photos[name] = [read_image(f"{folder}/{path}", (32, 32)) for path in pd.read_csv(stored[name])["path"]]
    fitted = {name: np.stack([fit_image(photo, (32, 32), mode) for photo in photos[name]]) for name in photos}

    def run_predict(model_path):
        options = {"input": stored["test_csv"], "image_directory": folder}
        options |= {"load_model_path": str(model_path), "write_path": str(tmp_path / "predictions.csv")}
        return predict.main(PredictConfigs(**options).validate())["predictions"]

    test.main(Configs(load_model_path=str(run_folder)).validate())
    found = [pd.read_csv(run_folder / "evaluation" / "predictions.csv"), run_predict(run_folder)]
    report = export(run_folder, "tflite")
    assert report["artefacts"][1]["comparison"]["changed_predictions"] == 0
    # Without the run's folder, the mode comes from the metadata.
    for name in ("best_model.tflite", "best_model_metadata.json"):
        (run_folder / name).rename(tmp_path / name)
    found.append(run_predict(tmp_path / "best_model.tflite"))
    model = load_model(str(run_folder / "best_model.keras"))
    expected = np.asarray(model(fitted["test_csv"]))
    for table in found:
        np.testing.assert_allclose(table[[f"probability_{name}" for name in CLASSES]], expected, atol=1e-5)
    answers = classify_image(model, photos["test_csv"][0], CLASSES, resize_mode=mode)[1]
    np.testing.assert_allclose([answers[name] for name in CLASSES], expected[0], atol=1e-6)
    names = ("train_csv", "image_directory", "classes", "image_target_size")
    calibration = read_calibration_images(Configs(resize_mode=mode, **{name: stored[name] for name in names}))
    assert sorted(image.tobytes() for image in calibration) == sorted(image.tobytes() for image in fitted["train_csv"])


def test_a_legacy_model_is_one_of_stretched_photos(run_folder):
    write_mode(run_folder, None)
    path = str(run_folder / "best_model.keras")
    assert describe_model(Configs(), path).resize_mode == "stretch"
    # The default does not matter.
    edited = Configs(resize_mode="crop")
    edited.given = set()
    assert describe_model(edited, path).resize_mode == "stretch"
    with pytest.raises(UserError, match="resize_mode is 'stretch' .* 'pad'"):
        describe_model(Configs().replace(resize_mode="pad"), path)


def test_an_unknown_mode_is_refused(run_folder):
    write_mode(run_folder, "squeeze")
    with pytest.raises(UserError, match=r"configs.json: resize_mode: .*stretch, crop, pad.*'squeeze'"):
        describe_model(Configs(), str(run_folder / "best_model.keras"))


@pytest.mark.parametrize("mode", MODES)
def test_a_heatmap_is_placed_where_the_model_looked(tmp_path, mode):
    """Maps the red pixels of a white photo, 90 wide and 30 high, whose right third is red."""
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
        # The model saw only the middle third, without red.
        expected[:, np.r_[0:30, 60:90]] = np.nan
    np.testing.assert_allclose(found[:, np.r_[0:58, 62:90]], expected[:, np.r_[0:58, 62:90]], atol=0.01)


def test_the_cropped_parts_of_a_photo_keep_their_colours():
    photo = np.full((30, 90, 3), 200, np.uint8)
    shown = overlay_heatmap(photo, np.zeros((2, 2)), 0.5, "jet", (60, 60), "crop")
    is_changed = (shown != photo).any(axis=2)
    assert is_changed[:, 30:60].all()
    assert is_changed.sum() == 30 * 30
