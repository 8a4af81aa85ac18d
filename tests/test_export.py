import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image
from pipelines import CALL_KWARGS, build
from safetensors.torch import load_file, save_file

from lit_distill import (
    DirectDistill,
    DistillDataModule,
    export,
    export_student,
    load_student,
    rollout,
)
from lit_distill.adapters import fuse_lora, take_lora
from lit_distill.batches import NO_TARGET
from lit_distill.callbacks import ExportOnSave
from lit_distill.cli import main
from lit_distill.export import ExportError
from lit_distill.families import denoisers, guidance
from lit_distill.layouts import LAYOUTS, layout_of
from lit_distill.lora import Factors, add_loras, read_lora, to_state

CORE = ["QwenImage", "Flux", "Flux2", "StableDiffusion3", "StableDiffusionXL", "ZImage", "Wan"]
FILES = ["diffusers", "comfyui", "kohya", "peft", "merged"]
# diffusers has no reader of sd-scripts' SD3 files, and splits FLUX.1's at width 3072 only.
UNREAD = {("StableDiffusion3", "kohya"), ("Flux", "comfyui"), ("Flux", "kohya")}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "use_distributed_sampler": False}


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


def module(path, name="QwenImage", **options):
    call = {k: v for k, v in CALL_KWARGS[name].items() if k not in ("height", "width")}
    options = {"lora": {"r": 4, "lora_alpha": 8}} | options
    model = DirectDistill(str(path), torch_dtype="float32", call_kwargs=call, **options)
    model.configure_model()
    return model


