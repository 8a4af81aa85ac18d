"""GPUs that a training can be planned for."""

from __future__ import annotations

from dataclasses import dataclass

from lit_distill.errors import InputError, with_suggestions

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: Its name.
        memory: Its memory in bytes.
        flops: Floating point operations a second in dense bfloat16, as the vendor states them.
    """

    name: str
    memory: float
    flops: float


# Memory in GiB and dense bfloat16 TFLOPS with float32 accumulation, from NVIDIA's documents:
# h100: H100 Tensor Core GPU data sheet, SXM: 1,979 with sparsity. a100-80gb: A100 data sheet.
# l40s: L40S data sheet: 733 with sparsity, 362 without. rtx4090: Ada GPU architecture white paper
# V2.1, appendix A. rtx5090: RTX Blackwell GPU architecture white paper V1.1, appendix A.
CARDS = {
    name: Card(name, memory * GIB, tflops * 1e12)
    for name, memory, tflops in (
        ("h100", 80, 989.4),
        ("a100-80gb", 80, 312.0),
        ("l40s", 48, 362.1),
        ("rtx4090", 24, 165.2),
        ("rtx5090", 32, 209.5),
    )
}
"""The named cards."""


def card(
    gpu: str | None = None, memory_gb: float | None = None, tflops: float | None = None
) -> Card:
    """Return a named card, with another memory or speed if these are given.

    Args:
        gpu: Name of a card; None: the h100, or with `memory_gb` one without a name.
        memory_gb: Memory in GiB.
        tflops: Dense bfloat16 TFLOPS.

    Raises:
        InputError: If no card has this name.
    """
    if gpu is not None and gpu not in CARDS:
        raise InputError(
            f"--gpu: no card is called {with_suggestions(gpu, CARDS)}; known: "
            f"{', '.join(CARDS)}; or set --memory_gb and --tflops"
        )
    known = CARDS[gpu or "h100"]
    name = gpu or ("h100" if memory_gb is None else f"{memory_gb:g} GiB")
    memory = known.memory if memory_gb is None else memory_gb * GIB
    return Card(name, memory, known.flops if tflops is None else tflops * 1e12)
