"""Each way in which a file is no checkpoint has its own error."""

import io
import pickle
import zipfile

import pytest
import torch

from lit_distill.errors import InputError
from lit_distill.training.checkpoint_io import AtomicCheckpointIO, read_checkpoint

HPARAMS = {"pretrained_model_name_or_path": "tiny-digits", "torch_dtype": "float32", "lora": None}

CONTENT = {"state_dict": {"a": torch.arange(4.0)}, "hyper_parameters": HPARAMS}


def saved(content=CONTENT, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def archive(*parts, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, data in parts:
            file.writestr(name, data)
    return stream.getvalue()


def flipped(data, text):
    at = data.index(text)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class Code:
    """What creates a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("canary", "w"))


BROKEN = {
    "empty": (b"", "is empty: the process was killed or the disk was full"),
    "cut": (saved()[:-300], "is truncated or not a checkpoint: File is not a zip file"),
    "flipped": (
        flipped(saved(), torch.arange(4.0).numpy().tobytes()),
        "is damaged: the checksum of its part .*data/0 differs",
    ),
    "web page": (b"<!DOCTYPE html>", "is not a checkpoint: 15 bytes of another format"),
    "old format": (saved(_use_new_zipfile_serialization=False), "is not a checkpoint"),
    "pickle": (pickle.dumps({"a": 1}), "is not a checkpoint: .* bytes of another format"),
    "other archive": (archive(("a.txt", b"x")), "is a zip archive, but not a checkpoint"),
    "compressed": (
        archive(("a/data.pkl", b"x" * 10**6), compression=zipfile.ZIP_DEFLATED),
        "is truncated or not a checkpoint: its parts are compressed",
    ),
    "code": (
        saved(CONTENT | {"x": Code()}),
        r"holds other objects than .* \((builtins|io)\.open\)",
    ),
    "tensors": (saved({"a": torch.zeros(1)}), "was not written by lit_distill"),
    "list": (saved([1]), "was not written by lit_distill"),
    "no weights": (saved(CONTENT | {"state_dict": None}), "is damaged: its state_dict is not"),
    "odd weights": (saved(CONTENT | {"state_dict": {"a": 1}}), "is damaged: its state_dict is not"),
    "odd facts": (saved(CONTENT | {"lit_distill": []}), "is damaged: its lit_distill is not as"),
    "odd settings": (
        saved(CONTENT | {"hyper_parameters": HPARAMS | {"lora": "r"}}),
        "its hyper_parameters.lora must be dict or NoneType, got 'r'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_told_by_every_route(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, message = BROKEN[name]
    path = tmp_path / "a.ckpt"
    path.write_bytes(data)
    for read in (read_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(InputError, match=rf"a\.ckpt.*{message}"):
            read(path)
    with pytest.raises(InputError, match=r"a\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(f"file://{path}")
    if name != "flipped":  # tensors are read later
        with pytest.raises(InputError, match=rf"a\.ckpt.*{message}"):
            read_checkpoint(path, mmap=True)
    assert not (tmp_path / "canary").exists()


def test_a_pipe_is_no_checkpoint(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"a\.ckpt"):
        read_checkpoint(tmp_path / "a.ckpt")