@torch.no_grad()
def away(model, seed=1):
    """Moves a student away from its teacher, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def row_of(name):
    size = {side: CALL_KWARGS[name][side] for side in ("height", "width")}
    row = {"prompt": "a red cat", "seed": 3, "rand_device": "cpu"}
    return row | {"num_inference_steps": 4, "cfg_scale": 1.0, **size}


def checkpoint_of(model, name="QwenImage"):
    """The content of a checkpoint, as a trainer would save it."""
    row = row_of(name)
    facts = {key: row[key] for key in ("num_inference_steps", "cfg_scale", "height", "width")}
    facts |= {"examples": [row], "metrics": {"val_ratio": 0.4}}
    return {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "lit_distill": {"version": "0", "facts": facts},
        "global_step": 7,
    }


def picture(pipe, name):
    """The row's picture, by the pipeline's own call."""
    with guidance(pipe, 1.0, 1, {}) as off:
        images = pipe(
            prompt=["a red cat"],
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(3),
            output_type="pil",
            **CALL_KWARGS[name],
            **off,
        )[0]
    image = images[0]
    while isinstance(image, list):
        image = image[0]
    return np.asarray(image, int)


def plain(path):
    pipe = DiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modules_of(pipe):
    return {f"{key}.{name}" for key, lora in take_lora(pipe).items() for name in lora}


# Plain diffusers and peft, in the hands of a user


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
        from lit_distill import student

        pipe = student.load_student(tmp_path)
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
    found = FluxPipeline.lora_state_dict(state)
    assert {key.partition(".lora_")[0] for key in found} == {f"transformer.{k}" for k in weights}
    for key, factors in weights.items():
        up = found[f"transformer.{key}.lora_B.weight"]
        down = found[f"transformer.{key}.lora_A.weight"]
        torch.testing.assert_close(up @ down[:, :64], factors.delta()[:, :64])


def test_an_edit_pipeline_draws_its_rows_with_their_pictures(folder, tmp_path):
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
    assert "image=YOUR_IMAGE" in (tmp_path / "out/README.md").read_text()
    pipe = plain(folder("FluxKontext"))
    pipe.load_lora_weights(tmp_path / "out")
    expected = picture(model.pipe, "FluxKontext")
    assert np.abs(picture(pipe, "FluxKontext") - expected).max() <= 1


# Layouts, in both directions


@pytest.mark.parametrize("format", LAYOUTS)
@pytest.mark.parametrize("name", CORE)
def test_what_is_written_is_read_back(name, format, folder, tmp_path):
    """With uneven ranks and alphas, and queries without keys and values."""
    pipe = build(name)
    component, denoiser = next(iter(denoisers(pipe).items()))
    if type(denoiser).__name__ not in LAYOUTS[format]:
        with pytest.raises(ValueError, match=r"how it names the modules of .* is not known here"):
            layout_of(format, component, denoiser)
        return
    lora = take_lora(away(module(folder(name), name)).pipe)[component]
    del lora[next(key for key in lora if "to_k" in key or "to_qkv" in key)]
    for index, key in enumerate(lora):
        down, up, _ = lora[key]
        lora[key] = Factors(down[: 1 + index % 4], up[:, : 1 + index % 4], float(1 + index % 3))
    state = to_state(lora, layout_of(format, component, denoiser), denoiser)
    save_file(state, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors", pipe)[component]
    for key in set(lora) | set(found):
        expected = lora[key].delta() if key in lora else torch.zeros(1)
        torch.testing.assert_close(
            found[key].delta() + 0 * expected, expected + 0 * found[key].delta()
        )


# Keys as DiffSynth-Studio's own modules are called.
DIFFSYNTH_KEYS = {
    "QwenImage": ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2"],
    "Flux": [
        "blocks.0.attn.a_to_qkv",
        "blocks.1.attn.b_to_qkv",
        "blocks.0.attn.a_to_out",
        "blocks.0.ff_b.2",
        "single_blocks.1.to_qkv_mlp",
        "single_blocks.0.proj_out",
    ],
    "Wan": ["blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.0.ffn.0", "blocks.1.ffn.2"],
    "StableDiffusionXL": [
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    ],
}


@pytest.mark.parametrize("name", DIFFSYNTH_KEYS)
def test_diffsynth_goes_in_and_out_with_equal_tensors(name, folder, tmp_path):
    table = LAYOUTS["diffsynth"][type(next(iter(denoisers(build(name)).values()))).__name__].table
    sizes = {}
    for key in DIFFSYNTH_KEYS[name]:
        number = next((n for n in key.split(".") if n.isdigit()), "0")
        parts = table.get(key.replace(f".{number}.", ".{}.", 1), (key,))
        weights = [
            next(iter(denoisers(build(name)).values())).get_submodule(p.format(number)).weight
            for p in parts
        ]
        sizes[key] = (sum(w.shape[0] for w in weights), weights[0].shape[1])
    state = {}
    for key, (rows, columns) in sizes.items():
        state[f"{key}.lora_A.default.weight"] = torch.randn(4, columns)
        state[f"{key}.lora_B.default.weight"] = torch.randn(rows, 4)
    save_file(state, tmp_path / "epoch-0.safetensors")
    begun = module(folder(name), name, lora=None, init_lora=str(tmp_path / "epoch-0.safetensors"))
    export_student(checkpoint_of(begun, name), tmp_path / "out", "diffsynth")
    found = load_file(tmp_path / "out/diffsynth_lora.safetensors")
    assert set(found) == set(state)
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "key", "parts"),
    [
        ("Flux", "blocks.1.attn.b_to_qkv", "transformer_blocks.1.attn.add_{}_proj"),
        ("Flux", "single_blocks.1.to_qkv_mlp", "single_transformer_blocks.1.attn.to_{}"),
        ("Flux", "lora_unet_single_blocks_0_linear1", "single_transformer_blocks.0.attn.to_{}"),
        (
            "StableDiffusion3",
            "lora_unet_joint_blocks_0_x_block_attn2_qkv",
            "transformer_blocks.0.attn2.to_{}",
        ),
        (
            "StableDiffusion3",
            "lora_unet_joint_blocks_0_context_block_attn_qkv",
            "transformer_blocks.0.attn.add_{}_proj",
        ),
    ],
)
def test_queries_keys_and_values_come_in_this_order(name, key, parts, tmp_path):
    """Where no reader of diffusers' says so: rows of the joined weight belong to q, k, v, (MLP)."""
    pipe = build(name)
    size = pipe.transformer.get_submodule(parts.format("q")).weight.shape
    modules = [parts.format(x) for x in "qkv"]
    rows = 3 * size[0]
    if "single" in key:
        modules.append(parts.partition(".attn")[0] + ".proj_mlp")
        rows += pipe.transformer.get_submodule(modules[-1]).weight.shape[0]
    joined = Factors(torch.randn(4, size[1]), torch.randn(rows, 4), 4.0)
    state = {f"{key}.lora_down.weight": joined.down, f"{key}.lora_up.weight": joined.up}
    save_file(state | {f"{key}.alpha": torch.tensor(4.0)}, tmp_path / "joined.safetensors")
    found = read_lora(tmp_path / "joined.safetensors", pipe)["transformer"]
    assert set(found) == set(modules)
    together = torch.cat([found[part].delta() for part in modules])
    torch.testing.assert_close(together, joined.delta())


