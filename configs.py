"""Every option of the collection: its name, type, default, meaning and bounds.

Edit a default below, or override it without editing: `--configs FILE.json` beats the default, and a command-line
flag beats both. The one line that declares an option is also its type check, its `--help` entry and its flag.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import math
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

BACKBONE_NAMES = (
    *("VGG16", "VGG19", "DenseNet121", "DenseNet169", "DenseNet201", "Xception"),
    *("ResNet50", "ResNet101", "ResNet152", "ResNet50V2", "ResNet101V2", "ResNet152V2"),
    *("InceptionV3", "InceptionResNetV2", "NASNetMobile", "NASNetLarge"),
    *("MobileNet", "MobileNetV2", "MobileNetV3Small", "MobileNetV3Large"),
    *("EfficientNetB0", "EfficientNetB1", "EfficientNetB2", "EfficientNetB3"),
    *("EfficientNetB4", "EfficientNetB5", "EfficientNetB6", "EfficientNetB7"),
    *("EfficientNetV2B0", "EfficientNetV2B1", "EfficientNetV2B2", "EfficientNetV2B3"),
    *("EfficientNetV2S", "EfficientNetV2M", "EfficientNetV2L"),
    *("ConvNeXtTiny", "ConvNeXtSmall", "ConvNeXtBase", "ConvNeXtLarge", "ConvNeXtXLarge"),
)
OPTIMIZER_NAMES = ("Adam", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Nadam", "AdamW", "Lion")
VERIFY_MODES = ("quick", "full", "off")
MAX_IMAGE_PIXELS = 179_000_000
DISTRIBUTION_STRATEGIES = ("none", "mirrored", "multi_worker")
CAM_METHODS = ("gradcam", "gradcam++", "hirescam", "layercam")
CAM_CLASSES = ("predicted", "true", "top_k", "threshold")
CAM_COLORMAPS = ("jet", "turbo", "viridis", "inferno", "magma", "plasma")
LARGEST_JSON_FILE = 2**24
# What 64-bit floats hold exactly: the libraries below fail on more, each in its own way.
LARGEST_WHOLE_NUMBER = 2**53
MOST_FAULTS = 20
LONGEST_SHOWN = 200


class UserError(Exception):
    """A mistake that its user can mend: shown as its message alone, with exit status 2."""


def define(
    default: Any,
    description: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] | None = None,
    describes_model: bool = False,
    fixed_in_run: bool = False,
) -> Any:
    """Declares one option.

    Args:
        default: value where nothing else is given.
        description: one sentence, shown by `--help`.
        above: exclusive lower bound; of each element where the option is a list.
        at_least: inclusive lower bound, likewise.
        below: exclusive upper bound, likewise.
        at_most: inclusive upper bound, likewise.
        choices: the only texts allowed.
        describes_model: the option says what a trained model is; a model's own `configs.json` then decides it.
        fixed_in_run: a run cannot go on with another value, for it would not be the same run.
    """
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    metadata = {
        "description": description,
        "bounds": {word: bound for word, bound in bounds.items() if bound is not None},
        "choices": choices,
        "describes_model": describes_model,
        "fixed_in_run": fixed_in_run,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Configs:
    """The options that every script takes. Building one reads no file; `validate` checks them all at once."""

    train_csv: str = define("./data/training_set.csv", "The training images and their labels")
    test_csv: str = define("./data/testing_set.csv", "The images that training never learns from, for test.py")
    image_directory: str = define("", "Put in front of the paths in the CSV files")
    visual_model_name: str = define("DenseNet121", "The backbone", choices=BACKBONE_NAMES, describes_model=True)
    image_target_size: tuple[int, int, int] = define(
        (224, 224, 3),
        "Height, width and channels that images are resized to",
        at_least=1,
        at_most=16384,
        describes_model=True,
    )
    num_epochs: int = define(100, "Epochs in total, those before a resume included", at_least=1)
    csv_label_column: str = define("class", "The CSV column with the labels")
    classes: list[str] | None = define(
        None, "The class names; none finds them in train_csv, sorted", describes_model=True
    )
    multi_label_classification: bool = define(
        False, "Several labels an image, written class1$class2", describes_model=True
    )
    classifier_layer_sizes: list[float] = define(
        [0.4],
        "Layers before the output: 1 or more is a hidden layer of that size, less than 1 a dropout rate",
        at_least=0,
        at_most=2**20,
        describes_model=True,
    )
    conv_layers_to_train: int = define(
        -1,
        "Convolutions of the backbone to train: -1 all, 0 none, n the last n and what follows them",
        at_least=-1,
        fixed_in_run=True,
    )
    use_imagenet_weights: bool = define(True, "Start the backbone from its ImageNet weights, not from random ones")
    pop_conv_layers: int = define(
        0, "Layers dropped from the end of the backbone, before the pooling", at_least=0, describes_model=True
    )
    final_layer_pooling: str | None = define(
        "avg", "Pooling of the backbone's output; none flattens it", choices=("avg", "max"), describes_model=True
    )
    load_model_path: str = define("", "A model file, or the folder of a run, to continue from or to test")
    save_model_path: str = define("saved_model", "The folder that receives everything a run writes")
    save_best_model_only: bool = define(True, "False also keeps the model of every epoch")
    learning_rate: float = define(1e-3, "The optimizer's learning rate", above=0)
    learning_rate_decay_factor: float = define(
        0.1, "The learning rate is multiplied by this on a plateau of the validation loss", above=0, below=1
    )
    reduce_lr_patience: int = define(3, "Epochs without a lower validation loss that make a plateau", at_least=0)
    minimum_learning_rate: float = define(1e-7, "The learning rate is never reduced below this", at_least=0)
    optimizer_type: str = define("Adam", "The optimizer", choices=OPTIMIZER_NAMES, fixed_in_run=True)
    gpu_percentage: float = define(
        0.95, "Share of each visible GPU's memory to use; 0 runs on the CPU", at_least=0, at_most=1
    )
    batch_size: int = define(16, "Images a training step", at_least=1, fixed_in_run=True)
    multilabel_threshold_range: list[float] = define(
        [0.01, 0.99], "Lowest and highest threshold tried, in steps of 0.01", above=0, below=1
    )
    generator_workers: int = define(4, "Threads that read and augment images; 0 counts as 1", at_least=0)
    generator_queue_length: int = define(12, "Batches kept ready for the model", at_least=1)
    show_model_summary: bool = define(True, "Print the model's layers before training")
    positive_weights_multiply: float = define(
        1.0, "Multi-label: multiplies the loss of the labels that are present", above=0, fixed_in_run=True
    )
    use_class_balancing: bool = define(True, "Weigh rare classes more in the loss", fixed_in_run=True)
    cnn_downscaling_factor: int = define(
        0,
        "Trained convolutions that halve the image this many times before the backbone",
        at_least=0,
        at_most=14,
        describes_model=True,
    )
    cnn_downscaling_filters: int = define(
        64, "Filters of each downscaling convolution", at_least=1, at_most=2**16, describes_model=True
    )
    validation_csv: str = define("", "The images that select the best model; empty uses test_csv, and says so")
    random_seed: int | None = define(
        0,
        "Seed of weights, order, augmentation and splits; none draws one",
        at_least=0,
        at_most=2**32 - 1,
        fixed_in_run=True,
    )
    batch_norm_momentum: float | None = define(
        0.9,
        "Momentum of the backbone's batch normalisation; none keeps the backbone's own",
        at_least=0,
        below=1,
        fixed_in_run=True,
    )
    deterministic: bool = define(False, "Two runs give the same weights to the last bit; slower on a GPU")
    checkpoint_every_steps: int = define(
        0, "Also write latest_model.keras every that many steps; 0 only after each epoch", at_least=0
    )
    early_stopping_patience: int = define(
        0, "Stop after that many epochs without a better validation figure; 0 never does", at_least=0
    )
    mixed_precision: bool = define(
        False,
        "Compute in 16 bits where the GPU is faster so: bfloat16 where it has it, else float16 with loss scaling",
        describes_model=True,
    )
    image_cache: str = define(
        "none",
        "Keep decoded, resized images after their first use: in memory, or in a file that later runs use too",
        choices=("none", "memory", "disk"),
    )
    image_cache_path: str = define("./data/image_cache", "The folder of the disk cache; may be deleted at any time")
    verify_data: str = define(
        "quick",
        "What train.py checks before it starts: tables and the images' headers (quick), every pixel and near copies "
        "too (full), or nothing (off)",
        choices=VERIFY_MODES,
    )
    max_image_pixels: int = define(
        MAX_IMAGE_PIXELS, "Pixels that an image may have; its header tells before it is decoded", at_least=1
    )
    skip_bad_images: bool = define(False, "Leave out images that cannot be read, and say which, instead of stopping")
    allow_duplicates: bool = define(False, "The same image in two sets is a warning, not an error")
    cam_method: str = define("gradcam", "How draw_activations.py weighs the backbone's features", choices=CAM_METHODS)
    cam_classes: str = define(
        "predicted",
        "Classes that draw_activations.py explains: the predicted one, those in the CSV (true), the cam_top_k most "
        "probable ones, or every label above its threshold",
        choices=CAM_CLASSES,
    )
    cam_top_k: int = define(3, "How many classes cam_classes top_k explains", at_least=1)
    cam_alpha: float = define(0.4, "Opacity of the heatmap over the image", at_least=0, at_most=1)
    cam_colormap: str = define("jet", "Colours of the heatmap", choices=CAM_COLORMAPS)
    distribution_strategy: str = define(
        "none",
        "Train on one device, on every visible GPU of this machine (mirrored), or on those of all hosts in TF_CONFIG "
        "or a Slurm step (multi_worker); batch_size is that of each GPU",
        choices=DISTRIBUTION_STRATEGIES,
    )
    scale_learning_rate: bool = define(False, "Multiply the learning rate by the number of devices that train together")
    head_epochs: int = define(
        0,
        "Epochs that train the classifier alone, the backbone frozen, before all is trained",
        at_least=0,
        fixed_in_run=True,
    )
    fine_tune_learning_rate: float | None = define(
        None, "The learning rate after head_epochs; none keeps learning_rate", above=0
    )
    head_initialization: str = define(
        "random",
        "Start the classifier from random weights, or from a logistic regression on the backbone's features of the "
        "training images (linear_probe)",
        choices=("random", "linear_probe"),
    )
    learning_rate_schedule: str = define(
        "plateau",
        "Reduce the learning rate on a plateau of the validation loss, along a cosine down to minimum_learning_rate in "
        "the last step, or not at all (constant)",
        choices=("plateau", "cosine", "constant"),
    )
    warmup_epochs: float = define(0.0, "Epochs in which the learning rate rises from 0, at the start", at_least=0)
    backbone_learning_rate_multiplier: float = define(
        1.0, "The backbone learns at the learning rate times this", above=0, at_most=100
    )
    freeze_batch_norm: bool = define(
        False, "Leave the backbone's batch normalisation as its weights have it", fixed_in_run=True
    )
    weight_decay: float = define(
        0.0,
        "Decoupled weight decay of kernels; biases and normalisations have none",
        at_least=0,
        below=1,
        fixed_in_run=True,
    )
    label_smoothing: float = define(0.0, "Share of each label that is spread over all classes", at_least=0, below=1)
    mixup_alpha: float = define(0.0, "Mix pairs of images, with shares from Beta(alpha, alpha); 0 does not", at_least=0)
    cutmix_alpha: float = define(
        0.0, "Paste a piece of one image into another, with shares from Beta(alpha, alpha); 0 does not", at_least=0
    )
    ema_decay: float = define(
        0.0,
        "Test and keep the moving average of the weights with this decay a step; 0 keeps the weights",
        at_least=0,
        below=1,
        fixed_in_run=True,
    )
    loss: str = define(
        "cross_entropy",
        "The training loss; multi-label also focal or asymmetric, which look less at what is easy",
        choices=("cross_entropy", "focal", "asymmetric"),
    )
    gradient_accumulation_steps: int = define(
        1,
        "Batches whose gradients make one training step: batch_size images at a time in memory",
        at_least=1,
        fixed_in_run=True,
    )
    augmentation_strength: str = define(
        "default", "How far training changes its images at random", choices=("none", "light", "default", "strong")
    )
    find_learning_rate: bool = define(
        False, "Do not train: try rising learning rates, plot the loss over them and suggest one"
    )
    overwrite: bool = define(False, "Start a new run where save_model_path holds another one, and remove that")

    def __post_init__(self) -> None:
        defaults = type(self).defaults()
        self.given = {name for name, default in defaults.items() if getattr(self, name) != default}

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "given" and name not in self.options():
            raise AttributeError(unknown_option(name, list(self.options())))
        super().__setattr__(name, value)
        if "given" in vars(self) and name != "given":
            self.given.add(name)

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field]:
        """Returns the declared options by name, in the order of their declaration."""
        return {field.name: field for field in dataclasses.fields(cls)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Returns each option's default."""
        return {
            name: field.default if field.default is not dataclasses.MISSING else field.default_factory()
            for name, field in cls.options().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as JSON can hold them."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.options()}

    def replace(self, **values: Any) -> Configs:
        """Returns a copy with some options changed; they count as given by the user, as those of this one do."""
        changed = dataclasses.replace(self, **values)
        changed.given = self.given | values.keys()
        return changed

    @classmethod
    def read_json(cls, path: str, part: str = "") -> dict[str, Any]:
        """Reads options from a JSON file.

        Args:
            path: of the file.
            part: the member of its object that holds the options; empty where that is the object itself.

        Returns:
            The converted values of the options that the file holds.

        Raises:
            UserError: the file is missing, too large or no JSON object, or an option in it is unknown, there twice
                or of a wrong type.
        """
        try:
            with open(path, "rb") as file:
                content = file.read(LARGEST_JSON_FILE + 1)
            if len(content) > LARGEST_JSON_FILE:
                raise UserError(f"{path} is no configs file: expected at most {LARGEST_JSON_FILE} bytes. It has more.")
            stored = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_refuse_repeated)
        except OSError as error:
            raise UserError(f"Cannot read the configs file {path}: {error.strerror}. Check the path.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}. Expected an object of option: value.") from error
        if part and isinstance(stored, dict):
            stored = stored.get(part)
        if not isinstance(stored, dict):
            place = f"{path}, {part}" if part else path
            raise UserError(f"{place}: expected a JSON object of option: value. Received: {type(stored).__name__}.")
        return cls._convert_all(stored, is_text=False, source=path)

    @classmethod
    def from_json(cls, path: str) -> Configs:
        """Builds configs from a JSON file over the defaults; raises UserError as `read_json` does."""
        return cls._build(cls.read_json(path))

    @classmethod
    def from_command_line(cls, description: str | None = None, arguments: Sequence[str] | None = None) -> Configs:
        """Builds and validates configs from the defaults, then `--configs FILE.json`, then the flags.

        Args:
            description: shown at the top of `--help`.
            arguments: the command line without the program's name; by default this process's own.

        Raises:
            UserError: an option is unknown, has no value, or has one of a wrong type or out of range.
            SystemExit: after `--help`.
        """
        parser = _argument_parser(cls, description)
        namespace, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise UserError(unknown_flag(unknown[0].split("=")[0], list(cls.options())))
        flags = {name: value for name, value in vars(namespace).items() if name != "configs"}
        from_file = cls.read_json(namespace.configs) if "configs" in namespace else {}
        return cls._build(from_file | cls._convert_all(flags, is_text=True, source="command line")).validate()

    @classmethod
    def _build(cls, values: dict[str, Any]) -> Configs:
        configs = cls(**values)
        configs.given |= values.keys()
        return configs

    @classmethod
    def _convert_all(cls, raw: dict[str, Any], is_text: bool, source: str) -> dict[str, Any]:
        types = typing.get_type_hints(cls)
        values, faults = {}, []
        for name, value in raw.items():
            if len(faults) == MOST_FAULTS:
                faults.append("and more")
                break
            if name not in cls.options():
                faults.append(unknown_option(name, list(cls.options())))
                continue
            try:
                values[name] = convert(value, types[name], is_text)
            except ValueError:
                faults.append(_type_fault(name, types[name], value))
        if faults:
            raise UserError("\n".join(f"{source}: {fault}" for fault in faults))
        return values

    def validate(self) -> Configs:
        """Checks types, bounds and combinations.

        Returns:
            These configs.

        Raises:
            UserError: one line for each fault: the option, what was expected, what was received.
        """
        types = typing.get_type_hints(type(self))
        faults = []
        for name, field in self.options().items():
            value = getattr(self, name)
            try:
                value = convert(value, types[name], is_text=False)
            except ValueError:
                faults.append(_type_fault(name, types[name], value))
                continue
            super().__setattr__(name, value)
            found = _bound_fault(value, field.metadata, types[name]) or _FURTHER_CHECKS.get(name, _no_fault)(value)
            faults += [f"{name}: {found}"] * bool(found)
        faults += self._find_contradictions() if not faults else []
        if faults:
            raise UserError("\n".join(faults))
        return self

    def _find_contradictions(self) -> list[str]:
        """Returns a line for each option that has no effect beside another one's value."""
        multi_label, head_epochs = self.multi_label_classification, self.head_epochs
        needs = [
            ("loss", self.loss != "cross_entropy" and not multi_label, "multi_label_classification True"),
            ("fine_tune_learning_rate", self.fine_tune_learning_rate and not head_epochs, "head_epochs of 1 or more"),
        ]
        return [
            f"{name}: {getattr(self, name)} has no effect without {need}. Set that too, or leave {name} out."
            for name, is_needed, need in needs
            if is_needed
        ]


