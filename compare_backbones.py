"""Compares backbones on the images of train_csv before training: quality, speed and size.

The features of each backbone are computed once, stored on disk, and judged by a cross-validated logistic regression.
"""

from __future__ import annotations

import dataclasses
import math

from configs import Configs
from finetune.core.options import define
from finetune.core.scripts import run_script, script

ALL = "all"
# One or two of each family, small enough for a machine without a GPU.
USUAL_BACKBONES = [
    *("MobileNetV3Small", "MobileNetV3Large", "MobileNetV2", "MobileNet", "EfficientNetB0", "EfficientNetV2B0"),
    *("NASNetMobile", "DenseNet121", "ResNet50V2", "InceptionV3", "Xception", "ConvNeXtTiny"),
]


def backbones_fault(names: list[str]) -> str:
    """Returns what is wrong with a list of backbones; empty if nothing is."""
    return "" if names else "expected at least one backbone, or all. Received: none"


@dataclasses.dataclass
class CompareConfigs(Configs):
    """The options of this script, in addition to those of every script."""

    backbones: list[str] = define(USUAL_BACKBONES, "Backbones to compare, or all", check=backbones_fault)
    image_sizes: list[int] = define(
        [], "Sides of square images to compare, in pixels; empty uses image_target_size", at_least=1, at_most=16384
    )
    max_images: int = define(2000, "Largest number of images to use, drawn in proportion to the classes", at_least=10)
    write_path: str = define("./backbone_comparison.csv", "CSV file to write; the picture next to it has the same name")


@script
def main(configs: CompareConfigs) -> dict:
    """Draws the images, probes each backbone at each size, and ranks them.

    Returns:
        `ranking`, the table as written, and `left_out`: by name and size, why a backbone is not in it.
    """
    # Imported here, so that --help does not wait for TensorFlow.
    from finetune.core.devices import set_seed, start_devices
    from finetune.core.files import write_csv
    from finetune.data.inspection import resolve_pixel_range
    from finetune.data.tables import resolve_class_names
    from finetune.models.backbones import BACKBONES, find_backbone
    from finetune.predicting.prediction_files import check_write_path
    from finetune.studies.backbone_comparison import draw_images, probe_backbones, rank
    from finetune.studies.backbone_report import draw_ranking, print_ranking
    from finetune.training.run import count_epochs
    from model import check_registered

    check_write_path(configs.write_path, configs.train_csv)
    names = list(BACKBONES if ALL in configs.backbones else dict.fromkeys(configs.backbones))
    for name in {*configs.backbones} - {ALL}:
        find_backbone(name, configs.backbone_preprocessing, "backbones")
    check_registered(configs.replace(visual_model_name=names[0]))
    configs.classes = resolve_class_names(
        configs.classes, configs.train_csv, configs.csv_label_column, configs.multi_label_classification
    )
    start_devices(configs.gpu_percentage)
    configs.random_seed = set_seed(configs.random_seed, configs.deterministic)
    configs = resolve_pixel_range(configs, [configs.train_csv])
    left_out_rows, number = draw_images(configs, configs.max_images)
    steps = math.ceil(number / (configs.batch_size * configs.gradient_accumulation_steps))
    configs.num_epochs = count_epochs(configs.num_epochs, configs.min_steps, steps)
    sizes = [(side, side) for side in dict.fromkeys(configs.image_sizes)] or [configs.image_target_size[:2]]
    # Each backbone is probed at the size that is compared.
    configs.eval_image_size = []
    probed, left_out = probe_backbones(configs, names, sizes, left_out_rows, number)
    ranking = rank(probed, configs.classes, configs.multi_label_classification, configs.random_seed)
    try:
        write_csv(configs.write_path, ranking)
        picture = draw_ranking(ranking, configs.write_path)
    finally:
        print_ranking(ranking, left_out, configs.num_epochs)
    print(f"Wrote {configs.write_path} and {picture}")
    return {"ranking": ranking, "left_out": left_out}


if __name__ == "__main__":
    run_script(main)