@pytest.fixture(scope="module")
def exports(folder, tmp_path_factory):
    """A student of Qwen-Image in every format."""
    model = away(module(folder("QwenImage")))
    out = tmp_path_factory.mktemp("exports")
    content = checkpoint_of(model)
    torch.save(content, out / "student.ckpt")
    for format in ("diffusers", "comfyui", "kohya", "diffsynth", "peft", "merged"):
        export_student(content, out / format, format)
    return out, model


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "kohya", "diffsynth", "peft"])
def test_training_goes_on_from_a_lora_of_any_layout(format, exports, folder, tmp_path):
    out, model = exports
    begun = module(folder("QwenImage"), lora=None, init_lora=str(out / format))
    torch.testing.assert_close(
        torch.tensor(picture(begun.pipe, "QwenImage")),
        torch.tensor(picture(model.pipe, "QwenImage")),
    )
    assert begun.hparams["lora"]["r"] == 4
    assert "attn.to_q" in begun.hparams["lora"]["target_modules"]
    away(begun, seed=2)
    # A checkpoint needs the file no more.
    torch.save(checkpoint_of(begun), tmp_path / "on.ckpt")
    again = load_student(tmp_path / "on.ckpt")
    assert np.abs(picture(again, "QwenImage") - picture(begun.pipe, "QwenImage")).max() <= 1


def test_settings_that_contradict_the_lora_are_refused(exports, folder):
    path = str(exports[0] / "kohya")
    with pytest.raises(ValueError, match=r"model.lora.r is 16, but init_lora .*kohya has 4"):
        module(folder("QwenImage"), lora={"r": 16}, init_lora=path)
    begun = module(folder("QwenImage"), lora={"r": 4, "lora_dropout": 0.1}, init_lora=path)
    assert begun.hparams["lora"]["lora_dropout"] == 0.1


