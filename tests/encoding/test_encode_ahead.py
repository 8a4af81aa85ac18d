"""Encoding before training: interrupted, resumed, with damaged shards, by several processes."""

import signal
import subprocess
import sys
from functools import partial

import pandas as pd
import pytest
import torch
from PIL import Image

import lit_distill.encoding.encode_once
from lit_distill import load_pipeline
from lit_distill.data.dataset import PairDataset
from lit_distill.data.metadata import read_metadata
from lit_distill.encoding.encode_ahead import encode_ahead
from lit_distill.encoding.encode_once import EncodeOnce, encoded_image
from lit_distill.encoding.store import FOLDER, EncodingStore
from lit_distill.errors import InputError

PROMPTS = ["a red seven", "a blue one", "a green two", "a red handwritten nine"]


@pytest.fixture
def rows(tmp_path):
    """Four pairs, whose targets are images."""
    for index in range(len(PROMPTS)):
        Image.new("RGB", (32, 32), (60 * index, 0, 0)).save(tmp_path / f"{index}.png")
    table = pd.DataFrame(
        {
            "image": [f"{index}.png" for index in range(4)],
            "prompt": PROMPTS,
            "seed": range(4),
            "rand_device": "cpu",
            "num_inference_steps": 2,
            "cfg_scale": 1,
        }
    )
    table.to_csv(tmp_path / "metadata.csv", index=False)
    return PairDataset(read_metadata(str(tmp_path / "metadata.csv"), None, {}))


def call(batch):
    size = dict(zip(("height", "width"), batch["size"], strict=True))
    generator = [torch.Generator().manual_seed(seed) for seed in batch["seed"]]
    return {"prompt": batch["prompt"], "generator": generator, **size, **batch["call"]}


@pytest.fixture
def count(monkeypatch):
    """The names of the encoders that are called."""
    calls = []
    original = EncodeOnce.encode

    def encode(self, method, arguments):
        calls.append(method.__name__)
        return original(self, method, arguments)

    monkeypatch.setattr(EncodeOnce, "encode", encode)
    return calls


def encode(rows, folder, **options):
    once = EncodeOnce(load_pipeline("tiny-digits"), EncodingStore(folder))
    encode_ahead(once, [rows], call, 1.0, **options)
    return once


def shards(folder):
    return sorted((folder / FOLDER).glob("*.safetensors"))


def damage(path):
    """Flip bits of all tensors."""
    content = bytearray(path.read_bytes())
    for position in range(8 + int.from_bytes(content[:8], "little"), len(content), 16):
        content[position] ^= 1
    path.write_bytes(content)


def each_in_a_shard(monkeypatch):
    monkeypatch.setattr("lit_distill.encoding.store.SHARD_BYTES", 0)


def test_a_lost_shard_is_encoded_again_also_if_it_held_only_a_part_of_a_row(
    rows, tmp_path, monkeypatch, count
):
    each_in_a_shard(monkeypatch)
    encode(rows, tmp_path / "cache")
    complete = len(count)
    assert len(shards(tmp_path / "cache")) > 8
    count.clear()
    encode(rows, tmp_path / "cache")
    assert count == []
    for shard in shards(tmp_path / "cache"):
        content = shard.read_bytes()
        shard.unlink()
        once = encode(rows, tmp_path / "cache")
        once.release(torch.device("cpu"))
        rows.encoded = partial(encoded_image, once.store, once.namespace)
        for index in range(len(rows)):
            rows[index]
            batch = {"prompt": [rows.prompts[index]], "seed": [index], "size": (32, 32), "call": {}}
            once.populate(cfg_scale=1.0, num_inference_steps=2, **call(batch))
        rows.encoded = None
        shard.write_bytes(content)
    assert len(count) <= complete


