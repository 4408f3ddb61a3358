import os
import re
import shutil
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from drawn_runs import CLASS_NAMES, SIZE

import draw_activations
from configs import Configs
from finetune.core.files import write_json
from finetune.core.options import UserError
from finetune.evaluation import explaining, gradcam
from finetune.evaluation.decision import Decision
from finetune.evaluation.decision_file import write_decision
from finetune.evaluation.faithfulness import REMOVALS
from finetune.reporting import cam_pictures
from finetune.reporting.cam_pictures import name_outputs, overlay_heatmap
from generator import get_generator
from model import ModelFactory

# Width and height of the photos in pictures: 48x64 pixels, enlarged.
WIDER = (160, 120)


@pytest.fixture(scope="module")
def saved_runs(photo_folder, multilabel_csv, tmp_path_factory):
    """Untrained models in folders of runs: single-label with nine images, multi-label with 24."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [(str(photo_folder / name / f"{number:02d}.jpg"), name) for name in CLASS_NAMES for number in range(3)]
    pd.DataFrame(rows, columns=["path", "class"]).to_csv(folder / "test.csv", index=False)
    return {
        False: save_run(folder / "single", str(folder / "test.csv"), False, ""),
        True: save_run(folder / "several", str(multilabel_csv), True, str(multilabel_csv.parent)),
    }


@pytest.fixture
def single(saved_runs, tmp_path):
    return copy_run(saved_runs[False], tmp_path / "saved_model")


@pytest.fixture
def several(saved_runs, tmp_path):
    return copy_run(saved_runs[True], tmp_path / "saved_model")


def copy_run(configs: Configs, folder: Path) -> Configs:
    shutil.copytree(configs.save_model_path, folder)
    return configs.replace(save_model_path=str(folder))


def save_run(folder: Path, csv_path: str, multi_label: bool, image_directory: str) -> Configs:
    configs = Configs(
        train_csv=csv_path,
        test_csv=csv_path,
        image_directory=image_directory,
        multi_label_classification=multi_label,
        classes=CLASS_NAMES,
        visual_model_name="MobileNet",
        pop_conv_layers=69,
        image_target_size=(SIZE, SIZE, 3),
        use_imagenet_weights=False,
        batch_size=4,
        save_model_path=str(folder),
    )
    keras.utils.set_random_seed(1)
    model = ModelFactory().get_model(configs)
    # Far apart probabilities, with each class the first of some images.
    images, _ = get_generator(csv_path, CLASS_NAMES, configs.replace(batch_size=99), training=False)[0]
    last = model.layers[-1].get_layer("logits")
    kernel, _ = last.get_weights()
    raw = keras.Model(model.inputs, spatial_means(model)).predict(images, verbose=0) @ kernel
    scale = 1.5 / raw.std(axis=0)
    last.set_weights([kernel * scale, -raw.mean(axis=0) * scale])
    folder.mkdir()
    model.save(folder / "best_model.keras")
    write_json(str(folder / "configs.json"), configs.to_dict())
    return configs


def spatial_means(model: keras.Model) -> keras.KerasTensor:
    outputs = model.inputs[0]
    for layer in model.layers[1:-1]:
        outputs = layer(outputs)
    return keras.layers.GlobalAveragePooling2D()(outputs)


def load(configs: Configs) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Returns the saved model, the test images and its probabilities for them, by Keras's own means."""
    model = keras.models.load_model(os.path.join(configs.save_model_path, "best_model.keras"), compile=False)
    sequence = get_generator(configs.test_csv, CLASS_NAMES, configs.replace(batch_size=99), training=False)
    return model, sequence[0][0], model.predict(sequence[0][0], verbose=0)


@pytest.fixture
def panels(monkeypatch):
    """Collects, by file name, the images and captions of each picture, which is written as well."""
    found, arrange, write_image = {}, cam_pictures.arrange, cam_pictures.write_image
    pictures = {}

    def remember(panels):
        picture = arrange(panels)
        pictures[id(picture)] = picture, panels
        return picture

    def write(path, image):
        found[os.path.basename(path)] = pictures[id(image)][1]
        write_image(path, image)

    monkeypatch.setattr(cam_pictures, "arrange", remember)
    monkeypatch.setattr(cam_pictures, "write_image", write)
    return found


def captions(panels: dict, configs: Configs) -> list[list[str]]:
    names = name_outputs(get_generator(configs.test_csv, CLASS_NAMES, configs, training=False).paths.tolist())
    return [[caption for _, caption in panels[name]] for name in names]


