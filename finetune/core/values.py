"""Values of options: converting them from text and JSON, checking them, and describing faults."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

# The largest range in which 64-bit floats are exact. The libraries fail on larger numbers, each in its own way.
LARGEST_WHOLE_NUMBER = 2**53
LONGEST_SHOWN = 200
# Input scalings of backbones, as Keras calls them; with none, the backbone scales its input itself.
SCALINGS = ("torch", "tf", "caffe", "none")
WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# In words: one value of a type, and several.
TYPE_NAMES = {
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("True or False", ""),
}
BOUNDS: dict[str, Callable[[float, float], bool]] = {
    "above": operator.gt,
    "at least": operator.ge,
    "below": operator.lt,
    "at most": operator.le,
}


def convert(value: Any, kind: Any, is_text: bool) -> Any:
    """Converts a raw value to the type of an option.

    Args:
        value: from Python or JSON; or text, or a list of texts, from the command line.
        kind: the annotated type: str, int, float, bool, list[...], tuple[...], or one of them `| None`.
        is_text: the value comes from the command line.

    Raises:
        ValueError: the value is not of that type. A bool is not a number; an int is a valid float. Texts that neither
            file names nor UTF-8 files can hold and whole numbers beyond `LARGEST_WHOLE_NUMBER` are refused.
    """
    inner, optional = unwrap_optional(kind)
    words = value if isinstance(value, list) else [value]
    if optional and (value is None or (is_text and [str(word).lower() for word in words] == ["none"])):
        return None
    if is_list(kind):
        kinds = typing.get_args(inner)
        container = typing.get_origin(inner)
        if not isinstance(value, list | tuple) or (container is tuple and len(kinds) != len(value)):
            raise ValueError(value)
        return container(convert(item, kinds[0], is_text) for item in value)
    if is_text:
        value = _from_text(value, inner)
    elif inner is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)
    elif inner is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = _from_text(str(value), float) if type(value) is int else float(value)
    if inner is str and isinstance(value, str) and value.startswith("~/"):
        # The shell does not expand it in --option=~/folder, nor does JSON.
        value = os.path.expanduser(value)
    if type(value) is not inner or not _is_usable(value):
        raise ValueError(value)
    return value


def _is_usable(value: Any) -> bool:
    if isinstance(value, str):
        # Neither file names nor UTF-8 files can hold NUL and lone surrogates.
        return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST_WHOLE_NUMBER


def unwrap_optional(kind: Any) -> tuple[Any, bool]:
    """Returns a type without its `| None`, and whether it had one."""
    options = typing.get_args(kind)
    if type(None) not in options:
        return kind, False
    return next(option for option in options if option is not type(None)), True


def is_list(kind: Any) -> bool:
    """Returns whether a type is a list or a tuple, also with `| None`."""
    return typing.get_origin(unwrap_optional(kind)[0]) in (list, tuple)


def _from_text(text: str, kind: type) -> Any:
    try:
        return WORDS[text.lower()] if kind is bool else kind(text)
    except (KeyError, OverflowError) as error:
        raise ValueError(text) from error


def type_fault(name: str, kind: Any, value: Any) -> str:
    """Returns the error message for an option with a value of the wrong type."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    unwritable = any(isinstance(text, str) and not _is_usable(text) for text in texts)
    hint = " without NUL and lone surrogates" * unwritable
    if len(texts) == 1 and "," in str(texts[0]) and is_list(kind):
        hint += ", with blanks between them"
    return f"{name}: expected {describe_type(kind)}{hint}. Received: {quote_value(value)}"


def describe_type(kind: Any) -> str:
    """Returns the type of an option in words."""
    inner, optional = unwrap_optional(kind)
    items = typing.get_args(inner)
    if is_list(kind):
        number = len(items) if typing.get_origin(inner) is tuple else "a list of"
        words = f"{number} {TYPE_NAMES[items[0]][1]}"
    else:
        words = TYPE_NAMES[inner][0]
    return words + (" or none" if optional else "")


def describe_choices(metadata: Mapping[str, Any], kind: Any) -> str:
    """Returns the choices of an option in words."""
    return f"one of {', '.join(metadata['choices'])}" + (" or none" if unwrap_optional(kind)[1] else "")


def describe_bounds(metadata: Mapping[str, Any]) -> str:
    """Returns an option's bounds in words; empty if it has none."""
    bounds = metadata["bounds"]
    if bounds.keys() == {"at least", "at most"}:
        return f"from {bounds['at least']} to {bounds['at most']}"
    return " and ".join(f"{word} {bound}" for word, bound in bounds.items())


def describe_values(metadata: Mapping[str, Any], kind: Any) -> str:
    """Returns the values that an option takes: its choices, or its type and bounds."""
    if metadata["choices"]:
        return describe_choices(metadata, kind)
    inner, optional = unwrap_optional(kind)
    return f"{describe_type(inner)} {describe_bounds(metadata)}".strip() + " or none" * optional


def find_nearest(text: str, known: Sequence[str], alikeness: float) -> str:
    """Returns the name that is most similar to a text, whatever the case; empty if none is similar enough.

    Args:
        text: what a user wrote.
        known: the names.
        alikeness: the lowest similarity that counts, in `[0, 1]`, as `difflib` measures it.
    """
    by_folded = {name.casefold(): name for name in known}
    # The time of a comparison grows with the square of the length.
    nearest = difflib.get_close_matches(text[:LONGEST_SHOWN].casefold(), by_folded, n=1, cutoff=alikeness)
    return by_folded[nearest[0]] if nearest else ""


