"""Checks of what training recomputes and batches: by single denoiser calls, in little memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_distill.compute.activation_checkpointing import (
    BLOCKWISE_MODES,
    MODES_BY_MEMORY,
    Checkpointing,
)
from lit_distill.preflight.probe import Norms, Probe, norms_difference, relative_difference
from lit_distill.preflight.reference import blocks_recomputed
from lit_distill.preflight.report import Finding


class ModeChecks(Probe):
    """Compares checkpointing modes with a reference, and a batch with its samples.

    Attributes:
        wrong: What is wrong with modes that were tried.
        right: The modes that were tried and are right.
    """

    def __init__(self, *arguments: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments)
        self.wrong: dict[Checkpointing, str] = {}
        self.right: list[Checkpointing] = []

    def reference(self) -> tuple[Tensor, Norms]:
        """Return the latents after the first step, and the norms of the gradient through it."""
        try:
            with blocks_recomputed(self.pipe):
                return self.first_step_norms()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # blocks that can't be recomputed, or a size: one plain call
            self.small = {}
            return self.first_step_norms()

    def usable_mode(
        self, chosen: Checkpointing | Literal["auto"], reference: Norms
    ) -> Checkpointing:
        """Return the chosen mode, or what replaces it; with auto, the one of least memory.

        What replaces it recomputes no more than the chosen one, and of these needs least memory.
        """
        if chosen == "auto":
            modes = list(MODES_BY_MEMORY)
        else:
            modes = [chosen, *(m for m in MODES_BY_MEMORY if chosen == "nested" or m != "nested")]
        for mode in modes:
            if mode in self.wrong or mode in self.right:
                continue
            if problem := self._gradient_problem(mode, reference):
                self.wrong[mode] = problem
                continue
            self.right.append(mode)
            if chosen != "auto":
                break
        return next(mode for mode in modes if mode in self.right)

    def _gradient_problem(self, mode: Checkpointing, reference: Norms) -> str | None:
        """Return what is wrong with the gradient of the first step; None: nothing."""
        if mode == "none":  # nothing is recomputed
            return None
        tolerance = 1e-4 if self.is_float32 else 5e-3
        try:
            norms = self.first_step_norms(checkpointing=mode)[1]
            if norms_difference(norms, reference) > tolerance:
                # The reference recomputes too: without recomputation nothing is left to doubt.
                reference = self.first_step_norms()[1]
        except torch.OutOfMemoryError:
            if mode in ("selective", "step") and self.right:  # of several to choose from
                return "memory ran out"
            raise
        except Exception as exception:  # diffusers' checkpointing raises errors of many kinds
            return describe(exception)
        error = norms_difference(norms, reference)
        return f"another gradient, by {error:.0e}" if error > tolerance else None

    def batches_equal_singles(
        self,
        mode: Checkpointing,
        first: Tensor,
        chosen: Checkpointing | Literal["auto"],
        reference: Norms,
    ) -> tuple[Finding, Checkpointing]:
        """Compare a batch, padded and in the given mode, with its samples; return a usable mode.

        Checkpointing that loses the padding's mask changes the value, too: no gradient is needed.
        """
        check = "a batch of two equals two samples of one"
        prompts = [self.prompt, self.short]
        limit = 1e-3 if self.is_float32 else 1e-1
        try:
            with torch.no_grad():
                singles = torch.cat([first, self.first_step([self.short], first=1)])
            error = relative_difference(self._value(mode, prompts), singles)
            if error > limit and mode in BLOCKWISE_MODES:
                plain = relative_difference(self._value("none", prompts), singles)
                if plain <= limit:
                    problem = f"another result of padded prompts, by {error:.0e}"
                    self.wrong |= dict.fromkeys(BLOCKWISE_MODES, problem)
                    self.right = [m for m in self.right if m not in self.wrong]
                    mode, error = self.usable_mode(chosen, reference), plain
            if error <= limit:
                return Finding(check, "ok", f"equal up to rounding, {error:.0e}"), mode
            observed = f"prompts of different length differ by {error:.0e}"
        except torch.OutOfMemoryError:
            raise
        except Exception as exception:  # some pipelines take one prompt only
            observed = describe(exception)
        return Finding(check, "avoidable", observed, "Set model.rollout_batch_size: 1."), mode

    def _value(self, mode: Checkpointing, prompts: list[str]) -> Tensor:
        """Return the latents after the first step, as the mode computes them, without a graph."""
        parameters = [parameter for _, parameter in self.parameters]
        sharded = any(hasattr(parameter, "full_tensor") for parameter in parameters)
        if mode not in BLOCKWISE_MODES or sharded:
            with torch.no_grad():
                return self.first_step(prompts)
        for parameter in parameters:  # diffusers checkpoints only where gradients are on
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad():
                return self.first_step(prompts, checkpointing=mode)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)


def describe(error: Exception) -> str:
    """Return the type and the first words of an error, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
