import shutil
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
from conftest import HEADER
from PIL import Image
from safetensors.torch import load_file, save_file

from lit_distill import DirectDistill, DistillDataModule
from lit_distill.data.bucket_sampler import BucketBatchSampler
from lit_distill.errors import InputError


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


class Rows(pl.Callback):
    """Records the rows of each epoch and batch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_start(self, trainer, module):
        self.epochs.append([])

    def on_train_batch_start(self, trainer, module, batch, index):
        self.epochs[-1].append(batch["row"])


class Nothing(pl.LightningModule):
    """Trains nothing."""

    def training_step(self, batch, index):
        return None

    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("limit", "number", "workers"),
    [(1, 1, 0), (3, 3, 0), (0.25, 2, 0), (1.0, 8, 0), (100, 8, 0), (3, 3, 1)],
)
def test_overfitting_uses_the_same_rows_in_every_epoch(pairs, limit, number, workers):
    rows = Rows()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=4, overfit_batches=limit, callbacks=[rows], num_sanity_val_steps=0, **options
    )
    table = str(pairs / "train/metadata.csv")
    trainer.fit(Nothing(), datamodule=DistillDataModule(table, batch_size=4, num_workers=workers))
    assert len(rows.epochs) == 4
    assert all(epoch == rows.epochs[0] for epoch in rows.epochs)
    assert len(rows.epochs[0]) == number
    assert len({row for batch in rows.epochs[0] for row in batch}) == 4 * number


def test_overfitting_resumes_within_an_epoch_and_shares_rows_between_processes():
    def batches(rank, start=0):
        batches = sampler(rank, 2)
        batches.overfit, batches.position = 3, start
        return batches

    both = [batches(rank).plan()[:3] for rank in (0, 1)]
    assert len({row for plan in both for batch in plan for row in batch}) >= 9
    later = batches(0)
    later.epoch = 5
    assert later.plan()[:3] == both[0]
    assert not batches(0, 2).epoch_is_over
    assert next(iter(batches(0, 2))) == both[0][2]
    assert batches(0, 3).epoch_is_over


@pytest.mark.parametrize("workers", [0, 1])
def test_a_target_of_another_shape_is_named(pairs, tmp_path, workers):
    folder = shutil.copytree(pairs / "train", tmp_path / "copy")
    path = folder / "latents/000002.safetensors"
    tensor = load_file(path)["latents"]
    save_file({"latents": tensor[..., :-1].contiguous()}, path)
    data = DistillDataModule(str(folder / "metadata.csv"), batch_size=32, num_workers=workers)
    data.setup("fit")
    expected = rf"^row 4: {path} holds latents of shape \(.*\), but \({tensor.shape[0]}, .*\) is "
    with pytest.raises(
        InputError, match=expected + r"expected, as in row \d+ \(.*safetensors\): .*$"
    ):
        next(iter(data.train_dataloader()))


def test_the_sampler_of_lightning_is_refused_with_several_processes(pairs):
    data = DistillDataModule(str(pairs / "train/metadata.csv"))
    data.setup("fit")
    connector = SimpleNamespace(use_distributed_sampler=True)
    data.trainer = SimpleNamespace(world_size=2, _accelerator_connector=connector)
    with pytest.raises(InputError, match="set use_distributed_sampler=False in the Trainer"):
        data.train_dataloader()


def test_encodings_are_stored_on_this_machine():
    with pytest.raises(InputError, match=r"data\.cache_dir must be a local folder, got 's3://"):
        DistillDataModule(cache_dir="s3://bucket/cache")


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
