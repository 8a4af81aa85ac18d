import json
import os
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from conftest import HEADER
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lit_distill import DistillDataModule
from lit_distill.data.dataset_check import check_data
from lit_distill.data.images import read_image
from lit_distill.data.metadata import hold_out, read_metadata
from lit_distill.data.table_io import MetadataError
from lit_distill.errors import InputError

GOOD = "a.png,x,1,cpu,4,1"


def test_columns_are_parsed_by_their_type(write):
    rows = ["a.png,NA,1,cpu,4,1", "a.png,007,9007199254740993,cpu,4,1", 'a.png,"红, 1",3,cpu,8,1.5']
    table = read_metadata(write(*rows, encoding="utf-8-sig"))
    assert table["prompt"].tolist() == ["NA", "007", "红, 1"]
    assert table["seed"].tolist() == [1, 9007199254740993, 3]
    assert table["row"].tolist() == [2, 3, 4]
    assert table["cfg_scale"].tolist() == [1.0, 1.0, 1.5]


def test_the_example_of_diffsynth_studio_is_accepted_unchanged(tmp_path):
    """The file and folder names of its documentation for Qwen-Image's distillation."""
    (tmp_path / "distill_qwen").mkdir()
    Image.new("RGB", (1328, 1328)).save(tmp_path / "distill_qwen/image.jpg")
    prompt = (
        "精致肖像，水下少女，蓝裙飘逸，发丝轻扬，光影透澈，气泡环绕，面容恬静，细节精致，梦幻唯美。"  # noqa: RUF001
    )
    path = tmp_path / "metadata_distill_qwen_image.csv"
    path.write_text(f'{HEADER}\ndistill_qwen/image.jpg,"{prompt}",0,cpu,4,1\n', encoding="utf-8")
    data = DistillDataModule(str(path), base_path=str(tmp_path), height=1328, width=1328)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert (batch["prompt"], batch["seed"], batch["size"]) == ([prompt], [0], (1328, 1328))
    assert (batch["num_inference_steps"], batch["cfg_scale"]) == (4, 1.0)
    assert batch["image"].shape == (1, 3, 1328, 1328)


def test_commas_and_line_breaks_in_quotes_belong_to_the_prompt(write):
    table = read_metadata(write('a.png,"one, two\r\nthree ""four""",1,cpu,4,1', GOOD))
    assert table["prompt"].tolist() == ['one, two\r\nthree "four"', "x"]
    assert table["row"].tolist() == [2, 3]


def test_blank_lines_are_left_out_but_counted(write):
    table = read_metadata(write(GOOD, "", "b.png,y,2,cpu,4,1", ""))
    assert table["row"].tolist() == [2, 4]


RECORD = {"image": "a.png", "prompt": "x", "rand_device": "cpu", "num_inference_steps": 4}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_numbers_are_read_as_they_are_written(write, tmp_path, suffix):
    write()
    records = [RECORD | {"seed": 9007199254740993, "cfg_scale": 1}]
    records += [RECORD | {"seed": "5", "cfg_scale": "1.5", "latents": None, "prompt": "null"}]
    text = [json.dumps(record, ensure_ascii=False) for record in records]
    path = tmp_path / f"metadata.{suffix}"
    whole = f"[{','.join(text)}]" if suffix == "json" else "\n\n".join(text)
    path.write_text(whole, encoding="utf-8-sig")
    table = read_metadata(path)
    assert table["seed"].tolist() == [9007199254740993, 5]
    assert table["prompt"].tolist() == ["x", "null"]
    assert table["latents"].tolist() == ["", ""]
    assert table["row"].tolist() == ([1, 2] if suffix == "json" else [1, 3])


