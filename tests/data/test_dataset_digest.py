import shutil

import pandas as pd
import pytest

from lit_distill.data.dataset_digest import changes, dataset_digest
from lit_distill.data.metadata import read_metadata


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = []
    for index in range(6):
        (folder / f"{index}.safetensors").write_bytes(b"latents %d" % index)
        rows.append(f"{index}.safetensors,a cat {index},{index},cpu,4,1,32,32")
    header = "latents,prompt,seed,rand_device,num_inference_steps,cfg_scale,height,width"
    (folder / "metadata.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def digest(folder):
    return dataset_digest(read_metadata(folder / "metadata.csv"))


def edited(folder, edit):
    table = pd.read_csv(folder / "metadata.csv", dtype=str)
    edit(table).to_csv(folder / "metadata.csv", index=False)


def test_a_moved_data_set_is_the_same(dataset, tmp_path):
    before = digest(dataset)
    shutil.copytree(dataset, tmp_path / "moved")
    (tmp_path / "moved" / "0.safetensors").rename(tmp_path / "moved" / "zero.safetensors")
    edited(tmp_path / "moved", lambda t: t.replace("0.safetensors", "zero.safetensors"))
    assert digest(tmp_path / "moved") == before
    assert changes(before, digest(tmp_path / "moved")) == []


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: t.iloc[::-1], ["another order of the rows, or other values together in a row"]),
        (lambda t: t.iloc[:-1], ["5 rows instead of 6"]),
        (lambda t: t.assign(num_inference_steps="2"), ["other values of num_inference_steps"]),
        (lambda t: t.replace("a cat 3", "a dog"), ["other values of prompt"]),
        (
            lambda t: t.assign(latents=[*t.latents[1:], t.latents[0]]),  # shifted by a row
            ["another order of the rows, or other values together in a row"],
        ),
        (
            lambda t: t.assign(seed="7", cfg_scale="2"),
            ["other values of seed", "other values of cfg_scale"],
        ),
    ],
)
def test_a_change_is_named(dataset, edit, expected):
    before = digest(dataset)
    edited(dataset, edit)
    assert changes(before, digest(dataset)) == expected


def test_the_content_of_targets_counts(dataset):
    before = digest(dataset)
    (dataset / "3.safetensors").write_bytes(b"latents x")
    assert changes(before, digest(dataset)) == ["other values of targets"]


def test_of_many_files_some_stand_for_all(dataset, monkeypatch):
    monkeypatch.setattr("lit_distill.data.dataset_digest.MAX_FILES", 2)
    before = digest(dataset)
    (dataset / "3.safetensors").write_bytes(b"latents x")
    assert digest(dataset) == before
    (dataset / "5.safetensors").write_bytes(b"latents x")
    assert digest(dataset) != before
