"""The facts of a student, gathered in training, and the model card that tells them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.pipelines.components import call_parameters, denoisers
from lit_distill.pipelines.guidance import guidance

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def student_facts(content: dict[str, Any], pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return all facts of a checkpoint's student; without noted rows, a stand-in is drawn.

    Args:
        content: Content of a checkpoint.
        pipe: The student's pipeline.
    """
    hyper = content["hyper_parameters"]
    noted = content.get("lit_distill", {}).get("facts", {})
    steps = {"num_inference_steps": 4, "cfg_scale": 1.0, "height": None, "width": None}
    facts = {**steps, "global_step": content.get("global_step", 0), "metrics": {}, **noted}
    stand_in = {name: facts[name] for name in steps} | {"prompt": "a photo of a cat", "seed": 0}
    facts.setdefault("examples", [stand_in | {"rand_device": "cpu"}])
    lora = hyper["lora"]
    return facts | {
        "version": version("lit-distill"),
        "pipeline": type(pipe).__name__,
        "base_model": hyper["pretrained_model_name_or_path"],
        "base_revision": hyper.get("revision") or _commit(pipe),
        "torch_dtype": hyper["torch_dtype"],
        "call_kwargs": student_call_kwargs(hyper),
        "scheduler": type(pipe.scheduler).__name__,
        "lora": lora
        and {"r": lora.get("r", 8), "lora_alpha": lora.get("lora_alpha", lora.get("r", 8))},
        "lora_per_step": hyper.get("lora_per_step"),
        "teacher_lora": hyper.get("teacher_lora"),
        "teacher_model": hyper.get("teacher_model"),
    }


