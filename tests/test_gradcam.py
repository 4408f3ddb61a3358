import keras
import numpy as np
import pytest
from keras import layers

from configs import Configs, UserError
from gradcam import GradCam, overlay_heatmap, write_caption
from model import ModelFactory

HEIGHT, WIDTH, CHANNELS, CLASSES = 2, 3, 3, 2


def network(*head: layers.Layer, activation: str = "softmax") -> keras.Model:
    pixels = keras.Input((HEIGHT, WIDTH, CHANNELS), name="image")
    backbone = keras.Model(pixels, layers.Rescaling(1.0)(pixels), name="backbone")
    outputs = [layers.Dense(CLASSES, name="logits"), layers.Activation(activation, name="probabilities")]
    classifier = keras.Sequential([*head, *outputs], name="classifier")
    inputs = keras.Input((HEIGHT, WIDTH, CHANNELS), name="image")
    return keras.Model(inputs, classifier(backbone(inputs)))


def set_logits(model: keras.Model, kernel: np.ndarray, bias: tuple[float, float] = (0, 0)) -> None:
    model.get_layer("classifier").get_layer("logits").set_weights([np.asarray(kernel), np.asarray(bias)])


def normalised_heatmap(image: np.ndarray, channel_weights: np.ndarray) -> np.ndarray:
    heatmap = np.maximum((image * channel_weights).sum(axis=-1), 0)
    return heatmap / heatmap.max()


def random_images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(8).integers(0, 256, (count, HEIGHT, WIDTH, CHANNELS)).astype(np.uint8)


