"""What the report and the model card say about the photos that a model does not answer."""

from __future__ import annotations

from typing import Any

from finetune.core.texts import MOST_LISTED, MOST_TELLING, join_names, show_count
from finetune.data.groups import describe_group_count
from finetune.evaluation.abstention import Abstention
from finetune.evaluation.promise import ASSURANCE
from finetune.evaluation.rule import NOT_COMPARED
from finetune.evaluation.shift import describe_excess, find_excess
from finetune.reporting.summaries import format_percent

SURE = f"{100 * ASSURANCE:.0f} %"
NOT_COVERED = (
    "It does not cover photos of another kind, or from another camera, place or time than the validation images; "
    "not all of them are noticed."
)


def describe_unanswered(results: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what the report shows about unanswered photos.

    Args:
        results: the content of metrics.json.

    Returns:
        `facts`, each with `title`, `value` and `note`; `warnings`, in sentences; `promises`, the rows of the table,
        each with `promised`, `value`, `note`, `error` and `interval`, the last four empty if nothing can be promised;
        `not_covered`, a sentence, empty without a promise. None without a measurement.
    """
    test, rule = results["sets"]["test"], results["decision"].get("abstention") or {}
    if "answers" not in test:
        return None
    several = results["multi_label"]
    return {
        "facts": _list_facts(results, test["answers"], rule),
        "warnings": _list_warnings(test, rule),
        "promises": [_describe_row(row, several) for row in test.get("promises", [])],
        "not_covered": NOT_COVERED if "promises" in test or rule.get("max_error") else "",
    }


def _list_facts(results: dict[str, Any], answers: dict[str, Any], rule: dict[str, Any]) -> list[dict[str, str]]:
    images, what = answers["images"], "labels given" if results["multi_label"] else "answered images"
    counts = [f"{answers[name]} {name}" for name in ("unsure", "unknown") if answers[name]]
    answered = images - answers["unsure"] - (answers["unknown"] or 0)
    note = "; ".join([f"{answered} of {show_count(images, 'test image')}", *counts])
    facts = [("Answered", format_percent(answers["coverage"]), note)]
    wrong = f"{answers['wrong']} of {answers['answered']} {what}"
    if answers["error"] is None:
        facts.append(("Wrong answers", "none", "because none is given"))
    else:
        facts.append(
            ("Wrong answers", format_percent(answers["error"]), f"{wrong}; 95 % interval {_show_interval(answers)}")
        )
    if rule.get("max_error"):
        facts.append(("Promised", *_describe_promise(results, rule)))
    if rule.get("unknown_threshold") is not None:
        is_known = answers["unknown"] is not None
        value = f"{answers['unknown']} of {images}" if is_known else "not counted"
        note = f"of the validation images, {format_percent(rule['unknown_rate'])} may be called unknown"
        facts.append(("Unknown", value, note if is_known else NOT_COMPARED))
    return [dict(zip(("title", "value", "note"), fact, strict=True)) for fact in facts]


def _describe_promise(results: dict[str, Any], rule: dict[str, Any]) -> tuple[str, str]:
    """Returns what is promised, and under which conditions."""
    thresholds, several = rule["thresholds"], results["multi_label"]
    if all(one is None for one in thresholds):
        reason = results["sets"]["test"].get("shortage", "")
        return "nothing", f"at most {format_percent(rule['max_error'])} wrong cannot be promised: {reason}"
    images = show_count(rule["images"], "validation image")
    groups = describe_group_count(results["sets"].get("validation", {}).get("groups"))
    wrong = "of the photos given a label lack it" if several else "of the answers are wrong"
    note = f"{wrong}, with {SURE} assurance; fitted on {images}{groups}"
    missing = [name for name, one in zip(results["classes"], thresholds, strict=False) if one is None]
    if several and missing:
        longest = MOST_LISTED if len(results["classes"]) <= MOST_LISTED else MOST_TELLING
        note += f". Never given, because nothing can be promised: {join_names(missing, longest)}"
    return f"at most {format_percent(rule['max_error'])}", note


def _list_warnings(test: dict[str, Any], rule: dict[str, Any]) -> list[str]:
    found, answers = [], test["answers"]
    if rule:
        fitted = Abstention.of(rule, len(rule["thresholds"] or ()))
        found = [
            describe_excess(excess, bool(fitted.max_error)).removeprefix("Warning: ")
            for excess in find_excess(fitted, answers["unknown"] or 0, answers["unsure"], answers["images"])
        ]
    if answers["error"] is not None and rule.get("max_error") and answers["error_interval"][0] > rule["max_error"]:
        found.append("More answers are wrong than promised: the test images differ from the validation images.")
    if "promises" not in test:
        found.append("Without a validation set nothing new can be promised; the curve is that of the test set alone.")
    if test.get("groups"):
        found.append("The intervals are too narrow: they take images as independent, and those of one group are not.")
    return found


def _describe_row(row: dict[str, Any], several: bool) -> dict[str, str]:
    """Returns a row of the table of promises."""
    shown = {"promised": f"{100 * row['promised']:g}\u00a0%", "value": "", "note": "", "error": "", "interval": ""}
    if row["error"] is None:
        return shown
    share, note = format_percent(row["coverage"]), f"{row['answered']} of {row['images']}"
    shown |= {"value": str(row["answered"]), "note": ""} if several else {"value": share, "note": note}
    return shown | {"error": format_percent(row["error"]), "interval": _show_interval(row)}


def _show_interval(answers: dict[str, Any]) -> str:
    low, high = map(format_percent, answers["error_interval"])
    return f"{low} to {high}"


def summarize_rule(results: dict[str, Any] | None, decision: dict[str, Any] | None) -> str:
    """Returns a paragraph for the model card: what is promised, measured and not covered; empty without a rule.

    Args:
        results: the content of metrics.json, or None.
        decision: the content of decision.json, or None.
    """
    rule = (decision or {}).get("abstention") or {}
    promises, compares = bool(rule.get("max_error")), rule.get("unknown_threshold") is not None
    if not (promises or compares):
        return ""
    words = []
    if promises and all(one is None for one in rule["thresholds"]):
        nothing = "no label is given" if decision["multi_label"] else "no photo is answered"
        words.append(f"An error of {format_percent(rule['max_error'])} could not be promised, so {nothing}.")
    elif promises:
        what = "of the photos given a label lack it" if decision["multi_label"] else "of the answered photos are wrong"
        words.append(
            f"Photos are left unanswered, as unsure, so that at most {format_percent(rule['max_error'])} {what}, with "
            f"{SURE} assurance; fitted on {rule['images']} validation images."
        )
    if compares:
        words.append(
            "Photos unlike the training photos are called unknown, as are "
            f"{format_percent(rule['unknown_rate'])} of the validation images at most."
        )
    answers = results["sets"]["test"].get("answers") if results else None
    if answers:
        words.append(_summarize_answers(answers, compares, decision["multi_label"]))
    return " ".join([*words, NOT_COVERED.replace("It does", "This does", 1)])


def _summarize_answers(answers: dict[str, Any], compares: bool, several: bool) -> str:
    text = f"On the test set {format_percent(answers['coverage'])} of the images are answered"
    if answers["error"] is not None:
        share = f"{format_percent(answers['error'])} ({_show_interval(answers)})"
        text += f", and {share} of the {'labels given' if several else 'answers'} are wrong"
    if compares and answers["unknown"] is not None:
        text += f"; {answers['unknown']} of {answers['images']} images are unknown"
    return text + "."