def test_the_predicted_class_is_drawn_beside_the_photo(single, panels):
    result = draw_activations.main(single)
    model, images, probabilities = load(single)
    best = probabilities.argmax(axis=1)
    assert len(set(best)) > 1
    true = np.repeat(CLASS_NAMES, 3)
    assert captions(panels, single) == [
        [f"true: {true[row]}", f"{probabilities[row, best[row]]:.2f} {CLASS_NAMES[best[row]]}"] for row in range(9)
    ]
    heatmaps, _ = gradcam.GradCam(model)(images, best)
    sources = pd.read_csv(single.test_csv)["path"].tolist()
    for row, name in enumerate(name_outputs(sources)):
        (photo, _), (overlay, _) = panels[name]
        # The photos have 48x64 pixels, and the network sees 32x32: neither is enough for a caption.
        np.testing.assert_allclose(photo.astype(int), cv2.resize(cv2.imread(sources[row])[..., ::-1], WIDER), atol=2)
        expected = overlay_heatmap(photo, heatmaps[row])
        np.testing.assert_allclose(overlay.astype(int), expected, atol=2)
    for path in result["paths"]:
        height, width, _ = cv2.imread(path).shape
        assert width == 2 * WIDER[0]
        assert height > WIDER[1]
    assert {os.path.dirname(path) for path in result["paths"]} == {os.path.join(single.save_model_path, "cam_output")}


def test_top_k_draws_the_most_probable_classes_in_order(single, panels):
    draw_activations.main(single.replace(cam_classes="top_k", cam_top_k=2))
    _, _, probabilities = load(single)
    for row, found in enumerate(captions(panels, single)):
        first, second, _ = np.argsort(probabilities[row])[::-1]
        expected = [f"{probabilities[row, position]:.2f} {CLASS_NAMES[position]}" for position in (first, second)]
        assert found[1:] == expected


def test_top_k_of_more_classes_than_there_are_draws_them_all(single, panels):
    paths = draw_activations.main(single.replace(cam_classes="top_k", cam_top_k=50))["paths"]
    assert {len(found) for found in captions(panels, single)} == {4}
    assert {cv2.imread(path).shape[1] for path in paths} == {4 * WIDER[0]}


@pytest.mark.parametrize("mode", ["single", "several"])
def test_true_draws_the_labels_of_the_csv(mode, request, panels):
    configs = request.getfixturevalue(mode)
    draw_activations.main(configs.replace(cam_classes="true"))
    labels = pd.read_csv(configs.test_csv)["class"]
    for found, label in zip(captions(panels, configs), labels, strict=True):
        assert found[0] == "true: " + label.replace("$", ", ")
        assert sorted(caption.split(" ", 1)[1] for caption in found[1:]) == sorted(label.split("$"))


def test_threshold_draws_what_the_runs_decision_says_in_calibrated_probabilities(several, panels):
    _, _, raw = load(several)
    temperature = 2.5
    calibrated = 1 / (1 + ((1 - raw.astype(float)) / raw) ** (1 / temperature))
    threshold = float(np.quantile(calibrated, 0.8))
    decision = Decision(
        CLASS_NAMES, True, temperature, "validation", threshold, [0.5] * 3, "validation", "best_model.keras"
    )
    write_decision(several.save_model_path, decision)
    result = draw_activations.main(several.replace(cam_classes="threshold"))
    numbers = set()
    for row, found in enumerate(captions(panels, several)):
        order = [position for position in np.argsort(-calibrated[row]) if calibrated[row, position] >= threshold]
        expected = [f"{calibrated[row, position]:.2f} {CLASS_NAMES[position]}" for position in order]
        assert found[1:] == (expected or ["no label above its threshold"])
        numbers.add(len(order))
    assert {0, 1} <= numbers
    assert result["faithfulness"]["images"] == (calibrated >= threshold).any(axis=1).sum()


def test_threshold_with_nothing_above_it_still_draws_every_photo(several, capsys, panels):
    write_decision(several.save_model_path, Decision(CLASS_NAMES, True, exact_match_threshold=1.0))
    result = draw_activations.main(several.replace(cam_classes="threshold"))
    assert len(result["paths"]) == 24
    for (photo, _), (beside, caption) in panels.values():
        np.testing.assert_array_equal(photo, beside)
        assert caption == "no label above its threshold"
    assert result["faithfulness"]["images"] == 0
    assert "nothing to measure" in capsys.readouterr().out


