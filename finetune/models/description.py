"""What a model says of itself, in its file or in files next to it: class names, image size and the like, decision."""

from __future__ import annotations

import copy
import hashlib
import json
import lzma
import os
import shutil
import zipfile
import zlib
from typing import Any, NamedTuple

from configs import Configs
from finetune.core.files import atomic_path
from finetune.core.labels import look_the_same
from finetune.core.options import LARGEST_JSON_FILE, UserError, rename_legacy
from finetune.core.texts import join_names
from finetune.core.values import quote_difference
from finetune.data.stores import hash_file
from finetune.models.formats import labels_path, metadata_path

CONFIGS_FILE = "configs.json"
# A member of a .keras file, which Keras passes over. It has the form of an artefact's _metadata.json.
DESCRIPTION_MEMBER = "description.json"
# The member from which training goes on. In files from older versions it is what names the classes.
STATE_MEMBER = "training_state.json"
LARGEST_STATE = 2**28
INSIDE = "own metadata"
# Options that older versions did not have, and the values that describe their models.
LEGACY_DEFAULTS = {"resize_mode": "stretch", "eval_image_size": []}
# What a model cannot be used without, apart from its class names, and how to give it.
NEEDED = {
    "image_target_size": "HEIGHT WIDTH 3",
    "resize_mode": "stretch|crop|pad",
    "multi_label_classification": "True|False",
}
# Values that say nothing: a run that has seen no TIFF that needs a range has an empty one.
UNKNOWN = (("classes", None), ("pixel_range", []))
BLOCK = 2**20
# What zipfile and json raise on a damaged archive; RuntimeError also of an encrypted one, and of nesting without end.
DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class Description(NamedTuple):
    """What files say of a model.

    Attributes:
        options: those that describe it, as far as a file says them.
        sources: what says each of them, in words that follow "its".
    """

    options: dict[str, Any]
    sources: dict[str, str]


def select_described(options: dict[str, Any]) -> dict[str, Any]:
    """Returns those options that describe a model, without those that are yet to be found."""
    return {
        name: options[name]
        for name, option in Configs.options().items()
        if option.metadata["describes_model"] and name in options and (name, options[name]) not in UNKNOWN
    }


def add_description(path: str, options: dict[str, Any]) -> None:
    """Adds what describes a model to its `.keras` file, as one more member of the archive."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(DESCRIPTION_MEMBER, json.dumps({"options": select_described(options), "decision": None}))


def embed_decision(path: str, decision: dict[str, Any]) -> bool:
    """Writes a decision into a `.keras` file that carries a description; leaves every other file as it is.

    Returns:
        Whether the file carries the decision now.

    Raises:
        UserError: the description is damaged, or the file cannot be written.
    """
    content = read_description(path)
    if content is None or content["decision"] == decision:
        return content is not None
    with atomic_path(path) as temporary, zipfile.ZipFile(path) as before, zipfile.ZipFile(temporary, "w") as after:
        for member in before.infolist():
            if member.filename != DESCRIPTION_MEMBER:
                with before.open(member) as source, after.open(copy.copy(member), "w") as target:
                    shutil.copyfileobj(source, target, BLOCK)
        after.writestr(DESCRIPTION_MEMBER, json.dumps(content | {"decision": decision}))
    return True


def read_description(path: str) -> dict[str, Any] | None:
    """Returns the `options` and the `decision` that a model file carries; None where it carries no description.

    Raises:
        UserError: the description is damaged.
    """
    try:
        content = read_member(path, DESCRIPTION_MEMBER, LARGEST_JSON_FILE)
        if content is None:
            return None
        if not isinstance(content, dict) or not isinstance(content.get("options"), dict) or "decision" not in content:
            raise ValueError("it lacks parts")
    except ValueError as error:
        raise UserError(f"{path} carries a {DESCRIPTION_MEMBER} that is damaged: {error}. Copy it again.") from error
    return content


def read_member(path: str, name: str, largest: int) -> Any:
    """Returns what a JSON member of a `.keras` file holds; None if the file is no archive or has no such member.

    Raises:
        ValueError: it is damaged.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if name not in archive.namelist():
                return None
            if archive.getinfo(name).file_size > largest:
                raise ValueError("it is too large")
            content = json.loads(archive.read(name))
    except DAMAGE as error:
        raise ValueError(str(error)) from error
    if content is None:
        raise ValueError("it is null")
    return content


def hash_model(path: str) -> bytes | str:
    """Returns a digest as `hash_file` does; of a `.keras` file without its description, which test.py changes."""
    try:
        if not zipfile.is_zipfile(path):
            return hash_file(path)
        with zipfile.ZipFile(path) as archive:
            if DESCRIPTION_MEMBER not in archive.namelist():
                return hash_file(path)
            digest = hashlib.sha256()
            for member in archive.infolist():
                if member.filename != DESCRIPTION_MEMBER:
                    digest.update(member.filename.encode() + b"\0")
                    with archive.open(member) as file:
                        while block := file.read(BLOCK):
                            digest.update(block)
            return digest.digest()
    except (OSError, zipfile.BadZipFile):
        return path


