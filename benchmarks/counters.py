"""Counts what a training step stores and computes."""

from __future__ import annotations

import argparse

from torch.utils.flop_counter import FlopCounterMode

from lit_distill.planning.counter import CPU_ATTENTION, Counter

CHANNELS = 16  # of a latent token: 4, of 2 x 2 positions
MIB = 2**20


def forward_flops(options: argparse.Namespace, text_width: int) -> int:
    """Return the floating point operations of one denoiser call, two for each multiplication."""
    width, rank = options.width, options.rank
    tokens = options.image_tokens + options.text_tokens
    block = 12 * width**2 * tokens  # q, k, v, out and the MLP of four times the width
    block += 2 * 6 * width**2  # modulation of image and text, once a sample
    block += rank * 18 * width * tokens  # LoRA of these: four of (w, w), one of (w, 4w) and back
    block += 2 * tokens**2 * width
    ends = (2 * CHANNELS * options.image_tokens + text_width * options.text_tokens) * width
    ends += (256 + width + 2 * width) * width  # the time's embedding, the last norm's modulation
    return 2 * options.batch_size * (options.layers * block + ends)


class Bytes:
    """Context that counts the memory of a step."""

    def __enter__(self) -> Bytes:
        self.saved = 0
        self.live = Counter()
        self.live.__enter__()
        return self

    def forward_done(self) -> None:
        """Record what is stored for the backward pass."""
        self.saved = self.live.now

    def __exit__(self, *exception: object) -> None:
        self.live.__exit__(*exception)

    def result(self) -> dict[str, float]:
        """Return the counts."""
        return {
            "saved_MiB": round(self.saved / MIB, 2),
            "peak_MiB": round(self.live.peak / MIB, 2),
        }


class Flops(FlopCounterMode):
    """Context that counts the operations of a step.

    Don't use it together with `Bytes`, because it keeps tensors alive.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=CPU_ATTENTION)

    def forward_done(self) -> None:
        """Do nothing: the backward pass is counted too."""

    def result(self) -> dict[str, float]:
        """Return the count."""
        return {"GFLOP": round(self.get_total_flops() / 1e9, 3)}


COUNTERS: tuple[type[Bytes | Flops], ...] = (Bytes, Flops)
