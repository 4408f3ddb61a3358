"""The pages of docs/ that programs write are of today, the architecture's page names what is there, commands run."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PROJECT = Path(__file__).resolve().parent.parent
DOCS = PROJECT / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
# Pages whose commands run one after another; those of the README run in the tests of the walkthrough.
PAGES_WITH_COMMANDS = ("data.md", "backbones.md", "label_errors.md", "better_models.md", "run_folder.md", "export.md")


def list_script_commands(page: Path) -> list[str]:
    """Returns the lines of a page's shell blocks that run one of the root's scripts."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.splitlines() if re.match(r"python \w+\.py", line)]


def list_definitions(path: Path) -> set[str]:
    """Returns the functions, classes, methods (`Class.method`) and constants of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


def test_options_page_is_what_its_program_makes():
    made = runpy.run_path(str(DOCS / "make_options.py"))["make_page"]()
    assert (DOCS / "options.md").read_text(encoding="utf-8") == made, "run python docs/make_options.py"


def test_picture_of_the_architecture_shows_the_imports_of_today():
    house = runpy.run_path(str(DOCS / "draw_architecture.py"))
    with Image.open(house["PICTURE"]) as picture:
        assert picture.text["Imports"] == house["describe"](house["read_all_imports"]()), (
            "run python docs/draw_architecture.py"
        )


def test_lines_that_others_imply_are_left_out():
    list_direct_lines = runpy.run_path(str(DOCS / "draw_architecture.py"))["list_direct_lines"]
    imports = {"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": set()}
    assert list_direct_lines(imports) == [("a", "b"), ("a", "d"), ("b", "c")]


def test_architecture_names_every_subpackage():
    listed = re.findall(r"^\| `(\w+)/` \|", ARCHITECTURE, re.M)
    assert sorted(listed) == sorted(path.parent.name for path in (PROJECT / "finetune").glob("*/__init__.py"))


def test_every_step_of_the_two_walks_exists():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (`.*?`) \|", ARCHITECTURE, re.M)
    assert len(rows) == 15
    for file, names in rows:
        assert set(re.findall(r"`([\w.]+)`", names)) <= list_definitions(PROJECT / file), file


def test_every_place_for_something_new_exists():
    text = " ".join(ARCHITECTURE.split("## Where to put something new")[1].split())
    places = re.findall(r"`(\w+)`(?:(?:,| or| and)? `(\w+)`)? of `([\w/]+\.py)`", text)
    assert len(places) >= 9
    for first, second, file in places:
        assert {first, second} - {""} <= list_definitions(PROJECT / file), file


def write_label_table(folder):
    """Writes labels.csv for the photos of a data folder: their names without endings, and a column a class."""
    photos, names = sorted(folder.glob("images/*/*.jpg")), ["brick", "grass", "gravel"]
    rows = [
        [f"{photo.parent.name}/{photo.stem}", *(str(int(photo.parent.name == name)) for name in names)]
        for photo in photos
    ]
    text = "\n".join(",".join(row) for row in [["id", *names], *rows])
    (folder / "labels.csv").write_text(f"{text}\n", encoding="utf-8")


def write_corrections(folder):
    """Writes corrections.csv, as the page of suspects saves it, which marks the first label of a table as right."""
    path, label = (folder / "data" / "all_data.csv").read_text(encoding="utf-8").splitlines()[1].split(",")
    lines = f"row,path,given_label,mark,corrected_label\n2,{path},{label},right,{label}\n"
    (folder / "corrections.csv").write_text(lines, encoding="utf-8")


def move_model_away(folder):
    """Puts an exported model, its labels and a photo where nothing else says what the model is."""
    for name in ("best_model.tflite", "best_model_labels.txt"):
        shutil.copy(folder / "saved_model" / name, folder / name)
    shutil.copy(next((folder / "data" / "images").rglob("*.jpg")), folder / "photo.jpg")


@pytest.mark.slow
def test_every_command_of_the_pages_runs(tmp_path):
    for path in [*PROJECT.glob("*.py"), PROJECT / "data", PROJECT / "finetune"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    write_label_table(tmp_path / "data")
    # Training is cut short, and nothing is downloaded; the rest is as the pages have it.
    small = (
        "--visual_model_name MobileNet --use_imagenet_weights False --pop_conv_layers 66 --image_target_size 32 32 3"
    )
    for page in PAGES_WITH_COMMANDS:
        commands = list_script_commands(DOCS / page)
        assert commands
        for command in commands:
            words = command.split()[1:]
            if words[0] == "train.py":
                epochs = 2 if "--load_model_path" in words else 1
                words += [*small.split(), "--num_epochs", str(epochs), "--min_steps", "0", "--overwrite", "True"]
            if words[0] == "compare_backbones.py":
                small_comparison = "--use_imagenet_weights False --pop_conv_layers 66 --backbones MobileNet"
                words += [*small_comparison.split(), "--image_sizes", "32", "--max_images", "20"]
            if words[0] == "find_label_errors.py" and "--load_model_path" not in words:
                words += small.split()
            if "--apply" in words:
                write_corrections(tmp_path)
            if "best_model.tflite" in words:
                move_model_away(tmp_path)
                words = ["32" if word == "224" else word for word in words]
            if words[0] == "compress_weights.py":
                # So little training leaves answers that rounding changes.
                words += ["--tolerance", "100"]
            found = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=600)
            assert found.returncode == 0, f"{page}: {command}\n{found.stderr}"