def test_threshold_of_a_single_label_is_the_predicted_class(single, panels):
    draw_activations.main(single)
    predicted = captions(panels, single)
    draw_activations.main(single.replace(cam_classes="threshold"))
    assert captions(panels, single) == predicted


@pytest.mark.parametrize("method", ["gradcam++", "layercam"])
def test_method_opacity_and_colours_are_those_of_the_options(method, several, panels):
    options = {"cam_method": method, "cam_alpha": 0.7, "cam_colormap": "viridis"}
    draw_activations.main(several.replace(**options))
    model, images, probabilities = load(several)
    heatmaps, _ = gradcam.GradCam(model, method)(images, probabilities.argmax(axis=1))
    for row in range(24):
        (photo, _), (overlay, _) = panels[f"{row:02d}.jpg"]
        expected = overlay_heatmap(photo, heatmaps[row], 0.7, "viridis")
        np.testing.assert_allclose(overlay.astype(int), expected, atol=4)


def test_faithfulness_is_printed_returned_and_the_same_whatever_the_batch_size(several, capsys):
    results = [draw_activations.main(several.replace(batch_size=size))["faithfulness"] for size in (5, 24)]
    assert results[0]["images"] == 24
    assert results[0] == pytest.approx(results[1], abs=1e-4)
    printed = capsys.readouterr().out
    assert printed.count("Faithfulness (24 of 24 images): ") == 2
    assert f"by {abs(results[0]['highlighted']):.2f}, a random " in printed
    assert f"The maps explain {100 * results[0]['explained']:.0f} % (95 % interval " in printed


def test_faithfulness_is_of_the_explained_class_in_calibrated_probabilities(single, monkeypatch):
    write_decision(single.save_model_path, Decision(CLASS_NAMES, False, 3.0, "validation"))
    _, _, raw = load(single)
    calibrated = raw ** (1 / 3) / (raw ** (1 / 3)).sum(axis=1, keepdims=True)
    seen = []

    def measure(predict, images, parts, class_indices, removal):
        seen.append((images, class_indices))
        return np.zeros(len(images))

    monkeypatch.setattr(explaining, "predict_without", measure)
    monkeypatch.setattr(explaining, "choose_removal_on", lambda *_: REMOVALS[0])
    result = draw_activations.main(single.replace(cam_classes="top_k"))["faithfulness"]
    # Each batch is measured without its highlighted parts, then without random ones.
    assert np.concatenate([chosen for _, chosen in seen[::2]]).tolist() == calibrated.argmax(axis=1).tolist()
    assert result["highlighted"] == pytest.approx(calibrated.max(axis=1).mean(), abs=1e-5)


def test_faithfulness_is_measured_on_a_sample_evenly_taken(several, monkeypatch):
    measured = []
    monkeypatch.setattr(explaining, "MOST_MEASURED", 3)
    monkeypatch.setattr(explaining, "choose_removal_on", lambda *_: REMOVALS[0])
    monkeypatch.setattr(
        explaining,
        "predict_without",
        lambda _, images, *rest: measured.extend(images) or np.zeros(len(images)),
    )
    assert draw_activations.main(several)["faithfulness"]["images"] == 3
    _, images, _ = load(several)
    # Of positions 0 to 23 the first, the last, and the one in the middle (11.5 rounds to the even 12); each twice,
    # without the highlighted part and without a random one.
    assert len(measured) == 6
    for row in (0, 12, 23):
        assert sum((image == images[row]).all() for image in measured) == 2


def test_how_parts_are_removed_is_chosen_on_a_sample_evenly_taken(several, monkeypatch):
    asked = []

    def answer(predict, images, parts, class_indices, removal):
        asked.append((removal, len(images)))
        # Only the smallest filling leaves the answers as they are.
        return np.full(len(images), 1.0 if removal.share == 0.02 else 0.0)

    monkeypatch.setattr(explaining, "PILOT_IMAGES", 4)
    monkeypatch.setattr(explaining, "predict_without", answer)
    result = draw_activations.main(several)["faithfulness"]
    assert (result["removal"], result["share"]) == (REMOVALS[-1].name, 0.02)
    assert {removal for removal, _ in asked} == {*REMOVALS}
    assert sum(number for removal, number in asked if removal == REMOVALS[0]) == 2 * 4
    assert sum(number for removal, number in asked if removal == REMOVALS[-1]) == 2 * (4 + 24)


