"""draw_activations.py: the classes that are drawn, the pictures, their page, and the faithfulness of the maps."""

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
from finetune.evaluation.abstention import Abstention
from finetune.evaluation.decision import Decision, write_decision
from finetune.evaluation.explaining import REMOVALS
from finetune.evaluation.novelty import Reference, name_model_digest, to_unit_length
from finetune.models.model_files import build_with_features
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


@pytest.fixture
def few_pilots(monkeypatch):
    """Compares the ways to remove a part on two images, for tests that are not about faithfulness."""
    monkeypatch.setattr(explaining, "PILOT_IMAGES", 2)


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
        pop_conv_layers=74,
        image_target_size=(SIZE, SIZE, 3),
        use_imagenet_weights=False,
        batch_size=4,
        save_model_path=str(folder),
    )
    keras.utils.set_random_seed(1)
    model = ModelFactory().get_model(configs)
    # The weights spread the probabilities, so that each class is predicted for some images.
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
    """Returns the saved model, the test images and the model's probabilities, computed by Keras alone."""
    model = keras.models.load_model(os.path.join(configs.save_model_path, "best_model.keras"), compile=False)
    sequence = get_generator(configs.test_csv, CLASS_NAMES, configs.replace(batch_size=99), training=False)
    return model, sequence[0][0], model.predict(sequence[0][0], verbose=0)


@pytest.fixture
def panels(monkeypatch):
    """Collects the images and captions of each picture by file name."""
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


def name_probabilities(row: np.ndarray, positions: list[int]) -> list[str]:
    return [f"{row[position]:.2f} {CLASS_NAMES[position]}" for position in positions]


def test_the_predicted_class_is_drawn_next_to_the_photo_and_shown_on_the_page(single, panels, capsys):
    folder = Path(single.save_model_path, "cam_output")
    folder.mkdir()
    (folder / "index.html").write_text("previous")
    result = draw_activations.main(single)
    model, images, probabilities = load(single)
    best = probabilities.argmax(axis=1)
    assert len(set(best)) > 1
    true = np.repeat(CLASS_NAMES, 3)
    assert captions(panels, single) == [
        [f"true: {true[row]}", *name_probabilities(probabilities[row], [best[row]])] for row in range(9)
    ]
    heatmaps, _ = gradcam.GradCam(model)(images, best)
    sources = pd.read_csv(single.test_csv)["path"].tolist()
    for row, name in enumerate(name_outputs(sources)):
        (photo, _), (overlay, _) = panels[name]
        # The photos have 48x64 pixels, and the network sees 32x32: both are too small for a caption.
        np.testing.assert_allclose(photo.astype(int), cv2.resize(cv2.imread(sources[row])[..., ::-1], WIDER), atol=2)
        np.testing.assert_allclose(overlay.astype(int), overlay_heatmap(photo, heatmaps[row]), atol=2)
    for path in result["paths"]:
        height, width, _ = cv2.imread(path).shape
        assert width == 2 * WIDER[0]
        assert height > WIDER[1]
    assert {os.path.dirname(path) for path in result["paths"]} == {str(folder)}
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<a class="picture" href="([^"]+)"', page) == [Path(path).name for path in result["paths"]]
    assert str(folder / "index.html") in capsys.readouterr().out
    answers = ["right" if one else "wrong" for one in best == np.repeat(range(3), 3)]
    assert re.findall(r'data-answer="(\w+)"', page) == answers
    confidences = [float(text) for text in re.findall(r'data-confidence="([^"]+)"', page)]
    np.testing.assert_allclose(confidences, probabilities.max(axis=1), atol=1e-5)


