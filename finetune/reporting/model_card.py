"""The model card: what a model is, what it was trained on, and how good it is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from configs import Configs
from finetune.core.files import write_text
from finetune.core.options import UserError
from finetune.core.texts import MOST_LISTED, MOST_TELLING, show
from finetune.data.groups import describe_group_count
from finetune.data.images import PAD_GREY
from finetune.evaluation.decision import DECISION_FILE
from finetune.evaluation.evaluation import find_worst
from finetune.evaluation.intervals import describe_epoch
from finetune.evaluation.novelty import NEIGHBOURS
from finetune.exporting.exports import WEIGHTS
from finetune.models.backbones import BACKBONES, describe_source
from finetune.models.description import LEGACY_DEFAULTS, hash_model
from finetune.models.formats import FORMATS, MODEL_SUFFIXES, show_answering
from finetune.models.safety import list_layer_packages
from finetune.predicting.answers import name_refusals
from finetune.reporting.figures import LOG_METRICS, read_log
from finetune.reporting.summaries import (
    CHOSEN_ON_TEST_SET,
    HEADLINES,
    base_name,
    compile_template,
    list_class_columns,
    list_class_intervals,
    list_headlines,
    list_options,
    list_warnings,
    show_value,
)
from finetune.reporting.unanswered import summarize_rule
from finetune.training.run_folder import (
    BEST_MODEL,
    CARD_FILE,
    COMPRESSION_FILE,
    CONFIGS_FILE,
    DATA_FILE,
    LATEST_MODEL,
    LOG_FILE,
    METRICS_FILE,
    STATISTICS_FILE,
)

PARTS = (DATA_FILE, STATISTICS_FILE, DECISION_FILE, METRICS_FILE, COMPRESSION_FILE)
UNKNOWN_CONTENT = "its content is not as this version writes it"
# What unexpected content of a part raises.
CONTENT_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, jinja2.TemplateError)
# Metrics that Hugging Face's metadata knows: name in metrics.json, and there.
METRIC_TYPES = {"accuracy": "accuracy", "exact_match_accuracy": "accuracy", "macro_f1": "f1", "mean_auroc": "roc_auc"}
PATH_ENDINGS = ("_csv", "_directory", "_path", "visual_model_name")
# The card warns from these on: width of an interval in points, and ratio of the largest class to the smallest.
WIDE_INTERVAL = 5
IMBALANCE = 3
# By heading: options that are always shown, and those that are shown if they differ from their default.
RECIPE: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "Optimizer": (
        ("optimizer_type", "learning_rate"),
        ("fine_tune_learning_rate", "weight_decay", "ema_decay", "adam_beta_2", "adam_epsilon"),
    ),
    "Batches": (("batch_size",), ("gradient_accumulation_steps", "distribution_strategy", "scale_learning_rate")),
    "Schedule": (
        ("learning_rate_schedule",),
        ("warmup_epochs", "early_stopping_patience", "model_selection", "min_steps", "time_budget"),
    ),
    "Loss": (("loss", "use_class_balancing"), ("positive_weights_multiply", "label_smoothing")),
    "Resizing": (("resize_mode",), ()),
    "Augmentation": (("augmentation_strength",), ("random_crop_area", "mixup_alpha", "cutmix_alpha")),
    "Test-time augmentation": (("test_time_augmentation",), ()),
    "Seed": (("random_seed", "deterministic"), ()),
}
# By resize_mode: how a photo is resized, in words and with Pillow.
FITTING = {
    "stretch": ("stretched to that size", "photo.resize(({width}, {height}))"),
    "crop": ("cropped to that shape around the centre, then resized", "ImageOps.fit(photo, ({width}, {height}))"),
    "pad": (
        f"resized to fit that size and centred on grey ({PAD_GREY})",
        f"ImageOps.pad(photo, ({{width}}, {{height}}), color=({PAD_GREY}, {PAD_GREY}, {PAD_GREY}))",
    ),
}
# Runtime and code, as `Format.loading` of an export format.
KERAS_LOADING = (
    "Keras",
    "import keras\n\nmodel = keras.models.load_model({path})\nprobabilities = model.predict(image[None])",
)


def write_model_card(folder: str) -> str:
    """Writes MODEL_CARD.md in Hugging Face's format from the files in a run's folder; atomically.

    Leaves out files of an earlier model, and damaged files, which it names on stdout.

    Source: Mitchell et al., FAT* 2019 (arXiv:1810.03993).

    Args:
        folder: has `configs.json` and, depending on the progress of the run, training_log.csv and the files of `PARTS`.

    Returns:
        The card's path; empty if there is no `configs.json`, and then no card is written.

    Raises:
        UserError: `configs.json` is damaged, or the card cannot be written.
    """
    configs_path, path = os.path.join(folder, CONFIGS_FILE), os.path.join(folder, CARD_FILE)
    if not os.path.isfile(configs_path):
        return ""
    stored = Configs.read_json(configs_path)
    parts = {name: _read_part(os.path.join(folder, name)) for name in PARTS}
    try:
        card = _render(folder, stored, parts)
    except CONTENT_ERRORS:
        parts = {name: part for name, part in parts.items() if part and _is_usable(folder, stored, name, part)}
        card = _render(folder, stored, parts)
    write_text(path, card)
    return path


def _read_part(path: str) -> dict[str, Any]:
    """Returns the JSON object in a file of `PARTS`; empty if there is no file or, printed, no JSON object in it."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if content and isinstance(content, dict):
            return content
        fault: object = UNKNOWN_CONTENT
    except (OSError, ValueError, RecursionError) as error:
        fault = error
    _print_fault(path, fault)
    return {}


