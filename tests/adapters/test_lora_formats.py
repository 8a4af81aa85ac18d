import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from students import CORE, away, checkpoint_of, module, picture
from tiny_pipelines import build

from lit_distill import export_student, load_student
from lit_distill.adapters.lora import Factors
from lit_distill.adapters.lora_files import read_lora, to_state
from lit_distill.adapters.lora_formats import LAYOUTS, layout_of
from lit_distill.adapters.weights import extract_lora
from lit_distill.pipelines.components import denoisers


@pytest.mark.parametrize("format", LAYOUTS)
@pytest.mark.parametrize("name", CORE)
def test_what_is_written_is_read_back(name, format, folder, tmp_path):
    """With uneven ranks and alphas, and queries without keys and values."""
    pipe = build(name)
    component, denoiser = next(iter(denoisers(pipe).items()))
    if type(denoiser).__name__ not in LAYOUTS[format]:
        with pytest.raises(ValueError, match=r"its names for the modules of .* are not known"):
            layout_of(format, component, denoiser)
        return
    lora = extract_lora(away(module(folder(name), name)).pipe)[component]
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


# Keys by the names of DiffSynth-Studio's modules.
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


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "kohya", "diffsynth", "peft"])
def test_training_starts_from_a_lora_of_any_layout(format, exports, folder, tmp_path):
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
            "1 of .* keys belong to no module of QwenImage.*: lora_unet_blocks_0_q.lora_up.weight",
        ),
        (
            lambda s: s.update({f"{FIRST}.lora_up.weight": torch.zeros(32, 3)}),
            rf"{FIRST}: down \(4, 32\) and up \(32, 3\) differ in rank",
        ),
        (
            lambda s: s.update({f"{FIRST}.lora_down.weight": torch.zeros(4, 31)}),
            rf"{FIRST}: down \(4, 31\) and up \(32, 4\) do not match a weight of \(32, 32\)",
        ),
        (lambda s: s.pop(f"{FIRST}.alpha"), f"{FIRST} has no alpha"),
        (lambda s: s.pop(f"{FIRST}.lora_up.weight"), f"{FIRST} has no factor 'up'"),
        (
            lambda s: s.update({"lora_te1_text_model_q.lora_up.weight": torch.zeros(4, 4)}),
            "lora_te1_text_model_q.*LoRAs of text encoders are not supported",
        ),
    ],
)
def test_a_file_that_does_not_match_is_refused_by_name(change, message, exports, folder, tmp_path):
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
