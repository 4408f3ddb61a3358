"""A peer of the recipes: fastai's `vision_learner` and `fine_tune`, as its guides teach them, on Keras's MobileNet.

python benchmarks/fastai_peer.py convert FOLDER    writes backbone.npz: Keras's ImageNet weights, and features
python benchmarks/fastai_peer.py train FOLDER      writes model.pth
python benchmarks/fastai_peer.py predict FOLDER    writes probabilities.npy and probabilities_tta.npy, of the test set

FOLDER holds task.json, as recipes.py writes it. `fine_tune` trains the head for an epoch, then everything, with
fastai's learning rates, head and augmentation; the last epoch is kept. `probabilities_tta.npy` is from `Learner.tta`:
four augmented views and the photo itself. The batch size is that of train.py: with fastai's 64 there would be a quarter
of the steps. `convert` runs in its own process, so that TensorFlow and PyTorch are never in one.

Source: https://docs.fast.ai/tutorial.vision.html, https://docs.fast.ai/vision.augment.html.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from fastai.learner import Learner

STARTED = time.monotonic()
BATCH_SIZE = 16
# The stride of each depthwise convolution and the channels of the pointwise one behind it.
BLOCKS = ((1, 64), (2, 128), (1, 128), (2, 256), (1, 256), (2, 512), *[(1, 512)] * 5, (2, 1024), (1, 1024))
# Of the largest feature; both sides compute in float32.
TOLERANCE = 1e-3
CHECKED_IMAGES = 4
# Operators, declared for torchvision; PyTorch forgets them with the object that declared them.
DECLARED: list[Any] = []


def main() -> None:
    """Converts the weights, trains, or predicts the test photos."""
    # On a busy machine, threads that spin while they wait block each other: 16 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    action, folder = sys.argv[1:]
    task = json.loads(Path(folder, "task.json").read_text(encoding="utf-8"))
    {"convert": convert, "train": train, "predict": predict}[action](folder, task)


def convert(folder: str, task: dict[str, Any]) -> None:
    """Writes Keras's weights as `LAYER/WEIGHT`, random `images`, and their pooled `features` from Keras.

    The images are float32 `(images, size, size, 3)` from 0 to 255, the features `(images, 1024)`.
    """
    # TensorFlow's notices would bury the lines that matter.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    from keras.applications import mobilenet

    shape = (task["image_size"], task["image_size"], 3)
    backbone = mobilenet.MobileNet(weights="imagenet", include_top=False, input_shape=shape, pooling="avg")
    arrays = {f"{layer.name}/{weight.name}": weight.numpy() for layer in backbone.layers for weight in layer.weights}
    images = np.random.default_rng(0).uniform(0, 255, (CHECKED_IMAGES, *shape)).astype(np.float32)
    features = keras.ops.convert_to_numpy(backbone(mobilenet.preprocess_input(images.copy()), training=False))
    np.savez(f"{folder}/backbone.npz", images=images, features=features, **arrays)


def train(folder: str, task: dict[str, Any]) -> None:
    """Fine-tunes for the task's epochs, or until the budget is spent, and writes the last weights.

    Raises:
        SystemExit: the converted backbone does not give Keras's features.
    """
    vision = import_fastai()
    import torch
    from fastai.callback.core import CancelFitException

    def stop_in_time(callback: vision.Callback) -> None:
        if time.monotonic() - STARTED >= task["budget"]:
            raise CancelFitException

    with np.load(f"{folder}/backbone.npz") as stored:
        arrays = dict(stored)
    backbone = build_backbone(task["image_size"])
    backbone.load_state_dict(convert_weights(arrays))
    error = measure_error(backbone, arrays["images"], arrays["features"])
    if error > TOLERANCE:
        raise SystemExit(f"The converted backbone is {error:.2g} away from Keras's: at most {TOLERANCE} was expected.")
    learner = build_learner(vision, task, backbone)
    with learner.no_bar():
        learner.fine_tune(task["epochs"], cbs=vision.Callback(before_epoch=stop_in_time))
    torch.save(learner.model.state_dict(), f"{folder}/model.pth")


def predict(folder: str, task: dict[str, Any]) -> None:
    """Writes the probabilities of the test photos, float32 `(photos, classes)`, without and with augmented views."""
    vision = import_fastai()
    import torch

    learner = build_learner(vision, task, build_backbone(task["image_size"]))
    learner.model.load_state_dict(torch.load(f"{folder}/model.pth", weights_only=True))
    # Prediction does not use labels.
    loader = learner.dls.test_dl([(path, None) for path in task["sets"]["test"]["paths"]])
    with learner.no_bar():
        for name, function in (("probabilities", learner.get_preds), ("probabilities_tta", learner.tta)):
            np.save(f"{folder}/{name}.npy", function(dl=loader)[0].numpy())


def import_fastai() -> ModuleType:
    """Returns `fastai.vision.all`.

    A torchvision that was built for GPUs cannot load its operators beside a PyTorch that was not, and then fails as it
    describes two of them. fastai needs neither: declaring them is enough.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import fastai.vision.all

    return fastai.vision.all


