"""Pairs are whole and ours, or they are generated again, refused and named."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import generate
from folders import hashes
from PIL import Image
from safetensors.torch import load_file, save_file

from lit_distill import load_pipeline
from lit_distill.data.dataset import PairDataset
from lit_distill.data.dataset_check import check_data
from lit_distill.data.latents_file import latents_content, read_latents
from lit_distill.data.metadata import read_metadata
from lit_distill.data.table_io import MetadataError
from lit_distill.data.whole_folders import locked
from lit_distill.errors import InputError
from lit_distill.teacher.teacher import Teacher


@pytest.fixture
def copy(pairs, tmp_path):
    return shutil.copytree(pairs / "heldout", tmp_path / "copy")


def again(folder, *options):
    generate(folder, "prompts_heldout.txt", 8, 1_000_000, *options)


# Files of others


@pytest.mark.parametrize("names", [("metadata.csv", "images/000000.png"), ("images/a.jpg",)])
def test_a_folder_of_somebody_else_is_refused_and_stays(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = hashes(tmp_path)
    listed = ", ".join(dict.fromkeys(name.partition("/")[0] for name in names))
    with pytest.raises(InputError, match=rf"holds {listed}, but no provenance.json: they were not"):
        again(tmp_path)
    assert hashes(tmp_path) == before


def test_somebody_else_s_provenance_is_refused(tmp_path):
    (tmp_path / "provenance.json").write_text('{"author": "me"}')
    with pytest.raises(InputError, match=r"provenance.json was not written by `generate`"):
        again(tmp_path)
    assert (tmp_path / "provenance.json").read_text() == '{"author": "me"}'


def test_an_edited_table_is_not_overwritten(copy):
    path = copy / "metadata.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    before = hashes(copy)
    with pytest.raises(InputError, match=r"metadata.csv is not as `generate` writes it"):
        again(copy)
    assert hashes(copy) == before
    path.unlink()
    again(copy)
    assert len(read_metadata(path)) == 8


def test_an_edited_image_is_not_overwritten(copy):
    (copy / "latents/000003.safetensors").unlink()
    Image.new("RGB", (32, 32), "red").save(copy / "images/000003.png")
    before = hashes(copy)
    with pytest.raises(InputError, match=r"images/000003.png is not the image of prompt .* seed"):
        again(copy)
    assert hashes(copy) == before


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    (tmp_path / "out").mkdir()
    busy = pytest.raises(InputError, match="another process is writing to")
    with locked(tmp_path / "out"), busy:
        again(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# Damaged files


def empty(data):
    return b""


def half(data):
    return data[: len(data) // 2]


def zeros(data):
    return bytes(len(data))


def flipped(data):
    """One bit in the middle of the pixels or values."""
    middle = len(data) * 3 // 4
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [empty, half, zeros, flipped])
def test_damaged_files_are_generated_again_and_reported(copy, pairs, damage):
    names = ["images/000003.png", "latents/000005.safetensors"]
    for name in names:
        (copy / name).write_bytes(damage((copy / name).read_bytes()))
    (copy / "metadata.csv").unlink()
    with pytest.warns(UserWarning, match=f"2 damaged files are generated again: {names[0]}, "):
        again(copy)
    assert hashes(copy) == hashes(pairs / "heldout")


def test_latents_have_a_checksum_that_reading_verifies(tmp_path):
    tensors = {"latents": torch.arange(6.0).view(2, 3), "sigmas": torch.ones(3)}
    path = tmp_path / "a.safetensors"
    path.write_bytes(latents_content(tensors))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_file(path).items())
    assert read_latents(str(path)).keys() == tensors.keys()
    data = path.read_bytes()
    for position in range(len(data) - 36, len(data)):  # all values
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(InputError, match="damaged: its content does not match its checksum"):
            read_latents(str(path))
    save_file(tensors, path)  # of another tool, or an earlier version
    assert torch.equal(read_latents(str(path))["latents"], tensors["latents"])


# What the teacher generates


@pytest.fixture(scope="module")
def broken_teacher(tmp_path_factory):
    pipe = load_pipeline("tiny-digits")
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(float("nan"))
    out = tmp_path_factory.mktemp("broken")
    pipe.save_pretrained(out)
    return out


def test_a_teacher_of_nan_is_stopped_at_its_first_row(broken_teacher, tmp_path):
    options = ["--model.teacher_model", str(broken_teacher), "--height", "32", "--width", "32"]
    message = r"prompt '.+', seed 1000000, in float32: the teacher generates latents with 256 of "
    with pytest.raises(InputError, match=message):
        again(tmp_path, *options)
    assert set(hashes(tmp_path)) == {"provenance.json"}


@pytest.mark.parametrize(
    ("checker", "message"),
    [(True, "safety checker has blanked it"), (False, "likely its VAE is damaged")],
)
def test_a_blanked_image_is_stopped_at(tmp_path, monkeypatch, checker, message):
    sample, load = Teacher.sample, Teacher.load

    def blanking(self, pipe, pairs, on_step=None):
        latents, images = sample(self, pipe, pairs, on_step)
        return latents, [
            Image.new("RGB", image.size) if pair.seed == 1_000_003 else image
            for pair, image in zip(pairs, images, strict=True)
        ]

    def load_with_checker(self):
        pipe = load(self)
        pipe.__dict__["safety_checker"] = object() if checker else None
        return pipe

    monkeypatch.setattr(Teacher, "sample", blanking)
    monkeypatch.setattr(Teacher, "load", load_with_checker)
    with pytest.raises(InputError, match=rf"seed 1000003, in float32: .* single colour.*{message}"):
        again(tmp_path, "--batch_size", "2")
    images = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert images == ["000000.png", "000001.png"]


# Texts


def test_every_text_that_is_accepted_is_read_back(tmp_path):
    texts = ["a\rb", 'a "b", c', "=1+1", "d\r\ne\nf", "a 🙂", "a, b"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    generate(tmp_path / "set", prompts, 6, 0)
    assert read_metadata(tmp_path / "set/metadata.csv")["prompt"].tolist() == texts


def test_half_an_emoji_is_refused_before_anything_is_generated(tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text('[{"prompt": "good"}, {"prompt": "a \\ud83d"}]')
    with pytest.raises(InputError, match=r"row 2.*half of a surrogate pair"):
        generate(tmp_path / "set", prompts, 2, 0)
    assert not (tmp_path / "set").exists()


def test_a_damaged_provenance_is_named(copy):
    path = copy / "provenance.json"
    path.write_bytes(half(path.read_bytes()))
    before = hashes(copy)
    with pytest.raises(InputError, match=r"provenance.json is damaged: .*restore it from a copy"):
        again(copy)
    assert hashes(copy) == before


# What `check` finds


def test_check_finds_values_that_are_not_finite(copy):
    path = copy / "latents/000003.safetensors"
    tensors = load_file(path)
    tensors["latents"][2, 3] = float("inf")
    path.write_bytes(latents_content(tensors))
    message = r"row 5 .*holds latents with 1 of 256 values NaN or infinite"
    with pytest.raises(MetadataError, match=message):
        check_data(copy / "metadata.csv")


def test_check_finds_images_of_a_single_colour(copy):
    Image.new("RGB", (32, 32)).save(copy / "images/000003.png")
    with pytest.raises(MetadataError, match=r"1 problem.*\n.*row 5 .*is a single colour"):
        check_data(copy / "metadata.csv")


def test_check_finds_a_flipped_bit(copy):
    path = copy / "latents/000003.safetensors"
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(MetadataError, match=r"row 5 .*does not match its checksum"):
        check_data(copy / "metadata.csv")
    rows = PairDataset(read_metadata(copy / "metadata.csv"))
    with pytest.raises(InputError, match=r"row 5: .*does not match its checksum"):
        rows[3]


def test_a_frame_of_a_single_colour_is_no_blank_video():
    from lit_distill.teacher.finished import check_sample
    from lit_distill.teacher.prompts import Pair

    pair, latents = Pair(0, "x", 1, {}), {"latents": torch.zeros(1)}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    black = Image.new("RGB", (8, 8))
    check_sample(pair, [black, noise], latents, "float32", False)
    with pytest.raises(InputError, match="single colour"):
        check_sample(pair, [black, black], latents, "float32", False)
