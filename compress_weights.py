"""Makes of a trained model what ships, and tells whether it still answers the same.

The weights go into an .h5 file without the optimizer's state, the layers into a .json file; --export writes the model
for other runtimes as well. Each of them is read back by its own runtime and run on the test set beside the original:
where the accuracy falls by more than --tolerance, it keeps a .rejected name and the exit status is 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from configs import Configs, UserError, define, run_script
from utils import (
    ARTEFACT_ENDINGS,
    REJECTED,
    WEIGHTS_DTYPES,
    artefact_stem,
    atomic_path,
    custom_save_model,
    hash_file,
    importing,
    list_files,
    load_model,
    metadata_path,
    resolve_model_path,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    import keras
    import tensorflow as tf
    import tf2onnx

    from finetune.metrics import Decision
    from generator import AugmentedImageSequence
    from utils import ExportedModel

# Where a run's images are: its own configs.json knows.
DATA_OPTIONS = ("train_csv", "test_csv", "image_directory", "csv_label_column")
REPORT_FILE = "compression_report.json"
SIDES = ("before", "after")
TIMED_RUNS = 3
EXPORTS = ("tflite", "onnx", "saved_model")
CALIBRATION_IMAGES = 200
# Reads the training images, uint8 `(height, width, 3)`, from which the ranges of 8-bit activations follow.
Calibration = Callable[[], list[np.ndarray]]


@dataclasses.dataclass
class CompressConfigs(Configs):
    """The options of this script, beside those of every script."""

    model_path: str = define("", "The model file or the run's folder; empty takes load_model_path or save_model_path")
    weights_dtype: str = define(
        "float32", "What the compressed weights are: exact, a half or a quarter of that", choices=WEIGHTS_DTYPES
    )
    export: list[str] = define([], f"Also write the model for other runtimes, any of {', '.join(EXPORTS)}")
    export_quantization: str = define(
        "none",
        "What the tflite file holds: float32, weights in 8 bits (dynamic), or weights and activations in 8 bits with "
        "ranges from images of train_csv (int8)",
        choices=("none", "dynamic", "int8"),
    )
    tolerance: float = define(
        1.0, "Points of accuracy that compression may cost on the test set", at_least=0, at_most=100
    )

    def validate(self) -> CompressConfigs:
        """Checks `export` as well; returns and raises as `Configs` does."""
        super().validate()
        if unknown := [kind for kind in self.export if kind not in EXPORTS]:
            raise UserError(f"export: expected any of {', '.join(EXPORTS)}. Received: {unknown[0]!r}")
        if self.export_quantization != "none" and "tflite" not in self.export:
            raise UserError(
                f"export_quantization: expected none without --export tflite, the one kind that it is for. "
                f"Received: {self.export_quantization!r}"
            )
        return self


def main(configs: CompressConfigs) -> dict[str, Any]:
    """Writes each artefact, compares it with the original on the test set, prints the table and writes the report.

    Returns:
        The content of `compression_report.json`: `model`, `model_bytes`, `model_sha256`, `test_csv` and `images` (None
        where nothing was compared), `tolerance`, and `artefacts`. Each of these has `kind` (weights, or one of
        `EXPORTS`), `precision`, `path`, `files` (bytes by path), `rejected`, and `comparison`, as `compare` returns it,
        or None. What an earlier call made of the same model stands there too.

    Raises:
        UserError: there is no model, an export needs a package that is missing, or the test set or the calibration
            images cannot be used or are not the model's.
    """
    from finetune.report import write_model_card
    from utils import keep_freed_memory, set_gpu_usage

    model_path = resolve_model_path(configs.model_path or configs.load_model_path or configs.save_model_path)
    set_gpu_usage(configs.gpu_percentage)
    keep_freed_memory()
    require_packages(configs.export)
    configs = take_data_of_run(configs, model_path)
    configs = take_description(configs, model_path)
    model, decision, subject = load_subject(model_path, configs)
    report = start_report(model_path, configs, subject)
    calibrate = functools.partial(read_calibration_images, configs)
    for kind, precision in list_kinds(configs):
        path = name_candidate(model_path, kind, precision)
        paths = WRITERS[kind](model, path, precision, calibrate)
        artefact = {"kind": kind, "precision": precision} | judge(paths, subject, configs.tolerance)
        report["artefacts"].append(artefact)
    if configs.classes:
        write_metadata(model_path, configs, decision)
    print_report(report)
    folder = os.path.dirname(model_path)
    report["artefacts"] += find_earlier(folder, report)
    write_json(os.path.join(folder, REPORT_FILE), report)
    write_model_card(folder)
    return report


def require_packages(exports: Sequence[str]) -> None:
    """Raises UserError where a package is missing that an export needs, before any work."""
    if "onnx" in exports:
        with importing("tf2onnx", "--export onnx"):
            import tf2onnx  # noqa: F401
        with importing("onnxruntime", "--export onnx"):
            import onnxruntime  # noqa: F401


def list_kinds(configs: CompressConfigs) -> list[tuple[str, str]]:
    """Returns the kind and the precision of each artefact to write, keys of `ARTEFACT_ENDINGS`."""
    of_tflite = "float32" if configs.export_quantization == "none" else configs.export_quantization
    precisions = dict.fromkeys(EXPORTS, "float32") | {"tflite": of_tflite}
    return [("weights", configs.weights_dtype)] + [(kind, precisions[kind]) for kind in dict.fromkeys(configs.export)]


def take_data_of_run(configs: CompressConfigs, model_path: str) -> CompressConfigs:
    """Takes the test set from the `configs.json` beside the model, where the user gives none.

    Returns:
        The configs; their `test_csv` is empty, which is printed with its reason, where there is nothing to compare on.
    """
    stored_path = os.path.join(os.path.dirname(model_path), "configs.json")
    stored = Configs.read_json(stored_path) if os.path.isfile(stored_path) else {}
    is_given = "test_csv" in configs.given
    configs = configs.replace(
        **{name: stored[name] for name in DATA_OPTIONS if name in stored and name not in configs.given}
    )
    reason = ""
    if not configs.test_csv:
        reason = "test_csv is empty"
    elif not is_given and "test_csv" not in stored:
        reason = f"no {stored_path} names the test set of this model"
    elif not is_given and not os.path.isfile(configs.test_csv):
        reason = f"{configs.test_csv} does not exist"
    if reason:
        print(f"Not compared with the original: {reason}. Give --test_csv to compare on labelled images.")
    return configs.replace(test_csv="") if reason else configs


def take_description(configs: CompressConfigs, model_path: str) -> CompressConfigs:
    """Takes what describes the model from the files beside it; its classes, where needed, from the training CSV."""
    from utils import describe_model, find_trained_model

    configs = configs.replace(load_model_path=model_path)
    if configs.test_csv or configs.export:
        return find_trained_model(configs)[1]
    return describe_model(configs, model_path)


class Subject(NamedTuple):
    """A model on its test set: what each artefact is compared with.

    Attributes:
        model: the original.
        sequence: the test images.
        probabilities: the original's, raw, `(images, classes)`.
        decision: turns them into answers.
    """

    model: keras.Model
    sequence: AugmentedImageSequence
    probabilities: np.ndarray
    decision: Decision


def load_subject(model_path: str, configs: CompressConfigs) -> tuple[keras.Model, Decision | None, Subject | None]:
    """Loads the model, reads its decision and, where there is a test set, predicts that.

    Before anything is written: what is wrong with an image shows here.
    """
    from finetune.metrics import read_decision
    from utils import get_generator, load_fitting_model, predict

    if configs.classes is None:
        return load_model(model_path), None, None
    model = load_fitting_model(model_path, configs.classes, configs.image_target_size[:2])
    folder = os.path.dirname(model_path)
    decision = read_decision(folder, configs.classes, configs.multi_label_classification, model_path)
    if not configs.test_csv:
        return model, decision, None
    sequence = get_generator(configs.test_csv, configs.classes, configs, training=False)
    return model, decision, Subject(model, sequence, predict(model, sequence), decision)


# Writing


def name_candidate(model_path: str, kind: str, precision: str) -> str:
    """Returns the path of an artefact under the name of a rejected one: nothing unproven takes the name that ships."""
    ending, suffix = ARTEFACT_ENDINGS[kind, precision]
    return os.path.join(os.path.dirname(model_path), f"{artefact_stem(model_path)}{ending}{REJECTED}{suffix}")


def name_accepted(path: str) -> str:
    """Takes `.rejected` out of the name of a file or folder; what its folder is called stays."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.replace(REJECTED, ""))


