"""Writes the model card of an export: its README.md in the hub's format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.export.facts import StudentFacts
from lit_distill.pipelines.components import call_parameters, denoisers
from lit_distill.pipelines.guidance import guidance

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class ExportSummary:
    """What a model card reports of an export, beside the facts of its student.

    Attributes:
        format: Format of the export.
        reader: What it was reloaded with.
        difference: Relative difference of the latents sampled after reloading.
        has_scheduler: Whether it contains a scheduler configuration other than the base model's.
    """

    format: str
    reader: str
    difference: float
    has_scheduler: bool


def model_card(
    facts: StudentFacts, summary: ExportSummary, pipe: DiffusionPipeline, picture: str
) -> str:
    """Return the text of a model card.

    Args:
        facts: The student's facts.
        summary: The export.
        pipe: The pipeline, for the arguments of its call.
        picture: File name of the sample grid.
    """
    from huggingface_hub import ModelCardData

    merged = summary.format == "merged"
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base_model)
    data = ModelCardData(
        base_model=facts.base_model if is_hub_id else None,
        library_name="diffusers",
        pipeline_tag="text-to-video" if _is_video(pipe) else "text-to-image",
        tags=["direct-distillation", "few-step", *([] if merged else ["lora"])],
        base_model_relation=("finetune" if merged else "adapter") if is_hub_id else None,
        widget=[{"text": facts.examples[0].prompt, "output": {"url": picture}}],
    )
    steps = facts.num_inference_steps
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {markdown(Path(facts.base_model).name)} in {steps} steps",
        f"{markdown(facts.base_model)}, distilled to {steps} steps at guidance {facts.cfg_scale:g} "
        "(1 = off) with [Direct Distillation](https://github.com/lit-distill/lit-distill). Use the "
        "number of steps, guidance and scheduler that it was trained with; others degrade the "
        "images.",
        f"![undistilled pipeline and student]({picture})",
        "## Use",
        _usage(facts, summary, pipe),
        "## Facts",
        _table(_rows(facts, summary)),
    ]
    if facts.metrics:
        metrics = [(name, f"{value:.4g}") for name, value in sorted(facts.metrics.items())]
        sections += ["## Metrics, as last measured in training", _table(metrics)]
    return "\n\n".join(sections) + "\n"


def _usage(facts: StudentFacts, summary: ExportSummary, pipe: DiffusionPipeline) -> str:
    """Return how to use the export: a sentence, or a block of Python."""
    if summary.format in ("comfyui", "kohya"):
        comfyui = summary.format == "comfyui"
        folder = "ComfyUI/models/loras" if comfyui else "the LoRA folder of your tool"
        return (
            f"Put the .safetensors file into {folder}, load it at strength 1, and generate with "
            f"{facts.num_inference_steps} steps and cfg {facts.cfg_scale:g}."
        )
    if summary.format == "diffsynth":
        return "```python\npipe.load_lora(pipe.dit, 'diffsynth_lora.safetensors')  # pipe.unet\n```"
    source = "THIS_REPOSITORY" if summary.format == "merged" else facts.base_model
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({source!r}, dtype=torch.bfloat16)",
    ]
    arguments = [repr(facts.examples[0].prompt), *_arguments(facts, pipe)]
    if summary.format == "diffusers" and facts.lora_per_step:
        lines += _load_each_step(facts.lora_per_step, pipe)
        arguments.append("callback_on_step_end=next_lora")
    elif summary.format == "diffusers":
        lines.append("pipe.load_lora_weights('THIS_REPOSITORY')")
    if summary.format == "peft":
        denoiser = next(iter(denoisers(pipe)))
        lines.insert(2, "from peft import PeftModel")
        lines.append(f"PeftModel.from_pretrained(pipe.{denoiser}, 'THIS_REPOSITORY')")
    if summary.has_scheduler and summary.format != "merged":
        lines.append("pipe.scheduler = type(pipe.scheduler).from_pretrained('THIS_REPOSITORY')")
    output = "frames" if _is_video(pipe) else "images"
    lines.append(f"image = pipe({', '.join(arguments)}).{output}[0]")
    return "```python\n" + "\n".join(lines) + "\n```"


def _arguments(facts: StudentFacts, pipe: DiffusionPipeline) -> list[str]:
    """Return the keyword arguments of the student's call, as Python."""
    call: dict[str, Any] = {"num_inference_steps": facts.num_inference_steps}
    with guidance(pipe, facts.cfg_scale, 1, {}) as guidance_arguments:
        call |= guidance_arguments | facts.call_kwargs
    call |= {"height": facts.height} if facts.height else {}
    call |= {"width": facts.width} if facts.width else {}
    pictures = [f"{name}=YOUR_{name.upper()}" for name in facts.examples[0].pictures]
    return [*(f"{name}={value!r}" for name, value in call.items()), *pictures]


