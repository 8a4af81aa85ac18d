import numpy as np
import pytest
from conftest import HEADER
from PIL import Image

from lit_distill import DirectDistill, DistillDataModule
from lit_distill.data.bucket_sampler import BucketBatchSampler


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


def test_a_loader_resumes_at_its_saved_state(pairs):
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


def test_held_out_rows_always_start_from_the_first(pairs):
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


def test_an_image_of_a_size_that_the_pipeline_would_round_is_named(write, tmp_path):
    Image.new("RGB", (33, 33)).save(tmp_path / "c.png")
    data = DistillDataModule(str(write("a.png,x,1,cpu,4,1", "c.png,y,2,cpu,4,1")))
    data.setup("fit")
    batches = {batch["row"][0]: batch for batch in data.train_dataloader()}
    model = DirectDistill("tiny-digits", torch_dtype="float32", lora={"r": 4})
    model.configure_model()
    assert model.teacher_target(batches[2]).shape == (1, 16, 16)
    with pytest.raises(ValueError, match=r"row 3: QwenImagePipeline can't generate 33x33 pixels"):
        model.teacher_target(batches[3])
