"""The content that the report and the model card share: headline metrics, classes, options and warnings."""

from __future__ import annotations

import base64
import functools
import hashlib
import ntpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from configs import Configs
from finetune.core.texts import MOST_LISTED, MOST_TELLING, join_names, show
from finetune.data.groups import describe_leak, describe_shared

TEMPLATES = Path(__file__).parent / "templates"
# By name in metrics.json: title, whether it is shown in per cent, meaning.
HEADLINES = {
    "accuracy": ("Accuracy", True, "Images whose most probable class is right"),
    "balanced_accuracy": ("Balanced accuracy", True, "Mean recall of the classes: a rare class counts like any other"),
    "mean_auroc": ("Mean AUROC", False, "Probability that an image with a label scores above one without it"),
    "mean_average_precision": ("Mean average precision", False, "Area under the precision-recall curve"),
    "exact_match_accuracy": ("Exact match", True, "Images with exactly the right labels"),
    "hamming_loss": ("Hamming loss", False, "Share of wrong labels over all images and classes; lower is better"),
    "macro_f1": ("Macro F1", False, "Mean F1 of the classes"),
    "top_5_accuracy": ("Top-5 accuracy", True, "Images whose class is among the five most probable"),
}
CALIBRATION_HEADLINE = ("Calibration error", False, "Mean gap between probability and accuracy; lower is better")
CLASS_COLUMNS = {
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "support": "Images",
    "groups": "Groups",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "best_f1_threshold": "Best-F1 threshold",
    "f1_at_best_f1_threshold": "F1 at this threshold",
}
CHOSEN_ON_TEST_SET = (
    "There was no validation set, so the best epoch was selected on the test set: the metrics are optimistic. "
    "Train with validation_csv for unbiased ones."
)
FEW_IMAGES = 10
FEW_GROUPS = 10


def read_template(name: str) -> str:
    """Returns the text of a file of `templates/`."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


@functools.cache
def compile_template(name: str, **options: Any) -> jinja2.Template:
    """Returns a template of `templates/`; the options are those of jinja2, such as its escaping."""
    options |= {"loader": jinja2.FunctionLoader(read_template), "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **options)
    environment.filters |= {
        "fixed": format_fixed,
        "percent": format_percent,
        "yaml": quote_yaml,
        "base_name": base_name,
        "first_names": join_names,
    }
    return environment.get_template(name)


def render_page(name: str, styles: Sequence[str], **content: Any) -> str:
    """Renders `NAME.html` with `NAME.js` and styles inside. The page's policy allows no other script and no loading."""
    script = read_template(f"{name}.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return compile_template(f"{name}.html", autoescape=True, finalize=show_all_text).render(
        style=Markup("".join(read_template(f"{style}.css") for style in styles)),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        **content,
    )


