import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from students import CORE, away, checkpoint_of, module, modules_of, picture, plain, row_of
from tiny_pipelines import CALL_KWARGS, build

from lit_distill import DirectDistill, DistillDataModule, export_student, load_student
from lit_distill.adapters.lora import Factors
from lit_distill.adapters.lora_files import to_state
from lit_distill.adapters.lora_formats import layout_of
from lit_distill.cli import main
from lit_distill.errors import InputError
from lit_distill.export import exporter, lora_writer
from lit_distill.export.export_on_save import ExportOnSave
from lit_distill.export.exporter import ExportError
from lit_distill.export.facts import StudentFacts
from lit_distill.export.model_card import ExportSummary, Gallery, model_card
from lit_distill.pipelines.components import denoisers

FILES = ["diffusers", "comfyui", "kohya", "peft", "merged"]
# diffusers has no reader of sd-scripts' SD3 files, and splits FLUX.1's at width 3072 only.
UNREAD = {("StableDiffusion3", "kohya"), ("Flux", "comfyui"), ("Flux", "kohya")}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "use_distributed_sampler": False}


# Exports loaded with plain diffusers and peft, as users do


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("name", CORE)
def test_an_export_is_the_student_in_plain_diffusers(name, format, folder, tmp_path):
    model = away(module(folder(name), name))
    export_student(checkpoint_of(model, name), tmp_path, format)
    expected = picture(model.pipe, name)
    pipe = plain(tmp_path if format == "merged" else folder(name))
    if format == "peft":
        from peft import PeftModel

        for denoiser in denoisers(pipe).values():
            PeftModel.from_pretrained(denoiser, tmp_path)
    elif (name, format) in UNREAD:
        pipe = load_student(tmp_path)
    elif format != "merged":
        pipe.load_lora_weights(tmp_path)
    assert np.abs(picture(pipe, name) - expected).max() <= 1
    assert np.abs(picture(plain(folder(name)), name) - expected).max() > 1
    if format != "merged":
        assert modules_of(pipe) == modules_of(model.pipe)


