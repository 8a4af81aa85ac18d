"""What makes pages that are right on GitHub right on the site too; mkdocs runs it (`hooks`).

The changelog stays where GitHub shows it, and links that leave docs/ lead to the repository.
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
    """Add the changelog and the pictures that pages show from elsewhere in the repository."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changelog))
    for page in list(files.documentation_pages()):
        for mark, _, target, _ in LINK.findall(page.content_string):
            place = posixpath.normpath(posixpath.join("docs", page.src_uri, "..", target))
            if mark and not place.startswith("docs/"):
                files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ANN401
    """Let links out of docs/ lead to the repository, and pictures to their copies."""

    def lead(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        place = posixpath.normpath(posixpath.join("docs", page.file.src_uri, "..", target))
        if ":" in target or place.startswith("docs/"):
            return match.group()
        if mark:
            target = posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")
        else:
            target = f"{config['repo_url']}/blob/main/{place}"
        return f"{mark}[{text}]({target}{anchor or ''})"

    return LINK.sub(lead, markdown)
