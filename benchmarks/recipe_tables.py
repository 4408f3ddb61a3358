"""The tables of recipes.py: the scores of each recipe on each data set, and whether promises hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from finetune.evaluation.intervals import compare_scores

# The `scores`, `seconds` and `photos` of each run, by data set and recipe.
Metrics = dict[str, dict[str, dict[str, list]]]
# Name, measured value, `at least` or `at most`, and the bound.
Target = tuple[str, float, str, float]

POINTS_BELOW = 0.5
ERROR_OF_BEST_PEER = 0.7
# A data set of photos unlike ImageNet's.
FOREIGN = "signs"
ERROR_OF_PROBE = 0.4
SECONDS_OF_DEFAULT = 2


def summarize(values: Sequence[float], form: str) -> str:
    """Returns values as text: mean [lowest, highest]."""
    return f"{np.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def get_differences(metrics: Metrics, name: str, recipe: str, base: str) -> np.ndarray:
    """Returns the points by which a recipe is above another on one data set, float64 `(seeds,)`."""
    return 100 * np.subtract(*(metrics[name][key]["scores"] for key in (recipe, base)))


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def format_scores(metrics: Metrics, measures: dict[str, str]) -> str:
    """Returns a table of each recipe's scores and seconds, as means and ranges over the seeds.

    Args:
        metrics: as `run_all` returns them.
        measures: the name of each data set's score.
    """
    head = ["recipe"]
    for name, measure in measures.items():
        head += [f"{name}, {measure.replace('_', ' ')}", f"{name}, s"]
    rows = {recipe: [recipe] for by_recipe in metrics.values() for recipe in by_recipe}
    for by_recipe in metrics.values():
        for recipe, runs in by_recipe.items():
            rows[recipe] += [summarize(runs["scores"], ".3f"), summarize(runs["seconds"], ".0f")]
    return format_table(head, list(rows.values()))


def format_differences(metrics: Metrics, base: str) -> str:
    """Returns a table of the points by which each recipe is above `base`, split by split."""
    rows = {recipe: [recipe] for by_recipe in metrics.values() for recipe in by_recipe if recipe != base}
    for name in metrics:
        for recipe in rows:
            rows[recipe].append(summarize(get_differences(metrics, name, recipe, base), "+.1f"))
    return format_table([f"points above {base}", *metrics], list(rows.values()))


def format_paired(metrics: Metrics, recipe: str, groups: dict[str, np.ndarray] | None = None) -> str:
    """Returns a table of the points by which a recipe is above each other one, photo by photo over all splits.

    The score of a photo is 1 if its class is right, or with several labels its ranking average precision. The interval
    is the mean and 1.96 standard errors to each side.

    Args:
        metrics: as `run_all` returns them.
        recipe: the one that the others are compared with.
        groups: for data sets whose photos are not independent, the group of each test photo, split after split.
    """
    others = {other: [other] for by_recipe in metrics.values() for other in by_recipe if other != recipe}
    for name, by_recipe in metrics.items():
        own, clusters = np.concatenate(by_recipe[recipe]["photos"]), (groups or {}).get(name)
        for other, row in others.items():
            difference, error = compare_scores(np.concatenate(by_recipe[other]["photos"]), own, clusters)
            low, high = (100 * (difference + side * 1.96 * error) for side in (-1, 1))
            row.append(f"{100 * difference:+.1f} ({low:+.1f} to {high:+.1f})")
    return format_table([f"{recipe} above, photo by photo", *metrics], list(others.values()))


def list_targets(metrics: Metrics) -> list[Target]:
    """Returns the promises of the recommended recipe against its peers: all other recipes that ran.

    The best peer is that of each data set. The best single peer has the lowest mean error over all data sets. Promises
    about a recipe that did not run are left out.
    """
    peers = [recipe for recipe in next(iter(metrics.values())) if recipe != "recommended"]
    errors = {name: {recipe: get_error(runs) for recipe, runs in runs_of.items()} for name, runs_of in metrics.items()}
    single = min(peers, key=lambda peer: np.mean([by_recipe[peer] for by_recipe in errors.values()]))
    targets, ratios = [], []
    for name, by_recipe in errors.items():
        own, best = by_recipe["recommended"], min(peers, key=by_recipe.get)
        below = 100 * (own - by_recipe[best])
        targets.append((f"{name}: points below the best peer, {best}", below, "at most", POINTS_BELOW))
        ratios.append(divide(own, by_recipe[single]))
        if "probe" in peers and name.split(" at ")[0] == FOREIGN:
            ratio = divide(own, by_recipe["probe"])
            targets.append((f"{name}: error / the probe's", ratio, "at most", ERROR_OF_PROBE))
        if "default" in peers:
            seconds = [float(np.mean(metrics[name][recipe]["seconds"])) for recipe in ("recommended", "default")]
            targets.append((f"{name}: seconds / the default's", divide(*seconds), "at most", SECONDS_OF_DEFAULT))
    what = f"error / that of the best single peer, {single}, mean of the data sets"
    return [*targets, (what, float(np.mean(ratios)), "at most", ERROR_OF_BEST_PEER)]


def get_error(runs: dict[str, list]) -> float:
    """Returns 1 minus a recipe's mean score over the seeds."""
    return float(1 - np.mean(runs["scores"]))


def divide(value: float, other: float) -> float:
    """Returns value / other; if the other is 0, then 1 if both are, and infinity if not."""
    if other == 0:
        return 1.0 if value == 0 else float("inf")
    return value / other


def format_targets(targets: Sequence[Target]) -> str:
    """Returns a table of measured values and their bounds."""
    rows = []
    for what, value, sign, bound in targets:
        # A ratio of whole numbers of photos may equal the bound except for rounding.
        holds = math.isclose(value, bound) or (value >= bound if sign == "at least" else value <= bound)
        rows.append([what, f"{value:.3g}", f"{sign} {bound:.3g}", "holds" if holds else "missed"])
    return format_table(["recommended", "measured", "promised", ""], rows)
