"""LoRA files: what is accepted is the update that the file holds, by an independent reading."""

import json
import re

import pytest
import torch
from fuzzing import REFUSED, attempt, changed, changes, files, fuzz, json_text
from hypothesis import strategies as st
from safetensors.torch import load, save
from tiny_pipelines import build

from lit_distill.adapters import lora_files
from lit_distill.adapters.lora import Factors
from lit_distill.adapters.lora_files import read_lora, to_state
from lit_distill.adapters.lora_formats import adaptable_modules, known_names, layout_of

FORMATS = ("diffusers", "peft", "comfyui", "kohya", "diffsynth")

BLOCK = "transformer_blocks.0.attn."

MODULES = [BLOCK + name for name in ("to_q", "to_k", "to_v", "to_out.0")]

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "alpha_pattern": {r"^transformer_blocks\.0\.attn\.to_q": 8, "to_k": 1, "norm": 3},
    "rank_pattern": {"to_q": 2},
    "use_rslora": False,
    "init_lora_weights": True,
    "target_modules": ["to_q", "to_k"],
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
}


@pytest.fixture(scope="module")
def pipe():
    return build("Flux")


@pytest.fixture(autouse=True)
def quick(pipe, monkeypatch):
    """The names of a denoiser are found once, not for each input."""
    names = known_names("transformer", pipe.transformer)
    sizes = adaptable_modules(pipe.transformer)
    monkeypatch.setattr(lora_files, "known_names", lambda *_: names)
    monkeypatch.setattr(lora_files, "adaptable_modules", lambda *_: sizes)


@pytest.fixture(scope="module")
def states(pipe):
    """The tensors of one LoRA in every layout."""
    sizes = adaptable_modules(pipe.transformer)
    generator = torch.Generator().manual_seed(0)
    lora = {
        name: Factors(
            torch.randn(2, sizes[name][1], generator=generator),
            torch.randn(sizes[name][0], 2, generator=generator),
            1.0 + index,
        )
        for index, name in enumerate(MODULES)
    }
    return [
        to_state(lora, layout_of(f, "transformer", pipe.transformer), pipe.transformer)
        for f in FORMATS
    ]


def update(path, names, settings=None):
    """The update of each module, by the simplest reading of a file, in float64."""
    groups = {}
    for key, tensor in load(path.read_bytes()).items():
        for part, factor in (
            ("lora_A", 0),
            ("lora_down", 0),
            ("lora_B", 1),
            ("lora_up", 1),
            ("alpha", 2),
        ):
            if key.endswith((f".{part}.weight", f".{part}.default.weight", f".{part}")):
                name = key[: key.rindex(f".{part}")]
                assert factor not in groups.setdefault(name, {})
                groups[name][factor] = tensor.double()
    found = {}
    for name, group in groups.items():
        down, up = group[0], group[1]
        alpha = float(group.get(2, len(down)))
        if settings and "lora_alpha" in settings:
            alpha, module = settings["lora_alpha"], names[name][0]
            for pattern, value in (settings.get("alpha_pattern") or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    alpha = value
                    break
            alpha *= len(down) ** 0.5 if settings.get("use_rslora") else 1
        assert not set(names[name]) & set(found)
        whole = alpha / len(down) * up.flatten(1) @ down.flatten(1)
        sizes = [lora_files.adaptable_modules()[part][0] for part in names[name]]
        found |= dict(zip(names[name], whole.split(sizes), strict=True))
    return found


def verify(path, pipe, settings=None):
    lora = attempt(read_lora, path, pipe, beside=[path.with_name("adapter_config.json")])
    if lora is REFUSED:
        return
    expected = update(path, lora_files.known_names(), settings)
    assert set(lora["transformer"]) == set(expected)
    for name, factors in lora["transformer"].items():
        down, up = factors.down.double().flatten(1), factors.up.double().flatten(1)
        difference = factors.alpha / len(down) * up @ down - expected[name]
        assert difference.norm() <= 1e-6 * expected[name].norm(), name


def test_bytes(states, pipe, tmp_path):
    path = tmp_path / "lora.safetensors"

    def check(data):
        path.write_bytes(data)
        verify(path, pipe)

    fuzz("lora bytes", check, data=files(*map(save, states)))


VALUES = {
    "nan": lambda t: t.float() * float("nan"),
    "inf": lambda t: t.float() / 0,
    "zero": torch.zeros_like,
    "huge": lambda t: t.float() * 1e38,
    "no rows": lambda t: t[:0] if t.ndim else t,
    "a row less": lambda t: t[:-1] if t.ndim else t,
    "a dimension more": lambda t: t[..., None],
    "1x1": lambda t: t[..., None, None],
    "flat": lambda t: t.flatten(),
    "a number": lambda t: torch.tensor(3.0),
    "two numbers": lambda t: torch.tensor([1.0, 2.0]),
    "transposed": lambda t: t.t().contiguous() if t.ndim == 2 else t,
    **{
        str(dtype): lambda t, dtype=dtype: (t.float() * 100).to(dtype)
        for dtype in (
            *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool),
            *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
        )
    },
}

