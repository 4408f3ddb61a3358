"""Compresses and exports a trained model, and compares the results with the original on the test set.

The weights go to an .h5 file without the optimizer's state, the layers to a .json file; --export also writes the model
for other runtimes. Each artefact is run by its own runtime on the test set. If its accuracy is more than --tolerance
points lower, it keeps a .rejected name and the exit status is 1.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from typing import Any, Self

from configs import Configs
from finetune.core.files import write_json
from finetune.core.options import UserError, define
from finetune.core.scripts import run_script, script
from finetune.models.formats import FORMATS, WEIGHTS_DTYPES, exports_fault, list_quantizations


@dataclasses.dataclass
class CompressConfigs(Configs):
    """The options of this script, in addition to those of every script."""

    model_path: str = define("", "Model file or run folder; empty takes load_model_path or save_model_path")
    weights_dtype: str = define(
        "float32",
        "Type of the compressed weights: exact (float32), half the size (float16) or a quarter (int8)",
        choices=WEIGHTS_DTYPES,
    )
    export: list[str] = define(
        [], f"Also write the model for other runtimes, any of {', '.join(FORMATS)}", check=exports_fault
    )
    export_quantization: str = define(
        "none",
        "Numbers in the tflite file: float32 (none), 8-bit weights (dynamic), or 8-bit weights and activations (int8)",
        choices=("none", *list_quantizations()),
    )
    tolerance: float = define(
        1.0, "Percentage points of test accuracy that compression may cost", at_least=0, at_most=100
    )

    def validate(self) -> Self:
        """Also checks `export_quantization` against `export`; returns and raises as `Configs` does."""
        super().validate()
        fitting = [name for name, one in FORMATS.items() if self.export_quantization in one.endings]
        if self.export_quantization != "none" and not {*fitting} & {*self.export}:
            raise UserError(
                f"export_quantization: expected none without --export {' or '.join(fitting)}, which it is for. "
                f"Received: {self.export_quantization!r}"
            )
        return self


@script
def main(configs: CompressConfigs) -> dict[str, Any]:
    """Writes each artefact, compares it with the original on the test set, prints the table and writes the report.

    Returns:
        The content of `compression_report.json`: `model`, `model_bytes`, `model_sha256`, `test_csv` and `images` (None
        without a comparison), `tolerance`, and `artefacts`, with those that earlier calls made from the same model.
        Each has `kind` (weights, or one of `FORMATS`), `precision`, `path`, `files` (bytes by path), `rejected`, and
        `comparison`, from `compare`, or None.

    Raises:
        UserError: there is no model, an export needs a missing package, or the test set or the calibration images
            cannot be read or do not fit the model.
    """
    # Imported here, so that --help does not wait for TensorFlow.
    from finetune.core.devices import start_devices
    from finetune.exporting import exports
    from finetune.exporting.exports import list_kinds, load_subject, read_calibration_images, require_packages
    from finetune.reporting.model_card import write_model_card
    from finetune.training.run_folder import COMPRESSION_FILE
    from finetune.training.trained_model import configure_table, resolve_model_path, take_description, take_test_data

    model_path = resolve_model_path(configs.model_path or configs.load_model_path or configs.save_model_path)
    start_devices(configs.gpu_percentage)
    require_packages(configs.export)
    configs = take_test_data(configs, model_path)
    target = exports.choose_target(configs, model_path)
    configs = take_description(configs, model_path, needs_classes=bool(configs.test_csv or configs.export))
    model, decision, subject = load_subject(model_path, configs)
    report = exports.start_report(model_path, configs.test_csv, configs.tolerance, subject)
    calibrate = functools.partial(read_calibration_images, configure_table(configs, model_path, configs.train_csv))
    kinds = list_kinds(configs.weights_dtype, configs.export, configs.export_quantization)
    exports.write_artefacts(report, kinds, model, target, calibrate, subject)
    folder, own = os.path.dirname(target), dict(report)
    report["artefacts"] = report["artefacts"] + exports.find_earlier(folder, report)
    try:
        if configs.classes:
            exports.write_metadata(target, configs, decision, bool(configs.export))
        write_json(os.path.join(folder, COMPRESSION_FILE), report)
        write_model_card(folder)
    finally:
        exports.print_report(own)
    return report


def compress(configs: CompressConfigs) -> dict[str, Any]:
    """Runs `main`; the exit status is 1 if an artefact is rejected."""
    report = main(configs)
    if any(artefact["rejected"] for artefact in report["artefacts"]):
        sys.stdout.flush()
        raise SystemExit(1)
    return report


if __name__ == "__main__":
    run_script(compress)
