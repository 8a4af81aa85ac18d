"""`lit-distill play`: a local page to try a student by hand."""

from __future__ import annotations

import lightning.pytorch as pl

from lit_distill.report.play import Playground
from lit_distill.report.play_server import PlayServer


def play(trainer: pl.Trainer, *, ckpt_path: str, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Open a local page that samples a prompt with teacher, undistilled pipeline and student.

    The page works offline. Ctrl-C ends it.

    Args:
        trainer: The device.
        ckpt_path: Checkpoint (.ckpt) of a run.
        host: Address to listen on; 0.0.0.0 lets other machines in, without a password.
        port: Port to listen on; 0: any that is free.
    """
    if not trainer.is_global_zero:
        return
    with PlayServer(Playground(ckpt_path, trainer.strategy.root_device), host, port) as server:
        print(f"Open {server.url} in a browser; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