def test_the_page_filters_by_the_answers_of_a_rule_and_a_reference(single, capsys):
    model, images, probabilities = load(single)
    path = os.path.join(single.save_model_path, "best_model.keras")
    features = to_unit_length(build_with_features(model)(images, training=False)["features"])
    reference = Reference(features[::2], [*"abcde"], [*"abcde"], name_model_digest(path))
    reference.write(single.save_model_path)
    similarities = np.sort(features.astype(float) @ features[::2].astype(float).T, axis=1)[:, -5:].mean(axis=1)
    confidences = probabilities.max(axis=1)
    familiarity = np.log(confidences / (1 - confidences)) + (similarities - similarities.mean()) / similarities.std()
    scales = [0.0, 1.0, float(similarities.mean()), float(similarities.std())]
    # Between two photos: the compiled network rounds differently.
    threshold = float(np.sort(familiarity)[3:5].mean())
    unknown = familiarity < threshold
    lowest = float(np.sort(confidences[~unknown])[1:3].mean())
    rule = Abstention(0.1, [lowest], 0.01, threshold, scales, 100)
    write_decision(single.save_model_path, Decision(CLASS_NAMES, False, model="best_model.keras", abstention=rule))
    draw_activations.main(single)
    page = Path(single.save_model_path, "cam_output", "index.html").read_text(encoding="utf-8")
    expected = np.select([unknown, confidences < lowest], ["unknown", "unsure"], "answered").tolist()
    assert len({*expected}) == 3
    assert re.findall(r'data-given="(\w+)"', page) == expected
    # Without its reference, no photo is unknown, which is printed.
    os.remove(os.path.join(single.save_model_path, "reference.npz"))
    capsys.readouterr()
    draw_activations.main(single)
    assert "no photo is called unknown" in capsys.readouterr().out
    page = Path(single.save_model_path, "cam_output", "index.html").read_text(encoding="utf-8")
    assert {*re.findall(r'data-given="(\w+)"', page)} == {"answered", "unsure"}