def test_two_denoisers_get_a_file_each(folder, tmp_path):
    model = away(module(folder("Wan22"), "Wan22"))
    export_student(checkpoint_of(model, "Wan22"), tmp_path)
    pipe = plain(folder("Wan22"))
    second = "pytorch_lora_weights_transformer_2.safetensors"
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name=second, load_into_transformer_2=True)
    assert np.abs(picture(pipe, "Wan22") - picture(model.pipe, "Wan22")).max() <= 1
    assert modules_of(pipe) == modules_of(model.pipe)
    assert modules_of(load_student(tmp_path)) == modules_of(model.pipe)


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_diffusers_reads_double_blocks_of_flux(format, folder, tmp_path):
    targets = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_\w+|to_out\.0)|ff\w*\.net\.2)"
    model = away(module(folder("Flux"), "Flux", lora={"r": 4, "target_modules": targets}))
    export_student(checkpoint_of(model, "Flux"), tmp_path, format)
    pipe = plain(folder("Flux"))
    pipe.load_lora_weights(tmp_path)
    assert np.abs(picture(pipe, "Flux") - picture(model.pipe, "Flux")).max() <= 1
    assert modules_of(pipe) == modules_of(model.pipe)


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_diffusers_reads_flux_at_its_published_width(format):
    """Where its reader splits queries, keys, values and MLP: weights of rank 2, no pipeline."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        denoiser = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for module_name in ("to_q", "to_k", "to_v"):
        for block in ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"):
            weights[f"{block}.{module_name}"] = (3072, 3072)
    weights["single_transformer_blocks.0.proj_mlp"] = (12288, 3072)
    weights["single_transformer_blocks.0.proj_out"] = (3072, 15360)
    weights = {
        key: Factors(
            torch.randn(2, columns, generator=generator),
            torch.randn(rows, 2, generator=generator),
            4.0,
        )
        for key, (rows, columns) in weights.items()
    }
    state = to_state(weights, layout_of(format, "transformer", denoiser), denoiser)
    loaded = FluxPipeline.lora_state_dict(state)
    assert {key.partition(".lora_")[0] for key in loaded} == {f"transformer.{k}" for k in weights}
    for key, factors in weights.items():
        up = loaded[f"transformer.{key}.lora_B.weight"]
        down = loaded[f"transformer.{key}.lora_A.weight"]
        torch.testing.assert_close(up @ down[:, :64], factors.delta()[:, :64])


def test_an_edit_pipeline_samples_its_rows_with_their_pictures(folder, tmp_path):
    call = dict(CALL_KWARGS["FluxKontext"])
    call.pop("image").save(tmp_path / "given.png")
    size = {side: call.pop(side) for side in ("height", "width")}
    model = DirectDistill(
        str(folder("FluxKontext")), torch_dtype="float32", lora={"r": 4}, call_kwargs=call
    )
    model.configure_model()
    content = checkpoint_of(away(model), "FluxKontext")
    content["lit_distill"]["facts"]["examples"][0] |= {
        **size,
        "pictures": {"image": str(tmp_path / "given.png")},
        "call": {},
    }
    export_student(content, tmp_path / "out")
    given = str(tmp_path / "given.png")
    assert f"image=load_image({given!r})" in (tmp_path / "out/README.md").read_text()
    pipe = plain(folder("FluxKontext"))
    pipe.load_lora_weights(tmp_path / "out")
    expected = picture(model.pipe, "FluxKontext")
    assert np.abs(picture(pipe, "FluxKontext") - expected).max() <= 1


# An export that differs from the student is an error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: (s.pop(FIRST_PLAIN.format("A")), s.pop(FIRST_PLAIN.format("B"))),
            "is missing",
        ),
        (lambda s: s[FIRST_PLAIN.format("B")].mul_(1.5), "differs by 5.0e-01"),
        (
            lambda s: s.update(
                {
                    FIRST_PLAIN.format("A").replace("attn.to_q", "img_mod.1"): torch.ones(4, 32),
                    FIRST_PLAIN.format("B").replace("attn.to_q", "img_mod.1"): torch.ones(192, 4),
                }
            ),
            "img_mod.1 was loaded, but was not trained",
        ),
    ],
)
def test_a_module_that_differs_after_reloading_is_named(
    change, message, folder, tmp_path, monkeypatch
):
    def corrupted(*arguments):
        state = to_state(*arguments)
        change(state)
        return state

    monkeypatch.setattr(lora_writer, "to_state", corrupted)
    with pytest.raises(
        ExportError, match=rf"transformer\.transformer_blocks\.0\.\S+ {message}|{message}"
    ):
        export_student(checkpoint_of(away(module(folder("QwenImage")))), tmp_path)


FIRST_PLAIN = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"


def test_an_error_of_the_reader_is_reported(folder, tmp_path):
    """musubi-tuner's Wan files hold every linear of a block: diffusers' reader needs them all."""
    model = away(module(folder("Wan"), "Wan", lora={"r": 4, "target_modules": ["attn1.to_q"]}))
    with pytest.raises(ExportError, match=r"load_lora_weights refuses .* as kohya: KeyError"):
        export_student(checkpoint_of(model, "Wan"), tmp_path, "kohya")


def test_another_image_is_an_error(folder, tmp_path, monkeypatch):
    content = checkpoint_of(away(module(folder("QwenImage"))))
    monkeypatch.setattr(exporter, "fuse_lora", lambda pipe, lora: None)
    with pytest.raises(ExportError, match="does not reproduce the student's image"):
        export_student(content, tmp_path, "merged")
    assert not list(tmp_path.iterdir())  # nothing that looks like an export


def test_unsupported_exports_are_refused_with_a_reason(folder, tmp_path):
    content = checkpoint_of(away(module(folder("QwenImage"))))
    with pytest.raises(ValueError, match=r"format must be one of diffusers, comfyui, .*'lora'"):
        export_student(content, tmp_path, "lora")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16"):
        export_student(content, tmp_path, dtype="half")
    dora = checkpoint_of(module(folder("QwenImage"), lora={"r": 4, "use_dora": True}))
    with pytest.raises(ValueError, match=r"adapter is not plain LoRA \(use_dora, lora_bias\)"):
        export_student(dora, tmp_path)
    full = checkpoint_of(module(folder("QwenImage"), lora=None))
    with pytest.raises(ValueError, match="format kohya is for a LoRA, but the whole denoiser"):
        export_student(full, tmp_path, "kohya")
    pixart = checkpoint_of(module(folder("PixArtSigma"), "PixArtSigma"), "PixArtSigma")
    with pytest.raises(ValueError, match=r"PixArtSigmaPipeline has no LoRA writer.*peft or merged"):
        export_student(pixart, tmp_path)
    export_student(pixart, tmp_path, "peft")


# Options, facts, hub


def test_dtype_and_size_of_files_are_options(folder, tmp_path):
    content = checkpoint_of(away(module(folder("QwenImage"))))
    export_student(content, tmp_path / "lora", dtype="bfloat16")
    state = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    export_student(content, tmp_path / "merged", "merged", dtype="float16", max_shard_size="100KB")
    shards = list((tmp_path / "merged/transformer").glob("*.safetensors"))
    assert len(shards) > 1
    assert load_student(tmp_path / "merged").transformer.dtype == torch.float16


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft", "merged"])
def test_a_bfloat16_base_with_a_float32_lora_is_exported(format, folder, tmp_path):
    """As every large model is trained: diffusers casts the LoRA when it reads it."""
    content = checkpoint_of(away(module(folder("QwenImage"))))
    content["hyper_parameters"]["torch_dtype"] = "bfloat16"
    export_student(content, tmp_path, format)
    pipe = load_student(tmp_path)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}


def test_exports_hold_the_facts_of_the_student(exports):
    out, _ = exports
    for format in ("diffusers", "comfyui", "kohya", "diffsynth", "peft", "merged"):
        card = huggingface_hub.ModelCard.load(out / format / "README.md")
        assert card.data.library_name == "diffusers"
        assert card.data.pipeline_tag == "text-to-image"
        assert ("lora" in card.data.tags) == (format != "merged")
        assert "| steps, guidance | 4, 1 |" in card.text
        assert "| LoRA | r 4, lora_alpha 8 |" in card.text
        assert "| val_ratio | 0.4 |" in card.text
        assert "From left to right: undistilled, student." in card.text
    from safetensors import safe_open

    with safe_open(out / "kohya/kohya_lora.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["lit_distill"])
    assert facts["num_inference_steps"] == 4
    assert facts["lora"] == {"r": 4, "lora_alpha": 8}
    assert facts["examples"] == [row_of("QwenImage") | {"call": {}, "pictures": {}, "target": None}]
    assert StudentFacts.from_dict(facts).to_dict() == facts


def test_the_card_of_a_hub_model_names_it_its_commit_and_licence(folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--a--b/snapshots" / commit
    place.parent.mkdir(parents=True)
    place.symlink_to(folder("QwenImage"))
    content = checkpoint_of(module(place))
    facts = StudentFacts.from_checkpoint(content, plain(place))
    assert facts.base_revision == commit
    facts = replace(facts, base_model="Qwen/Qwen-Image")
    summary = ExportSummary("diffusers", "a reader", 0.0, False, "me/lora", "bfloat16")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: tmp_path / "base.md")
    (tmp_path / "base.md").write_text("---\nlicense: other\nlicense_name: 'a: b'\n---\n# Base")
    gallery = Gallery("samples.png", ["teacher", "student"])
    text = model_card(facts, summary, build("QwenImage"), gallery)
    card = huggingface_hub.ModelCard(text)
    assert card.data.base_model == "Qwen/Qwen-Image"
    assert card.data.base_model_relation == "adapter"
    assert (card.data.license, card.data.license_name) == ("other", "a: b")
    assert f"'Qwen/Qwen-Image', dtype=torch.bfloat16, revision='{commit}'" in text
    assert "pipe.load_lora_weights('me/lora')" in text
    (tmp_path / "base.md").unlink()
    text = model_card(facts, summary, build("QwenImage"), gallery)
    assert huggingface_hub.ModelCard(text).data.license is None and "Fill in `license`" in text
    assert "true_cfg_scale=1.0" in text
    assert f"| revision | {commit} |" in text


def code_of(card):
    return card.read_text().partition("```python\n")[2].partition("```")[0]


def test_the_code_of_a_card_runs_as_printed(exports):
    out, model = exports
    for format in ("diffusers", "merged", "peft"):
        scope = {}
        exec(code_of(out / format / "README.md"), scope)
        image = np.asarray(scope["image"], int)
        assert np.abs(image - picture(model.pipe, "QwenImage")).max() <= 1


def test_the_card_of_the_embedded_pipeline(tmp_path):
    """A name that diffusers does not know; a teacher's image; metrics of training."""
    saved = checkpoint_of(away(module("tiny-digits")))
    teacher = tmp_path / "teacher.png"
    Image.new("RGB", (16, 16), "magenta").save(teacher)
    facts = saved["lit_distill"]["facts"]
    facts["examples"][0] |= {"prompt": "a red | 'seven'", "target": str(teacher)}
    facts["metrics"]["grad_norm"] = 2.0
    export_student(saved, tmp_path / "lora")
    card = huggingface_hub.ModelCard.load(tmp_path / "lora/README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert "grad_norm" not in card.text and "val_ratio" in card.text
    assert "From left to right: teacher, undistilled, student." in card.text
    assert Image.open(tmp_path / "lora/samples.png").getpixel((100, 100)) == (255, 0, 255)
    scope = {}
    exec(code_of(tmp_path / "lora/README.md"), scope)
    pipe = load_student(tmp_path / "lora")
    expected = pipe("a red | 'seven'", generator=torch.Generator().manual_seed(3)).images[0]
    assert np.abs(np.asarray(scope["image"], int) - np.asarray(expected, int)).max() <= 1


def test_a_folder_is_pushed_to_the_hub(folder, tmp_path, monkeypatch):
    calls, remote = [], [".gitattributes", "picture.png"]

    class Api:
        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id, exist_ok))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def list_repo_files(self, repo_id):
            return remote

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
            names = {path.name for path in Path(folder_path).iterdir()} - set(ignore_patterns)
            calls.append(("upload", repo_id, names))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    content = checkpoint_of(away(module(folder("QwenImage"))))
    export_student(content, tmp_path, push_to_hub="me/my-lora")
    files = {"README.md", "samples.png", "pytorch_lora_weights.safetensors"}
    assert calls == [("create", "me/my-lora", True), ("upload", "me/my-lora", files)]

    # Weights of another export there would be read together with these.
    remote += ["adapter_config.json", "adapter_model.safetensors"]
    stale = (
        "me/my-lora holds adapter_config.json, adapter_model.safetensors, which tools would read"
    )
    with pytest.raises(InputError, match=stale):
        export_student(content, tmp_path, push_to_hub="me/my-lora")
    # What is not verified is not uploaded.
    calls.clear()
    monkeypatch.setattr(exporter, "fuse_lora", lambda pipe, lora: None)
    with pytest.raises(ExportError):
        export_student(content, tmp_path / "merged", "merged", push_to_hub="me/my-lora")
    assert calls == []