def find_description(model_path: str) -> Description:
    """Finds what a model's own metadata, the `configs.json` next to it and its `_labels.txt` say of it.

    Raises:
        UserError: one of them is damaged, or two of them are of different models.
    """
    configs_path = os.path.join(os.path.dirname(os.path.abspath(model_path)), CONFIGS_FILE)
    of_run = Configs.read_json(configs_path) if os.path.isfile(configs_path) else {}
    of_run = _check_described(of_run, configs_path)
    source, own = _read_own(model_path)
    _refuse_difference(model_path, own, configs_path, of_run)
    names = {} if "classes" in own else _read_labels(labels_path(model_path))
    if names and "classes" in of_run:
        # A file of lines cannot hold the line breaks of a name.
        shown = {"classes": [" ".join(name.splitlines()) for name in of_run["classes"]]}
        _refuse_difference(labels_path(model_path), names, configs_path, shown)
    options, sources = {}, {}
    legacy = LEGACY_DEFAULTS if of_run or own else {}
    by_source = [(os.path.basename(labels_path(model_path)), names), (source or CONFIGS_FILE, legacy)]
    for said_by, said in (*by_source, (CONFIGS_FILE, of_run), (source, own)):
        options |= said
        sources |= dict.fromkeys(said, said_by)
    return Description(options, sources)


def _read_own(model_path: str) -> tuple[str, dict[str, Any]]:
    """Returns what a model file, or else its `_metadata.json`, says of the model, and which of them does."""
    if content := read_description(model_path):
        options = Configs.convert_all(content["options"], is_text=False, source=model_path)
        return INSIDE, _check_described(options, model_path)
    if options := _read_options_of_state(model_path):
        return INSIDE, options
    if not os.path.isfile(path := metadata_path(model_path)):
        return "", {}
    return os.path.basename(path), _check_described(Configs.read_json(path, part="options"), path)


def _read_options_of_state(model_path: str) -> dict[str, Any]:
    """Returns what the training state in a model file, if any, says of the model.

    Empty where the state is damaged, which only matters if training goes on from it.
    """
    try:
        state = read_member(model_path, STATE_MEMBER, LARGEST_STATE)
        stored = state.get("configs") if isinstance(state, dict) else None
        if not isinstance(stored, dict):
            return {}
        options = Configs.convert_all(select_described(rename_legacy(stored)), is_text=False, source=model_path)
        return _check_described(options, model_path)
    except (ValueError, UserError):
        return {}


def _check_described(options: dict[str, Any], path: str) -> dict[str, Any]:
    """Returns the options that describe a model; raises UserError where one of them has a value that none can have."""
    try:
        return Configs.check_values(**select_described(options))
    except UserError as error:
        fault = str(error).partition("\n")[0]
        raise UserError(f"{path}: {fault}. Put the run's own file back.") from error


def _read_labels(path: str) -> dict[str, list[str]]:
    """Returns the class names in a file of one name a line, as the option `classes`; empty if it does not exist.

    Raises:
        UserError: it is no such file.
    """
    try:
        if not os.path.isfile(path):
            return {}
        if os.path.getsize(path) > LARGEST_JSON_FILE:
            raise ValueError(f"it has more than {LARGEST_JSON_FILE} bytes")
        with open(path, encoding="utf-8-sig") as file:
            names = file.read().splitlines()
        if not names or not all(name.strip() for name in names) or len(set(names)) < len(names):
            raise ValueError("a name is empty or there twice" if names else "it is empty")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a class name a line, in UTF-8: {error}. Correct or remove it.") from error
    return {"classes": names}


def _refuse_difference(first: str, options: dict[str, Any], second: str, others: dict[str, Any]) -> None:
    """Raises UserError where two files differ in an option that describes a model."""
    for name in options.keys() & others.keys():
        if not look_the_same(options[name], others[name]):
            one, other = quote_difference(options[name], others[name])
            raise UserError(
                f"{first} and {second} are of different models: {name} is {one} in the first and {other} in the "
                "second. Keep each model in a folder of its own, with the files that belong to it."
            )


def describe_model(configs: Configs, model_path: str) -> Configs:
    """Takes the options that describe a model from what files say of it: see `find_description`.

    Raises:
        UserError: an option that the user gave contradicts it, or the files are damaged or contradict each other.
    """
    described, sources = find_description(model_path)
    for name in sorted(described.keys() & configs.given):
        given = getattr(configs, name)
        # For the classes alone, none means that they are to be found.
        if not look_the_same(given, described[name]) and not (name == "classes" and given is None):
            stored_words, given_words = quote_difference(described[name], given)
            raise UserError(
                f"{name} is {stored_words} for the model {model_path} (its {sources[name]} says so). "
                f"Received: {given_words}. Leave {name} out, or name another model."
            )
    return configs.replace(**described)


def require_description(configs: Configs, model_path: str) -> None:
    """Checks that a model's class names, image size and the like are known or given: a default is a guess.

    Args:
        configs: as `describe_model` returns them, with a `train_csv` that is given or the run's.
        model_path: of the model.

    Raises:
        UserError: names what is missing, and how to give it.
    """
    # Files of this project say all of it. In one that was written by hand, defaults stand for what it leaves out.
    is_described = bool(find_description(model_path).options.keys() - {"classes"})
    missing = {} if is_described else {name: words for name, words in NEEDED.items() if name not in configs.given}
    flags = [f"--{name} {words}" for name, words in missing.items()]
    if not (configs.classes and "classes" in configs.given) and "train_csv" not in configs.given:
        missing = {"classes": ""} | missing
        flags.insert(0, "--classes NAME NAME ... in the model's order (or --train_csv FILE.csv, its training table)")
    if missing:
        raise UserError(
            f"Neither {model_path} nor a file next to it says its {join_names([*missing], len(missing))}. Give "
            f"{', '.join(flags)}; or put {os.path.basename(metadata_path(model_path))} or its run's {CONFIGS_FILE} "
            "next to it."
        )
