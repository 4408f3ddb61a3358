"""The artefacts that compress_weights.py writes, and the packages and images that it needs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from configs import Configs
from finetune.core.devices import is_installed
from finetune.core.options import UserError
from finetune.core.values import get_input_size
from finetune.data.images import build_reader, fit_image
from finetune.models import compressed
from finetune.models.formats import FORMATS, WEIGHTS_DTYPES, WEIGHTS_ENDING, Format, importing
from generator import get_generator

CALIBRATION_IMAGES = 200
# Always written. Keras reads them.
WEIGHTS = Format(
    title="compressed weights",
    endings=dict.fromkeys(WEIGHTS_DTYPES, WEIGHTS_ENDING),
    runtime=lambda: compressed,
    loading=(
        "Keras and this project on the path",
        'from utils import custom_load_model\n\nmodel = custom_load_model(".", {stem})\n'
        "probabilities = model.predict(image[None])",
    ),
)


def list_kinds(weights_dtype: str, exports: Sequence[str], quantization: str) -> list[tuple[str, str]]:
    """Returns the kind of each artefact to write, weights or a name in `FORMATS`, and its precision."""
    return [("weights", weights_dtype)] + [
        (name, quantization if quantization in FORMATS[name].endings else "float32") for name in dict.fromkeys(exports)
    ]


def require_packages(exports: Sequence[str]) -> None:
    """Raises UserError if an export needs a package that is not installed; called before any work."""
    for name in exports:
        packages = {**FORMATS[name].writer_packages, **FORMATS[name].reader_packages}
        with importing(f"--export {name}", packages):
            for package in packages:
                if not is_installed(package):
                    raise ImportError(f"No module named {package!r}")


def read_calibration_images(configs: Configs) -> list[np.ndarray]:
    """Reads up to `CALIBRATION_IMAGES` random training images, uint8 RGB `(height, width, 3)`.

    Raises:
        UserError: the training table is unknown or does not exist, or an image cannot be read.
    """
    purpose = "train_csv: --export_quantization int8 takes its ranges from training images"
    if "train_csv" not in configs.given:
        raise UserError(f"{purpose}, and no configs.json names those of this model. Give --train_csv.")
    if not os.path.isfile(configs.train_csv):
        received = f"Received: {configs.train_csv!r}, and there is none."
        raise UserError(f"{purpose}. Expected a CSV file. {received} Give --train_csv.")
    paths = get_generator(configs.train_csv, configs.classes, configs, training=False).paths
    rng = np.random.default_rng(configs.random_seed or 0)
    chosen = rng.permutation(len(paths))[:CALIBRATION_IMAGES]
    size, read = get_input_size(configs), build_reader(configs)
    print(f"int8: ranges from {len(chosen)} images of {configs.train_csv}")
    return [fit_image(read(paths[row], size), size, configs.resize_mode) for row in chosen]
