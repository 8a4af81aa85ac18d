"""Writes the model card of an export: its README.md in the hub's format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.export.facts import StudentFacts
from lit_distill.pipelines.components import call_parameters, denoisers
from lit_distill.pipelines.guidance import guidance
from lit_distill.pipelines.loading import TINY_DIGITS, pipeline_source

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
        where: Hub repository or folder that users load it from.
        torch_dtype: Data type to load the pipeline in.
    """

    format: str
    reader: str
    difference: float
    has_scheduler: bool
    where: str
    torch_dtype: str


@dataclass(frozen=True)
class Gallery:
    """The picture of a model card.

    Attributes:
        file: Its file name.
        columns: What its columns show, from left to right.
    """

    file: str
    columns: list[str]


def model_card(
    facts: StudentFacts, summary: ExportSummary, pipe: DiffusionPipeline, gallery: Gallery
) -> str:
    """Return the text of a model card.

    Args:
        facts: The student's facts.
        summary: The export.
        pipe: The pipeline, for the arguments of its call.
        gallery: The picture of its samples.
    """
    base_licence = licence(facts.base_model, facts.base_revision)
    steps = facts.num_inference_steps
    columns = ", ".join(gallery.columns)
    sections = [
        f"---\n{_metadata(facts, summary, pipe, gallery, base_licence)}\n---",
        f"# {markdown(Path(facts.base_model).name)} in {steps} steps",
        f"{markdown(facts.base_model)}, distilled to {steps} steps at guidance {facts.cfg_scale:g} "
        "(1 = off) with [Direct Distillation](https://github.com/lit-distill/lit-distill). Use the "
        "number of steps, guidance and scheduler that it was trained with; others degrade the "
        "images.",
        f"![samples, one prompt per row: {columns}]({gallery.file})",
        f"From left to right: {columns}.",
        "## Use",
        _usage(facts, summary, pipe),
        "## Facts",
        _table(_rows(facts, summary)),
    ]
    metrics = {k: v for k, v in facts.metrics.items() if k.startswith("val_")}
    if metrics:
        lines = [(name, f"{value:.4g}") for name, value in sorted(metrics.items())]
        sections += ["## Metrics of held-out rows, as last measured in training", _table(lines)]
    sections += ["## Licence", _licence_note(base_licence)]
    return "\n\n".join(sections) + "\n"


def _metadata(
    facts: StudentFacts,
    summary: ExportSummary,
    pipe: DiffusionPipeline,
    gallery: Gallery,
    base_licence: dict[str, str],
) -> str:
    """Return the card's metadata in the hub's format, as YAML."""
    from huggingface_hub import ModelCardData

    merged = summary.format == "merged"
    source = "image" if facts.examples[0].pictures else "text"
    task = f"{source}-to-{'video' if _is_video(pipe) else 'image'}"
    on_hub = is_hub_id(facts.base_model)
    metadata = ModelCardData(
        license=base_licence.get("license"),
        license_name=base_licence.get("license_name"),
        license_link=base_licence.get("license_link"),
        base_model=facts.base_model if on_hub else None,
        base_model_relation=("finetune" if merged else "adapter") if on_hub else None,
        library_name="diffusers",
        pipeline_tag=task,
        tags=["diffusers", task, "direct-distillation", "few-step", *([] if merged else ["lora"])],
        widget=[{"text": facts.examples[0].prompt, "output": {"url": gallery.file}}],
    )
    return str(metadata.to_yaml())


