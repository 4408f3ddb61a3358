"""Finding a trained model, and from its run its description and its tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from configs import Configs
from finetune.core.options import UserError
from finetune.data.stores import is_url
from finetune.data.tables import resolve_class_names
from finetune.evaluation.decision import DECISION_FILE
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
from finetune.training.run_folder import (
    BEST_MODEL,
    DATA_OPTIONS,
    LATEST_MODEL,
    READING_OPTIONS,
    TABLE_OPTIONS,
    disown_paths,
    gives_other_tables,
    leads_into,
    locate_data,
    locked,
    refuse_trained_images,
)

# Tables that test.py does not need.
OPTIONAL_TABLES = {"train_csv": "a training set", "validation_csv": "a validation set"}


def resolve_model_path(path: str, preferred: Sequence[str] = (BEST_MODEL, LATEST_MODEL)) -> str:
    """Returns the existing model file that a path leads to; prints it if the file has another suffix.

    Args:
        path: a model file, or a run's folder.
        preferred: names of files in a run's folder, the first choice first.

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
        raise UserError(f"The folder {path} has no model. Expected {' or '.join(preferred)}. Train first.")
    stem, suffix = os.path.splitext(path)
    for other in MODEL_SUFFIXES:
        if suffix in MODEL_SUFFIXES and os.path.isfile(stem + other):
            print(f"{path} does not exist: using {stem + other} instead.")
            return stem + other
    raise UserError(
        f"There is no model at {path}. Expected a .keras, .h5 or .hdf5 file, or the folder of a run. "
        "Train first, or name another by --load_model_path."
    )


def find_trained_model(configs: Configs, data_options: Sequence[str] = DATA_OPTIONS) -> tuple[str, Configs]:
    """Finds the trained model that configs lead to, and completes the configs from its files.

    Args:
        configs: `load_model_path`, or if empty `save_model_path`, leads to the model.
        data_options: the options of `DATA_OPTIONS` that the script uses.

    Returns:
        The model file, and `configs` with the model's description, and with the run's tables, image directory and
        label column unless given. Classes that are neither stored nor given come from a given training CSV, and do not
        count as given. `save_model_path` becomes the model's folder, unless given: results belong to the run.

    Raises:
        UserError: there is no model, a given option contradicts it, or its description is neither stored nor given.
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
    """Empties the default paths of the training and validation table: they need not be this model's."""
    for name, words in OPTIONAL_TABLES.items():
        if name in names and name not in configs.given and getattr(configs, name):
            print(f"No {CONFIGS_FILE} says which {name} is this model's, and it is not given: going without {words}.")
            configs = configs.replace(**{name: ""})
    return configs


def name_model(configs: Configs, model_path: str) -> str:
    """Returns the line that names a model and the source of its class names, given `find_trained_model`'s results."""
    options, sources = find_description(model_path)
    given = "--classes" if "classes" in configs.given else f"--train_csv {configs.train_csv}"
    source = f"its {sources['classes']}" if "classes" in sources else given
    line = f"Model: {model_path} (class names from {source})"
    if options.keys() <= {"classes"}:
        line += "\nNo file says how it takes images: it gets RGB from 0 to 255, and must contain its preprocessing."
    return line


def take_data_options(configs: Configs, model_path: str, names: Sequence[str] = DATA_OPTIONS) -> Configs:
    """Takes the tables, image directory and label column, unless given, from a model's run; prints what changes.

    A training or validation table that no longer exists is left out: metrics of the test set need none.
    """
    configs, stored = disown_paths(configs, model_path), locate_run_data(model_path)
    taken = {name: stored[name] for name in names if name in stored and name not in configs.given}
    if not read_run_configs(model_path).get("image_directory") and gives_other_tables(configs, stored):
        # The paths in a given table start here, not where the run was started.
        taken.pop("image_directory", None)
    for name, words in OPTIONAL_TABLES.items():
        if (path := taken.get(name, "")) and not is_url(path) and not os.path.isfile(path):
            print(f"{name} of the run, {path}, does not exist: going without {words}.")
            configs = configs.replace(**{name: ""})
            del taken[name]
    for name, value in taken.items():
        if value != getattr(configs, name):
            print(f"{name} comes from the run: {value or 'empty'}")
    return configs.replace(**taken)


