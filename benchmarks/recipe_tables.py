"""The tables of recipes.py: what recipes of training scored on which photos, and whether promises hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from finetune.evaluation.paired_comparison import compare_scores

# By data set and recipe the `scores`, `seconds` and `photos` of each run.
Metrics = dict[str, dict[str, dict[str, list]]]
# What, measured, `at least` or `at most`, and the bound.
Target = tuple[str, float, str, float]

POINTS_BELOW = 0.5
ERROR_OF_BEST_PEER = 0.7
# On photos that ImageNet's classes do not resemble.
FOREIGN = "signs"
ERROR_OF_PROBE = 0.4
SECONDS_OF_DEFAULT = 2


def summarize(values: Sequence[float], form: str) -> str:
    """Returns the mean of values and their range as text: mean [lowest, highest]."""
    return f"{np.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def get_differences(metrics: Metrics, name: str, recipe: str, base: str) -> np.ndarray:
    """Returns by how many points a recipe is above another on one data set, float64 `(seeds,)`."""
    return 100 * np.subtract(*(metrics[name][key]["scores"] for key in (recipe, base)))


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def format_scores(metrics: Metrics, measures: dict[str, str]) -> str:
    """Lays out each recipe's scores and seconds, means and ranges over the seeds.

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
    """Lays out by how many points each recipe is above the one called `base`, photo split by photo split."""
    rows = {recipe: [recipe] for by_recipe in metrics.values() for recipe in by_recipe if recipe != base}
    for name in metrics:
        for recipe in rows:
            rows[recipe].append(summarize(get_differences(metrics, name, recipe, base), "+.1f"))
    return format_table([f"points above {base}", *metrics], list(rows.values()))


def format_paired(metrics: Metrics, recipe: str) -> str:
    """Lays out by how many points a recipe is above each other one, photo by photo, all splits together.

    A photo counts by its score: whether its class is right, of several labels their ranking average precision. The
    interval is the mean and 1.96 standard errors to each side.
    """
    others = {other: [other] for by_recipe in metrics.values() for other in by_recipe if other != recipe}
    for by_recipe in metrics.values():
        own = np.concatenate(by_recipe[recipe]["photos"])
        for other, row in others.items():
            difference, error = compare_scores(np.concatenate(by_recipe[other]["photos"]), own)
            low, high = (100 * (difference + side * 1.96 * error) for side in (-1, 1))
            row.append(f"{100 * difference:+.1f} ({low:+.1f} to {high:+.1f})")
    return format_table([f"{recipe} above, photo by photo", *metrics], list(others.values()))


def list_targets(metrics: Metrics) -> list[Target]:
    """Returns what is promised of the recommended recipe against its peers, which are all other recipes that ran.

    The best peer is each data set's own; the best single peer has the lowest mean error over all data sets. What needs
    a recipe that did not run is left out.
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
    """Returns what a recipe's mean score over the seeds lacks of 1."""
    return float(1 - np.mean(runs["scores"]))


def divide(value: float, other: float) -> float:
    """Returns value / other; where the other is 0, 1 if both are and infinity if not."""
    if other == 0:
        return 1.0 if value == 0 else float("inf")
    return value / other


def format_targets(targets: Sequence[Target]) -> str:
    """Lays out measured values beside their bounds."""
    rows = []
    for what, value, sign, bound in targets:
        # Ratios of whole numbers of photos may equal the bound but for rounding.
        holds = math.isclose(value, bound) or (value >= bound if sign == "at least" else value <= bound)
        rows.append([what, f"{value:.3g}", f"{sign} {bound:.3g}", "holds" if holds else "missed"])
    return format_table(["recommended", "measured", "promised", ""], rows)
