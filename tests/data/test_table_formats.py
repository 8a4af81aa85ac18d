"""Tables of other formats and with other names are the CSV with our names, row by row."""

import json
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lit_distill import DistillDataModule
from lit_distill.cli import main
from lit_distill.data.dataset import PairDataset
from lit_distill.data.dataset_check import check_data
from lit_distill.data.dataset_digest import dataset_digest
from lit_distill.data.images import Picture, read_image
from lit_distill.data.metadata import read_metadata
from lit_distill.data.table_io import MetadataError, Problems, read_table
from lit_distill.errors import InputError
from lit_distill.teacher.pair_writer import _input_paths
from lit_distill.teacher.prompts import Pair, read_prompts

ROWS = 5
COLUMNS = {"prompt": "text", "image": "file_name"}
CONSTANTS = {"rand_device": "cpu", "num_inference_steps": 4, "cfg_scale": 1}


def records(name="file_name", value=lambda index: f"{index}.png"):
    texts = ["a red cat", "NA", 'one, "two"\nthree', "红 😀", "007"]
    return [
        {name: value(index), "text": texts[index], "seed": 9007199254740993 + index}
        for index in range(ROWS)
    ]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The same five rows in every format; in one folder, so that all of them see the images."""
    datasets = pytest.importorskip("datasets")
    out = tmp_path_factory.mktemp("tables")
    for index in range(ROWS):
        picture = Image.new("RGB", (32, 48), (50 * index, 100, 0))
        picture.putpixel((index, 0), (0, 0, 0))
        picture.save(out / f"{index}.png")
    frame = pd.DataFrame(records()).rename(columns={"file_name": "image", "text": "prompt"})
    frame.assign(**CONSTANTS).to_csv(out / "ours.csv", index=False)
    lines = [json.dumps(record) for record in records()]
    (out / "metadata.jsonl").write_text("\n".join(lines))
    pd.DataFrame(records()).to_parquet(out / "paths.parquet", row_group_size=2)
    saved = datasets.Dataset.from_list(records("image", lambda index: str(out / f"{index}.png")))
    saved = saved.cast_column("image", datasets.Image())
    saved.to_parquet(out / "linked.parquet")
    saved.save_to_disk(out / "saved", num_shards=2)
    content = [(out / f"{index}.png").read_bytes() for index in range(ROWS)]
    # As `push_to_hub` writes it.
    cells = [{"bytes": data, "path": "gone.png"} for data in content]
    embedded = datasets.Dataset.from_list(records("image", cells.__getitem__))
    embedded = embedded.cast_column("image", datasets.Image())
    embedded.to_parquet(out / "embedded.parquet", batch_size=2)
    binary = [row | {"image": data} for row, data in zip(records(), content, strict=True)]
    pq.write_table(pa.Table.from_pylist(binary), out / "binary.parquet", row_group_size=3)
    return out


FORMATS = {
    "imagefolder": ("", COLUMNS),
    "imagefolder's table": ("metadata.jsonl", COLUMNS),
    "parquet with paths": ("paths.parquet", COLUMNS),
    "parquet of datasets with paths": ("linked.parquet", {"prompt": "text"}),
    "parquet of datasets": ("embedded.parquet", {"prompt": "text"}),
    "parquet with bytes": ("binary.parquet", {"prompt": "text"}),
    "save_to_disk": ("saved", {"prompt": "text"}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_table_of_any_format_holds_the_same_rows(tables, name):
    ours = read_metadata(tables / "ours.csv")
    path, columns = FORMATS[name]
    table = read_metadata(tables / path, columns=columns, constants=CONSTANTS)
    embedded = "#image" in table["image"][0]
    assert embedded == (name in ("parquet of datasets", "parquet with bytes", "save_to_disk"))
    for column in ("prompt", "seed", "rand_device", "num_inference_steps", "height", "width"):
        assert table[column].tolist() == ours[column].tolist(), column
    assert table["row"].tolist() == [1, 2, 3, 4, 5]
    for row, expected in zip(PairDataset(table), PairDataset(ours), strict=True):
        assert torch.equal(row["image"], expected["image"])
    assert dataset_digest(table) == dataset_digest(ours)
    assert len(check_data(tables / path, columns=columns, constants=CONSTANTS)) == ROWS


def test_an_embedded_picture_is_reported_by_its_row(tables, tmp_path):
    rows = [
        {"image": {"bytes": data, "path": None}, "text": text, "seed": 1}
        for data, text in [((tables / "1.png").read_bytes(), "a"), (b"no picture", " ")]
    ]
    rows.append(rows[0] | {"image": {"bytes": None, "path": "gone.png"}, "seed": 1.5})
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({k: [row[k] for row in rows] for k in rows[0]}), path)
    with pytest.raises(MetadataError) as error:
        check_data(path, columns={"prompt": "text"}, constants=CONSTANTS)
    text = str(error.value)
    assert "bad.parquet row 2 (image=" in text and "text (prompt) must be a text that is" in text
    assert "row 3 (image='gone.png'): seed must be an integer" in text and "got '1.5'" in text
    assert "row 3: image must be a file below" in text and "got 'gone.png'" in text
    rows[1] |= {"text": "b", "seed": 2}
    pq.write_table(pa.Table.from_pylist(rows[:2]), path)
    with pytest.raises(MetadataError, match=r"row 2 .*bad\.parquet#image\[2\] is not a readable"):
        read_metadata(path, columns={"prompt": "text"}, constants=CONSTANTS)


def test_a_user_can_not_name_a_cell_outside_of_the_folder(tables, tmp_path):
    """Only what is read from a file is a reference to a cell."""
    inside = tmp_path / "metadata.csv"
    for name in (f"{tables}/embedded.parquet#image[1]", "embedded.parquet#image[1]"):
        inside.write_text(f"image,prompt,seed\n{name},x,1\n")
        with pytest.raises(MetadataError, match=r"image must be (inside of|a file below)"):
            read_metadata(inside, constants=CONSTANTS)


def test_a_cell_that_is_gone_is_an_error(tables):
    for cell in ("#image[6]", "#text[1]", "#other[1]"):
        with pytest.raises(InputError, match=r"has no file in row"):
            read_image(f"{tables}/embedded.parquet{cell}")


MISSING = {
    "imagefolder": (
        ("", None, None),
        [
            "column 'prompt' is missing; found 'file_name', 'text', 'seed'",
            "set data.columns: {prompt: text, image: file_name}",
            "data.constants, for example {rand_device: cpu, num_inference_steps: 4, cfg_scale: 1}",
        ],
    ),
    "a mapped column": (
        ("", {"prompt": "txt", "image": "file_name"}, CONSTANTS),
        ["column 'txt' is missing, which data.columns names for prompt; found 'file_name', 'text'"],
    ),
    "a constant": (
        ("ours.csv", None, {"cfg_scale": 1}),
        ["the table has a column 'cfg_scale': remove it from data.constants"],
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_offered(tables, name):
    (path, columns, constants), expected = MISSING[name]
    with pytest.raises(MetadataError) as error:
        read_metadata(tables / path, columns=columns, constants=constants)
    for text in expected:
        assert text in str(error.value)
    if name == "a constant":
        assert "Likely" not in str(error.value)


REFUSED = {
    "no parquet": ("x.parquet", lambda path: path.write_bytes(b"PAR1"), "is not a parquet file: "),
    "absent": ("x.parquet", lambda path: None, "x.parquet does not exist"),
    "an empty folder": ("x", Path.mkdir, "x is a folder with no table: name the table itself"),
    "two tables": (
        "x",
        lambda path: [path.mkdir(), *((path / f"metadata.{s}").touch() for s in ("csv", "json"))],
        r"x is a folder with .*metadata\.csv and .*metadata\.json: name",
    ),
    "splits": (
        "x",
        lambda path: [
            (path / "test").mkdir(parents=True),
            (path / "test/state.json").touch(),
            (path / "dataset_dict.json").touch(),
        ],
        r"x holds several splits \(test\): name one, as in .*x/test",
    ),
    "a broken save": (
        "x",
        lambda path: [path.mkdir(), (path / "state.json").write_text("[]")],
        r"state\.json is not as datasets' save_to_disk writes it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_is_refused(tmp_path, name):
    file, make, message = REFUSED[name]
    make(tmp_path / file)
    with pytest.raises((InputError, FileNotFoundError), match=message):
        read_table(tmp_path / file, Problems(tmp_path / file))


def test_without_pyarrow_the_extra_is_named(tables, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"paths\.parquet needs .* 'lit-distill\[arrow\]'"):
        read_table(tables / "paths.parquet", Problems("x"))


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(InputError, match=r"unknown column 'promt' \(did you mean 'prompt'"):
        DistillDataModule(columns={"promt": "text"})
    with pytest.raises(InputError, match=r"data.constants: 'seed' can't be the same in all rows"):
        DistillDataModule(constants={"seed": 1})


def test_prompts_are_read_from_any_format(tables, tmp_path):
    texts = [record["text"] for record in records()]
    for path in ("", "paths.parquet", "embedded.parquet", "saved"):
        prompts = read_prompts(tables / path, columns={"prompt": "text", "image": "file_name"})
        assert [prompt.text for prompt in prompts] == texts
        assert prompts[0].seed == 9007199254740993
    with pytest.raises(MetadataError, match=r"'prompt' is missing.*\n.*set data.columns: {prompt:"):
        read_prompts(tables / "paths.parquet")
    (tmp_path / "prompts.txt").write_text("text\n")  # the mapping is of tables only
    assert [p.text for p in read_prompts(tmp_path / "prompts.txt", columns=COLUMNS)] == ["text"]


def test_embedded_pictures_of_prompts_are_copied_as_pictures(tables):
    """An edit pipeline's input, in the cells of a file."""
    prompts = read_prompts(tables / "saved", {"image": "image"}, {"prompt": "text"})
    pairs = [Pair(i, prompt.text, i, prompt.call) for i, prompt in enumerate(prompts)]
    assert all(isinstance(pair.call["image"], Picture) for pair in pairs)
    assert torch.equal(read_image(pairs[3].call["image"]), read_image(tables / "3.png"))
    names = set(_input_paths(pairs).values())
    assert len(names) == ROWS and all(name.endswith(".png") for name in names)