LONG = "9" * 300
ROWS = [
    (["a.png,x,,cpu,4,1"], r"row 2 \(image='a.png'\): seed must be an integer >= 0 .*, got ''"),
    (["a.png,x,1.0,cpu,4,1"], "seed must be an integer .* got '1.0'"),
    (["a.png,x,1e3,cpu,4,1"], "seed must be an integer .* got '1e3'"),
    (["a.png,x,-1,cpu,4,1"], "seed must be an integer .* got '-1'"),
    (["a.png,x,٣,cpu,4,1"], "seed must be an integer .* got '٣'"),
    (["a.png,x,one,cpu,4,1"], "seed must be an integer .* got 'one'"),
    (["a.png,x,9223372036854775808,cpu,4,1"], "seed must be .* <= 9223372036854775807, got '92"),
    (["a.png,x,9999999999999999999,cpu,4,1"], "seed must be .* got '9999999999999999999'"),
    ([f"a.png,x,{LONG},cpu,4,1"], r"seed must be .* got '9{77}\.\.\.'"),
    (["a.png,x,1,cpu,4.5,1"], "num_inference_steps must be an integer >= 1 .* got '4.5'"),
    (["a.png,x,1,cpu,0,1"], "num_inference_steps must be an integer >= 1 .* got '0'"),
    (["a.png,x,1,cpu,,1"], "num_inference_steps must be an integer >= 1 .* got ''"),
    (["a.png,x,1,cpu,99999,1"], "num_inference_steps must be .* <= 10000, got '99999'"),
    (["a.png,x,1,cpu,4,none"], "cfg_scale must be a number >= 1, got 'none'"),
    (["a.png,x,1,cpu,4,"], "cfg_scale must be a number >= 1, got ''"),
    (["a.png,x,1,cpu,4,nan"], "cfg_scale must be a number >= 1, got 'nan'"),
    (["a.png,x,1,cpu,4,inf"], "cfg_scale must be a number >= 1, got 'inf'"),
    (["a.png,x,1,cpu,4,0.5"], "cfg_scale must be a number >= 1, got '0.5'"),
    (['a.png,x,1,cpu,4,"1,5"'], "cfg_scale must be a number >= 1, got '1,5'"),
    (["a.png,x,1,cpu,4,1_0"], "cfg_scale must be a number >= 1, got '1_0'"),
    (["a.png,x,1,gpu,4,1"], "rand_device must be cpu, or cuda .* got 'gpu'"),
    (["a.png,x,1,,4,1"], "rand_device must be cpu, or cuda .* got ''"),
    (["a.png,x,1,cuda:99,4,1"], "rand_device must be cpu, or cuda .* got 'cuda:99'"),
    (["a.png, ,1,cpu,4,1"], "prompt must be a text that is not empty, got ' '"),
    (["a.png,,1,cpu,4,1"], "prompt must be a text that is not empty, got ''"),
    (["c.png,x,1,cpu,4,1"], "row 2: image must be a file below .*, got 'c.png'"),
    (["A.PNG,x,1,cpu,4,1"], "row 2: image must be a file below .*, got 'A.PNG'"),
    (["d/a.png,x,1,cpu,4,1"], "row 2: image must be a file below .*, got 'd/a.png'"),
    (["d,x,1,cpu,4,1"], "row 2: image must be a file below .*, got 'd'"),
    (["../a.png,x,1,cpu,4,1"], r"image must be inside of .*\(or set data.allow_outside: true\)"),
    (["/etc/hosts,x,1,cpu,4,1"], "image must be inside of .* got '/etc/hosts'"),
    (["s3://bucket/a.png,x,1,cpu,4,1"], "image must be inside of .* got 's3://bucket/a.png'"),
    (["text.png,x,1,cpu,4,1"], "image: .*text.png is not a readable image: of no known format"),
    (["empty.png,x,1,cpu,4,1"], "image: .*empty.png is not a readable image: of no known"),
    (["bomb.png,x,1,cpu,4,1"], "image: .*bomb.png is not a readable image: .*exceeds limit"),
    (
        ["chunk.png,x,1,cpu,4,1"],
        "image: .*chunk.png is not a readable image: .*([Tt]oo large|exceed)",
    ),
    ([GOOD, "twin.png,x,1,cpu,4,1"], "row 3 .*another image or latents than in row 2"),
    (
        ["a.png,x,1,cpu,4,1,7"],
        "metadata.csv row 2: has 7 values, but the header has 6 columns; .* need quotes",
    ),
    (
        [GOOD, "a.png,x, y,1,cpu,4,1"],
        "metadata.csv row 3: has 7 values, but the header has 6 columns",
    ),
    (['a.png,"x,1,cpu,4,1'], "metadata.csv row 2: has a quote that is never closed"),
    ([], "the table has no rows"),
]


