"""Tables of pairs and of prompts: read as an independent reader reads them, or refused."""

import csv
import io
import json

import pytest
from conftest import HEADER
from fuzzing import REFUSED, attempt, changed, changes, files, fuzz, json_text
from hypothesis import strategies as st
from PIL import Image

from lit_distill.data.metadata import read_metadata
from lit_distill.data.table_io import Problems, read_table
from lit_distill.teacher.prompts import read_prompts

CSV = [
    f"{HEADER}\na.png,a red cat,1,cpu,4,1\nb.png,NA,9007199254740993,cpu,4,1.5\n".encode(),
    f'{HEADER},height,width\r\na.png,"one, ""two""",1,cpu,4,1,32,32\r\n\r\na.png,"line\r\nbreak\rx"'
    ",3,cpu,8,1,,\r\n".encode("utf-8-sig"),
]

RECORDS = [
    {"image": "a.png", "prompt": "a red cat", "seed": 1, "rand_device": "cpu"}
    | {"num_inference_steps": 4, "cfg_scale": 1.5},
    {"image": "b.png", "prompt": "红 😀", "seed": 9007199254740993, "rand_device": "cpu"}
    | {"num_inference_steps": 4, "cfg_scale": 1, "height": 32, "width": 48, "extra": None},
]

JSON = [json.dumps(RECORDS).encode(), json.dumps(RECORDS, ensure_ascii=False, indent=1).encode()]

JSONL = [
    ("\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n").encode()
]

PROMPTS = [
    "a red cat\na blue dog\n\n  红 😀 \n".encode(),
    "one\r\ntwo\rthree\u2028four".encode("utf-8-sig"),
]

PROMPTS_CSV = [b'prompt,height,width,seed\na red cat,32,32,7\n"one, ""two""\r\nthree",,,\n']


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    Image.new("RGB", (48, 32), "blue").save(tmp_path / "b.png")
    return tmp_path


def table(path):
    """What `read_table` finds, and what it collects as problems is refused."""
    problems = Problems(path)
    found = read_table(path, problems)
    problems.check()
    return found


def rows_of(found):
    """A table as (row number, cells by column), without the empty cells."""
    columns = {name: found[name].tolist() for name in found if name != "row"}
    return [
        (row, {name: cells[index] for name, cells in columns.items() if cells[index] != ""})
        for index, row in enumerate(found["row"].tolist())
    ]


def cells(row):
    return {name: cell for name, cell in row.items() if cell != ""}


def csv_rows(data):
    """Rows of a CSV file, by Python's own reader."""
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    header, *rows = csv.reader(text, strict=True)
    header = [name.strip() for name in header]
    assert all(len(row) <= len(header) for row in rows)
    found = [
        (number, cells(dict(zip(header, row, strict=False)) | {"": ""}))
        for number, row in enumerate(rows, 2)
    ]
    return [(number, {k: v for k, v in row.items() if k != "row"}) for number, row in found]


def text_of(value):
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def json_rows(text, lines=False):
    def read(text):
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)

    if lines:
        numbered = [(n, read(line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        numbered = list(enumerate(read(text), 1))
    return [
        (number, {k: text_of(v) for k, v in record.items() if text_of(v) != "" and k != "row"})
        for number, record in numbered
    ]


def test_csv(folder):
    path = folder / "metadata.csv"

    def check(data):
        path.write_bytes(data)
        found = attempt(table, path)
        if found is not REFUSED:
            blank = [row for row in csv_rows(data) if row[1]]
            assert [row for row in rows_of(found) if row[1]] == blank

    fuzz("csv", check, data=files(*CSV))


def test_json(folder):
    path = folder / "metadata.json"

    def check(data):
        path.write_bytes(data)
        found = attempt(table, path)
        if found is not REFUSED:
            assert rows_of(found) == json_rows(data.decode("utf-8-sig"))

    typed = st.builds(lambda c: json_text(changed(RECORDS, c)).encode("utf-8", "replace"), changes)
    fuzz("json", check, data=st.one_of(files(*JSON), typed))


def test_jsonl(folder):
    path = folder / "metadata.jsonl"

    def check(data):
        path.write_bytes(data)
        found = attempt(table, path)
        if found is not REFUSED:
            text = io.StringIO(data.decode("utf-8-sig"), newline=None).read()
            assert rows_of(found) == json_rows(text, lines=True)

    fuzz("jsonl", check, data=files(*JSONL))


def test_metadata(folder):
    """Values that are accepted are those of the file, and the sizes those of the images."""

    def check(sample):
        name, data = sample
        path = folder / name
        path.write_bytes(data)
        found = attempt(read_metadata, path)
        if found is REFUSED:
            return
        lines = data.decode("utf-8-sig")
        expected = csv_rows(data) if name.endswith("csv") else json_rows(lines)
        assert [(n, row["prompt"]) for n, row in expected if row] == list(
            zip(found["row"].tolist(), found["prompt"].tolist(), strict=True)
        )
        for row, (_, cells) in zip(found.itertuples(), [e for e in expected if e[1]], strict=True):
            assert row.seed == int(cells["seed"]) and row.cfg_scale == float(cells["cfg_scale"])
            assert row.num_inference_steps == int(cells["num_inference_steps"])
            size = (int(cells.get("height", 0)), int(cells.get("width", 0)))
            image = cells.get("image", "")
            assert row.image == (f"{folder}/{image}" if image else "")
            sizes = {"": (0, 0), "a.png": (32, 32), "b.png": (32, 48)}
            assert (row.height, row.width) == (size if all(size) else sizes[image])

    typed = st.builds(lambda c: json_text(changed(RECORDS, c)).encode("utf-8", "replace"), changes)
    samples = st.one_of(
        st.tuples(st.just("metadata.csv"), files(*CSV)),
        st.tuples(st.just("metadata.json"), typed),
    )
    fuzz("metadata", check, sample=samples)


def test_prompts(folder):
    def check(sample):
        name, data = sample
        path = folder / name
        path.write_bytes(data)
        found = attempt(read_prompts, path)
        if found is REFUSED:
            return
        if name.endswith(".txt"):
            text = io.StringIO(data.decode("utf-8-sig"), newline=None).read()
            expected = [line.strip() for line in text.split("\n") if line.strip()]
        else:
            rows = [row for _, row in csv_rows(data)]
            expected = [row["prompt"].strip() for row in rows if row.get("prompt", "").strip()]
        assert [prompt.text for prompt in found] == expected

    samples = st.one_of(
        st.tuples(st.just("prompts.txt"), files(*PROMPTS)),
        st.tuples(st.just("prompts.csv"), files(*PROMPTS_CSV)),
    )
    fuzz("prompts", check, sample=samples)
