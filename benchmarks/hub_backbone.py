"""How long a KerasHub backbone takes in a model of this project, in relation to KerasHub's own call: about 1.

    python benchmarks/hub_backbone.py

Random weights: a ViT and an HGNetV2 of middle size at 224 pixels, in turns. Needs requirements-hub.txt.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import Configs
from finetune.models.formats import importing
from finetune.models.kerashub import PREFIX
from finetune.models.safety import LAYER_PACKAGES
from finetune.training.speeds import time_in_turns
from model import ModelFactory

with importing("This benchmark", LAYER_PACKAGES):
    import keras_hub

SIDE, BATCH, SECONDS = 224, 8, 60
STAGES = [(32, 32, 64, 1, 3, 3), (64, 48, 256, 1, 3, 3), (256, 96, 512, 2, 3, 5), (512, 192, 1024, 1, 3, 5)]
BACKBONES = {
    "ViTBackbone": {"patch_size": 16, "num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768},
    "HGNetV2Backbone": {
        "depths": [1, 1, 2, 1],
        "embedding_size": 32,
        "hidden_sizes": [64, 256, 512, 1024],
        "stem_channels": [3, 16, 32],
        "hidden_act": "relu",
        "use_learnable_affine_block": True,
        "stackwise_stage_filters": STAGES,
        "apply_downsample": [False, True, True, True],
        "use_lightweight_conv_block": [False, False, True, True],
    },
}


def measure(kind: str) -> float:
    """Returns the least time of a model's backbone over that of the same backbone, called as KerasHub's users do."""
    own = getattr(keras_hub.models, kind)(**BACKBONES[kind], image_shape=(SIDE, SIDE, 3))
    with tempfile.TemporaryDirectory() as folder:
        own.save_to_preset(folder)
        options = {"visual_model_name": f"{PREFIX}{folder}", "backbone_preprocessing": ["none"]}
        configs = Configs(image_target_size=(SIDE, SIDE, 3), classes=["a", "b"], **options)
        backbone = ModelFactory().get_model(configs).get_layer("backbone")
    images = tf.constant(np.random.default_rng(0).normal(size=(BATCH, SIDE, SIDE, 3)), tf.float32)
    calls = [
        tf.function(lambda images, network=network: network(images, training=False)) for network in (backbone, own)
    ]
    steps = [lambda call=call: keras.tree.map_structure(np.asarray, call(images)) for call in calls]
    for step in steps:
        step()
    own_time, time = time_in_turns(steps[::-1], SECONDS).min(axis=0)
    return float(time / own_time)


def main() -> None:
    """Prints the ratio of each."""
    for kind in BACKBONES:
        print(f"{kind}: {measure(kind):.3f} times KerasHub's own time", flush=True)


if __name__ == "__main__":
    main()
