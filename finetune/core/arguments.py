"""Checks of arguments that a user's own code passes. Each returns the value in the form that functions work with."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.core.options import UserError
from finetune.core.values import bound_fault, convert, quote_value

LARGEST_SIDE = 16384


def take_path(name: str, value: Any) -> str:
    """Returns a path as text; raises UserError if it is not a path."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or "\0" in path:
        raise argument_error(name, "a path", value)
    return path


def take_size(name: str, value: Any) -> tuple[int, int]:
    """Returns `(height, width)`; raises UserError if a value is not a size."""
    try:
        size = tuple(operator.index(side) for side in value)
    except TypeError:
        size = ()
    if len(size) != 2 or not all(1 <= side <= LARGEST_SIDE for side in size):
        raise argument_error(name, f"(height, width), whole numbers from 1 to {LARGEST_SIDE}", value)
    return size


def take_names(value: Any, name: str = "class_names") -> list[str]:
    """Returns class names; raises UserError if a value is not a list of one or more different texts."""
    names = _convert(value.tolist() if isinstance(value, np.ndarray) else value, list[str])
    if not names or len(set(names)) < len(names):
        raise argument_error(name, "a list of different class names", value)
    return names


def take_number(name: str, value: Any) -> int:
    """Returns a whole number from 1 on; raises UserError if a value is not one."""
    number = _convert(value, int)
    if number is None or number < 1:
        raise argument_error(name, "a whole number from 1 on", value)
    return number


def take_rows(name: str, value: Any) -> set[int]:
    """Returns line numbers of a table, whose header is line 1; raises UserError if a value has others."""
    try:
        rows = {operator.index(row) for row in value}
    except TypeError:
        rows = {0}
    if isinstance(value, bytes) or min(rows, default=2) < 2:
        raise argument_error(name, "line numbers of the table, from 2 on, or None", value)
    return rows


def take_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Returns a value; raises UserError if it is not one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise argument_error(name, f"one of {', '.join(choices)}", value)
    return value


def look_up(registry: Mapping[str, Any], option: str, name: str) -> Any:
    """Returns the entry of a registry that an option names; raises UserError if there is none."""
    if not isinstance(name, str):
        raise argument_error(option, "a name", name)
    if name not in registry:
        raise UserError(f"{option}: {bound_fault(name, {'choices': tuple(registry), 'bounds': {}}, str)}")
    return registry[name]


def take_flag(name: str, value: Any) -> bool:
    """Returns a bool; raises UserError if a value is not one."""
    if not isinstance(value, bool | np.bool_):
        raise argument_error(name, "True or False", value)
    return bool(value)


def take_share(name: str, value: Any) -> float:
    """Returns a number in `[0, 1]`; raises UserError if a value is not one."""
    share = _convert(value, float)
    if share is None or not 0 <= share <= 1:
        raise argument_error(name, "a number from 0 to 1", value)
    return share


def _convert(value: Any, kind: Any) -> Any:
    """Returns a value of a type; None if it is of another type."""
    try:
        return convert(value, kind, is_text=False)
    except ValueError:
        return None


def take_pixels(value: Any) -> np.ndarray:
    """Returns an image `(height, width, 3)` with pixels in `[0, 255]`, of a type that OpenCV can resize.

    Raises:
        UserError: a value is not such an image, or has fractions from 0 to 1, which would be almost black.
    """
    image = np.asarray(value)
    if image.ndim != 3 or image.shape[2] != 3 or not image.size or image.dtype.kind not in "uif":
        what = f"{image.dtype} of shape {image.shape}" if image.size > 1 else value
        raise argument_error("image", "RGB pixels (height, width, 3) from 0 to 255, as read_image returns them", what)
    low, high = image.min(), image.max()
    # Also refuses NaN, for which comparisons are False.
    if not (low >= 0 and high <= 255):
        raise argument_error("image", "pixels from 0 to 255", f"from {low} to {high}")
    if image.dtype.kind == "f":
        if 0 < high <= 1 and not np.isin(image, (0, 1)).all():
            raise argument_error("image", "pixels from 0 to 255. Multiply it by 255", f"from {low} to {high}")
        return image.astype(np.float32) if image.dtype.itemsize < 4 else image
    return image.astype(np.uint8, copy=False)


def take_labels(name: str, value: Any, number_of_classes: int, images: int | None = None) -> np.ndarray:
    """Returns class positions, int `(images,)`; raises UserError if they are not below `number_of_classes`."""
    labels = np.asarray(value)
    fits = labels.ndim == 1 and labels.size and labels.dtype.kind in "ui" and images in (None, len(labels))
    if not fits or labels.min() < 0 or labels.max() >= number_of_classes:
        counted = "" if images is None else f" for {images} images"
        raise argument_error(name, f"class positions from 0 to {number_of_classes - 1}{counted}", _describe(labels))
    return labels


def take_table(name: str, value: Any, columns: int | None = None, is_binary: bool = False) -> np.ndarray:
    """Returns an array `(images, classes)` in `[0, 1]`; raises UserError if a value is not one, or not binary."""
    table = np.asarray(value)
    fits = table.ndim == 2 and table.size and table.dtype.kind in "uifb" and columns in (None, table.shape[1])
    if not fits or not (np.isin(table, (0, 1)).all() if is_binary else table.min() >= 0 and table.max() <= 1):
        kind = "zeros and ones" if is_binary else "probabilities from 0 to 1"
        shape = f"(images, {'classes' if columns is None else columns})"
        raise argument_error(name, f"{kind} of shape {shape}", _describe(table))
    return table


def check_rows(name: str, array: np.ndarray, other: np.ndarray) -> None:
    """Raises UserError if two arrays differ in the number of images."""
    if len(array) != len(other):
        raise argument_error(name, f"{len(other)} rows, one an image", f"{len(array)} rows")


def _describe(array: np.ndarray) -> Any:
    if array.dtype.kind not in "uifb" or not array.size:
        return f"{array.dtype} of shape {array.shape}"
    return f"{array.dtype} of shape {array.shape}, from {array.min()} to {array.max()}"


def argument_error(name: str, expected: str, received: Any) -> UserError:
    """Returns the error for an argument, in one line."""
    shown = received if isinstance(received, str) and " " in received else quote_value(received)
    return UserError(f"{name}: expected {expected}. Received: {shown}")
