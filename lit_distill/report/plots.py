"""Curves of loss and metrics, from what runs have logged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EVENTS = "events.out.tfevents.*"  # of TensorBoardLogger

CSV = "metrics.csv"  # of CSVLogger

MANY = 60
"""Points of a curve from which on it is smoothed."""

SHOWN = ["train_loss", "val_gap_closed", "val_latent_mse", "val_psnr", "val_ssim", "val_sharpness"]

SHOWN += ["val_diversity", "val_frechet", "val_lpips", "val_clip_score"]


def find_logs(run: str | Path) -> Path:
    """Return the one folder at or below `run` that holds logs of TensorBoardLogger or CSVLogger.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several.
    """
    run = Path(run)
    files = [*run.rglob(EVENTS), *(file for file in run.rglob(CSV) if _is_log(file))]
    found = sorted({file.parent for file in files})
    if not found:
        raise FileNotFoundError(
            f"{run} holds no logs: neither {EVENTS} (TensorBoardLogger) nor {CSV} (CSVLogger)"
        )
    if len(found) > 1:
        listed = ", ".join(map(str, found[:5]))
        raise ValueError(f"{run} holds the logs of {len(found)} runs; name one of them: {listed}")
    return found[0]


def read_logs(run: str | Path) -> dict[str, pd.Series]:
    """Return what a run has logged.

    Args:
        run: Folder of the run, or one above it that holds no other.

    Returns:
        For each name (``train_loss``, ``val_gap_closed``, ...) the values by training step.

    Raises:
        FileNotFoundError: If there are no logs.
        ValueError: If there are those of several runs.
    """
    folder = find_logs(run)
    return _read_events(folder) if any(folder.glob(EVENTS)) else _read_csv(folder / CSV)


def _is_log(path: Path) -> bool:
    """Return whether it is CSVLogger's; a report's metrics.csv has no steps."""
    with path.open(encoding="utf-8") as file:
        return "step" in file.readline().strip().split(",")


def _read_events(folder: Path) -> dict[str, pd.Series]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    logs = {}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        logs[name] = pd.Series([p.value for p in points], index=[p.step for p in points])
    return _cleaned(logs)


def _read_csv(path: Path) -> dict[str, pd.Series]:
    table = pd.read_csv(path).set_index("step")
    return _cleaned({str(name): table[name].dropna() for name in table if name != "epoch"})


def _cleaned(logs: dict[str, pd.Series]) -> dict[str, pd.Series]:
    """Of a step that was logged twice, by a run that was resumed, keep the later value."""
    return {
        name: log[~log.index.duplicated(keep="last")].sort_index() for name, log in logs.items()
    }


def plot_curves(runs: dict[str, dict[str, pd.Series]], metrics: list[str] | None = None) -> Figure:
    """Draw one panel a metric, with one line a run.

    Args:
        runs: What `read_logs` returned, by the name to show.
        metrics: Names to draw; None: the training loss and what validation logged of `SHOWN`.

    Raises:
        ValueError: If no run has logged a metric of that name.
    """
    from matplotlib.figure import Figure

    logged = sorted({name for logs in runs.values() for name in logs})
    if metrics is None:
        metrics = [name for name in SHOWN if name in logged] or logged
    for name in metrics:
        if name not in logged:
            raise ValueError(f"no run has logged {name!r}; logged are {', '.join(logged)}")
    if not metrics:
        raise ValueError("the runs have logged nothing yet")
    columns = min(4, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, name in zip(panels, metrics, strict=False):
        panel.set_title(name, fontsize=10)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
        for number, (label, logs) in enumerate(runs.items()):
            if name in logs:
                _draw(panel, logs[name], label, f"C{number}")
    for panel in panels[len(metrics) :]:
        panel.remove()
    if len(runs) > 1:
        panels[0].legend(fontsize=8)
    return figure


def _draw(panel: Any, log: pd.Series, label: str, colour: str) -> None:  # noqa: ANN401
    """Draw few points as they are, many with their running mean."""
    if len(log) <= MANY:
        panel.plot(log.index, log, color=colour, label=label, marker=".")
        return
    panel.plot(log.index, log, color=colour, alpha=0.25, linewidth=0.8)
    panel.plot(log.index, log.ewm(span=len(log) / 20).mean(), color=colour, label=label)