def _print_fault(path: str, fault: object) -> None:
    print(f"The model card leaves out {path}: {fault}. Write it again, or delete it.")


def _is_usable(folder: str, stored: dict[str, Any], name: str, part: dict[str, Any]) -> bool:
    """Returns whether a card can be made with this part alone; prints if not."""
    try:
        alone = {name: part} | ({DECISION_FILE: part["decision"]} if name == METRICS_FILE else {})
        _render(folder, stored, alone)
    except CONTENT_ERRORS:
        _print_fault(os.path.join(folder, name), UNKNOWN_CONTENT)
        return False
    return True


def _render(folder: str, stored: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    """Returns the card of stored options and the other files of a run; raises any of `CONTENT_ERRORS`."""
    configs = Configs.defaults() | LEGACY_DEFAULTS | stored
    source = describe_source(configs["visual_model_name"])
    # The folder is one of this machine.
    configs["visual_model_name"] = base_name(configs["visual_model_name"])
    data, stats, decision, results, compression = (parts.get(name) for name in PARTS)
    # test.py writes both; train.py removes the decision before it replaces the model.
    results = results if results and results["decision"] == decision else None
    if results:
        test = results["sets"]["test"]
        # A validation set of the same content selected the model, whatever its name.
        is_same = bool(data) and test.get("sha256") == data["validation"]["sha256"]
        # Older versions of test.py did not write this field.
        test["selected_the_model"] = is_same or test.get("selected_the_model", not configs["validation_csv"])
    template = compile_template("model_card.md", finalize=_escape_markdown, keep_trailing_newline=True)
    artefacts = _list_artefacts(folder, compression) if compression else []
    return template.render(
        configs=configs,
        source=source,
        class_names=configs["classes"] or [],
        most_listed=MOST_LISTED,
        **_describe_fitting(configs),
        **_describe_results(results),
        decision=decision,
        rule=summarize_rule(results, decision),
        data=data,
        **_describe_counts(configs["classes"] or [], data, results),
        recipe=_list_recipe(configs) | _list_progress(folder, configs, stats),
        goes_on=_continues_itself(configs),
        options=[option for option in list_options(stored)["changed"] if option["name"] != "classes"],
        path_endings=PATH_ENDINGS,
        compression=compression,
        artefacts=artefacts,
        loading=_list_loading(folder, results, artefacts),
        answering=_describe_answering(folder, configs["classes"] or [], artefacts),
        limits=_list_limits(configs, data, results, decision),
    )


def _escape_markdown(value: Any) -> Any:
    """Returns a text escaped for Markdown and its tables; anything else, and Markup, unchanged."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    # An underscore between letters has no meaning in Markdown, and reads better without a backslash.
    return re.sub(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", show(value))


def _describe_fitting(configs: dict[str, Any]) -> dict[str, Any]:
    """Returns the size of the model's input and how to resize a photo to it, by the names in the template."""
    height, width = configs.get("eval_image_size") or configs["image_target_size"][:2]
    fitting, code = FITTING[configs["resize_mode"]]
    resizing = Markup(code.format(height=height, width=width))
    return {"fitting": fitting, "resizing": resizing, "height": height, "width": width}


def _describe_results(results: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the content of an evaluation, by the names in the template."""
    known: dict[str, Any] = {"results": results, "chosen_on_test_set": CHOSEN_ON_TEST_SET, "measured": []}
    if not results:
        return known
    test = results["sets"]["test"]
    per_class = test["per_class"]
    found = {name: test[name] for name in METRIC_TYPES if test.get(name) is not None}
    return known | {
        # With a fixed number of digits, since YAML reads 1e-05 as a text.
        "measured": [
            {"type": METRIC_TYPES[name], "title": HEADLINES[name][0], "value": f"{value:.6f}"}
            for name, value in found.items()
        ],
        "headlines": list_headlines(results),
        "columns": list_class_columns(results),
        "class_intervals": list_class_intervals(results),
        "per_class": per_class if len(per_class) <= MOST_LISTED else find_worst(per_class),
    }


def _describe_counts(
    class_names: Sequence[str], data: dict[str, Any] | None, results: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns `counts`, images by set and class, and `counted`, the classes to list: all, or of many the smallest."""
    counts = {name: data[name]["classes"] for name in ("training", "validation")} if data else {}
    if results:
        counts["test"] = {name: row["support"] for name, row in results["sets"]["test"]["per_class"].items()}
    if len(class_names) > MOST_LISTED:
        totals = {name: sum(images.get(name, 0) for images in counts.values()) for name in class_names}
        class_names = sorted(class_names, key=totals.__getitem__)[:MOST_TELLING]
    return {"counts": counts, "counted": class_names}


def _list_recipe(configs: dict[str, Any]) -> dict[str, str]:
    """Returns the training options in words, by heading."""
    pretrained = "ImageNet" if configs["visual_model_name"] in BACKBONES else "its own"
    weights = pretrained if configs["use_imagenet_weights"] else "random"
    start = f"{configs['visual_model_name']} with {weights} weights"
    if configs["load_model_path"] and not _continues_itself(configs):
        start = f"the model {base_name(configs['load_model_path'])}"
    elif configs["head_initialization"] == "linear_probe":
        start += ", its head from a logistic regression on the training images"
    layers, head_epochs = configs["conv_layers_to_train"], configs["head_epochs"]
    parts = {-1: "the whole network", 0: "the head; the backbone is frozen"}
    trained = parts.get(layers, f"the head and the last {layers} convolutions or blocks of the backbone")
    rows = {"Start": start, "Trained": f"the head for {head_epochs} epochs, then " * bool(head_epochs) + trained}
    defaults = Configs.defaults()
    for heading, (always, changed) in RECIPE.items():
        names = [*always, *(name for name in changed if configs[name] != defaults[name])]
        values = {name.replace("_", " "): configs[name] for name in names}
        rows[heading] = "; ".join(
            value if isinstance(value, str) else f"{name} {show_value(value)}" for name, value in values.items()
        )
    return rows


def _continues_itself(configs: dict[str, Any]) -> bool:
    """Returns whether the run was last started from its own checkpoint."""
    path = configs["load_model_path"]
    source = os.path.dirname(path) if path.endswith(MODEL_SUFFIXES) else path
    return bool(path) and os.path.abspath(source) == os.path.abspath(configs["save_model_path"])


def _list_progress(folder: str, configs: dict[str, Any], stats: dict[str, Any] | None) -> dict[str, str]:
    """Returns the epochs and the best metrics of the training, in words by heading; empty without statistics."""
    if not stats:
        return {}
    rows, epoch = {"Epochs": f"{stats['epochs_completed']} of {configs['num_epochs']}"}, stats["best_epoch"]
    if stats["best"] is None or epoch is None:
        return rows
    is_refitted = bool(stats.get("has_refitted_head"))
    place = describe_epoch(epoch, stats.get("kept_share"), is_refitted) + ", the starting weights" * (epoch == 0)
    rows["Best epoch"] = f"{place}: {stats['monitor']} {stats['best']:.4f}"
    if place != str(epoch):
        # The log has no metrics of the starting weights and of averaged weights.
        return rows
    path = os.path.join(folder, LOG_FILE)
    try:
        log = read_log(path) if os.path.isfile(path) else None
    except UserError as error:
        print(f"The model card has no metrics of the best epoch: {error}")
        return rows
    for row in [] if log is None else log[log["epoch"] == epoch].to_dict("records"):
        metrics = {name: value for name, value in row.items() if name.removeprefix("val_") in LOG_METRICS}
        rows["Its metrics"] = "; ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    return rows


def _list_artefacts(folder: str, compression: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the exported files with `name` and `bytes`; none if they belong to another model than the folder's."""
    model = os.path.join(folder, base_name(compression["model"]))
    if os.path.isfile(model):
        digest = hash_model(model)
        if not isinstance(digest, bytes) or digest.hex() != compression["model_sha256"]:
            return []
    return [
        artefact | {"name": base_name(artefact["path"]), "bytes": sum(artefact["files"].values())}
        for artefact in compression["artefacts"]
    ]


def _list_loading(
    folder: str, results: dict[str, Any] | None, artefacts: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns `names`, `runtime` and `code` to load each kind of file that exists and is not rejected."""
    models = [base_name(results["model"])] if results else []
    models += [BEST_MODEL, LATEST_MODEL]
    files = {("keras", False): [name for name in models if os.path.isfile(os.path.join(folder, name))][:1]}
    for artefact in _list_usable(folder, artefacts):
        files.setdefault((artefact["kind"], bool(artefact.get("features"))), []).append(artefact["name"])
    rows = []
    by_kind = {("keras", False): KERAS_LOADING, ("weights", False): WEIGHTS.loading}
    by_kind |= {(name, False): one.loading for name, one in FORMATS.items()}
    by_kind |= {(name, True): (one.loading[0], one.loading_features) for name, one in FORMATS.items()}
    for kind, names in files.items():
        if names and kind in by_kind:
            runtime, code = by_kind[kind]
            if kind[0] == "keras":
                packages = list_layer_packages(os.path.join(folder, names[0]))
                runtime += "".join(f' and {name} (pip install "{package}")' for name, package in packages.items())
                code = "".join(f"import {name}\n" for name in packages) + code
            path, stem = json.dumps(names[0]), json.dumps(os.path.splitext(names[0])[0])
            rows.append({"names": names, "runtime": runtime, "code": Markup(code.format(path=path, stem=stem))})
    return rows


def _list_usable(folder: str, artefacts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the artefacts that exist and are not rejected."""
    return [one for one in artefacts if not one["rejected"] and os.path.exists(os.path.join(folder, one["name"]))]


def _describe_answering(
    folder: str, class_names: Sequence[str], artefacts: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Returns the words for `unsure` and `unknown`, and `code` from features to an answer; None without features."""
    named = [one["name"] for one in _list_usable(folder, artefacts) if one.get("features")]
    if not named:
        return None
    unsure, unknown = refusals = name_refusals(class_names)
    code = show_answering(named[0], refusals, NEIGHBOURS)
    return {"unsure": unsure, "unknown": unknown, "code": Markup(code)}


def _list_limits(
    configs: dict[str, Any],
    data: dict[str, Any] | None,
    results: dict[str, Any] | None,
    decision: dict[str, Any] | None,
) -> list[str]:
    """Returns the limits of the metrics and of the model, in sentences."""
    found = list_warnings(results, configs) if results else ["The model has not been tested yet."]
    test, several = results["sets"]["test"] if results else {}, configs["multi_label_classification"]
    measure = "exact_match_accuracy" if several else "accuracy"
    low, high = test.get("intervals", {}).get(measure) or (0, 0)
    if 100 * (high - low) >= WIDE_INTERVAL:
        title, what = HEADLINES[measure][0], "groups of test images" if "groups" in test else "test images"
        found.append(
            f"The 95 % interval of {title.lower()} is {100 * (high - low):.1f} points wide: there are too few {what}."
        )
    if test.get(measure) == 1:
        # Hanley and Lippman-Hand, JAMA 249:1743, 1983: with none in n, the 95 % confidence interval ends at 3/n.
        groups = test.get("groups")
        share = min(100, 300 / (groups or test["images"]))
        what = f"{test['images']} test images{describe_group_count(groups)}"
        found.append(f"No prediction was wrong on {what}: on other images up to {share:.1f} % may be wrong.")
    counts = data["training"]["classes"] if data else {"": 1}
    least, most = (choose(counts, key=counts.__getitem__) for choose in (min, max))
    if counts[most] >= IMBALANCE * counts[least]:
        found.append(
            f"The classes are imbalanced: {counts[most]} training images of {most}, {counts[least]} of {least}."
        )
    answers = "none, one or several" if several else "one"
    alone = " file alone" * bool(summarize_rule(results, decision))
    return [
        *found,
        f"Whatever an image shows, the model{alone} predicts {answers} of the classes above.",
        "The model was not tested on photos from other cameras, places, times or people.",
        "The licence and the intended use are missing; the author must add them.",
    ]
