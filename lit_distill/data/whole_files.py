"""Files that are whole or absent, and a record of which files of a folder are ours.

Every file of this package is written here: under a temporary name of its own in the same folder,
synced to the disk, then renamed. A crash or a power cut leaves the old file or the new one, and two
writers never share a temporary name.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from lit_distill.data.filesystem import sha256_of

MANIFEST_FILE = ".lit_distill.json"
"""Lists the files that this package has written to a folder, with their sizes and SHA-256."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def write_file(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file that appears only once it is complete and on the disk.

    Args:
        path: The file; its folder is made if missing.
        content: Its bytes, or a function that writes them to a stream.

    Raises:
        OSError: If it can't be written, naming the file and the reason. Nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            if isinstance(content, bytes):
                stream.write(content)
            else:
                content(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"{path} can't be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_image(path: str | Path, image: Any) -> None:  # noqa: ANN401
    """Write a `PIL.Image.Image` as a PNG file; see `write_file`."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    write_file(path, content.getvalue())


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk, where the system can."""
    with suppress(OSError):  # Windows, and some network file systems, can't
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporary_files(folder: Path, older_than: float = 0) -> None:
    """Remove what a killed `write_file` has left in a folder.

    Args:
        folder: The folder.
        older_than: Age in seconds, if other processes may be writing to the folder.
    """
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):  # gone by now, or not ours to remove
                if time.time() - path.stat().st_mtime >= older_than:
                    path.unlink()


class Manifest:
    """The files that this package has written to a folder.

    Args:
        folder: The folder; it need not exist.
        file: Name of the file that records them. Commands that may write to one folder use
            different names: what one has written is not the other's.

    Attributes:
        files: Size and SHA-256 of each file, by its name relative to the folder.
    """

    def __init__(self, folder: str | Path, file: str = MANIFEST_FILE) -> None:
        self.folder = Path(folder)
        self.file = file
        self.files: dict[str, dict[str, Any]] = {}
        # A damaged manifest claims nothing.
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            text = (self.folder / self.file).read_text(encoding="utf-8")
            entries = json.loads(text)["files"]
            self.files = {
                str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
                for name, entry in entries.items()
                if ".." not in Path(name).parts and not Path(name).is_absolute()
            }

    def foreign(self, names: Iterable[str] | None = None) -> list[str]:
        """Return the files that somebody else has written, or has changed since.

        Args:
            names: Files to look at, relative to the folder; default: all files in it.
        """
        if names is None:
            paths = sorted(path for path in self.folder.rglob("*") if not path.is_dir())
            names = [path.relative_to(self.folder).as_posix() for path in paths]
        return [
            name
            for name in names
            if name != self.file and os.path.lexists(self.folder / name) and not self._is_ours(name)
        ]

    def _is_ours(self, name: str) -> bool:
        entry, path = self.files.get(name), self.folder / name
        if entry is None or path.is_symlink() or not path.is_file():
            return False
        return bool(path.stat().st_size == entry["size"] and sha256_of(path) == entry["sha256"])

    def remove_files(self) -> None:
        """Remove our files, and folders that are empty then; files of others stay."""
        ours = [name for name in self.files if self._is_ours(name)]
        for name in ours:
            (self.folder / name).unlink()
        for parent in sorted({(self.folder / name).parent for name in ours}, reverse=True):
            while parent != self.folder and parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
                parent = parent.parent
        self.files = {}
        (self.folder / self.file).unlink(missing_ok=True)

    def save(self, names: Iterable[str] | None = None) -> None:
        """Record files as ours.

        Args:
            names: Files, relative to the folder; default: all files in it.
        """
        if names is None:
            paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
            names = [path.relative_to(self.folder).as_posix() for path in paths]
        for name in names:
            if name != self.file:
                path = self.folder / name
                self.files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        text = json.dumps({"written_by": "lit_distill", "files": self.files}, indent=1)
        write_file(self.folder / self.file, (text + "\n").encode())