def write_weights(model: keras.Model, path: str, precision: str, _: Calibration) -> tuple[str, ...]:
    """Writes weights and layers; returns the paths of both files, that of the weights first."""
    folder, name = os.path.split(path)
    return custom_save_model(model, folder, os.path.splitext(name)[0], precision)


def write_tflite(model: keras.Model, path: str, precision: str, calibrate: Calibration) -> tuple[str, ...]:
    """Writes a TensorFlow Lite file that takes one image at a time, as phones do it; returns its path."""
    import tensorflow as tf

    options: dict[str, Any] = {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}
    if precision != "float32":
        options["optimizations"] = [tf.lite.Optimize.DEFAULT]
    if precision == "int8":
        # Ops without an 8-bit form stay float32, and so do images and probabilities.
        options["target_spec"]["supported_ops"].insert(0, tf.lite.OpsSet.TFLITE_BUILTINS_INT8)
        images = calibrate()
        options["representative_dataset"] = lambda: ([image[None].astype(np.float32)] for image in images)
    model = to_float32(model)
    with atomic_path(path) as temporary:
        model.export(temporary, format="litert", verbose=False, input_signature=[describe_input(model, 1)], **options)
    return (path,)


def write_onnx(model: keras.Model, path: str, precision: str, _: Calibration) -> tuple[str, ...]:
    """Writes an ONNX file that takes any number of images; returns its path.

    By tf2onnx itself: through Keras 3.15 it fails on GELU and grouped convolutions, which ConvNeXt has, and on the
    numbers of a Normalization layer, which EfficientNet has.
    """
    import tf2onnx
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    function = trace(to_float32(model)).get_concrete_function()
    frozen = convert_variables_to_constants_v2(function, lower_control_flow=False)
    graph = frozen.graph.as_graph_def()
    for function in graph.library.function:
        # What Keras leaves to XLA would stay a call; without this it becomes part of the graph.
        function.attr.pop("_noinline", None)
    for node in [*graph.node, *(node for function in graph.library.function for node in function.node_def)]:
        node.attr.pop("_XlaMustCompile", None)
    (image,), (probabilities,) = ([end.name for end in ends] for ends in (frozen.inputs, frozen.outputs))
    with atomic_path(path) as temporary, quiet():
        tf2onnx.convert.from_graph_def(
            graph,
            input_names=[image],
            output_names=[probabilities],
            tensors_to_rename={image: "image", probabilities: "probabilities"},
            custom_op_handlers={"Erfc": (convert_erfc, [])},
            output_path=temporary,
        )
    return (path,)


