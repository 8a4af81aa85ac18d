"""Generate an image with an exported LoRA in plain diffusers, without lit_distill.

    python examples/infer.py MODEL LORA PROMPT OUT.png [SIZE]

MODEL is a hub id or a folder.
"""

import sys

import torch
from diffusers import DiffusionPipeline


def main(model: str, lora: str, prompt: str, out: str, size: int = 1328) -> None:
    """Generate `prompt` in 4 steps without guidance, and save the image to `out`."""
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.load_lora_weights(lora)
    image = pipe(
        prompt,
        num_inference_steps=4,  # the number that the student was trained with
        true_cfg_scale=1.0,  # pipelines without this argument: guidance_scale=1.0
        height=size,
        width=size,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]
    image.save(out)


if __name__ == "__main__":
    model, lora, prompt, out, *size = sys.argv[1:]
    main(model, lora, prompt, out, *map(int, size))
