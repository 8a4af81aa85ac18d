"""Plots curves of loss and metrics from the logs of runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lit_distill.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EVENTS = "events.out.tfevents.*"  # written by TensorBoardLogger

CSV = "metrics.csv"  # written by CSVLogger

MAX_RAW_POINTS = 60
"""Curves with more points are smoothed."""

DEFAULT_METRICS = ["train_loss", "val_gap_closed", "val_latent_mse", "val_psnr", "val_ssim"]

DEFAULT_METRICS += ["val_letters", "val_words", "val_sharpness", "val_diversity", "val_frechet"]

DEFAULT_METRICS += ["val_lpips", "val_clip_score"]


def find_logs(run: str | Path) -> Path:
    """Return the one folder at or below `run` that holds logs of TensorBoardLogger or CSVLogger.

    Raises:
        FileNotFoundError: If there is none.
        InputError: If there are several.
    """
    run = Path(run)
    files = [*run.rglob(EVENTS), *(file for file in run.rglob(CSV) if _is_log(file))]
    folders = sorted({file.parent for file in files})
    if not folders:
        raise FileNotFoundError(
            f"{run} holds no logs: neither {EVENTS} (TensorBoardLogger) nor {CSV} (CSVLogger)"
        )
    if len(folders) > 1:
        listed = ", ".join(map(str, folders[:5]))
        raise InputError(f"{run} holds the logs of {len(folders)} runs; name one of them: {listed}")
    return folders[0]


def read_logs(run: str | Path) -> dict[str, pd.Series]:
    """Return the logged values of a run.

    Args:
        run: Folder of the run, or a parent folder that holds no other run.

    Returns:
        For each name (``train_loss``, ``val_gap_closed``, ...) its values, indexed by step.

    Raises:
        FileNotFoundError: If there are no logs.
        InputError: If there are logs of several runs.
    """
    folder = find_logs(run)
    return _read_events(folder) if any(folder.glob(EVENTS)) else _read_csv(folder / CSV)


def _is_log(path: Path) -> bool:
    """Return whether CSVLogger wrote the file; a report's metrics.csv has no column of steps."""
    with path.open(encoding="utf-8", errors="replace") as file:
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
    try:
        table = pd.read_csv(path).set_index("step")
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is not a log of CSVLogger: {error}") from error
    return _cleaned({str(name): table[name].dropna() for name in table if name != "epoch"})


def _cleaned(logs: dict[str, pd.Series]) -> dict[str, pd.Series]:
    """Return logs with the later value of steps that a resumed run has logged twice."""
    return {
        name: log[~log.index.duplicated(keep="last")].sort_index() for name, log in logs.items()
    }


def shown_metrics(logged: Iterable[str]) -> list[str]:
    """Return the names of the curves to show: those of `DEFAULT_METRICS`, or else all."""
    names = list(logged)
    return [name for name in DEFAULT_METRICS if name in names] or names


def plot_curves(runs: dict[str, dict[str, pd.Series]], metrics: list[str] | None = None) -> Figure:
    """Return a figure with one panel per metric and one line per run.

    Args:
        runs: Results of `read_logs`, by the name to show.
        metrics: Names of the panels; None: those of `DEFAULT_METRICS` that were logged.

    Raises:
        InputError: If no run has logged one of the metrics.
    """
    from matplotlib.figure import Figure

    logged = sorted({name for logs in runs.values() for name in logs})
    metrics = shown_metrics(logged) if metrics is None else metrics
    for name in metrics:
        if name not in logged:
            raise InputError(f"no run has logged {name!r}; logged are {', '.join(logged)}")
    if not metrics:
        raise InputError("the runs have logged nothing yet")
    columns = min(4, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, name in zip(panels, metrics, strict=False):
        panel.set_title(name, fontsize=10, parse_math=False)
        panel.set_xlabel("optimizer step", fontsize=9)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
        for number, (label, logs) in enumerate(runs.items()):
            if name in logs:
                _plot_log(panel, logs[name], label, f"C{number}")
    for panel in panels[len(metrics) :]:
        panel.remove()
    if len(runs) > 1:
        for text in panels[0].legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    return figure


def _plot_log(panel: Any, log: pd.Series, label: str, colour: str) -> None:  # noqa: ANN401
    """Plot a log; one of many points is plotted faintly, under its running mean."""
    if len(log) <= MAX_RAW_POINTS:
        panel.plot(log.index, log, color=colour, label=label, marker=".")
        return
    panel.plot(log.index, log, color=colour, alpha=0.25, linewidth=0.8)
    panel.plot(log.index, log.ewm(span=len(log) / 20).mean(), color=colour, label=label)
