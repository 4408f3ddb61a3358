"""What each backbone must do, as tests: a file that imports them says of which backbones.

Two files do, so that two processes share the backbones; each is built once, for all of its tests.
"""

import gc
from typing import NamedTuple

import keras
import numpy as np
import pytest
from built_models import build_alive, random_images

from finetune.evaluation.gradcam import GradCam
from finetune.models.backbones import BACKBONES
from finetune.models.freezing import freeze_layers
from model import ModelFactory

# Of backbones that take no 64x64 images.
LARGER_SIZES = {"Xception": (71, 96), "InceptionV3": (107, 139), "InceptionResNetV2": (107, 139)}


class Built(NamedTuple):
    name: str
    model: keras.Model
    own_last_name: str
    images: np.ndarray
    probabilities: np.ndarray


@pytest.fixture(scope="module")
def built(request):
    own_names = []

    def remember(*args, **kwargs):
        model = application(*args, **kwargs)
        own_names.append(model.layers[-1].name)
        return model

    name = request.param
    application = getattr(keras.applications, name)
    keras.utils.set_random_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.applications, name, remember)
        model = build_alive(visual_model_name=name, image_target_size=(*LARGER_SIZES.get(name, (64, 96)), 3))
    freeze_layers(model.get_layer("backbone"), 3)
    images = random_images(1, *model.input_shape[1:])
    yield Built(name, model, own_names[0], images, np.asarray(model(images, training=False)))
    del model
    keras.backend.clear_session()
    # Models hold themselves in circles: without it those of several GB pile up.
    gc.collect()


@pytest.mark.slow
def test_backbone_takes_an_image(built):
    assert built.probabilities.shape == (1, 3)
    assert built.probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert np.ptp(built.probabilities) > 1e-3


@pytest.mark.slow
def test_last_conv_layer_is_the_backbones_last(built):
    backbone = built.model.get_layer("backbone")
    last = backbone.layers[-1]
    assert ModelFactory().get_last_conv_layer(built.name) == last.name
    assert last.output.shape == backbone.output_shape
    assert len(last.output.shape) == 4
    assert last.name.startswith("last_") or last.name == built.own_last_name
    assert last.name == BACKBONES[built.name].last_layer


@pytest.mark.slow
def test_backbone_gives_a_heatmap(built):
    heatmaps, probabilities = GradCam(built.model)(built.images)
    assert heatmaps.shape == (1, *built.model.get_layer("backbone").output_shape[1:3])
    assert np.isfinite(heatmaps).all()
    assert heatmaps.min() >= 0
    assert heatmaps.max() in (0, 1)
    # Of the compiled network, as these are: its fused operations round otherwise than the eager ones do, and a random
    # network of 152 layers makes 0.0006 of that.
    np.testing.assert_allclose(probabilities, built.model.predict(built.images, verbose=0), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_backbone_survives_saving(built, tmp_path):
    path = tmp_path / "model.keras"
    built.model.save(path)
    loaded = keras.models.load_model(path, compile=False)
    path.unlink()
    np.testing.assert_allclose(loaded(built.images, training=False), built.probabilities, rtol=1e-5, atol=1e-7)
    assert len(loaded.trainable_weights) == len(built.model.trainable_weights)
