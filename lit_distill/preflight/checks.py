"""Checks, before any long work, that a pipeline can be distilled.

They need only the pipeline and a prompt, and take a few samples of a few steps. A problem that a
setting of `DirectDistill` avoids is not an error: the report names the setting.
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
from lit_distill.preflight.probe import Probe, norms_difference, relative_difference

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


MIN_SHARE = 0.1
"""Smallest share of the latents' change after the first step that steps with a gradient must make.

On the embedded pipeline's published schedule the last of 4 steps makes 2%, and training through it
alone diverges. With shift_terminal null it makes 42%, and training through it is as good as through
all four: `benchmarks/grad_steps.py`.
"""


Verdict = Literal["ok", "avoidable", "failed"]


class PreflightError(RuntimeError):
    """The pipeline failed a check; the message names check, observation and remedy."""


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        check: What should hold.
        verdict: ``"ok"``, ``"avoidable"`` by the setting in `remedy`, or ``"failed"``.
        observed: What was observed.
        remedy: What to do about it.
    """

    check: str
    verdict: Verdict
    observed: str
    remedy: str = ""


@dataclass
class Report:
    """The results of all checks.

    Attributes:
        pipeline: Name of the pipeline's class.
        findings: One entry for each check.
        settings: Arguments of `DirectDistill` that avoid the avoidable: ``checkpointing``,
            ``freeze``, ``train_mode``, ``rollout_batch_size``.
        keep_gradient: Checkpointing modes that do not change the gradient.
    """

    pipeline: str
    findings: list[Finding] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    keep_gradient: tuple[Checkpointing, ...] = MODES_BY_MEMORY

    def raise_failures(self) -> None:
        """Raise an error if any check failed that no setting avoids.

        Raises:
            PreflightError: Naming every failed check, what was observed and what to do.
        """
        failed = [finding for finding in self.findings if finding.verdict == "failed"]
        if failed:
            lines = [f"{self.pipeline} did not pass preflight:"]
            lines += [f"  {f.check}: {f.observed}. {f.remedy}".rstrip() for f in failed]
            raise PreflightError("\n".join(lines))

    def __str__(self) -> str:
        lines = [f"{self.pipeline}:"]
        for finding in self.findings:
            lines.append(f"  {finding.verdict:9}  {finding.check}: {finding.observed}")
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
    """Check that a pipeline can be distilled, by sampling from it.

    1. The rollout ends in the latents of the plain `pipe()`.
    2. Without guidance there is one denoiser call a step.
    3. A batch of two prompts of different length equals two samples of one.
    4. No checkpointing mode changes the gradient.
    5. Every trainable parameter gets a finite gradient.
    6. What `cfg_scale` sets is reported, and whether ``guidance_scale`` is something else.
    7. The last steps, to which `grad_steps` limits the gradient, change the latents enough.

    Args:
        pipe: The pipeline, its trainable parameters requiring gradients.
        prompt: A typical prompt.
        num_inference_steps: The student's steps: each denoiser of Wan 2.2 has only some of them.
        checkpointing: The mode that training uses; auto: any that does not change the gradient.
        grad_steps: The last steps that the gradient goes through in training; None: all.
        seed: Seed of the noise.
        **call_kwargs: Further arguments of the pipeline's call for one sample; lists hold one
            entry. Small ``height`` and ``width`` make it quick.

    Returns:
        The report; nothing is raised, and the pipeline is not changed.
    """
    checks = _Checks(pipe, prompt, num_inference_steps, seed, call_kwargs)
    report = Report(type(pipe).__name__)
    report.findings += checks.rollout_equals_pipeline()
    if report.findings[0].verdict == "failed":
        return report  # the other checks build on it
    if not any(parameter.requires_grad for _, parameter in checks.parameters):
        observed = "no parameter of the denoiser requires gradients"
        report.findings.append(Finding("something is trained", "failed", observed))
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

    def rollout_equals_pipeline(self) -> list[Finding]:
        check = "the rollout generates what pipe() generates"
        try:
            expected = self.plain()
            with counted_batches(self.pipe) as batches:
                steps, latents = self.sample()
                latents = torch.as_tensor(latents)
        except Exception as exception:  # any error of the pipeline is reported to the user
            return [Finding(check, "failed", _describe(exception))]
        error = relative_difference(latents, expected)
        if torch.equal(latents, expected):
            equality = Finding(check, "ok", "equal bit for bit")
        elif error <= (1e-5 if self.is_float32 else 2e-2):
            equality = Finding(check, "ok", f"equal up to rounding, {error:.0e}")
        else:
            remedy = "Train with dropout off, and with a pipeline that repeats a seed's image."
            observed = f"two samples of a seed differ by {error:.0e}"
            equality = Finding(check, "failed", observed, remedy)
        return [equality, self._one_call_a_step(steps, max(batches, default=1))]

    def _one_call_a_step(self, steps: LoopState, batch: int) -> Finding:
        check = "without guidance one denoiser call a step"
        observed = f"{steps.calls} calls in {steps.done} steps"
        observed += f", each for {batch} samples instead of one" if batch > 1 else ""
        if steps.calls <= steps.done and batch == 1:
            return Finding(check, "ok", observed)
        remedy = (
            "Switch off its other kinds of guidance in model.call_kwargs, or add a line to "
            "lit_distill.pipelines.guidance.FAMILIES."
        )
        return Finding(check, "failed", observed, remedy)

    def checkpointing_keeps_the_gradient(self, chosen: str, report: Report) -> Finding:
        check = "checkpointing keeps the gradient"
        # A padded prompt, because Chroma's checkpointing loses the padding's mask. Two steps detect
        # it, and limit what mode "none" stores.
        settings = report.settings
        prompts = [self.short] if "rollout_batch_size" in settings else [self.prompt, self.short]
        expected = self.gradient_norms("none", 2, prompts)
        wrong: dict[Checkpointing, str] = {}
        for mode in MODES_BY_MEMORY[:-1]:
            try:
                norms = self.gradient_norms(mode, 2, prompts)
            except Exception as exception:  # diffusers' checkpointing raises errors of many kinds
                wrong[mode] = _describe(exception)
                continue
            if (error := norms_difference(norms, expected)) > (1e-4 if self.is_float32 else 5e-3):
                wrong[mode] = f"another gradient, by {error:.0e}"
        report.keep_gradient = right = tuple(mode for mode in MODES_BY_MEMORY if mode not in wrong)
        errors = [f"{mode}: {error}" for mode, error in wrong.items()]
        observed = "; ".join([f"fine: {', '.join(right)}", *errors])
        if chosen not in wrong:
            return Finding(check, "ok", observed)
        # The mode with the least memory that recomputes no more than the chosen one.
        settings["checkpointing"] = next(m for m in right if chosen == "nested" or m != "nested")
        remedy = f"Set model.checkpointing: {settings['checkpointing']}."
        return Finding(check, "avoidable", observed, remedy)

    def every_parameter_is_reached(self, mode: Checkpointing, settings: dict[str, Any]) -> Finding:
        check = "every trained parameter gets a gradient"
        names = [name for name, _ in self.parameters]
        with self._record_gradientless() as gradientless:
            gradient = self.gradient_norms(mode)
        inner = bool(gradientless) and all("." in name for name in gradientless)
        avoided = self._training_mode(mode, gradientless) if inner else None
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
            observed = f"that of {bad[0]} and {len(bad) - 1} others is not finite"
            return Finding(check, "failed", observed, "Try torch_dtype bfloat16 or float32.")
        if len(dead) == len(names):
            return Finding(check, "failed", "none does", "Does the pipeline use what is trained?")
        observed = f"{len(names) - len(dead)} of {len(names)} do"
        if gradientless:
            others = len(gradientless) - 1
            observed += f"; none passes through {gradientless[0]} and {others} other modules"
            observed += "" if avoided is None else " in evaluation mode"
        verdict: Verdict = "avoidable" if dead or gradientless else "ok"
        return Finding(check, verdict, observed, " ".join(remedies))

    def last_steps_matter(self, grad_steps: int) -> Finding:
        check = "the steps with a gradient make enough of the image"
        states: list[Tensor] = []

        def record(steps: LoopState, latents: Tensor) -> Tensor:
            states.append(latents.float())
            return latents

        with observed_scheduler(self.pipe, record):
            self.plain()
        changes = [(after - before).norm().item() for before, after in pairwise(states)]
        # The first step's change is unknown without the noise: the share may be overestimated.
        share = sum(changes[len(changes) - grad_steps :]) / max(sum(changes), 1e-30)
        last = f"the last {grad_steps} of {len(states)}"
        observed = f"{last} make {share:.0%} of the change after the first"
        if share >= MIN_SHARE:
            return Finding(check, "ok", observed)
        remedy = (
            "The student could match the teacher only by extreme predictions, and diverges; set "
            f"model.grad_steps: {grad_steps + 1}, or a schedule that ends with larger steps, such "
            "as model.scheduler: {shift_terminal: null}."
        )
        return Finding(check, "failed", observed, remedy)

    @contextmanager
    def _record_gradientless(self) -> Iterator[list[str]]:
        """Yield the names of the outermost modules with weights that run without gradients."""
        names: list[str] = []
        with ExitStack() as stack:
            for name, module in self.modules.items():

                def record(module: nn.Module, args: Any, name: str = name) -> None:  # noqa: ANN401
                    inner = any(name.startswith(f"{outer}.") for outer in names)
                    if not torch.is_grad_enabled() and not inner and name not in names:
                        names.append(name)

                if any(True for _ in module.parameters()):
                    stack.enter_context(module.register_forward_pre_hook(record))
            yield names

    def _training_mode(
        self, mode: Checkpointing, gradientless: list[str]
    ) -> tuple[list[str], list[Tensor | None]] | None:
        """Return modules that pass the gradient in training mode, and the gradient then.

        None, if the gradient still does not pass, or the samples change.
        """
        owners = {self._owner(name): None for name in gradientless}
        patterns = _patterns(list(owners), set(self.modules) - set(owners))
        expected = self.sample()[0].latents
        set_training_mode(self.pipe, patterns)
        try:
            with self._record_gradientless() as remaining:
                gradient = self.gradient_norms(mode)
            error = relative_difference(self.sample()[0].latents, expected)
        except Exception:  # its training mode does something else
            return None
        finally:
            set_training_mode(self.pipe, patterns, training=False)
        works = not remaining and error <= (1e-5 if self.is_float32 else 2e-2)
        return (patterns, gradient) if works else None

    def _owner(self, name: str) -> str:
        """Return the nearest parent of a module that is not just a list of modules."""
        parent = name.rpartition(".")[0]
        lists = (nn.ModuleList, nn.ModuleDict)
        return self._owner(parent) if isinstance(self.modules[parent], lists) else parent

    def batches_equal_singles(self, settings: dict[str, Any]) -> Finding:
        check = "a batch of two equals two samples of one"
        prompts = [self.prompt, self.short]
        try:
            both = self.sample(prompts)[0].latents
            singles = [self.sample([p], first=i)[0].latents for i, p in enumerate(prompts)]
            error = relative_difference(both, torch.cat(singles))
            if error <= (1e-3 if self.is_float32 else 1e-1):
                return Finding(check, "ok", f"equal up to rounding, {error:.0e}")
            observed = f"prompts of different length differ by {error:.0e}"
        except Exception as exception:  # some pipelines take one prompt only
            observed = _describe(exception)
        settings["rollout_batch_size"] = 1
        return Finding(check, "avoidable", observed, "Set model.rollout_batch_size: 1.")


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _patterns(names: list[str], others: set[str]) -> list[str]:
    """Return short patterns that match the names and none of the others."""
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
