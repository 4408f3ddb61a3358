"""Input and output of predict.py: lists of images, and the table of answers."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from finetune.core.files import IMAGE_SUFFIXES, check_file_name, check_folder, list_visible, report_closed
from finetune.core.options import UserError
from finetune.core.texts import join_names, show_count
from finetune.data.stores import explain_missing, find_meant, is_url, join_path
from finetune.data.tables import IMAGE_COLUMN, LABEL_SEPARATOR, read_table
from finetune.evaluation.decision import Decision


def list_inputs(
    given: str, image_directory: str = "", report: Callable[[str], object] = print
) -> tuple[list[str], list[str]]:
    """Lists the images that the option `input` means. They are not decoded here.

    Args:
        given: an image or its URL; a folder, for all files below it with the suffix of an image; a quoted pattern, for
            all files that match; or a CSV file with the column `path`. Hidden files must be named.
        image_directory: put in front of the paths in a CSV file.
        report: receives messages about files that are left out.

    Returns:
        The images as the output names them, and their paths: sorted, or in the order of the CSV file.

    Raises:
        UserError: there is no such file, it lists no image, or a file name is not UTF-8.
    """
    if os.path.isfile(given) and given.lower().endswith(".csv"):
        names = read_table(given, IMAGE_COLUMN)[IMAGE_COLUMN].tolist()
        return names, [join_path(image_directory, name) for name in names]
    if os.path.isdir(given):
        names = list_folder(given, report)
    elif os.path.isfile(given) or is_url(given):
        names = [given]
    elif glob.has_magic(given):
        names = sorted(path for path in match_pattern(given) if os.path.isfile(path))
    else:
        meant = find_meant(given)
        raise UserError(
            f"input: expected an image, a folder, a pattern in quotes, or a CSV file with a column '{IMAGE_COLUMN}'. "
            f"Received: {given!r}, and there is no such file." + f" There is {meant}: write that." * bool(meant)
        )
    if not names:
        raise UserError(f"input: no file matches the pattern {given}. Check it, and put it in quotes.")
    for name in names:
        check_file_name(name)
    return names, names


def prefer_existing(
    paths: Sequence[str], names: Sequence[str], report: Callable[[str], object] = print
) -> Sequence[str]:
    """Returns `paths`, in the run's image directory; or `names` if the first image exists only there."""
    if is_url(paths[0]) or os.path.isfile(paths[0]) or not os.path.isfile(names[0]):
        return paths
    report("The images are not in the run's image_directory: reading their paths from the current folder instead.")
    return names


def match_pattern(pattern: str) -> set[str]:
    """Returns the paths that match a pattern, as `glob` does, except that `**` enters each linked folder once."""
    separators = re.escape(os.sep + (os.altsep or ""))
    parts = re.split(rf"(?<![^{separators}])\*\*(?:[{separators}]+|$)", pattern, maxsplit=1)
    if len(parts) == 1:
        return {*glob.glob(pattern)}
    found = set()
    for start in glob.glob(parts[0]) if parts[0] else [""]:
        below = list_visible(start or os.curdir)
        beginning = 0 if start else len(os.path.join(os.curdir, ""))
        if not parts[1]:
            found |= {path[beginning:] for path in below.files}
            continue
        for folder in below.folders:
            found |= match_pattern(glob.escape(os.path.join(folder, "")[beginning:]) + parts[1])
    return found


