"""Values of options: converting them from text and JSON, checking them, and saying what is wrong with one."""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

# What 64-bit floats hold exactly: the libraries below fail on more, each in its own way.
LARGEST_WHOLE_NUMBER = 2**53
LONGEST_SHOWN = 200


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
    inner, optional = unwrap_optional(kind)
    if optional and (value is None or (is_text and _single(value).lower() == "none")):
        return None
    origin = typing.get_origin(inner)
    if origin in (list, tuple):
        return _convert_items(value, inner, origin, is_text)
    if is_text:
        value = _from_text(value, inner)
    if isinstance(value, numbers.Number) and not isinstance(value, bool):
        value = _from_number(value, inner)
    if inner is str and isinstance(value, str) and value.startswith("~/"):
        # A shell leaves it in --option=~/folder, and JSON has no shell.
        value = os.path.expanduser(value)
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


def _convert_items(value: Any, inner: Any, origin: type, is_text: bool) -> list | tuple:
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    kinds = typing.get_args(inner)
    if origin is tuple and len(kinds) != len(value):
        raise ValueError(value)
    return origin(convert(item, kinds[0], is_text) for item in value)


def unwrap_optional(kind: Any) -> tuple[Any, bool]:
    """Returns a type without its `| None`, and whether it had that."""
    options = typing.get_args(kind)
    if type(None) not in options:
        return kind, False
    return next(option for option in options if option is not type(None)), True


def _from_number(value: numbers.Number, kind: type) -> Any:
    """Returns a number of another type, such as NumPy's, as a whole number or a float; otherwise as it is."""
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and isinstance(value, numbers.Real):
        return _from_text(str(value), float) if type(value) is int else float(value)
    return value


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


def type_fault(name: str, kind: Any, value: Any) -> str:
    """Returns the line for an option whose value is not of its type."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    unwritable = any(isinstance(text, str) and not _is_writable(text) for text in texts)
    hint = " without NUL and lone surrogates" * unwritable
    if len(texts) == 1 and "," in str(texts[0]) and typing.get_origin(unwrap_optional(kind)[0]) in (list, tuple):
        hint += ", with blanks between them"
    return f"{name}: expected {describe_type(kind)}{hint}. Received: {quote_value(value)}"


def describe_type(kind: Any) -> str:
    """Returns an option's type in words, for help and errors."""
    inner, optional = unwrap_optional(kind)
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


def describe_choices(metadata: Mapping[str, Any], kind: Any) -> str:
    """Returns an option's choices in words."""
    choices = ", ".join(metadata["choices"])
    return f"one of {choices} or none" if unwrap_optional(kind)[1] else f"one of {choices}"


def describe_bounds(metadata: Mapping[str, Any]) -> str:
    """Returns an option's bounds in words; empty where it has none."""
    return " and ".join(f"{word} {bound}" for word, bound in metadata["bounds"].items())


def find_nearest(text: str, known: Sequence[str], alikeness: float) -> str:
    """Returns which of some names is most like a text, whatever their case; empty where none is like it enough.

    Args:
        text: as someone wrote it.
        known: the names.
        alikeness: the least that counts, in `[0, 1]`, as `difflib` measures it.
    """
    by_folded = {name.casefold(): name for name in known}
    # Comparing takes time by the square of the length.
    nearest = difflib.get_close_matches(text[:LONGEST_SHOWN].casefold(), by_folded, n=1, cutoff=alikeness)
    return by_folded[nearest[0]] if nearest else ""


def bound_fault(value: Any, metadata: Mapping[str, Any], kind: Any) -> str:
    """Returns what is wrong with a value that is out of its option's bounds or none of its choices; else nothing."""
    if value is None:
        return ""
    if metadata["choices"] is not None and value not in metadata["choices"]:
        nearest = find_nearest(value, metadata["choices"], alikeness=0.4)
        hint = f"; did you mean {nearest}?" if nearest else ""
        return f"expected {describe_choices(metadata, kind)}. Received: {quote_value(value)}{hint}"
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
    return f"expected {words} {describe_bounds(metadata)}. Received: {quote_value(value)}"


