"""Finding a trained model, and what its run says of it: how it takes images, and where its tables are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from configs import Configs
from finetune.core.options import UserError
from finetune.data.stores import is_url
from finetune.data.tables import resolve_class_names
from finetune.evaluation.decision_file import DECISION_FILE
from finetune.models.description import (
    CONFIGS_FILE,
    NEEDED,
    describe_model,
    embed_decision,
    find_description,
    read_description,
    require_description,
)
from finetune.models.formats import MODEL_SUFFIXES, is_exported
from finetune.training.run_data import (
    DATA_OPTIONS,
    READING_OPTIONS,
    TABLE_OPTIONS,
    disown_paths,
    gives_other_tables,
    locate_data,
    refuse_trained_images,
)
from finetune.training.run_folder import BEST_MODEL, LATEST_MODEL, leads_into, locked

# What test.py does without.
OPTIONAL_TABLES = {"train_csv": "a training set", "validation_csv": "a validation set"}


def resolve_model_path(path: str, preferred: Sequence[str] = (BEST_MODEL, LATEST_MODEL)) -> str:
    """Finds the model file that a path means.

    Args:
        path: a model file, or a run's folder.
        preferred: names of files in a run's folder, the first choice first.

    Returns:
        An existing file; where it is not the named one, the substitution is printed.

    Raises:
        UserError: there is no model.
    """
    if os.path.isfile(path):
        return path
    if os.path.isdir(path) and is_exported(path):
        return os.path.normpath(path)
    if os.path.isdir(path):
        for name in preferred:
            if os.path.isfile(os.path.join(path, name)):
                return os.path.join(path, name)
        raise UserError(f"The folder {path} holds no model. Expected {' or '.join(preferred)}. Train first.")
    stem, suffix = os.path.splitext(path)
    for other in MODEL_SUFFIXES:
        if suffix in MODEL_SUFFIXES and os.path.isfile(stem + other):
            print(f"{path} does not exist: using {stem + other} beside it.")
            return stem + other
    raise UserError(
        f"There is no model at {path}. Expected a .keras, .h5 or .hdf5 file, or the folder of a run. "
        "Train first, or name another by --load_model_path."
    )


def find_trained_model(configs: Configs, data_options: Sequence[str] = DATA_OPTIONS) -> tuple[str, Configs]:
    """Finds the trained model that configs name, and what its files say of it.

    Args:
        configs: `load_model_path`, or where that is empty `save_model_path`, leads to the model.
        data_options: those that the script uses, of where the images are.

    Returns:
        The model file, and `configs` with the options that describe a model taken from its files, and with the run's
        tables, image directory and label column where none are given. Where no file names the classes and they are
        not given, they come from a training CSV that is given, and do not count as given. Where `load_model_path`
        alone is given, `save_model_path` becomes the model's folder: what is found out about a run belongs there,
        not into another one.

    Raises:
        UserError: there is no model, a given option contradicts it, or what describes it is neither known nor given.
    """
    Configs.check(configs)
    model_path = resolve_model_path(configs.load_model_path or configs.save_model_path)
    configs = take_data_options(describe_model(configs, model_path), model_path, data_options)
    require_description(configs, model_path)
    if not read_run_configs(model_path):
        configs = leave_out_default_tables(configs, data_options)
    configs = configs.replace(save_model_path=find_output_folder(configs, model_path))
    if configs.classes is None or "classes" not in configs.given:
        class_names = resolve_class_names(
            None, configs.train_csv, configs.csv_label_column, configs.multi_label_classification
        )
        configs = configs.replace(classes=class_names)
        configs.given.discard("classes")
    return model_path, configs


def leave_out_default_tables(configs: Configs, names: Sequence[str]) -> Configs:
    """Empties the paths of a training and a validation table that nobody gave: they needn't be this model's."""
    for name, words in OPTIONAL_TABLES.items():
        if name in names and name not in configs.given and getattr(configs, name):
            print(f"No {CONFIGS_FILE} says which {name} is this model's, and it is not given: going without {words}.")
            configs = configs.replace(**{name: ""})
    return configs


def name_model(configs: Configs, model_path: str) -> str:
    """Returns the line that names a model and says where its class names come from.

    Args:
        configs: as `find_trained_model` returns them.
        model_path: of the model.
    """
    options, sources = find_description(model_path)
    given = "--classes" if "classes" in configs.given else f"--train_csv {configs.train_csv}"
    source = f"its {sources['classes']}" if "classes" in sources else given
    line = f"Model: {model_path} (class names from {source})"
    if options.keys() <= {"classes"}:
        line += "\nNo file says how it takes images: it gets RGB from 0 to 255, its preprocessing has to be inside."
    return line


def take_data_options(configs: Configs, model_path: str, names: Sequence[str] = DATA_OPTIONS) -> Configs:
    """Takes where the images are from the `configs.json` beside a model, unless given, and prints what that changes.

    A training or validation table that is no longer there is left out: metrics of the test set need none.
    """
    configs, stored = disown_paths(configs, model_path), locate_run_data(model_path)
    taken = {name: stored[name] for name in names if name in stored and name not in configs.given}
    if not read_run_configs(model_path).get("image_directory") and gives_other_tables(configs, stored):
        # The paths in a table that is given start here, not where the run was started.
        taken.pop("image_directory", None)
    for name, words in OPTIONAL_TABLES.items():
        if (path := taken.get(name, "")) and not is_url(path) and not os.path.isfile(path):
            print(f"{name} of the run, {path}, does not exist: going without {words}.")
            configs = configs.replace(**{name: ""})
            del taken[name]
    for name, value in taken.items():
        if value != getattr(configs, name):
            print(f"{name} is that of the run: {value or 'empty'}")
    return configs.replace(**taken)


def list_tables(configs: Configs, model_path: str) -> dict[str, tuple[str, Configs]]:
    """Returns the CSV file of the `training`, `validation` and `test` set, each with the configs to read it with.

    A run may have no training or validation set; the test set is there, for there is nothing to test without it.
    """
    paths = {"training": configs.train_csv, "validation": configs.validation_csv, "test": configs.test_csv}
    return {
        name: (path, configure_table(configs, model_path, path))
        for name, path in paths.items()
        if path or name == "test"
    }


def configure_table(configs: Configs, model_path: str, csv_path: str) -> Configs:
    """Returns the configs to read a table with: the run's own ones are read as the run read them.

    Where another table is given beside them, the image directory and label column that are given are that one's.
    Where none is, they are for all tables: the images may have been moved.

    Args:
        configs: as `find_trained_model` returns them.
        model_path: of the model.
        csv_path: one of the tables in `configs`.
    """
    stored = locate_run_data(model_path)
    own = {os.path.realpath(stored[name]) for name in TABLE_OPTIONS if stored.get(name)}
    used = {os.path.realpath(path) for name in TABLE_OPTIONS if (path := getattr(configs, name))}
    if os.path.realpath(csv_path) not in own or used <= own:
        return configs
    return configs.replace(**{name: stored[name] for name in READING_OPTIONS if name in stored})


def locate_run_data(model_path: str) -> dict[str, Any]:
    """Returns the options of a model's run as `read_run_configs` does, the paths of its data as they are from here."""
    stored = read_run_configs(model_path)
    return locate_data(stored, os.path.dirname(os.path.abspath(model_path)), stored.get("save_model_path", ""))


