"""Draws docs/architecture.png from the project's own imports: run `python docs/draw_architecture.py` after a change.

`FLOORS` is the plan that the tests hold the project to: a room, which is a Python file, imports only from floors below
its own, or from rooms that stand before it on its own floor.
"""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PROJECT = Path(__file__).resolve().parent.parent
PICTURE = PROJECT / "docs" / "architecture.png"
PACKAGE = "finetune"
FLOORS: dict[str, tuple[str, ...]] = {
    "ground": (
        *("finetune.values", "finetune.notices", "finetune.streams", "finetune.options", "finetune.arguments"),
        *("finetune.texts", "finetune.progress"),
        *("finetune.files", "finetune.groups", "finetune.labels"),
    ),
    "options": ("configs",),
    "inputs": (
        *("finetune.findings", "finetune.stores", "finetune.tiff_parts", "finetune.numeric_tiffs", "finetune.headers"),
        *("finetune.images", "finetune.table_faults", "finetune.missing_files", "finetune.tables"),
        *("finetune.photo_groups", "finetune.pixel_range"),
    ),
    "data": (
        *(
            "finetune.near_copies",
            "finetune.inspection",
            "finetune.copies",
            "finetune.data_check",
            "finetune.splitting",
        ),
        *("finetune.class_folders", "finetune.set_folders", "finetune.label_tables"),
        "finetune.corrections",
        *(
            "finetune.caches",
            "finetune.resampling",
            "finetune.draws",
            "finetune.warps",
            "finetune.colours",
            "finetune.crops",
            "augmenter",
            "finetune.mixing",
            "finetune.batches",
            "finetune.batch_processes",
            "generator",
        ),
    ),
    "machine": (
        *("finetune.hardware", "finetune.devices", "finetune.interruption"),
        *("finetune.slurm", "finetune.cluster", "finetune.team"),
    ),
    "model": (
        *("finetune.freezing", "finetune.losses", "finetune.optimizers", "model", "finetune.artefacts"),
        *("finetune.model_description", "finetune.hdf5_attributes"),
        *("finetune.safety", "finetune.compressed", "finetune.inference_model", "finetune.model_files"),
        *("finetune.trainer", "finetune.features", "finetune.probe"),
        *("finetune.feature_store", "finetune.speeds"),
    ),
    "judgement": (
        *("finetune.confusions", "finetune.metrics", "finetune.curves", "finetune.decision"),
        *("finetune.decision_file", "finetune.intervals", "finetune.breakdown", "finetune.evaluation"),
        "finetune.leaks",
        *("finetune.gradcam", "finetune.faithfulness", "finetune.explaining"),
    ),
    "run": (
        *("finetune.run_data", "finetune.run_folder", "finetune.phases", "finetune.selection", "finetune.callbacks"),
        *("finetune.head_fit", "finetune.interpolation"),
        *("finetune.training_state", "finetune.checkpoints", "finetune.resuming", "finetune.range_test"),
        *("finetune.time_budget", "finetune.training", "finetune.backbone_comparison"),
    ),
    "output": (
        *("finetune.figures", "finetune.log_figures", "finetune.summaries", "finetune.embedding", "finetune.runtimes"),
        *(
            "finetune.kept_answers",
            "finetune.predicting",
            "finetune.prediction_files",
            "finetune.cam_pictures",
            "finetune.gallery",
        ),
        "finetune.cam_page",
        *("finetune.label_page", "finetune.contradictions"),
        *("finetune.report", "finetune.card_parts", "finetune.model_card", "finetune.exports", "finetune.parity"),
        *("finetune.compression_report", "finetune.backbone_report", "finetune.label_errors"),
        "finetune.label_error_page",
    ),
    "your own code": ("utils",),
    "scripts": (
        *("make_csv_from_folders", "split_train_test", "compare_backbones", "find_label_errors", "train", "test"),
        *("draw_activations", "plot_training_log", "compress_weights", "predict"),
    ),
}
# Inches and points of the picture.
ROOM_SIZE = (1.62, 0.42)
GAP = 0.2
LINE_HEIGHT = 1.1
ROOMS_A_LINE = 8
LEFT = 1.5
DPI = 110
COLOURS = (
    "#57606a",
    "#2f6ca3",
    "#1a7a6e",
    "#3d7a2a",
    "#8a7a12",
    "#b3651b",
    "#b3372b",
    "#a1356f",
    "#5a4fb0",
    "#2b6f8f",
    "#6b4e9b",
)


class Place(NamedTuple):
    """Where a room stands in the picture: the left lower corner of its box, in inches."""

    x: float
    y: float


def list_rooms() -> dict[str, Path]:
    """Returns the Python files of the root and of the package by the names that they are imported by."""
    rooms = {path.stem: path for path in sorted(PROJECT.glob("*.py"))}
    inner = sorted((PROJECT / PACKAGE).glob("*.py"))
    return rooms | {f"{PACKAGE}.{path.stem}": path for path in inner if path.stem != "__init__"}