def convert_erfc(graph: tf2onnx.graph.Graph, node: tf2onnx.graph.Node, name: str, _: list) -> None:
    """Makes of a node `erfc(x)`, which ONNX has not, `1 - erf(x)`; as tf2onnx calls it."""
    (output,) = node.output
    consumers, shape, dtype = graph.find_output_consumers(output), graph.get_shape(output), graph.get_dtype(output)
    node.type, node.domain = "Erf", ""
    one = graph.make_const(f"{name}/one", np.ones(1, np.float32))
    difference = graph.make_node("Sub", [one.output[0], output], shapes=[shape], dtypes=[dtype])
    graph.replace_all_inputs(output, difference.output[0], ops=consumers)


def write_saved_model(model: keras.Model, path: str, precision: str, _: Calibration) -> tuple[str, ...]:
    """Writes a TensorFlow SavedModel that takes any number of images; returns its folder.

    By TensorFlow's own exporter: Keras 3.15's writes each weight twice (github.com/keras-team/keras/issues/23553).
    """
    import tensorflow as tf

    model, module = to_float32(model), tf.Module()
    module.weights = [weight.value for weight in model.variables]
    module.serve = trace(model)
    with atomic_path(path) as temporary, quiet():
        tf.saved_model.save(module, temporary, signatures=module.serve)
    return (path,)