def build_learner(vision: ModuleType, task: dict[str, Any], backbone: torch.nn.Module) -> Learner:
    """Returns the learner of a backbone, with fastai's head, loss and augmentation.

    Args:
        vision: `fastai.vision.all`.
        task: as recipes.py writes it; of its sets, the training and the validation set.
        backbone: as `build_backbone` returns it.
    """
    vision.set_seed(task["seed"], reproducible=True)
    sets = [task["sets"][name] for name in ("training", "validation")]
    items = [pair for photos in sets for pair in zip(photos["paths"], photos["labels"], strict=True)]
    vocab = list(range(task["classes"]))
    multi_label = task["multi_label"]
    block = vision.DataBlock(
        blocks=(
            vision.ImageBlock,
            vision.MultiCategoryBlock(encoded=True, vocab=vocab) if multi_label else vision.CategoryBlock(vocab),
        ),
        get_x=vision.ItemGetter(0),
        get_y=vision.ItemGetter(1),
        splitter=vision.IndexSplitter(range(len(sets[0]["paths"]), len(items))),
        item_tfms=vision.Resize(task["image_size"], method=vision.ResizeMethod.Squish),
        batch_tfms=[
            *vision.aug_transforms(size=task["image_size"]),
            # MobileNet's preprocessing: from -1 to 1.
            vision.Normalize.from_stats([0.5] * 3, [0.5] * 3),
        ],
    )
    # fastai drops an incomplete batch.
    loaders = block.dataloaders(items, bs=min(BATCH_SIZE, len(sets[0]["paths"])))

    def get_backbone(pretrained: bool) -> torch.nn.Module:
        return backbone

    # `normalize` is for the models whose statistics fastai knows.
    return vision.vision_learner(loaders, get_backbone, normalize=False)


# The backbone


def build_backbone(image_size: int) -> torch.nn.Sequential:
    """Returns MobileNet 1.0 up to its pooled features, with random weights and the layer names of Keras.

    fastai cuts a model at its pooling layer.

    Source: Howard et al., arXiv 1704.04861, table 1; the padding is that of `keras.applications.MobileNet`.

    Args:
        image_size: of the square photos. If it is odd, Keras pads the first convolution on both sides.
    """
    from torch import nn

    # Left, right, top, bottom.
    padding = (1, 1, 1, 1) if image_size % 2 else (0, 1, 0, 1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv1_pad=nn.ZeroPad2d(padding))
    layers["conv1"] = nn.Conv2d(3, 32, 3, stride=2, bias=False)
    channels = 32
    add_activation(layers, "conv1", channels)
    for number, (stride, after) in enumerate(BLOCKS, 1):
        if stride == 2:
            layers[f"conv_pad_{number}"] = nn.ZeroPad2d((0, 1, 0, 1))
        name = f"conv_dw_{number}"
        layers[name] = nn.Conv2d(channels, channels, 3, stride, padding=2 - stride, groups=channels, bias=False)
        add_activation(layers, name, channels)
        name, channels = f"conv_pw_{number}", after
        layers[name] = nn.Conv2d(layers[f"conv_dw_{number}"].out_channels, channels, 1, bias=False)
        add_activation(layers, name, channels)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(layers)


def add_activation(layers: OrderedDict[str, torch.nn.Module], name: str, channels: int) -> None:
    """Adds batch normalisation and activation after the convolution called `name`."""
    from torch import nn

    # Keras's momentum of 0.99 is 0.01 in PyTorch's convention.
    layers[f"{name}_bn"] = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
    layers[f"{name}_relu"] = nn.ReLU6(inplace=True)


def convert_weights(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Converts Keras's weights for the PyTorch module with the same layers.

    Args:
        arrays: by `LAYER/WEIGHT`. Kernels are `(height, width, inputs, outputs)`, depthwise ones `(height, width,
            channels, 1)`; both become `(outputs, inputs of a group, height, width)`. Other arrays are left out.
    """
    import torch

    names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    weights = {}
    for name, array in arrays.items():
        layer, _, weight = name.partition("/")
        if weight in names:
            weights[f"{layer}.{names[weight]}"] = torch.tensor(array)
            # Keras does not count batches; PyTorch ignores the number if a momentum is given.
            weights[f"{layer}.num_batches_tracked"] = torch.tensor(0)
        elif weight:
            axes = (2, 3, 0, 1) if "_dw_" in layer else (3, 2, 0, 1)
            weights[f"{layer}.weight"] = torch.tensor(array.transpose(axes).copy())
    return weights


def measure_error(backbone: torch.nn.Module, images: np.ndarray, features: np.ndarray) -> float:
    """Returns the largest difference between a backbone's features and Keras's, as a share of the largest feature.

    Args:
        backbone: as `build_backbone` returns it.
        images: float32 `(images, size, size, 3)` from 0 to 255.
        features: from Keras, float32 `(images, 1024)`.
    """
    import torch

    with torch.no_grad():
        found = backbone.eval()(torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1).flatten(1).numpy()
    return float(np.abs(found - features).max() / np.abs(features).max())


if __name__ == "__main__":
    main()
