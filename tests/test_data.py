import numpy as np
import pytest
from PIL import Image

from lit_distill import DistillDataModule
from lit_distill.data import BucketBatchSampler
from lit_distill.metadata import MetadataError, hold_out, read_metadata
from lit_distill.pictures import read_image

HEADER = "image,prompt,seed,rand_device,num_inference_steps,cfg_scale"


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    Image.new("RGB", (48, 32), "red").save(tmp_path / "b.png")

    def write(*rows, header=HEADER, encoding="utf-8"):
        path = tmp_path / "metadata.csv"
        path.write_text("\r\n".join([header, *rows]) + "\r\n", encoding=encoding)
        return path

    return write


def test_columns_are_parsed_by_their_type(write):
    rows = ["a.png,NA,1,cpu,4,1", "a.png,007,9007199254740993,cpu,4,1", 'a.png,"红, 1",3,cpu,8,1.5']
    table = read_metadata(write(*rows, encoding="utf-8-sig"))
    assert table["prompt"].tolist() == ["NA", "007", "红, 1"]
    assert table["seed"].tolist() == [1, 9007199254740993, 3]
    assert table["row"].tolist() == [2, 3, 4]
    assert table["cfg_scale"].tolist() == [1.0, 1.0, 1.5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png,x,,cpu,4,1", r"row 2 \(image='a.png'\): seed must be an integer >= 0 .*, got ''"),
        ("a.png,x,1.0,cpu,4,1", "seed must be an integer .* got '1.0'"),
        ("a.png,x,-1,cpu,4,1", "seed must be an integer .* got '-1'"),
        ("a.png,x,9999999999999999999,cpu,4,1", "seed must be .* got '9999999999999999999'"),
        ("a.png,x,1,cpu,4.5,1", "num_inference_steps must be an integer >= 1 .* got '4.5'"),
        ("a.png,x,1,cpu,0,1", "num_inference_steps must be an integer >= 1 .* got '0'"),
        ("a.png,x,1,cpu,4,none", "cfg_scale must be a number >= 1, got 'none'"),
        ("a.png,x,1,cpu,4,0.5", "cfg_scale must be a number >= 1, got '0.5'"),
        ("a.png,x,1,gpu,4,1", "rand_device must be cpu, or cuda .* got 'gpu'"),
        ("a.png, ,1,cpu,4,1", "prompt must be a text that is not empty, got ' '"),
        ("c.png,x,1,cpu,4,1", "row 2: image must be a file below .*, got 'c.png'"),
    ],
)
def test_a_bad_value_is_named_with_its_row(write, row, message):
    with pytest.raises(MetadataError, match=message):
        read_metadata(write(row))


@pytest.mark.parametrize("column", HEADER.split(",")[1:])
def test_a_missing_column_is_named(write, column):
    names = [name for name in HEADER.split(",") if name != column]
    with pytest.raises(MetadataError, match=f"column '{column}' is missing; found 'image'"):
        read_metadata(write("a,b,c,d,e", header=",".join(names)))


def test_all_problems_are_shown_at_once(write):
    with pytest.raises(MetadataError, match=r"60 problems in(?s:.*)row 2 (?s:.*)and 10 more"):
        read_metadata(write(*["a.png,x,,cpu,4,1"] * 60))


def test_sizes_that_do_not_fit_are_refused(write):
    path = str(write("a.png,x,1,cpu,4,1", "b.png,x,2,cpu,4,1"))
    with pytest.raises(MetadataError, match=r"row 3 .*the image is 32x48 .* set to 32x32"):
        DistillDataModule(path, height=32, width=32).setup("fit")
    with pytest.raises(MetadataError, match=r"row 3 .*1536 pixels, more than max_pixels=1024"):
        DistillDataModule(path, max_pixels=1024).setup("fit")


def test_images_are_not_changed_and_ambiguous_ones_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    image = read_image(tmp_path / "rgb.png")
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), pixels)
    Image.new("RGBA", (4, 4), (1, 2, 3, 100)).save(tmp_path / "alpha.png")
    with pytest.raises(ValueError, match="transparent pixels"):
        read_image(tmp_path / "alpha.png")
    Image.new("CMYK", (4, 4)).save(tmp_path / "cmyk.tif")
    with pytest.raises(ValueError, match="colour mode CMYK"):
        read_image(tmp_path / "cmyk.tif")
    data = (tmp_path / "rgb.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a readable image"):
        read_image(tmp_path / "cut.png")


