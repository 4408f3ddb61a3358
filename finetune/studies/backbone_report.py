"""Shows a comparison of backbones: a table, the suggestion in words, and a picture."""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from finetune.core.files import atomic_path
from finetune.core.texts import join_names, show_duration
from finetune.data.groups import describe_group_count
from finetune.reporting.figures import COLOURS, MUTED, PRINTED_DPI, style
from finetune.studies.backbone_comparison import SIGNIFICANT, show_size

METRICS = {"accuracy": "Accuracy", "mean_average_precision": "Mean average precision"}
LONGEST_REASON = 160
# Balanced accuracy is shown if it differs from accuracy by at least this much.
LEAST_IMBALANCE = 0.02
MOST_NAMED = 20
# Where a label may be, in degrees and points from its candidate's point, the preferred place first.
ANGLES = np.radians([0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 338, 202, 67, 113, 247, 293])
DISTANCES = (9, 18, 30, 44, 60, 80)
# Radius of a candidate's mark, in points.
DOT = 6


def get_metric_name(ranking: pd.DataFrame) -> str:
    """Returns the column that a ranking is ordered by."""
    return next(name for name in METRICS if name in ranking)


def name_candidates(ranking: pd.DataFrame) -> list[str]:
    """Returns the candidates' names with their sizes, in the ranking's order."""
    columns = zip(ranking["backbone"], ranking["height"], ranking["width"], strict=True)
    return [f"{backbone} at {show_size(height, width)}" for backbone, height, width in columns]


def print_ranking(ranking: pd.DataFrame, left_out: dict[str, str], epochs: int) -> None:
    """Prints the table, the suggestion, and why others were left out; `epochs` are those of the training time."""
    print(f"\n{format_ranking(ranking)}\n")
    print(f"Training: {epochs} epochs on all images of train_csv on this machine, estimated from the speed.")
    for reason in dict.fromkeys(left_out.values()):
        names = join_names([name for name, other in left_out.items() if other == reason], MOST_NAMED)
        print(f"Left out: {names}: {textwrap.shorten(reason, LONGEST_REASON, placeholder=' ...')}")
    if is_imbalanced(ranking):
        print(describe_balance(ranking))
    print(describe_suggestion(ranking))
    chosen = ranking[ranking["suggested"]].iloc[0]
    size = f"{chosen['height']} {chosen['width']} 3"
    print(f"Its options: --visual_model_name {chosen['backbone']} --image_target_size {size}")
    print("This ranks frozen backbones by a probe, a regression on their features: fine-tuning may change the order.")


def is_imbalanced(ranking: pd.DataFrame) -> bool:
    """Returns True if the balanced accuracy of a candidate differs from its accuracy."""
    if "balanced_accuracy" not in ranking:
        return False
    return bool((ranking["accuracy"] - ranking["balanced_accuracy"]).abs().max() >= LEAST_IMBALANCE)


def describe_balance(ranking: pd.DataFrame) -> str:
    """Returns a line with the share of the most frequent class and the order by balanced accuracy."""
    order = np.argsort(ranking["balanced_rank"], kind="stable")
    names, values = name_candidates(ranking), ranking["balanced_accuracy"].tolist()
    shown = join_names([f"{names[place]} ({values[place]:.3f})" for place in order], MOST_NAMED)
    same = " (the same order)" * (len(names) > 1 and ranking["balanced_rank"].is_monotonic_increasing)
    return (
        f"{ranking['largest_share'].iloc[0]:.0%} of the images are of one class. The table is ordered by accuracy, and "
        f"the suggestion is made by it. By balanced accuracy, the mean recall of the classes{same}: {shown}."
    )


def format_ranking(ranking: pd.DataFrame) -> str:
    """Returns a ranking as a table, one line for each candidate."""
    metric, balanced = get_metric_name(ranking), is_imbalanced(ranking)
    quality = (metric.replace("_", " "), "95 % interval", *["balanced accuracy"] * balanced)
    rows = [("", "size", *quality, "images/s", "training", "parameters", "MB", "")]
    for row in ranking.to_dict("records"):
        balance = [f"{row['balanced_accuracy']:.3f}"] if balanced else []
        rows.append(
            (
                row["backbone"],
                show_size(row["height"], row["width"]),
                f"{row[metric]:.3f}",
                f"{row['low']:.3f} to {row['high']:.3f}",
                *balance,
                f"{row['images_per_second']:.1f}",
                show_duration(row["training_seconds"]),
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['megabytes']:.1f}",
                "suggested" if row["suggested"] else "not significantly different" * row["not_told_apart"],
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]).rstrip() for row in rows
    )


