"""The registry of export formats, and the file names of exported and compressed models.

Scripts use it without waiting for TensorFlow: the module of a format is imported on use.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from finetune.core.options import UserError
from finetune.core.texts import join_names
from finetune.core.values import find_nearest, quote_value

if TYPE_CHECKING:
    import keras

    from finetune.models.exported import Calibration, ExportedModel

MODEL_SUFFIXES = (".keras", ".h5", ".hdf5")
# Precisions of compressed models.
WEIGHTS_DTYPES = ("float32", "float16", "int8")
# File name endings of compressed models.
WEIGHTS_ENDING, LAYERS_ENDING = ("_compressed", ".h5"), ("_compressed", ".json")
# Marks an artefact that loses too much accuracy, before its suffix.
REJECTED = ".rejected"


class Runtime(Protocol):
    """The interface of a format's module."""

    def write(self, model: keras.Model, path: str, precision: str, calibrate: Calibration) -> tuple[str, ...]:
        """Writes a model in a precision of the format; returns the written paths, first the one to load."""

    def load(self, path: str) -> ExportedModel:
        """Returns the model in a file or folder; raises any exception if it is damaged."""


class Format(NamedTuple):
    """An export format.

    Attributes:
        title: for messages, with an article.
        endings: by precision, the ending of the file name after the model's name: a part of the name, and the suffix.
            float32 is the default of export_quantization.
        runtime: imports and returns the module that writes and reads it.
        loading: name of the runtime, and Python code for the model card and the docs. The code goes from `image`, the
            pixels of a photo of the model's size, to `probabilities`; `{path}` is replaced by the quoted path.
        loading_features: code as in `loading` for a file with features, which goes to `probabilities` and `features`;
            empty for a format that cannot hold them.
        folder_mark: the file that identifies a folder of this format; empty for formats of one file.
        writer_packages: pip requirements for writing only, by the name to import.
        reader_packages: pip requirements for reading, by the name to import.
    """

    title: str
    endings: Mapping[str, tuple[str, str]]
    runtime: Callable[[], Runtime]
    loading: tuple[str, str]
    loading_features: str = ""
    folder_mark: str = ""
    writer_packages: Mapping[str, str] = {}
    reader_packages: Mapping[str, str] = {}

    def list_suffixes(self) -> list[str]:
        """Returns the suffixes of its files."""
        return list(dict.fromkeys(suffix for _, suffix in self.endings.values()))

    def is_format_of(self, path: str) -> bool:
        """Returns whether a file or folder has this format, judged by its suffix or its content."""
        if self.folder_mark:
            return os.path.isfile(os.path.join(path, self.folder_mark))
        return os.path.splitext(path)[1] in self.list_suffixes() and not os.path.isdir(path)


def _import_tflite() -> Runtime:
    from finetune.models import tflite

    return tflite


def _import_onnx() -> Runtime:
    from finetune.models import onnx_format

    return onnx_format


def _import_saved_model() -> Runtime:
    from finetune.models import saved_model

    return saved_model


# By the name for --export.
FORMATS: dict[str, Format] = {
    "tflite": Format(
        title="a TensorFlow Lite model",
        endings={"float32": ("", ".tflite"), "dynamic": ("_dynamic", ".tflite"), "int8": ("_int8", ".tflite")},
        runtime=_import_tflite,
        loading=(
            "ai_edge_litert, one image at a time",
            "from ai_edge_litert.interpreter import Interpreter\n\n"
            "model = Interpreter({path}).get_signature_runner()\n"
            'probabilities = model(image=image[None].astype("float32"))["output_0"]',
        ),
        loading_features="from ai_edge_litert.interpreter import Interpreter\n\n"
        "model = Interpreter({path}).get_signature_runner()\n"
        'outputs = model(image=image[None].astype("float32"))\n'
        'probabilities, features = outputs["probabilities"], outputs["features"]',
    ),
    "onnx": Format(
        title="an ONNX model",
        endings={"float32": ("", ".onnx")},
        runtime=_import_onnx,
        loading=(
            "onnxruntime",
            "import onnxruntime\n\nsession = onnxruntime.InferenceSession({path})\n"
            'probabilities = session.run(None, {{"image": image[None].astype("float32")}})[0]',
        ),
        loading_features="import onnxruntime\n\nsession = onnxruntime.InferenceSession({path})\n"
        'inputs = {{"image": image[None].astype("float32")}}\n'
        'probabilities, features = session.run(["probabilities", "features"], inputs)',
        writer_packages={"tf2onnx": "tf2onnx>=1.17,<2"},
        reader_packages={"onnxruntime": "onnxruntime>=1.20,<2"},
    ),
    "saved_model": Format(
        title="a SavedModel",
        endings={"float32": ("_saved_model", "")},
        runtime=_import_saved_model,
        loading=(
            "TensorFlow",
            "import tensorflow as tf\n\nmodel = tf.saved_model.load({path})\n"
            "probabilities = model.serve(tf.constant(image[None], tf.float32)).numpy()",
        ),
        loading_features="import tensorflow as tf\n\nmodel = tf.saved_model.load({path})\n"
        "outputs = model.serve(tf.constant(image[None], tf.float32))\n"
        'probabilities, features = outputs["probabilities"].numpy(), outputs["features"].numpy()',
        folder_mark="saved_model.pb",
    ),
}


