"""Grad-CAM and the methods like it, by hand, by the papers' formulas and by a peer."""

import keras
import numpy as np
import pytest
from built_models import build_alive
from keras import layers

from configs import CAM_METHODS
from finetune.core.options import UserError
from finetune.evaluation.gradcam import METHODS, GradCam
from finetune.models.model_files import build_inference_model, build_with_features

HEIGHT, WIDTH, CHANNELS, CLASSES = 2, 3, 3, 2


def network(
    *head: layers.Layer,
    activation: str = "softmax",
    shape: tuple[int, int, int] = (HEIGHT, WIDTH, CHANNELS),
    spatial: layers.Layer | None = None,
    backbone: keras.Model | None = None,
) -> keras.Model:
    pixels = keras.Input(shape, name="image")
    backbone = backbone or keras.Model(pixels, (spatial or layers.Rescaling(1.0))(pixels), name="backbone")
    outputs = [layers.Dense(CLASSES, name="logits"), layers.Activation(activation, name="probabilities")]
    head = keras.Sequential([*head, *outputs], name="classifier")
    inputs = keras.Input(shape, name="image")
    return keras.Model(inputs, head(backbone(inputs)))


def set_logits(model: keras.Model, kernel: np.ndarray, bias: tuple[float, float] = (0, 0)) -> None:
    model.get_layer("classifier").get_layer("logits").set_weights([np.asarray(kernel), np.asarray(bias)])


def normalised_heatmap(image: np.ndarray, channel_weights: np.ndarray) -> np.ndarray:
    heatmap = np.maximum((image * channel_weights).sum(axis=-1), 0)
    return heatmap / heatmap.max()


def random_images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(8).integers(0, 256, (count, HEIGHT, WIDTH, CHANNELS)).astype(np.uint8)


def literal_map(method: str, features: np.ndarray, gradients: np.ndarray, score: float) -> np.ndarray:
    """Computes the papers' formulas channel by channel, with the derivatives of the exponential of the score."""
    heatmap = np.zeros(features.shape[:2])
    for channel in range(features.shape[2]):
        plane, slope = features[..., channel], gradients[..., channel]
        first, second, third = (np.exp(score) * slope**order for order in (1, 2, 3))
        alpha = np.divide(second, 2 * second + plane.sum() * third, out=np.zeros_like(second), where=second > 0)
        weight = {
            "gradcam": slope.sum() / slope.size,
            "gradcam++": (alpha * np.maximum(first, 0)).sum(),
            "hirescam": slope,
            "layercam": np.where(slope > 0, slope, 0),
        }[method]
        heatmap += weight * plane
    return np.maximum(heatmap, 0) / (np.maximum(heatmap, 0).max() or 1)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("method", CAM_METHODS)
def test_every_method_follows_its_papers_formula_through_a_hidden_layer(method, activation):
    rng = np.random.default_rng(3)
    hidden, output = rng.normal(0, 0.02, (HEIGHT * WIDTH * CHANNELS, 6)), rng.normal(0, 1, (6, CLASSES))
    model = network(layers.Flatten(), layers.Dropout(0.9), layers.Dense(6, activation="relu"), activation=activation)
    model.get_layer("classifier").layers[2].set_weights([hidden, np.zeros(6)])
    set_logits(model, output)
    heatmaps, _ = GradCam(model, method)(random_images(), np.tile([0, 1], (4, 1)))
    for image, of_classes in zip(random_images().astype(float), heatmaps, strict=True):
        active = image.ravel() @ hidden > 0
        for class_index, heatmap in enumerate(of_classes):
            gradients = (hidden @ (active * output[:, class_index])).reshape(image.shape)
            score = np.maximum(image.ravel() @ hidden, 0) @ output[:, class_index]
            np.testing.assert_allclose(heatmap, literal_map(method, image, gradients, score), atol=1e-4)


def test_grad_cam_plus_plus_survives_gradients_whose_third_power_is_no_float32():
    model = network(layers.Flatten(), shape=(1, 2, 2))
    set_logits(model, 1e-18 * np.array([[1, 2], [-1, 0], [0.5, 0], [2, 1]]))
    heatmaps, _ = GradCam(model, "gradcam++")(np.array([[[[1, 2], [3, 0]]]], np.uint8), np.array([0]))
    # Without damping worth the name the weights are 3/4 and 1.
    np.testing.assert_allclose(heatmaps[0, 0], [1, 2.25 / 2.75], atol=1e-6)


