"""Uploads exports to the hub."""

from __future__ import annotations

import re
from pathlib import Path

from lit_distill.data.whole_files import MANIFEST_FILE
from lit_distill.errors import InputError

_READ = re.compile(r".*\.(safetensors|bin)|(.*/)?(\w*config|\w*index|lit_distill)\.json")
"""Files that a tool may read together with an export, and then generate other images."""


def upload(folder: Path, repo_id: str) -> None:
    """Upload an export to the hub, to a repository that is created if missing.

    Raises:
        InputError: If the repository holds weights or configurations of another export.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
    ours = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    others = sorted(set(api.list_repo_files(repo_id)) - ours)
    if stale := [name for name in others if _READ.fullmatch(name)]:
        raise InputError(
            f"{repo_id} holds {', '.join(stale[:5])}, which tools would read together with this "
            f"export; remove them there, or name another repository. The export is in {folder}"
        )
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message="Export of lit_distill",
        ignore_patterns=[MANIFEST_FILE],
    )
