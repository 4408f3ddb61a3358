"""Fitting the rule of abstention on a run's validation set, and testing it on the test set."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, NamedTuple

import numpy as np

from configs import Configs
from finetune.core.options import UserError
from finetune.core.texts import join_names, show_count
from finetune.data.tables import IMAGE_COLUMN
from finetune.evaluation.abstention import (
    Abstention,
    Evidence,
    Wishes,
    answer_evidence,
    describe_shortage,
    fit_abstention,
    list_promises,
    measure_answers,
    trace_risk,
)
from finetune.evaluation.decision import Decision
from finetune.evaluation.evaluation import Answers
from finetune.evaluation.metrics import thin_curve
from finetune.evaluation.novelty import Neighbours, Reference, find_reference, name_model_digest
from finetune.models.formats import is_exported
from generator import AugmentedImageSequence

# Nearest training photos that the report shows of a photo.
SHOWN_NEIGHBOURS = 3
NOT_COMPARED = "not counted, because the test images were not compared with the training images"


class Sets(NamedTuple):
    """The sets of a run after prediction, by name.

    Attributes:
        sequences: of the images.
        predictions: raw probabilities, float32 `(images, classes)`.
        features: of length 1, float16 `(images, channels)`; None if the model gives none.
    """

    sequences: dict[str, AugmentedImageSequence]
    predictions: dict[str, np.ndarray]
    features: dict[str, np.ndarray | None]

    @property
    def truths(self) -> dict[str, np.ndarray]:
        """The labels of the images that could be read, by set."""
        return {name: sequence.get_y_true() for name, sequence in self.sequences.items()}


class Nearest(NamedTuple):
    """A training photo that is similar to an image.

    Attributes:
        path: of the file; the name in the table if that is not the one of the training set.
        label: as in the table.
        similarity: cosine of the features.
    """

    path: str
    label: str
    similarity: float


def check_wishes(configs: Configs, model_path: str) -> None:
    """Raises UserError if a promise is asked for that cannot be fitted; called before prediction."""
    if not configs.max_error or is_exported(model_path):
        return
    if not configs.validation_csv:
        raise UserError(
            f"max_error {configs.max_error:g}: expected a validation set, on which the promise is fitted. Received: no "
            "validation_csv. Give one, or leave out max_error."
        )


def build_reference(sets: Sets, model_path: str, decision: Decision, configs: Configs) -> Reference | None:
    """Returns the reference of the training set; None, which is printed, if the model gives no features.

    Without a training set the stored one is used. An exported model keeps its own, as it keeps its decision.
    """
    if is_exported(model_path):
        gives_features = sets.features["test"] is not None
        return find_reference(os.path.dirname(model_path), model_path, decision.calls_unknown, gives_features)
    training, gives_features = sets.sequences.get("training"), sets.features["test"] is not None
    if training is None or not gives_features:
        needed = decision.calls_unknown or bool(configs.unknown_rate and gives_features)
        return find_reference(configs.save_model_path, model_path, needed, gives_features)
    features = sets.features["training"]
    table = training.get_read_table()
    names, labels = (table[column].tolist() for column in (IMAGE_COLUMN, configs.csv_label_column))
    return Reference.choose(features, names, labels, name_model_digest(model_path), configs.random_seed or 0)


def store_reference(folder: str, reference: Reference | None, model_path: str) -> None:
    """Writes a reference next to the decision that needs it; an exported model keeps its own."""
    if reference is not None and not is_exported(model_path):
        reference.write(folder)


def list_evidence(
    sets: Sets, decision: Decision, reference: Reference | None
) -> tuple[dict[str, Evidence], Neighbours | None]:
    """Returns the validation and the test photos as evidence, and the nearest training photos of the test photos."""
    found, neighbours = {}, None
    for name in ("validation", "test"):
        if name not in sets.sequences:
            continue
        sequence, calibrated = sets.sequences[name], decision.calibrate(sets.predictions[name])
        similarities = None
        if reference is not None and sets.features[name] is not None:
            neighbours = reference.find_neighbours(sets.features[name])
            similarities = neighbours.similarities.mean(axis=1)
        facts = sequence.get_y_true(), calibrated, decision.choose(calibrated), similarities
        found[name] = Evidence(*facts, sequence.get_read_groups())
    return found, neighbours


def collect_answers(sequence: AugmentedImageSequence, evidence: Evidence, decision: Decision) -> Answers:
    """Returns the model's answers for the images of a sequence, from its evidence."""
    facts = sequence.get_read_paths(), evidence.y_true, evidence.calibrated, decision
    return Answers(*facts, evidence.similarities)