def list_folder(folder: str, report: Callable[[str], object]) -> list[str]:
    """Returns the files below a folder with the suffix of an image, sorted; reports the others unless hidden.

    Raises:
        UserError: there is none.
    """
    files, closed, _ = list_visible(os.path.normpath(folder))
    # A broken link with the suffix of an image gets a row with the error.
    images = sorted(path for path in files + closed if path.lower().endswith(IMAGE_SUFFIXES))
    if not images:
        raise UserError(f"input: the folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    if others := [path for path in files if not path.lower().endswith(IMAGE_SUFFIXES)]:
        report(f"Left out {show_count(len(others), 'file')} without an image's ending: {join_names(others)}")
    report_closed([path for path in closed if not path.lower().endswith(IMAGE_SUFFIXES)], report)
    return images


def explain_errors(errors: dict[int, str], paths: Sequence[str]) -> dict[int, str]:
    """Adds to the errors of missing files, by their rows, which existing file the path may mean."""
    reasons = explain_missing(paths[row] for row in errors if not os.path.exists(paths[row]))
    return {
        row: f"{error} It {reasons[paths[row]]}." if paths[row] in reasons else error for row, error in errors.items()
    }


def check_write_path(write_path: str, given: str) -> None:
    """Raises UserError if the output cannot be written or would replace the input; called before any work."""
    if os.path.isdir(write_path) or not write_path or write_path.lower().endswith(IMAGE_SUFFIXES):
        raise UserError(f"write_path: expected the name of a CSV file. Received: {write_path!r}")
    if os.path.isfile(write_path) and os.path.isfile(given) and os.path.samefile(write_path, given):
        raise UserError(f"write_path: {write_path} is the input itself. Choose another file.")
    check_folder(os.path.dirname(write_path) or os.curdir, "write_path")


def check_top_k(top_k: int, class_names: Sequence[str]) -> None:
    """Raises UserError if `top_k` exceeds the number of classes."""
    if top_k > len(class_names):
        raise UserError(f"top_k: expected at most {len(class_names)}, the model's number of classes. Received: {top_k}")


def describe_decision(decision: Decision, threshold_type: str) -> str:
    """Returns one line about the probabilities and, multi-label, one about the thresholds."""
    lines = ["Probabilities: the model's own; test.py calibrates them if there is a validation set"]
    if decision.temperature_fitted_on:
        lines = [
            f"Probabilities: calibrated with temperature {decision.temperature:.2f}, "
            f"fitted on the {decision.temperature_fitted_on} set"
        ]
    if decision.multi_label:
        thresholds = sorted({f"{threshold:.2f}" for threshold in decision.thresholds(threshold_type)})
        fitted = "not fitted: run test.py first"
        if decision.thresholds_fitted_on:
            fitted = f"{threshold_type}, fitted on the {decision.thresholds_fitted_on} set"
        lines.append(f"Thresholds: {' to '.join(dict.fromkeys((thresholds[0], thresholds[-1])))} ({fitted})")
    return "\n".join(lines)


def make_table(
    names: Sequence[str],
    raw_probabilities: np.ndarray,
    errors: dict[int, str],
    decision: Decision,
    threshold_type: str = "exact_match",
    top_k: int = 0,
) -> pd.DataFrame:
    """Returns the table of predictions, one row per image.

    Args:
        raw_probabilities: the model's own, float32 `(images, classes)`; ignored in the rows of `errors`.
        errors: by row, why an image could not be read.
        threshold_type: multi-label: which of its thresholds to use.
        top_k: adds columns for that many most probable classes.

    Returns:
        The columns `path`; `predicted`, a class name (multi-label: any number of them, joined by `$`); `probability`,
        of that class (multi-label: the lowest of the predicted ones); `top_1`, `top_1_probability` and so on;
        `probability_<class>`, calibrated, in `[0, 1]`; `error`, in one line. With an error, all but `path` are empty.
    """
    class_names, failed = np.asarray(decision.class_names, dtype=object), sorted(errors)
    probabilities = decision.calibrate(raw_probabilities).copy()
    chosen = decision.choose(probabilities, threshold_type)
    chosen[failed] = False
    probabilities[failed] = np.nan
    lowest = probabilities.min(axis=1, where=chosen, initial=np.inf)
    columns = {
        IMAGE_COLUMN: names,
        "predicted": [LABEL_SEPARATOR.join(class_names[row]) for row in chosen],
        "probability": np.where(chosen.any(axis=1), lowest, np.float32(np.nan)),
    }
    for rank, positions in enumerate(find_top_classes(probabilities, top_k).T, start=1):
        columns[f"top_{rank}"] = np.where(np.isnan(probabilities[:, 0]), "", class_names[positions])
        columns[f"top_{rank}_probability"] = probabilities[np.arange(len(names)), positions]
    by_class = pd.DataFrame(probabilities, columns=[f"probability_{name}" for name in decision.class_names])
    error = pd.Series([" ".join(errors.get(row, "").split()) for row in range(len(names))], name="error")
    return pd.concat([pd.DataFrame(columns), by_class, error], axis=1)


def find_top_classes(probabilities: np.ndarray, top_k: int) -> np.ndarray:
    """Returns the positions of each row's `top_k` highest values, the highest first; int `(images, top_k)`."""
    parts = np.array_split(probabilities, len(probabilities) // 10_000 + 1)
    return np.concatenate([np.argsort(-part, axis=1, kind="stable")[:, :top_k] for part in parts])


def summarize(write_path: str, number: int, errors: dict[int, str]) -> None:
    """Prints how many images were predicted; raises UserError if none could be read."""
    if len(errors) == number:
        none_could = "The image could not" if number == 1 else f"None of the {number} images could"
        raise UserError(f"{none_could} be read; {write_path} says why. {errors[min(errors)]}")
    print(f"Predicted {number - len(errors)} of {show_count(number, 'image')}; wrote {write_path}")
    if errors:
        print(f"{len(errors)} of {number} images could not be read: the column error of {write_path} says why")
