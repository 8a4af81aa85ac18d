"""Checks, before any long work, that a pipeline can be distilled the way this package does it.

They need nothing but the pipeline and a prompt, and take a few draws of a few steps. What can be
avoided by a setting of `DirectDistill` is not an error: the report names the setting.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_distill.adapters.inject import set_training_mode
from lit_distill.compute.activation_checkpointing import MODES_BY_MEMORY, Checkpointing
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.guidance import describe_guidance
from lit_distill.pipelines.hooks import LoopState, counted_batches, observed_scheduler
from lit_distill.preflight.probe import Probe, difference, norms_difference

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


LEAST_SHARE = 0.1
"""Of the way that the latents go after the first step, by the steps that have a gradient.

On the embedded pipeline the last of 4 steps, which makes 2% as published, diverges; where it makes
42% (shift_terminal null) it trains as well as all four: `benchmarks/grad_steps.py`.
"""


class PreflightError(RuntimeError):
    """The pipeline failed a check; the message names it, what was seen and the remedy."""


class Finding(NamedTuple):
    """What one check saw.

    Attributes:
        check: What is to hold.
        verdict: ``"ok"``, ``"avoidable"`` by the setting in `remedy`, or ``"failed"``.
        seen: What was found.
        remedy: What to do about it.
    """

    check: str
    verdict: Literal["ok", "avoidable", "failed"]
    seen: str
    remedy: str = ""


@dataclass
class Report:
    """What all checks saw.

    Attributes:
        pipeline: Name of the pipeline's class.
        findings: One entry a check.
        settings: Arguments of `DirectDistill` that avoid what is avoidable: ``checkpointing``,
            ``freeze``, ``rollout_batch_size``.
        keep_gradient: Checkpointing modes that leave the gradient as it is.
    """

    pipeline: str
    findings: list[Finding] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    keep_gradient: tuple[Checkpointing, ...] = MODES_BY_MEMORY

    def raise_failures(self) -> None:
        """Raise what can't be avoided.

        Raises:
            PreflightError: Naming every failed check, what was seen and what to do.
        """
        failed = [finding for finding in self.findings if finding.verdict == "failed"]
        if failed:
            lines = [f"{self.pipeline} did not pass preflight:"]
            lines += [f"  {f.check}: {f.seen}. {f.remedy}".rstrip() for f in failed]
            raise PreflightError("\n".join(lines))

    def __str__(self) -> str:
        lines = [f"{self.pipeline}:"]
        for finding in self.findings:
            lines.append(f"  {finding.verdict:9}  {finding.check}: {finding.seen}")
            if finding.remedy:
                lines.append(f"{'':13}{finding.remedy}")
        return "\n".join(lines)


def preflight(
    pipe: DiffusionPipeline,
    *,
    prompt: str,
    num_inference_steps: int = 4,
    checkpointing: Checkpointing | Literal["auto"] = "none",
    grad_steps: int | None = None,
    seed: int = 0,
    **call_kwargs: Any,  # noqa: ANN401
) -> Report:
    """Check that a pipeline can be distilled, by drawing from it.

    1. The rollout ends in the latents of the plain `pipe()`.
    2. Without guidance there is one denoiser call a step.
    3. A batch of two prompts of different length equals two draws of one.
    4. Checkpointing leaves the gradient as it is, each mode by itself.
    5. Every trainable parameter gets a gradient, and a finite one.
    6. What `cfg_scale` sets is reported, and whether ``guidance_scale`` means something else.
    7. The last steps that `grad_steps` leaves to the gradient change the latents enough.

    Args:
        pipe: The pipeline, its trainable parameters requiring gradients.
        prompt: A typical prompt.
        num_inference_steps: The student's steps: a denoiser of Wan 2.2 may only see some of them.
        checkpointing: The mode that is going to be used; auto: any that leaves the gradient.
        grad_steps: The last steps that the gradient is going to go through; None: all.
        seed: Seed of the noise.
        **call_kwargs: Further arguments of the pipeline's call for one sample; lists hold one
            entry. Small ``height`` and ``width`` make it quick.

    Returns:
        The report; nothing is raised and nothing of the pipeline changed.
    """
    checks = _Checks(pipe, prompt, num_inference_steps, seed, call_kwargs)
    report = Report(type(pipe).__name__)
    report.findings += checks.draws_what_the_pipeline_draws()
    if report.findings[0].verdict == "failed":
        return report  # whatever else is seen follows from that
    if not any(parameter.requires_grad for _, parameter in checks.parameters):
        nothing = "no parameter of the denoiser requires gradients"
        report.findings.append(Finding("something is trained", "failed", nothing))
        return report
    report.findings.append(checks.batches_equal_singles(report.settings))
    report.findings.append(checks.checkpointing_keeps_the_gradient(checkpointing, report))
    usable = report.settings.get("checkpointing", checkpointing)
    mode = report.keep_gradient[0] if usable == "auto" else usable
    report.findings.append(checks.every_parameter_is_reached(mode, report.settings))
    report.findings.append(Finding("the kind of guidance", "ok", describe_guidance(pipe)))
    if grad_steps is not None and grad_steps < num_inference_steps:
        report.findings.append(checks.last_steps_matter(grad_steps))
    return report


class _Checks(Probe):
    def __init__(self, pipe: DiffusionPipeline, *arguments: Any) -> None:  # noqa: ANN401
        super().__init__(pipe, *arguments)
        self.modules = {
            f"{key}.{name}".rstrip("."): module
            for key, denoiser in denoisers(pipe).items()
            for name, module in denoiser.named_modules()
        }

    def draws_what_the_pipeline_draws(self) -> list[Finding]:
        check = "the rollout draws what pipe() draws"
        try:
            expected = self.plain()
            with counted_batches(self.pipe) as batches:
                steps, found = self.sample()
                found = torch.as_tensor(found)
        except Exception as error:  # whatever the pipeline throws is what the user has to see
            return [Finding(check, "failed", _described(error))]
        if torch.equal(found, expected):
            equality = Finding(check, "ok", "equal bit for bit")
        elif (apart := difference(found, expected)) <= (1e-5 if self.single else 2e-2):
            equality = Finding(check, "ok", f"equal up to rounding, {apart:.0e}")
        else:
            remedy = "Train with dropout off, and with a pipeline that repeats a seed's image."
            equality = Finding(
                check, "failed", f"two draws of a seed differ by {apart:.0e}", remedy
            )
        return [equality, self._one_call_a_step(steps, max(batches, default=1))]

    def _one_call_a_step(self, steps: LoopState, batch: int) -> Finding:
        check = "without guidance one denoiser call a step"
        seen = f"{steps.calls} calls in {steps.done} steps"
        seen += f", each for {batch} samples instead of one" if batch > 1 else ""
        if steps.calls <= steps.done and batch == 1:
            return Finding(check, "ok", seen)
        remedy = (
            "Switch off its other kinds of guidance in model.call_kwargs, or add a line to "
            "lit_distill.pipelines.guidance.FAMILIES."
        )
        return Finding(check, "failed", seen, remedy)

    def checkpointing_keeps_the_gradient(self, chosen: str, report: Report) -> Finding:
        check = "checkpointing keeps the gradient"
        # A padded prompt, for Chroma's checkpointing loses the padding's mask; two steps are enough
        # to see it, and bound what "none" stores.
        settings = report.settings
        batched = "rollout_batch_size" not in settings
        prompts = [self.prompt, self.short] if batched else [self.short]
        expected = self.gradient_norms("none", 2, prompts)
        wrong: dict[Checkpointing, str] = {}
        for mode in MODES_BY_MEMORY[:-1]:
            try:
                found = self.gradient_norms(mode, 2, prompts)
            except Exception as error:  # diffusers' own checkpointing fails in many ways
                wrong[mode] = _described(error)
                continue
            if (apart := norms_difference(found, expected)) > (1e-4 if self.single else 5e-3):
                wrong[mode] = f"another gradient, by {apart:.0e}"
        agree = tuple(mode for mode in MODES_BY_MEMORY if mode not in wrong)
        report.keep_gradient = agree
        seen = "; ".join([f"fine: {', '.join(agree)}", *(f"{m}: {w}" for m, w in wrong.items())])
        if chosen not in wrong:
            return Finding(check, "ok", seen)
        # The thriftiest of those that recompute no more than the chosen one does.
        settings["checkpointing"] = next(m for m in agree if chosen == "nested" or m != "nested")
        remedy = f"Set model.checkpointing: {settings['checkpointing']}."
        return Finding(check, "avoidable", seen, remedy)

    def every_parameter_is_reached(self, mode: Checkpointing, settings: dict[str, Any]) -> Finding:
        check = "every trained parameter gets a gradient"
        names = [name for name, _ in self.parameters]
        with self._watched() as blind:
            gradient = self.gradient_norms(mode)
        inner = bool(blind) and all("." in name for name in blind)
        avoided = self._training_mode(mode, blind) if inner else None
        remedies = []
        if avoided is not None:
            settings["train_mode"], gradient = avoided
            remedies.append(f"Set model.train_mode: {settings['train_mode']}.")
        dead = [name for name, norm in zip(names, gradient, strict=True) if norm is None]
        if dead:
            settings["freeze"] = _patterns(dead, set(names) - set(dead))
            remedies.append(f"Set model.freeze: {settings['freeze']}.")
        norms = zip(names, gradient, strict=True)
        if bad := [name for name, norm in norms if norm is not None and not norm.isfinite()]:
            seen = f"that of {bad[0]} and {len(bad) - 1} others is not finite"
            return Finding(check, "failed", seen, "Try torch_dtype bfloat16 or float32.")
        if len(dead) == len(names):
            return Finding(check, "failed", "none does", "Is what is trained used at all?")
        seen = f"{len(names) - len(dead)} of {len(names)} do"
        if blind:
            seen += f"; none passes through {blind[0]} and {len(blind) - 1} other modules"
            seen += "" if avoided is None else " in evaluation mode"
        return Finding(check, "avoidable" if dead or blind else "ok", seen, " ".join(remedies))

    def last_steps_matter(self, grad_steps: int) -> Finding:
        check = "the steps with a gradient make enough of the image"
        path: list[Tensor] = []

        def note(steps: LoopState, latents: Tensor) -> Tensor:
            path.append(latents.float())
            return latents

        with observed_scheduler(self.pipe, note):
            self.plain()
        moved = [(after - before).norm().item() for before, after in pairwise(path)]
        # The first step's share is not known without the noise; the others are compared with all
        # that comes after it, which can only flatter them.
        share = sum(moved[len(moved) - grad_steps :]) / max(sum(moved), 1e-30)
        seen = f"the last {grad_steps} of {len(path)} make {share:.0%} of the way after the first"
        if share >= LEAST_SHARE:
            return Finding(check, "ok", seen)
        remedy = (
            f"The student could only follow by extreme predictions, and diverges; set "
            f"model.grad_steps: {grad_steps + 1}, or a schedule that ends with larger steps, such "
            "as model.scheduler: {shift_terminal: null}."
        )
        return Finding(check, "failed", seen, remedy)

    @contextmanager
    def _watched(self) -> Iterator[list[str]]:
        """Note the outermost modules with weights that compute while no graph is recorded."""
        blind: list[str] = []
        with ExitStack() as stack:
            for name, module in self.modules.items():

                def note(module: nn.Module, args: Any, name: str = name) -> None:  # noqa: ANN401
                    inner = any(name.startswith(f"{outer}.") for outer in blind)
                    if not torch.is_grad_enabled() and not inner and name not in blind:
                        blind.append(name)

                if any(True for _ in module.parameters()):
                    stack.enter_context(module.register_forward_pre_hook(note))
            yield blind

    def _training_mode(
        self, mode: Checkpointing, blind: list[str]
    ) -> tuple[list[str], list[Tensor | None]] | None:
        """Return modules whose training mode lets the gradient through, and the gradient then.

        None, if the gradient still does not pass, or something else changes.
        """
        owners = {self._owner(name): None for name in blind}
        patterns = _patterns(list(owners), set(self.modules) - set(owners))
        expected = self.sample()[0].latents
        set_training_mode(self.pipe, patterns)
        try:
            with self._watched() as still:
                gradient = self.gradient_norms(mode)
            apart = difference(self.sample()[0].latents, expected)
        except Exception:  # its training mode is not made for this
            return None
        finally:
            set_training_mode(self.pipe, patterns, training=False)
        fits = not still and apart <= (1e-5 if self.single else 2e-2)
        return (patterns, gradient) if fits else None

    def _owner(self, name: str) -> str:
        """Return the nearest module around one that is called itself: not a list of modules."""
        parent = name.rpartition(".")[0]
        lists = (nn.ModuleList, nn.ModuleDict)
        return self._owner(parent) if isinstance(self.modules[parent], lists) else parent

    def batches_equal_singles(self, settings: dict[str, Any]) -> Finding:
        check = "a batch of two equals two draws of one"
        prompts = [self.prompt, self.short]
        try:
            both = self.sample(prompts)[0].latents
            singles = [self.sample([p], first=i)[0].latents for i, p in enumerate(prompts)]
            apart = difference(both, torch.cat(singles))
            if apart <= (1e-3 if self.single else 1e-1):
                return Finding(check, "ok", f"equal up to rounding, {apart:.0e}")
            seen = f"prompts of different length differ by {apart:.0e}"
        except Exception as error:  # some pipelines take one prompt only
            seen = _described(error)
        settings["rollout_batch_size"] = 1
        return Finding(check, "avoidable", seen, "Set model.rollout_batch_size: 1.")


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _patterns(names: list[str], others: set[str]) -> list[str]:
    """Return short patterns that fit the names and none of the others."""
    patterns: dict[str, None] = {}  # in order
    for name in names:
        parts = name.split(".")
        prefixes = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
        free = (p for p in prefixes if not any(other.startswith(p) for other in others))
        prefix = next(free, None)
        exact = name if prefix is None else prefix + "*"
        every = re.sub(r"\.\d+(?=\.)", ".*", exact)  # of all blocks at once
        patterns[exact if fnmatch.filter(others, every) else every] = None
    return list(patterns)
