"""A plan as a table, and its recommendation as YAML for ``fit``."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from lit_distill.planning.cards import GIB, MARGIN
from lit_distill.planning.plan import Plan
from lit_distill.planning.planner import Memory

_COLUMNS = "".join(f"{name:>8}" for name in ("weights", "trained", "activ.", "temp.", "total"))


def render(plan: Plan) -> str:
    """Return the table of a plan, its recommendation and how long the training takes."""
    unit, size = _unit(plan)
    lines = [
        f"{plan.model}, {plan.size[0]}x{plan.size[1]}, batch size {plan.settings.batch_size}, "
        f"{plan.settings.num_inference_steps} steps",
        f"on {plan.devices} x {plan.card.name} ({plan.card.memory / GIB:.1f} GiB, "
        f"{plan.card.flops / 1e12:.0f} TFLOPS at {plan.mfu:.0%})",
        "",
        f"{f'{unit}, peak':12}{_COLUMNS}  fits",
    ]
    for stage in plan.stages:
        fits = stage.place if stage.place == "host" else _fits(plan, stage.memory)
        lines.append(f"{stage.name:12}{_sizes(stage.memory, size)}  {fits}")
    lines += ["", f"{'fit':12}{_COLUMNS}  fits{'PFLOP':>8}{'again':>6}{'s/batch':>8}"]
    for mode, step in plan.fit.items():
        cost = f"{step.flops / 1e15:8.3f}{step.recomputed:6.0%}{plan.seconds[mode]:8.2f}"
        fits = _fits(plan, step.memory) + ("*" if mode == plan.configured else "")
        lines.append(f"  {mode:10}{_sizes(step.memory, size)}  {fits:4}{cost}")
    lines += ["", *(line for note in _notes(plan) for line in textwrap.wrap(note, 79))]
    return "\n".join([*lines, "", recommendation(plan)])


def _unit(plan: Plan) -> tuple[str, int]:
    """Return the unit of the table, and its bytes: MiB if no stage needs a GiB."""
    stages = [stage.memory.total for stage in plan.stages]
    peak = max(*stages, *(step.memory.total for step in plan.fit.values()))
    return ("MiB", 2**20) if peak < GIB else ("GiB", GIB)


def _sizes(memory: Memory, unit: int) -> str:
    parts = (memory.weights, memory.trained, memory.activations, memory.temporaries, memory.total)
    return "".join(f"{part / unit:8.2f}" for part in parts)


def _fits(plan: Plan, memory: Memory) -> str:
    return "yes" if plan.fits(memory) else "no"


def _notes(plan: Plan) -> list[str]:
    chosen = ["*: model.checkpointing."] if plan.configured in plan.fit else []
    return [
        *(f"{stage.name}: {stage.note}." for stage in plan.stages),
        "trained: parameters in float32, their gradient, and the optimizer's state.",
        "again: share of the FLOPs that is recomputation.",
        f"fits: {MARGIN:.0%} of the card stay free. Not counted: the CUDA context, fragmentation, "
        "workspaces of libraries, torch.compile.",
        *chosen,
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
    unit, size = _unit(plan)
    lines = [
        f"# Recommended: {best.memory.total / size:.1f} {unit} at the peak, "
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
