"""How a model's files are named, and what is made of them for shipping."""

from __future__ import annotations

import os
from collections.abc import Sequence

from finetune.core.files import atomic_path
from finetune.core.values import find_nearest, quote_value

MODEL_SUFFIXES = (".keras", ".h5", ".hdf5")
# Of compressed models. Numbers in a weight: fewer take less than the file's note of it, so they stay exact; and as many
# are worth the time that unpacking takes. In int8, fewer numbers than this save too little beside their scale.
WEIGHTS_DTYPES = ("float32", "float16", "int8")
EXPORTS = ("tflite", "onnx", "saved_model")
# How compress_weights.py names what it makes of model.keras, by kind and precision; the longest that fits counts.
ARTEFACT_ENDINGS = {("weights", dtype): ("_compressed", ".h5") for dtype in WEIGHTS_DTYPES}
ARTEFACT_ENDINGS |= {("tflite", "float32"): ("", ".tflite"), ("tflite", "dynamic"): ("_dynamic", ".tflite")}
ARTEFACT_ENDINGS |= {("tflite", "int8"): ("_int8", ".tflite")}
ARTEFACT_ENDINGS |= {("onnx", "float32"): ("", ".onnx"), ("saved_model", "float32"): ("_saved_model", "")}
# Beside a model: its temperature and thresholds.
DECISION_FILE = "decision.json"
# Marks an artefact that costs too much accuracy, in front of its suffix.
REJECTED = ".rejected"
GRAPH_FILE = "saved_model.pb"


def artefact_stem(path: str) -> str:
    """Returns the name without ending of the model that a file or a SavedModel was made of, or is."""
    name = os.path.basename(os.path.normpath(path)).replace(REJECTED, "")
    endings = {"".join(parts) for parts in ARTEFACT_ENDINGS.values()} | {"_compressed.json"}
    for ending in sorted(endings, key=len, reverse=True):
        if name.endswith(ending) and name != ending:
            return name.removesuffix(ending)
    return os.path.splitext(name)[0]


def metadata_path(path: str) -> str:
    """Returns where what an artefact needs beside it stands: its classes, its image size, its decision."""
    return os.path.join(os.path.dirname(os.path.abspath(path)), f"{artefact_stem(path)}_metadata.json")


def labels_path(path: str) -> str:
    """Returns where the class names of an artefact stand, a line each."""
    return metadata_path(path).removesuffix("_metadata.json") + "_labels.txt"


def is_exported(path: str) -> bool:
    """Tells whether a path is that of a model for another runtime than Keras."""
    return os.path.splitext(path)[1] in (".tflite", ".onnx") or os.path.isfile(os.path.join(path, GRAPH_FILE))


def name_candidate(model_path: str, kind: str, precision: str) -> str:
    """Returns the path of an artefact under the name of a rejected one: nothing unproven takes the name that ships."""
    ending, suffix = ARTEFACT_ENDINGS[kind, precision]
    return os.path.join(os.path.dirname(model_path), f"{artefact_stem(model_path)}{ending}{REJECTED}{suffix}")


def name_accepted(path: str) -> str:
    """Takes `.rejected` out of the name of a file or folder; what its folder is called stays."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.replace(REJECTED, ""))


def accept(paths: Sequence[str]) -> tuple[str, ...]:
    """Gives files and folders the names that ship, and returns these."""
    accepted = tuple(map(name_accepted, paths))
    for path, name in zip(paths, accepted, strict=True):
        with atomic_path(name) as temporary:
            os.replace(path, temporary)
    return accepted


def exports_fault(kinds: Sequence[str]) -> str:
    """Returns what is wrong with a list of kinds to export; empty where nothing is."""
    unknown = [kind for kind in kinds if kind not in EXPORTS]
    if not unknown:
        return ""
    nearest = find_nearest(unknown[0], EXPORTS, alikeness=0.4)
    hint = f"; did you mean {nearest}?" if nearest else ""
    return f"expected any of {', '.join(EXPORTS)}. Received: {quote_value(unknown[0])}{hint}"


def list_kinds(weights_dtype: str, exports: Sequence[str], quantization: str) -> list[tuple[str, str]]:
    """Returns the kind and the precision of each artefact to write, keys of `ARTEFACT_ENDINGS`."""
    precisions = dict.fromkeys(EXPORTS, "float32")
    precisions["tflite"] = "float32" if quantization == "none" else quantization
    return [("weights", weights_dtype)] + [(kind, precisions[kind]) for kind in dict.fromkeys(exports)]
