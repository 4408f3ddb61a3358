"""The layout: what is where, what may import what, and how large a file or function may be."""

import ast
import runpy
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
# From the bottom up: a part imports only from those before it. Scripts and utils.py import from all of them.
ORDER = (
    *("core", "configs", "data", "loading", "augmenter", "generator", "models", "model"),
    *("evaluation", "training", "predicting", "exporting", "reporting", "studies"),
)
DRAWING = runpy.run_path(str(PROJECT / "docs" / "draw_architecture.py"))
name_part = DRAWING["name_part"]
PATHS: dict[str, Path] = DRAWING["list_modules"]()
IMPORTS = {module: DRAWING["read_imports"](path, set(PATHS)) - {module} for module, path in PATHS.items()}
SCRIPTS = (
    *("make_csv_from_folders", "split_train_test", "compare_backbones", "train", "test"),
    *("draw_activations", "plot_training_log", "compress_weights", "predict"),
    "find_label_errors",
)
MODULES = ("configs", "augmenter", "generator", "model", "utils")
OTHERS = (
    "data",
    "docs",
    "benchmarks",
    "tests",
    "finetune",
    "requirements.txt",
    "requirements-gpu.txt",
    "requirements-hub.txt",
    "README.md",
    "LICENSE",
)
ROOT = {*(f"{name}.py" for name in SCRIPTS + MODULES), *OTHERS, ".gitignore", "pyproject.toml", ".ci"}
# Installed by few, or of one system alone: imported where they are needed, or where they are missed.
OPTIONAL_PACKAGES = {"tf2onnx", "onnxruntime", "ai_edge_litert", "pillow_heif", "keras_hub", "kagglehub"}
# Takes 0.1 s to import, and only images that URLs name need it.
LATE_PACKAGES = {"fsspec"}
PLATFORM_MODULES = {"fcntl", "msvcrt"}
# It tells what a file is before TensorFlow is there, and which package a format misses.
REGISTRY = "finetune.models.formats"
FOLDERS_WITH_CODE = ("finetune", "benchmarks", "docs", "data")
FILES = [
    *sorted(PROJECT.glob("*.py")),
    *sorted(path for folder in FOLDERS_WITH_CODE for path in (PROJECT / folder).rglob("*.py")),
]
MOST_LINES = 470
MOST_LINES_AT_THE_MEDIAN = 250
FEWER_LINES_OF_UTILS = 150
FEWER_LINES_OF_A_SCRIPT = 200
MOST_LINES_OF_A_FUNCTION = 50
MOST_PARAMETERS, MOST_PARAMETERS_OF_A_CLASS = 6, 8
# What users call by these names, and data without steps of its own: options, a batch's facts, a row of a ranking.
MANY_PARAMETERS = {"define", "classify_image", "ImageBatches", "Candidate"}
FOLDERS_WITH_LIMITS = ("finetune", "benchmarks")
TEMPLATES = {".html", ".css", ".js", ".md"}
each_module = pytest.mark.parametrize("module", PATHS)
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
each_script = pytest.mark.parametrize("script", SCRIPTS)