def list_tables(configs: Configs, model_path: str) -> dict[str, tuple[str, Configs]]:
    """Returns the CSV file of the `training`, `validation` and `test` set, each with the configs to read it.

    The training and the validation set may be missing.
    """
    paths = {"training": configs.train_csv, "validation": configs.validation_csv, "test": configs.test_csv}
    return {
        name: (path, configure_table(configs, model_path, path))
        for name, path in paths.items()
        if path or name == "test"
    }


def configure_table(configs: Configs, model_path: str, csv_path: str) -> Configs:
    """Returns the configs to read a table with.

    If another table than the run's own is given, a given image directory and label column belong to that one, and the
    run's own tables are read as the run read them. Otherwise they apply to all tables: the images may have been moved.

    Args:
        configs: from `find_trained_model`.
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
    """Returns the options of a model's run as `read_run_configs` does, with the paths of its data valid from here."""
    stored = read_run_configs(model_path)
    return locate_data(stored, os.path.dirname(os.path.abspath(model_path)), stored.get("save_model_path", ""))


def list_options(configs: Configs, model_path: str) -> dict[str, Any]:
    """Returns every option as the model's run had it, or as it is given now."""
    stored = read_run_configs(model_path)
    return configs.to_dict() | {name: value for name, value in stored.items() if name not in configs.given}


def check_test_images(model_path: str, test_csv: str, files: Sequence[str], allow_duplicates: bool) -> int:
    """Refuses to test a model on images that its run was trained on or selected by, as `refuse_trained_images` does.

    If the table that selected the model is its run's only test table, it may be tested, with a note that its metrics
    are optimistic. Duplicates that the run allowed are still allowed.
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
    """Returns whether a table selected a run's best model: its validation table, or without one its test table."""
    stored = locate_run_data(model_path)
    selector = stored.get("validation_csv") or stored.get("test_csv") or ""
    return bool(selector) and os.path.realpath(selector) == os.path.realpath(test_csv)


def read_run_configs(model_path: str) -> dict[str, Any]:
    """Returns the options of a model's run, from the `configs.json` in its folder; empty without one."""
    path = os.path.join(os.path.dirname(model_path), CONFIGS_FILE)
    return Configs.read_json(path) if os.path.isfile(path) else {}


def take_test_data(configs: Configs, model_path: str) -> Configs:
    """Takes the test set of a model's run unless given; empties `test_csv`, and prints why, if there is none."""
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
    """Takes a model's description as `find_trained_model` does; without classes if unknown and not needed."""
    configs = configs.replace(load_model_path=model_path)
    is_known = {"classes", *NEEDED} <= find_description(model_path).options.keys()
    if needs_classes or is_known or "classes" in configs.given:
        return find_trained_model(configs, ())[1]
    return configs.replace(classes=None)


def keep_decision(model_path: str, decision: dict[str, Any], folder: str) -> dict[str, Any]:
    """Writes a decision also into the file of its model, if that has a description and is in the output folder.

    If that fails, it is printed: `decision.json` has the decision, which counts in the run.

    Returns:
        The decision.
    """
    if read_description(model_path) is None or not leads_into(model_path, folder):
        return decision
    try:
        # train.py may be replacing the model: the next one must not get this one's decision.
        with locked(os.path.dirname(os.path.abspath(model_path))):
            embed_decision(model_path, decision)
    except UserError as error:
        print(f"{model_path} lacks its new decision, which is in {DECISION_FILE}: {error}")
    return decision


def find_output_folder(configs: Configs, model_path: str) -> str:
    """Returns the folder for the results of a script on a model: a given `save_model_path`, else the model's own."""
    is_given = "save_model_path" in configs.given
    return configs.save_model_path if is_given else os.path.dirname(model_path) or os.curdir