WRITERS = {"weights": write_weights, "tflite": write_tflite, "onnx": write_onnx, "saved_model": write_saved_model}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TensorFlow from telling about its own old parts, and where it writes to."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def describe_input(model: keras.Model, batch_size: int | None) -> tf.TensorSpec:
    """Returns the form of the images that an export takes."""
    import tensorflow as tf

    return tf.TensorSpec((batch_size, *model.input_shape[1:]), tf.float32, name="image")


def trace(model: keras.Model) -> tf.types.experimental.PolymorphicFunction:
    """Returns a model as TensorFlow's function from float32 images to probabilities."""
    import tensorflow as tf

    def serve(image: tf.Tensor) -> tf.Tensor:
        return model(image, training=False)

    return tf.function(serve, input_signature=[describe_input(model, None)])


def to_float32(model: keras.Model) -> keras.Model:
    """Returns a model that computes in float32 with the same weights; the exporters know nothing of mixed precision."""
    import keras

    layers = model.to_json()
    plain = re.sub('"mixed_b?float16"', '"float32"', layers)
    if plain == layers:
        return model
    rebuilt = keras.models.model_from_json(plain)
    rebuilt.set_weights(model.get_weights())
    return rebuilt


def read_calibration_images(configs: CompressConfigs) -> list[np.ndarray]:
    """Reads up to `CALIBRATION_IMAGES` training images, drawn at random, uint8 RGB `(height, width, 3)`.

    Raises:
        UserError: there is no training table, or an image cannot be read.
    """
    from generator import read_image, resize_image
    from utils import get_generator

    if not os.path.isfile(configs.train_csv):
        raise UserError(
            f"train_csv: --export_quantization int8 takes its ranges from training images. Expected a CSV file. "
            f"Received: {configs.train_csv!r}, and there is none. Give --train_csv."
        )
    paths = get_generator(configs.train_csv, configs.classes, configs, training=False).paths
    rng = np.random.default_rng(configs.random_seed or 0)
    chosen = rng.permutation(len(paths))[:CALIBRATION_IMAGES]
    size, most = configs.image_target_size[:2], configs.max_image_pixels
    print(f"int8: ranges from {len(chosen)} images of {configs.train_csv}")
    return [resize_image(read_image(paths[row], size, most), size) for row in chosen]


def write_metadata(model_path: str, configs: CompressConfigs, decision: Decision) -> None:
    """Writes beside the artefacts what they need where the run's folder is not: labels, options and decision."""
    if configs.export and not (decision.temperature_fitted_on or decision.thresholds_fitted_on):
        print("No temperature and no thresholds are fitted to the model: run test.py first to ship them as well.")
    described = {name for name, option in Configs.options().items() if option.metadata["describes_model"]}
    content = {
        "model": os.path.basename(model_path),
        "input": "RGB, float32, (batch, height, width, 3), pixels from 0 to 255; the preprocessing is inside",
        "output": "raw probabilities, float32, (batch, classes)",
        "options": {name: value for name, value in configs.to_dict().items() if name in described},
        "decision": decision.to_dict(),
    }
    path = metadata_path(model_path)
    write_json(path, content)
    lines = [" ".join(name.splitlines()) + "\n" for name in configs.classes]
    write_text(path.removesuffix("_metadata.json") + "_labels.txt", "".join(lines))


