"""A plan as a table, and its recommendation as YAML for ``fit``."""

from __future__ import annotations

from typing import Any

import yaml

from lit_distill.planning.cards import GIB, MARGIN
from lit_distill.planning.plan import Plan
from lit_distill.planning.planner import Memory

_COLUMNS = ("weights", "trained", "activ.", "temp.", "total")


def render(plan: Plan) -> str:
    """Return the table of a plan, its recommendation and how long the training takes."""
    lines = [
        f"{plan.model}, {plan.size[0]}x{plan.size[1]}, batch size {plan.settings.batch_size}, "
        f"{plan.settings.num_inference_steps} steps, on {plan.devices} x {plan.card.name} "
        f"({plan.card.memory / GIB:.1f} GiB, {plan.card.flops / 1e12:.0f} TFLOPS at "
        f"{plan.mfu:.0%})",
        "",
        f"{'GiB at the peak':24}" + "".join(f"{name:>9}" for name in _COLUMNS),
    ]
    for stage in plan.stages:
        fits = stage.place if stage.place == "host" else _fits(plan, stage.memory)
        lines.append(f"{stage.name:24}{_sizes(stage.memory)}  {fits:14}{stage.note}")
    head = f"{'PFLOP':>8}{'again':>7}{'s/batch':>9}"
    lines += ["", f"{'fit, checkpointing':24}" + "".join(f"{n:>9}" for n in _COLUMNS) + head]
    for mode, step in plan.fit.items():
        cost = f"{step.flops / 1e15:8.3f}{step.recomputed:7.0%}{plan.seconds[mode]:9.2f}"
        chosen = " <- model.checkpointing" if mode == plan.configured else ""
        lines.append(f"  {mode:22}{_sizes(step.memory)}{cost}  {_fits(plan, step.memory)}{chosen}")
    lines += ["", *_notes(plan), "", recommendation(plan)]
    return "\n".join(lines)


def _sizes(memory: Memory) -> str:
    parts = (memory.weights, memory.trained, memory.activations, memory.temporaries, memory.total)
    return "".join(f"{part / GIB:9.2f}" for part in parts)


def _fits(plan: Plan, memory: Memory) -> str:
    return "fits" if plan.fits(memory) else "does not fit"


def _notes(plan: Plan) -> list[str]:
    return [
        "trained: parameters in float32, their gradient, and the optimizer's state. again: share "
        "of the FLOPs that is recomputation.",
        f"A stage fits if it leaves {MARGIN:.0%} of the card free. Not counted: the CUDA context, "
        "fragmentation, workspaces of libraries, torch.compile.",
    ]


def recommendation(plan: Plan) -> str:
    """Return the recommendation: YAML that ``fit`` takes, with comments."""
    best = plan.recommended
    if best is None:
        least = min(plan.fit.values(), key=lambda step: step.memory.total)
        remedies = "a smaller size or batch, or model.grad_steps"
        if plan.settings.lora is not None and not plan.settings.quantization:
            remedies = f"model.quantization, {remedies}"
        return (
            f"# No mode fits {plan.card.name}: {least.mode} needs {least.memory.total / GIB:.1f} "
            f"of {plan.usable / GIB:.1f} GiB.\n# Try {remedies}, or trainer.strategy fsdp2 on "
            "several cards."
        )
    lines = [
        f"# Recommended: {best.memory.total / GIB:.1f} GiB at the peak, "
        f"{plan.seconds[best.mode]:.2f} s a batch.",
        _duration(plan, best.mode),
        *(
            f"# {stage.name} does not fit: {stage.memory.total / GIB:.1f} GiB."
            for stage in plan.stages
            if stage.place == "device" and not plan.fits(stage.memory)
        ),
        yaml.safe_dump(_changes(plan, best.mode), sort_keys=False).rstrip(),
    ]
    return "\n".join(line for line in lines if line)


def _changes(plan: Plan, mode: str) -> dict[str, Any]:
    return {"model": {"checkpointing": mode}, "data": {"batch_size": plan.settings.batch_size}}


def _duration(plan: Plan, mode: str) -> str:
    hours = plan.hours(mode)
    if hours is None:
        per = plan.seconds[mode] * plan.settings.accumulate * 1000 / 3600
        return (
            f"# 1,000 optimizer steps take {per:.1f} hours; data.metadata_path does not exist yet."
        )
    return (
        f"# {plan.run.optimizer_steps:,} optimizer steps take {hours:.1f} hours, validation apart."
    )