def unknown_option(name: str, known: Sequence[str]) -> str:
    """Returns the message for an option that does not exist, naming the nearest one that does."""
    # Comparing takes time by the square of the length.
    nearest = difflib.get_close_matches(name[:LONGEST_SHOWN], known, n=1, cutoff=0.5)
    shown = name if name.isprintable() and len(name) <= LONGEST_SHOWN else _show(name)
    return f"Unknown option {shown}. " + (f"Did you mean {nearest[0]}?" if nearest else "See --help for all options.")


def unknown_flag(flag: str, known: Sequence[str]) -> str:
    """Returns the message for a word on the command line that is no flag, as it was typed."""
    return unknown_option(flag, [f"--{name}" for name in known])


def convert(value: Any, kind: Any, is_text: bool) -> Any:
    """Converts a raw value to an option's type.

    Args:
        value: from Python or JSON; or text, or a list of texts, from the command line.
        kind: the annotated type: str, int, float, bool, list[...], tuple[...], or one of them `| None`.
        is_text: the value comes from the command line.

    Raises:
        ValueError: the value is not of that type. A bool is no number; an int serves as a float. A text that no file
            name and no UTF-8 file can hold is none, nor is a whole number beyond `LARGEST_WHOLE_NUMBER`.
    """
    inner, optional = _unwrap_optional(kind)
    if optional and (value is None or (is_text and _single(value).lower() == "none")):
        return None
    origin = typing.get_origin(inner)
    if origin in (list, tuple):
        return _convert_items(value, inner, origin, is_text)
    if is_text:
        value = _from_text(value, inner)
    if inner is float and type(value) is int:
        value = _from_text(str(value), float)
    if type(value) is not inner or not _IS_USABLE.get(inner, _always)(value):
        raise ValueError(value)
    return value