def test_the_table_of_methods_is_that_of_the_option():
    assert tuple(METHODS) == CAM_METHODS


def random_linear_model():
    model = network(layers.Flatten())
    set_logits(model, np.random.default_rng(9).normal(0, 1e-2, (18, CLASSES)), bias=(0.3, -0.2))
    return model


def test_an_image_is_explained_alone_as_in_a_batch_and_with_other_classes():
    model = random_linear_model()
    explain, images = GradCam(model), random_images()
    several, probabilities = explain(images, np.array([[1, 0, 1]] * 4))
    assert several.shape == (4, 3, HEIGHT, WIDTH)
    np.testing.assert_allclose(probabilities, model(images), atol=1e-6)
    for position, column in np.ndindex(4, 3):
        alone, probability = explain(images[position : position + 1], np.array([(1, 0, 1)[column]]))
        np.testing.assert_allclose(several[position, column], alone[0], atol=1e-6)
        np.testing.assert_allclose(probabilities[position], probability[0], atol=1e-6)


@pytest.mark.parametrize("layer_name", ["", "conv_pw_1"])
@pytest.mark.parametrize("augmentation", ["none", "flip"])
def test_features_are_those_that_test_py_keeps(augmentation, layer_name):
    model = build_inference_model(build_alive(pop_conv_layers=66, image_target_size=(32, 64, 3)), augmentation)
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 64, 3), np.uint8)
    expected = build_with_features(model)(images, training=False)
    found = GradCam(model, layer_name=layer_name).read(images)
    np.testing.assert_allclose(found.features, expected["features"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.probabilities, expected["probabilities"], atol=1e-6)


def test_any_number_of_pairs_is_explained_from_features_read_once():
    explain, images = GradCam(random_linear_model()), random_images(2)
    features = explain.read(images).start
    by_class = explain(images, np.array([[0, 1]] * 2))[0]
    for pairs in ([], [(1, 0)], [(0, 0), (0, 1), (1, 1), (1, 0), (1, 1)]):
        rows, class_indices = np.array(pairs, int).reshape(-1, 2).T
        heatmaps = explain.explain(features, rows, class_indices)
        assert heatmaps.shape == (len(pairs), HEIGHT, WIDTH)
        assert heatmaps.dtype == np.float32
        np.testing.assert_allclose(heatmaps, by_class[rows, class_indices], atol=1e-6)


class CountedScaling(layers.Rescaling):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.runs = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.traces = 0

    def call(self, inputs):
        self.traces += 1
        self.runs.assign_add(1)
        return super().call(inputs)


def test_features_are_computed_once_a_batch_and_traced_once_for_every_batch_size(monkeypatch):
    traces = []

    def weigh(features, gradients):
        traces.append(features.shape)
        return gradients

    monkeypatch.setitem(METHODS, "gradcam", weigh)
    spatial = CountedScaling()
    explain = GradCam(network(layers.Flatten(), spatial=spatial))
    runs_before, traces_before = float(spatial.runs), spatial.traces
    for size, class_indices in [(4, None), (1, None), (3, np.zeros(3)), (2, np.zeros((2, 5))), (4, np.zeros((4, 1)))]:
        explain(random_images(size), class_indices)
    assert float(spatial.runs) - runs_before == 5
    assert spatial.traces - traces_before == 1
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("peer_name", ["Gradcam", "Layercam"])
def test_heatmaps_equal_those_of_tf_keras_vis(peer_name):
    peers = pytest.importorskip(f"tf_keras_vis.{peer_name.lower()}")
    pixels = keras.Input((16, 20, 3))
    maps = layers.Conv2D(5, 3, activation="relu", name="last_spatial")(layers.Rescaling(1 / 255)(pixels))
    head = [layers.Flatten(), layers.Dense(8, activation="relu"), layers.Dense(3, name="logits")]
    # The peer explains the output of a flat model: the same layers without the nesting and the softmax.
    flat = keras.Model(pixels, keras.Sequential(head)(maps))
    head = keras.Sequential([*head, layers.Activation("softmax")], name="classifier")
    inputs = keras.Input((16, 20, 3))
    model = keras.Model(inputs, head(keras.Model(pixels, maps, name="backbone")(inputs)))
    images = np.random.default_rng(2).integers(0, 256, (3, 16, 20, 3)).astype(np.float32)
    options = {"penultimate_layer": "last_spatial", "expand_cam": False, "normalize_cam": False}
    score = lambda logits: [logits[0, 2], logits[1, 0], logits[2, 1]]  # noqa: E731
    expected = np.asarray(getattr(peers, peer_name)(flat, clone=False)(score, images, **options))
    heatmaps, _ = GradCam(model, peer_name.lower())(images, np.array([2, 0, 1]))
    np.testing.assert_allclose(heatmaps, expected / expected.max(axis=(1, 2), keepdims=True), atol=1e-5)


def test_the_most_probable_class_is_explained_by_default():
    model = network(layers.GlobalAveragePooling2D())
    set_logits(model, [[0.01, -0.01], [-0.01, 0.02], [0.0, -0.005]])
    explain, images = GradCam(model), random_images(12)
    heatmaps, probabilities = explain(images)
    best = probabilities.argmax(axis=1)
    assert set(best) == {0, 1}
    np.testing.assert_array_equal(heatmaps, explain(images, best)[0])
    assert (heatmaps != explain(images, 1 - best)[0]).any()


def test_a_class_without_support_has_a_map_of_zeros():
    model = network(layers.GlobalAveragePooling2D())
    set_logits(model, [[-1.0, 1.0], [-2.0, 1.0], [-0.5, 1.0]])
    np.testing.assert_array_equal(GradCam(model)(random_images(), np.zeros(4, int))[0], np.zeros((4, HEIGHT, WIDTH)))
    black = np.zeros((1, HEIGHT, WIDTH, CHANNELS), np.uint8)
    np.testing.assert_array_equal(GradCam(model)(black, np.array([1]))[0], np.zeros((1, HEIGHT, WIDTH)))


def test_a_saturated_probability_is_still_explained():
    model = network(layers.GlobalAveragePooling2D())
    kernel = np.array([[900.0, -900.0], [300.0, -300.0], [600.0, -600.0]])
    set_logits(model, kernel)
    image = random_images()[0]
    heatmaps, probabilities = GradCam(model)(image[None])
    np.testing.assert_array_equal(probabilities, [[1, 0]])
    np.testing.assert_allclose(heatmaps[0], normalised_heatmap(image, kernel[:, 0]), atol=1e-5)


def test_input_of_any_numeric_type_leaves_the_model_unchanged():
    model = network(layers.Flatten(), layers.Dropout(0.5))
    before, config = [weight.numpy() for weight in model.weights], model.to_json()
    explain, images = GradCam(model), random_images()
    for kind in (np.int32, np.float32, np.float64):
        np.testing.assert_array_equal(explain(images.astype(kind))[0], explain(images)[0])
    assert model.to_json() == config
    assert all(np.array_equal(old, new.numpy()) for old, new in zip(before, model.weights, strict=True))


def test_a_foreign_model_is_refused():
    foreign = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="only_layer")])
    with pytest.raises(UserError, match=r"(?s)(?=.*backbone)(?=.*classifier).*only_layer"):
        GradCam(foreign)