def list_options(configs: Configs, model_path: str) -> dict[str, Any]:
    """Returns every option as the model's run had it, or as it is given now."""
    stored = read_run_configs(model_path)
    return configs.to_dict() | {name: value for name, value in stored.items() if name not in configs.given}


def check_test_images(model_path: str, test_csv: str, files: Sequence[str], allow_duplicates: bool) -> int:
    """Refuses to test a model on images that its run was trained on or selected by, as `refuse_trained_images` does.

    Where the run has no test table but the one that selected the model, that one may be tested, and is said to be
    optimistic. What was allowed when the run began is allowed still.
    """
    stored = locate_run_data(model_path)
    allow_duplicates = allow_duplicates or stored.get("allow_duplicates", False)
    own_test = stored.get("test_csv") or ""
    has_other = os.path.isfile(own_test) and os.path.realpath(own_test) != os.path.realpath(test_csv)
    may_select = has_selected(model_path, test_csv) and not has_other
    if may_select:
        print(f"{test_csv} also selected the best model: its metrics are optimistic.")
    names = ["training", *["validation"] * (not may_select)]
    folder = os.path.dirname(os.path.abspath(model_path))
    return refuse_trained_images(folder, test_csv, files, names, allow_duplicates)


def has_selected(model_path: str, test_csv: str) -> bool:
    """Tells whether a table selected a run's best model, as the test table did where there was no validation table."""
    stored = locate_run_data(model_path)
    selector = stored.get("validation_csv") or stored.get("test_csv") or ""
    return bool(selector) and os.path.realpath(selector) == os.path.realpath(test_csv)