def png(width, height, bits, data):
    """A PNG file with any header over any data."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def oddities(tmp_path):
    """Files that are not images, or dangerous ones."""
    (tmp_path / "d").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000, 8, b""))
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "twin.png")
    note = PngInfo()
    note.add_text("note", "x" * 2**22, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "chunk.png", pnginfo=note)


@pytest.mark.parametrize(("rows", "message"), ROWS)
def test_a_bad_value_is_named_with_its_row(write, oddities, rows, message):
    with pytest.raises(MetadataError, match=message):
        read_metadata(write(*rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a CSV file in UTF-8: it has no header"),
        (f"{HEADER},image\n{GOOD},b.png\n", "column 'image' occurs 2 times"),
        (f"{HEADER}, seed\n{GOOD},2\n", "column 'seed' occurs 2 times"),
        (
            "prompt,seed,rand_device,num_inference_steps,cfg_scale\nx,1,cpu,4,1\n",
            "'latents' is need",
        ),
        (HEADER.replace(",", ";") + "\n", "column 'prompt' is missing; found 'image;prompt;seed"),
        (f"{HEADER},height,width\n{GOOD},0,32\n", "height must be an integer >= 1 .* got '0'"),
        (f"{HEADER},height,width\n{GOOD},32.0,32\n", "height must be an integer >= 1 .* '32.0'"),
        (f"{HEADER},height,width\n{GOOD},,32\n", "height and width go together, got height=, w"),
        (f"{HEADER},latents\n{GOOD},x.safetensors\n", "latents must be a file below .* got 'x.saf"),
        (f"{HEADER},latents\n{GOOD},../x.safetensors\n", "latents must be inside of"),
    ],
)
def test_a_bad_table_is_named(write, tmp_path, text, message):
    write()
    path = tmp_path / "metadata.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MetadataError, match=message):
        read_metadata(path)


def test_bytes_that_are_no_utf8_are_refused(write):
    with pytest.raises(MetadataError, match="not a CSV file in UTF-8"):
        read_metadata(write("a.png,café,1,cpu,4,1", encoding="latin-1"))


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        ("json", "{", "is not a JSON list of objects in UTF-8"),
        ("json", '{"seed": 1}', "is not a JSON list of objects in UTF-8: found dict"),
        ("json", "[1]", "row 1: must be an object, got '1'"),
        ("json", "[]", "column 'prompt' is missing"),
        ("jsonl", '{"a": 1}\n{', "is not JSONL in UTF-8: line 2"),
        ("jsonl", '{"seed": 1, "seed": 2}', "line 1: an object has 'seed' more than once"),
        ("json", [RECORD | {"seed": 5.0}], "row 1 .*: seed must be an integer .* got '5.0'"),
        ("json", [RECORD | {"seed": None}], "row 1 .*: seed must be an integer .* got ''"),
        ("json", [RECORD | {"seed": True}], "row 1 .*: seed must be an integer .* got 'true'"),
        ("json", [RECORD | {"seed": [5]}], "row 1 .*: seed must be an integer"),
        ("json", [RECORD | {"seed": 5}, RECORD], "row 2 .*: seed must be an integer .* got ''"),
    ],
)
def test_bad_json_is_named(write, tmp_path, suffix, text, message):
    write()
    if not isinstance(text, str):
        text = json.dumps([record | {"cfg_scale": 1} for record in text])
    (tmp_path / f"metadata.{suffix}").write_text(text)
    with pytest.raises(MetadataError, match=message):
        read_metadata(tmp_path / f"metadata.{suffix}")


@pytest.mark.parametrize("column", HEADER.split(",")[1:])
def test_a_missing_column_is_named(write, column):
    names = [name for name in HEADER.split(",") if name != column]
    with pytest.raises(MetadataError, match=f"column '{column}' is missing; found 'image'"):
        read_metadata(write("a,b,c,d,e", header=",".join(names)))


def test_all_problems_are_shown_at_once_in_the_order_of_rows(write):
    with pytest.raises(MetadataError, match=r"60 problems in(?s:.*)row 2 (?s:.*)and 10 more"):
        read_metadata(write(*["a.png,x,,cpu,4,1"] * 60))
    with pytest.raises(MetadataError, match=r"4 problems in") as error:
        read_metadata(write("a.png,,1,cpu,4,0", "c.png,x,-1,cpu,4,1"))
    rows = [line.partition("row ")[2][0] for line in str(error.value).splitlines()[1:]]
    assert rows == ["2", "2", "3", "3"]


def test_a_seed_may_be_listed_twice_only_with_the_same_image(write):
    assert len(read_metadata(write(GOOD, GOOD, "b.png,x,1,cpu,8,1", "b.png,x,2,cpu,4,1"))) == 4
    header = HEADER + ",height,width"  # one seed at two sizes gives two images
    assert len(read_metadata(write(f"{GOOD},32,32", "b.png,x,1,cpu,4,1,32,48", header=header))) == 2


def test_paths_may_leave_the_root_only_where_allowed(write, tmp_path):
    (tmp_path / "set").mkdir()
    path = write("../a.png,x,1,cpu,4,1", f"{tmp_path}/b.png,x,2,cpu,4,1", name="set/metadata.csv")
    with pytest.raises(MetadataError, match="2 problems"):
        DistillDataModule(str(path)).setup("fit")
    data = DistillDataModule(str(path), allow_outside=True)
    data.setup("fit")
    assert sorted(batch["size"] for batch in data.train_dataloader()) == [(32, 32), (32, 48)]
    inside = write(f"{tmp_path}/a.png,x,1,cpu,4,1", "set/../b.png,x,2,cpu,4,1")
    assert len(read_metadata(inside)) == 2


def test_a_table_and_its_files_may_be_in_any_file_system(write, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    write()
    for name in ("a.png", "b.png"):
        memory.pipe(f"/set/images/{name}", (tmp_path / name).read_bytes())
    rows = ["images/a.png,x,1,cpu,4,1", "images/b.png,y,2,cpu,4,1"]
    memory.pipe("/set/metadata.csv", "\n".join([HEADER, *rows]).encode())
    data = DistillDataModule("memory://set/metadata.csv")
    data.setup("fit")
    found = {tuple(batch["image"].shape) for batch in data.train_dataloader()}
    assert found == {(1, 3, 32, 32), (1, 3, 32, 48)}
    memory.rm("/set/images/b.png")
    with pytest.raises(MetadataError, match="row 3: image must be a file below memory://set"):
        read_metadata("memory://set/metadata.csv")
    with pytest.raises(FileNotFoundError, match=r"memory://none/.* does not exist"):
        read_metadata("memory://none/metadata.csv")


def test_sizes_that_do_not_fit_are_refused(write):
    path = str(write(GOOD, "b.png,x,2,cpu,4,1"))
    with pytest.raises(MetadataError, match=r"row 3 .*the image is 32x48 .* set to 32x32"):
        DistillDataModule(path, height=32, width=32).setup("fit")
    with pytest.raises(MetadataError, match=r"row 3 .*1536 pixels, more than max_pixels=1024"):
        DistillDataModule(path, max_pixels=1024).setup("fit")
    DistillDataModule(path, max_pixels=1536).setup("fit")


def test_images_are_not_changed_and_ambiguous_ones_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    image = read_image(tmp_path / "rgb.png")
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), pixels)
    data = (tmp_path / "rgb.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a readable image"):
        read_image(tmp_path / "cut.png")


def reopened(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return (read_image(tmp_path / name) * 255).round().byte().permute(1, 2, 0).numpy()


def test_pictures_are_converted_predictably(tmp_path):
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert np.array_equal(reopened(tmp_path, grey), np.repeat(np.array(grey)[..., None], 3, -1))
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    palette = colours.quantize(12)
    assert np.array_equal(reopened(tmp_path, palette), np.array(palette.convert("RGB")))
    opaque = colours.convert("RGBA")
    assert np.array_equal(reopened(tmp_path, opaque), np.array(colours))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    assert np.array_equal(reopened(tmp_path, colours, exif=exif), np.rot90(np.array(colours), -1))


@pytest.mark.parametrize(
    ("mode", "name", "message"),
    [
        ("RGBA", "a.png", "transparent pixels"),
        ("LA", "a.png", "transparent pixels"),
        ("CMYK", "a.tif", "colour mode CMYK"),
        ("LAB", "a.tif", "colour mode LAB"),
        ("I;16", "a.png", "colour mode I;16 of more than 8 bits"),
        ("I", "a.tif", "colour mode I"),
        ("F", "a.tif", "colour mode F"),
    ],
)
def test_pictures_whose_conversion_would_be_a_guess_are_refused(tmp_path, mode, name, message):
    Image.new(mode, (4, 4)).save(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / name)


def test_sixteen_bits_a_colour_are_refused_not_cut(tmp_path):
    """Pillow silently reads them as 8-bit RGB."""
    rows = zlib.compress((b"\0" + bytes(range(12))) * 2)
    (tmp_path / "deep.png").write_bytes(png(2, 2, 16, rows))
    assert Image.open(tmp_path / "deep.png").mode == "RGB"
    with pytest.raises(ValueError, match="RGB of more than 8 bits"):
        read_image(tmp_path / "deep.png")


def test_several_frames_are_no_image(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has 2 frames"):
        read_image(tmp_path / "a.png")


def test_held_out_prompts_are_on_one_side():
    prompts = pd.Series([f"prompt {i % 100}" for i in range(300)])
    held = hold_out(prompts, 0.25, 0)
    assert 10 < prompts[held].nunique() < 40
    assert not set(prompts[held]) & set(prompts[~held])


@pytest.mark.parametrize("cell", ["c.png", ""])
def test_a_picture_that_cannot_be_read_is_named(write, cell):
    path = write("a.png,x,1,cpu,4,1,b.png", f"a.png,x,2,cpu,4,1,{cell}", header=HEADER + ",edit")
    message = rf"row 3 \(image='a.png'\): edit must be a picture below .*, got '{cell}'"
    with pytest.raises(MetadataError, match=message):
        read_metadata(path, call_columns={"image": "edit"})


def test_a_call_column_that_is_missing_is_named(write):
    with pytest.raises(MetadataError, match="column 'edit' is missing"):
        read_metadata(write(GOOD), call_columns={"image": "edit"})


def test_sizes_are_read_from_headers_alone(write, tmp_path):
    """A million rows without size columns must not be decoded to be counted."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write("c.png,x,1,cpu,4,1", "c.jpg,y,1,cpu,4,1", "c.tif,z,1,cpu,4,1")
    for name in ("c.png", "c.jpg", "c.tif"):
        Image.fromarray(noise).save(tmp_path / name, exif=exif)
    for name in ("c.png", "c.jpg"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    table = read_metadata(path)
    assert table[["height", "width"]].to_numpy().tolist() == [[48, 64]] * 3


# Files that are damaged, ambiguous, or no files


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, 'a.png,"x" y,2,cpu,4,1', GOOD], "row 3: has text after a closing quote"),
        ([GOOD, 'a.png,"x""" y",2,cpu,4,1', GOOD], "row 3: has text after a closing quote"),
        ([GOOD, 'a.png,"x,2,cpu,4,1', GOOD, 'a.png,"y",3,cpu,4,1'], "row 3: has text after a clo"),
        ([GOOD, 'a.png,"x,2,cpu,4,1', GOOD], "row 3: has a quote that is never closed"),
    ],
)
def test_sloppy_quotes_are_refused_with_their_row(write, rows, message):
    """pandas merges such rows, or drops the quotes."""
    with pytest.raises(MetadataError, match=message):
        read_metadata(write(*rows))


