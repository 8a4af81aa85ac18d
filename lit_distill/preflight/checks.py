"""Checks, before any long work, that a pipeline can be distilled.

They need only the pipeline and a prompt. They hold no more memory than the training step that they
guard: one sample in the training's own checkpointing mode, and otherwise single denoiser calls. A
problem that a setting of `DirectDistill` avoids is not an error: the report names the setting.

Denoiser calls for a student of K steps, recomputation apart:

====================================================  =====  =======================================
call                                                  count  question
====================================================  =====  =======================================
the plain ``pipe()``                                  K      what the rollout has to generate
rollout with its gradient, in the training's mode     K      does it generate that; one call a step;
                                                             is every parameter reached; do the last
                                                             steps matter
gradient of the first step, recomputed by our code    1      what checkpointing has to keep
gradient of the first step, in the training's mode    1      does checkpointing keep it
first step of the other prompt                        1      what a batch has to generate
first step of a batch of two, in the training's mode  1      does it generate that, also recomputed
====================================================  =====  =======================================

That is 12 for 4 steps. A mode that is still to be chosen (auto) adds a call for each of 3 other
modes, and a problem adds those that find what avoids it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lit_distill.adapters.inject import set_training_mode
from lit_distill.compute.activation_checkpointing import MODES_BY_MEMORY, Checkpointing
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.guidance import describe_guidance
from lit_distill.pipelines.hooks import counted_batches
from lit_distill.pipelines.release import forget_tables
from lit_distill.preflight.modes import ModeChecks, describe
from lit_distill.preflight.probe import Norms, Rollout, relative_difference
from lit_distill.preflight.report import Finding, Report, Verdict

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MIN_SHARE = 0.1
"""Smallest share of the latents' change after the first step that steps with a gradient must make.