def _is_video(pipe: DiffusionPipeline) -> bool:
    return "num_frames" in call_parameters(pipe)


def _load_each_step(count: int, pipe: DiffusionPipeline) -> list[str]:
    """Return the lines that load one LoRA per step and define the callback that switches them.

    Exports are verified with `lit_distill.compute.step_adapters.switch_adapter_callback`, which
    does the same.
    """
    lines = [f"for step in range(1, {count + 1}):"]
    for index, component in enumerate(denoisers(pipe)):
        file = f"step_{{step}}_{component}" if index else "step_{step}"
        target = f", load_into_{component}=True" if index else ""
        lines.append(
            f"    pipe.load_lora_weights('THIS_REPOSITORY', weight_name=f'{file}.safetensors', "
            f"adapter_name=f'step_{{step}}'{target})"
        )
    return [
        *lines,
        "pipe.set_adapters('step_1')",
        "",
        "def next_lora(pipe, step, timestep, kwargs):",
        f"    pipe.set_adapters(f'step_{{(step + 1) % {count} + 1}}')  # after the last: the first",
        "    return kwargs",
        "",
    ]


def _rows(facts: StudentFacts, summary: ExportSummary) -> list[tuple[str, Any]]:
    """Return name and value of every known fact."""
    data, teacher = facts.data, facts.teacher
    scheduler = ", configured for the student" if summary.has_scheduler else ""
    rows = [
        ("base model", facts.base_model),
        ("revision", facts.base_revision),
        ("steps, guidance", f"{facts.num_inference_steps}, {facts.cfg_scale:g}"),
        ("size (height x width)", facts.height and f"{facts.height}x{facts.width}"),
        ("scheduler", facts.scheduler + scheduler),
        ("LoRA", facts.lora and ", ".join(f"{name} {value}" for name, value in facts.lora.items())),
        ("LoRAs, one per step", facts.lora_per_step),
        ("training data", data and f"{data['rows']} rows, {data['prompts']} prompts"),
        ("optimizer steps", facts.global_step),
        ("teacher", facts.teacher_model or teacher.get("teacher_model")),
        ("teacher's steps", teacher.get("teacher_num_inference_steps")),
        ("teacher's guidance", teacher.get("teacher_cfg_scale")),
        ("teacher's LoRA, included in this export", facts.teacher_lora),
        ("format", summary.format),
        ("reloaded with", summary.reader),
        ("difference after reloading", f"{summary.difference:.1e} (relative, of the latents)"),
        ("exported by", f"lit_distill {facts.version}"),
    ]
    return [(name, value) for name, value in rows if value]


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {markdown(name)} | {markdown(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


_PLAIN = re.compile(r"[\w ./:,;'%+()=-]*")

_MARKUP = re.compile(r"://|www\.|(?<!\w)_|_(?!\w)")


def markdown(value: object) -> str:
    """Return a value as text that markdown shows as it is: as code, if it may be markup or HTML."""
    text = " ".join(str(value).split())
    if _PLAIN.fullmatch(text) and not _MARKUP.search(text):
        return text
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    # Tables end a cell at "|" in code, too; the spaces are not shown.
    return f"{fence} {text} {fence}".replace("|", "\\|")
