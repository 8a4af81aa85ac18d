import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, generate
from folders import hashes
from PIL import Image
from safetensors.torch import load_file

from lit_distill import load_pipeline
from lit_distill.data.metadata import read_metadata
from lit_distill.data.table_io import MetadataError
from lit_distill.pipelines.rollout import sample
from lit_distill.teacher.prompts import plan_pairs, read_prompts


def test_an_interrupted_run_resumes_to_the_same_files(pairs, tmp_path):
    generate(tmp_path, "prompts_heldout.txt", 8, 1_000_000)
    whole = hashes(tmp_path)
    assert whole == hashes(pairs / "heldout")
    for name in ("images/000003.png", "latents/000005.safetensors", "metadata.csv"):
        (tmp_path / name).unlink()
    killed = f".000003.png.{'0123456789abcdef' * 2}.tmp"
    (tmp_path / "images" / killed).write_text("half of an ima")
    kept = (tmp_path / "images/000000.png").stat().st_mtime_ns
    generate(tmp_path, "prompts_heldout.txt", 8, 1_000_000)
    assert hashes(tmp_path) == whole
    assert (tmp_path / "images/000000.png").stat().st_mtime_ns == kept


# Imports before forking, so that a run is killed while it works, not while it imports.
RUNS = """
import os, random, signal, sys, time
from pathlib import Path
from conftest import generate
from lit_distill import load_pipeline

def begin(before=lambda: None):
    child = os.fork()
    if child == 0:
        try:
            before()
            generate(out, "prompts_heldout.txt", 24, 0, "--batch_size", "2", *sys.argv[2:])
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
    return child

def end(child):
    return os.waitpid(child, 0)[1]

out = Path(sys.argv[1])
load_pipeline("tiny-digits")
"""

KILLED = """
rng = random.Random(0)
finished = lambda: len(list(out.glob("*/0*")))
for _ in range(5):
    child = begin()
    goal = finished() + rng.randint(0, 9)
    while finished() < goal:
        time.sleep(0.001)
    time.sleep(0.05 * rng.random())
    os.kill(child, signal.SIGKILL)
    print("killed", os.WTERMSIG(end(child)), "at", finished(), flush=True)
print("ended", end(begin()))
"""

LIMITED = """
import resource
print("ended", end(begin(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)))))
"""


