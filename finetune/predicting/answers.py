"""The answers of predict.py: a class, unsure or unknown, in the table and as a folder per answer."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from configs import Configs
from finetune.core.files import atomic_path, check_folder
from finetune.core.options import UserError
from finetune.core.texts import show_count, show_progress
from finetune.data.stores import is_url, read_url
from finetune.data.tables import LABEL_SEPARATOR
from finetune.evaluation.abstention import UNKNOWN, UNSURE
from finetune.evaluation.decision import Decision
from finetune.evaluation.shift import describe_excess, find_excess

# Characters that a system or a shell takes for something else in the name of a folder.
SPECIAL = re.compile(r'[\\/:*?"<>|\x00-\x1f]')


class AnswerTable(NamedTuple):
    """What is written about each image.

    Attributes:
        names: the answered class names; `unsure` or `unknown` alone; nothing for an image that could not be read.
        reasons: why an image is not answered, or empty.
        similarities: the mean cosine similarity to the most similar training photos, NaN if unknown.
        number_read: of images that could be read.
    """

    names: list[list[str]]
    reasons: list[str]
    similarities: np.ndarray
    number_read: int


def name_answers(
    decision: Decision,
    calibrated: np.ndarray,
    similarities: np.ndarray,
    failed: Collection[int] = (),
    threshold_type: str = "exact_match",
) -> AnswerTable:
    """Returns the answers in words.

    Args:
        decision: with the rule, if there is one.
        calibrated: probabilities, float32 `(images, classes)`; ignored in the rows of `failed`.
        similarities: `(images,)`, NaN without a reference.
        failed: rows of images that could not be read.
        threshold_type: multi-label: which of its thresholds to use.
    """
    rule = decision.abstention
    found = decision.decide(calibrated, similarities, threshold_type)
    unsure, unknown = name_refusals(decision.class_names)
    class_names, names, reasons = np.asarray(decision.class_names, object), [], []
    for row, labels in enumerate(found.labels):
        answer, reason = class_names[labels].tolist(), ""
        if row in failed:
            answer = []
        elif found.is_unknown[row]:
            answer = [unknown]
            how_far = f"familiarity {found.familiarity[row]:.2f} is below {rule.unknown_threshold:.2f}"
            reason = f"unlike the training photos: {how_far}"
        elif found.is_unsure[row]:
            answer, reason = [unsure], _explain_doubt(decision, calibrated[row], threshold_type)
        names.append(answer)
        reasons.append(reason)
    kept = np.where(np.isin(np.arange(len(names)), [*failed]), np.float32(np.nan), similarities)
    return AnswerTable(names, reasons, kept, len(names) - len(failed))


def name_refusals(class_names: Sequence[str]) -> tuple[str, str]:
    """Returns the words for unsure and unknown; in brackets if a class is called so."""
    return tuple(f"({word})" if word in class_names else word for word in (UNSURE, UNKNOWN))


def _explain_doubt(decision: Decision, probabilities: np.ndarray, threshold_type: str) -> str:
    """Returns why an image is unsure: its most probable label and the threshold it misses."""
    chosen = decision.choose(probabilities[None], threshold_type)[0]
    best = int(np.where(chosen, probabilities, -1).argmax())
    thresholds = decision.abstention.thresholds
    lowest = thresholds[best if len(thresholds) > 1 else 0]
    name, promise = decision.class_names[best], f"an error of {decision.abstention.max_error:g}"
    if lowest is None:
        return f"{promise} cannot be promised" + f" for {name}" * decision.multi_label
    return f"probability {probabilities[best]:.3f} of {name} is below {lowest:.3f}, for {promise}"


def insert_answers(table: pd.DataFrame, answers: AnswerTable, after: str = "probability") -> pd.DataFrame:
    """Returns the table of predictions with the columns `answer`, `reason` and `similarity` after another column."""
    place = table.columns.get_loc(after) + 1
    added = {"answer": [LABEL_SEPARATOR.join(row) for row in answers.names], "reason": answers.reasons}
    added["similarity"] = answers.similarities
    return pd.concat([table.iloc[:, :place], pd.DataFrame(added), table.iloc[:, place:]], axis=1)


def check_rule(decision: Decision, configs: Configs, augmentation: str) -> None:
    """Checks that a given promise is the one that was fitted, and prints if averaging over views may break it.

    Args:
        decision: of the model.
        configs: of predict.py.
        augmentation: how predict.py averages over views of an image.

    Raises:
        UserError: a given `max_error` or `unknown_rate` is not that of the decision.
    """
    rule = decision.abstention
    for name in ("max_error", "unknown_rate"):
        fitted, given = getattr(rule, name, 0.0), getattr(configs, name)
        if name in configs.given and given != fitted:
            raise UserError(
                f"{name}: expected {fitted:g}, for which the model's decision was fitted. Received: {given:g}. Leave "
                f"it out, or run test.py --{name} {given:g} first."
            )
    if rule is not None and rule.max_error and augmentation != "none":
        print(f"The error of {rule.max_error:g} is not promised with test_time_augmentation {augmentation}.")


def summarize_answers(answers: AnswerTable, decision: Decision) -> None:
    """Prints how many images are answered, and a warning if too few are for images like the validation images."""
    rule = decision.abstention
    if rule is None:
        return
    unsure, unknown = name_refusals(decision.class_names)
    numbers = {word: sum(row == [word] for row in answers.names) for word in (unsure, unknown)}
    print(f"Of these, {numbers[unsure]} are {unsure} and {numbers[unknown]} {unknown} (column answer).")
    for excess in find_excess(rule, numbers[unknown], numbers[unsure], answers.number_read):
        print(describe_excess(excess, bool(rule.max_error)))


def check_sort_into(folder: str, given: str) -> None:
    """Raises UserError if photos cannot be sorted into a folder; called before any work.

    Args:
        folder: to be made; an empty one may exist. Empty text sorts nothing.
        given: the option `input`.
    """
    if not folder:
        return
    if os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"sort_into: expected a new or an empty folder. Received: {folder}, which holds files.")
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"sort_into: expected a folder. Received: {folder}, which is a file.")
    inside = os.path.join(os.path.realpath(given), "")
    if os.path.isdir(given) and os.path.join(os.path.realpath(folder), "").startswith(inside):
        raise UserError(f"sort_into: {folder} is in the input folder {given}. Choose a folder outside.")
    check_folder(os.path.dirname(os.path.abspath(folder)), "sort_into")


def sort_photos(folder: str, paths: Sequence[str], answers: Sequence[Sequence[str]], links: bool) -> int:
    """Copies or links photos into a folder per answer; the folder is complete or does not exist.

    Args:
        folder: as `check_sort_into` accepts it.
        paths: of the photos, or URLs.
        answers: of each photo, any number of them: a photo of two labels is in two folders.
        links: symbolic links instead of copies; photos with a URL are always copied.

    Returns:
        The number of sorted photos; 0 without a folder.

    Raises:
        UserError: a file cannot be read or written.
    """
    if not folder:
        return 0
    names, folders = name_copies(paths), name_folders(sorted({name for names in answers for name in names}))
    with atomic_path(folder) as temporary, show_progress(len(paths), "Sorting", delay=1) as progress:
        os.makedirs(temporary)
        for path, name, chosen in zip(paths, names, answers, strict=True):
            for answer in chosen:
                _place(path, os.path.join(temporary, folders[answer], name), links)
            progress.update(1)
    number = sum(bool(chosen) for chosen in answers)
    print(f"Sorted {show_count(number, 'photo')} into {folder}")
    return number


def _place(path: str, place: str, links: bool) -> None:
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if is_url(path):
            with open(place, "wb") as file:
                file.write(read_url(path))
        elif links:
            os.symlink(os.path.abspath(path), place)
        else:
            shutil.copyfile(path, place)
    except OSError as error:
        reason = f"{error.strerror}. Check it and the space on the disk, or choose another folder."
        raise UserError(f"sort_into: cannot copy {path}: {reason}") from error


def name_copies(paths: Sequence[str]) -> list[str]:
    """Returns a different relative path for each photo: its own below the folder that all have in common."""
    plain = [os.path.basename(path.split("?")[0]) if is_url(path) else os.path.abspath(path) for path in paths]
    parents = [os.path.dirname(path) for path in plain if os.path.isabs(path)]
    try:
        root = os.path.commonpath(parents) if parents else ""
    except ValueError:
        # On two drives.
        root = ""
    taken, names = set(), []
    for path in plain:
        name = os.path.relpath(path, root) if root and os.path.isabs(path) else os.path.basename(path)
        stem, suffix = os.path.splitext(name or "photo")
        number = 1
        while name in taken or not name:
            number += 1
            name = f"{stem} {number}{suffix}"
        taken.add(name)
        names.append(name)
    return names


def name_folders(answers: Sequence[str]) -> dict[str, str]:
    """Returns a different folder name for each answer, with which no system has difficulties."""
    folders: dict[str, str] = {}
    for answer in answers:
        plain = SPECIAL.sub("_", answer).strip(" .") or "_"
        name, number = plain, 1
        while name.casefold() in {taken.casefold() for taken in folders.values()}:
            number += 1
            name = f"{plain} {number}"
        folders[answer] = name
    return folders
