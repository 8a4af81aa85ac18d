"""Students of tiny pipelines that differ from their teachers, and their images."""

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import CALL_KWARGS

from lit_distill import DirectDistill
from lit_distill.adapters.weights import extract_lora
from lit_distill.data.batch import NO_TARGET
from lit_distill.pipelines.guidance import guidance

CORE = ["QwenImage", "Flux", "Flux2", "StableDiffusion3", "StableDiffusionXL", "ZImage", "Wan"]


def module(path, name="QwenImage", **options):
    call = {k: v for k, v in CALL_KWARGS[name].items() if k not in ("height", "width")}
    options = {"lora": {"r": 4, "lora_alpha": 8}} | options
    model = DirectDistill(str(path), torch_dtype="float32", call_kwargs=call, **options)
    model.configure_model()
    return model


@torch.no_grad()
def away(model, seed=1):
    """Makes a student differ from its teacher, as training would."""
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
    return {f"{key}.{name}" for key, lora in extract_lora(pipe).items() for name in lora}


def batch(**changes):
    values = {"prompt": ["a red cat"], "seed": [3], "rand_device": "cpu", "cfg_scale": 1.0}
    values |= {"num_inference_steps": 4, "size": (16, 16), "call": {}, "row": [2]}
    return values | NO_TARGET | changes