def bound_fault(value: Any, metadata: Mapping[str, Any], kind: Any) -> str:
    """Returns what is wrong with a value that is out of bounds or not a choice; empty if nothing is."""
    if value is None:
        return ""
    if metadata["choices"] is not None and value not in metadata["choices"]:
        nearest = find_nearest(value, metadata["choices"], alikeness=0.4)
        hint = f"; did you mean {nearest}?" if nearest else ""
        return f"expected {describe_choices(metadata, kind)}. Received: {quote_value(value)}{hint}"
    items = value if isinstance(value, list | tuple) else [value]
    if all(BOUNDS[word](item, bound) for word, bound in metadata["bounds"].items() for item in items):
        return ""
    words = "numbers" if isinstance(value, list | tuple) else "a number"
    return f"expected {words} {describe_bounds(metadata)}. Received: {quote_value(value)}"


def image_size_fault(size: tuple[int, int, int]) -> str:
    """Returns what is wrong with `(height, width, channels)`; empty if nothing is."""
    return _unless(size[2] == 3, "3 channels last (images are read as RGB)", size)


def eval_image_size_fault(size: list[int]) -> str:
    """Returns what is wrong with `[height, width]` or `[]`; empty if nothing is."""
    return _unless(len(size) in (0, 2), "a height and a width, or nothing", size)


class Sizes(Protocol):
    """The options that `get_input_size` reads: `configs.Configs` is in a layer above this one."""

    image_target_size: tuple[int, int, int]
    eval_image_size: list[int]


def get_input_size(configs: Sizes) -> tuple[int, int]:
    """Returns the `(height, width)` of the model's input. Training may use another size."""
    return tuple(configs.eval_image_size or configs.image_target_size[:2])


def layer_sizes_fault(sizes: list[float]) -> str:
    """Returns what is wrong with the sizes of layers; empty if nothing is."""
    wrong = [size for size in sizes if size > 1 and size != int(size)]
    return _unless(not wrong, "whole numbers from 1 on, or dropout rates under 1", *wrong[:1])


def range_fault(values: list[float]) -> str:
    """Returns what is wrong with a range of two numbers; empty if nothing is."""
    return _unless(len(values) == 2 and values == sorted(values), "two numbers, the lower first", values)


def pixel_range_fault(values: list[float]) -> str:
    """Returns what is wrong with the values of black and white; empty if nothing is."""
    pairs = zip(values[::2], values[1::2], strict=False)
    is_right = len(values) in (0, 2, 4) and all(math.isfinite(high - low) and low < high for low, high in pairs)
    return _unless(is_right, "two numbers, the lower first, or two such pairs", values)


def read_scaling(values: Sequence[str]) -> str | tuple[float, float]:
    """Returns an input scaling: a word of `SCALINGS`, or a scale and an offset; raises ValueError for other texts."""
    if len(values) == 1 and values[0] in SCALINGS:
        return values[0]
    scale, offset = (float(value) for value in values)
    if not 0 < abs(scale) < math.inf or not math.isfinite(offset):
        raise ValueError("not finite")
    return scale, offset


def scaling_fault(values: list[str]) -> str:
    """Returns what is wrong with an input scaling, which may be empty; empty if nothing is."""
    try:
        is_right = not values or bool(read_scaling(values))
    except ValueError:
        is_right = False
    return _unless(is_right, f"{', '.join(SCALINGS)}, or two numbers, a scale and an offset", " ".join(values))


def duration_fault(text: str) -> str:
    """Returns what is wrong with a duration; empty if nothing is."""
    return _unless(not text or parse_duration(text) > 0, "a time above 0, such as 90s, 10m or 2h", text)


def parse_duration(text: str) -> float:
    """Returns the seconds of a duration such as `90`, `90s`, `1.5m` or `2h`; 0 if it is none."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smh]?)", text.strip())
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0


def classes_fault(classes: list[str] | None) -> str:
    """Returns what is wrong with class names; empty if nothing is."""
    return _unless(classes is None or len(set(classes)) == len(classes), "each class name once", classes)


def folder_fault(path: str) -> str:
    """Returns what is wrong with the name of a folder; empty if nothing is."""
    return _unless(bool(path), "the name of a folder", path)


def _unless(is_right: bool, expected: str, received: Any = None) -> str:
    return "" if is_right else f"expected {expected}. Received: {quote_value(received)}"


def quote_value(value: Any) -> str:
    """Returns a value as Python writes it, shortened to one line of `LONGEST_SHOWN` characters."""
    try:
        # Python shows an array in several lines.
        text = " ".join(repr(value).splitlines())
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def quote_difference(first: Any, second: Any) -> tuple[str, str]:
    """Returns two values as `quote_value` does; long lists from their first difference on."""
    shown = (repr(first), repr(second))
    if max(map(len, shown)) <= LONGEST_SHOWN or not (isinstance(first, list) and isinstance(second, list)):
        return quote_value(first), quote_value(second)
    pairs = enumerate(zip(first, second, strict=False))
    start = next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
    return tuple(f"{quote_value(value[start:])} from item {start + 1} of {len(value)} on" for value in (first, second))