def test_a_damaged_shard_is_encoded_again_if_the_encoders_are_there(
    rows, tmp_path, monkeypatch, count
):
    each_in_a_shard(monkeypatch)
    encode(rows, tmp_path / "cache")
    for shard in shards(tmp_path / "cache"):
        damage(shard)
    count.clear()
    once = EncodeOnce(load_pipeline("tiny-digits"), EncodingStore(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=r"is damaged .* its content is encoded again"):
        batch = {"prompt": [PROMPTS[0]], "seed": [0], "size": (32, 32), "call": {}}
        once.populate(cfg_scale=1.0, num_inference_steps=2, **call(batch))
    assert count == ["encode_prompt"]


@pytest.mark.parametrize("fault", ["damaged", "vanished"])
def test_a_shard_that_is_lost_during_training_is_named_with_the_remedy(
    rows, tmp_path, fault, count
):
    once = encode(rows, tmp_path / "cache")
    once.release(torch.device("cpu"))
    rows.encoded = partial(encoded_image, once.store, once.namespace)
    once.store._open.clear()
    for shard in shards(tmp_path / "cache"):
        damage(shard) if fault == "damaged" else shard.unlink()
    expected = rf"\.safetensors (is|has) {fault}.*; start training again: its content is then enc"
    with pytest.raises(InputError, match=expected):
        for index in range(len(rows)):
            rows[index]
    count.clear()
    again = encode(rows, tmp_path / "cache")
    assert count
    again.release(torch.device("cpu"))
    rows.encoded = partial(encoded_image, again.store, again.namespace)
    for index in range(len(rows)):
        rows[index]


def test_processes_share_prompts_and_images_and_read_only_their_share(
    rows, tmp_path, monkeypatch, count
):
    read = []
    original = lit_distill.encoding.encode_ahead.content_digests

    def content_digests(paths):
        read.append(set(paths))
        return original(paths)

    monkeypatch.setattr(lit_distill.encoding.encode_ahead, "content_digests", content_digests)
    encode(rows, tmp_path / "alone")
    alone = count.count("encode_prompt")
    count.clear()
    for rank in (0, 1):
        encode(rows, tmp_path / "cache", rank=rank, world_size=2)
    # Each process needs an example of two lengths and of a prompt twice, and its singles.
    assert count.count("encode_prompt") <= alone + 4
    assert not read[2] & read[4]
    assert read[2] | read[4] == read[0]


def test_a_pipeline_whose_encodings_can_not_be_stored_is_refused_before_training(
    rows, tmp_path, monkeypatch
):
    class Own(tuple):
        __slots__ = ()

    original = EncodeOnce.encode
    monkeypatch.setattr(EncodeOnce, "encode", lambda *given: Own(original(*given)))
    with pytest.raises(InputError, match=r"data\.cache_dir can't be used with QwenImagePipeline"):
        encode(rows, tmp_path / "cache")


SCRIPT = """
import sys, time
import lightning.pytorch as pl
from lit_distill import DirectDistill, DistillDataModule
from lit_distill.encoding.encode_once import EncodeOnce

original = EncodeOnce.encode

def encode(self, method, arguments):
    print("encoded", arguments.get("prompt"), flush=True)
    time.sleep(0.3)
    return original(self, method, arguments)

EncodeOnce.encode = encode
table, cache = sys.argv[1:]
model = DirectDistill("tiny-digits", torch_dtype="float32", lora={"r": 4})
data = DistillDataModule(table, cache_dir=cache)
options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
options |= {"enable_model_summary": False, "enable_checkpointing": False}
pl.Trainer(max_steps=1, **options).fit(model, datamodule=data)
print("trained", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_keeps_what_it_has_encoded(rows, tmp_path, number):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "metadata.csv"), f"{tmp_path}/cache"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if sum(line.startswith("encoded") for line in lines) == 2:
            process.send_signal(number)
            break
    rest = process.stdout.read()
    code = process.wait(timeout=60)
    assert "trained" not in rest
    assert code == 128 + number
    log = (tmp_path / "log").read_text()
    assert "of 8 rows and images encoded; the next start continues there" in log
    before = set(EncodingStore(tmp_path / "cache")._index)
    assert before
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "trained" in again.stdout, again.stderr
    repeated = set("".join(lines).splitlines()) & set(again.stdout.splitlines())
    assert not [line for line in repeated if line.startswith("encoded")]
    assert before < set(EncodingStore(tmp_path / "cache")._index)
