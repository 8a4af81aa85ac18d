"""Small samples of a pipeline, which predict how larger ones behave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.adapters.inject import trained_parameters
from lit_distill.compute.activation_checkpointing import Checkpointing
from lit_distill.compute.sharding import full_tensor
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.guidance import guidance
from lit_distill.pipelines.hooks import LoopState, no_progress_bar
from lit_distill.pipelines.rollout import run_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


Norms = list[Tensor | None]


class Rollout(NamedTuple):
    """A whole sample.

    Attributes:
        latents: Final latents.
        changes: Norm of the change of the latents by every step after the first.
        steps: The finished loop.
        output: What the pipeline returned; None if it could not return latents.
    """

    latents: Tensor
    changes: list[Tensor]
    steps: LoopState
    output: Any


class _FirstStepDone(Exception):  # noqa: N818
    """Stops a pipeline after its first step."""


def preflight_size(height: int, width: int, edge: int = 512) -> tuple[int, int]:
    """Return a size of about the same shape with no side above `edge`, in multiples of 64 pixels.

    The checks find at this size what they would find at the full size, in a fraction of the time.
    """
    longest = max(height, width)
    if longest <= edge:
        return height, width
    return tuple(max(64, round(side * edge / longest / 64) * 64) for side in (height, width))  # type: ignore[return-value]


def half_size(call_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return height and width of half the size of a call, in multiples of 64 pixels.

    Two samples of it need no more memory than one of the call. Empty if there is none.
    """
    height, width = (call_kwargs.get(side) or 0 for side in ("height", "width"))
    if min(height, width) < 128:
        return {}
    size = preflight_size(height, width, edge=max(height, width) // 2)
    return dict(zip(("height", "width"), size, strict=True))


def other_prompt(prompt: str) -> str:
    """Return a prompt of another length, to be sampled beside `prompt`."""
    words = prompt.split()
    return words[0] if words and words[0] != prompt else "a cat, sleeping"


def trial_arguments(
    prompts: Sequence[str],
    *,
    seed: int = 0,
    **call_kwargs: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Return the arguments of a call for `prompts`, given those for one sample."""
    count = len(prompts)
    return {
        "prompt": list(prompts),
        "generator": [torch.Generator().manual_seed(seed + index) for index in range(count)],
        **{k: v * count if isinstance(v, list) else v for k, v in call_kwargs.items()},
    }


class Probe:
    """Samples of one prompt or two, without guidance, and their gradients.

    Args:
        pipe: The pipeline, its trainable parameters requiring gradients.
        prompt: A typical prompt.
        num_inference_steps: Steps of a sample.
        seed: Seed of the noise.
        call_kwargs: Further arguments of the pipeline's call for one sample.

    Attributes:
        short: A prompt of another length.
        is_float32: Whether the arithmetic is float32.
        parameters: The trainable parameters, with their names.
        small: Height and width of samples that are stopped after a step; empty: as all samples.
        output_type: What the pipeline returns if nothing is trained: ``"latent"`` if it can.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompt: str,
        num_inference_steps: int,
        seed: int,
        call_kwargs: dict[str, Any],
    ) -> None:
        self.pipe = pipe
        self.output_type = "latent"
        self.prompt = prompt
        self.short = other_prompt(prompt)
        self.num_inference_steps = num_inference_steps
        self.seed = seed
        self.is_float32 = all(d.dtype == torch.float32 for d in denoisers(pipe).values())
        self.call_kwargs = call_kwargs
        self.small = half_size(call_kwargs)
        self.parameters = list(trained_parameters(pipe).items())

    def arguments(self, prompts: Sequence[str] = (), first: int = 0) -> dict[str, Any]:
        """Return the arguments of the pipeline's call; `first` is added to the seed."""
        return trial_arguments(
            prompts or [self.prompt],
            seed=self.seed + first,
            num_inference_steps=self.num_inference_steps,
            output_type=self.output_type,
            **self.call_kwargs,
        )

    def plain(self) -> Any:  # noqa: ANN401
        """Return the output of the plain `pipe()`: latents if it can return these, else images."""
        try:
            with no_progress_bar(self.pipe), guidance(self.pipe, 1.0, 1, self.call_kwargs) as given:
                output = self.pipe(**self.arguments(), **given, return_dict=False)[0]
        except ValueError:
            if self.output_type == "np":
                raise
            self.output_type = "np"
            return self.plain()
        return torch.as_tensor(output)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str] = (), first: int = 0) -> tuple[LoopState, Any]:
        """Sample without gradients; return the finished loop and what the pipeline returned."""
        return run_pipeline(self.pipe, cfg_scale=1.0, **self.arguments(prompts, first))

    def first_step(
        self,
        prompts: Sequence[str] = (),
        first: int = 0,
        **options: Any,  # noqa: ANN401
    ) -> Tensor:
        """Return the latents after one step of a sample of size `small`: one denoiser call."""
        reached: list[Tensor] = []

        def stop(steps: LoopState, latents: Tensor) -> Tensor:
            reached.append(latents)
            raise _FirstStepDone

        arguments = self.arguments(prompts, first) | self.small | {"output_type": "latent"}
        with suppress(_FirstStepDone):
            run_pipeline(self.pipe, cfg_scale=1.0, on_step=stop, **arguments, **options)
        if not reached:
            raise RuntimeError(f"{type(self.pipe).__name__} never called scheduler.step")
        return reached[0]

    def all_steps(self, **options: Any) -> Rollout:  # noqa: ANN401
        """Return a whole sample, its last latents with their graph."""
        changes: list[Tensor] = []

        def record(steps: LoopState, latents: Tensor) -> Tensor:
            if steps.done:
                changes.append((latents.detach().float() - steps.latents.detach().float()).norm())
            return latents

        arguments = self.arguments() | {"output_type": "latent"}
        steps, output = run_pipeline(
            self.pipe, cfg_scale=1.0, on_step=record, **arguments, **options
        )
        return Rollout(steps.latents, changes, steps, output)

    def _backward(self, latents: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.randn(latents.shape, generator=generator).to(latents.device)
        with torch.enable_grad():
            loss = (latents.float() * weights).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def _own_gradients(self) -> Iterator[None]:
        """Restore the parameters' previous gradients on exit."""
        previous = [parameter.grad for _, parameter in self.parameters]
        for _, parameter in self.parameters:
            parameter.grad = None
        try:
            yield
        finally:
            for (_, parameter), gradient in zip(self.parameters, previous, strict=True):
                parameter.grad = gradient

    @contextmanager
    def gradient(
        self, checkpointing: Checkpointing, grad_steps: int | None = None
    ) -> Iterator[list[Tensor | None]]:
        """Yield every parameter's gradient of a sample; None: no gradient reached it.

        The parameters' previous gradients are restored on exit.
        """
        with self._own_gradients():
            with torch.enable_grad():
                sampled = self.all_steps(checkpointing=checkpointing, grad_steps=grad_steps)
            self._backward(sampled.latents)
            del sampled  # and what is left of its graph
            yield [parameter.grad for _, parameter in self.parameters]

    def rollout_norms(
        self,
        examine: Callable[[Rollout], None] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> tuple[Rollout, Norms]:
        """Return a sample, without graph and output, and the norm of every parameter's gradient.

        Args:
            examine: Called with the sample before the backward pass, which needs most memory.
            **options: Arguments of the rollout.
        """
        with self._own_gradients():
            with torch.enable_grad():
                sampled = self.all_steps(**options)
            if examine is not None:
                examine(sampled)
            sampled = sampled._replace(output=None)
            self._backward(sampled.latents)
            sampled.steps.latents = sampled.latents.detach()
            return sampled._replace(latents=sampled.steps.latents), self._norms()

    def first_step_norms(self, **options: Any) -> tuple[Tensor, Norms]:  # noqa: ANN401
        """Return the latents after the first step, and the norm of every gradient through it."""
        with self._own_gradients():
            with torch.enable_grad():
                latents = self.first_step(**options)
            self._backward(latents)
            return latents.detach(), self._norms()

    def _norms(self) -> Norms:
        """Return the norm of every parameter's gradient; None: no gradient reached it.

        Norms are compared, and not gradients, so that only one gradient of a large model is held.
        """
        gradients = (parameter.grad for _, parameter in self.parameters)
        return [None if g is None else full_tensor(g.float().norm()) for g in gradients]


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the relative difference of two tensors; infinite if it is not a number."""
    if actual.shape != expected.shape:
        return float("inf")
    norm = expected.double().norm()
    error = ((actual.double() - expected.double()).norm() / norm.clamp(min=1e-30)).item()
    return float("inf") if math.isnan(error) else error


def norms_difference(actual: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """Return the relative difference of lists of norms; infinite if other entries are None."""
    if [norm is None for norm in actual] != [norm is None for norm in expected]:
        return float("inf")
    norms = [[norm for norm in norms if norm is not None] for norms in (actual, expected)]
    return relative_difference(*map(torch.stack, norms)) if norms[0] else 0.0