def _is_writable(text: str) -> bool:
    # Neither NUL nor a lone half of a surrogate pair, which no file name and no UTF-8 file can hold.
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _always(_: Any) -> bool:
    return True


_IS_USABLE: dict[type, Callable[[Any], bool]] = {
    str: _is_writable,
    int: lambda value: abs(value) <= LARGEST_WHOLE_NUMBER,
    float: math.isfinite,
}


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"it has {_show(name)} twice")
        content[name] = value
    return content


def _convert_items(value: Any, inner: Any, origin: type, is_text: bool) -> list | tuple:
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    kinds = typing.get_args(inner)
    if origin is tuple and len(kinds) != len(value):
        raise ValueError(value)
    return origin(convert(item, kinds[0], is_text) for item in value)


def _unwrap_optional(kind: Any) -> tuple[Any, bool]:
    options = typing.get_args(kind)
    if type(None) not in options:
        return kind, False
    return next(option for option in options if option is not type(None)), True


def _single(value: Any) -> str:
    if isinstance(value, list):
        return value[0] if len(value) == 1 else ""
    return value


def _from_text(text: str, kind: type) -> Any:
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    try:
        return kind(text)
    except OverflowError as error:
        raise ValueError(text) from error


def _type_fault(name: str, kind: Any, value: Any) -> str:
    texts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    unwritable = any(isinstance(text, str) and not _is_writable(text) for text in texts)
    hint = " without NUL and lone surrogates" * unwritable
    return f"{name}: expected {describe_type(kind)}{hint}. Received: {_show(value)}"