def describe_suggestion(ranking: pd.DataFrame) -> str:
    """Returns the lines that suggest a candidate, compare it with the best, and name those not significantly different.

    A last line is added if the measured speeds contradict the computation.
    """
    names = name_candidates(ranking)
    chosen, fastest = (int(np.flatnonzero(ranking[name])[0]) for name in ("suggested", "measured_fastest"))
    if len(names) == 1:
        return f"Suggestion: {names[0]}, the only one that could be compared."
    reason = "the best"
    if chosen:
        kind = "the fastest" if chosen == fastest else "by its computation the fastest"
        reason = (
            f"{kind} of those not significantly worse than the best, {names[0]}; it is behind by "
            f"{show_gap(ranking, chosen)}"
        )
    if others := [names[place] for place in np.flatnonzero(ranking["not_told_apart"])]:
        groups = describe_group_count(ranking["groups"].iloc[0] if "groups" in ranking else None)
        compared = (
            f"Not significantly different from it on these {ranking['images'].iloc[0]} images{groups}: "
            f"{join_names(others, MOST_NAMED)}."
        )
    else:
        nearest = int(ranking["behind_best"].iloc[1:].to_numpy().argmin()) + 1
        compared = (
            f"All others are significantly worse; the nearest, {names[nearest]}, is behind by "
            f"{show_gap(ranking, nearest)}."
        )
    lines = [f"Suggestion: {names[chosen]}, {reason}. {compared}"]
    if chosen != fastest:
        speeds, computation = ranking["images_per_second"], ranking["multiply_adds"] / 1e9
        lines.append(
            f"The speeds contradict the computation, as on a busy machine: {names[fastest]} was measured at "
            f"{speeds.iloc[fastest]:.1f} images/s and {names[chosen]} at {speeds.iloc[chosen]:.1f}, but an image takes "
            f"{computation.iloc[fastest]:.2f} and {computation.iloc[chosen]:.2f} billion multiply-adds. The suggestion "
            "follows the computation."
        )
    return "\n".join(lines)


def show_gap(ranking: pd.DataFrame, place: int) -> str:
    """Returns the difference of a candidate from the best one with its 95 % confidence interval, in points."""
    gap, error = (100 * float(ranking[name].iloc[place]) for name in ("behind_best", "standard_error"))
    margin = SIGNIFICANT * error
    return f"{gap:.1f} points (95 % interval {gap - margin:.1f} to {gap + margin:.1f})"


def draw_ranking(ranking: pd.DataFrame, write_path: str) -> str:
    """Draws the metric over the speed as a PNG file with the name of the table's file; returns its path."""
    path = f"{os.path.splitext(write_path)[0]}.png"
    with style({}), atomic_path(path) as temporary:
        draw_front(ranking).savefig(temporary, dpi=PRINTED_DPI, facecolor="white")
    return path


def draw_front(ranking: pd.DataFrame) -> Figure:
    """Draws the metric of each candidate, with its interval, over the speed, and the Pareto front of both."""
    column = get_metric_name(ranking)
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    axes = figure.add_subplot()
    speeds, values = ranking["images_per_second"].to_numpy(), ranking[column].to_numpy()
    is_on_front = ranking["on_front"].to_numpy()
    spread = np.abs(ranking[["low", "high"]].to_numpy().T - values)
    axes.errorbar(speeds, values, spread, fmt="none", ecolor=MUTED, elinewidth=1, alpha=0.45, zorder=1)
    front = np.flatnonzero(is_on_front)[np.argsort(speeds[is_on_front], kind="stable")]
    axes.plot(speeds[front], values[front], color=COLOURS[1], linewidth=1.6, zorder=2, label="_")
    kinds = (
        (~is_on_front, "o", COLOURS[0], 46, "another is better and faster"),
        (is_on_front, "D", COLOURS[1], 52, "none is better and faster"),
        (ranking["suggested"].to_numpy(), "*", "#1b2128", 170, "suggested"),
    )
    for chosen, marker, colour, size, label in kinds:
        if chosen.any():
            points = (speeds[chosen], values[chosen])
            axes.scatter(*points, s=size, marker=marker, color=colour, edgecolor="white", label=label, zorder=3)
    axes.set(xscale="log", xlabel="Images a second, features alone", ylabel=METRICS[column])
    axes.margins(x=0.16, y=0.08)
    # A narrow range has few powers of ten and their multiples: it needs more ticks.
    steps = (1, 2, 5) if speeds.max() > 4 * speeds.min() else range(1, 10)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    # Below the axes it covers no point.
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    axes.set_title("Frozen backbones by a probe; grey lines are 95 % intervals", fontsize=10)
    place_labels(axes, np.stack([speeds, values], axis=1), name_points(ranking), front)
    return figure


