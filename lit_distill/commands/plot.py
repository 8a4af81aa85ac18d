"""`lit-distill plot`: plots the curves of runs."""

from __future__ import annotations

from pathlib import Path

from lit_distill.data.whole_files import write_file
from lit_distill.report.plots import plot_curves, read_logs


def plot(
    *, logs: str | list[str], out: str = "curves.png", metrics: list[str] | None = None
) -> None:
    """Plot as a PNG the curves that runs have logged with TensorBoardLogger or CSVLogger.

    Args:
        logs: Folder of a run, or a list of such folders: '[runs/a, runs/b]'.
        out: PNG file to write.
        metrics: Names of the curves, e.g. '[train_loss, val_gap_closed]'; default: the training
            loss and the validation metrics.
    """
    folders = [logs] if isinstance(logs, str) else logs
    figure = plot_curves({folder: read_logs(folder) for folder in folders}, metrics)
    kind = Path(out).suffix.removeprefix(".") or "png"
    write_file(out, lambda stream: figure.savefig(stream, dpi=150, format=kind))
    print(f"curves: {out}")
