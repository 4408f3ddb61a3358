"""The description of a model (class names, image size, decision), in its own file or in files next to it."""

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
# A member of a .keras file that Keras ignores, in the form of an artefact's _metadata.json.
DESCRIPTION_MEMBER = "description.json"
# The member from which training resumes. In files from older versions, only this names the classes.
STATE_MEMBER = "training_state.json"
LARGEST_STATE = 2**28
INSIDE = "own metadata"
# Options that older versions did not have, with the values for their models.
LEGACY_DEFAULTS = {"resize_mode": "stretch", "eval_image_size": [], "backbone_preprocessing": []}
# What a model needs apart from its class names, and how to give it.
NEEDED = {
    "image_target_size": "HEIGHT WIDTH 3",
    "resize_mode": "stretch|crop|pad",
    "multi_label_classification": "True|False",
}
# Values without information: the range is empty unless the run has read a TIFF that needs one.
UNKNOWN = (("classes", None), ("pixel_range", []))
BLOCK = 2**20
# Raised by zipfile and json for a damaged archive; RuntimeError also for an encrypted or deeply nested one.
DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class Description(NamedTuple):
    """The known description of a model.

    Attributes:
        options: the options that describe it.
        sources: the source of each option, in words that follow "its".
    """

    options: dict[str, Any]
    sources: dict[str, str]


def select_described(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that describe a model, without unknown ones."""
    return {
        name: options[name]
        for name, option in Configs.options().items()
        if option.metadata["describes_model"] and name in options and (name, options[name]) not in UNKNOWN
    }


def add_description(path: str, options: dict[str, Any]) -> None:
    """Adds the description of a model to its `.keras` file."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(DESCRIPTION_MEMBER, json.dumps({"options": select_described(options), "decision": None}))


def embed_decision(path: str, decision: dict[str, Any]) -> bool:
    """Writes a decision into a `.keras` file with a description, and returns False for any other file.

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
    """Returns the `options` and the `decision` in a model file, or None; raises UserError if they are damaged."""
    try:
        content = read_member(path, DESCRIPTION_MEMBER, LARGEST_JSON_FILE)
        if content is None:
            return None
        if not isinstance(content, dict) or not isinstance(content.get("options"), dict) or "decision" not in content:
            raise ValueError("it lacks parts")
    except ValueError as error:
        raise UserError(f"{path} has a damaged {DESCRIPTION_MEMBER}: {error}. Copy the file again.") from error
    return content


def read_member(path: str, name: str, largest: int) -> Any:
    """Returns the content of a JSON member of a `.keras` file, or None; raises ValueError if it is damaged."""
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
    """Returns the digest of `hash_file`; that of a `.keras` file ignores the description, which test.py changes."""
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
    """Reads the description of a model from its metadata, the `configs.json` next to it and its `_labels.txt`.

    Raises:
        UserError: one of them is damaged, or two of them contradict each other.
    """
    configs_path = os.path.join(os.path.dirname(os.path.abspath(model_path)), CONFIGS_FILE)
    of_run = Configs.read_json(configs_path) if os.path.isfile(configs_path) else {}
    of_run = _check_described(of_run, configs_path)
    source, own = _read_own(model_path)
    _refuse_difference(model_path, own, configs_path, of_run)
    names = {} if "classes" in own else _read_labels(labels_path(model_path))
    if names and "classes" in of_run:
        # The file has one line per name, without a name's own line breaks.
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
    """Returns the options in a model file or its `_metadata.json`, after the name of that source."""
    if content := read_description(model_path):
        options = Configs.convert_all(content["options"], is_text=False, source=model_path)
        return INSIDE, _check_described(options, model_path)
    if options := _read_options_of_state(model_path):
        return INSIDE, options
    if not os.path.isfile(path := metadata_path(model_path)):
        return "", {}
    return os.path.basename(path), _check_described(Configs.read_json(path, part="options"), path)


def _read_options_of_state(model_path: str) -> dict[str, Any]:
    """Returns the options in the training state of a model file; none if it is damaged: resuming reports that."""
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
    """Returns the options that describe a model; raises UserError if one has an impossible value."""
    try:
        return Configs.check_values(**select_described(options))
    except UserError as error:
        fault = str(error).partition("\n")[0]
        raise UserError(f"{path}: {fault}. Put the run's own file back.") from error


def _read_labels(path: str) -> dict[str, list[str]]:
    """Returns the option `classes` from a file with one name a line; empty if there is no file."""
    try:
        if not os.path.isfile(path):
            return {}
        if os.path.getsize(path) > LARGEST_JSON_FILE:
            raise ValueError(f"it has more than {LARGEST_JSON_FILE} bytes")
        with open(path, encoding="utf-8-sig") as file:
            names = file.read().splitlines()
        if not names or not all(name.strip() for name in names) or len(set(names)) < len(names):
            raise ValueError("a name is empty or occurs twice" if names else "it is empty")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: expected one class name per line, in UTF-8: {error}. Correct or remove it."
        ) from error
    return {"classes": names}


def _refuse_difference(first: str, options: dict[str, Any], second: str, others: dict[str, Any]) -> None:
    """Raises UserError if two files differ in an option that describes a model."""
    for name in options.keys() & others.keys():
        if not look_the_same(options[name], others[name]):
            one, other = quote_difference(options[name], others[name])
            raise UserError(
                f"{first} and {second} are of different models: {name} is {one} in the first and {other} in the "
                "second. Keep each model in its own folder, with its own files."
            )


def describe_model(configs: Configs, model_path: str) -> Configs:
    """Returns configs with the description of a model: see `find_description`.

    Raises:
        UserError: a given option contradicts the description, or the files are damaged or contradict each other.
    """
    described, sources = find_description(model_path)
    for name in sorted(described.keys() & configs.given):
        given = getattr(configs, name)
        # For the classes, None means unknown.
        if not look_the_same(given, described[name]) and not (name == "classes" and given is None):
            stored_words, given_words = quote_difference(described[name], given)
            raise UserError(
                f"{name} is {stored_words} for the model {model_path} (its {sources[name]} says so). "
                f"Received: {given_words}. Leave {name} out, or name another model."
            )
    return configs.replace(**described)


def require_description(configs: Configs, model_path: str) -> None:
    """Raises UserError if a model's class names, image size and so on are neither described nor given.

    Args:
        configs: from `describe_model`, with a `train_csv` that is given or the run's.
        model_path: of the model.
    """
    # This project's files are complete. A file written by hand may omit options, which then have their defaults.
    is_described = bool(find_description(model_path).options.keys() - {"classes"})
    missing = {} if is_described else {name: words for name, words in NEEDED.items() if name not in configs.given}
    flags = [f"--{name} {words}" for name, words in missing.items()]
    if not (configs.classes and "classes" in configs.given) and "train_csv" not in configs.given:
        missing = {"classes": ""} | missing
        flags.insert(0, "--classes NAME NAME ... in the model's order (or --train_csv FILE.csv, its training table)")
    if missing:
        raise UserError(
            f"Neither {model_path} nor a file next to it states its {join_names([*missing], len(missing))}. Give "
            f"{', '.join(flags)}; or put {os.path.basename(metadata_path(model_path))} or the {CONFIGS_FILE} of its "
            "run next to it."
        )
