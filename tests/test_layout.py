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

import utils

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
SCRIPTS_WITHOUT_A_MODEL = ("make_csv_from_folders", "split_train_test", "plot_training_log")
MODULES = ("configs", "augmenter", "generator", "model", "utils")
OTHERS = ("data", "docs", "benchmarks", "tests", "finetune", "README.md", "LICENSE")
OTHERS += ("requirements.txt", "requirements-gpu.txt", "requirements-hub.txt", ".gitignore", "pyproject.toml", ".ci")
ROOT = {*(f"{name}.py" for name in SCRIPTS + MODULES), *OTHERS}
# Needed by few users or on one system only; imported where they are needed.
OPTIONAL_PACKAGES = {"tf2onnx", "onnxruntime", "ai_edge_litert", "pillow_heif", "keras_hub", "kagglehub"}
# Takes 0.1 s to import, and only images with URLs need it.
LATE_PACKAGES = {"fsspec"}
PLATFORM_MODULES = {"fcntl", "msvcrt"}
# Recognises model files before TensorFlow is loaded, and names the package that a format lacks.
REGISTRY = "finetune.models.formats"
FOLDERS_WITH_LIMITS = ("finetune", "benchmarks")
FILES = [
    *PROJECT.glob("*.py"),
    *(path for name in (*FOLDERS_WITH_LIMITS, "docs", "data") for path in (PROJECT / name).rglob("*.py")),
]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
LINES = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
MOST_LINES = 450
MOST_LINES_AT_THE_MEDIAN = 250
MOST_LINES_OF_UTILS, MOST_LINES_OF_A_SCRIPT = 150, 200
MOST_LINES_OF_A_FUNCTION = 50
MOST_PARAMETERS, MOST_PARAMETERS_OF_A_CLASS = 6, 8
# Names that users call, and data without steps of its own: options, the facts of a batch, a row of a ranking, a file.
MANY_PARAMETERS = {"define", "classify_image", "ImageBatches", "Candidate", "Photos", "Decision"}
TEMPLATES = {".html", ".css", ".js", ".md"}