def describe_type(kind: Any) -> str:
    """Returns an option's type in words, for help and errors."""
    inner, optional = _unwrap_optional(kind)
    names = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}
    plurals = {str: "texts", int: "whole numbers", float: "numbers"}
    items = typing.get_args(inner)
    if typing.get_origin(inner) is tuple:
        words = f"{len(items)} {plurals[items[0]]}"
    elif typing.get_origin(inner) is list:
        words = f"a list of {plurals[items[0]]}"
    else:
        words = names[inner]
    return words + (" or none" if optional else "")


def _describe_choices(metadata: typing.Mapping[str, Any], kind: Any) -> str:
    choices = ", ".join(metadata["choices"])
    return f"one of {choices} or none" if _unwrap_optional(kind)[1] else f"one of {choices}"


def _describe_bounds(metadata: typing.Mapping[str, Any]) -> str:
    return " and ".join(f"{word} {bound}" for word, bound in metadata["bounds"].items())


def _bound_fault(value: Any, metadata: typing.Mapping[str, Any], kind: Any) -> str:
    if value is None:
        return ""
    if metadata["choices"] is not None and value not in metadata["choices"]:
        nearest = difflib.get_close_matches(value[:LONGEST_SHOWN], metadata["choices"], n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        return f"expected {_describe_choices(metadata, kind)}. Received: {_show(value)}{hint}"
    tests: dict[str, Callable[[float, float], bool]] = {
        "above": lambda x, bound: x > bound,
        "at least": lambda x, bound: x >= bound,
        "below": lambda x, bound: x < bound,
        "at most": lambda x, bound: x <= bound,
    }
    items = value if isinstance(value, list | tuple) else [value]
    if all(tests[word](item, bound) for word, bound in metadata["bounds"].items() for item in items):
        return ""
    words = "numbers" if isinstance(value, list | tuple) else "a number"
    return f"expected {words} {_describe_bounds(metadata)}. Received: {_show(value)}"


def _image_size_fault(size: tuple[int, int, int]) -> str:
    return f"expected 3 channels last (images are read as RGB). Received: {_show(size)}" if size[2] != 3 else ""


def _layer_sizes_fault(sizes: list[float]) -> str:
    wrong = [size for size in sizes if size > 1 and size != int(size)]
    return f"expected whole numbers from 1 on, or dropout rates under 1. Received: {_show(wrong[0])}" if wrong else ""


def _threshold_range_fault(thresholds: list[float]) -> str:
    if len(thresholds) == 2 and thresholds[0] <= thresholds[1]:
        return ""
    return f"expected two numbers, the lower first. Received: {_show(thresholds)}"


def _classes_fault(classes: list[str] | None) -> str:
    repeated = classes is not None and len(set(classes)) != len(classes)
    return f"expected each class name once. Received: {_show(classes)}" if repeated else ""


def _folder_fault(path: str) -> str:
    return "" if path else "expected the name of a folder. Received: an empty text"


def _no_fault(_: Any) -> str:
    return ""


_FURTHER_CHECKS = {
    "image_target_size": _image_size_fault,
    "classifier_layer_sizes": _layer_sizes_fault,
    "multilabel_threshold_range": _threshold_range_fault,
    "classes": _classes_fault,
    "save_model_path": _folder_fault,
}


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}. See --help for all options.")


