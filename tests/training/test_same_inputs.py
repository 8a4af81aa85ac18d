"""A resumed run names what has changed: rows, targets, pretrained weights; and never mixes them."""

import shutil
import subprocess
import sys
import warnings

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, generate
from safetensors.torch import load_file, save_file
from short_training import adamw, data, fit
from two_processes import QUIET

from lit_distill import DirectDistill, DistillDataModule
from lit_distill.errors import InputError
from lit_distill.training.checkpoint_io import read_checkpoint


def module(path="tiny-digits", **options):
    defaults = {"lora": {"r": 4}, "checkpointing": "none", "torch_dtype": "float32"}
    options = defaults | {"metrics": {}, "preflight": False, "optimizer": adamw()} | options
    return DirectDistill(path, **options)


@pytest.fixture
def rows(pairs, tmp_path):
    return shutil.copytree(pairs / "heldout", tmp_path / "rows")


def trained(rows, out, ckpt_path=None, steps=2, path="tiny-digits", **options):
    trainer = pl.Trainer(max_steps=steps, default_root_dir=out, **QUIET)
    table = str(rows / "metadata.csv")
    model = module(path, **options)
    trainer.fit(model, datamodule=DistillDataModule(table, batch_size=4), ckpt_path=ckpt_path)
    trainer.save_checkpoint(out / "saved.ckpt")
    return out / "saved.ckpt"


def reorder(table, rows):
    return table.iloc[::-1]


def other_prompts(table, rows):
    return table.assign(prompt=table["prompt"] + "!")


def fewer_steps(table, rows):
    return table.assign(num_inference_steps=2)


def more_rows(table, rows):
    return pd.concat([table, table.iloc[:1].assign(seed=9)])


def shifted(table, rows):
    for path in (rows / "latents").iterdir():
        save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    return table


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (reorder, "another order of the rows"),
        (other_prompts, "other values of prompt"),
        (fewer_steps, "other values of num_inference_steps"),
        (more_rows, "9 rows instead of 8"),
        (shifted, "other values of targets"),
    ],
)
def test_a_changed_data_set_is_named_on_resume(change, named, rows, tmp_path):
    saved = trained(rows, tmp_path)
    table = pd.read_csv(rows / "metadata.csv", dtype=str)
    change(table, rows).to_csv(rows / "metadata.csv", index=False)
    with pytest.warns(UserWarning, match=f"the training rows are not those of the .*{named}"):
        trained(rows, tmp_path, saved, 3)


def test_a_data_set_that_was_moved_is_not_named(rows, tmp_path):
    saved = trained(rows, tmp_path)
    moved = rows.rename(tmp_path / "elsewhere")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(moved, tmp_path, saved, 3)
    assert not [w for w in caught if "not those of the checkpoint" in str(w.message)]


def test_a_base_model_that_has_changed_on_disk_is_refused_by_name(rows, tmp_path):
    base = shutil.copytree(TINY, tmp_path / "base")
    saved = trained(rows, tmp_path, path=str(base))
    digest = read_checkpoint(saved)["lit_distill"]["base_digest"]
    assert list(digest) == ["transformer"] and len(digest["transformer"]) == 64
    trained(rows, tmp_path, saved, 3, path=str(base))
    (weights,) = (base / "transformer").glob("*.safetensors")
    state = load_file(weights)
    name = sorted(state)[3]
    save_file(state | {name: state[name] + 1e-3}, weights, {"format": "pt"})
    message = f"the pretrained transformer of {base} has changed since the checkpoint"
    for read in (
        lambda: trained(rows, tmp_path, saved, 4, path=str(base)),
        lambda: DirectDistill.load_from_checkpoint(saved),
    ):
        with pytest.raises(InputError, match=message):
            read()
    # Named on purpose, it is only a setting that differs.
    with pytest.warns(UserWarning, match=r"model\.pretrained_model_name_or_path=.* differs"):
        trained(rows, tmp_path, saved, 4, path="tiny-digits")