@pytest.mark.parametrize(("cam_classes", "number"), [("top_k", 3), ("threshold", 1), ("true", 1)])
def test_classes_of_a_single_label_are_drawn_in_order(cam_classes, number, single, panels, few_pilots):
    # At most as many classes as there are.
    paths = draw_activations.main(single.replace(cam_classes=cam_classes, cam_top_k=50))["paths"]
    _, _, probabilities = load(single)
    for place, (row, found) in enumerate(zip(probabilities, captions(panels, single), strict=True)):
        positions = [place // 3] if cam_classes == "true" else np.argsort(-row)[:number]
        assert found[1:] == name_probabilities(row, positions)
    assert {cv2.imread(path).shape[1] for path in paths} == {(1 + number) * WIDER[0]}


def test_true_draws_the_labels_of_the_table(several, panels, few_pilots):
    draw_activations.main(several.replace(cam_classes="true"))
    labels = pd.read_csv(several.test_csv)["class"]
    for found, label in zip(captions(panels, several), labels, strict=True):
        assert found[0] == "true: " + label.replace("$", ", ")
        assert sorted(caption.split(" ", 1)[1] for caption in found[1:]) == sorted(label.split("$"))


def test_threshold_draws_the_predictions_in_calibrated_probabilities(several, panels, few_pilots):
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
    for row, found in zip(calibrated, captions(panels, several), strict=True):
        order = [position for position in np.argsort(-row) if row[position] >= threshold]
        assert found[1:] == (name_probabilities(row, order) or ["no label above its threshold"])
        numbers.add(len(order))
    assert {0, 1} <= numbers
    assert result["faithfulness"]["images"] == (calibrated >= threshold).any(axis=1).sum()


def test_photos_without_a_label_above_the_threshold_are_drawn_too(several, capsys, panels, few_pilots):
    write_decision(several.save_model_path, Decision(CLASS_NAMES, True, exact_match_threshold=1.0))
    result = draw_activations.main(several.replace(cam_classes="threshold"))
    assert len(result["paths"]) == 24
    for (photo, _), (other, caption) in panels.values():
        np.testing.assert_array_equal(photo, other)
        assert caption == "no label above its threshold"
    assert result["faithfulness"]["images"] == 0
    assert "nothing to measure" in capsys.readouterr().out


def test_options_set_method_layer_opacity_and_colours(single, panels, few_pilots):
    options = {"cam_method": "layercam", "cam_backbone_layer": "conv_pw_1", "cam_alpha": 0.7, "cam_colormap": "viridis"}
    draw_activations.main(single.replace(**options))
    model, images, probabilities = load(single)
    heatmaps, _ = gradcam.GradCam(model, "layercam", "conv_pw_1")(images, probabilities.argmax(axis=1))
    assert heatmaps.shape == (9, 16, 16)
    for row, name in enumerate(name_outputs(pd.read_csv(single.test_csv)["path"].tolist())):
        (photo, _), (overlay, _) = panels[name]
        expected = overlay_heatmap(photo, heatmaps[row], 0.7, "viridis")
        np.testing.assert_allclose(overlay.astype(int), expected, atol=4)


@pytest.mark.slow
def test_faithfulness_is_printed_and_independent_of_the_batch_size(several, capsys):
    results = [draw_activations.main(several.replace(batch_size=size))["faithfulness"] for size in (5, 24)]
    assert results[0]["images"] == 24
    assert results[0] == pytest.approx(results[1], abs=1e-4)
    printed = capsys.readouterr().out
    assert printed.count("Faithfulness (24 of 24 images): ") == 2
    assert f"{100 * results[0]['explained']:.0f} %" in printed


def test_faithfulness_is_that_of_the_explained_class_in_calibrated_probabilities(single, monkeypatch, few_pilots):
    write_decision(single.save_model_path, Decision(CLASS_NAMES, False, 3.0, "validation"))
    _, _, raw = load(single)
    calibrated = raw ** (1 / 3) / (raw ** (1 / 3)).sum(axis=1, keepdims=True)
    seen = []

    def measure(predict, images, parts, class_indices, removal):
        seen.append(class_indices)
        return np.zeros(len(images))

    monkeypatch.setattr(explaining, "predict_without", measure)
    monkeypatch.setattr(explaining, "choose_removal_on", lambda *_: REMOVALS[0])
    result = draw_activations.main(single.replace(cam_classes="top_k"))["faithfulness"]
    # Each batch is measured without its highlighted parts, then without random ones.
    assert np.concatenate(seen[::2]).tolist() == calibrated.argmax(axis=1).tolist()
    assert result["highlighted"] == pytest.approx(calibrated.max(axis=1).mean(), abs=1e-5)


@pytest.mark.slow
def test_removal_and_faithfulness_are_measured_on_evenly_spaced_samples(several, monkeypatch):
    asked, measured = [], []

    def answer(predict, images, parts, class_indices, removal):
        asked.append((removal, len(images)))
        measured.extend(images)
        # Only the smallest filling does not change the predictions.
        return np.full(len(images), 1.0 if removal.share == 0.02 else 0.0)

    monkeypatch.setattr(explaining, "PILOT_IMAGES", 4)
    monkeypatch.setattr(explaining, "MOST_MEASURED", 3)
    monkeypatch.setattr(explaining, "predict_without", answer)
    result = draw_activations.main(several)["faithfulness"]
    assert (result["removal"], result["share"], result["images"]) == (REMOVALS[-1].name, 0.02, 3)
    assert {removal for removal, _ in asked} == {*REMOVALS}
    assert sum(number for removal, number in asked if removal == REMOVALS[0]) == 2 * 4
    assert sum(number for removal, number in asked if removal == REMOVALS[-1]) == 2 * (4 + 3)
    _, images, _ = load(several)
    # The first, the last and the middle one of 24 (11.5 rounds to 12), without the highlighted part and a random one.
    for row in (0, 12, 23):
        assert sum((image == images[row]).all() for image in measured[-6:]) == 2


def test_a_model_with_predictions_that_are_not_finite_is_refused(single):
    path = os.path.join(single.save_model_path, "best_model.keras")
    model = keras.models.load_model(path, compile=False)
    logits = model.layers[-1].get_layer("logits")
    logits.set_weights([weight * np.nan for weight in logits.get_weights()])
    model.save(path)
    with pytest.raises(UserError, match="not finite"):
        draw_activations.main(single)


def test_photos_are_upright_with_their_aspect_ratio_and_within_the_largest_size(single, panels, tmp_path, few_pilots):
    folder = tmp_path / "photos ü#?%'"
    folder.mkdir()
    pixels = np.full((300, 900, 3), 128, np.uint8)
    pixels[:, :300] = 255
    PIL.Image.fromarray(pixels).save(folder / "wide.jpg")
    # Orientation 6: the top of the scene, here the white third, is at the right of the pixels.
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
    # Two panels each; narrow ones are padded, so that their captions are legible.
    assert [cv2.imread(path).shape[1] for path in result["paths"]] == [640, 320, 320]


def test_an_unknown_layer_is_refused_before_anything_is_written(single):
    with pytest.raises(UserError, match="conv_pw1'.*conv_pw_1"):
        draw_activations.main(single.replace(cam_backbone_layer="conv_pw1"))
    assert not Path(single.save_model_path, "cam_output").exists()