def tampered(exports, tmp_path, change):
    state = load_file(exports[0] / "kohya/kohya_lora.safetensors")
    change(state)
    save_file(state, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


FIRST = "lora_unet_transformer_blocks_0_attn_to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"lora_unet_blocks_0_q.lora_up.weight": torch.zeros(4, 4)}),
            "1 of .* keys stand for no module of QwenImage.*: lora_unet_blocks_0_q.lora_up.weight",
        ),
        (
            lambda s: s.update({f"{FIRST}.lora_up.weight": torch.zeros(32, 3)}),
            rf"{FIRST}: down \(4, 32\) and up \(32, 3\) differ in rank",
        ),
        (
            lambda s: s.update({f"{FIRST}.lora_down.weight": torch.zeros(4, 31)}),
            rf"{FIRST}: down \(4, 31\) and up \(32, 4\) do not fit a weight of \(32, 32\)",
        ),
        (lambda s: s.pop(f"{FIRST}.alpha"), f"{FIRST} has no alpha"),
        (lambda s: s.pop(f"{FIRST}.lora_up.weight"), f"{FIRST} has no factor 'up'"),
        (
            lambda s: s.update({"lora_te1_text_model_q.lora_up.weight": torch.zeros(4, 4)}),
            "lora_te1_text_model_q.*text encoders are not adapted here",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(change, message, exports, folder, tmp_path):
    path = tampered(exports, tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        module(folder("QwenImage"), init_lora=str(path))
    assert "bad.safetensors" in str(error.value)


def test_a_truncated_file_is_refused_by_name(exports, folder, tmp_path):
    content = (exports[0] / "kohya/kohya_lora.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    for attempt in (
        lambda: module(folder("QwenImage"), teacher_lora=str(tmp_path / "cut.safetensors")),
        lambda: load_student(tmp_path / "cut.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"cut\.safetensors is truncated or not a safetensors"):
            attempt()


def test_peft_without_its_settings_is_refused(exports, folder, tmp_path):
    name = "adapter_model.safetensors"
    (tmp_path / name).write_bytes((exports[0] / "peft" / name).read_bytes())
    with pytest.raises(ValueError, match=r"needs peft's adapter_config\.json beside it"):
        module(folder("QwenImage"), init_lora=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(ValueError, match=r"adapter_config\.json has no lora_alpha"):
        module(folder("QwenImage"), init_lora=str(tmp_path))


# An export that is not the student is an error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: (s.pop(FIRST_PLAIN.format("A")), s.pop(FIRST_PLAIN.format("B"))),
            "did not arrive",
        ),
        (lambda s: s[FIRST_PLAIN.format("B")].mul_(1.5), "differs by 5.0e-01"),
        (
            lambda s: s.update(
                {
                    FIRST_PLAIN.format("A").replace("attn.to_q", "img_mod.1"): torch.ones(4, 32),
                    FIRST_PLAIN.format("B").replace("attn.to_q", "img_mod.1"): torch.ones(192, 4),
                }
            ),
            "img_mod.1 arrived, but was not trained",
        ),
    ],
)
def test_a_module_that_does_not_come_back_is_named(change, message, folder, tmp_path, monkeypatch):
    def corrupted(*arguments):
        state = to_state(*arguments)
        change(state)
        return state

    monkeypatch.setattr(export, "to_state", corrupted)
    with pytest.raises(
        ExportError, match=rf"transformer\.transformer_blocks\.0\.\S+ {message}|{message}"
    ):
        export_student(checkpoint_of(away(module(folder("QwenImage")))), tmp_path)


FIRST_PLAIN = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"


def test_a_reader_that_refuses_is_reported(folder, tmp_path):
    """musubi-tuner's Wan files hold every linear of a block: diffusers' reader needs them all."""
    model = away(module(folder("Wan"), "Wan", lora={"r": 4, "target_modules": ["attn1.to_q"]}))
    with pytest.raises(ExportError, match=r"load_lora_weights refuses .* as kohya: KeyError"):
        export_student(checkpoint_of(model, "Wan"), tmp_path, "kohya")


def test_another_image_is_an_error(folder, tmp_path, monkeypatch):
    content = checkpoint_of(away(module(folder("QwenImage"))))
    monkeypatch.setattr(export, "fuse_lora", lambda pipe, lora: None)
    with pytest.raises(ExportError, match="draws another image than the student"):
        export_student(content, tmp_path, "merged")
    assert not list(tmp_path.iterdir())  # nothing that looks finished


def test_what_cannot_be_written_says_why(folder, tmp_path):
    content = checkpoint_of(away(module(folder("QwenImage"))))
    with pytest.raises(ValueError, match=r"format must be one of diffusers, comfyui, .*'lora'"):
        export_student(content, tmp_path, "lora")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16"):
        export_student(content, tmp_path, dtype="half")
    dora = checkpoint_of(module(folder("QwenImage"), lora={"r": 4, "use_dora": True}))
    with pytest.raises(ValueError, match=r"adapter is not plain LoRA \(use_dora, lora_bias\)"):
        export_student(dora, tmp_path)
    full = checkpoint_of(module(folder("QwenImage"), lora=None))
    with pytest.raises(ValueError, match="format kohya is for a LoRA; the whole denoiser"):
        export_student(full, tmp_path, "kohya")
    pixart = checkpoint_of(module(folder("PixArtSigma"), "PixArtSigma"), "PixArtSigma")
    with pytest.raises(ValueError, match=r"PixArtSigmaPipeline has no LoRA writer.*peft or merged"):
        export_student(pixart, tmp_path)
    export_student(pixart, tmp_path, "peft")


# Options, facts, hub


def test_type_and_size_of_files_are_options(folder, tmp_path):
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


def test_facts_travel_along(exports):
    out, _ = exports
    for format in ("diffusers", "comfyui", "kohya", "diffsynth", "peft", "merged"):
        card = huggingface_hub.ModelCard.load(out / format / "README.md")
        assert card.data.library_name == "diffusers"
        assert card.data.pipeline_tag == "text-to-image"
        assert ("lora" in card.data.tags) == (format != "merged")
        assert "| steps, guidance | 4, 1 |" in card.text
        assert "| LoRA | r 4, lora_alpha 8 |" in card.text
        assert "| val_ratio | 0.4 |" in card.text
        assert Image.open(out / format / "samples.png").size == (256 if format else 0, 128)
    from safetensors import safe_open

    with safe_open(out / "kohya/kohya_lora.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["lit_distill"])
    assert facts["num_inference_steps"] == 4
    assert facts["lora"] == {"r": 4, "lora_alpha": 8}
    assert facts["examples"] == [row_of("QwenImage")]


def test_the_card_of_a_hub_model_names_it_and_its_commit(folder, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--a--b/snapshots" / commit
    place.parent.mkdir(parents=True)
    place.symlink_to(folder("QwenImage"))
    content = checkpoint_of(module(place))
    facts = export.student_facts(content, plain(place))
    assert facts["base_revision"] == commit
    facts |= {"base_model": "Qwen/Qwen-Image", "verified": {"reader": "it", "difference": 0.0}}
    text = export.model_card(facts, "diffusers", build("QwenImage"), "samples.png")
    card = huggingface_hub.ModelCard(text)
    assert card.data.base_model == "Qwen/Qwen-Image"
    assert "true_cfg_scale=1.0" in text
    assert f"| revision | {commit} |" in text


def test_the_usage_lines_of_a_card_run(exports, folder, tmp_path):
    out, model = exports
    for format in ("diffusers", "merged", "peft"):
        text = (out / format / "README.md").read_text()
        code = text.partition("```python\n")[2].partition("```")[0]
        code = code.replace("THIS_REPOSITORY", str(out / format)).replace("bfloat16", "float32")
        code = code.replace("height=16", "height=16, generator=torch.Generator().manual_seed(3)")
        scope = {}
        exec(code, scope)
        found = np.asarray(scope["image"], int)
        assert np.abs(found - picture(model.pipe, "QwenImage")).max() <= 1


def test_a_folder_is_pushed_to_the_hub(folder, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id, exist_ok))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            names = {path.name for path in Path(folder_path).iterdir()}
            calls.append(("upload", repo_id, names))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    content = checkpoint_of(away(module(folder("QwenImage"))))
    export_student(content, tmp_path, push_to_hub="me/my-lora")
    files = {"README.md", "samples.png", "pytorch_lora_weights.safetensors"}
    assert calls == [("create", "me/my-lora", True), ("upload", "me/my-lora", files)]


# Students for use


@pytest.mark.parametrize("source", ["student.ckpt", "diffusers", "kohya", "peft", "merged"])
def test_a_loaded_student_knows_its_steps(source, exports, folder):
    out, model = exports
    pipe = load_student(out / source)
    generator = torch.Generator().manual_seed(3)
    image = pipe("a red cat", generator=generator, max_sequence_length=512).images[0]
    assert np.abs(np.asarray(image, int) - picture(model.pipe, "QwenImage")).max() <= 1
    timesteps = len(pipe.scheduler.timesteps)
    assert timesteps == 4
    pipe("a red cat", num_inference_steps=2)
    assert len(pipe.scheduler.timesteps) == 2
    assert pipe("a red cat", "", 1.0, 32).images[0].size == (16, 32)  # positional height
    assert type(pipe).__name__ == "QwenImagePipeline"
    latents = rollout(
        pipe,
        prompt=["a red cat"],
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(3)],
        height=16,
        width=16,
    )
    torch.testing.assert_close(latents, model.draw(batch())[0], rtol=1e-3, atol=1e-3)


def test_a_student_of_a_moved_base_is_told_where_it_is(exports, folder, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(folder("QwenImage"))
    for source in ("student.ckpt", "diffusers"):
        pipe = load_student(exports[0] / source, base_model=moved)
        assert np.abs(picture(pipe, "QwenImage") - picture(exports[1].pipe, "QwenImage")).max() <= 1


def test_files_of_others_are_not_students(exports, tmp_path):
    state = load_file(exports[0] / "diffusers/pytorch_lora_weights.safetensors")
    save_file(state, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"not written by lit_distill.*load_lora_weights"):
        load_student(tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"it has no lit_distill\.json"):
        load_student(TINY)


def test_two_adapters_together_are_the_sum_of_both(exports, folder, tmp_path):
    """Few-step and style, by the example's code."""
    style = away(module(folder("QwenImage"), lora={"r": 2}), seed=5)
    export_student(checkpoint_of(style), tmp_path / "style")
    few = exports[0] / "diffusers"
    example = [sys.executable, "examples/two_adapters.py", str(folder("QwenImage")), str(few)]
    example += [str(tmp_path / "style"), "a red cat", str(tmp_path / "both.png"), "16"]
    subprocess.run(example, check=True, cwd=ROOT)
    pipe = plain(folder("QwenImage"))
    fuse_lora(pipe, add_loras(take_lora(exports[1].pipe), take_lora(style.pipe)))
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 4, "true_cfg_scale": 1.0, "height": 16, "width": 16}
    expected = np.asarray(pipe("a red cat", generator=generator, **call).images[0], int)
    found = np.asarray(Image.open(tmp_path / "both.png"), int)
    assert np.abs(found - expected).max() <= 1
    alone = np.asarray(exports[1].pipe("a red cat", generator=generator, **call).images[0], int)
    assert np.abs(found - alone).max() > 1


# Teachers


def batch(**changes):
    values = {"prompt": ["a red cat"], "seed": [3], "rand_device": "cpu", "cfg_scale": 1.0}
    values |= {"num_inference_steps": 4, "size": (16, 16), "call": {}, "row": [2]}
    return values | NO_TARGET | changes


def test_a_teachers_lora_is_in_teacher_student_and_export(exports, folder, tmp_path):
    out, styled = exports
    style = str(out / "kohya")
    options = {"teacher_num_inference_steps": 4, "teacher_cfg_scale": 1.0}
    model = module(folder("QwenImage"), teacher_lora=style, **options)
    expected, _ = styled.draw(batch())
    for found in (model.teacher_target(batch()), model.student_rollout(batch())):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    away(model, seed=9)
    torch.testing.assert_close(model.teacher_target(batch()), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.student_rollout(batch()), expected, atol=1e-2)
    for format in ("diffusers", "merged"):
        export_student(checkpoint_of(model), tmp_path / format, format)
        pipe = plain(tmp_path / format if format == "merged" else folder("QwenImage"))
        if format == "diffusers":
            pipe.load_lora_weights(tmp_path / format)
            state = load_file(tmp_path / format / "pytorch_lora_weights.safetensors")
            assert {len(state[key]) for key in state if "lora_A" in key} == {8}  # ranks add up
        assert np.abs(picture(pipe, "QwenImage") - picture(model.pipe, "QwenImage")).max() <= 1


def test_another_model_teaches(exports, folder):
    out, turbo = exports
    options = {"teacher_num_inference_steps": 4, "teacher_cfg_scale": 1.0}
    for lora in ({"r": 4}, None):
        model = module(folder("QwenImage"), lora=lora, teacher_model=str(out / "merged"), **options)
        expected, _ = turbo.draw(batch())
        torch.testing.assert_close(model.teacher_target(batch()), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model.student_rollout(batch()), expected, atol=1e-2)
    with pytest.raises(ValueError, match=r"teacher_lora and model\.teacher_model: set one"):
        module(folder("QwenImage"), teacher_model="a", teacher_lora="b")


def test_a_scheduler_of_the_students_own_travels_with_it(folder, tmp_path):
    model = module(folder("QwenImage"), scheduler={"shift_terminal": None})
    options = {"teacher_num_inference_steps": 4, "teacher_cfg_scale": 1.0}
    base = module(folder("QwenImage"), **options)
    usual = base.draw(batch())[0]
    away(model)
    assert not torch.allclose(model.draw(batch(), undistilled=True)[0], usual, atol=1e-2)
    model.hparams.update(options)  # the teacher keeps the base's scheduler
    torch.testing.assert_close(model.teacher_target(batch()), usual)
    content = checkpoint_of(model)
    content["lit_distill"]["facts"] |= {"num_inference_steps": 1}
    content["lit_distill"]["facts"]["examples"][0]["num_inference_steps"] = 1
    expected = model.draw(batch(num_inference_steps=1))[0]
    assert torch.isfinite(expected).all()
    for format in ("diffusers", "merged"):
        export_student(content, tmp_path / format, format)
        pipe = load_student(tmp_path / format)
        generator = [torch.Generator().manual_seed(3)]
        found = rollout(
            pipe,
            prompt=["a red cat"],
            num_inference_steps=1,
            generator=generator,
            height=16,
            width=16,
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "diffusers/scheduler_config.json").is_file()
    assert "type(pipe.scheduler).from_pretrained" in (tmp_path / "diffusers/README.md").read_text()
    export_student(checkpoint_of(base), tmp_path / "usual")
    assert not (tmp_path / "usual/scheduler_config.json").exists()
    with pytest.raises(ValueError, match=r"has no field 'shift_end'"):
        module(folder("QwenImage"), scheduler={"shift_end": None})


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
    assert Image.open(folders[0] / "samples.png").size == (256, 512)


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
    assert "loaded back, and seen to draw the same image" in capsys.readouterr().out
    prompts = ["a red seven on a blue background", "a white two on a black background"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    predict = ["predict", "--ckpt_path", checkpoint, "--prompts", str(tmp_path / "prompts.txt")]
    main([*predict, "--first_seed", "5", *quiet])
    images = sorted((tmp_path / "predictions").glob("*.png"))
    assert len(images) == 2
    pipe = load_student(tmp_path / "comfy")
    expected = pipe(prompts[1], generator=torch.Generator().manual_seed(6)).images[0]
    assert np.abs(np.asarray(Image.open(images[1]), int) - np.asarray(expected, int)).max() <= 1
