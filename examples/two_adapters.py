"""Generate an image with two LoRAs in plain diffusers, one for few steps and one for a style.

    python examples/two_adapters.py MODEL FEW_STEP_LORA STYLE_LORA PROMPT OUT.png [SIZE]

MODEL is a hub id or a folder.
"""

import sys

import torch
from diffusers import DiffusionPipeline


def main(model: str, few_step: str, style: str, prompt: str, out: str, size: int = 1328) -> None:
    """Generate `prompt` in 4 steps without guidance, in the style, and save the image to `out`."""
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.load_lora_weights(few_step, adapter_name="few_step")
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["few_step", "style"], adapter_weights=[1.0, 1.0])
    image = pipe(
        prompt,
        num_inference_steps=4,  # the number that the few-step LoRA was trained with
        true_cfg_scale=1.0,  # pipelines without this argument: guidance_scale=1.0
        height=size,
        width=size,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]
    image.save(out)


if __name__ == "__main__":
    model, few_step, style, prompt, out, *size = sys.argv[1:]
    main(model, few_step, style, prompt, out, *map(int, size))