def sampler(rank=0, world_size=1, **options):
    buckets = [np.arange(0, 7), np.arange(7, 20)]
    options = {"batch_size": 2, "shuffle": True} | options
    return BucketBatchSampler(buckets, rank=rank, world_size=world_size, **options)


def test_an_epoch_passes_over_every_row_and_depends_on_seed_and_epoch_only():
    first = sampler()
    plan = list(first)
    assert sorted(row for batch in plan for row in batch) == list(range(20))
    assert len(plan) == len(first)
    assert all(len({row < 7 for row in batch}) == 1 for batch in plan)
    assert list(sampler()) == plan
    first.epoch = 1
    assert list(first) != plan


def test_ranks_share_buckets_at_every_step():
    plans = [list(sampler(rank, 2)) for rank in (0, 1)]
    assert len(plans[0]) == len(plans[1])
    for one, two in zip(*plans, strict=True):
        assert len(one) == len(two)
        assert len({row < 7 for row in one + two}) == 1
    assert {row for plan in plans for batch in plan for row in batch} == set(range(20))


def test_held_out_prompts_are_on_one_side(write):
    import pandas as pd

    prompts = pd.Series([f"prompt {i % 100}" for i in range(300)])
    held = hold_out(prompts, 0.25, 0)
    assert 10 < prompts[held].nunique() < 40
    assert not set(prompts[held]) & set(prompts[~held])


def test_a_loader_goes_on_where_its_state_was_taken(pairs):
    def loader():
        data = DistillDataModule(str(pairs / "train/metadata.csv"), batch_size=4)
        data.setup("fit")
        return data.train_dataloader()

    rows = [batch["row"] for batch in loader()]
    first, second = loader(), loader()
    iterator = iter(first)
    begun = [next(iterator)["row"] for _ in range(3)]
    second.load_state_dict(first.state_dict())
    assert begun + [batch["row"] for batch in second] == rows
    following = [batch["row"] for batch in second]
    assert sorted(row for batch in following for row in batch) == list(range(2, 34))
    assert following != rows


def test_held_out_rows_come_from_the_first_every_time(pairs):
    data = DistillDataModule(None, str(pairs / "heldout/metadata.csv"), batch_size=2)
    data.setup("validate")
    loader = data.val_dataloader()
    assert next(iter(loader))["row"] == next(iter(loader))["row"] == [2, 3]


def test_call_columns_are_pictures_numbers_or_texts(write):
    header = HEADER + ",edit,strength,style"
    rows = ["a.png,x,1,cpu,4,1,b.png,0.5,oil", "a.png,y,2,cpu,4,1,b.png,0.5,ink"]
    rows += ["a.png,z,3,cpu,4,1,a.png,0.5,oil", "a.png,w,4,cpu,4,1,b.png,0.7,oil"]
    columns = {"image": "edit", "strength": "strength", "prompt_2": "style"}
    path = write(*rows, header=header)
    data = DistillDataModule(str(path), call_columns=columns, batch_size=4)
    data.setup("fit")
    batches = {tuple(sorted(batch["row"])): batch["call"] for batch in data.train_dataloader()}
    assert set(batches) == {(2, 3), (4,), (5,)}  # by size of picture, and by number
    call = batches[2, 3]
    assert [picture.size for picture in call["image"]] == [(48, 32)] * 2
    assert call["strength"] == 0.5
    assert sorted(call["prompt_2"]) == ["ink", "oil"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("c.png", r"row 3 \(image='a.png'\): edit must be a picture below .*, got 'c.png'"),
        ("", r"row 3 \(image='a.png'\): edit must be a picture below .*, got ''"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(write, cell, message):
    path = write("a.png,x,1,cpu,4,1,b.png", f"a.png,x,2,cpu,4,1,{cell}", header=HEADER + ",edit")
    with pytest.raises(MetadataError, match=message):
        read_metadata(path, call_columns={"image": "edit"})


def test_a_call_column_that_is_missing_is_named(write):
    with pytest.raises(MetadataError, match="column 'edit' is missing"):
        read_metadata(write("a.png,x,1,cpu,4,1"), call_columns={"image": "edit"})
