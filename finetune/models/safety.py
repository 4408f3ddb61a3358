"""Checks of a model file before Keras reads it: no code, and no more weights than its size allows."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import keras

from finetune.core.options import LARGEST_JSON_FILE, UserError
from finetune.core.texts import shorten
from finetune.models.formats import MODEL_SUFFIXES, importing
from finetune.models.hdf5_attributes import check_attributes

LAYERS_MEMBER = "config.json"
WEIGHTS_MEMBER = "model.weights.h5"
# Layers with program code, by their class names in a model file.
CODE_LAYERS = {"Lambda": "Lambda layer", "__lambda__": "Python lambda"}
CODE_LAYERS |= {"TFSMLayer": "TFSMLayer", "TorchModuleWrapper": "TorchModuleWrapper"}
# Packages beside Keras that a model file may take its layers from, as pip takes them, by the name to import.
LAYER_PACKAGES = {"keras_hub": "keras-hub>=0.32,<0.33"}
# Their modules with layers of image backbones. Nothing else of these packages is loaded.
LAYER_MODULES = re.compile(
    r"keras_hub\.src\.models\.(vit|deit|dinov2|dinov3|siglip|clip|swin_transformer|mit|hgnetv2|mobilenet|mobilenetv5)"
    r"\.\w+_(backbone|layers|encoder|attention|blocks|vision_encoder)"
)


@contextlib.contextmanager
def telling_damage(sentence: str) -> Iterator[None]:
    """Turns any error of reading a file into a UserError: the sentence, and the reason on one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Keras, h5py, zipfile and json raise all kinds of errors for a damaged file. Keras quotes all layers before
        # the reason.
        reason = str(error).split("Exception encountered:")[-1].strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{sentence}: {shorten(reason).rstrip('.')}. Copy it again, or name another.") from error


def check_model_file(path: str) -> None:
    """Checks a model file before Keras reads it.

    Raises:
        UserError: it needs code, or holds no model.
        Exception: of any kind, if it is damaged.
    """
    limit, (stem, suffix) = largest_content(path), os.path.splitext(path)
    if suffix not in MODEL_SUFFIXES:
        raise ValueError(f"Expected a file that ends in {', '.join(MODEL_SUFFIXES)}.")
    if not os.path.getsize(path):
        raise ValueError("It is empty.")
    if suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path, limit)
        return
    with h5py.File(path) as file:
        if "model_config" not in file.attrs:
            raise UserError(f"{path} holds weights but no model, and {stem}.json is missing.")
        check_arrays(file, limit)
        check_attributes(path)
        for name in ("model_config", "training_config"):
            if name in file.attrs:
                check_layers(json.loads(file.attrs[name]), path)


def _check_archive(archive: zipfile.ZipFile, path: str, limit: int) -> None:
    members = {member.filename: member for member in archive.infolist()}
    for name, member in members.items():
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise ValueError(f"Its part {name} lies outside of it.")
        # Python unpacks other compressions without a limit.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"Its part {name} is packed in a way that Keras does not use.")
    if missing := [name for name in (LAYERS_MEMBER, WEIGHTS_MEMBER) if name not in members]:
        raise ValueError(f"It has no part {missing[0]}.")
    _check_claim(sum(member.file_size for member in archive.infolist()), limit)
    if members[LAYERS_MEMBER].file_size > LARGEST_JSON_FILE:
        raise ValueError(f"Its layers take more than {LARGEST_JSON_FILE} bytes.")
    check_layers(json.loads(archive.read(LAYERS_MEMBER)), path)
    # In memory, as in Keras: HDF5 seeks a lot, which is slow in an archive.
    with h5py.File(io.BytesIO(archive.read(WEIGHTS_MEMBER))) as file:
        check_arrays(file, limit)


