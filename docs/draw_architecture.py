"""Draws docs/architecture.png from the project's own imports: run `python docs/draw_architecture.py` after a change.

There is a box for each subpackage of `finetune/`, with its modules, and for each file of the root. A box is above all
that it imports. An arrow is left out if a path over other boxes implies it.
"""

from __future__ import annotations

import ast
import io
from graphlib import TopologicalSorter
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PROJECT = Path(__file__).resolve().parent.parent
PICTURE = PROJECT / "docs" / "architecture.png"
PACKAGE = "finetune"
# Inches and points of the picture.
ROW_HEIGHT, BOX_HEIGHT, BOX_WIDTH, LEFT, WIDTH, DPI = 0.62, 0.5, 9.2, 3.2, 12.6, 110
ROOT_COLOUR, INNER_COLOUR, LINE_COLOUR = "#2f6ca3", "#ffffff", "#57606a"


def list_modules(project: Path = PROJECT) -> dict[str, Path]:
    """Returns the Python files of the root and of the package, by the names that they are imported by."""
    modules = {path.stem: path for path in sorted(project.glob("*.py"))}
    inner = [path for path in sorted((project / PACKAGE).rglob("*.py")) if path.stem != "__init__"]
    return modules | {".".join(path.relative_to(project).with_suffix("").parts): path for path in inner}


def read_imports(path: Path, known: set[str]) -> set[str]:
    """Returns the known modules that a file imports, at any depth, also for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known


def name_part(module: str) -> str:
    """Returns the subpackage of a module, or the name of a module in the root."""
    return module.split(".")[1] if module.startswith(f"{PACKAGE}.") else module


def read_all_imports() -> dict[str, set[str]]:
    """Returns for each part of the project, a subpackage or a root module, the parts that it imports."""
    modules = list_modules()
    imports: dict[str, set[str]] = {name_part(module): set() for module in modules}
    for module, path in modules.items():
        part = name_part(module)
        imports[part] |= {name_part(other) for other in read_imports(path, set(modules))} - {part}
    return imports


def describe(imports: dict[str, set[str]]) -> str:
    """Returns the imports and modules as text. The picture stores it, so that a test sees whether it is current."""
    lines = [f"{part}: {', '.join(sorted(imported))}" for part, imported in sorted(imports.items())]
    return "\n".join([*lines, *list_modules()])


def list_direct_lines(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the imports, as pairs (importing, imported), that no path over other parts implies."""
    reached: dict[str, set[str]] = {}
    for part in TopologicalSorter(imports).static_order():
        direct = imports.get(part, set())
        reached[part] = direct.union(*(reached[other] for other in direct))
    return [
        (part, imported)
        for part, direct in sorted(imports.items())
        for imported in sorted(direct)
        if not any(imported in reached[other] for other in direct - {imported})
    ]


def order_rows(imports: dict[str, set[str]]) -> list[list[str]]:
    """Returns the rows of the picture from the bottom up; the scripts, which nothing imports, share the last row."""
    used = set().union(*imports.values())
    order = [part for part in TopologicalSorter(imports).static_order() if part in used]
    return [*([part] for part in order), sorted(imports.keys() - used)]


def draw_row(axes: Axes, bottom: float, title: str, content: str, is_inner: bool) -> None:
    """Draws one box with its title and content."""
    face, ink = (INNER_COLOUR, "#1b2128") if is_inner else (ROOT_COLOUR, "#ffffff")
    style = "round,pad=0,rounding_size=0.07"
    box = FancyBboxPatch((LEFT, bottom), BOX_WIDTH, BOX_HEIGHT, boxstyle=style, facecolor=face, edgecolor=ROOT_COLOUR)
    axes.add_patch(box)
    axes.text(LEFT + 0.12, bottom + BOX_HEIGHT / 2, title, va="center", fontsize=11, weight="bold", color=ink)
    axes.text(LEFT + 1.6, bottom + BOX_HEIGHT / 2, content, va="center", fontsize=7.5, color=ink, wrap=True)


def wrap_names(names: list[str], width: int = 125) -> str:
    """Returns names joined by commas, in lines of about `width` characters."""
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += f"{name}, "
    return "\n".join(line.rstrip() for line in lines).rstrip(",")


def draw(imports: dict[str, set[str]]) -> Figure:
    """Draws the rows, and the imports as arcs on the left."""
    rows = order_rows(imports)
    places = {part: number for number, parts in enumerate(rows) for part in parts}
    modules = {
        part: sorted(m.rsplit(".", 1)[1] for m in list_modules() if m != part and name_part(m) == part)
        for part in imports
    }
    figure = Figure(figsize=(WIDTH, len(rows) * ROW_HEIGHT + 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, len(rows) * ROW_HEIGHT + 0.2))
    axes.axis("off")
    for number, parts in enumerate(rows):
        title, names = ("scripts", parts) if len(parts) > 1 else (parts[0], modules[parts[0]])
        is_inner = bool(modules[parts[0]])
        title = title if is_inner or len(parts) > 1 else f"{title}.py"
        draw_row(axes, number * ROW_HEIGHT + 0.15, title, wrap_names(names), is_inner)
    lines = {(places[part], places[imported]) for part, imported in list_direct_lines(imports)}
    for start, end in lines:
        heights = [row * ROW_HEIGHT + 0.15 + BOX_HEIGHT * share for row, share in ((start, 0.35), (end, 0.65))]
        arrow = {"arrowstyle": "-|>", "color": LINE_COLOUR, "alpha": 0.7, "shrinkA": 0, "shrinkB": 0}
        bend = min(0.9, 0.35 + 0.5 / (start - end))
        arrow |= {"connectionstyle": f"arc3,rad={bend if start - end > 1 else 0.6}"}
        axes.annotate("", xy=(LEFT, heights[1]), xytext=(LEFT, heights[0]), arrowprops=arrow)
    return figure


def main() -> None:
    """Writes the picture, with its imports as text."""
    imports, content, text = read_all_imports(), io.BytesIO(), PngInfo()
    draw(imports).savefig(content, dpi=DPI)
    text.add_text("Imports", describe(imports))
    # With 64 colours the file has a quarter of the bytes.
    Image.open(content).convert("RGB").quantize(64).save(PICTURE, optimize=True, pnginfo=text)


if __name__ == "__main__":
    main()