def is_hub_id(name: str) -> bool:
    """Return whether a pipeline's name is one of the hub, not a folder or the embedded one."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def licence(base_model: str, revision: str | None) -> dict[str, str]:
    """Return the licence fields of the base model's card; none if it can't be read.

    Args:
        base_model: Hub id or folder.
        revision: Branch, tag or commit of the hub repository.
    """
    from huggingface_hub import ModelCard, hf_hub_download

    source = Path(pipeline_source(base_model)) / "README.md"
    try:
        if is_hub_id(base_model):
            source = Path(hf_hub_download(base_model, "README.md", revision=revision))
        card = ModelCard(source.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except Exception:  # no card, no network, a card that is no YAML: the export must not fail
        return {}
    found = vars(card.data)
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found.get(name), str)}


def _licence_note(base_licence: dict[str, str]) -> str:
    if not base_licence.get("license"):
        return (
            "The base model's card names no licence, or could not be read. Fill in `license` in "
            "the metadata of this file before you publish it."
        )
    shown = base_licence.get("license_name") or base_licence["license"]
    return f"That of the base model: {markdown(shown)}."


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
    lines = ["import torch", *_loading(facts, summary)]
    example = facts.examples[0]
    arguments = [repr(example.prompt), *_arguments(facts, pipe)]
    if summary.format == "diffusers" and facts.lora_per_step:
        lines += _load_each_step(facts.lora_per_step, pipe, summary.where)
        arguments.append("callback_on_step_end=next_lora")
    elif summary.format == "diffusers":
        lines.append(f"pipe.load_lora_weights({summary.where!r})")
    if summary.format == "peft":
        denoiser = next(iter(denoisers(pipe)))
        lines.insert(1, "from peft import PeftModel")
        lines.append(f"PeftModel.from_pretrained(pipe.{denoiser}, {summary.where!r})")
    if summary.has_scheduler and summary.format != "merged":
        lines.append(f"pipe.scheduler = type(pipe.scheduler).from_pretrained({summary.where!r})")
    if example.pictures:
        lines.insert(1, "from diffusers.utils import load_image")
    generator = f"torch.Generator({example.rand_device!r}).manual_seed({example.seed})"
    arguments.append(f"generator={generator}")
    output = "frames" if _is_video(pipe) else "images"
    call = "".join(f"    {argument},\n" for argument in arguments)
    lines.append(f"image = pipe(\n{call}).{output}[0]")
    return "```python\n" + "\n".join(lines) + "\n```"


def _loading(facts: StudentFacts, summary: ExportSummary) -> list[str]:
    """Return the lines that load the pipeline, without a LoRA."""
    dtype = f"torch.{summary.torch_dtype}"
    name = summary.where if summary.format == "merged" else facts.base_model
    if name == TINY_DIGITS:
        call = f"load_pipeline({name!r}, torch_dtype={dtype})"
        return ["from lit_distill import load_pipeline", "", f"pipe = {call}"]
    arguments = [repr(name), f"dtype={dtype}"]
    if summary.format != "merged" and facts.base_revision and is_hub_id(name):
        arguments.append(f"revision={facts.base_revision!r}")
    call = f"DiffusionPipeline.from_pretrained({', '.join(arguments)})"
    return ["from diffusers import DiffusionPipeline", "", f"pipe = {call}"]


def _arguments(facts: StudentFacts, pipe: DiffusionPipeline) -> list[str]:
    """Return the keyword arguments of the student's call, as Python."""
    call: dict[str, Any] = {"num_inference_steps": facts.num_inference_steps}
    with guidance(pipe, facts.cfg_scale, 1, {}) as guidance_arguments:
        call |= guidance_arguments | facts.call_kwargs
    call |= {"height": facts.height} if facts.height else {}
    call |= {"width": facts.width} if facts.width else {}
    pictures = [f"{k}=load_image({path!r})" for k, path in facts.examples[0].pictures.items()]
    return [*(f"{name}={value!r}" for name, value in call.items()), *pictures]


def _is_video(pipe: DiffusionPipeline) -> bool:
    return "num_frames" in call_parameters(pipe)


def _load_each_step(count: int, pipe: DiffusionPipeline, where: str) -> list[str]:
    """Return the lines that load one LoRA per step and define the callback that switches them.

    Exports are verified with `lit_distill.compute.step_adapters.switch_adapter_callback`, which
    does the same.
    """
    lines = [f"for step in range(1, {count + 1}):"]
    for index, component in enumerate(denoisers(pipe)):
        file = f"step_{{step}}_{component}" if index else "step_{step}"
        target = f", load_into_{component}=True" if index else ""
        lines.append(
            f"    pipe.load_lora_weights({where!r}, weight_name=f'{file}.safetensors', "
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
