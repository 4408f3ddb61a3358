"""Writes a trained model without its optimizer's state: its weights as .h5, its layers as .json."""

from __future__ import annotations

import dataclasses
import os

from configs import Configs, define, run_script
from utils import custom_save_model, load_model, resolve_model_path


@dataclasses.dataclass
class CompressConfigs(Configs):
    """The options of this script, beside those of every script."""

    model_path: str = define("", "The model file or the run's folder; empty takes load_model_path or save_model_path")


def main(configs: CompressConfigs) -> dict:
    """Loads the model, writes it compressed beside itself, prints both sizes; returns them in bytes."""
    model_path = resolve_model_path(configs.model_path or configs.load_model_path or configs.save_model_path)
    model = load_model(model_path)
    folder, file_name = os.path.split(model_path)
    written = custom_save_model(model, folder, f"{os.path.splitext(file_name)[0]}_compressed")
    sizes = {path: os.path.getsize(path) for path in (model_path, *written)}
    for path, size in sizes.items():
        print(f"{path}: {size / 1e6:.2f} MB")
    return sizes


if __name__ == "__main__":
    run_script(main, CompressConfigs)
