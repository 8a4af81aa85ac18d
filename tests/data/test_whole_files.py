import os
import threading
from pathlib import Path

import pytest

from lit_distill.data.filesystem import sha256_of
from lit_distill.data.whole_files import (
    MANIFEST_FILE,
    Manifest,
    remove_temporary_files,
    write_file,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda *a: (calls.append("rename"), replace(*a))[1])
    write_file(tmp_path / "new" / "a.bin", b"content")
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"content"
    assert calls == ["fsync", "rename", "fsync"]  # the last one is the folder's


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_file(path, b"old")

    def full_disk(stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"a\.bin can't be written: No space left on device"):
        write_file(path, full_disk)
    with pytest.raises(ZeroDivisionError):
        write_file(path, lambda stream: 1 / 0)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_a_reader_never_sees_half_a_file_of_two_writers(tmp_path):
    path, sizes = tmp_path / "a.bin", set()
    contents = [bytes([65 + n]) * 2**20 for n in range(2)]
    write_file(path, contents[0])

    def write(content):
        for _ in range(20):
            write_file(path, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        sizes.add(path.read_bytes() in contents)
    assert sizes == {True} and names(tmp_path) == ["a.bin"]


def test_only_temporary_files_of_ours_are_removed(tmp_path):
    kept = [".mine.tmp", "a.tmp", ".vimrc.0123.tmp"]
    for name in [*kept, f".a.bin.{'0a' * 16}.tmp"]:
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_a_manifest_tells_our_files_from_others(tmp_path):
    write_file(tmp_path / "images" / "a.png", b"ours")
    write_file(tmp_path / "b.json", b"ours, then edited")
    Manifest(tmp_path).save()
    (tmp_path / "images" / "theirs.png").write_bytes(b"theirs")
    (tmp_path / "b.json").write_bytes(b"edited")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    manifest = Manifest(tmp_path)
    assert manifest.foreign() == ["b.json", "images/theirs.png", "link"]
    assert manifest.foreign(["images/a.png", "missing.txt"]) == []
    manifest.remove_files()
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"images", "images/theirs.png", "b.json", "link"}


def test_folders_that_are_empty_then_go_too(tmp_path):
    write_file(tmp_path / "a" / "b" / "c.txt", b"ours")
    Manifest(tmp_path).save(["a/b/c.txt"])
    Manifest(tmp_path).remove_files()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"a": 1}}'])
def test_a_damaged_manifest_claims_nothing(tmp_path, text):
    (tmp_path / "a").write_bytes(b"theirs")
    (tmp_path / MANIFEST_FILE).write_text(text)
    assert Manifest(tmp_path).foreign() == ["a"]


def test_the_digest_is_of_the_content(tmp_path):
    write_file(tmp_path / "a", b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B
