"""Backbones of KerasHub: from a preset to a network that gives a feature map. KerasHub is imported when one is named.

A transformer gives tokens: a class token and others, then the patches, row by row. Keras's own operations turn the
patches into a feature map `(batch, h, w, width)`. Pooling, Grad-CAM and the feature store then work as for any network.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import keras
import numpy as np

from finetune.core.options import LARGEST_JSON_FILE, UserError
from finetune.core.values import find_nearest
from finetune.models.backbone_entry import LAST_LAYER, Backbone
from finetune.models.formats import importing
from finetune.models.safety import LAYER_PACKAGES, telling_damage

PREFIX = "kerashub:"
CONFIG_FILE, CONVERTER_FILE = "config.json", "image_converter.json"
SMALLEST_SIDE = 32


def _patch(config: Mapping[str, Any]) -> int:
    """Returns the side of the patches that each become a token."""
    return int(np.max(config["patch_size"]))


def _swin_stride(config: Mapping[str, Any]) -> int:
    return _patch(config | {"patch_size": config.get("patch_size", 4)}) * 2 ** (len(config["depths"]) - 1)


class Family(NamedTuple):
    """A family of KerasHub's backbones.

    Attributes:
        folder: its name among KerasHub's modules and presets.
        stride: from its config to the number that heights and widths are multiples of; None for any size.
        prefix: from its config to the number of tokens before the patches; None for a feature map.
        is_nested: saved as a whole, because its layers cannot be restored one by one.
        is_square: it takes square images only.
        size_name: of the image's shape in its config.
    """

    folder: str
    stride: Callable[[Mapping[str, Any]], int] | None = None
    prefix: Callable[[Mapping[str, Any]], int] | None = None
    is_nested: bool = False
    is_square: bool = False
    size_name: str = "image_shape"


# By the name of the class.
FAMILIES: dict[str, Family] = {
    "ViTBackbone": Family("vit", _patch, lambda config: int(config.get("use_class_token", True)), is_nested=True),
    "DeiTBackbone": Family("deit", _patch, lambda _: 2, is_nested=True),
    "DINOV2Backbone": Family("dinov2", _patch, lambda config: 1 + config["num_register_tokens"], is_square=True),
    "DINOV3Backbone": Family("dinov3", _patch, lambda config: 1 + config["num_register_tokens"]),
    "SigLIPBackbone": Family("siglip", _patch, lambda _: 0, is_square=True),
    "SigLIPVisionEncoder": Family("siglip", _patch, lambda _: 0, is_square=True),
    "CLIPBackbone": Family("clip", _patch, lambda _: 1, is_square=True),
    "CLIPVisionEncoder": Family("clip", _patch, lambda _: 1, is_square=True),
    "SwinTransformerBackbone": Family("swin_transformer", _swin_stride, lambda _: 0, is_nested=True),
    "MiTBackbone": Family("mit", lambda config: math.prod(config["layerwise_strides"]), is_nested=True),
    "HGNetV2Backbone": Family("hgnetv2"),
    "CSPNetBackbone": Family("cspnet"),
    "EfficientNetBackbone": Family("efficientnet", size_name="input_shape"),
    "MobileNetBackbone": Family("mobilenet"),
    "MobileNetV5Backbone": Family("mobilenetv5"),
    "ResNetBackbone": Family("resnet"),
    "XceptionBackbone": Family("xception"),
    "VGGBackbone": Family("vgg"),
    "DenseNetBackbone": Family("densenet"),
}
# Unusual licences of weights, by the beginning of the name of a preset or family.
TERMS = {
    "dinov3": "the DINOv3 License, https://ai.meta.com/resources/models-and-libraries/dinov3-license",
    "mit": "NVIDIA's Source Code License for SegFormer, https://github.com/NVlabs/SegFormer/blob/master/LICENSE",
    "mobilenetv5": "the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    "medsiglip": "the Health AI Developer Foundations terms, "
    "https://developers.google.com/health-ai-developer-foundations/terms",
}
# The blocks of transformers, of which `conv_layers_to_train` trains the last ones: by the names of their classes.
TRANSFORMER_BLOCKS = {
    *("ViTEncoderBlock", "DeiTEncoderBlock", "DINOV2Layer", "DINOV3Layer", "SigLIPEncoderLayer", "CLIPEncoderLayer"),
    *("SwinTransformerBlock", "HierarchicalTransformerEncoder"),
}


class Preset(NamedTuple):
    """A preset in a folder.

    Attributes:
        folder: on this machine.
        family: of its backbone.
        config: of the network that sees images, as KerasHub describes an object; of CLIP and SigLIP, the image tower.
    """

    folder: str
    family: Family
    config: dict[str, Any]


def find_hub_backbone(name: str, option: str) -> Backbone:
    """Returns the entry of a preset: `kerashub:` and the name of a preset or the path of its folder.

    Args:
        name: of the backbone.
        option: that names it, for errors.

    Raises:
        UserError: KerasHub is not installed, or there is no such preset here and none to be had.
    """
    preset = _read_preset(name.removeprefix(PREFIX), option)
    family, config = preset.family, preset.config["config"]
    scaling, side = _read_converter(preset.folder)
    shape = config.get(family.size_name) or [None]
    return Backbone(
        functools.partial(_build, name, preset),
        input_size=shape[0] or side or 224,
        minimum_size=family.stride(config) if family.stride else SMALLEST_SIDE,
        preprocessing=scaling,
        last_layer=LAST_LAYER,
        size_multiple=family.stride(config) if family.stride else 1,
        is_square=family.is_square,
        # Position embeddings and windows are of one size.
        takes_any_size=family.stride is None,
    )


def _import_keras_hub(name: str) -> ModuleType:
    """Returns the package, which takes seconds to import; raises UserError if it is not installed."""
    with importing(f"The backbone {name}", LAYER_PACKAGES):
        import keras_hub
    return keras_hub


def _read_preset(preset: str, option: str) -> Preset:
    """Reads a preset's config, after a download if it is neither a folder nor stored yet."""
    presets = _import_keras_hub(PREFIX + preset).models.Backbone.presets
    folder = preset if os.path.isdir(preset) else _fetch(preset, presets, option)
    with telling_damage(f"{option}: {folder} is not a preset of KerasHub"):
        with open(os.path.join(folder, CONFIG_FILE), "rb") as file:
            config = json.loads(file.read(LARGEST_JSON_FILE))
        name = config["class_name"]
        if name not in FAMILIES:
            raise UserError(
                f"{option}: {PREFIX}{preset} is a {name}, which is no supported image backbone. "
                f"Supported: {', '.join(FAMILIES)}."
            )
        return Preset(folder, FAMILIES[name], config["config"].get("vision_encoder", config))