# Comparing


def judge(paths: Sequence[str], subject: Subject | None, tolerance: float) -> dict[str, Any]:
    """Compares an artefact with the original, and gives it the name that ships unless it costs too much.

    Returns:
        Its part of the report but for its kind and precision.
    """
    comparison = compare_artefact(paths[0], subject) if subject else None
    rejected = comparison is not None and comparison["accuracy_drop"] > tolerance
    paths = tuple(paths) if rejected else accept(paths)
    files = {file: os.path.getsize(file) for path in paths for file in list_files(path)}
    return {"path": paths[0], "files": files, "rejected": rejected, "comparison": comparison}


def accept(paths: Sequence[str]) -> tuple[str, ...]:
    """Gives files and folders the names that ship, and returns these."""
    accepted = tuple(map(name_accepted, paths))
    for path, name in zip(paths, accepted, strict=True):
        with atomic_path(name) as temporary:
            os.replace(path, temporary)
    return accepted


def compare_artefact(path: str, subject: Subject) -> dict[str, Any]:
    """Loads an artefact in its own runtime and runs it on the test set.

    Returns:
        What `compare` found, with `images_per_second` of both.
    """
    from utils import load_predictor, predict

    model, sequence, before, decision = subject
    artefact = load_predictor(path, decision.class_names, sequence.image_size)
    comparison = compare(sequence.get_y_true(), before, predict(artefact, sequence), decision)
    speeds = measure_speeds((model, artefact), sequence)
    return comparison | {"images_per_second": dict(zip(SIDES, speeds, strict=True))}


def compare(y_true: np.ndarray, before: np.ndarray, after: np.ndarray, decision: Decision) -> dict[str, Any]:
    """Compares the answers of a model with those of its compressed form.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        before: the original's raw probabilities, `(images, classes)`.
        after: those of the compressed model.
        decision: turns either into answers.

    Returns:
        `images`; `largest_difference` and `mean_difference` of the probabilities; `changed_predictions`, images with
        another answer; `measure`, what `accuracy` is: the share of images with the right label, or multi-label with
        exactly their labels; `accuracy`, before and after; `accuracy_drop` in points, negative for a gain.

    Raises:
        UserError: a probability is not finite.
    """
    from finetune.metrics import check_finite

    for probabilities in (before, after):
        check_finite(probabilities)
    differences = np.abs(before.astype(np.float64) - after)
    chosen = [decision.choose(decision.calibrate(probabilities)) for probabilities in (before, after)]
    truth = y_true.astype(bool) if decision.multi_label else y_true[:, None] == np.arange(before.shape[1])
    right = [int((labels == truth).all(axis=1).sum()) for labels in chosen]
    return {
        "images": len(y_true),
        "largest_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        "changed_predictions": int((chosen[0] != chosen[1]).any(axis=1).sum()),
        "measure": "exact match" if decision.multi_label else "accuracy",
        "accuracy": dict(zip(SIDES, [count / len(y_true) for count in right], strict=True)),
        # Of counts: a difference of shares is rounded, and 1 point may come out above 1.
        "accuracy_drop": 100 * (right[0] - right[1]) / len(y_true),
    }


def measure_speeds(models: Sequence[keras.Model | ExportedModel], sequence: AugmentedImageSequence) -> list[float]:
    """Returns the images a second that each model predicts of the first batch, at its best of `TIMED_RUNS` runs."""
    from utils import compile_model

    images, steps, times = sequence[0][0], [compile_model(model) for model in models], []
    # The first run compiles. The models take turns, so that whatever else the computer does meets both.
    for _ in range(1 + TIMED_RUNS):
        for step in steps:
            start = time.perf_counter()
            np.asarray(step(images))
            times.append(time.perf_counter() - start)
    best = np.reshape(times, (-1, len(models)))[1:].min(axis=0)
    return (len(images) / best).tolist()