def test_a_carriage_return_in_quotes_belongs_to_the_prompt(write):
    assert read_metadata(write('a.png,"x\ry",1,cpu,4,1'))["prompt"].tolist() == ["x\ry"]


def test_values_without_a_column_are_not_passed_over(write):
    with pytest.raises(MetadataError, match="a column without a name, but rows have values in it"):
        read_metadata(write(f"{GOOD},7", header=f"{HEADER},"))
    assert len(read_metadata(write(f"{GOOD},", header=f"{HEADER},"))) == 1


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le"])
def test_utf16_is_named(write, codec):
    with pytest.raises(MetadataError, match="it looks like UTF-16, save it as UTF-8"):
        read_metadata(write(GOOD, encoding=codec))


def test_texts_that_no_file_can_hold_are_refused_with_their_row(write, tmp_path):
    write()
    good = RECORD | {"seed": 1, "cfg_scale": 1}
    texts = ("fine 😀", "half \ud83d", "NUL \0")
    (tmp_path / "metadata.json").write_text(json.dumps([good | {"prompt": t} for t in texts]))
    with pytest.raises(MetadataError) as error:
        read_metadata(tmp_path / "metadata.json")
    assert "row 2: 'prompt' holds half of a surrogate pair" in str(error.value)
    assert "row 3: 'prompt' holds a NUL character" in str(error.value)
    assert "row 1" not in str(error.value)