def student_call_kwargs(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fixed arguments of the student's call: those of the teacher's, and its sigmas."""
    own = {"sigmas": list(hyper["sigmas"])} if hyper.get("sigmas") else {}
    return (hyper.get("call_kwargs") or {}) | own


def _commit(pipe: DiffusionPipeline) -> str | None:
    """Return the hub commit that the denoiser was loaded from, which its cache folder names."""
    source = str(next(iter(denoisers(pipe).values())).config.get("_name_or_path", ""))
    found = re.search(r"snapshots/([0-9a-f]{40})", Path(source).as_posix())
    return found[1] if found else None


def model_card(facts: dict[str, Any], format: str, pipe: DiffusionPipeline, picture: str) -> str:
    """Return the README.md of an export, in the hub's format.

    Args:
        facts: From `student_facts`, with `verified`.
        format: The export's format.
        pipe: The pipeline, for its call's arguments.
        picture: File name of the sample grid.
    """
    from huggingface_hub import ModelCardData

    video = "num_frames" in call_parameters(pipe)
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", facts["base_model"])
    prompt = facts["examples"][0]["prompt"]
    data = ModelCardData(
        base_model=facts["base_model"] if hub_id else None,
        library_name="diffusers",
        pipeline_tag="text-to-video" if video else "text-to-image",
        tags=["direct-distillation", "few-step", *([] if format == "merged" else ["lora"])],
        base_model_relation=("finetune" if format == "merged" else "adapter") if hub_id else None,
        widget=[{"text": prompt, "output": {"url": picture}}],
    )
    name = facts["base_model"]
    steps = facts["num_inference_steps"]
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(name).name} in {steps} steps",
        f"{name}, distilled to {steps} steps with guidance {facts['cfg_scale']:g} (1 = off) by "
        "[Direct Distillation](https://github.com/lit-distill/lit-distill). Another number of "
        "steps, guidance or scheduler than it was trained with breaks it.",
        f"![undistilled pipeline and student]({picture})",
        "## Use",
        _usage(facts, format, pipe),
        "## Facts",
        _table(_rows(facts, format)),
    ]
    if facts["metrics"]:
        metrics = [(key, f"{value:.4g}") for key, value in sorted(facts["metrics"].items())]
        sections += ["## Metrics, as last measured in training", _table(metrics)]
    return "\n\n".join(sections) + "\n"


def _usage(facts: dict[str, Any], format: str, pipe: DiffusionPipeline) -> str:
    if format in ("comfyui", "kohya"):
        place = "ComfyUI/models/loras" if format == "comfyui" else "the LoRA folder of your tool"
        return (
            f"Put the .safetensors file into {place}, load it at strength 1, and draw with "
            f"{facts['num_inference_steps']} steps and cfg {facts['cfg_scale']:g}."
        )
    if format == "diffsynth":
        return "```python\npipe.load_lora(pipe.dit, 'diffsynth_lora.safetensors')  # pipe.unet\n```"
    call: dict[str, Any] = {"num_inference_steps": facts["num_inference_steps"]}
    with guidance(pipe, facts["cfg_scale"], 1, {}) as off:
        call |= off | facts["call_kwargs"]
    call |= {side: facts[side] for side in ("height", "width") if facts[side]}
    texts = [f"{name}={value!r}" for name, value in call.items()]
    texts += [f"{name}=YOUR_{name.upper()}" for name in facts["examples"][0].get("pictures", ())]
    source = "THIS_REPOSITORY" if format == "merged" else facts["base_model"]
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({source!r}, dtype=torch.bfloat16)",
    ]
    if format == "diffusers":
        lines += _load_each_step(facts, pipe) or ["pipe.load_lora_weights('THIS_REPOSITORY')"]
        texts += ["callback_on_step_end=next_lora"] if facts["lora_per_step"] else []
    if format == "peft":
        denoiser = next(iter(denoisers(pipe)))
        lines.insert(2, "from peft import PeftModel")
        lines.append(f"PeftModel.from_pretrained(pipe.{denoiser}, 'THIS_REPOSITORY')")
    if facts.get("own_scheduler") and format != "merged":
        lines.append("pipe.scheduler = type(pipe.scheduler).from_pretrained('THIS_REPOSITORY')")
    output = "frames" if "num_frames" in call_parameters(pipe) else "images"
    arguments = ", ".join([repr(facts["examples"][0]["prompt"]), *texts])
    lines.append(f"image = pipe({arguments}).{output}[0]")
    return "```python\n" + "\n".join(lines) + "\n```"


def _load_each_step(facts: dict[str, Any], pipe: DiffusionPipeline) -> list[str]:
    """Return the lines that load a LoRA for every step and switch them; none if there is but one.

    The export was verified with `lit_distill.compute.step_adapters.switch_adapter_callback`.
    """
    if not (count := facts["lora_per_step"]):
        return []
    lines = [f"for step in range(1, {count + 1}):"]
    for index, component in enumerate(denoisers(pipe)):
        file = f"step_{{step}}_{component}" if index else "step_{step}"
        place = f", load_into_{component}=True" if index else ""
        lines.append(
            f"    pipe.load_lora_weights('THIS_REPOSITORY', weight_name=f'{file}.safetensors', "
            f"adapter_name=f'step_{{step}}'{place})"
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


def _rows(facts: dict[str, Any], format: str) -> list[tuple[str, Any]]:
    lora, data, teacher = facts["lora"], facts.get("data"), facts.get("teacher") or {}
    rows = [
        ("base model", facts["base_model"]),
        ("revision", facts["base_revision"]),
        ("steps, guidance", f"{facts['num_inference_steps']}, {facts['cfg_scale']:g}"),
        ("size (height x width)", facts["height"] and f"{facts['height']}x{facts['width']}"),
        ("scheduler", facts["scheduler"] + (", own" if facts.get("own_scheduler") else "")),
        ("LoRA", lora and ", ".join(f"{name} {value}" for name, value in lora.items())),
        ("LoRAs, one a step", facts["lora_per_step"]),
        ("training data", data and f"{data['rows']} rows, {data['prompts']} prompts"),
        ("optimizer steps", facts["global_step"]),
        ("teacher", facts["teacher_model"] or teacher.get("teacher_model")),
        ("teacher's steps", teacher.get("teacher_num_inference_steps")),
        ("teacher's guidance", teacher.get("teacher_cfg_scale")),
        ("teacher's LoRA, contained in this one", facts["teacher_lora"]),
        ("format", format),
        ("loaded back by", facts["verified"]["reader"]),
        ("difference of the image drawn then", f"{facts['verified']['difference']:.1e} (relative)"),
        ("made with", f"lit_distill {facts['version']}"),
    ]
    return [(name, value) for name, value in rows if value]


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