def test_a_model_that_answers_with_no_numbers_is_refused(single):
    path = os.path.join(single.save_model_path, "best_model.keras")
    model = keras.models.load_model(path, compile=False)
    logits = model.layers[-1].get_layer("logits")
    logits.set_weights([weight * np.nan for weight in logits.get_weights()])
    model.save(path)
    with pytest.raises(UserError, match="not finite"):
        draw_activations.main(single)


@pytest.mark.parametrize(("number", "columns", "rows"), [(1, 1, 1), (4, 4, 1), (6, 6, 1), (7, 6, 2), (50, 7, 8)])
def test_many_panels_stand_in_rows(number, columns, rows):
    photos = [np.full((16, 200, 3), value, np.uint8) for value in range(number)]
    picture = cam_pictures.arrange([(photo, "") for photo in photos])
    height = picture.shape[0] // rows
    assert picture.shape == (height * rows, columns * 200, 3)
    for value in range(columns * rows):
        top, left = height * (value // columns), 200 * (value % columns)
        panel = picture[top : top + 16, left : left + 200]
        assert (panel == (value if value < number else 255)).all()


def test_pictures_show_photos_upright_at_their_own_aspect_ratio_and_at_most_so_large(single, panels, tmp_path):
    folder = tmp_path / "photos ü#?%'"
    folder.mkdir()
    pixels = np.full((300, 900, 3), 128, np.uint8)
    pixels[:, :300] = 255
    PIL.Image.fromarray(pixels).save(folder / "wide.jpg")
    # Orientation 6: the camera's top, here the white third's left side, is on the right.
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    PIL.Image.fromarray(pixels).save(folder / "turned.jpg", exif=turned)
    PIL.Image.fromarray(pixels[:50, :50]).save(folder / "small.png")
    names = ["wide.jpg", "turned.jpg", "small.png"]
    table = pd.DataFrame({"path": [str(folder / name) for name in names], "class": CLASS_NAMES})
    table.to_csv(tmp_path / "test.csv", index=False)
    result = draw_activations.main(single.replace(test_csv=str(tmp_path / "test.csv"), cam_picture_size=320))
    photos = [panels[name][0][0] for name in names]
    assert [photo.shape for photo in photos] == [(107, 320, 3), (320, 107, 3), (160, 160, 3)]
    assert [len({image.shape for image, _ in panels[name]}) for name in names] == [1, 1, 1]
    # In the middle of the white third, and of the grey rest.
    assert photos[0][53, [53, 213], 0].tolist() == [255, 128]
    assert photos[1][[53, 213], 53, 0].tolist() == [255, 128]
    widths = [cv2.imread(path).shape[1] for path in result["paths"]]
    # Two panels each; the narrow ones stand on white, so that their captions can be read.
    assert widths == [640, 320, 320]


def test_an_index_of_the_pictures_takes_the_place_of_the_earlier_one(single, capsys):
    index = Path(single.save_model_path, "cam_output", "index.html")
    index.parent.mkdir()
    index.write_text("previous")
    result = draw_activations.main(single)
    page = index.read_text(encoding="utf-8")
    assert re.findall(r'<a class="picture" href="([^"]+)"', page) == [Path(path).name for path in result["paths"]]
    assert f"The page that shows them is {index}" in capsys.readouterr().out
    _, _, probabilities = load(single)
    right = probabilities.argmax(axis=1) == np.repeat(range(3), 3)
    assert re.findall(r'data-answer="(\w+)"', page) == ["right" if one else "wrong" for one in right]
    confidences = [float(text) for text in re.findall(r'data-confidence="([^"]+)"', page)]
    np.testing.assert_allclose(confidences, probabilities.max(axis=1), atol=1e-5)


def test_a_layer_can_be_chosen(single, panels):
    draw_activations.main(single.replace(cam_backbone_layer="conv_pw_1"))
    model, images, probabilities = load(single)
    heatmaps, _ = gradcam.GradCam(model, "gradcam", "conv_pw_1")(images, probabilities.argmax(axis=1))
    assert heatmaps.shape == (9, 16, 16)
    for row, name in enumerate(name_outputs(pd.read_csv(single.test_csv)["path"].tolist())):
        (photo, _), (overlay, _) = panels[name]
        np.testing.assert_allclose(overlay.astype(int), overlay_heatmap(photo, heatmaps[row]), atol=2)


def test_a_layer_that_is_none_is_refused_before_anything_is_written(single):
    with pytest.raises(UserError, match="'conv_pw1', which does not exist; did you mean conv_pw_1?"):
        draw_activations.main(single.replace(cam_backbone_layer="conv_pw1"))
    assert not Path(single.save_model_path, "cam_output").exists()
