"""Images of prompts while training: what is shown is what it says, and training does not notice."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from short_training import data, fit, module
from torch.utils.data import DataLoader
from two_processes import QUIET

from lit_distill import EMA, DistillDataModule, SampleImages, load_pipeline
from lit_distill.cli import main
from lit_distill.errors import InputError
from lit_distill.evaluation.contact_sheet import contact_sheet

PROMPTS = ["a red handwritten seven on a blue background", "a green handwritten three"]
DROPOUT = {"r": 4, "lora_dropout": 0.1}
TEACHER = {"teacher_num_inference_steps": 6, "teacher_cfg_scale": 3.0}


def samples(**options):
    return SampleImages(PROMPTS, **{"every_n_steps": 2, "seeds": [5, 7]} | options)


def pictures(path):
    """The images of a sheet's columns, without labels and prompts."""
    sheet = np.asarray(Image.open(path))
    rows = [slice(top + 56, top + 56 + 256) for top in range(0, sheet.shape[0] - 56, 290)]
    columns = [slice(left, left + 256) for left in range(12, sheet.shape[1] - 12, 268)]
    return [np.stack([sheet[row, column] for row in rows]) for column in columns]


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    """Five steps with averaged weights, dropout and two batches a step, logged everywhere."""
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    path = tmp_path_factory.mktemp("run")
    loggers = [
        TensorBoardLogger(path, name="board", version=0),
        WandbLogger(project="digits", offline=True, save_dir=path),
    ]
    torch.manual_seed(0)
    model = module(lora=DROPOUT, **TEACHER)
    options = {"max_steps": 5, "accumulate_grad_batches": 2, "callbacks": [EMA(0.5), samples()]}
    fit(model, pairs, path, logger=loggers, enable_checkpointing=False, batch_size=2, **options)
    wandb.finish()
    return model, path


def test_sheets_are_written_and_go_to_tensorboard_and_wandb(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, path = run
    files = sorted(file.name for file in (path / "board/version_0/samples").iterdir())
    assert files == [f"step_00000{step}.png" for step in (0, 2, 4, 5)]
    events = EventAccumulator(str(path / "board/version_0"))
    events.Reload()
    assert [image.step for image in events.Images("samples")] == [0, 2, 4, 5]
    assert len(list(path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))) == 4
    assert list(path.glob("wandb/offline-run-*/*.wandb"))


def test_the_columns_are_teacher_undistilled_and_the_averaged_student(run):
    model, path = run
    folder = path / "board/version_0/samples"
    first, last = pictures(folder / "step_000000.png"), pictures(folder / "step_000005.png")
    assert len(first) == 3 and len(first[0]) == 4
    assert np.array_equal(first[1], first[2])  # nothing is learned yet
    assert np.array_equal(first[0], last[0]) and np.array_equal(first[1], last[1])
    assert not np.array_equal(first[2], last[2]) and not np.array_equal(first[0], first[1])
    base = load_pipeline("tiny-digits", torch_dtype="float32")
    student = model.pipe  # holds the average after training
    settings = [
        (base, 6, {"true_cfg_scale": 3.0, "negative_prompt": " "}),
        (base, 4, {"true_cfg_scale": 1.0}),
        (student, 4, {"true_cfg_scale": 1.0}),
    ]
    rows = []
    for prompt in PROMPTS:
        for seed in (5, 7):
            images = []
            for pipe, steps, guidance in settings:
                generator = torch.Generator("cpu").manual_seed(seed)
                call = {"num_inference_steps": steps, "height": 32, "width": 32} | guidance
                images += pipe(prompt, generator=generator, **call).images
            rows.append((f"{prompt} (seed {seed})", images))
    contact_sheet(["teacher", "undistilled", "student"], rows).save(path / "expected.png")
    expected = Image.open(path / "expected.png")
    found = Image.open(folder / "step_000005.png")
    difference = np.abs(np.asarray(expected, int) - np.asarray(found, int))
    assert expected.size == found.size and difference.max() <= 2  # of 255


