"""LoRA files whose settings or keys make them more than two factors and an alpha."""

import json
import time

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tiny_pipelines import build

from lit_distill.adapters.lora_files import read_lora
from lit_distill.errors import InputError

MODULE = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def pipe():
    return build("QwenImage")


@pytest.fixture
def state(pipe):
    rows, columns = pipe.transformer.get_submodule(MODULE).weight.shape
    key = f"base_model.model.{MODULE}"
    return {
        f"{key}.lora_A.weight": torch.ones(2, columns),
        f"{key}.lora_B.weight": torch.ones(rows, 2),
    }


def peft_lora(folder, state, **settings):
    """A LoRA as peft saves it."""
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in LoraConfig().to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"lora_alpha": 4} | settings))
    save_file(state, folder / "adapter_model.safetensors")
    return folder / "adapter_model.safetensors"


def diffusers_lora(folder, state, **settings):
    """A LoRA as diffusers saves it: the settings are in the file's metadata."""
    fields = {f"transformer.{key}": value for key, value in ({"lora_alpha": 4} | settings).items()}
    renamed = {key.replace("base_model.model.", "transformer."): t for key, t in state.items()}
    metadata = {"lora_adapter_metadata": json.dumps(fields)}
    save_file(renamed, folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


SAVERS = [peft_lora, diffusers_lora]


@pytest.mark.parametrize("saver", SAVERS)
def test_the_settings_of_todays_peft_are_plain(saver, state, pipe, tmp_path):
    """All fields of its LoraConfig at their defaults; a new version may add some."""
    assert read_lora(saver(tmp_path, state), pipe)["transformer"][MODULE].alpha == 4


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_a_lora_that_began_with_changed_base_weights_is_refused(saver, init, state, pipe, tmp_path):
    path = saver(tmp_path, state, init_lora_weights=init)
    with pytest.raises(InputError, match=f"init_lora_weights is '{init}'.*base model's weights"):
        read_lora(path, pipe)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_a_lora_that_began_otherwise_is_read(init, state, pipe, tmp_path):
    """EVA chooses the first factor only, and the base model stays as it is."""
    path = peft_lora(tmp_path, state, init_lora_weights=init, eva_config={"rho": 2.0})
    assert read_lora(path, pipe)["transformer"][MODULE].alpha == 4


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "this kind of adapter is not supported: 'DoRA'"),
        ({"peft_type": "LOKR"}, "this kind of adapter is not supported: 'LOKR'"),
        ({"use_qalora": True}, "'use_qalora' is True, which is not supported"),
        ({"layer_replication": [[0, 1]]}, "'layer_replication' is .*which is not supported"),
        ({"bias": "all"}, "'bias' is 'all', which is not supported"),
        ({"a_field_of_tomorrow": {"x": 1}}, "'a_field_of_tomorrow' is .*which is not supported"),
        ({"lora_alpha": "4"}, "lora_alpha must be a finite number, got '4'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"alpha_pattern": {"to_q": None}}, r"alpha_pattern\['to_q'\] must be a finite number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern must be an object, got \[1\]"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern has the expression '\\('"),
    ],
)
def test_other_settings_are_refused_by_name(saver, settings, message, state, pipe, tmp_path):
    with pytest.raises(InputError, match=message):
        read_lora(saver(tmp_path, state, **settings), pipe)


@pytest.mark.parametrize(
    "pattern", [r"(\w+\.?)+x", "(a+)+$", ".*" * 20 + "x", "(a|a?)" * 40, "a?" * 40 + "a" * 40]
)
def test_an_expression_that_would_never_end_is_refused_at_once(pattern, state, pipe, tmp_path):
    path = peft_lora(tmp_path, state, alpha_pattern={pattern: 8})
    start = time.monotonic()
    with pytest.raises(InputError, match="only names with wildcards"):
        read_lora(path, pipe)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ("to_q", 8),
        ("attn.to_q", 8),
        (r"^transformer_blocks\.0\.attn\.to_q", 8),
        (r"transformer_blocks.\d+.attn.to_q", 8),
        (r".*to_q$", 8),
        ("to_k|to_q", 8),
        ("o_q", 4),
        ("^attn.to_q", 4),
        ("to", 4),
    ],
)
def test_patterns_mean_what_they_mean_to_peft(pattern, alpha, state, pipe, tmp_path):
    from peft.utils.other import get_pattern_key

    assert (get_pattern_key([pattern], MODULE) == pattern) == (alpha == 8)
    path = peft_lora(tmp_path, state, alpha_pattern={pattern: 8})
    assert read_lora(path, pipe)["transformer"][MODULE].alpha == alpha


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"base_model.model.{MODULE}.lora_magnitude_vector", "DoRA"),
        ("lora_unet_transformer_blocks_0_attn_to_q.dora_scale", "DoRA"),
        ("lora_unet_transformer_blocks_0_attn_to_q.lokr_w1", "LoKr"),
        ("lora_unet_transformer_blocks_0_attn_to_q.hada_w1_a", "LoHa"),
        (f"diffusion_model.{MODULE}.diff", "differences of whole weights"),
        (f"base_model.model.{MODULE}.lora_B.bias", "a trained bias"),
    ],
)
def test_another_kind_of_adapter_is_named(key, kind, state, pipe, tmp_path):
    for tensors in (state | {key: torch.ones(3)}, {key: torch.ones(3)}):
        with pytest.raises(InputError, match=f"this kind of adapter is not supported: {kind}"):
            read_lora(peft_lora(tmp_path, tensors), pipe)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, state, pipe, tmp_path):
    key = f"base_model.model.{MODULE}.lora_B.weight"
    state[key][3, 1] = value
    with pytest.raises(InputError, match=f"{MODULE}: up holds NaN or infinite values"):
        read_lora(peft_lora(tmp_path, state), pipe)


def test_a_module_that_is_adapted_twice_is_named(state, pipe, tmp_path):
    """By two names of different tools, of which only the last was read."""
    other = {
        key.replace("base_model.model.", "diffusion_model."): 2 * t for key, t in state.items()
    }
    with pytest.raises(InputError, match=f"adapts {MODULE} twice"):
        read_lora(peft_lora(tmp_path, state | other), pipe)
    old = {key.replace("lora_A", "lora_down"): 2 * t for key, t in state.items()}
    with pytest.raises(InputError, match=f"{MODULE} has two factors 'down'"):
        read_lora(peft_lora(tmp_path, state | old), pipe)


def test_two_alphas_that_differ_are_named(state, pipe, tmp_path):
    alpha = {f"base_model.model.{MODULE}.alpha": torch.tensor(2.0)}
    with pytest.raises(InputError, match=f"{MODULE} has alpha 2, but its settings say 4"):
        read_lora(peft_lora(tmp_path, state | alpha), pipe)
