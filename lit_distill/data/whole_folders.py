"""Folders whose content changes as a whole: drafts, their publication, and locks.

New content is written to a hidden draft beside the folder and put in place once it is complete.
Only files that this package has written are replaced or removed; see `whole_files.Manifest`.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_distill.data.whole_files import MANIFEST_FILE, Manifest, sync_folder
from lit_distill.errors import InputError

_DRAFT = re.compile(r"\..+\.[0-9a-f]{32}\.draft(/.*)?", re.DOTALL)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep other processes out of a folder until the context is left or this process ends.

    Yields:
        Whether they are kept out: some systems and network file systems have no locks.

    Raises:
        InputError: If another process holds the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    held = True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is writing to {folder}; wait for it, or name another folder"
            ) from error
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def draft_of(folder: str | Path) -> Iterator[Path]:
    """Make a hidden folder for the new content of a folder; it is removed at the end.

    It lies beside the folder, or in it if that can't be renamed. Drafts of killed processes are
    removed.

    Raises:
        OSError: If it can't be made; names the folder.
    """
    target = Path(folder).resolve()
    place = target if _is_fixed(target) else target.parent
    draft = place / f".{target.name}.{uuid.uuid4().hex}.draft"
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, f"{folder} can't be written: {error.strerror}") from error
    try:
        with locked(draft):
            for other in place.glob(f".{target.name}.*.draft"):
                if _DRAFT.fullmatch(other.name) and other != draft:
                    with suppress(InputError, OSError), locked(other) as abandoned:
                        if abandoned:
                            shutil.rmtree(other)
            yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_fixed(folder: Path) -> bool:
    """Return whether a folder can't be renamed: a mount, or in use as the current folder."""
    if not folder.is_dir():
        return False
    in_use = folder in (Path.cwd(), *Path.cwd().parents)
    return folder.is_mount() or in_use or not os.access(folder.parent, os.W_OK)


def check_replaceable(folder: str | Path) -> None:
    """Check that all files of a folder are ours, so that it may be replaced.

    Raises:
        InputError: If there are others; names some.
    """
    foreign = [name for name in Manifest(folder).foreign() if not _DRAFT.fullmatch(name)]
    if foreign or Path(folder).is_file():
        listed = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if foreign[5:] else "")
        raise InputError(
            f"{folder} holds files that were not written by this command, or were changed since: "
            f"{listed or folder}; nothing is overwritten: name another folder, or move them away"
        )


def replace_folder(draft: Path, folder: str | Path) -> None:
    """Put a draft in the place of its folder, all of whose files must be ours.

    Raises:
        InputError: If there are files of others.
        OSError: If it can't be put in place; the old content stays.
    """
    target = Path(folder).resolve()
    check_replaceable(target)
    if draft.parent == target:
        publish(draft, target)
        return
    Manifest(draft).save()
    _sync(draft)
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.draft")
    if target.exists():
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish(draft: Path, folder: Path, manifest_file: str = MANIFEST_FILE) -> None:
    """Move the files of a draft into a folder, in place of our earlier ones; others stay.

    Args:
        draft: The draft.
        folder: The folder.
        manifest_file: Name of the manifest that records which files are ours.

    Raises:
        InputError: If a file of somebody else has the name of one of the draft's.
    """
    names = _files(draft)
    check_free(folder, names, manifest_file)
    _sync(draft)
    Manifest(draft, manifest_file).save(names)
    Manifest(folder, manifest_file).remove_files()
    # First the record: files that it names, but that are not there, do no harm. The weights come
    # last: without them, nothing reads what a killed process leaves.
    for name in [manifest_file, *sorted(names, key=lambda n: (n.endswith(".safetensors"), n))]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (draft / name).replace(target)
    for parent in {(folder / name).parent for name in names} | {folder}:
        sync_folder(parent)


def check_free(folder: Path, names: list[str], manifest_file: str = MANIFEST_FILE) -> None:
    """Check that no file of somebody else has one of these names.

    Args:
        folder: The folder.
        names: Files, relative to the folder.
        manifest_file: Name of the manifest that records which files are ours.

    Raises:
        InputError: If there are such files; names some.
    """
    foreign = Manifest(folder, manifest_file).foreign(names)
    if foreign:
        raise InputError(
            f"{folder} holds {', '.join(foreign[:5])}, not written by this command, or changed "
            "since; nothing is overwritten: name another folder, or move them away"
        )


def _files(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths]


def _sync(folder: Path) -> None:
    """Bring all files below a folder, and their names, to the disk."""
    for path in (folder / name for name in _files(folder)):
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)
