"""The documentation is tried: its commands run, its links lead somewhere, its words are the code's.

A fenced block of README.md or docs/ is run, in the order of its page, in a folder that holds what a
reader has by then (`workspace`). A comment just before it, which no reader sees, says where that is
impossible, `<!-- needs: hub -->`; such blocks are parsed, by the command's own parser.
"""

import ast
import doctest
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import lightning.pytorch as pl
import pytest
import yaml
from conftest import ROOT

import lit_distill
from lit_distill import DirectDistill, DistillDataModule
from lit_distill.cli import DistillCLI, build_cli, main

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*differs from the checkpoint's:UserWarning"),
]
NEEDS = {
    "gpu": "more memory or speed than a CPU has",
    "hub": "weights, or an account, of a model hub",
    "install": "changes the environment: pip, make, git",
    "browser": "serves a page until it is interrupted",
    "reader": "an excerpt, or pseudo-code",
}
LANGUAGES = {"bash", "python", "yaml"}
PLAIN = {"", "csv", "text"}  # what a command prints, what a file holds
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[^>]*) -->\s*)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
SMALLER = {
    "generate": ["--limit", "4", "--batch_size", "4"],
    "fit": ["--trainer.max_steps", "4"],
    "test": ["--data.batch_size", "8"],
}
"""Appended to a command before it is run, so that all pages together take a minute."""


class Block(NamedTuple):
    """A fenced block: where it is, what it needs, what it is, what it says."""

    where: str
    needs: str
    language: str
    text: str


def blocks(page):
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        indent = len(match["indent"])
        body = "".join(line[indent:] for line in match["text"].splitlines(keepends=True))
        found.append(Block(f"{page.name}:{line}", match["needs"] or "", match["language"], body))
    return found


def prose(page):
    """A page without its blocks and comments."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def commands(block):
    """The commands of a bash block, one a logical line, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def test_every_block_says_what_it_is():
    everything = [block for page in PAGES for block in blocks(page)]
    fences = sum(page.read_text().count("```") for page in PAGES)
    assert 2 * len(everything) == fences and len(everything) > 40
    for where, needs, language, _ in everything:
        assert language in LANGUAGES | PLAIN, f"{where}: {language}"
        assert needs in ("", *NEEDS), f"{where}: needs {needs}; known are {list(NEEDS)}"
        assert language in LANGUAGES or not needs, f"{where}: nothing of it is run anyway"


# What is run


@pytest.fixture(scope="session")
def finished(pairs, tmp_path_factory):
    """What a reader has by and by: pairs, prompts, a config, a run, its checkpoint."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("assets", "benchmarks", "configs", "examples", "lit_distill", "scripts"):
        if (ROOT / name).exists():
            (place / name).symlink_to(ROOT / name)
    shutil.copytree(pairs, place / "data")
    shutil.copytree(pairs, place / "runs/digits")
    (place / "prompts.txt").write_text("a red handwritten seven on a blue background\n" * 4)
    config = yaml.safe_load((ROOT / "configs/tiny_lora.yaml").read_text())
    config["data"] |= {"metadata_path": "data/train/metadata.csv"}
    config["trainer"] |= {"log_every_n_steps": 1, "check_val_every_n_epoch": 1}
    config["data"] |= {"val_metadata_path": "data/heldout/metadata.csv"}
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(["fit", "--config", "run.yaml", "--trainer.max_steps", "2"])
    for name in ("best.ckpt", "last.ckpt"):
        shutil.copy(next(place.rglob(name)), place / name)
    for name in ("a", "b"):
        shutil.copytree(place / "runs/lightning_logs/version_0", place / "runs" / name)
    return place


@pytest.fixture
def workspace(finished, tmp_path, monkeypatch):
    place = tmp_path / "reader"
    shutil.copytree(finished, place, symlinks=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return place


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_what_a_page_says_works(page, workspace, monkeypatch):
    names = {"__name__": "__main__"}
    for block in blocks(page):
        try:
            if block.needs:
                check(block, monkeypatch)
            elif block.language == "bash":
                for line in commands(block):
                    run(line)
            elif block.language == "yaml":
                parses(yaml.safe_load(block.text), monkeypatch)
            elif block.language == "python":
                exec(compile(block.text, block.where, "exec"), names)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.where}: {type(error).__name__}: {error}") from error


def run(line):
    words = shlex.split(line, comments=True)
    if words[0] == "lit-distill":  # here, since starting a process takes longer than the command
        main([*words[1:], *SMALLER.get(words[1], [])])
    elif re.fullmatch(r"benchmarks/\w+\.py", words[min(1, len(words) - 1)]):
        known(words)  # minutes to hours of measuring
    else:
        subprocess.run(["bash", "-ec", line], check=True)


# What is not run


def check(block, monkeypatch):
    if block.language == "python":
        resolves(block.text)
    elif block.language == "yaml":
        parses(yaml.safe_load(block.text), monkeypatch)
    for line in commands(block) if block.language == "bash" else ():
        words = shlex.split(line, comments=True)
        if words[0] in ("lit-distill", "srun", "torchrun"):
            parse(words[words.index("lit-distill") + 1 :], monkeypatch)
        else:
            known(words)


class ParsedError(Exception):
    """The command line is understood; nothing was loaded yet."""


def parse(arguments, monkeypatch):
    def stop(self):
        raise ParsedError

    with monkeypatch.context() as patch, pytest.raises(ParsedError):
        patch.setattr(DistillCLI, "before_instantiate_classes", stop)
        patch.setattr(DistillCLI, "_parse_ckpt_path", lambda self: None)  # there is no such file
        build_cli(arguments)


def parses(config, monkeypatch):
    """Settings of YAML, in a file of their own."""
    Path("fragment.yaml").write_text(yaml.safe_dump(config))
    parse(["fit", "--config", "fragment.yaml"], monkeypatch)


def resolves(code):
    """Python compiles, and what it imports is there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                assert hasattr(importlib.import_module(node.module), name.name), name.name