def walk_with_parents(node: ast.AST, parents: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """Yields each node of a tree with its parents, the outermost first."""
    yield node, parents
    for child in ast.iter_child_nodes(node):
        yield from walk_with_parents(child, (*parents, node))


def is_around_imports(node: ast.AST) -> bool:
    """Returns whether a node is `if TYPE_CHECKING:` or `with hiding_stderr():`."""
    if isinstance(node, ast.With):
        return ast.unparse(node.items[0]) == "hiding_stderr()"
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def awaits_failure(node: ast.AST) -> bool:
    """Returns whether an import in a node may fail: `except ImportError`, or `with importing(...)`."""
    if isinstance(node, ast.Try):
        return any("ImportError" in ast.unparse(handler.type or ast.Name("")) for handler in node.handlers)
    return isinstance(node, ast.With) and any(ast.unparse(item).startswith("importing(") for item in node.items)


def list_packages(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Returns the top-level packages of an import."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names}


def is_in_main(parents: tuple[ast.AST, ...]) -> bool:
    """Returns whether a node is in a file's `main`, and not in a function inside it."""
    functions = [node for node in parents if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
    return [getattr(function, "name", "") for function in functions] == ["main"]


def test_modules_import_only_from_below():
    faults = {}
    for module, imports in IMPORTS.items():
        own = name_part(module)
        allowed = {*ORDER[: ORDER.index(own)]} if own in ORDER else {*ORDER}
        faults[module] = {name_part(other) for other in imports} - {own} - allowed
    assert {module: parts for module, parts in faults.items() if parts} == {}
    assert [script for script in SCRIPTS if IMPORTS[script] & {*SCRIPTS}] == []
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


def test_subpackages_have_a_short_docstring_no_code_and_tests():
    paths = sorted((PROJECT / "finetune").glob("*/__init__.py"))
    assert {path.parent.name for path in paths} == {name for name in ORDER if name not in MODULES}
    for path in paths:
        assert len(TREES[path].body) == 1, path
        assert 2 <= len(ast.get_docstring(TREES[path]).splitlines()) <= 5, path
        assert list((PROJECT / "tests" / path.parent.name).glob("test_*.py")), path


def test_root_holds_only_what_users_run_and_edit():
    listing = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("no git checkout")
    assert {path.split("/")[0] for path in listing.stdout.splitlines()} == ROOT


def test_files_are_short():
    limits = {PROJECT / f"{script}.py": MOST_LINES_OF_A_SCRIPT for script in SCRIPTS}
    limits[PROJECT / "utils.py"] = MOST_LINES_OF_UTILS
    assert {path: lines for path, lines in LINES.items() if lines > limits.get(path, MOST_LINES)} == {}
    assert statistics.median(LINES[path] for path in PATHS.values()) <= MOST_LINES_AT_THE_MEDIAN


def test_scripts_have_a_main():
    for script in SCRIPTS:
        assert "main" in [getattr(node, "name", "") for node in TREES[PROJECT / f"{script}.py"].body], script


@pytest.mark.slow
def test_scripts_without_a_model_do_not_wait_for_tensorflow():
    names = ", ".join(sorted(set.union(*(IMPORTS[script] for script in SCRIPTS_WITHOUT_A_MODEL))))
    command = f"import sys; import {names}; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=PROJECT, check=True)


def test_functions_are_short():
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                start = min(part.lineno for part in (node, *node.decorator_list))
                found.append((path.name, node.name, node.end_lineno - start + 1))
    assert [one for one in found if one[-1] > MOST_LINES_OF_A_FUNCTION] == []


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


def test_functions_and_classes_take_few_parameters():
    faults = {}
    for path, tree in TREES.items():
        if path.relative_to(PROJECT).parts[0] in FOLDERS_WITH_LIMITS or path.parent == PROJECT:
            for name, count, most in list_parameters(tree):
                if count > most and name not in MANY_PARAMETERS:
                    faults[path.name, name] = count
    assert faults == {}


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


def find_misplaced_imports(module: str) -> Iterator[ast.AST]:
    """Yields the imports of a module that neither stand at its top nor have a reason not to."""
    of_format = {"finetune"} if module == REGISTRY else OPTIONAL_PACKAGES if module in IMPORTS[REGISTRY] else set()
    for node, parents in walk_with_parents(TREES[PATHS[module]]):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        packages = list_packages(node)
        is_at_top = len(parents) == 1 or (len(parents) == 2 and is_around_imports(parents[1]))
        is_of_script = module in SCRIPTS and is_in_main(parents)
        is_rare = packages <= OPTIONAL_PACKAGES | PLATFORM_MODULES and any(map(awaits_failure, parents))
        if not (is_at_top or is_of_script or is_rare or packages <= LATE_PACKAGES or packages <= of_format):
            yield node


def find_code_before_imports(tree: ast.Module) -> Iterator[ast.AST]:
    """Yields imports after other code than a docstring, imports for types and imports that may fail."""
    is_over = False
    for number, node in enumerate(tree.body):
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if is_import and is_over:
            yield node
        is_docstring = number == 0 and isinstance(node, ast.Expr)
        is_over = is_over or not (is_import or is_docstring or is_around_imports(node) or awaits_failure(node))


def find_hidden_imports(tree: ast.Module) -> Iterator[ast.AST]:
    """Yields calls that import modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("__import__", "import_module"):
            yield node


def test_imports_stand_at_the_top():
    faults = []
    for module, path in PATHS.items():
        tree = TREES[path]
        for node in (*find_misplaced_imports(module), *find_code_before_imports(tree), *find_hidden_imports(tree)):
            faults.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
    assert faults == []


def test_configs_hold_constants_and_options_alone():
    for node in TREES[PROJECT / "configs.py"].body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_constant = isinstance(node, ast.Assign) and all(ast.unparse(target).isupper() for target in node.targets)
        is_options = isinstance(node, ast.ClassDef) and node.name == "Configs"
        assert is_docstring or is_constant or is_options or isinstance(node, ast.Import | ast.ImportFrom), node.lineno
        for option in node.body[1:] if is_options else []:
            assert isinstance(option, ast.AnnAssign), option.lineno
            assert ast.unparse(option.value).startswith("define("), option.lineno


def test_templates_are_files_of_their_own_kind():
    assert {path.suffix for path in (PROJECT / "finetune" / "reporting" / "templates").iterdir()} >= TEMPLATES


PROMISED = {"custom_load_model", "custom_save_model", "classify_image", "load_model", "get_generator", "get_optimizer"}
PROMISED |= {"set_gpu_usage", "get_class_weights", "get_multilabel_class_weights"}
PROMISED |= {"get_evaluation_metrics", "get_multilabel_evaluation_metrics"}


def test_public_names_are_exported_from_their_modules():
    assert set(utils.__all__) >= PROMISED
    assert sorted(utils.__all__) == utils.__all__
    for name in utils.__all__:
        assert getattr(utils, name).__module__.startswith(("finetune.", "generator")), name