@pytest.mark.parametrize("teacher", ["stored", "online"])
def test_gap_closed_is_that_of_the_rows_as_they_are(teacher, pairs, rows, tmp_path):
    """Generated again with other guidance: the same prompts and seeds, other targets."""
    options = {"teacher_num_inference_steps": 4}

    def validate(model, table, ckpt_path=None):
        trainer = pl.Trainer(default_root_dir=tmp_path, **QUIET)
        held_out = DistillDataModule(val_metadata_path=str(table / "metadata.csv"), batch_size=4)
        return trainer.validate(model, datamodule=held_out, ckpt_path=ckpt_path, verbose=False)[0]

    if teacher == "online":
        table = pd.read_csv(rows / "metadata.csv", dtype=str)
        table[["image", "latents"]] = ""
        table.to_csv(rows / "metadata.csv", index=False)
    model = module(**options)
    validate(model, rows)
    trainer = pl.Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(model, datamodule=data(pairs))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    if teacher == "stored":
        generate(tmp_path / "again", "prompts_heldout.txt", 8, 1_000_000, "--cfg_scale", "1.0")
        changed = tmp_path / "again"
    else:
        changed, options = rows, options | {"teacher_cfg_scale": 2.0}
    known = validate(module(**options), changed, tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    content["lit_distill"]["undistilled_mse"] = {}
    torch.save(content, tmp_path / "empty.ckpt")
    fresh = validate(module(**options), changed, tmp_path / "empty.ckpt")
    for name in ("val_gap_closed", "val_undistilled_latent_mse"):
        assert known[name] == pytest.approx(fresh[name], rel=1e-5)


def test_the_schedule_counts_for_what_is_remembered(rows):
    keys = []
    for options in ({}, {"scheduler": {"shift_terminal": None}}, {"sigmas": [1.0, 0.8, 0.5, 0.2]}):
        model = module(**options)
        model.configure_model()
        keys.append(model.student.digest())
    assert len(set(keys)) == 3


class Kept(DirectDistill):
    """A user's class with an argument of its own."""

    def __init__(self, *args, folder=None, **options):
        super().__init__(*args, **options)


def test_settings_are_made_plain_or_refused_by_name(pairs, tmp_path):
    model = module(
        TINY,
        lora={"r": np.int64(4), "lora_alpha": np.float32(4), "target_modules": np.array(["to_q"])},
        sigmas=np.array([1.0, 0.8, 0.5, 0.2]),
        grad_steps=np.int64(2),
        torch_dtype=torch.float32,
        optimizer=adamw(lr=np.float64(1e-3)),
    )
    trainer = fit(model, pairs, tmp_path)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = read_checkpoint(tmp_path / "saved.ckpt")["hyper_parameters"]
    assert saved["pretrained_model_name_or_path"] == str(TINY)
    assert saved["sigmas"] == [1.0, 0.8, 0.5, 0.2] and type(saved["sigmas"]) is list
    assert saved["lora"] == {"r": 4, "lora_alpha": 4.0, "target_modules": ["to_q"]}
    fit(model, pairs, tmp_path, tmp_path / "saved.ckpt", max_steps=2)
    with pytest.raises(InputError, match=r"model\.call_kwargs\.image is a builtins\.object"):
        module(call_kwargs={"image": object()})
    with pytest.raises(InputError, match=r"model\.call_kwargs\.mask is an array of 2 dimensions"):
        module(call_kwargs={"mask": np.zeros((2, 2))})
    with pytest.raises(InputError, match=r"model\.folder is a builtins\.object"):
        Kept("tiny-digits", folder=object())
    assert Kept("tiny-digits", folder=tmp_path).hparams["folder"] == str(tmp_path)


@pytest.mark.parametrize("route", ["load_from_checkpoint", "file://", "mmap"])
def test_a_flipped_bit_is_found_by_every_route(route, rows, tmp_path):
    saved = trained(rows, tmp_path)
    raw = bytearray(saved.read_bytes())
    raw[raw.index(b"/data/0") + 300] ^= 0xFF
    saved.write_bytes(raw)
    reads = {
        "load_from_checkpoint": lambda: DirectDistill.load_from_checkpoint(saved),
        "file://": lambda: trained(rows, tmp_path, f"file://{saved}", 3),
        "mmap": lambda: read_checkpoint(saved, mmap=True),
    }
    with pytest.raises(InputError, match=r"saved\.ckpt is damaged: the checksum"):
        reads[route]()


def test_a_checkpoint_is_read_by_its_url(rows, tmp_path):
    saved = trained(rows, tmp_path)
    assert trained(rows, tmp_path, f"file://{saved}", 3) == saved


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook", "ddp_fork"])
def test_strategies_that_return_no_weights_are_refused_by_name(strategy, rows):
    code = f"""
import lightning.pytorch as pl
from lit_distill import DirectDistill, DistillDataModule
if __name__ == "__main__":
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy={strategy!r}, logger=False)
    data = DistillDataModule({str(rows / "metadata.csv")!r})
    trainer.fit(DirectDistill("tiny-digits", lora={{"r": 4}}), datamodule=data)
"""
    script = rows / "script.py"
    script.write_text(code)
    found = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=rows, timeout=300
    )
    assert found.returncode != 0
    assert "InputError: trainer.strategy: processes that are spawned or forked" in found.stderr
    assert "pickle" not in found.stderr.rpartition("InputError")[2]