def read_imports(room: str, path: Path, rooms: dict[str, Path]) -> set[str]:
    """Returns the rooms that a file imports, at any depth, for types alone as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A relative import names a place in the package.
            module = ".".join([PACKAGE] * bool(node.level) + [node.module] * bool(node.module))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return (found & rooms.keys()) - {room}


def read_all_imports() -> dict[str, set[str]]:
    """Returns the rooms that each room imports."""
    rooms = list_rooms()
    return {room: read_imports(room, path, rooms) for room, path in rooms.items()}


def describe(imports: dict[str, set[str]]) -> str:
    """Returns the imports as text, which the picture carries: so a test sees whether it is of today."""
    return "\n".join(f"{room}: {', '.join(sorted(imported))}" for room, imported in sorted(imports.items()))


def list_direct_lines(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the imports that no way over other rooms says already, from the importing room to the imported one."""
    reached: dict[str, set[str]] = {}

    def reach(room: str, way: tuple[str, ...] = ()) -> set[str]:
        if room not in reached:
            nexts = imports.get(room, set()) - {*way}
            reached[room] = nexts.union(*(reach(other, (*way, room)) for other in nexts))
        return reached[room]

    return [
        (room, imported)
        for room, direct in sorted(imports.items())
        for imported in sorted(direct)
        if not any(imported in reach(other) for other in direct - {imported})
    ]


def place_rooms(floors: dict[str, tuple[str, ...]]) -> tuple[dict[str, Place], dict[str, tuple[float, float]]]:
    """Returns where each room stands, and the bottom and top of each floor; the ground is at 0."""
    places, heights, bottom = {}, {}, 0.0
    width = ROOMS_A_LINE * (ROOM_SIZE[0] + GAP)
    for floor, rooms in floors.items():
        count = -(-len(rooms) // ROOMS_A_LINE)
        size = -(-len(rooms) // count)
        for line in range(count):
            names = rooms[line * size : (line + 1) * size]
            step = width / len(names)
            for position, name in enumerate(names):
                x = LEFT + (position + 0.5) * step - ROOM_SIZE[0] / 2
                places[name] = Place(x, bottom + line * LINE_HEIGHT + (LINE_HEIGHT - ROOM_SIZE[1]) / 2)
        heights[floor] = (bottom, bottom + count * LINE_HEIGHT)
        bottom += count * LINE_HEIGHT
    return places, heights


def draw_floors(axes: Axes, heights: dict[str, tuple[float, float]], width: float) -> None:
    """Draws a band for each floor, with its number and name."""
    for number, (floor, (bottom, top)) in enumerate(heights.items(), start=1):
        shade = "#f3f4f6" if number % 2 else "#ffffff"
        axes.add_patch(Rectangle((0, bottom), width, top - bottom, facecolor=shade, edgecolor="none", zorder=0))
        axes.text(0.15, (bottom + top) / 2, f"{number}  {floor}", va="center", fontsize=12, color="#1b2128")


def draw_lines(axes: Axes, lines: list[tuple[str, str]], places: dict[str, Place], colours: dict[str, str]) -> None:
    """Draws each import from below the importing room to above the imported one; on one line, as an arc below both."""
    width, height = ROOM_SIZE
    for room, imported in lines:
        start, end = places[room], places[imported]
        is_level = start.y == end.y
        # A long arc is flat, so that it does not reach the floor below.
        bend = -min(0.3, 0.55 / abs(start.x - end.x)) if is_level else 0
        arrow = {"arrowstyle": "-|>,head_width=0.16,head_length=0.3", "connectionstyle": f"arc3,rad={bend}"}
        arrow |= {"color": colours[room], "alpha": 0.6, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        tip = (end.x + width / 2, end.y if is_level else end.y + height)
        axes.annotate("", xy=tip, xytext=(start.x + width / 2, start.y), arrowprops=arrow, zorder=1)


def draw_rooms(axes: Axes, places: dict[str, Place], colours: dict[str, str]) -> None:
    """Draws a box for each room: filled where a user runs or edits the file, in the root, and white in the package."""
    for name, (x, y) in places.items():
        is_inner = name.startswith(f"{PACKAGE}.")
        face, ink = ("#ffffff", "#1b2128") if is_inner else (colours[name], "#ffffff")
        style = "round,pad=0,rounding_size=0.07"
        axes.add_patch(
            FancyBboxPatch(
                (x, y), *ROOM_SIZE, boxstyle=style, facecolor=face, edgecolor=colours[name], lw=1.3, zorder=2
            )
        )
        label = name.removeprefix(f"{PACKAGE}.") + ".py"
        size = 10 if len(label) < 20 else 8.5
        middle = (x + ROOM_SIZE[0] / 2, y + ROOM_SIZE[1] / 2)
        axes.text(*middle, label, ha="center", va="center", fontsize=size, color=ink, zorder=3)


def draw(imports: dict[str, set[str]]) -> Figure:
    """Draws the floors, the rooms on them and their imports."""
    known = {floor: tuple(room for room in rooms if room in imports) for floor, rooms in FLOORS.items()}
    places, heights = place_rooms({floor: rooms for floor, rooms in known.items() if rooms})
    numbers = {room: number for number, rooms in enumerate(FLOORS.values()) for room in rooms}
    colours = {room: COLOURS[number % len(COLOURS)] for room, number in numbers.items()}
    width, height = LEFT + ROOMS_A_LINE * (ROOM_SIZE[0] + GAP), max(top for _, top in heights.values())
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    draw_floors(axes, heights, width)
    lines = [line for line in list_direct_lines(imports) if places.keys() >= {*line}]
    draw_lines(axes, lines, places, colours)
    draw_rooms(axes, places, colours)
    return figure


def main() -> None:
    """Writes the picture; it carries the imports that it shows."""
    imports, content, text = read_all_imports(), io.BytesIO(), PngInfo()
    draw(imports).savefig(content, dpi=DPI)
    text.add_text("Imports", describe(imports))
    # With 64 colours the file has a quarter of the bytes.
    Image.open(content).convert("RGB").quantize(64).save(PICTURE, optimize=True, pnginfo=text)


if __name__ == "__main__":
    main()