def test_training_resumes_from_another_format_of_the_same_rows(pairs, tmp_path, recwarn):
    """Embedded pictures train as files do, and a resumed run knows that the rows are the same."""
    table = pd.read_csv(pairs / "train/metadata.csv").head(8)
    table["image"] = [
        {"bytes": (pairs / "train" / name).read_bytes(), "path": None} for name in table["image"]
    ]
    table = table.rename(columns={"prompt": "caption"}).drop(columns=["latents", "rand_device"])
    table.to_parquet(tmp_path / "train.parquet")
    csv = pd.read_csv(pairs / "train/metadata.csv").head(8).drop(columns="latents")
    csv.to_csv(tmp_path / "metadata.csv", index=False)
    common = ["fit", "--model.pretrained_model_name_or_path", "tiny-digits", "--model.lora"]
    common += ["{r: 4}", "--model.torch_dtype", "float32", "--model.preflight", "false"]
    common += ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    common += ["--trainer.enable_progress_bar", "false", "--data.batch_size", "4"]
    parquet = ["--data.metadata_path", str(tmp_path / "train.parquet")]
    parquet += ["--data.columns", "{prompt: caption}", "--data.constants", "{rand_device: cpu}"]
    files = ["--data.metadata_path", str(tmp_path / "metadata.csv")]
    files += ["--data.base_path", str(pairs / "train")]
    weights = []
    for name, first, second in (("embedded", parquet, files), ("files", files, files)):
        place = ["--trainer.default_root_dir", str(tmp_path / name)]
        main([*common, *place, *first, "--trainer.max_steps", "1"])
        checkpoint = next((tmp_path / name).rglob("*.ckpt"))
        resume = ["--ckpt_path", str(checkpoint), "--trainer.max_steps", "2"]
        main([*common, *place, *second, *resume])
        last = max((tmp_path / name).rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        weights.append(torch.load(last, weights_only=True)["state_dict"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not [str(w.message) for w in recwarn if "data set" in str(w.message)]