def run(script, *arguments):
    command = [sys.executable, "-c", RUNS + script, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_run_killed_five_times_resumes_to_the_files_of_an_uninterrupted_run(tmp_path):
    output = run(KILLED, str(tmp_path / "killed"))
    assert output.count("killed 9 at") == 5, output
    assert "ended 0" in output
    generate(tmp_path / "whole", "prompts_heldout.txt", 24, 0, "--batch_size", "2")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert len(read_metadata(tmp_path / "killed/metadata.csv")) == 24


def test_a_file_that_cannot_be_written_is_reported_and_never_listed(tmp_path):
    size = ["--height", "64", "--width", "64", "--limit", "2"]
    output = run(LIMITED, str(tmp_path / "set"), *size)
    assert "latents/000000.safetensors can't be written: File too large" in output
    assert "ended 256" in output
    assert set(hashes(tmp_path / "set")) == {"provenance.json"}
    generate(tmp_path / "set", "prompts_heldout.txt", 2, 0, "--batch_size", "2", *size)
    assert len(read_metadata(tmp_path / "set/metadata.csv")) == 2


def test_a_folder_that_cannot_be_created_is_reported_before_anything_is_generated(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/set can't be written: Not a directory"):
        generate(tmp_path / "file/set", "prompts_heldout.txt", 2, 0)


def test_two_processes_write_the_same_files_as_one(tmp_path):
    generate(tmp_path / "one", "prompts_heldout.txt", 10, 0, "--batch_size", "2")
    options = ["--model.pretrained_model_name_or_path", "tiny-digits"]
    options += ["--model.torch_dtype", "float32", "--prompts", str(TINY / "prompts_heldout.txt")]
    options += ["--out", str(tmp_path / "two"), "--limit", "10", "--batch_size", "2"]
    options += ["--num_inference_steps", "10", "--trainer.accelerator", "cpu"]
    options += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.logger", "false"]
    command = [sys.executable, "-m", "lit_distill", "generate", *options]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "Generated 10 images" in found.stderr
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert len(read_metadata(tmp_path / "two/metadata.csv")) == 10


def test_generate_refuses_a_folder_of_other_pairs(pairs):
    with pytest.raises(ValueError, match=r"cfg_scale was 4.0, now 5.0"):
        generate(pairs / "heldout", "prompts_heldout.txt", 8, 1_000_000, "--cfg_scale", "5")


def test_generate_records_how_the_pairs_were_made(pairs):
    table = pd.read_csv(pairs / "heldout/metadata.csv")
    prompts = (TINY / "prompts_heldout.txt").read_text().splitlines()
    assert table["prompt"].tolist() == prompts[:8]
    assert table["seed"].tolist() == list(range(1_000_000, 1_000_008))
    assert set(table["num_inference_steps"]) == {4}
    assert set(table["teacher_num_inference_steps"]) == {10}
    assert set(table["height"]) == {32}  # known, though the pipeline's default
    note = json.loads(Image.open(pairs / "heldout/images/000000.png").info["lit_distill"])
    assert note["prompt"] == prompts[0]
    assert note["cfg_scale"] == 4.0
    facts = json.loads((pairs / "heldout/provenance.json").read_text())
    assert set(facts["versions"]) == {
        "lit-distill", "torch", "diffusers", "transformers", "lightning"
    }  # fmt: skip
    pipe = load_pipeline("tiny-digits")
    assert facts["drawn_with"]["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    pipe(prompts[0], num_inference_steps=10, true_cfg_scale=4.0, negative_prompt=" ")
    recorded = facts["drawn_with"]["schedules"]["default"]
    for name in ("timesteps", "sigmas"):
        expected = getattr(pipe.scheduler, name)
        torch.testing.assert_close(torch.tensor(recorded[name]), expected, rtol=1e-5, atol=0)


def test_prompts_may_have_sizes_and_the_teacher_another_scheduler(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    texts = ["a red handwritten seven on a blue background", "a blue handwritten one"]
    rows = [{"prompt": texts[0]}, {"prompt": texts[1], "height": 48, "width": 32}]
    rows += [{"prompt": texts[0], "height": 32, "width": 32}, {"prompt": ""}]
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "set"
    options = ["--scheduler", "UniPCMultistepScheduler", "--height", "32", "--width", "32"]
    negative = ["--model.call_kwargs", "{negative_prompt: a green background}"]
    generate(out, prompts, 3, 0, *options, *negative)
    table = read_metadata(out / "metadata.csv")
    assert table[["height", "width"]].to_numpy().tolist() == [[32, 32], [48, 32], [32, 32]]
    assert Image.open(out / "images/000001.png").size == (32, 48)
    facts = json.loads((out / "provenance.json").read_text())["drawn_with"]
    assert facts["scheduler"]["class"] == "UniPCMultistepScheduler"
    assert set(facts["schedules"]) == {"32x32", "48x32"}
    from diffusers import UniPCMultistepScheduler

    pipe = load_pipeline("tiny-digits")
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    latents, _ = sample(
        pipe,
        num_inference_steps=10,
        cfg_scale=4.0,
        generator=[torch.Generator().manual_seed(1)],
        prompt=[texts[1]],
        negative_prompt="a green background",
        height=48,
        width=32,
    )
    stored = load_file(out / "latents/000001.safetensors")["latents"]
    assert torch.equal(latents[0], stored)
    with pytest.raises(ValueError, match=r"scheduler must be a scheduler class .* got 'Euler'"):
        generate(tmp_path / "other", prompts, 3, 0, "--scheduler", "Euler")


def test_a_size_that_the_pipeline_does_not_support_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError, match=r"generates 32x32 .* when asked for 36x36"):
        generate(tmp_path, "prompts_heldout.txt", 1, 0, "--height", "36", "--width", "36")
    assert set(hashes(tmp_path)) == {"provenance.json"}
    generate(tmp_path, "prompts_heldout.txt", 1, 0)  # the folder is still free for another try
    assert Image.open(tmp_path / "images/000000.png").size == (32, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,height,width\nx,32,\n", "row 2: width must be given together with height, got ''"),
        ("prompt,height,width\nx,32,1.5\n", "row 2: width must be an integer >= 1 .* got '1.5'"),
        ("text\nx\n", "field 'prompt' is missing; found 'text'"),
        ("prompt\n\n", "there is no prompt"),
    ],
)
def test_invalid_prompts_are_named(tmp_path, text, message):
    (tmp_path / "prompts.csv").write_text(text)
    with pytest.raises(MetadataError, match=message):
        read_prompts(tmp_path / "prompts.csv")


def test_every_prompt_comes_once_before_any_comes_again(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    planned = plan_pairs(read_prompts(tmp_path / "prompts.txt"), 2, first_seed=7)
    assert [(pair.prompt, pair.seed) for pair in planned] == [
        ("one", 7), ("two", 8), ("one", 9), ("two", 10)
    ]  # fmt: skip
