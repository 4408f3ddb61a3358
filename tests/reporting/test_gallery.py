"""The images that the report shows."""

import base64

import cv2
import keras
import numpy as np
import PIL.Image
import pytest
from sklearn.metrics import log_loss

from finetune.core.options import UserError
from finetune.data.images import read_image
from finetune.evaluation.decision import Decision
from finetune.evaluation.evaluation import Answers
from finetune.reporting.cam_pictures import overlay_heatmap
from finetune.reporting.gallery import build_gallery, build_grad_cam, choose_gallery, draw_pictures, get_image_losses


def test_gallery_of_single_labels():
    y_true = np.array([0, 1, 2, 0])
    probabilities = np.array([[0.9, 0.05, 0.05], [0.8, 0.15, 0.05], [0.05, 0.93, 0.02], [0.4, 0.3, 0.3]])
    chosen = probabilities == probabilities.max(axis=1, keepdims=True)
    mistakes, least_confident = choose_gallery(y_true, probabilities, chosen, 2)
    # Rows 1 (0.15 for the true class) and 2 (0.02) are wrong; the predictions have 0.9, 0.8, 0.93, 0.4.
    assert mistakes.tolist() == [2, 1]
    assert least_confident.tolist() == [3, 1]


def test_gallery_of_several_labels_follows_the_thresholds():
    y_true = np.array([[1, 0], [1, 0], [0, 0]])
    probabilities = np.array([[0.3, 0.01], [0.99, 0.25], [0.05, 0.02]])
    chosen = probabilities >= 0.2
    mistakes, least_confident = choose_gallery(y_true, probabilities, chosen, 5)
    # With a threshold of 0.2 row 0 is right despite its loss, and row 1 is wrong. The products of the probabilities are
    # 0.3 x 0.99 = 0.297, 0.99 x 0.25 = 0.2475, 0.95 x 0.98 = 0.931.
    assert mistakes.tolist() == [1]
    assert least_confident.tolist() == [1, 0, 2]


def test_gallery_without_a_mistake_is_empty_and_ties_keep_their_order():
    y_true, probabilities = np.array([0, 0, 1]), np.array([[0.7, 0.3], [0.7, 0.3], [0.3, 0.7]])
    mistakes, least_confident = choose_gallery(y_true, probabilities, probabilities > 0.5, 2)
    assert mistakes.tolist() == []
    assert least_confident.tolist() == [0, 1]


def test_gallery_has_the_predictions_and_shrunken_photos_as_data_uris():
    photo = np.zeros((500, 1000, 3), np.uint8)
    photo[..., 0] = 255
    truth, probabilities = np.array([[1, 1], [0, 1]]), np.array([[0.9, 0.2], [0.3, 0.8]])
    answers = Answers(["a.jpg", "b.jpg"], truth, probabilities, Decision(["cat", "dog"], True))
    gallery = build_gallery(lambda paths: [(photo, photo if path == "a.jpg" else None) for path in paths], answers)
    (mistake,) = gallery["mistakes"]
    assert [mistake[key] for key in ("path", "true", "predicted", "missed", "is_right")] == [
        *("a.jpg", ["cat", "dog"], ["cat"], ["dog"], False)
    ]
    other = next(item for item in gallery["least_confident"] if item["path"] == "b.jpg")
    assert (other["is_right"], other["missed"], other["heatmap"]) == (True, [], None)
    assert other["probability"] == pytest.approx(0.7)
    kind, content = mistake["photo"].split(",")
    assert kind == "data:image/jpeg;base64"
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (160, 320, 3)
    # OpenCV reads blue, green, red: the photo is still red.
    np.testing.assert_allclose(decoded[80, 160], [0, 0, 254], atol=3)


def test_losses_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), size=6)
    y_true = rng.integers(0, 4, 6)
    expected = [log_loss([label], [row], labels=range(4)) for label, row in zip(y_true, probabilities, strict=True)]
    np.testing.assert_allclose(get_image_losses(y_true, probabilities), expected, rtol=1e-6)
    labels = rng.integers(0, 2, (6, 4))
    expected = [log_loss(truth, row, labels=[0, 1]) for truth, row in zip(labels, probabilities, strict=True)]
    np.testing.assert_allclose(get_image_losses(labels, probabilities), expected, rtol=1e-6)


def test_loss_of_an_impossible_answer_is_finite():
    probabilities = np.array([[1, 0]], np.float32)
    np.testing.assert_allclose(get_image_losses(np.array([1]), probabilities), 16.118, rtol=1e-4)
    np.testing.assert_allclose(get_image_losses(np.array([[0, 1]]), probabilities), 16.118, rtol=1e-4)


def small_network():
    pixels = keras.Input((8, 8, 3))
    backbone = keras.Model(pixels, keras.layers.AveragePooling2D(4, name="blocks")(pixels), name="backbone")
    head = [keras.layers.Flatten(), keras.layers.Dense(1, name="logits"), keras.layers.Activation("sigmoid")]
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, keras.Sequential(head, name="classifier")(backbone(image)))
    model.get_layer("classifier").get_layer("logits").set_weights([np.full((12, 1), 0.01), np.zeros(1)])
    return model


@pytest.mark.parametrize(("size", "shown"), [((40, 400), (32, 320)), ((400, 40), (320, 32)), ((20, 30), (20, 30))])
def test_heatmaps_lie_over_photos_of_their_own_aspect_ratio(size, shown, tmp_path):
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[: size[0] // 2, size[1] // 2 :] = 200
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    grad_cam = build_grad_cam(small_network(), "hirescam", "")
    ((photo, heatmap),) = draw_pictures(
        grad_cam, (8, 8), "stretch", read_image, overlay_heatmap, [str(tmp_path / "photo.png")]
    )
    assert photo.shape == heatmap.shape == (*shown, 3)
    # Only the top right one of the four blocks that the network sees is not black.
    np.testing.assert_array_equal(heatmap, overlay_heatmap(photo, np.array([[0, 1], [0, 0]])))


def test_an_unsuitable_model_has_no_heatmaps_and_an_unknown_layer_is_refused(capsys):
    foreign = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    assert build_grad_cam(foreign, "gradcam", "") is None
    assert "have no heatmaps" in capsys.readouterr().out
    with pytest.raises(UserError, match="blocks"):
        build_grad_cam(small_network(), "gradcam", "block")
