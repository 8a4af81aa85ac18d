"""Compares the plan of training steps with a GPU: memory, time, and the share of its peak speed.

    python benchmarks/gpu.py [--reference PATH] [--compile] [--device cpu]

Trains a LoRA on 8 layers of Qwen-Image's width (1328x1328) and on the embedded pipeline, with
random prompts, in bfloat16 and in every checkpointing mode. For each it reports

* planned: peak of weights, what trains, activations and temporaries, as `lit-distill plan` counts;
* peak: `torch.cuda.max_memory_allocated`; reserved: what the caching allocator has taken;
* seconds: median wall time of a step, and MFU: planned FLOPs without recomputation, by the seconds
  and the card's dense bfloat16 peak (`--gpu` names the card).

The largest ratio of reserved to planned memory is what the plan's margin has to cover. With
``--device cpu`` it makes the same comparison on a CPU at a small size, where the peak is counted
tensor by tensor, without compiled blocks, so it checks the script and the plan, not a card. With a
checkout of DiffSynth-Studio it runs `step.py --reference` with the same sizes afterwards. Writes
results/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_distill import load_pipeline, rollout
from lit_distill.adapters.inject import make_trainable, trained_parameters
from lit_distill.compute.compilation import compile_blocks
from lit_distill.compute.fused_lora import use_fused_lora
from lit_distill.compute.precision import compute_in
from lit_distill.pipelines.components import denoisers
from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.cards import CARDS, GIB, MARGIN
from lit_distill.planning.counter import Counter
from lit_distill.planning.planner import MODES, Planner
from lit_distill.planning.settings import TrainingSettings

RESULT = Path(__file__).parent / "results" / "gpu.json"
QWEN = {"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584}
QWEN |= {"axes_dims_rope": [16, 56, 56], "num_layers": 8}
SMALL = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 64}
SMALL |= {"axes_dims_rope": [4, 6, 6], "num_layers": 3}


def jobs(device: str) -> dict[str, tuple[Any, TrainingSettings]]:
    """Return the denoiser's configuration (None: the embedded one) and the settings, by name."""
    cpu = device == "cpu"
    common: dict[str, Any] = {"lora": {"r": 4 if cpu else 32}, "num_inference_steps": 4}
    side = 64 if cpu else 1328
    wide = TrainingSettings(height=side, width=side, prompt_tokens=16 if cpu else 256, **common)
    tiny = TrainingSettings(height=32, width=32, batch_size=8, prompt_tokens=16, **common)
    config = SMALL if cpu else QWEN
    return {
        f"qwen-image, {config['num_layers']} layers": (config, wide),
        "tiny-digits": (None, tiny),
    }


class Step:
    """A training step of real weights.

    Args:
        denoiser: Fields of the denoiser's configuration; None: the embedded pipeline's own.
        settings: What trains, and how.
        device: Where.
        compiled: Whether the blocks are compiled.
    """

    def __init__(self, denoiser: Any, settings: TrainingSettings, device: str, compiled: bool):  # noqa: ANN401
        self.settings, self.device = settings, device
        self.pipe = load_pipeline("tiny-digits", torch_dtype=settings.torch_dtype)
        dtype = getattr(torch, settings.torch_dtype)
        if denoiser:
            kind = type(self.pipe.transformer)
            config = {**self.pipe.transformer.config, **denoiser}
            with torch.device(device):
                self.pipe.transformer = kind.from_config(config).to(dtype).eval()
        self.blueprint = Blueprint.of(self.pipe)
        self.width = self.pipe.transformer.config.joint_attention_dim
        self.pipe.text_encoder = None
        make_trainable(self.pipe, dict(settings.lora or {}))
        (model,) = denoisers(self.pipe).values()
        model.to(device)
        self.pipe.vae.to(device)
        use_fused_lora(model)
        if compiled:
            compile_blocks([model])
        else:  # as in training: tracing can't follow the casts
            compute_in(model, {}, dtype)
        self.weights = list(trained_parameters(self.pipe).values())
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.0)

    def loss(self, mode: str) -> Tensor:
        """Return the loss of a sample of random prompts."""
        settings = self.settings
        shape = (settings.batch_size, settings.prompt_tokens or 1)
        dtype = getattr(torch, settings.torch_dtype)
        latents = rollout(
            self.pipe,
            prompt_embeds=torch.zeros(*shape, self.width, dtype=dtype, device=self.device),
            prompt_embeds_mask=torch.ones(shape, dtype=torch.long, device=self.device),
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            generator=[torch.Generator().manual_seed(n) for n in range(settings.batch_size)],
            checkpointing=mode,  # type: ignore[arg-type]
        )
        return latents.float().square().mean()

    def __call__(self, mode: str) -> None:
        """Make an optimizer step as Lightning does: the gradients live until the next one."""
        self.optimizer.zero_grad()
        self.loss(mode).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def measured_on_gpu(step: Step, mode: str, repeats: int) -> dict[str, float]:
    """Return peak memory and seconds of a step."""
    for _ in range(2):
        step(mode)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = [timed(lambda: step(mode)) for _ in range(repeats)]
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "seconds": statistics.median(seconds),
    }