def read_run_configs(model_path: str) -> dict[str, Any]:
    """Returns the options of a model's run, from the `configs.json` beside it; empty where there is none."""
    path = os.path.join(os.path.dirname(model_path), CONFIGS_FILE)
    return Configs.read_json(path) if os.path.isfile(path) else {}


def take_test_data(configs: Configs, model_path: str) -> Configs:
    """Takes the test set from the `configs.json` beside the model, where the user gives none.

    Returns:
        The configs; their `test_csv` is empty, which is printed with its reason, where there is nothing to compare on.
    """
    stored = read_run_configs(model_path)
    is_given = "test_csv" in configs.given
    configs = take_data_options(configs, model_path)
    reason = ""
    if not configs.test_csv:
        reason = "test_csv is empty"
    elif not is_given and "test_csv" not in stored:
        reason = f"no {os.path.join(os.path.dirname(model_path), CONFIGS_FILE)} names the test set of this model"
    elif not is_given and not os.path.isfile(configs.test_csv):
        reason = f"{configs.test_csv} does not exist"
    if reason:
        print(f"Not compared with the original: {reason}. Give --test_csv to compare on labelled images.")
    return configs.replace(test_csv="") if reason else configs


def take_description(configs: Configs, model_path: str, needs_classes: bool) -> Configs:
    """Takes what describes a model as `find_trained_model` does; no classes where that is not known and not needed."""
    configs = configs.replace(load_model_path=model_path)
    # The data are taken already.
    is_known = {"classes", *NEEDED} <= find_description(model_path).options.keys()
    if needs_classes or is_known or "classes" in configs.given:
        return find_trained_model(configs, ())[1]
    return configs.replace(classes=None)


def keep_decision(model_path: str, decision: dict[str, Any], folder: str) -> dict[str, Any]:
    """Writes a decision into the file of the model that it was fitted for as well, if that carries a description.

    If that fails, it is printed: `decision.json` has the decision, which counts in the run. If scripts write into
    another folder than the model's, the model stays as it is.

    Returns:
        The decision.
    """
    if read_description(model_path) is None or not leads_into(model_path, folder):
        return decision
    try:
        # While train.py replaces the model, the next one may not get this one's decision.
        with locked(os.path.dirname(os.path.abspath(model_path))):
            embed_decision(model_path, decision)
    except UserError as error:
        print(f"{model_path} is without its new decision, which {DECISION_FILE} has: {error}")
    return decision


def find_output_folder(configs: Configs, model_path: str) -> str:
    """Returns the folder for what a script makes of a model: a given `save_model_path`, or else the model's own."""
    is_given = "save_model_path" in configs.given
    return configs.save_model_path if is_given else os.path.dirname(model_path) or os.curdir
