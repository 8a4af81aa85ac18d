"""Hooks of mkdocs that make pages written for GitHub work on the site too.

Two pages are added from the repository's root, and links that leave docs/ point to GitHub.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:  # noqa: ANN401
    """Add changelog and contributing guide, and the pictures that pages show from outside docs/."""
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    for page in list(files.documentation_pages()):
        for mark, _, target, _ in LINK.findall(page.content_string):
            place = posixpath.normpath(posixpath.join("docs", page.src_uri, "..", target))
            if mark and not place.startswith("docs/"):
                files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ANN401
    """Point links that leave docs/ to the repository, and pictures to their copies."""

    def redirect(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        place = posixpath.normpath(posixpath.join("docs", page.file.src_uri, "..", target))
        if ":" in target or place.startswith("docs/"):
            return match.group()
        if mark:
            target = posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")
        else:
            target = f"{config['extra']['repository']}/blob/main/{place}"
        return f"{mark}[{text}]({target}{anchor or ''})"

    return LINK.sub(redirect, markdown)
