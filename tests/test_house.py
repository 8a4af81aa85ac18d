"""The house is as CONTRIBUTING.md shows it."""

import ast
import re

from conftest import ROOT

PACKAGE = ROOT / "lit_distill"


def listed():
    """The modules of the table, from the top down."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)\.py`", row)]


def test_every_file_is_in_the_table_once():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert sorted(listed()) == sorted(files)


def test_a_file_imports_only_what_is_above_it():
    seen, below = set(), {}
    for name in listed():
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        at_import = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        imported = [node.module.split(".") for node in at_import]
        inside = {path[1] for path in imported if path[0] == "lit_distill" and len(path) > 1}
        below |= {name: inside - seen} if inside - seen else {}
        seen.add(name)
    assert below == {}