# From a file's outputs to an answer, with NumPy alone: `calibration.get_logits`, `novelty.get_certainty`,
# `Abstention.measure_familiarity` and `abstention.decide` for one image. A test compares it with predict.py.
ANSWERING = """\
import json

import numpy as np

with open({metadata}, encoding="utf-8") as file:
    decision = json.load(file)["decision"]
reference = np.load({reference})["features"].astype(np.float32)
names, several, rule = np.array(decision["classes"]), decision["multi_label"], decision["abstention"] or {{}}


def find_answer(probabilities, features):
    raw = probabilities[0].astype(np.float64).clip(1e-46, 1)
    logits = np.log(raw) - (np.log((1 - raw).clip(2.0**-25)) if several else 0)
    scaled = logits / decision["temperature"]
    total = np.logaddexp(0, scaled) if several else np.logaddexp.reduce(scaled)
    calibrated = np.exp(scaled - total).astype(np.float32)
    if rule.get("unknown_threshold") is not None:
        unit = features[0] / max(np.linalg.norm(features[0]), 1e-38)
        similarity = np.sort(reference @ unit.astype(np.float16).astype(np.float32))[-{neighbours}:].mean()
        *others, highest = np.sort(calibrated.astype(np.float64))
        rest = max(1 - highest, 2.0**-25) if several else np.sum(others)
        certainty = np.log(max(highest, 1e-46)) - np.log(max(rest, 1e-46))
        mean, deviation, other_mean, other_deviation = rule["scales"]
        familiarity = (certainty - mean) / deviation + (similarity - other_mean) / other_deviation
        if familiarity < rule["unknown_threshold"]:
            return [{unknown}]
    if several:
        chosen = calibrated >= np.float32(decision["exact_match_threshold"])
    else:
        chosen = np.arange(len(names)) == probabilities[0].argmax()
    given = chosen
    if rule.get("thresholds") is not None:
        lowest = np.array([2 if one is None else one for one in rule["thresholds"]], np.float32)
        given = chosen & (calibrated >= lowest)
    return [{unsure}] if chosen.any() and not given.any() else names[given].tolist()


answer = find_answer(probabilities, features)"""


def show_answering(path: str, refusals: Sequence[str], neighbours: int) -> str:
    """Returns Python code for the model card, from `probabilities` and `features` of an image to its `answer`.

    Args:
        path: of an artefact with features; the code expects its metadata and its reference in the same folder.
        refusals: the words for unsure and unknown.
        neighbours: of the most similar training photos, whose mean similarity counts.
    """
    unsure, unknown = map(json.dumps, refusals)
    paths = {"metadata": metadata_path(path), "reference": reference_path(path)}
    quoted = {name: json.dumps(os.path.basename(path)) for name, path in paths.items()}
    return ANSWERING.format(**quoted, unsure=unsure, unknown=unknown, neighbours=neighbours)


def list_quantizations() -> list[str]:
    """Returns the precisions of all formats other than float32."""
    names = dict.fromkeys(name for one in FORMATS.values() for name in one.endings)
    return [name for name in names if name != "float32"]


