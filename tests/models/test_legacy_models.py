"""Models from an older version give the same answers as in that version.

legacy_models/ is from before the package got subpackages (Keras 3.15.1): the first layers of a MobileNet under a head,
trained, as model.h5, and compressed with int8 weights. answers.json holds the probabilities that this version gave.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from utils import custom_load_model, load_model

STORED = Path(__file__).parent / "legacy_models"
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("name", ["model", "compressed"])
def test_a_legacy_model_answers_as_it_did(name):
    answers = json.loads((STORED / "answers.json").read_text())[name]
    models = [load_model(str(STORED / f"{name}.h5"))]
    if name == "compressed":
        models.append(custom_load_model(str(STORED), name))
    for model in models:
        # Processors round differently.
        np.testing.assert_allclose(model.predict(IMAGES, verbose=0), answers, rtol=1e-4)
