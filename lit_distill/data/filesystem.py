"""Access to files by path or by any URL that fsspec supports (s3://, hf://, memory://, ...)."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lit_distill.data.arrow_files import read_cell, split_reference

THREADS = 16
"""Number of threads that read files: enough for an object store, harmless on a local disk."""


def is_url(path: str) -> bool:
    """Return whether a path is a URL, as in s3://bucket/key."""
    return "://" in path


def parent(path: str) -> str:
    """Return the folder of a file, "." for a bare name."""
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def join(base: str, name: str) -> str:
    """Join a file name to `base`, unless it is an absolute path or a URL."""
    return name if is_url(name) or name.startswith("/") else f"{base.rstrip('/')}/{name}"


def is_outside(base: str, name: str) -> bool:
    """Return whether `name` is outside of `base`, by its spelling: links are not followed."""
    if ".." not in name and not is_url(name) and not name.startswith("/"):
        return False  # the common case, fast for millions of rows
    root, path = (_normalize(each) for each in (base, join(base, name)))
    return not path.startswith(root.rstrip("/") + "/")


def _normalize(path: str) -> str:
    protocol, separator, rest = path.rpartition("://")
    if separator:
        # The leading slash keeps ".." from removing the protocol.
        return protocol + separator + posixpath.normpath("/" + rest)
    return os.path.abspath(path)  # noqa: PTH100


@contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file or URL, or a file that is embedded in a table, for reading bytes.

    Raises:
        OSError: If it can't be read, or is a pipe or a device, for which reading might never end.
        ImportError: If the URL's protocol needs a package that is not installed; names it.
    """
    if cell := split_reference(str(path)):
        yield io.BytesIO(read_cell(*cell))
        return
    if not is_url(str(path)):
        mode = os.stat(path).st_mode  # noqa: PTH116 - a Path object for each row is slow
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(errno.EINVAL, "Not a regular file, but a pipe or a device", str(path))
        with Path(path).open("rb") as stream:
            yield stream
        return
    import fsspec

    with fsspec.open(str(path), "rb") as stream:
        yield stream


def files_exist(paths: Sequence[str]) -> list[bool]:
    """Return for each path whether the file exists, with one listing per folder."""
    folders = list({parent(path) for path in paths})
    with ThreadPoolExecutor(THREADS) as pool:
        names = dict(zip(folders, pool.map(_list_files, folders), strict=True))
    return [path.rpartition("/")[2] in names[parent(path)] for path in paths]


def _list_files(folder: str) -> set[str]:
    """Return the names of the files in a folder, empty if there is no such folder."""
    try:
        if not is_url(folder):
            with os.scandir(folder) as entries:
                return {entry.name for entry in entries if not entry.is_dir()}
        import fsspec

        system, path = fsspec.url_to_fs(folder)
        return {str(name).rpartition("/")[2] for name in system.ls(path, detail=False)}
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return set()
        raise


def file_signature(path: str) -> tuple[Any, ...]:
    """Return path, size and modification mark of a file or URL, to detect changes.

    Those of an embedded file are its table's.
    """
    if cell := split_reference(path):
        return path, *file_signature(cell[0])
    if is_url(path):
        import fsspec

        system, inner = fsspec.url_to_fs(path)
        info = system.info(inner)
        marks = [info[k] for k in ("ETag", "mtime", "LastModified", "created") if k in info]
        return path, info["size"], str(marks)
    status = os.stat(path)  # noqa: PTH116 - a Path object for each row is slow
    return path, status.st_size, status.st_mtime_ns


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of the content of a file or URL, in hexadecimal; it is read every time."""
    digest = hashlib.sha256()
    with open_file(path) as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


known_digests: dict[tuple[Any, ...], str] = {}
"""Digests of the contents that this process has read, by path, size and modification mark."""


def content_digest(path: str) -> str:
    """Return the SHA-256 of the content of a file or URL, in hexadecimal.

    A file is read once in each process, unless its size or modification mark changes.

    Raises:
        OSError: If it can't be read.
    """
    signature = file_signature(path)
    if signature not in known_digests:
        known_digests[signature] = sha256_of(path)
    return known_digests[signature]


def content_digests(paths: Sequence[str]) -> Iterator[str]:
    """Yield the digest of each file, see `content_digest`; several threads read them."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(content_digest, paths)
