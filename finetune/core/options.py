"""Options: declaring, converting and checking them, and reading them from JSON and the command line."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from finetune.core.values import (
    LONGEST_SHOWN,
    bound_fault,
    convert,
    describe_values,
    find_nearest,
    is_list,
    quote_value,
    type_fault,
)

# The sections of --help and of docs/options.md, in order.
GROUPS = {
    "common": "Most used",
    "data": "Data",
    "model": "Model",
    "training": "Training",
    "recipe": "Training recipe",
    "speed": "Input and speed",
    "explaining": "Testing and explaining",
    "machine": "Machine",
    "": "Others",
}
# Names that options had in earlier versions, on the command line and in JSON files, and their present names.
LEGACY_NAMES = {"test_image_size": "eval_image_size", "tta": "test_time_augmentation"}
LARGEST_JSON_FILE = 2**24
MOST_FAULTS = 20


class UserError(Exception):
    """A mistake that the user can correct: a script prints only its message and ends with exit status 2."""


class Exclusion(NamedTuple):
    """A conflict between an option and another one.

    Attributes:
        off: the value of the option that never conflicts.
        other: the name of the other option.
        harmless: the values of the other option that never conflict.
        reason: what was expected and why, in words.
    """

    off: Any
    other: str
    harmless: Sequence[Any]
    reason: str


def define(
    default: Any,
    description: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] | None = None,
    check: Callable[[Any], str] | None = None,
    needs: tuple[str, str] | None = None,
    excludes: Exclusion | None = None,
    describes_model: bool = False,
    fixed_in_run: bool = False,
    group: str = "",
) -> Any:
    """Declares one option.

    Args:
        default: the value unless another one is given.
        description: one sentence of at most 20 words, for `--help`.
        above: exclusive lower bound, which in a list every element must satisfy.
        at_least: inclusive lower bound.
        below: exclusive upper bound.
        at_most: inclusive upper bound.
        choices: the allowed texts.
        check: returns what is wrong with a value of the right type and within the bounds; empty if nothing is.
        needs: the name of another option without which this one has no effect, and its required value in words.
        excludes: a conflict with another option.
        describes_model: the option is a property of the trained model, so the model's own `configs.json` decides it.
        fixed_in_run: a run cannot continue with another value.
        group: the section of `--help`, a key of `GROUPS`; the options of a single script have a section of their own.
    """
    if group not in GROUPS:
        raise ValueError(f"group: expected one of {', '.join(filter(None, GROUPS))}. Received: {quote_value(group)}")
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    metadata = {
        "description": description,
        "bounds": {word: bound for word, bound in bounds.items() if bound is not None},
        "choices": choices,
        "check": check,
        "needs": needs,
        "excludes": excludes,
        "describes_model": describes_model,
        "fixed_in_run": fixed_in_run,
        "group": group,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Provenance(NamedTuple):
    """Where options come from.

    Attributes:
        file: the JSON file that was read, if any.
        in_file: the options that only this file gave.
        home: the folder that stored paths are relative to; empty for the working directory.
        stored: options and the values to store instead of those in use.
    """

    file: str = ""
    in_file: frozenset[str] = frozenset()
    home: str = ""
    stored: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass
class Options:
    """Base class for sets of options. Building one reads no file; `validate` checks all options at once."""

    def __post_init__(self) -> None:
        defaults = type(self).defaults()
        self.provenance = Provenance()
        self.given = {name for name, default in defaults.items() if differs(getattr(self, name), default)}

    def __setattr__(self, name: str, value: Any) -> None:
        is_option = name not in ("given", "provenance")
        if is_option and name not in self.options():
            raise AttributeError(unknown_option(name, list(self.options())))
        super().__setattr__(name, value)
        if "given" in vars(self) and is_option:
            self.given.add(name)

    @classmethod
    @functools.cache
    def options(cls) -> dict[str, dataclasses.Field]:
        """Returns the options by name, in the order of their declaration."""
        return {field.name: field for field in dataclasses.fields(cls)}

    @classmethod
    def grouped_options(cls) -> dict[str, list[str]]:
        """Returns the names of the options that all scripts share, by the titles in `GROUPS`."""
        own = cls.own_options()
        members: dict[str, list[str]] = {title: [] for title in GROUPS.values()}
        for name, field in cls.options().items():
            members[GROUPS[field.metadata["group"]]] += [name] * (name not in own)
        return {title: names for title, names in members.items() if names}

    @classmethod
    def own_options(cls) -> list[str]:
        """Returns the names of the options that a script adds, then of those that it declares differently."""
        # The first class below Options declares the options of all scripts.
        common = cls.__mro__[cls.__mro__.index(Options) - 1].options()
        own = [name for name, field in cls.options().items() if common.get(name) is not field]
        return sorted(own, key=lambda name: name in common)

    @classmethod
    @functools.cache
    def types(cls) -> dict[str, Any]:
        """Returns each option's type."""
        return typing.get_type_hints(cls)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Returns each option's default."""
        return {
            name: field.default if field.default is not dataclasses.MISSING else field.default_factory()
            for name, field in cls.options().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns a copy of the options and their values, for JSON."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.options()}

    def to_stored(self) -> dict[str, Any]:
        """Returns the options as `to_dict` does, with the values to store."""
        return self.to_dict() | dict(self.provenance.stored)

    def replace(self, **values: Any) -> Self:
        """Returns a copy with some options changed, which then count as given by the user."""
        changed = dataclasses.replace(self, **values)
        changed.given = self.given | values.keys()
        stored = tuple(pair for pair in self.provenance.stored if pair[0] not in values)
        changed.provenance = self.provenance._replace(stored=stored)
        return changed

    @classmethod
    def read_json(cls, path: str, part: str = "") -> dict[str, Any]:
        """Reads options from a JSON file.

        Args:
            path: of the file.
            part: the member of the JSON object that holds the options; empty if the object itself does.

        Returns:
            The converted values by option.

        Raises:
            UserError: the file is missing, too large or not a JSON object, or an option is unknown, repeated or of the
                wrong type.
        """
        try:
            with open(path, "rb") as file:
                content = file.read(LARGEST_JSON_FILE + 1)
            if len(content) > LARGEST_JSON_FILE:
                raise UserError(f"{path}: expected a configs file of at most {LARGEST_JSON_FILE} bytes. It is larger.")
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
        return cls.convert_all(stored, is_text=False, source=path)

    @classmethod
    def from_json(cls, path: str) -> Self:
        """Builds configs from the defaults and a JSON file; raises UserError as `read_json` does."""
        values = cls.read_json(path)
        return cls._build(values, Provenance(path, frozenset(values)))

    @classmethod
    def from_command_line(cls, description: str | None = None, arguments: Sequence[str] | None = None) -> Self:
        """Builds and validates configs: flags override `--configs FILE.json`, which overrides the defaults.

        Args:
            description: the first lines of `--help`.
            arguments: the command line without the program's name; by default that of this process.

        Raises:
            UserError: an option is unknown, or its value is missing, of the wrong type or out of range.
            SystemExit: after `--help`.
        """
        parser = _argument_parser(cls, description)
        namespace, unknown = parser.parse_known_args(arguments)
        if unknown:
            # Words without hyphens may be the values of unknown flags.
            flags = [word for word in unknown if word.startswith("--")] or unknown[:1]
            faults = [unknown_flag(flag.split("=")[0], list(cls.options())) for flag in flags[:MOST_FAULTS]]
            raise UserError("\n".join(faults))
        flags = {name: value for name, value in vars(namespace).items() if name != "configs"}
        flags = cls.convert_all(flags, is_text=True, source="command line")
        file = getattr(namespace, "configs", "")
        from_file = cls.read_json(file) if "configs" in namespace else {}
        return cls._build(from_file | flags, Provenance(file, frozenset(from_file.keys() - flags.keys()))).validate()

    @classmethod
    def _build(cls, values: dict[str, Any], provenance: Provenance) -> Self:
        configs = cls(**values)
        configs.given |= values.keys()
        configs.provenance = provenance
        return configs

    @classmethod
    def convert_all(cls, raw: dict[str, Any], is_text: bool, source: str) -> dict[str, Any]:
        """Converts raw values to the types of their options.

        Args:
            raw: values by option.
            is_text: the values come from the command line and not from JSON.
            source: the first words of each line of the error.

        Raises:
            UserError: an option is unknown, or its value is of the wrong type.
        """
        types = cls.types()
        values, faults = {}, []
        for name, value in rename_legacy(raw).items():
            if len(faults) == MOST_FAULTS:
                faults.append("and more")
                break
            if name not in cls.options():
                faults.append(unknown_option(name, list(cls.options())))
                continue
            try:
                values[name] = convert(value, types[name], is_text)
            except ValueError:
                faults.append(type_fault(name, types[name], value))
        if faults:
            raise UserError("\n".join(f"{source}: {fault}" for fault in faults))
        return values

    def validate(self) -> Self:
        """Checks types, bounds and combinations.

        Returns:
            These configs.

        Raises:
            UserError: one line per fault with the option, what was expected and what was received.
        """
        for name, value in self.check_values(**{name: getattr(self, name) for name in self.options()}).items():
            super().__setattr__(name, value)
        if faults := self._find_contradictions():
            raise UserError("\n".join(faults))
        return self

    @classmethod
    def check(cls, configs: Any) -> Self:
        """Returns configs after validating them; raises UserError also if they are not of this class."""
        if not isinstance(configs, cls):
            raise UserError(f"configs: expected {cls.__name__}. Received: {quote_value(configs)}")
        return configs.validate()

    @classmethod
    def check_values(cls, **values: Any) -> dict[str, Any]:
        """Checks single values: their types and bounds.

        Returns:
            The values by option, converted to its type.

        Raises:
            UserError: one line per fault.
        """
        faults = []
        for name, value in values.items():
            kind, metadata = cls.types()[name], cls.options()[name].metadata
            try:
                values[name] = value = convert(value, kind, is_text=False)
            except ValueError:
                faults.append(type_fault(name, kind, value))
                continue
            fault = bound_fault(value, metadata, kind) or (metadata["check"] and metadata["check"](value))
            faults += [f"{name}: {fault}"] * bool(fault)
        if faults:
            raise UserError("\n".join(faults))
        return values

    def _find_contradictions(self) -> list[str]:
        """Returns a line for each option that conflicts with another one or has no effect without it."""
        defaults = self.defaults()
        excluding = {name: field.metadata["excludes"] for name, field in self.options().items()}
        return [
            f"{name}: {rule.reason}. Received: {getattr(self, name)} with {rule.other} {getattr(self, rule.other)}."
            for name, rule in excluding.items()
            if rule and getattr(self, name) != rule.off and getattr(self, rule.other) not in rule.harmless
        ] + [
            f"{name}: {getattr(self, name)} has no effect without {words}. Set that too, or leave {name} out."
            for name, field in self.options().items()
            for needed, words in [field.metadata["needs"]] * bool(field.metadata["needs"])
            if getattr(self, name) != defaults[name] and not getattr(self, needed)
        ]


def differs(value: Any, default: Any) -> bool:
    """Returns whether a value differs from the default; True for values that cannot be compared, such as arrays."""
    try:
        return bool(value != default)
    except (TypeError, ValueError):
        return True


def rename_legacy(values: dict[str, Any]) -> dict[str, Any]:
    """Returns values by the present names of their options; raises UserError if both names of one are given."""
    for old, new in LEGACY_NAMES.items():
        if old in values and new in values:
            raise UserError(f"{old} is the former name of {new}. Received both. Leave {old} out.")
        if old in values:
            _print_renamed(old, new)
    return {LEGACY_NAMES.get(name, name): value for name, value in values.items()}


@functools.cache
def _print_renamed(old: str, new: str) -> None:
    # Once: a script reads the files of a run several times.
    print(f"The option {old} is now called {new}.")


def unknown_option(name: str, known: Sequence[str]) -> str:
    """Returns the error message for an unknown option, with the most similar known one."""
    nearest = find_nearest(name, known, alikeness=0.5)
    shown = name if name.isprintable() and len(name) <= LONGEST_SHOWN else quote_value(name)
    return f"Unknown option {shown}. " + (f"Did you mean {nearest}?" if nearest else "See --help for all options.")


def unknown_flag(flag: str, known: Sequence[str]) -> str:
    """Returns the error message for an unexpected word on the command line."""
    flags = [f"--{name}" for name in known]
    if flag.startswith("-") or find_nearest(flag, flags, alikeness=0.5):
        return unknown_option(flag, flags)
    return f"Expected --OPTION VALUE. Received {quote_value(flag)} without an option in front of it. See --help."


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"it has {quote_value(name)} twice")
        content[name] = value
    return content


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}. See --help for all options.")