# Reporting


def start_report(model_path: str, configs: CompressConfigs, subject: Subject | None) -> dict[str, Any]:
    """Returns the report without an artefact."""
    return {
        "model": model_path,
        "model_bytes": os.path.getsize(model_path),
        "model_sha256": hash_file(model_path).hex(),
        "test_csv": configs.test_csv or None,
        "images": len(subject.probabilities) if subject else None,
        "tolerance": configs.tolerance,
        "artefacts": [],
    }


def find_earlier(folder: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the accepted artefacts of the earlier report that were made of the same model and are still there."""
    try:
        with open(os.path.join(folder, REPORT_FILE), encoding="utf-8") as file:
            earlier = json.load(file)
        now = {name_accepted(artefact["path"]) for artefact in report["artefacts"]}
        is_same = all(earlier[name] == report[name] for name in ("model_sha256", "test_csv"))
        return [
            artefact
            for artefact in (earlier["artefacts"] if is_same else ())
            if not artefact["rejected"]
            and artefact["path"] not in now
            and all(os.path.isfile(path) and os.path.getsize(path) == size for path, size in artefact["files"].items())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # None, or one of another form.
        return []


def print_report(report: dict[str, Any]) -> None:
    """Prints the sizes and, where the models were compared, the table and the verdicts."""
    print(f"\n{format_table(report)}\n")
    for artefact in report["artefacts"]:
        comparison = artefact["comparison"]
        if comparison is None:
            print(f"Written, not compared: {artefact['path']}")
            continue
        verdict, change = "Rejected" if artefact["rejected"] else "Accepted", -comparison["accuracy_drop"] or 0.0
        limit = f"it may fall by {report['tolerance']:g}"
        print(f"{verdict}: {artefact['path']}: {comparison['measure']} changes by {change:+.2f} points, {limit}.")


def format_table(report: dict[str, Any]) -> str:
    """Lays out a row for the original and one for each artefact; the original's speed is that beside the artefact."""
    compared = [artefact["comparison"] for artefact in report["artefacts"] if artefact["comparison"]]
    measure = compared[0]["measure"] if compared else "accuracy"
    rows = [("", "size, MB", measure, "images/s", "original's", "largest diff.", "mean diff.", "changed")]
    accuracy = f"{compared[0]['accuracy']['before']:.4f}" if compared else ""
    rows.append(("original", f"{report['model_bytes'] / 1e6:.2f}", accuracy, *[""] * 5))
    for artefact in report["artefacts"]:
        cells = [f"{artefact['kind']} {artefact['precision']}", f"{sum(artefact['files'].values()) / 1e6:.2f}"]
        if found := artefact["comparison"]:
            before, after = found["images_per_second"].values()
            cells += [f"{found['accuracy']['after']:.4f}", f"{after:.1f}", f"{before:.1f}"]
            cells += [f"{found['largest_difference']:.2g}", f"{found['mean_difference']:.2g}"]
            cells += [f"{found['changed_predictions']} of {found['images']}"]
        rows.append((*cells, *[""] * (8 - len(cells))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Without a test set there is nothing in the other columns.
    shown = 8 if compared else 2
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:shown], widths[1:shown])]).rstrip() for row in rows
    )


def compress(configs: CompressConfigs) -> dict[str, Any]:
    """Runs `main`; where an artefact is rejected, the exit status is 1."""
    report = main(configs)
    if any(artefact["rejected"] for artefact in report["artefacts"]):
        sys.stdout.flush()
        raise SystemExit(1)
    return report


if __name__ == "__main__":
    run_script(compress, CompressConfigs)