# The command line and the callback


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    callback = ExportOnSave(str(path / "exports"), "kohya")
    model = DirectDistill(
        "tiny-digits", torch_dtype="float32", lora={"r": 4}, checkpointing="none", preflight=False
    )
    data = DistillDataModule(
        str(pairs / "train/metadata.csv"), str(pairs / "heldout/metadata.csv"), batch_size=8
    )
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], default_root_dir=path, **QUIET)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(path / "student.ckpt")
    return path


def test_saving_exports_with_the_facts_of_the_run(trained):
    folders = list((trained / "exports").iterdir())
    assert [folder.name for folder in folders] == ["step_000004"]
    text = (folders[0] / "README.md").read_text()
    assert "| training data | 32 rows, 32 prompts |" in text
    assert "| teacher's steps | 10 |" in text
    assert "val_gap_closed" in text
    assert "| size (height x width) | 32x32 |" in text
    assert "From left to right: teacher, undistilled, student." in text


def test_an_export_does_not_disturb_training(trained, pairs):
    state = torch.get_rng_state()
    export_student(trained / "student.ckpt", trained / "again")
    assert torch.equal(torch.get_rng_state(), state)


def test_export_and_predict_by_command(trained, tmp_path, capsys):
    checkpoint = str(trained / "student.ckpt")
    quiet = ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    quiet += ["--trainer.default_root_dir", str(tmp_path)]
    out = str(tmp_path / "comfy")
    main(["export", "--ckpt_path", checkpoint, "--out", out, "--format", "comfyui", *quiet])
    assert "reloaded, and verified to reproduce the same image" in capsys.readouterr().out
    prompts = ["a red seven on a blue background", "a white two on a black background"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    predict = ["predict", "--ckpt_path", checkpoint, "--prompts", str(tmp_path / "prompts.txt")]
    main([*predict, "--first_seed", "5", *quiet])
    images = sorted((tmp_path / "predictions").glob("*.png"))
    assert len(images) == 2
    pipe = load_student(tmp_path / "comfy")
    expected = pipe(prompts[1], generator=torch.Generator().manual_seed(6)).images[0]
    assert np.abs(np.asarray(Image.open(images[1]), int) - np.asarray(expected, int)).max() <= 1