def show_all_text(value: Any) -> Any:
    return show(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def format_fixed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def format_percent(value: float | None) -> str:
    # With a non-breaking space.
    return "undefined" if value is None else f"{100 * value:.1f}\u00a0%"


def base_name(path: str) -> str:
    """Returns the last part of a path of any system. The card shows no folders of its author's computer."""
    return ntpath.basename(path.rstrip("/\\"))


def quote_yaml(text: str) -> Markup:
    # YAML has Python's escapes.
    return Markup('"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"')


def list_warnings(results: dict[str, Any], configs: dict[str, Any]) -> list[str]:
    """Returns the reasons to doubt the metrics, in sentences.

    Args:
        results: the content of metrics.json.
        configs: every option of the run by name.
    """
    test, decision = results["sets"]["test"], results["decision"]
    found = []
    # Older versions of test.py did not write this field.
    if test.get("selected_the_model", not configs.get("validation_csv")):
        found.append(CHOSEN_ON_TEST_SET)
    if trained_on := test.get("images_trained_on"):
        found.append(
            f"The model was trained on {trained_on} of the {test['images']} test images, or selected on them: the "
            "metrics are too good."
        )
    if sentence := describe_leak(test):
        found.append(sentence)
    if decision["temperature_fitted_on"] is None:
        found.append("Without a validation set no temperature was fitted: the probabilities are uncalibrated.")
    if results["multi_label"] and decision["thresholds_fitted_on"] == "training":
        found.append("The thresholds were fitted on the training set, where the model is overconfident.")
    elif results["multi_label"] and decision["thresholds_fitted_on"] is None:
        found.append("No thresholds were fitted.")
    found += _list_warnings_of_groups(test)
    found += filter(None, (describe_shared(name, results["sets"].get(name, {})) for name in ("test", "validation")))
    supports = {name: row["support"] for name, row in test["per_class"].items()}
    faults = {
        "No metrics for classes without test images": [name for name, support in supports.items() if not support],
        f"Metrics are imprecise for classes with fewer than {FEW_IMAGES} test images": [
            name for name, support in supports.items() if 0 < support < FEW_IMAGES
        ],
        "The mean leaves out classes with an undefined AUROC": [
            name for name, row in test["per_class"].items() if "auroc" in row and row["auroc"] is None
        ],
    }
    longest = MOST_LISTED if len(supports) <= MOST_LISTED else MOST_TELLING
    return found + [f"{fault}: {join_names(names, longest)}." for fault, names in faults.items() if names]


def _list_warnings_of_groups(test: dict[str, Any]) -> list[str]:
    number = test.get("groups")
    if number is None:
        return []
    if number == 1:
        return ["All test images are one group, so the variation between groups is unknown."]
    if number < FEW_GROUPS:
        return [f"The test images are in only {number} groups, so the intervals are imprecise and often too narrow."]
    names = [
        name for name, row in test["per_class"].items() if row["groups"] < FEW_GROUPS and row["support"] >= FEW_IMAGES
    ]
    longest = MOST_LISTED if len(test["per_class"]) <= MOST_LISTED else MOST_TELLING
    what = f"Metrics are imprecise for classes whose test images are in fewer than {FEW_GROUPS} groups"
    return [f"{what}: {join_names(names, longest)}."] if names else []


def list_headlines(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the headline metrics: title, meaning, values by set, and the test set's interval or None."""
    sets = results["sets"]
    intervals = sets["test"].get("intervals", {})
    rows = [
        (*HEADLINES[name], {key: metrics.get(name) for key, metrics in sets.items()}, intervals.get(name))
        for name in HEADLINES
        if name in sets["test"]
    ]
    errors = {key: metrics["calibration"]["expected_calibration_error"] for key, metrics in sets.items()}
    rows.append((*CALIBRATION_HEADLINE, errors, intervals.get("expected_calibration_error")))
    return [
        {
            "title": title,
            "meaning": meaning,
            "format": format_percent if is_share else format_fixed,
            "values": values,
            "interval": interval if interval and None not in interval else None,
        }
        for title, is_share, meaning, values, interval in rows
    ]


def list_class_columns(results: dict[str, Any]) -> dict[str, str]:
    """Returns the columns of the per-class table: titles by name."""
    row = next(iter(results["sets"]["test"]["per_class"].values()))
    return {name: title for name, title in CLASS_COLUMNS.items() if name in row}


def list_class_intervals(results: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Returns the intervals that are defined, by class and column."""
    per_class = results["sets"]["test"].get("intervals", {}).get("per_class") or {}
    return {
        name: {column: interval for column, interval in row.items() if interval and None not in interval}
        for name, row in per_class.items()
    }


def list_options(configs: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Returns name, value, default and description of the options, in the groups `changed` and `default`."""
    options, defaults = Configs.options(), Configs.defaults()
    groups = {"changed": [], "default": []}
    for name, value in configs.items():
        known = name in defaults
        is_default = known and show_value(value) == show_value(defaults[name])
        groups["default" if is_default else "changed"].append(
            {
                "name": name,
                "value": show_value(value, MOST_LISTED),
                "default": show_value(defaults[name]) if known else "",
                "description": options[name].metadata["description"] if known else "",
            }
        )
    return groups


def show_value(value: Any, most: int | None = None) -> str:
    """Returns a value as text; of a list of more than `most` items, the first ones and where to find all."""
    if isinstance(value, list | tuple):
        items = [show_value(item) for item in value]
        is_long = most is not None and len(items) > most
        return f"{join_names(items)}: all are in configs.json" if is_long else ", ".join(items)
    return {None: "none", "": "empty"}.get(value) or str(value)
