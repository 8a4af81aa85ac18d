"""The package's wings import one way, and no file imports in a circle."""

import ast

import pytest
from conftest import ROOT

import lit_distill

PACKAGE = ROOT / "lit_distill"

# Each wing may import itself and the wings before it.
WINGS = [
    "compute",
    "data",
    "pipelines",
    "adapters",
    "encoding",
    "teacher",
    "evaluation",
    "preflight",
    "planning",
    "training",
    "export",
    "report",
    "commands",
]


def files():
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path):
    """Modules of the package that a file imports, inside functions too."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    froms = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    inside = {
        name.removeprefix("lit_distill.") for name in froms if name.startswith("lit_distill.")
    }
    return inside & {name_of(other) for other in files()}


def test_every_folder_is_a_wing_that_says_what_it_is():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(WINGS)
    for wing in WINGS:
        text = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text()))
        assert text and len(text) > 60, wing
        assert not (ROOT / "tests" / wing).is_file() and (ROOT / "tests" / wing).is_dir(), wing


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_the_wings_before_it(wing):
    allowed = {*WINGS[: WINGS.index(wing) + 1], "errors", "version"}
    for path in (PACKAGE / wing).rglob("*.py"):
        upward = {name for name in imports(path) if name.split(".")[0] not in allowed}
        assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_no_file_imports_in_a_circle():
    graph = {name_of(path): imports(path) for path in files()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


def test_files_and_functions_are_short():
    for path in files():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - len(doc.splitlines())
                assert lines <= 50, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def test_public_names_are_importable():
    assert sorted(lit_distill.__all__) == sorted(set(lit_distill.__all__))
    for name in lit_distill.__all__:
        assert hasattr(lit_distill, name), name