def _argument_parser(cls: type[Configs], description: str | None) -> argparse.ArgumentParser:
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    own = parser.add_argument_group("options of this script") if cls is not Configs else None
    shared = parser.add_argument_group("options of every script, from configs.py")
    shared.add_argument("--configs", metavar="FILE.json", help="a JSON file of options, read before the flags")
    types, defaults = typing.get_type_hints(cls), cls.defaults()
    for name, field in cls.options().items():
        group = shared if name in Configs.options() else own
        is_list = typing.get_origin(_unwrap_optional(types[name])[0]) in (list, tuple)
        words = [describe_type(types[name]), _describe_bounds(field.metadata)]
        if field.metadata["choices"]:
            words = [_describe_choices(field.metadata, types[name])]
        default = "empty" if defaults[name] == "" else defaults[name]
        help_text = f"{field.metadata['description']} ({' '.join(filter(None, words))}; default {default})"
        group.add_argument(
            f"--{name}", metavar="VALUE", nargs="*" if is_list else None, help=help_text.replace("%", "%%")
        )
    return parser


def run_script(main: Callable[[Any], dict], configs_class: type[Configs] = Configs) -> None:
    """Runs a script's `main` on the command line's configs.

    A user's mistake ends in its message on stderr and exit status 2, Ctrl-C in 130; a bug keeps its traceback.

    Args:
        main: takes the configs; the docstring of its module is the head of `--help`.
        configs_class: `Configs`, or a script's extension of it.
    """
    # TensorFlow's and OpenCV's notices would bury the lines that matter; a user's own setting wins.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    try:
        configs = configs_class.from_command_line(sys.modules[main.__module__].__doc__)
        # OpenCV reads it when it is imported.
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(configs.max_image_pixels))
        main(configs)
    except UserError as error:
        sys.stdout.flush()
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