def image_size_fault(size: tuple[int, int, int]) -> str:
    """Returns what is wrong with `(height, width, channels)`; empty where nothing is."""
    return f"expected 3 channels last (images are read as RGB). Received: {quote_value(size)}" if size[2] != 3 else ""


def eval_image_size_fault(size: list[int]) -> str:
    """Returns what is wrong with `[height, width]` or `[]`; empty if nothing is."""
    return "" if len(size) in (0, 2) else f"expected a height and a width, or nothing. Received: {quote_value(size)}"


class Sizes(Protocol):
    """What `configs.Configs`, of a layer above, says of the size of images."""

    image_target_size: tuple[int, int, int]
    eval_image_size: list[int]


def get_input_size(configs: Sizes) -> tuple[int, int]:
    """Returns the `(height, width)` of the images that the model takes: training may show it others."""
    return tuple(configs.eval_image_size or configs.image_target_size[:2])


def layer_sizes_fault(sizes: list[float]) -> str:
    """Returns what is wrong with the sizes of layers; empty where nothing is."""
    wrong = [size for size in sizes if size > 1 and size != int(size)]
    return (
        f"expected whole numbers from 1 on, or dropout rates under 1. Received: {quote_value(wrong[0])}"
        if wrong
        else ""
    )


def threshold_range_fault(thresholds: list[float]) -> str:
    """Returns what is wrong with a range of thresholds; empty where nothing is."""
    if len(thresholds) == 2 and thresholds[0] <= thresholds[1]:
        return ""
    return f"expected two numbers, the lower first. Received: {quote_value(thresholds)}"


def crop_area_fault(area: list[float]) -> str:
    """Returns what is wrong with a range of shares of an image; empty where nothing is."""
    if len(area) == 2 and area[0] <= area[1]:
        return ""
    return f"expected two numbers, the lower first. Received: {quote_value(area)}"


def pixel_range_fault(values: list[float]) -> str:
    """Returns what is wrong with the values that are black and white; empty where nothing is."""
    pairs = zip(values[::2], values[1::2], strict=False)
    if len(values) in (0, 2, 4) and all(math.isfinite(high - low) and low < high for low, high in pairs):
        return ""
    return f"expected two numbers, the lower first, or two pairs of them. Received: {quote_value(values)}"


def duration_fault(text: str) -> str:
    """Returns what is wrong with a duration; empty where nothing is."""
    if not text or parse_duration(text):
        return ""
    return (
        f"expected a time above 0 in seconds, or with s, m or h behind it, such as 10m. Received: {quote_value(text)}"
    )


def parse_duration(text: str) -> float:
    """Returns the seconds of a duration such as `90`, `90s`, `1.5m` or `2h`; 0 where it is none."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smh]?)", text.strip())
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0


def classes_fault(classes: list[str] | None) -> str:
    """Returns what is wrong with class names; empty where nothing is."""
    repeated = classes is not None and len(set(classes)) != len(classes)
    return f"expected each class name once. Received: {quote_value(classes)}" if repeated else ""


def folder_fault(path: str) -> str:
    """Returns what is wrong with the name of a folder; empty where nothing is."""
    return "" if path else "expected the name of a folder. Received: an empty text"


def quote_value(value: Any) -> str:
    """Returns a value as an error shows it: as Python writes it, and cut where it is long."""
    try:
        # What Python shows of an array has several lines.
        text = " ".join(repr(value).splitlines())
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def quote_difference(first: Any, second: Any) -> tuple[str, str]:
    """Returns two values as an error shows them: as Python writes them; of long lists, from where they differ on."""
    shown = (repr(first), repr(second))
    if max(map(len, shown)) <= LONGEST_SHOWN or not (isinstance(first, list) and isinstance(second, list)):
        return quote_value(first), quote_value(second)
    pairs = enumerate(zip(first, second, strict=False))
    start = next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
    return tuple(f"{quote_value(value[start:])} from item {start + 1} of {len(value)} on" for value in (first, second))