def features_fault(names: Sequence[str]) -> str:
    """Returns why formats cannot be exported with features, or an empty text."""
    able = [name for name, one in FORMATS.items() if one.loading_features]
    unable = [name for name in names if name in FORMATS and name not in able]
    if names and not unable:
        return ""
    received = f"{join_names(unable)}, which cannot hold features" if unable else "no --export"
    return f"expected --export with any of {', '.join(able)}. Received: {received}"


def exports_fault(names: Sequence[str]) -> str:
    """Returns the fault in a list of formats to export, or an empty text."""
    unknown = [name for name in names if name not in FORMATS]
    if not unknown:
        return ""
    nearest = find_nearest(unknown[0], list(FORMATS), alikeness=0.4)
    hint = f"; did you mean {nearest}?" if nearest else ""
    return f"expected any of {', '.join(FORMATS)}. Received: {quote_value(unknown[0])}{hint}"


@contextlib.contextmanager
def importing(purpose: str, packages: Mapping[str, str]) -> Iterator[None]:
    """Turns a failed import into a UserError that says how to install the package.

    Args:
        purpose: begins the message.
        packages: pip requirements by the name to import; without any, an ImportError is a bug.
    """
    try:
        yield
    except ImportError as error:
        if not packages:
            raise
        wanted = " ".join(f"'{package}'" for package in packages.values())
        raise UserError(f"{purpose} needs {join_names([*packages])}: {error}. Install: pip install {wanted}") from error


def find_format(path: str) -> Format | None:
    """Returns the format of an exported model, or None for any other path."""
    return next((one for one in FORMATS.values() if one.is_format_of(path)), None)


def is_exported(path: str) -> bool:
    """Returns whether a path is a model for another runtime than Keras."""
    return find_format(path) is not None


def require_format(path: str) -> Format:
    """Returns the format of an exported model; raises UserError for any other path."""
    found = find_format(path)
    if found is None:
        suffixes = [suffix for one in FORMATS.values() if not one.folder_mark for suffix in one.list_suffixes()]
        marks = [one.folder_mark for one in FORMATS.values() if one.folder_mark]
        ending = f"the ending {quote_value(os.path.splitext(path)[1])}"
        raise UserError(
            f"{path} is no exported model. Expected a file that ends in {' or '.join(suffixes)}, or a folder with "
            f"{' or '.join(marks)}; Keras reads {', '.join(MODEL_SUFFIXES)}. Received: "
            f"{'another folder' if os.path.isdir(path) else ending}. Name another, or export the model with "
            "compress_weights.py --export."
        )
    return found


def list_endings() -> set[tuple[str, str]]:
    """Returns the file name endings of everything that compress_weights.py writes."""
    return {WEIGHTS_ENDING, LAYERS_ENDING, *(ending for one in FORMATS.values() for ending in one.endings.values())}


def artefact_stem(path: str) -> str:
    """Returns the name, without ending, of the original model of a file or folder."""
    name = os.path.basename(os.path.normpath(path)).replace(REJECTED, "")
    # The longest matching ending counts.
    for ending in sorted(map("".join, list_endings()), key=len, reverse=True):
        if name.endswith(ending) and name != ending:
            return name.removesuffix(ending)
    return os.path.splitext(name)[0]


def metadata_path(path: str) -> str:
    """Returns the path of an artefact's metadata: classes, image size, decision."""
    return os.path.join(os.path.dirname(os.path.abspath(path)), f"{artefact_stem(path)}_metadata.json")


def labels_path(path: str) -> str:
    """Returns the path of the file with an artefact's class names, one per line."""
    return metadata_path(path).removesuffix("_metadata.json") + "_labels.txt"


def reference_path(path: str) -> str:
    """Returns the path of the features of training photos that an artefact's own are compared with."""
    return metadata_path(path).removesuffix("_metadata.json") + "_reference.npz"


def name_candidate(model_path: str, ending: tuple[str, str]) -> str:
    """Returns the path for a new artefact, marked as rejected until its accuracy is measured."""
    return os.path.join(os.path.dirname(model_path), artefact_stem(model_path) + REJECTED.join(ending))


def name_accepted(path: str) -> str:
    """Returns a path with `.rejected` removed from the name of the file or folder, not from its parents."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.replace(REJECTED, ""))
