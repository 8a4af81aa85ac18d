"""GPUs that a training can be planned for."""

from __future__ import annotations

from dataclasses import dataclass

from lit_distill.errors import InputError, with_suggestions

GIB = 2**30

MARGIN = 0.08
"""Share of a card's memory that is left free for what a plan does not count.

That is the CUDA context (about .5 GiB), fragmentation, the workspaces of cuBLAS and cuDNN, and
NCCL's buffers. Not calibrated on a GPU yet.
"""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: Its name.
        memory: The bytes that CUDA reports as its total memory, less than the nominal size.
        flops: Floating point operations a second in dense bfloat16, as the vendor states them.
    """

    name: str
    memory: float
    flops: float


# Memory in GiB is what `torch.cuda.mem_get_info` reports as the total, which the error of a full
# card quotes ("GPU 0 has a total capacity of ..."): 79.15 to 79.25 on cards of 80 GB; L40S 44.39 to
# 44.53 of 48 GB, since error correction takes a part (Wan-Video/Wan2.1 issue 205,
# stepfun-ai/Step-Video-T2V issue 8); RTX 4090 23.61 to 23.68 (ali-vilab/VGen issue 104,
# pinokiofactory/flux-webui issue 11); RTX 5090 31.36 (Wan-Video/Wan2.1 issue 465,
# TrajectoryCrafter/TrajectoryCrafter issue 20). The smallest value that was found is used.
#
# Dense bfloat16 TFLOPS with float32 accumulation are NVIDIA's. H100 SXM data sheet: 1,979 with
# sparsity, half of it without. A100 data sheet: 312. L40S data sheet: 362.05, 733 with sparsity.
# RTX 4090: Ada GPU architecture white paper, appendix A: 165.2. RTX 5090: RTX Blackwell GPU
# architecture white paper, appendix A: 209.5, a quarter of the 838 that it has with sparsity and
# float16 accumulation.
CARDS = {
    name: Card(name, memory * GIB, tflops * 1e12)
    for name, memory, tflops in (
        ("h100", 79.1, 989.4),
        ("a100-80gb", 79.1, 312.0),
        ("l40s", 44.3, 362.1),
        ("rtx4090", 23.6, 165.2),
        ("rtx5090", 31.3, 209.5),
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