def residual_network() -> keras.Model:
    """Builds a residual block whose sum is weighed by an attention of one number per channel."""
    inputs = keras.Input((HEIGHT, WIDTH, CHANNELS))
    scaled = layers.Rescaling(1 / 255, name="scaled")(inputs)
    branch = layers.Activation("tanh")(layers.Conv2D(CHANNELS, 1, name="branch")(scaled))
    attention = layers.GlobalAveragePooling2D(keepdims=True, name="pooled")(scaled)
    outputs = layers.Multiply(name="weighed")([layers.Add(name="sum")([scaled, branch]), attention])
    return network(layers.Flatten(), backbone=keras.Model(inputs, outputs, name="backbone"))


@pytest.mark.parametrize(("method", "mirrors"), [*((method, False) for method in CAM_METHODS), ("gradcam", True)])
def test_a_layer_inside_a_residual_block_is_explained_by_its_own_gradient(method, mirrors):
    rng, model = np.random.default_rng(4), residual_network()
    mixing, kernel = rng.normal(0, 1, (CHANNELS, CHANNELS)), rng.normal(0, 1, (18, CLASSES))
    model.get_layer("backbone").get_layer("branch").set_weights([mixing[None, None], np.full(CHANNELS, 0.1)])
    set_logits(model, kernel)
    explain = GradCam(build_inference_model(model, "flip" if mirrors else "none"), method, "branch")
    heatmaps, probabilities = explain(random_images(), np.array([[1, 0]] * 4))
    assert heatmaps.dtype == np.float32
    views = [model(random_images()), model(random_images()[:, :, :: -1 if mirrors else 1])]
    np.testing.assert_allclose(probabilities, np.mean(views, axis=0), atol=1e-6)

    def run(inputs, branch, class_index):
        weighed = (inputs + np.tanh(branch)) * inputs.mean(axis=(0, 1))
        return weighed.ravel() @ kernel[:, class_index]

    for image, of_classes in zip(random_images() / 255, heatmaps, strict=True):
        branch = image @ mixing + 0.1
        for class_index, heatmap in zip((1, 0), of_classes, strict=True):
            gradients = np.empty_like(branch)
            for place in np.ndindex(branch.shape):
                step = np.zeros_like(branch)
                step[place] = 1e-4
                rise = run(image, branch + step, class_index) - run(image, branch - step, class_index)
                gradients[place] = rise / 2e-4
            # Any score: the map is relative to its own peak, and the formulas to the exponential's first derivative.
            np.testing.assert_allclose(heatmap, literal_map(method, branch, gradients, 1.0), atol=1e-4)