def test_a_pipe_instead_of_an_image_does_not_hang(write, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(
        InputError, match=r"pipe\.png is not a readable image: .*a pipe or a device"
    ):
        read_image(tmp_path / "pipe.png")
    row = "pipe.png,x,1,cpu,4,1"
    with pytest.raises(MetadataError, match=r"row 2 .*pipe\.png is not a readable image"):
        read_metadata(write(row))
    sizes = write(f"{row},32,32,", header=f"{HEADER},height,width,latents", name="sizes.csv")
    with pytest.raises(MetadataError, match=r"row 2 .*pipe\.png is not a readable image"):
        check_data(sizes)
    latents = write(",x,1,cpu,4,1,pipe.safetensors", header=f"{HEADER},latents", name="lat.csv")
    with pytest.raises(MetadataError, match=r"row 2: .*pipe\.safetensors can't be read: .*a pipe"):
        check_data(latents)


def test_a_flipped_bit_in_the_pixels_of_a_png_is_found(tmp_path):
    """Pillow does not compare the checksums of the pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", compress_level=0)
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[data.index(b"IDAT") + 100] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.png is not a readable image: its part at byte .*dam"):
        read_image(tmp_path / "a.png")
    data[data.index(b"IDAT") + 100] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    assert read_image(tmp_path / "a.png").shape == (3, 8, 8)
    (tmp_path / "a.png").write_bytes(data[:-12])  # only the mark of the end is missing
    with pytest.raises(InputError, match=r"a\.png is not a readable image: "):
        read_image(tmp_path / "a.png")