def parse(path: Path) -> ast.Module:
    """Returns a file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def count_lines(path: Path) -> int:
    """Returns the lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def walk_with_parents(node: ast.AST, parents: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """Yields each node of a tree with the nodes that hold it, the outermost first."""
    yield node, parents
    for child in ast.iter_child_nodes(node):
        yield from walk_with_parents(child, (*parents, node))


def is_around_imports(node: ast.AST) -> bool:
    """Tells whether a node is `if TYPE_CHECKING:`, or hides what TensorFlow writes when it is loaded."""
    if isinstance(node, ast.With):
        return ast.unparse(node.items[0]) == "hiding_stderr()"
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def awaits_failure(node: ast.AST) -> bool:
    """Tells whether a node bears that an import in it fails: `except ImportError`, or `with importing(...)`."""
    if isinstance(node, ast.Try):
        return any("ImportError" in ast.unparse(handler.type or ast.Name("")) for handler in node.handlers)
    return isinstance(node, ast.With) and any(ast.unparse(item).startswith("importing(") for item in node.items)


def list_packages(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Returns the outermost packages that an import names."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names}


def is_in_main(parents: tuple[ast.AST, ...]) -> bool:
    """Tells whether something stands in a file's `main`, not in a function within that."""
    functions = [node for node in parents if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
    return [getattr(function, "name", "") for function in functions] == ["main"]


@each_module
def test_a_module_imports_only_from_below(module):
    own = name_part(module)
    imported = {name_part(other) for other in IMPORTS[module]} - {own}
    if own in ORDER:
        assert imported <= {*ORDER[: ORDER.index(own)]}, f"{module} imports {sorted(imported)}"
    else:
        assert imported <= {*ORDER}, f"{module} imports a script: {sorted(imported)}"


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()


def test_the_reader_of_imports_sees_all_of_them(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport configs as options\nimport finetune.core.files\n"
        "from finetune.data import images\nif TYPE_CHECKING:\n    from generator import Shares\n"
        "def main():\n    from finetune.core.options import define\n"
    )
    names = {"configs", "generator", "model", "finetune.core.files", "finetune.data.images", "finetune.core.options"}
    assert DRAWING["read_imports"](file, names) == names - {"model"}


@pytest.mark.parametrize("path", sorted((PROJECT / "finetune").rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_a_subpackage_says_what_it_owns_and_has_no_code(path):
    body = parse(path).body
    assert len(body) == 1
    assert 2 <= len(ast.get_docstring(parse(path)).splitlines()) <= 5


def test_tests_mirror_the_package():
    folders = {path.name for path in (PROJECT / "finetune").iterdir() if (path / "__init__.py").is_file()}
    assert folders == {name for name in ORDER if name not in MODULES}
    for folder in folders:
        assert list((PROJECT / "tests" / folder).glob("test_*.py")), folder


def test_root_holds_what_a_user_runs_and_edits_alone():
    listing = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("no git checkout")
    assert {path.split("/")[0] for path in listing.stdout.splitlines()} == ROOT


@each_file
def test_no_file_is_too_long(path):
    assert count_lines(path) <= MOST_LINES


def test_half_of_the_modules_are_short():
    assert statistics.median(map(count_lines, PATHS.values())) <= MOST_LINES_AT_THE_MEDIAN


def test_utils_is_short():
    assert count_lines(PROJECT / "utils.py") < FEWER_LINES_OF_UTILS


@each_script
def test_a_script_is_short_and_has_a_main(script):
    path = PROJECT / f"{script}.py"
    assert count_lines(path) < FEWER_LINES_OF_A_SCRIPT
    assert "main" in [node.name for node in parse(path).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("script", ["make_csv_from_folders", "split_train_test", "plot_training_log"])
def test_scripts_without_a_model_do_not_wait_for_tensorflow(script):
    names = ", ".join(sorted(IMPORTS[script] - {script}))
    command = f"import sys; import {names}; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=PROJECT, check=True)


@each_script
def test_a_script_imports_no_script(script):
    assert not IMPORTS[script] & {*SCRIPTS}


@each_file
def test_no_function_is_too_long(path):
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    # By name and line: a class may have methods of the same name as another one in its file.
    starts = [min(part.lineno for part in (one, *one.decorator_list)) for one in functions]
    sizes = {(one.name, start): one.end_lineno - start + 1 for one, start in zip(functions, starts, strict=True)}
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_FUNCTION} == {}


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> int:
    """Returns how many parameters a function has, without `self` or `cls`."""
    given, names = function.args, [ast.unparse(decorator) for decorator in function.decorator_list]
    count = len([*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))])
    return count - (is_method and "staticmethod" not in names)


def list_parameters(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Yields the name of each function and class, how many parameters it takes, and how many it may."""
    for node, parents in walk_with_parents(tree):
        is_method = bool(parents) and isinstance(parents[-1], ast.ClassDef)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_of_class = is_method and node.name == "__init__"
            name = parents[-1].name if is_of_class else node.name
            most = MOST_PARAMETERS_OF_A_CLASS if is_of_class else MOST_PARAMETERS
            yield name, count_parameters(node, is_method), most
        elif isinstance(node, ast.ClassDef):
            kinds = " ".join(map(ast.unparse, (*node.bases, *node.decorator_list)))
            # The fields of options are no parameters that anyone gives in a row.
            if ("NamedTuple" in kinds or "dataclass" in kinds) and not node.name.endswith("Configs"):
                fields = sum(isinstance(part, ast.AnnAssign) for part in node.body)
                yield node.name, fields, MOST_PARAMETERS_OF_A_CLASS


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.relative_to(PROJECT).parts[0] in FOLDERS_WITH_LIMITS or path.parent == PROJECT],
    ids=lambda path: str(path.relative_to(PROJECT)),
)
def test_no_function_or_class_takes_too_many_parameters(path):
    found = list_parameters(parse(path))
    assert {name: count for name, count, most in found if count > most and name not in MANY_PARAMETERS} == {}


def test_parameters_are_counted_without_self_and_with_those_of_any_kind():
    source = """
class One:
    def __init__(self, a, b): pass
    @classmethod
    def of(cls, a, /, *, b): pass
    @staticmethod
    def plain(a): pass
@dataclasses.dataclass
class Facts:
    a: int
    b: int = 1
def function(a, *rest, b=1, **more): pass
"""
    counts = {name: count for name, count, _ in list_parameters(ast.parse(source))}
    assert counts == {"One": 2, "of": 2, "plain": 1, "Facts": 2, "function": 4}


@each_module
def test_imports_stand_at_the_top(module):
    path, faults = PATHS[module], []
    for node, parents in walk_with_parents(parse(path)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        is_at_top = len(parents) == 1 or (len(parents) == 2 and is_around_imports(parents[1]))
        is_of_script = module in SCRIPTS and is_in_main(parents)
        is_rare = list_packages(node) <= OPTIONAL_PACKAGES | PLATFORM_MODULES and any(map(awaits_failure, parents))
        is_late = list_packages(node) <= LATE_PACKAGES
        of_format = {"finetune"} if module == REGISTRY else OPTIONAL_PACKAGES if module in IMPORTS[REGISTRY] else set()
        is_late = is_late or list_packages(node) <= of_format
        is_right = is_at_top or is_of_script or is_rare or is_late
        faults += [f"{path.name}:{node.lineno}: {ast.unparse(node)}"] * (not is_right)
    assert not faults


@each_module
def test_nothing_but_imports_stands_before_an_import(module):
    # What may stand between: a docstring, imports for types, and imports that may fail.
    is_over = False
    for number, node in enumerate(parse(PATHS[module]).body):
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        assert not (is_import and is_over), f"line {node.lineno}"
        is_docstring = number == 0 and isinstance(node, ast.Expr)
        is_over = is_over or not (is_import or is_docstring or is_around_imports(node) or awaits_failure(node))


@each_module
def test_no_import_hides_in_a_call(module):
    calls = [ast.unparse(node.func) for node in ast.walk(parse(PATHS[module])) if isinstance(node, ast.Call)]
    assert not {"__import__", "import_module", "importlib.import_module"} & {*calls}


def test_configs_hold_constants_and_options_alone():
    for node in parse(PROJECT / "configs.py").body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_constant = isinstance(node, ast.Assign) and all(ast.unparse(target).isupper() for target in node.targets)
        is_options = isinstance(node, ast.ClassDef) and node.name == "Configs"
        assert is_docstring or is_constant or is_options or isinstance(node, ast.Import | ast.ImportFrom), node.lineno
        for option in node.body[1:] if is_options else []:
            assert isinstance(option, ast.AnnAssign), option.lineno
            assert ast.unparse(option.value).startswith("define("), option.lineno


def test_templates_are_files_of_their_own_kind():
    assert {path.suffix for path in (PROJECT / "finetune" / "reporting" / "templates").iterdir()} >= TEMPLATES