def check_arrays(file: h5py.File, limit: int) -> None:
    """Raises ValueError if an HDF5 file links to other files, or its arrays claim more than `limit` bytes."""
    claimed = 0

    def find_outside(name: str, link: Any) -> str | None:
        """Returns the name of a link to another file, and counts the bytes of arrays."""
        # A returned name ends the visit; an error would be lost.
        nonlocal claimed
        item = file[name] if isinstance(link, h5py.HardLink) else None
        is_array = isinstance(item, h5py.Dataset)
        if is_array:
            claimed += max(item.size or 0, math.prod(item.chunks or ())) * item.dtype.itemsize
        return name if item is None or (is_array and (item.external or item.is_virtual)) else None

    if name := file.visititems_links(find_outside):
        raise ValueError(f"Its part {name} lies outside of it.")
    _check_claim(claimed, limit)


def check_layers(layers: Any, path: str) -> None:
    """Checks that a model's layers need no code from the file or from another package than Keras.

    Args:
        layers: the model's layers from its JSON.
        path: of the model.

    Raises:
        UserError: they need code.
        ValueError: `layers` does not describe any.
    """
    if not isinstance(layers, dict):
        raise ValueError("It describes no layers.")
    pending = [layers]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        if not isinstance(part, dict):
            continue
        pending += part.values()
        name, module = part.get("class_name"), part.get("module")
        name = part.get("config") if name == "function" else name
        if name in CODE_LAYERS:
            raise UserError(
                f"{path} is not loaded: it holds a {CODE_LAYERS[name]}, program code of whoever made the file, which "
                "would run on this computer. Build the model again with Keras's own layers, such as Rescaling, copy "
                "its weights with set_weights, and save that."
            )
        registered = str(part.get("registered_name"))
        is_foreign = isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins")
        # Keras looks a name up among the registered classes before it imports the module.
        is_foreign |= registered.split(">")[0] in LAYER_PACKAGES
        if is_foreign and not _is_trusted(str(module), str(name), registered, path):
            raise UserError(
                f"{path} is not loaded: it needs {shorten(f'{module}.{name}')}, code that is not Keras's own. Build "
                "the model again with Keras's own layers, copy its weights with set_weights, and save that."
            )


def list_layer_packages(path: str) -> dict[str, str]:
    """Returns the packages beside Keras that loading a `.keras` file needs, as pip takes them, by their names."""
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        layers = archive.read(LAYERS_MEMBER).decode()
        return {name: package for name, package in LAYER_PACKAGES.items() if f'"{name}.' in layers}
    return {}


def _is_trusted(module: str, name: str, registered: str, path: str) -> bool:
    """Returns whether a class is a layer of a trusted package, which this imports.

    Raises:
        UserError: the package is not installed.
    """
    if not LAYER_MODULES.fullmatch(module):
        return False
    with importing(f"{path}, whose backbone is of another package,", LAYER_PACKAGES):
        import keras_hub  # noqa: F401 - loads the modules of its layers
    kind = getattr(sys.modules.get(module), name, None)
    is_layer = isinstance(kind, type) and issubclass(kind, keras.Layer)
    return is_layer and keras.saving.get_registered_object(registered) in (None, kind)


def largest_content(path: str) -> int:
    """Returns how many bytes of weights a file may claim: packing saves less than that."""
    return max(2**28, 10 * os.path.getsize(path))


def _check_claim(claimed: int, limit: int) -> None:
    if claimed > limit:
        raise ValueError(f"It claims more weights than the {limit >> 20} MiB that a file of its size can hold.")


@contextlib.contextmanager
def limiting_weights(limit: int, initialize: bool = True) -> Iterator[None]:
    """Raises ValueError before the weights of a model in the context take more than `limit` bytes.

    Args:
        limit: in bytes.
        initialize: False fills the weights with zeros, which saves time if all are replaced.
    """
    claimed, add_weight = 0, keras.Layer.add_weight

    def add_counted(
        layer: keras.Layer, shape: Sequence[int] | None = None, initializer: Any = None, *values: Any, **options: Any
    ) -> Any:
        nonlocal claimed
        claimed += 4 * math.prod(shape or ())
        _check_claim(claimed, limit)
        return add_weight(layer, shape, initializer if initialize else "zeros", *values, **options)

    # Keras has no hook for this, and TensorFlow's hook does not know a variable's size.
    keras.Layer.add_weight = add_counted
    try:
        yield
    finally:
        keras.Layer.add_weight = add_weight