def test_heatmap_of_a_hand_worked_example():
    model = network(layers.GlobalAveragePooling2D())
    set_logits(model, [[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])
    image = np.array([[[8, 0, 0], [6, 1, 9], [2, 3, 0]], [[4, 2, 7], [4, 0, 1], [3, 1, 0]]], np.uint8)
    heatmaps, _ = GradCam(model)(image[None], np.array([0]))
    np.testing.assert_allclose(heatmaps, [[[1, 0.5, 0], [0, 0.5, 0.125]]], atol=1e-6)
    assert heatmaps.dtype == np.float32


@pytest.mark.parametrize("class_index", [0, 1])
@pytest.mark.parametrize("pooling", [layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D])
def test_heatmap_with_pooling_weighs_channels_as_the_logit_does(pooling, class_index):
    model = network(pooling())
    kernel = np.array([[1.0, -0.4], [-0.7, 0.9], [0.3, 0.2]])
    set_logits(model, kernel)
    heatmaps, _ = GradCam(model)(random_images(), np.full(4, class_index))
    for image, heatmap in zip(random_images(), heatmaps, strict=True):
        np.testing.assert_allclose(heatmap, normalised_heatmap(image, kernel[:, class_index]), atol=1e-5)


@pytest.mark.parametrize("class_index", [0, 1])
def test_heatmap_with_flatten_weighs_channels_by_the_mean_gradient(class_index):
    model = network(layers.Flatten())
    kernel = np.random.default_rng(9).normal(1, 1, (HEIGHT * WIDTH * CHANNELS, CLASSES))
    set_logits(model, kernel)
    channel_weights = kernel.reshape(HEIGHT, WIDTH, CHANNELS, CLASSES).mean(axis=(0, 1))[:, class_index]
    image = random_images()[0]
    heatmaps, _ = GradCam(model)(image[None], np.array([class_index]))
    np.testing.assert_allclose(heatmaps[0], normalised_heatmap(image, channel_weights), atol=1e-5)


def test_gradient_passes_hidden_units_that_are_active_and_ignores_dropout():
    model = network(layers.GlobalAveragePooling2D(), layers.Dropout(0.9), layers.Dense(2, activation="relu"))
    hidden = np.array([[1.0, -1.0], [0.5, -2.0], [-0.2, -0.5]])
    model.get_layer("classifier").layers[2].set_weights([hidden, np.zeros(2)])
    kernel = np.array([[2.0, 1.0], [-9.0, 9.0]])
    set_logits(model, kernel)
    image = random_images()[0]
    heatmaps, _ = GradCam(model)(image[None], np.array([0]))
    np.testing.assert_allclose(heatmaps[0], normalised_heatmap(image, hidden[:, 0] * kernel[0, 0]), atol=1e-5)


@pytest.mark.parametrize("class_indices", [None, np.array([1, 0, 1, 1])], ids=["default", "chosen"])
def test_a_batch_equals_its_images_one_by_one(class_indices):
    model = network(layers.Flatten())
    set_logits(model, np.random.default_rng(9).normal(0, 1e-2, (18, CLASSES)))
    explain, images = GradCam(model), random_images()
    heatmaps, probabilities = explain(images, class_indices)
    for position in range(len(images)):
        chosen = None if class_indices is None else class_indices[position : position + 1]
        heatmap, probability = explain(images[position : position + 1], chosen)
        np.testing.assert_allclose(heatmaps[position], heatmap[0], atol=1e-6)
        np.testing.assert_allclose(probabilities[position], probability[0], atol=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_most_probable_class_is_explained_by_default(activation):
    model = network(layers.GlobalAveragePooling2D(), activation=activation)
    set_logits(model, [[0.01, -0.01], [-0.01, 0.02], [0.0, -0.005]])
    explain, images = GradCam(model), random_images(12)
    heatmaps, probabilities = explain(images)
    best = probabilities.argmax(axis=1)
    assert set(best) == {0, 1}
    np.testing.assert_array_equal(heatmaps, explain(images, best)[0])
    assert (heatmaps != explain(images, 1 - best)[0]).any()


def test_probabilities_are_the_models():
    model = network(layers.Flatten())
    set_logits(model, np.random.default_rng(9).normal(0, 1e-2, (18, CLASSES)), bias=(0.3, -0.2))
    np.testing.assert_allclose(GradCam(model)(random_images())[1], model(random_images()), atol=1e-6)


def test_zeros_where_nothing_supports_the_class():
    model = network(layers.GlobalAveragePooling2D())
    set_logits(model, [[-1.0, 1.0], [-2.0, 1.0], [-0.5, 1.0]])
    np.testing.assert_array_equal(GradCam(model)(random_images(), np.zeros(4, int))[0], np.zeros((4, HEIGHT, WIDTH)))
    black = np.zeros((1, HEIGHT, WIDTH, CHANNELS), np.uint8)
    np.testing.assert_array_equal(GradCam(model)(black, np.array([1]))[0], np.zeros((1, HEIGHT, WIDTH)))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_saturated_probability_is_still_explained(activation):
    model = network(layers.GlobalAveragePooling2D(), activation=activation)
    kernel = np.array([[900.0, -900.0], [300.0, -300.0], [600.0, -600.0]])
    set_logits(model, kernel)
    image = random_images()[0]
    heatmaps, probabilities = GradCam(model)(image[None])
    np.testing.assert_array_equal(probabilities, [[1, 0]])
    np.testing.assert_allclose(heatmaps[0], normalised_heatmap(image, kernel[:, 0]), atol=1e-5)


def test_input_of_any_numeric_type():
    model = network(layers.Flatten())
    explain, images = GradCam(model), random_images()
    for kind in (np.int32, np.float32, np.float64):
        np.testing.assert_array_equal(explain(images.astype(kind))[0], explain(images)[0])


def test_explaining_leaves_the_model_unchanged():
    model = network(layers.Flatten(), layers.Dropout(0.5))
    before, config = [weight.numpy() for weight in model.weights], model.to_json()
    GradCam(model)(random_images())
    assert model.to_json() == config
    assert all(np.array_equal(old, new.numpy()) for old, new in zip(before, model.weights, strict=True))


def test_a_foreign_model_is_refused():
    foreign = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="only_layer")])
    with pytest.raises(UserError, match="only_layer") as caught:
        GradCam(foreign)
    assert "backbone" in str(caught.value)
    assert "classifier" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "heatmap_shape"),
    [
        ({"final_layer_pooling": None, "classifier_layer_sizes": [4, 0.4]}, (2, 4)),
        ({"final_layer_pooling": "max", "multi_label_classification": True}, (2, 4)),
        ({"pop_conv_layers": 13}, (4, 8)),
        ({"cnn_downscaling_factor": 1, "cnn_downscaling_filters": 4}, (1, 2)),
    ],
    ids=["flatten", "max", "popped", "downscaling"],
)
def test_heatmaps_of_a_mobilenet(options, heatmap_shape):
    configs = Configs(
        visual_model_name="MobileNet",
        image_target_size=(64, 128, 3),
        classes=["a", "b", "c"],
        use_imagenet_weights=False,
        batch_norm_momentum=0.0,
        **options,
    )
    model = ModelFactory().get_model(configs)
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 128, 3), np.uint8)
    model(images, training=True)
    heatmaps, probabilities = GradCam(model)(images, np.array([2, 0]))
    assert heatmaps.shape == (2, *heatmap_shape)
    assert heatmaps.min() >= 0
    assert set(heatmaps.max(axis=(1, 2))) <= {0, 1}
    assert np.ptp(probabilities) > 1e-3
    np.testing.assert_allclose(probabilities, model(images, training=False), atol=1e-6)


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


def test_caption_shows_characters_beyond_ascii_as_question_marks():
    image = np.zeros((40, 200, 3), np.uint8)
    np.testing.assert_array_equal(write_caption(image, "ruža 0.98"), write_caption(image, "ru?a 0.98"))