NAMES = {
    "unknown": lambda key: key + "_",
    "empty": lambda key: "",
    "other prefix": lambda key: "base_model.model." + key.split("transformer.", 1)[-1],
    "default": lambda key: key.replace(".weight", ".default.weight"),
    "old": lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "swapped": lambda key: key.replace("lora_A", "lora_B").replace("down", "up"),
    "DoRA": lambda key: key.rsplit(".lora", 1)[0] + ".lora_magnitude_vector.default.weight",
    "kohya's DoRA": lambda key: key.split(".")[0] + ".dora_scale",
    "LoKr": lambda key: key.split(".")[0] + ".lokr_w1",
    "LoHa": lambda key: key.split(".")[0] + ".hada_w1_a",
    "bias": lambda key: key.replace(".weight", ".bias"),
    "alpha": lambda key: key.rsplit(".lora", 1)[0] + ".alpha",
    "text encoder": lambda key: "lora_te1_" + key,
    "long": lambda key: key * 500,
    "dots": lambda key: "." * 20_000 + key,
    "line break": lambda key: key.replace(".", "\n", 1),
    "separate": lambda key: key.replace(
        "double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q"
    ),
}


def test_tensors(states, pipe, tmp_path):
    path = tmp_path / "lora.safetensors"

    def check(state, edits):
        state = dict(states[state])
        for kind, index, what in edits:
            key = list(state)[index % len(state)]
            if kind == "value":
                real = state[key].real if state[key].is_complex() else state[key]
                state[key] = VALUES[what](real)
            elif kind == "rename":
                state[NAMES[what](key)] = state.pop(key)
            elif kind == "copy":
                state[NAMES[what](key)] = state[key].clone()
            elif len(state) > 1:
                del state[key]
        path.write_bytes(save({key: tensor.contiguous() for key, tensor in state.items()}))
        verify(path, pipe)

    index = st.integers(0, 11)
    edit = st.one_of(
        st.tuples(st.just("value"), index, st.sampled_from(sorted(VALUES))),
        st.tuples(st.sampled_from(["rename", "copy"]), index, st.sampled_from(sorted(NAMES))),
        st.tuples(st.just("remove"), index, st.just("")),
    )
    edits = st.lists(edit, min_size=1, max_size=3)
    fuzz("lora tensors", check, state=st.integers(0, len(FORMATS) - 1), edits=edits)


ALTERED = [
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "loftq", "loftq_config": {"bits": 4}},
    {"init_lora_weights": "gaussian"},
    {"peft_type": "LOKR"},
    {"use_rslora": True},
    {"alpha_pattern": {"(a+)+$": 4}},
    {"alpha_pattern": {r"(\w+\.?)+x": 4}},
    {"alpha_pattern": {"(.*)(.*)(.*)(.*)(.*)(.*)(.*)x": 4}},
    {"alpha_pattern": {"(": 4, "to_k": 2}},
    {"alpha_pattern": {".*": 3, "to_q|to_k": 2}},
    {"rank_pattern": {"(a+)+$": 4}},
    {"layer_replication": [[0, 1]]},
    {"fan_in_fan_out": True},
    {"future_field": {"x": 1}},
    {},
]


def test_settings(states, pipe, tmp_path):
    """adapter_config.json beside peft's file, or diffusers' metadata in it."""
    peft = tmp_path / "adapter_model.safetensors"
    peft.write_bytes(save(states[FORMATS.index("peft")]))
    config = tmp_path / "adapter_config.json"
    other = tmp_path / "lora.safetensors"
    inside = states[FORMATS.index("diffusers")]

    def check(place, altered, edits, data):
        settings = changed(CONFIG | ALTERED[altered], edits)
        if place == "bytes":
            config.write_bytes(data)
            settings = readable(data)
        elif place == "config":
            config.write_text(json_text(settings))
            settings = readable(config.read_bytes())
        else:
            if not isinstance(settings, dict):
                settings = {}
            prefixed = json_text({f"transformer.{key}": value for key, value in settings.items()})
            other.write_bytes(save(inside, {"lora_adapter_metadata": prefixed}))
        verify(other if place == "metadata" else peft, pipe, settings)

    fuzz(
        "lora settings",
        check,
        place=st.sampled_from(["bytes", "config", "metadata"]),
        altered=st.integers(0, len(ALTERED) - 1),
        edits=st.one_of(st.just([]), changes),
        data=files(json.dumps(CONFIG).encode()),
    )


def readable(data):
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