def describe_preset(preset: str) -> str:
    """Describes the source and licence of the weights of a preset; imports nothing."""
    begins, shown = preset, f"KerasHub's preset {preset}"
    if os.path.isdir(preset):
        shown = f"a KerasHub preset in the folder {os.path.basename(os.path.normpath(preset))}"
        with contextlib.suppress(OSError, ValueError, KeyError), open(os.path.join(preset, CONFIG_FILE)) as file:
            begins = FAMILIES[json.load(file)["class_name"]].folder
    return f"{shown}, under {find_terms(begins) or 'the licence that its page names'}"


def find_terms(preset: str) -> str:
    """Returns the terms of a preset's weights if they are unusual; else nothing."""
    return next((terms for name, terms in TERMS.items() if preset.startswith(name)), "")


def _fetch(preset: str, presets: Mapping[str, Any], option: str) -> str:
    """Returns the folder of a preset that KerasHub knows by name, after a download if it is not stored yet."""
    folders = {family.folder for family in FAMILIES.values()}
    known = {name: facts for name, facts in presets.items() if facts["metadata"].get("path") in folders}
    if preset not in known:
        nearest = [find_nearest(preset, list(known), alikeness=0.4)]
        while nearest[-1] and len(nearest) < 3:
            nearest.append(find_nearest(preset, [name for name in known if name not in nearest], alikeness=0.4))
        hint = "; did you mean " + " or ".join(filter(None, nearest)) + "?" if nearest[0] else "."
        raise UserError(
            f"{option}: expected a folder, or the name of a preset that KerasHub has for images. Received: "
            f"{preset!r}{hint}"
        )
    handle = known[preset]["kaggle_handle"].removeprefix("kaggle://")
    with importing(f"The backbone {PREFIX}{preset}", LAYER_PACKAGES):
        import kagglehub
    cache = os.environ.get("KAGGLEHUB_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "kagglehub")
    folder = os.path.join(cache, "models", *handle.split("/"))
    # kagglehub itself would ignore files that it has not downloaded.
    if os.path.isfile(os.path.join(folder, CONFIG_FILE)):
        return folder
    if terms := find_terms(preset):
        print(f"The weights of {preset} are under {terms}. By downloading them you agree to it.", flush=True)
    try:
        return kagglehub.model_download(handle)
    except Exception as error:  # kagglehub, requests and the operating system each raise their own
        raise UserError(
            f"{option}: the preset {preset} is not in {folder} and could not be downloaded: "
            f"{str(error).partition(chr(10))[0] or type(error).__name__} Put its files there, or name another folder "
            f"that has them: {PREFIX}FOLDER. Its address: https://www.kaggle.com/models/{handle}"
        ) from error


def _read_converter(folder: str) -> tuple[Any, int | None]:
    """Returns the scale and offset in a preset's image converter, "" without one, and the height of its images."""
    if not os.path.isfile(os.path.join(folder, CONVERTER_FILE)):
        return "", None
    with telling_damage(f"{folder}/{CONVERTER_FILE} is not an image converter of KerasHub"):
        with open(os.path.join(folder, CONVERTER_FILE), "rb") as file:
            described = json.loads(file.read(LARGEST_JSON_FILE))
        if not str(described["registered_name"]).endswith("ImageConverter"):
            raise ValueError(f"It describes a {described['registered_name']}.")
        converter = keras.saving.deserialize_keras_object(described)
        scale, offset = (
            default if value is None else np.asarray(value, float).tolist()
            for value, default in ((converter.scale, 1.0), (converter.offset, 0.0))
        )
    return (scale, offset), (converter.image_size or [None])[0]


def _build(name: str, preset: Preset, image_size: tuple[int, int], has_weights: bool) -> keras.Model:
    """Builds a preset's network for an image size, from preprocessed images to a feature map."""
    family, described = preset.family, preset.config
    shape = {family.size_name: (*image_size, 3)}
    if family.folder == "dinov2":
        # At one size, the family's two sets of position embeddings have the same shape: see `settle_positions`.
        shape["position_embedding_shape"] = (*image_size, 3)
    policy = keras.config.dtype_policy().name
    with telling_damage(f"{name} cannot be built for images of {image_size[0]}x{image_size[1]} pixels"):
        config = described["config"] | shape | {"dtype": policy, "trainable": True}
        network = keras.saving.deserialize_keras_object(described | {"config": config})
        if has_weights:
            source = _import_keras_hub(name).models.Backbone.from_preset(preset.folder)
            grid = [side // family.stride(config) for side in image_size] if family.stride else None
            copy_weights(getattr(source, "vision_encoder", source), network, grid, config)
        return _to_feature_map(network, family, config, image_size)


def _to_feature_map(
    network: keras.Model, family: Family, config: Mapping[str, Any], image_size: tuple[int, int]
) -> keras.Model:
    """Returns a network that takes images and gives one feature map."""
    inputs, outputs = network.inputs[0], network.output
    if family.is_nested:
        inputs = keras.Input((*image_size, 3))
        outputs = network(inputs)
    elif family.folder == "siglip":
        # What follows pools the tokens.
        outputs = network.post_layer_norm.output
    if isinstance(outputs, dict):
        outputs = [*outputs.values()][-1]
    if family.prefix is not None:
        height, width = (side // family.stride(config) for side in image_size)
        if tokens := family.prefix(config):
            outputs = keras.layers.Cropping1D((tokens, 0), name="patch_tokens")(outputs)
        # Not a layer Reshape, which checks the number of tokens: some of KerasHub's layers declare a wrong one.
        outputs = keras.ops.reshape(outputs, (-1, height, width, outputs.shape[-1]))
    # Grad-CAM needs a last layer with one output, and the last step may be an operation or have several outputs.
    return keras.Model(inputs, keras.layers.Activation("linear", name=LAST_LAYER)(outputs))


def copy_weights(
    source: keras.Model, target: keras.Model, grid: Sequence[int] | None, config: Mapping[str, Any]
) -> None:
    """Gives a network the weights of another that was built for images of another size.

    Args:
        source: has the weights.
        target: changed in place.
        grid: rows and columns of its patches, to which position embeddings are interpolated, bicubically.
        config: of its family.

    Raises:
        ValueError: the two are not of the same layers.
    """
    for weight, new in zip(source.weights, target.weights, strict=True):
        if "position_embedding" in weight.path and weight.dtype.startswith(("float", "bfloat")):
            antialias = bool(config.get("antialias_in_interpolation", True))
            new.assign(resize_positions(np.asarray(weight), new.shape, grid, antialias))
        elif weight.shape == new.shape:
            new.assign(weight)
        elif not weight.dtype.startswith("int"):  # whole numbers only count the positions
            raise ValueError(f"{weight.path} has the shape {weight.shape}, not {new.shape}.")
    for layer in _find_copies(target):
        layer.interpolated_position_embeddings.assign(layer.position_embeddings)


def resize_positions(values: np.ndarray, shape: Sequence[int], grid: Sequence[int], antialias: bool) -> np.ndarray:
    """Returns position embeddings `(..., positions, width)` for another grid of patches; the old one is square.

    Positions are those of the other tokens, if any, and then those of the patches, row by row.
    """
    side = math.isqrt(values.shape[-2])
    rows = values.reshape(values.shape[-2], -1)
    others, patches = np.split(rows, [len(rows) - side**2])
    if (side, side) != tuple(grid):
        images = patches.reshape(1, side, side, -1)
        resized = keras.ops.image.resize(images, grid, interpolation="bicubic", antialias=antialias)
        patches = np.asarray(resized).reshape(math.prod(grid), -1)
    return np.concatenate([others, patches]).reshape(shape)


def settle_positions(model: keras.Model) -> None:
    """Copies the position embeddings that a DINOv2 has trained to those that loading its file restores.

    It computes with `interpolated_position_embeddings`, which loading derives from `position_embeddings`. KerasHub
    updates the latter before saving only if the changes have a positive sum.
    """
    for layer in _find_copies(model):
        layer.position_embeddings.assign(layer.interpolated_position_embeddings)


def _find_copies(model: keras.Model) -> list[keras.Layer]:
    """Returns the layers with two sets of position embeddings."""
    layers = model._flatten_layers(include_self=False)
    return [layer for layer in layers if hasattr(layer, "interpolated_position_embeddings")]