def name_points(ranking: pd.DataFrame) -> list[str]:
    """Returns the candidates' names, with their sizes if these differ."""
    if len(ranking[["height", "width"]].drop_duplicates()) == 1:
        return ranking["backbone"].tolist()
    return [name.replace(" at ", " ") for name in name_candidates(ranking)]


def place_labels(axes: Axes, points: np.ndarray, names: Sequence[str], front: np.ndarray) -> list[Text]:
    """Writes names where they overlap least with other names, points, the front and the margin.

    A name far from its point gets a leader line.

    Args:
        axes: with all points drawn.
        points: `(points, 2)`, in data coordinates.
        names: of the points.
        front: positions of the points that the front joins.
    """
    # The layout moves points, so it comes first; labels take no part in it.
    axes.figure.draw_without_rendering()
    scale = axes.figure.dpi / 72
    centres = axes.transData.transform(points)
    dots = np.concatenate([centres - DOT * scale, centres + DOT * scale], axis=1)
    line = list_line_boxes(centres[front], scale)
    frame, taken, texts = axes.get_window_extent().extents, [], []
    # From the top down, so that crowded labels are in the order of their points.
    for number in np.argsort(-centres[:, 1], kind="stable"):
        look = {"fontsize": 8.5, "zorder": 4, "in_layout": False, "ha": "center", "va": "center"}
        text = axes.annotate(names[number], points[number], **look)
        box = text.get_window_extent()
        text.remove()
        half = np.array([box.width, box.height]) / 2
        others = np.concatenate([np.delete(dots, number, axis=0), np.reshape(taken, (-1, 4)), line])
        shifts = list_shifts(half, scale)
        boxes = [np.concatenate([centres[number] + shift - half, centres[number] + shift + half]) for shift in shifts]
        costs = [measure_overlap(corners, others, frame) for corners in boxes] + np.arange(len(boxes)) * scale**2
        best = int(np.argmin(costs))
        taken.append(boxes[best])
        is_far = np.hypot(*np.maximum(np.abs(shifts[best]) - half, 0)) > DISTANCES[0] * scale
        leader = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4} if is_far else None
        place = {"xytext": shifts[best] / scale, "textcoords": "offset points", "arrowprops": leader}
        texts.append(axes.annotate(names[number], points[number], **look, **place))
        # Keeps a name legible that an interval crosses.
        texts[-1].set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    return texts


def list_line_boxes(corners: np.ndarray, scale: float) -> np.ndarray:
    """Returns small boxes along a line through corners `(points, 2)`: left, bottom, right and top, in pixels."""
    steps = np.linspace(0, 1, 60)[:, None]
    middles = [start + (end - start) * steps for start, end in itertools.pairwise(corners)]
    middles = np.concatenate([np.zeros((0, 2)), *middles])
    return np.concatenate([middles - 2 * scale, middles + 2 * scale], axis=1)


def list_shifts(half: np.ndarray, scale: float) -> list[np.ndarray]:
    """Returns the allowed distances of a label's centre from its point, in pixels, the preferred one first.

    Args:
        half: half the label's width and height, in pixels.
        scale: pixels per point.
    """
    directions = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
    return [turn * distance * scale + np.round(turn, 1) * half for distance in DISTANCES for turn in directions]


def measure_overlap(corners: np.ndarray, others: np.ndarray, frame: np.ndarray) -> float:
    """Returns the area that a box shares with others, plus twice its area outside a frame, in pixels.

    Args:
        corners: left, bottom, right and top of the box.
        others: those of other boxes, `(boxes, 4)`.
        frame: those of the frame.
    """
    sides = np.minimum(corners[2:], others[:, 2:]) - np.maximum(corners[:2], others[:, :2])
    shared = np.prod(np.maximum(sides, 0), axis=1).sum()
    inside = np.prod(np.maximum(np.minimum(corners[2:], frame[2:]) - np.maximum(corners[:2], frame[:2]), 0))
    return float(shared + 2 * (np.prod(corners[2:] - corners[:2]) - inside))
