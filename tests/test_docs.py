"""The README and the pages of docs/ and benchmarks/ agree with the code; their commands run."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from config_files import PROJECT, SCRIPT_CONFIGS
from PIL import Image

from finetune.data.findings import KINDS

README, DOCS = PROJECT / "README.md", PROJECT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md")), *sorted((PROJECT / "benchmarks").glob("*.md"))]
MOST_LINES_OF_README, MOST_WORDS_OF_DOCS = 200, 11_850
MOST_WORDS = {"better_models.md": 900, "bad_input.md": 900, "abstaining.md": 700}
# Inline code that is a command line of another program.
OTHER_PROGRAMS = ("pip ", "tensorboard ", "python -m ", "python benchmarks/")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))


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
    """Returns the inline code of a page's prose and tables."""
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
    """Returns the targets of a page's pictures and links within the project."""
    targets = re.findall(r"\]\((\S+?)\)", read_prose(page))
    return [target for target in targets if not target.startswith("http")]


def list_anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", read_prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def list_definitions(module: Path) -> set[str]:
    """Returns the names of a module's top level, imports included, and `Class.method`."""
    names = set()
    for node in ast.parse(read(module)).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names |= {node.name, *(f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name"))}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


def test_pages_are_short():
    assert len(read(README).splitlines()) <= MOST_LINES_OF_README
    words = {page.name: len(read(page).split()) for page in DOCS.glob("*.md")}
    assert sum(words.values()) <= MOST_WORDS_OF_DOCS, words
    assert all(words[name] <= most for name, most in MOST_WORDS.items()), words


# Commands, options, files and links


@each_page
def test_every_command_parses(page):
    scripts = set()
    for script, arguments in list_script_calls(page):
        assert (PROJECT / script).is_file(), script
        if script in SCRIPT_CONFIGS:
            scripts.add(script)
            SCRIPT_CONFIGS[script].from_command_line(arguments=arguments)
    assert scripts == set(SCRIPT_CONFIGS) or page != README


@each_page
def test_every_flag_and_file_named_exists(page):
    known = {name: {*script_configs.options(), "configs", "help"} for name, script_configs in SCRIPT_CONFIGS.items()}
    # Flags of the benchmarks' own programs are in their pages alone.
    checks_flags = page.parent.name != "benchmarks"
    for code in read_inline_code(page):
        named = [options for script, options in known.items() if re.search(rf"\b{re.escape(script)}\b", code)]
        flags = set(re.findall(r"(?<!\S)--(\w+)", code)) if not code.startswith(OTHER_PROGRAMS) else set()
        assert not checks_flags or flags <= set.union(*(named or known.values())), code
        path = re.fullmatch(r"((?:\.ci|benchmarks|data|docs|finetune|tests)/[\w/.]+|\w+\.(?:py|md|toml))", code)
        is_made = code.startswith(("data/images/", "data/image_cache", "data/training_set", "data/testing_set"))
        assert not path or is_made or code == "MODEL_CARD.md" or (PROJECT / code).exists(), code


@each_page
def test_every_link_leads_somewhere(page):
    for target in list_links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in list_anchors(file), target


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
            if isinstance(node, ast.ImportFrom):
                file = PROJECT / f"{node.module.replace('.', '/')}.py"
                assert not node.module.startswith("finetune") or file.is_file(), node.module
                assert not file.is_file() or {alias.name for alias in node.names} <= list_definitions(file), node.module


@pytest.mark.slow
def test_every_command_and_example_of_the_pages_runs(tmp_path):
    found = subprocess.run(
        [sys.executable, PROJECT / "tests" / "page_commands.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert (tmp_path / "saved_model" / "best_auroc.log").exists()


# What pages say of the code


def list_texts_of_the_code() -> str:
    """Returns the product's code, with texts of several lines joined."""
    files = [*PROJECT.glob("*.py"), *(PROJECT / "finetune").rglob("*.py")]
    return re.sub(r'"\s+f?"', "", "\n".join(map(read, files)))


def test_every_message_to_search_for_is_one_that_the_code_prints():
    texts, messages = list_texts_of_the_code(), re.findall(r"^\| `(.+?)`", read(DOCS / "troubleshooting.md"), re.M)
    assert len(messages) > 20
    for message in messages:
        # A finding's kind is printed without underscores.
        assert message.replace(" ", "_") in KINDS or all(part.strip() in texts for part in message.split("...")), (
            message
        )


def test_the_kinds_of_findings_are_those_of_the_data_check():
    rows = dict(re.findall(r"^\| (error|warning|note) \| (.*) \|$", read(DOCS / "bad_input.md"), re.M))
    for severity, row in rows.items():
        assert set(re.findall(r"`(\w+)`", row)) == {name for name, kind in KINDS.items() if kind.severity == severity}
    assert rows.keys() == {"error", "warning", "note"}


def test_options_page_is_current():
    made = runpy.run_path(str(DOCS / "make_options.py"))["make_page"]()
    assert read(DOCS / "options.md") == made, "run python docs/make_options.py"


def test_architecture_picture_is_current():
    program = runpy.run_path(str(DOCS / "draw_architecture.py"))
    with Image.open(program["PICTURE"]) as picture:
        assert picture.text["Imports"] == program["describe"](program["read_all_imports"]()), (
            "run python docs/draw_architecture.py"
        )
    imports = {"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": set()}
    assert program["list_direct_lines"](imports) == [("a", "b"), ("a", "d"), ("b", "c")]


def test_architecture_names_every_subpackage_and_only_what_exists():
    page = read(DOCS / "architecture.md")
    listed = re.findall(r"^\| `(\w+)/` \|", page, re.M)
    assert sorted(listed) == sorted(path.parent.name for path in (PROJECT / "finetune").glob("*/__init__.py"))
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (`.*?`) \|", page, re.M)
    places = re.findall(r"`(\w+)` of `([\w/]+\.py)`", " ".join(page.split()))
    assert len(rows) > 12
    assert len(places) > 10
    for file, names in [*rows, *((file, f"`{name}`") for name, file in places)]:
        assert set(re.findall(r"`([\w.]+)`", names)) <= list_definitions(PROJECT / file), file
