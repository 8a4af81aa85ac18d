import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import contextlib
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image
from students import away, checkpoint_of, module
from tiny_pipelines import build

from lit_distill import export_student
from lit_distill.cli import main

torch.set_num_threads(1)  # a second thread only gets in the way of matrices this small

TINY = Path(str(files("lit_distill").joinpath("assets", "tiny")))
ROOT = Path(__file__).parent.parent


HEADER = "image,prompt,seed,rand_device,num_inference_steps,cfg_scale"


@pytest.fixture
def write(tmp_path):
    """A function that writes rows to a table, beside two images."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    Image.new("RGB", (48, 32), "red").save(tmp_path / "b.png")

    def write(*rows, header=HEADER, encoding="utf-8", name="metadata.csv"):
        path = tmp_path / name
        path.write_text("\r\n".join([header, *rows]) + "\r\n", encoding=encoding)
        return path

    return write


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Two sets of the teacher's pairs of the embedded pipeline, made by the command line."""
    out = tmp_path_factory.mktemp("pairs")
    generate(out / "train", "prompts_train.txt", 32, 0)
    generate(out / "heldout", "prompts_heldout.txt", 8, 1_000_000)
    return out


def generate(out, prompts, limit, first_seed, *options):
    with contextlib.chdir(ROOT) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        main(
            ["generate", "--model.pretrained_model_name_or_path", "tiny-digits"]
            + ["--model.torch_dtype", "float32", "--prompts", str(TINY / prompts)]
            + ["--out", str(out), "--limit", str(limit), "--first_seed", str(first_seed)]
            + ["--batch_size", "8", "--num_inference_steps", "10", "--trainer.accelerator", "cpu"]
            + ["--trainer.logger", "false", *options]
        )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Folder of a family's tiny pipeline."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def exports(folder, tmp_path_factory):
    """A student of Qwen-Image in every format."""
    model = away(module(folder("QwenImage")))
    out = tmp_path_factory.mktemp("exports")
    content = checkpoint_of(model)
    torch.save(content, out / "student.ckpt")
    for format in ("diffusers", "comfyui", "kohya", "diffsynth", "peft", "merged"):
        export_student(content, out / format, format)
    return out, model