On the embedded pipeline's published schedule the last of 4 steps makes 2%, and training through it
alone diverges. With shift_terminal null it makes 42%, and training through it is as good as through
all four: `benchmarks/grad_steps.py`.
"""


def preflight(
    pipe: DiffusionPipeline,
    *,
    prompt: str,
    num_inference_steps: int = 4,
    checkpointing: Checkpointing | Literal["auto"] = "none",
    offload: bool = False,
    grad_steps: int | None = None,
    seed: int = 0,
    **call_kwargs: Any,  # noqa: ANN401
) -> Report:
    """Check that a pipeline can be distilled, by sampling from it.

    1. The rollout ends in the latents of the plain `pipe()`.
    2. Without guidance there is one denoiser call a step.
    3. A batch of two prompts of different length equals two samples of one.
    4. The checkpointing mode does not change the gradient.
    5. Every trainable parameter gets a finite gradient.
    6. What `cfg_scale` sets is reported, and whether ``guidance_scale`` is something else.
    7. The last steps, to which `grad_steps` limits the gradient, change the latents enough.

    Args:
        pipe: The pipeline, its trainable parameters requiring gradients.
        prompt: A typical prompt.
        num_inference_steps: The student's steps: each denoiser of Wan 2.2 has only some of them.
        checkpointing: The mode that training uses; auto: all modes are checked.
        offload: Whether training stores the blocks' inputs in host memory.
        grad_steps: The last steps that the gradient goes through in training; None: all.
        seed: Seed of the noise.
        **call_kwargs: Further arguments of the pipeline's call for one sample; lists hold one
            entry. Small ``height`` and ``width`` make it quick.

    Returns:
        The report; nothing is raised, and the pipeline is not changed. If memory runs out, the
        report ends with that finding.
    """
    checks = _Checks(pipe, prompt, num_inference_steps, seed, call_kwargs)
    checks.training = {"grad_steps": grad_steps, "offload": offload}
    report = Report(type(pipe).__name__)
    if not checks.parameters:
        observed = "no parameter of the denoiser requires gradients"
        report.findings.append(Finding("something is trained", "failed", observed))
        return report
    try:
        checks.run(report, checkpointing, grad_steps)
    except torch.OutOfMemoryError:
        remedy = (
            "A training step needs at least as much: set model.checkpointing: nested, train at a "
            "smaller size, or see docs/performance.md."
        )
        report.findings.append(
            Finding("the training step fits", "failed", "memory ran out", remedy)
        )
    finally:
        for denoiser in denoisers(pipe).values():
            forget_tables(denoiser)  # of the size of single calls
    return report


class _Checks(ModeChecks):
    """The questions, in the order in which their denoiser calls can be shared."""

    training: dict[str, Any]

    def __init__(self, pipe: DiffusionPipeline, *arguments: Any) -> None:  # noqa: ANN401
        super().__init__(pipe, *arguments)
        self.modules = {
            f"{key}.{name}".rstrip("."): module
            for key, denoiser in denoisers(pipe).items()
            for name, module in denoiser.named_modules()
        }

    def run(
        self, report: Report, chosen: Checkpointing | Literal["auto"], grad_steps: int | None
    ) -> None:
        """Ask all questions; the report gets findings and settings."""
        check = "the rollout generates what pipe() generates"
        try:
            self.expected = self.plain()
            first, reference = self.reference()
        except torch.OutOfMemoryError:
            raise
        except Exception as exception:  # any error of the pipeline is reported to the user
            report.findings.append(Finding(check, "failed", describe(exception)))
            return
        mode = self.usable_mode(chosen, reference)
        batch, mode = self.batches_equal_singles(mode, first, chosen, reference)
        del first, reference
        equality: Finding | None = None

        def compare(sampled: Rollout) -> None:
            nonlocal equality
            if self.output_type == "latent" and sampled.output is not None:
                equality = self._equality(check, sampled.output)

        try:
            with counted_batches(self.pipe) as batches:
                sampled, norms = self._rollout(mode, compare)
            if equality is None:  # it returns no latents, or can't with gradients
                equality = self._equality(check, self.sample()[1])
        except torch.OutOfMemoryError:
            raise
        except Exception as exception:
            report.findings.append(Finding(check, "failed", describe(exception)))
            return
        report.findings += [equality, self._one_call_a_step(sampled, max(batches, default=1))]
        if equality.verdict == "failed":
            return  # the other checks build on it
        if batch.verdict == "avoidable":
            report.settings["rollout_batch_size"] = 1
        report.findings += [batch, self._checkpointing(chosen, mode, report)]
        report.findings.append(self.every_parameter_is_reached(mode, sampled, norms, report))
        report.findings.append(Finding("the kind of guidance", "ok", describe_guidance(self.pipe)))
        if grad_steps is not None and grad_steps <= len(sampled.changes):
            report.findings.append(self.last_steps_matter(sampled.changes, grad_steps))

    def _rollout(
        self, mode: Checkpointing, examine: Callable[[Rollout], None] | None = None
    ) -> tuple[Rollout, Norms]:
        """Return a sample and its gradient, as in a training step with one row."""
        offload = self.training["offload"] and mode in ("block", "selective")
        options = self.training | {"checkpointing": mode, "offload": offload}
        with self._record_gradientless() as self.gradientless:
            return self.rollout_norms(examine, **options)

    def _equality(self, check: str, sampled: Any) -> Finding:  # noqa: ANN401
        """Compare what a rollout returned with what the plain call did, and free the latter."""
        output, expected = torch.as_tensor(sampled).detach(), self.expected
        del self.expected
        error = relative_difference(output, expected)
        if torch.equal(output, expected):
            return Finding(check, "ok", "equal bit for bit")
        if error <= (1e-5 if self.is_float32 else 2e-2):
            return Finding(check, "ok", f"equal up to rounding, {error:.0e}")
        remedy = "Train with dropout off, and with a pipeline that repeats a seed's image."
        return Finding(check, "failed", f"two samples of a seed differ by {error:.0e}", remedy)

    def _one_call_a_step(self, sampled: Rollout, batch: int) -> Finding:
        steps = sampled.steps
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

    def _checkpointing(self, chosen: str, mode: Checkpointing, report: Report) -> Finding:
        check = "checkpointing keeps the gradient"
        report.keep_gradient = right = tuple(m for m in MODES_BY_MEMORY if m in self.right)
        errors = [f"{wrong}: {error}" for wrong, error in self.wrong.items()]
        observed = "; ".join([f"fine: {', '.join(right)}", *errors])
        if chosen not in self.wrong:
            return Finding(check, "ok", observed)
        report.settings["checkpointing"] = mode
        return Finding(check, "avoidable", observed, f"Set model.checkpointing: {mode}.")

    def every_parameter_is_reached(
        self, mode: Checkpointing, sampled: Rollout, gradient: Norms, report: Report
    ) -> Finding:
        check = "every trained parameter gets a gradient"
        names, settings = [name for name, _ in self.parameters], report.settings
        gradientless = self.gradientless
        inner = bool(gradientless) and all("." in name for name in gradientless)
        avoided = self._training_mode(mode, gradientless, sampled) if inner else None
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

    def last_steps_matter(self, changes: list[Tensor], grad_steps: int) -> Finding:
        check = "the steps with a gradient make enough of the image"
        norms = torch.stack(changes)
        # The first step's change is unknown without the noise: the share may be overestimated.
        share = (norms[len(norms) - grad_steps :].sum() / norms.sum().clamp(min=1e-30)).item()
        last = f"the last {grad_steps} of {len(norms) + 1}"
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
        """Note the outermost modules with weights that only ever run without gradients.

        The names are in the list once the context is left.
        """
        ran: dict[str, bool] = {}  # with gradients at least once, by name, in order
        names: list[str] = []
        with ExitStack() as stack:
            for name, module in self.modules.items():

                def record(module: nn.Module, args: Any, name: str = name) -> None:  # noqa: ANN401
                    ran[name] = ran.get(name, False) or torch.is_grad_enabled()

                if any(True for _ in module.parameters()):
                    stack.enter_context(module.register_forward_pre_hook(record))
            yield names
        for name, with_gradients in ran.items():
            if not with_gradients and not any(name.startswith(f"{outer}.") for outer in names):
                names.append(name)

    def _training_mode(
        self, mode: Checkpointing, gradientless: list[str], sampled: Rollout
    ) -> tuple[list[str], Norms] | None:
        """Return modules that pass the gradient in training mode, and the gradient then.

        None, if the gradient still does not pass, or the samples change.
        """
        owners = {self._owner(name): None for name in gradientless}
        if not all("." in owner for owner in owners):
            return None  # a whole denoiser
        patterns = _patterns(list(owners), set(self.modules) - set(owners))
        set_training_mode(self.pipe, patterns)
        try:
            trained, gradient = self._rollout(mode)
            error = relative_difference(trained.latents, sampled.latents)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # its training mode does something else
            return None
        finally:
            set_training_mode(self.pipe, patterns, training=False)
        works = not self.gradientless and error <= (1e-5 if self.is_float32 else 2e-2)
        return (patterns, gradient) if works else None

    def _owner(self, name: str) -> str:
        """Return the nearest parent of a module that is not just a list of modules."""
        parent = name.rpartition(".")[0]
        lists = (nn.ModuleList, nn.ModuleDict)
        return self._owner(parent) if isinstance(self.modules[parent], lists) else parent


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