@pytest.mark.parametrize("lora", [DROPOUT, None], ids=["lora", "full"])
def test_training_and_its_resume_are_the_same_with_samples(pairs, tmp_path, lora):
    """Random streams, modes and weights are left as they were, to the last bit."""
    weights = []
    for name, first, second in (("none", [], []), ("samples", [samples()], [samples()])):
        torch.manual_seed(0)
        options = {"enable_checkpointing": False, "default_root_dir": tmp_path / name}
        # The average comes after the samples, which is the wrong order.
        callbacks = [*first, EMA(0.5)]
        model = module(lora=lora, **TEACHER)
        trainer = fit(model, pairs, tmp_path / name, max_steps=3, callbacks=callbacks)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        model = module(lora=lora, **TEACHER)
        options |= {"ckpt_path": tmp_path / f"{name}.ckpt", "callbacks": [*second, EMA(0.5)]}
        trainer = fit(model, pairs, tmp_path / name, max_steps=5, **options)
        trainer.save_checkpoint(tmp_path / f"{name}_end.ckpt")
        content = torch.load(tmp_path / f"{name}_end.ckpt", weights_only=True)
        weights.append({**content["state_dict"], **content["ema"]["weights"]})
        weights[-1]["rng"] = torch.get_rng_state()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    written = tmp_path / "samples/samples"
    assert sorted(file.name for file in written.iterdir()) == [
        f"step_00000{step}.png" for step in (0, 2, 3, 4, 5)
    ]
    # A whole denoiser that has been trained can't show what it was before.
    assert len(pictures(written / "step_000002.png")) == 3
    assert len(pictures(written / "step_000005.png")) == (3 if lora else 1)


def test_prompts_are_encoded_before_the_encoders_are_released(run, pairs, tmp_path):
    options = QUIET | {"default_root_dir": tmp_path, "max_steps": 1, "callbacks": [samples()]}
    rows = data(pairs, cache_dir=str(tmp_path / "cache"))
    model = module(**TEACHER, preflight=False)
    pl.Trainer(**options).fit(model, datamodule=rows)
    with pytest.raises(RuntimeError, match="the encoders are released"):
        model.pipe.encode_prompt(["a prompt that no row has"])
    assert model.pipe.vae is not model.placement.vae is not None  # released again
    found = pictures(tmp_path / "samples/step_000000.png")
    expected = pictures(run[1] / "board/version_0/samples/step_000000.png")
    assert np.abs(np.subtract(found, expected, dtype=int)).max() <= 1  # of 255
    assert (tmp_path / "samples/step_000001.png").is_file()


REFUSED = {
    "no prompt": ({"prompts": []}, r"sample.prompts must be texts that are not empty, got \[\]"),
    "a blank prompt": ({"prompts": ["a", " "]}, r"must be texts that are not empty, got \['a', ' "),
    "no step": ({"every_n_steps": 0}, "sample.every_n_steps must be >= 1, got 0"),
    "no seed": ({"seeds": []}, r"sample.seeds must be integers >= 0 and < 2\^63, got \[\]"),
    "a bad seed": ({"seeds": [1, -1]}, r"sample.seeds must be integers .*, got \[1, -1\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_refused_before_anything_is_loaded(name):
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        SampleImages(**options)


def test_other_data_is_refused_before_anything_is_loaded(tmp_path):
    options = QUIET | {"default_root_dir": tmp_path, "max_steps": 1, "callbacks": [samples()]}
    model = module()
    with pytest.raises(InputError, match="first row of a DistillDataModule, but the data is None"):
        pl.Trainer(**options).fit(model, DataLoader([{}]))
    assert not hasattr(model, "denoisers")


def test_the_command_takes_prompts_and_needs_none(pairs, tmp_path, capsys, monkeypatch):
    common = ["fit", "--model.pretrained_model_name_or_path", "tiny-digits", "--model.lora"]
    common += ["{r: 4}", "--model.torch_dtype", "float32", "--model.preflight", "false"]
    common += ["--model.teacher_num_inference_steps", "2", "--trainer.default_root_dir"]
    common += [str(tmp_path), "--data.metadata_path", str(pairs / "train/metadata.csv")]
    common += ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    common += ["--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]
    main(common)
    assert not list(tmp_path.rglob("*.png"))
    main([*common, "--sample.prompts", '["a red seven, on blue"]', "--sample.seeds", "[3]"])
    files = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert files == ["step_000000.png", "step_000001.png"]
    monkeypatch.setattr("sys.argv", ["lit-distill", *common, "--sample.promts", "[a]"])
    with pytest.raises(SystemExit):
        main()
    assert "unknown option '--sample.promts' (did you mean '--sample.prompts'" in (
        capsys.readouterr().err
    )
    assert DistillDataModule().sample_set is None