def test_the_last_layer_by_its_name_is_the_default():
    model = residual_network()
    by_name, default = GradCam(model, "layercam", "weighed"), GradCam(model, "layercam")
    for found, expected in zip(by_name(random_images()), default(random_images()), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    start = by_name.read(random_images()).start
    assert by_name.explain(start, np.empty(0, int), np.empty(0, int)).shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Branche", ("'Branche'", "did you mean branch?", "weighed, sum, ")),
        ("pooled", ("'pooled'", "has no places")),
        ("zzz", ("'zzz'", "weighed, sum, activation")),
        ("logits", ("'logits'",)),
    ],
)
def test_a_layer_that_cannot_be_explained_is_refused(name, parts):
    with pytest.raises(UserError, match="cam_backbone_layer") as caught:
        GradCam(residual_network(), layer_name=name)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"final_layer_pooling": None, "classifier_layer_sizes": [4, 0.4]}, marks=pytest.mark.slow),
        pytest.param({"final_layer_pooling": "max", "multi_label_classification": True}, marks=pytest.mark.slow),
        pytest.param(
            {"cnn_downscaling_factor": 1, "cnn_downscaling_filters": 4, "image_target_size": (64, 64, 3)},
            marks=pytest.mark.slow,
        ),
        {"mixed_precision": True, "final_layer_pooling": None},
    ],
    ids=["flatten", "max", "downscaling", "mixed"],
)
def test_heatmaps_of_a_mobilenet_by_every_method(options):
    model = build_alive(pop_conv_layers=74, **{"image_target_size": (32, 64, 3), **options})
    images = np.random.default_rng(1).integers(0, 256, (2, *model.input_shape[1:]), np.uint8)
    features, probabilities, _ = GradCam(model).read(images)
    assert np.ptp(probabilities) > 1e-3
    # In 16 bits the compiled network rounds differently from the eager one.
    tolerance = 2e-2 if "mixed_precision" in options else 1e-6
    np.testing.assert_allclose(probabilities, model(images, training=False), atol=tolerance)
    every_map, (rows, class_indices) = [], np.indices((2, 3)).reshape(2, 6)
    for method, layer_name in [*((method, "") for method in CAM_METHODS), ("layercam", "conv_pw_1_bn")]:
        explain = GradCam(model, method, layer_name)
        heatmaps = explain.explain(explain.read(images)[0] if layer_name else features, rows, class_indices)
        layer = model.get_layer("backbone")
        layer = layer.get_layer(layer_name) if layer_name else layer
        assert heatmaps.shape == (6, *layer.output.shape[1:3])
        assert heatmaps.dtype == np.float32
        assert np.isfinite(heatmaps).all()
        assert heatmaps.min() >= 0
        assert set(heatmaps.max(axis=(1, 2))) <= {0, 1}
        assert heatmaps.any()
        every_map.append(heatmaps)
    assert np.ptp(every_map[:-1], axis=0).max() > 1e-2
