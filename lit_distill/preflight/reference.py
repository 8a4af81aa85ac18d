"""The gradient that checkpointing modes are compared with, in no more memory than they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

from lit_distill.compute.repeated_blocks import repeated_blocks
from lit_distill.compute.step_adapters import StepAdapters
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.hooks import replaced_forward

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def blocks_recomputed(pipe: DiffusionPipeline) -> Iterator[None]:
    """Recompute every block of the denoisers in the backward pass, without diffusers' own code.

    Each block is called with all that the denoiser gives it. The gradient checkpointing of a
    diffusers model calls them otherwise, and may leave out a mask (Chroma).
    """

    def recomputed(call: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            return checkpoint(call, *args, use_reentrant=False, **kwargs)

        return forward

    with ExitStack() as stack:
        for denoiser in denoisers(pipe).values():
            adapters = StepAdapters.of(denoiser)
            for blocks in repeated_blocks(denoiser).values():
                for block in blocks:
                    call = adapters.bind_active(block.forward)
                    stack.enter_context(replaced_forward(block, recomputed(call)))
        yield