def known(words):
    """A command of another program: its files, targets, extras and options exist."""
    words = [word for word in words if not re.fullmatch(r"\w+=\S*", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] == "pip":
        extras = yaml_of_extras()
        for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert extra in extras, f"{extra}: pyproject.toml has the extras {extras}"
    elif words[0] == "python":
        source = (ROOT / words[1]).read_text()
        for word in words[2:]:
            assert not word.startswith("--") or f'"{word}"' in source, f"{words[1]} has no {word}"
    else:
        assert words[0] in ("git", "cd", "source", "tensorboard", "hf"), (
            f"unknown command {words[0]}"
        )


def yaml_of_extras():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return re.findall(r"^(\w+) = \[", section, re.MULTILINE)


# Words and links


SETTINGS = {
    "model": set(inspect.signature(DirectDistill).parameters),
    "data": set(inspect.signature(DistillDataModule).parameters),
    "trainer": set(inspect.signature(pl.Trainer).parameters),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_that_a_page_names_exist(page):
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for group, name in re.findall(r"(?<![\w./])(model|data|trainer)\.(\w+)", code):
            assert name in (*SETTINGS[group], "py"), f"{page.name}: `{code}`"


@cache
def anchors(page):
    """The anchors that GitHub and the site give to a page's headings."""
    found = []
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        found.append(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    assert len(set(found)) == len(found), f"{page.name}: two headings of one name"
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        url = urlsplit(target)
        if url.scheme:
            assert url.scheme == "https" and "." in url.netloc, f"{page.name}: {target}"
            continue
        path = (page.parent / url.path).resolve() if url.path else page
        assert path.exists() and path.is_relative_to(ROOT), f"{page.name}: {target}"
        if url.fragment:
            assert url.fragment in anchors(path), f"{page.name}: {target}; {anchors(path)}"


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert "DirectDistill" in (tmp_path / "api.html").read_text()
    fetched = r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*\shref=\"(?:https?:)?//"
    for page in tmp_path.rglob("*.html"):
        assert not re.search(fetched, page.read_text()), page.name


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_the_examples_of_docstrings_are_right():
    with_examples = [
        path for path in (ROOT / "lit_distill").rglob("*.py") if ">>>" in path.read_text()
    ]
    for path in with_examples:
        done = doctest.testmod(
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        )
        assert done.attempted and not done.failed, path.name
    assert with_examples


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    assert citation["version"] == lit_distill.__version__
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    assert citation["repository-code"] in (ROOT / "pyproject.toml").read_text()
    assert all("name" in author or "family-names" in author for author in citation["authors"])


# Messages


def text_of(node):
    """A message as the source has it, `…` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


@cache
def sources():
    return [ast.parse(path.read_text()) for path in sorted((ROOT / "lit_distill").rglob("*.py"))]


def quoted():
    """The messages that the tables of the troubleshooting page quote."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)
    return [
        code.strip("…, ")
        for cell in cells
        for _, code in re.findall(r"(`+) ?(.+?) ?\1(?=, `|$)", cell)
    ]


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    texts = {text_of(node) for tree in sources() for node in ast.walk(tree)}
    gone = [m for m in quoted() if not any(part_of(m, text) for text in texts)]
    assert len(quoted()) > 100 and not gone


def part_of(message, text):
    # Where a message ends in something filled in, a quotation may go on with an example of it.
    pattern = ".*?".join(re.escape(part) for part in re.split("…", message))
    return re.search(pattern, text, re.DOTALL) is not None


def test_the_troubleshooting_page_knows_every_error_and_warning():
    raised = []
    for tree in sources():
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            if isinstance(node, ast.Raise) or name == "rank_zero_warn":
                raised.append((name, text_of(call.args[-1])))
    internal = {
        "_ReachedError",
        "EncodingCollateError",
        "PreflightError",
    }  # caught, or a list of others
    known = quoted()
    missing = [
        text
        for name, text in raised
        if name not in internal and sum(map(str.isalpha, text)) > 12
        if not any(part_of(message, text) for message in known)
    ]
    assert len(raised) > 100
    assert not missing, f"docs/troubleshooting.md quotes nothing of {missing}"
