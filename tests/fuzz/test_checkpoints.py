"""Checkpoints: parts have checksums, so what is accepted is the intact content or whole values."""

import copy
import io
import pickle
import warnings
import zipfile

import pytest
import torch
from diffusers import DiffusionPipeline
from fuzzing import REFUSED, attempt, changed, changes, containers, edited, edits, files, fuzz
from hypothesis import strategies as st
from short_training import module

from lit_distill import load_pipeline, load_student
from lit_distill.training.checkpoint_io import read_checkpoint


@pytest.fixture(scope="module")
def student():
    """The content of a student's checkpoint, and its base model."""
    model = module()
    model.configure_model()
    facts = {"num_inference_steps": 4, "cfg_scale": 1.0, "height": 32, "width": 32}
    facts["examples"] = [
        {"prompt": "a red seven", "seed": 3, "rand_device": "cpu", "num_inference_steps": 4}
        | {"cfg_scale": 1.0, "height": 32, "width": 32, "call": {}, "pictures": {}}
    ]
    content = {
        "state_dict": dict(model.state_dict()),
        "hyper_parameters": dict(model.hparams),
        "lit_distill": {"version": "0", "facts": facts},
        "global_step": 7,
        "epoch": 0,
    }
    return content, load_pipeline("tiny-digits", torch_dtype="float32")


def saved(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def small(student):
    """The content with two tensors."""
    content = dict(student[0])
    names = list(content["state_dict"])[:2]
    return content | {"state_dict": {name: content["state_dict"][name].clone() for name in names}}


def equal(one, two):
    if isinstance(one, dict):
        return list(one) == list(two) and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and repr(one) == repr(two)  # NaN is not equal to itself


@pytest.mark.parametrize("mmap", [False, True])
def test_the_intact_checkpoint_is_read(student, tmp_path, mmap):
    path = tmp_path / "a.ckpt"
    path.write_bytes(saved(student[0]))
    assert equal(read_checkpoint(path, mmap=mmap), student[0])


def test_bytes(student, tmp_path):
    """A part that is changed does not have its checksum; what lies between parts is not read."""
    path = tmp_path / "a.ckpt"
    content = small(student)

    def check(data):
        path.write_bytes(data)
        found = attempt(read_checkpoint, path)
        assert found is REFUSED or equal(found, content)
        attempt(read_checkpoint, path, mmap=True)

    fuzz("checkpoint bytes", check, data=files(saved(content)))


class Command:
    """What runs a command when it is unpickled."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return (open, (self.name, "w"))


def rewritten(data, change):
    """An archive with valid checksums, whose parts (name and bytes) `change` has changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = [(part.filename, archive.read(part)) for part in archive.infolist()]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, part in change(parts):
            archive.writestr(name, part)
    return stream.getvalue()


def test_content(student, tmp_path):
    """Whole archives of other content: values of other types, other parts, and pickled code."""
    path, canary = tmp_path / "a.ckpt", tmp_path / "canary"
    content = small(student)
    intact = saved(content)

    def check(kind, changes, edits, index):
        expected = None
        if kind == "values":
            expected = changed(content, changes)
            data = saved(expected)
        elif kind == "code":
            expected = changed(content, changes)
            inside = [each for each in containers([expected]) if isinstance(each, dict)]
            (inside[index % len(inside)] if inside else {})["code"] = Command(str(canary))
            data = saved(expected) if index % 3 else pickle.dumps(expected)
        else:

            def change(parts):
                at = index % len(parts)
                name, part = parts[at]
                if kind == "part":
                    return [*parts[:at], (name, edited(part, edits)), *parts[at + 1 :]]
                if kind == "remove":
                    return parts[:at] + parts[at + 1 :]
                return [*parts, (name, b"other")]

            data = rewritten(intact, change)
        path.write_bytes(data)
        found = attempt(read_checkpoint, path)
        if found is not REFUSED and expected is not None:
            assert equal(found, expected)
        assert not canary.exists(), "code was run"

    kinds = ["values", "values", "values", "code", "part", "remove", "twice"]
    index = st.integers(0, 1000)
    kind = st.sampled_from(kinds)
    fuzz("checkpoint content", check, kind=kind, changes=changes, edits=edits, index=index)


def test_students(student, tmp_path, monkeypatch):
    """`load_student` on checkpoints whose settings and facts are odd."""
    content, base = student
    path = tmp_path / "a.ckpt"

    def from_pretrained(name, **options):
        assert isinstance(name, str) and isinstance(options["dtype"], torch.dtype)
        return copy.deepcopy(base)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)

    def check(changes):
        parts = ("hyper_parameters", "lit_distill")
        settings = changed({name: content[name] for name in parts}, changes)
        if isinstance(settings, dict):
            torch.save(content | settings, path)
            # The fields of a LoRA and of a scheduler are named as users write them.
            attempt(load_student, path, beside=["lora", "LoRA", "model.", "torch_dtype", "facts"])

    path.write_bytes(saved(content))
    pipe = load_student(path)
    assert pipe.transformer.peft_config
    fuzz("student", check, changes=changes)
