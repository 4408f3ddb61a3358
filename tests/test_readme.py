"""The README and the pages in docs/ say what the code does."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from config_files import PROJECT, SCRIPT_CONFIGS

README = PROJECT / "README.md"
# Quotes flags and files that do not exist, to show what is said about them.
BAD_INPUT = PROJECT / "docs" / "bad_input.md"
PAGES = [README, *sorted((PROJECT / "docs").glob("*.md"))]
MOST_LINES_OF_README = 250
# What of the inline code is a command line of another program.
OTHER_PROGRAMS = ("pip ", "tensorboard ", "python -m ")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(page: Path) -> str:
    """Returns a page's text."""
    return page.read_text(encoding="utf-8")


def read_blocks(page: Path, language: str) -> list[str]:
    """Returns the code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", read(page), re.S)


def read_prose(page: Path) -> str:
    """Returns a page without its code blocks."""
    return re.sub(r"```.*?```", "", read(page), flags=re.S)


def read_inline_code(page: Path) -> list[str]:
    """Returns what a page's prose and tables hold between backticks."""
    return re.findall(r"`([^`\n]+)`", read_prose(page))


def list_script_calls(page: Path) -> list[tuple[str, list[str]]]:
    """Returns each call of a Python file in a page's shell and YAML blocks: the file and its arguments."""
    calls = []
    for block in read_blocks(page, "(?:bash|yaml)"):
        variables = dict(re.findall(r'(\w+)="([^"$]*)"', block))
        for part in re.split(r"&&|\|\||;|\n", block):
            for script, given in re.findall(r"\bpython (\S+\.py)\b(.*)", part):
                words = [variables[word[1:]] if word[0] == "$" else shlex.quote(word) for word in shlex.split(given)]
                calls.append((script, shlex.split(" ".join(words))))
    return calls


def list_links(page: Path) -> list[str]:
    """Returns where a page's pictures and links lead within the project."""
    targets = re.findall(r"\]\((\S+?)\)", read_prose(page))
    return [target for target in targets if not target.startswith("http")]


def list_anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", read_prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def list_names(module: Path) -> set[str]:
    """Returns the names that a module's top level binds: imports, functions, classes and assignments."""
    names = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and type(part.ctx) is ast.Store}
    return names


def test_readme_is_one_page():
    assert len(read(README).splitlines()) <= MOST_LINES_OF_README


@each_page
def test_every_command_parses(page):
    scripts = set()
    for script, arguments in list_script_calls(page):
        assert (PROJECT / script).is_file(), script
        if script in SCRIPT_CONFIGS:
            scripts.add(script)
            SCRIPT_CONFIGS[script].from_command_line(arguments=arguments)
    assert scripts == set(SCRIPT_CONFIGS) or page != README


@pytest.mark.parametrize("page", [page for page in PAGES if page != BAD_INPUT], ids=lambda page: page.name)
def test_every_flag_named_is_an_option(page):
    known = {
        name: set(script_configs.options()) | {"configs", "help"} for name, script_configs in SCRIPT_CONFIGS.items()
    }
    for code in read_inline_code(page):
        named = [options for script, options in known.items() if re.search(rf"\b{re.escape(script)}\b", code)]
        flags = set(re.findall(r"(?<!\S)--(\w+)", code)) if not code.startswith(OTHER_PROGRAMS) else set()
        assert flags <= set.union(*(named or known.values())), code


@each_page
def test_every_picture_and_file_linked_exists(page):
    for target in list_links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not anchor or anchor in list_anchors(file), target


@each_page
def test_every_file_of_the_project_named_exists(page):
    for code in read_inline_code(page):
        path = re.fullmatch(r"((?:\.ci|benchmarks|data|docs|finetune|tests)/[\w/.]+|\w+\.(?:py|md|toml))", code)
        is_made = code.startswith(("data/images/", "data/image_cache")) or code == "MODEL_CARD.md"
        assert not path or is_made or (PROJECT / code).exists(), code


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [(page.parent / link.partition("#")[0]).resolve() for link in list_links(page)]
    assert set(PAGES) <= reached


@each_page
def test_every_import_of_the_python_examples_exists(page):
    for block in read_blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            for module in [alias.name for alias in node.names] if isinstance(node, ast.Import) else []:
                assert not module.startswith("finetune") or (PROJECT / f"{module.replace('.', '/')}.py").is_file()
            if isinstance(node, ast.ImportFrom):
                file = PROJECT / f"{node.module.replace('.', '/')}.py"
                assert not node.module.startswith("finetune") or file.is_file(), node.module
                assert not file.is_file() or {alias.name for alias in node.names} <= list_names(file), node.module
