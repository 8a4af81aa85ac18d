"""An export is whole and replaces only an earlier export; it is read as it was verified."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from students import away, checkpoint_of, module, picture
from tiny_pipelines import build

from lit_distill import export_student, load_student
from lit_distill.data import whole_files
from lit_distill.data.whole_folders import draft_of, locked, replace_folder
from lit_distill.errors import InputError
from lit_distill.export.base_model import base_digest
from lit_distill.export.facts import StudentFacts
from lit_distill.export.model_card import ExportSummary, Gallery, markdown, model_card

FORMATS = ["diffusers", "kohya", "peft", "merged"]


@pytest.fixture(scope="module")
def students(folder):
    """Two students that differ in rank, weights and scheduler."""
    scheduler = {"shift_terminal": None}
    first = away(module(folder("QwenImage"), scheduler=scheduler), seed=1)
    return [first, away(module(folder("QwenImage"), lora={"r": 2}), seed=2)]


def content(path):
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


def difference(pipe, model):
    return np.abs(picture(pipe, "QwenImage") - picture(model.pipe, "QwenImage")).max()


# Exporting into a folder


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", ["diffusers", "peft", "merged"])
def test_a_second_export_replaces_the_first_one_whole(students, first, second, tmp_path):
    out = tmp_path / "out"
    export_student(checkpoint_of(students[0]), out, first)
    export_student(checkpoint_of(students[1]), out, second)
    export_student(checkpoint_of(students[1]), tmp_path / "fresh", second)
    assert content(out).keys() == content(tmp_path / "fresh").keys()
    assert difference(load_student(out), students[1]) <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]


@pytest.mark.parametrize("name", ["scheduler_config.json", "notes.txt", "README.md", "a/b.json"])
def test_files_of_others_are_named_and_stay(students, tmp_path, name, monkeypatch):
    export_student(checkpoint_of(students[0]), tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = content(tmp_path)
    monkeypatch.setattr("lit_distill.export.exporter._Export", None)  # before any work
    with pytest.raises(InputError, match=f"not written by this command, or were .*: {name};"):
        export_student(checkpoint_of(students[1]), tmp_path, "peft")
    assert content(tmp_path) == before


def test_a_folder_that_cannot_be_renamed_is_replaced_file_by_file(students, tmp_path, monkeypatch):
    export_student(checkpoint_of(students[0]), tmp_path)
    monkeypatch.chdir(tmp_path)
    export_student(checkpoint_of(students[1]), ".", "peft")
    assert difference(load_student(tmp_path), students[1]) <= 1
    assert not (tmp_path / "scheduler_config.json").exists()
    assert not list(tmp_path.glob(".*.draft"))


def test_a_full_disk_leaves_the_earlier_export(students, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_student(checkpoint_of(students[0]), out)
    before = content(out)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole_files.os, "fsync", full)
    message = r"out/\w+.safetensors can't be written: No space left on device"
    with pytest.raises(OSError, match=message):
        export_student(checkpoint_of(students[1]), out)
    assert content(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_named_by_a_merged_export(students, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match=r"out can't be written: .*No space left"):
        export_student(checkpoint_of(students[1]), tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())


def test_drafts_of_killed_processes_are_removed_but_not_those_in_use(tmp_path):
    (tmp_path / f".out.{'0' * 32}.draft").mkdir()
    used = tmp_path / f".out.{'1' * 32}.draft"
    used.mkdir()
    (tmp_path / ".out.mine.draft").mkdir()
    with locked(used), draft_of(tmp_path / "out") as draft:
        (draft / "a").write_text("a")
        replace_folder(draft, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [".out.mine.draft", "out", used.name]
    )


def test_a_lora_keeps_its_scheduler_when_it_is_moved_or_beside_another(students, tmp_path):
    export_student(checkpoint_of(students[0]), tmp_path / "first")
    export_student(checkpoint_of(students[1]), tmp_path / "second")
    name = "pytorch_lora_weights.safetensors"
    (tmp_path / "loras").mkdir()
    for folder in ("first", "second"):
        shutil.copy(tmp_path / folder / name, tmp_path / f"loras/{folder}.safetensors")
    assert difference(load_student(tmp_path / "loras/first.safetensors"), students[0]) <= 1
    shutil.copy(tmp_path / "first/scheduler_config.json", tmp_path / "loras")
    assert difference(load_student(tmp_path / "loras/second.safetensors"), students[1]) <= 1


# The base model


@pytest.fixture
def base(folder, tmp_path):
    """A base model with a student of it: as a checkpoint, and exported."""
    path = shutil.copytree(folder("QwenImage"), tmp_path / "base")
    model = away(module(path))
    saved = checkpoint_of(model)
    pipe = DiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    saved["lit_distill"]["base_digest"] = base_digest(pipe)
    torch.save(saved, tmp_path / "student.ckpt")
    export_student(saved, tmp_path / "diffusers")
    return path, pipe, model


def change_weight(path, pipe):
    with torch.no_grad():
        list(pipe.transformer.parameters())[-1][-1] += 0.01
    pipe.save_pretrained(path)


def change_config(path, pipe):
    config = path / "transformer/config.json"
    fields = json.loads(config.read_text())
    fields["guidance_embeds"] = not fields["guidance_embeds"]
    config.write_text(json.dumps(fields))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("source", ["student.ckpt", "diffusers"])
def test_a_changed_base_model_is_refused(base, source, dtype, tmp_path):
    path, pipe, _ = base
    load_student(tmp_path / source, torch_dtype=dtype)
    change_weight(path, pipe)
    with pytest.raises(InputError, match=r"transformer of the base model .*base is not as it was"):
        load_student(tmp_path / source, torch_dtype=dtype)
    with pytest.warns(UserWarning, match="transformer of the base model .* is not as it was when"):
        load_student(tmp_path / source, torch_dtype=dtype, base_model=path)


def test_a_changed_base_model_is_not_exported(base, tmp_path):
    path, pipe, _ = base
    change_weight(path, pipe)
    with pytest.raises(InputError, match=r"transformer of the base model .* is not as it was"):
        export_student(tmp_path / "student.ckpt", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_changed_configuration_counts_and_a_moved_model_does_not(base, tmp_path, recwarn):
    path, pipe, model = base
    moved = shutil.copytree(path, tmp_path / "moved")
    for source in ("student.ckpt", "diffusers"):
        assert difference(load_student(tmp_path / source, base_model=moved), model) <= 1
    assert not [w for w in recwarn if "base model" in str(w.message)]
    change_config(path, pipe)
    with pytest.raises(InputError, match=r"transformer of the base model"):
        load_student(tmp_path / "student.ckpt")


def test_checkpoints_and_exports_without_digest_are_loaded(base, tmp_path):
    path, pipe, _ = base
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)
    del saved["lit_distill"]["base_digest"]
    torch.save(saved, tmp_path / "older.ckpt")
    change_weight(path, pipe)
    load_student(tmp_path / "older.ckpt")


def test_a_teacher_s_lora_is_no_change_of_the_base_model(base, tmp_path):
    path, pipe, _ = base
    model = module(path, teacher_lora=str(tmp_path / "diffusers"))
    saved = checkpoint_of(away(model, seed=4))
    saved["lit_distill"]["base_digest"] = base_digest(pipe)
    export_student(saved, tmp_path / "sum")
    assert difference(load_student(tmp_path / "sum"), model) <= 1
    change_weight(path, pipe)
    with pytest.raises(InputError, match=r"transformer of the base model"):
        load_student(tmp_path / "sum")


def test_damaged_facts_are_named(students, tmp_path):
    export_student(checkpoint_of(students[1]), tmp_path, "merged")
    path = tmp_path / "lit_distill.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"lit_distill.json: the facts of its student are damaged"):
        load_student(tmp_path)


# The model card


HOSTILE = [
    "<script>alert(1)</script>",
    "[link](http://example.com)",
    "![](http://example.com/a.png)",
    "a | b | <img src=x onerror=alert(1)>",
    "`code` ``more`` |",
    "**bold** _it_ # heading",
    "line\n\n# heading\n| table |",
    "http://example.com",
    "&lt;b&gt;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_prompts_are_no_markup_in_the_card(text, folder):
    markdown_it = pytest.importorskip("markdown_it")
    saved = checkpoint_of(module(folder("QwenImage")))
    saved["hyper_parameters"] |= {"teacher_model": text, "pretrained_model_name_or_path": text}
    saved["lit_distill"]["facts"]["examples"][0]["prompt"] = text
    saved["lit_distill"]["facts"]["metrics"] = {f"val_{text}": 1.0}
    pipe = build("QwenImage")
    facts = StudentFacts.from_checkpoint(saved, pipe)
    summary = ExportSummary("diffusers", "a reader", 0.0, False, text, "float32")
    gallery = Gallery("samples.png", ["student"])
    card = ModelCard(model_card(facts, summary, pipe, gallery))
    assert card.data.widget[0]["text"] == text
    parser = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).enable("table")
    tokens = parser.parse(card.text)
    flat = [token for top in tokens for token in [top, *(top.children or [])]]
    kinds = {token.type for token in flat}
    assert not kinds & {"html_block", "html_inline", "strong_open", "em_open"}
    links = [token.attrs["href"] for token in flat if token.type == "link_open"]
    assert links == ["https://github.com/lit-distill/lit-distill"]
    assert [t.attrs["src"] for t in flat if t.type == "image"] == ["samples.png"]
    headings = sum(token.type == "heading_open" for token in tokens)
    assert headings == 5
    shown = [token.content.strip() for token in flat if token.type == "code_inline"]
    assert " ".join(text.split()) in shown or markdown(text) == text


def test_plain_names_stay_plain():
    for text in ("Qwen/Qwen-Image", "r 4, lora_alpha 8", "1.2e-07 (relative)", "/a/b_c.d", "32x32"):
        assert markdown(text) == text