def timed(call: Callable[[], None]) -> float:
    """Return the seconds of a call on the GPU."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def counted_on_cpu(step: Step, mode: str) -> dict[str, float]:
    """Return the peak that is counted tensor by tensor, besides weights and optimizer."""
    step.loss(mode).backward()  # type: ignore[no-untyped-call]  # counts the blocks
    step.optimizer.zero_grad()
    with Counter() as counter:
        step.loss(mode).backward()  # type: ignore[no-untyped-call]
    step.optimizer.zero_grad()
    return {"activations_gib": counter.peak / GIB}


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    rows = []
    compiled = [False, True] if options.compile else [False]
    for name, (denoiser, settings) in jobs(options.device).items():
        for each in compiled:
            step = Step(denoiser, settings, options.device, each)
            planner = Planner(step.blueprint, settings, device=options.device)
            vae = sum(p.nbytes for p in step.pipe.vae.parameters())
            for mode in MODES:
                plan = planner.step(mode)
                row: dict[str, Any] = {"job": name, "mode": mode, "compile": each}
                row["planned_gib"] = (plan.memory.total + vae) / GIB
                row["planned_activations_gib"] = plan.activation_peak / GIB
                if options.device == "cpu":
                    row |= counted_on_cpu(step, mode)
                    row["ratio"] = row["activations_gib"] / row["planned_activations_gib"]
                else:
                    row |= measured_on_gpu(step, mode, options.repeats)
                    row["ratio"] = row["reserved_gib"] / row["planned_gib"]
                    useful = plan.flops * (1 - plan.recomputed)
                    row["mfu"] = useful / row["seconds"] / CARDS[options.gpu].flops
                rows.append(row)
                print(json.dumps(row), flush=True)
            del step
    return rows


def main() -> None:
    """Compare, and write the figures with the device's name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--gpu", choices=list(CARDS), default="h100", help="card, for the MFU")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference", help="checkout of DiffSynth-Studio")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu checks the plan without one")
    if options.device == "cpu" and options.compile:
        parser.error("memory is counted operation by operation on a CPU, not in compiled code")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    rows = compare(options)
    result = {"device": device, "torch": torch.__version__, "margin": MARGIN, "rows": rows}
    result["largest_ratio"] = max(row["ratio"] for row in rows)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"largest ratio: {result['largest_ratio']:.3f}; the plan's margin is {MARGIN:.0%}")
    if options.reference:
        command = [sys.executable, str(Path(__file__).with_name("step.py")), "--layers", "8"]
        command += ["--width", "3072", "--image_tokens", "6889", "--text_tokens", "256"]
        command += ["--rank", "32", "--reference", options.reference]
        command += ["--out", str(options.out.with_name("gpu_reference.json"))]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
