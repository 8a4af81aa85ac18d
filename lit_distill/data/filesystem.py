"""Files by path or by URL: what fsspec reads (s3://, hf://, memory://, ...) is read here."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

THREADS = 16
"""Files that are waited for at the same time: enough for an object store, harmless on a disk."""


def is_url(path: str) -> bool:
    """Whether a path names its file system, as in s3://bucket/key."""
    return "://" in path


def parent(path: str) -> str:
    """Return the folder of a file, "." for a bare name."""
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def join(base: str, name: str) -> str:
    """Return where `name` is, relative to `base` unless it is absolute or a URL itself."""
    return name if is_url(name) or name.startswith("/") else f"{base.rstrip('/')}/{name}"


def leaves(base: str, name: str) -> bool:
    """Whether `name` is outside of `base`, by its spelling; links are the owner's own choice."""
    if ".." not in name and not is_url(name) and not name.startswith("/"):
        return False  # what a million rows look like
    root, place = (_normal(path) for path in (base, join(base, name)))
    return not place.startswith(root.rstrip("/") + "/")


def _normal(path: str) -> str:
    protocol, separator, rest = path.rpartition("://")
    if separator:
        # The leading slash keeps ".." from climbing into the protocol.
        return protocol + separator + posixpath.normpath("/" + rest)
    return os.path.abspath(path)  # noqa: PTH100


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes.

    Raises:
        OSError: If it can't be read.
        ImportError: If its protocol needs a package that is not installed, naming it.
    """
    if not is_url(str(path)):
        with Path(path).open("rb") as stream:
            yield stream
        return
    import fsspec

    with fsspec.open(str(path), "rb") as stream:
        yield stream


def exist(paths: Sequence[str]) -> list[bool]:
    """Return which files exist, in one listing a folder instead of one question a file."""
    folders = list({parent(path) for path in paths})
    with ThreadPoolExecutor(THREADS) as pool:
        names = dict(zip(folders, pool.map(_names, folders), strict=True))
    return [path.rpartition("/")[2] in names[parent(path)] for path in paths]


def _names(folder: str) -> set[str]:
    """Return the names of a folder's files; none if there is no such folder."""
    try:
        if not is_url(folder):
            with os.scandir(folder) as entries:
                return {entry.name for entry in entries if not entry.is_dir()}
        import fsspec

        system, path = fsspec.url_to_fs(folder)
        return {str(name).rpartition("/")[2] for name in system.ls(path, detail=False)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def file_facts(path: str) -> tuple[Any, ...]:
    """Return what tells that a file, a local one or any fsspec URL, is still the same."""
    if is_url(path):
        import fsspec

        system, inner = fsspec.url_to_fs(path)
        info = system.info(inner)
        changed = next(info[k] for k in ("ETag", "mtime", "LastModified", "created") if k in info)
        return path, info["size"], str(changed)
    status = os.stat(path)  # noqa: PTH116 - a Path object a row is what costs here
    return path, status.st_size, status.st_mtime_ns