def _argument_parser(cls: type[Options], description: str | None) -> argparse.ArgumentParser:
    # The default usage line lists every flag.
    usage = "%(prog)s [--configs FILE.json] [--OPTION VALUE ...]"
    parser = _Parser(usage=usage, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups = {"Options of this script": cls.own_options()} if cls.own_options() else {}
    groups |= cls.grouped_options()
    for position, (title, names) in enumerate(groups.items()):
        group = parser.add_argument_group(title)
        if position == len(groups) - len(cls.grouped_options()):
            group.add_argument("--configs", metavar="FILE.json", help="A JSON file of options, read before the flags")
        for name in names:
            _add_flag(group, name, cls)
    for old, new in LEGACY_NAMES.items():
        if new in cls.options():
            parser.add_argument(f"--{old}", nargs="*" if is_list(cls.types()[new]) else None, help=argparse.SUPPRESS)
    return parser


def _add_flag(group: argparse._ArgumentGroup, name: str, cls: type[Options]) -> None:
    kind, metadata, default = cls.types()[name], cls.options()[name].metadata, cls.defaults()[name]
    default = "empty" if default == "" else " ".join(map(str, default)) if is_list(kind) and default else default
    text = f"{metadata['description']} ({describe_values(metadata, kind)}; default {default})".replace("%", "%%")
    group.add_argument(f"--{name}", metavar="VALUE", nargs="*" if is_list(kind) else None, help=text)
