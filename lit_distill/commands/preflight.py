"""`lit-distill preflight`: can this pipeline be distilled, and with which settings?"""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from lit_distill.commands.next_step import print_next, settings_of
from lit_distill.training.autoconfigure import quantization_error
from lit_distill.training.direct_distill import DirectDistill
from lit_distill.training.preflight_once import run_preflight


def preflight(
    trainer: pl.Trainer,
    model: DirectDistill,
    configs: Sequence[str] = (),
    *,
    prompt: str = "a photo of a cat that sleeps on a green sofa",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 4,
) -> None:
    """Check with a few small samples that a pipeline can be distilled, and report what to set.

    For quantised weights it also reports how much they change the gradient, if there is memory for
    both. Runs on the device of trainer.accelerator, in the pipeline's torch_dtype.

    Args:
        trainer: Device and precision.
        model: The pipeline, what is trained of it, and its call_kwargs.
        configs: Configuration files that were given.
        prompt: A typical prompt.
        height: Height in pixels; default: the pipeline's default. Small sizes are quick.
        width: Width in pixels; default: the pipeline's default.
        num_inference_steps: Steps of the student.
    """
    model.configure_model()
    sides = {"height": height, "width": width}
    size = {name: value for name, value in sides.items() if value is not None}
    call = {"prompt": prompt, "num_inference_steps": num_inference_steps, **size}
    report = run_preflight(model.student, trainer, **call)
    if model.settings.quantization:
        report.findings.append(quantization_error(model.student, trainer, **call))
    print(report)
    report.raise_failures()
    settings = settings_of(model.settings.model_name(), configs)
    print_next("generate", *settings, "--prompts", "prompts.txt", "--out", "data/train")