def list_nearest(sets: Sets, neighbours: Neighbours | None, reference: Reference | None) -> list[list[Nearest]] | None:
    """Returns the most similar training photos of each test photo, the nearest first; None without a reference.

    Args:
        neighbours: of the test photos, from `list_evidence`.
    """
    if neighbours is None or reference is None:
        return None
    files, training = {}, sets.sequences.get("training")
    if training is not None:
        # A name in the table has one file.
        files = dict(zip(training.table[IMAGE_COLUMN], training.paths, strict=True))
    found = []
    for row, values in zip(neighbours.positions.tolist(), neighbours.similarities.tolist(), strict=True):
        pairs = list(zip(row, values, strict=True))[:SHOWN_NEIGHBOURS]
        names = [(reference.paths[place], reference.labels[place], value) for place, value in pairs]
        found.append([Nearest(str(files.get(name, name)), label, value) for name, label, value in names])
    return found


def add_abstention(decision: Decision, evidence: dict[str, Evidence], configs: Configs, model_path: str) -> Decision:
    """Returns the decision with the rule fitted on the validation set; an exported model keeps its own."""
    if is_exported(model_path) or "validation" not in evidence:
        return decision
    rule = fit_abstention(evidence["validation"], Wishes(configs.max_error, configs.unknown_rate))
    return dataclasses.replace(decision, abstention=rule)


def evaluate_rule(decision: Decision, evidence: dict[str, Evidence]) -> dict[str, Any]:
    """Returns what the rule does on the test set, and what others would do.

    Returns:
        `answers`, see `measure_answers`, `unknown` None if the rule needs similarities that there are none of;
        `risk_coverage`, see `trace_risk`, of at most 500 points; with a validation set `promises`, see
        `list_promises`; and `shortage`, why the promise cannot be made at all.
    """
    test, rule, validation = evidence["test"], decision.abstention, evidence.get("validation")
    answers, curve = measure_answers(answer_evidence(rule, test), test.y_true), trace_risk(test)
    if decision.calls_unknown and test.similarities is None:
        answers["unknown"] = None
    points = thin_curve(*(np.array(values) for values in curve.values()))
    found = {"answers": answers, "risk_coverage": dict(zip(curve, points, strict=True))}
    if validation is not None:
        unknown_rate = rule.unknown_rate if rule else 0.0
        found["promises"] = list_promises(validation, test, unknown_rate)
        if rule is not None and rule.thresholds and not any(one is not None for one in rule.thresholds):
            found["shortage"] = describe_shortage(validation, rule)
    return found


def describe_rule(decision: Decision, found: dict[str, Any]) -> list[str]:
    """Returns lines on the rule: what it promises, what it does on the test set, and what others would do.

    Args:
        decision: with the rule.
        found: from `evaluate_rule`.
    """
    rule, lines = decision.abstention, []
    if rule is not None and rule.max_error:
        lines.append(_describe_promise(rule, decision, found))
    if rule is not None and rule.unknown_threshold is not None:
        answers = found["answers"]
        number = f"{answers['unknown']} of {answers['images']} test images look unlike the training photos"
        lines.append(
            f"Unknown: {NOT_COMPARED if answers['unknown'] is None else number}; the threshold calls "
            f"{rule.unknown_rate:.1%} of the validation images unknown."
        )
    if promises := found.get("promises"):
        lines.append("Answering only what can be promised, with 95 % assurance (max_error):")
        lines += [_format_promise(row, decision.multi_label) for row in promises]
    return lines


def print_rule(decision: Decision, found: dict[str, Any]) -> None:
    """Prints the lines of `describe_rule`."""
    for line in describe_rule(decision, found):
        print(line)


def _describe_promise(rule: Abstention, decision: Decision, found: dict[str, Any]) -> str:
    answers = found["answers"]
    missing = [name for name, one in zip(decision.class_names, rule.thresholds, strict=False) if one is None]
    if all(one is None for one in rule.thresholds):
        return f"max_error {rule.max_error:g} cannot be promised, so no image is answered: {found.get('shortage', '')}"
    if not answers["answered"]:
        return f"max_error {rule.max_error:g}: no test image is answered."
    what = "given labels" if decision.multi_label else "answered images"
    line = (
        f"Of the {show_count(answers['answered'], what[:-1])} of the test set, {_format_error(answers)} are wrong; "
        f"promised: at most {rule.max_error:.1%}. Answered: {answers['coverage']:.1%} of the images."
    )
    return line + f" Never given, because nothing can be promised: {join_names(missing)}." * bool(missing)


def _format_promise(row: dict[str, Any], multi_label: bool) -> str:
    if row["error"] is None:
        return f"  {row['promised']:.0%}: nothing is answered"
    what = "labels given" if multi_label else "of the images answered"
    share = f"{row['answered']} {what}" if multi_label else f"{row['coverage']:.1%} {what}"
    return f"  {row['promised']:.0%}: {share}, {_format_error(row)} wrong"


def _format_error(answers: dict[str, Any]) -> str:
    low, high = answers["error_interval"]
    return f"{answers['error']:.1%} ({low:.1%} to {high:.1%})"
