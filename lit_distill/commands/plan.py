"""`lit-distill plan`: memory and time of every stage, before a GPU is rented."""

from __future__ import annotations

import json as json_files
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.commands.next_step import print_next, settings_of
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.data.whole_files import write_file
from lit_distill.errors import InputError
from lit_distill.training.direct_distill import DirectDistill
from lit_distill.training.step_planner import training_settings, uncounted

if TYPE_CHECKING:
    from lit_distill.planning.plan import Plan, Run


def plan(
    model: DirectDistill,
    datamodule: DistillDataModule,
    trainer_settings: Mapping[str, Any] | None = None,
    configs: Sequence[str] = (),
    *,
    gpu: str | None = None,
    memory_gb: float | None = None,
    tflops: float | None = None,
    mfu: float = 0.45,
    devices: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    cfg_scale: float | None = None,
    prompt_tokens: int | None = None,
    rows: int | None = None,
    json: str | None = None,
) -> None:
    """Print the memory and time that every stage of a training needs, without a GPU.

    Takes the configuration of fit. Of the pipeline only configuration files are read or downloaded,
    no weights. A training step is counted operation by operation for every checkpointing mode. The
    fastest that fits is printed as YAML for fit.

    Args:
        model: The pipeline and what trains.
        datamodule: The table, if it exists already: sizes, steps and number of rows; batch_size.
        trainer_settings: Devices, strategy, callbacks, epochs.
        configs: Configuration files that were given.
        gpu: The card: h100, a100-80gb, l40s, rtx4090 or rtx5090; default: h100.
        memory_gb: Memory of the card in GiB, if it is none of these.
        tflops: Its speed in dense bfloat16 TFLOPS.
        mfu: Share of that speed which is assumed to be reached.
        devices: Number of cards; default: those of trainer.devices.
        height: Height in pixels; default: that of the table, else data.height, else the pipeline's.
        width: Width in pixels; set together with height.
        num_inference_steps: Steps of the student; default: those of the table, else 4.
        cfg_scale: Guidance of the student; default: that of the table, else 1.
        prompt_tokens: Length of a prompt; default: the longest that the pipeline takes.
        rows: Number of training rows where the table does not exist yet.
        json: File to write the plan to.
    """
    from lit_distill.planning.cards import card
    from lit_distill.planning.plan import plan as plan_job
    from lit_distill.planning.settings import TrainingSettings

    _check(model, height, width)
    trainer = dict(trainer_settings or {})
    cards = devices or _number_of_devices(trainer)
    table = _Table(datamodule)
    sizes = {(height, width): 1} if height and width else table.sizes
    steps = num_inference_steps or table.largest("num_inference_steps", 4)
    scale = cfg_scale or table.largest("cfg_scale", 1.0)
    settings = _settings(model, datamodule, trainer, cards)
    settings |= {"num_inference_steps": steps, "cfg_scale": scale, "prompt_tokens": prompt_tokens}
    found = plan_job(
        model.settings.pretrained_model_name_or_path,
        TrainingSettings(**settings),
        card(gpu, memory_gb, tflops),
        revision=model.settings.revision,
        optimizer=model.optimizer,
        devices=cards,
        mfu=mfu,
        sizes=sizes,
        configured=model.settings.checkpointing,
        run=_run(trainer, datamodule, rows or table.rows, cards),
        cached=datamodule.cache_dir is not None,
        teacher_cfg_scale=model.settings.teacher_cfg_scale,
        teacher_num_inference_steps=model.settings.teacher_num_inference_steps,
    )
    _report(found, model, json)
    print_next("preflight", *settings_of(model.settings.model_name(), configs))


def _report(found: Plan, model: DirectDistill, json: str | None) -> None:
    """Print a plan, and write it to a file."""
    from lit_distill.planning.render import render

    print(render(found))
    if note := uncounted(model.objective):
        print(f"\n{textwrap.fill(f'model.objective: {note}', 79)}")
    if json is not None:
        path = Path(json)
        write_file(path, (json_files.dumps(found.as_dict(), indent=2) + "\n").encode())
        print(f"plan: {path}")


def _check(model: DirectDistill, height: int | None, width: int | None) -> None:
    if (height is None) != (width is None):
        raise InputError(f"--height={height}, --width={width}: set both or neither")
    if not model.settings.pretrained_model_name_or_path:
        raise InputError("model.pretrained_model_name_or_path is not set: a hub id or a folder")
    if model.settings.init_lora and model.settings.lora is None:
        raise InputError(
            f"model.init_lora={model.settings.init_lora}: plan reads no weights and can't know its "
            "rank and modules; set model.lora to them, for example {r: 32}"
        )


def _settings(
    model: DirectDistill, data: DistillDataModule, trainer: Mapping[str, Any], devices: int
) -> dict[str, Any]:
    """Return the fields of `TrainingSettings` that the configuration tells."""
    sharded = "fsdp" in str(trainer.get("strategy", "")).lower()
    return {
        **training_settings(model.settings, model.objective),
        "height": data.height,
        "width": data.width,
        "batch_size": data.batch_size,
        "accumulate": trainer.get("accumulate_grad_batches") or 1,
        "ema": any("EMA" in str(_class_path(each)) for each in _callbacks(trainer)),
        "shards": devices if sharded else 1,
        "replicas": 1 if sharded else devices,
    }


def _callbacks(trainer: Mapping[str, Any]) -> list[Any]:
    callbacks = trainer.get("callbacks") or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _class_path(callback: Any) -> Any:  # noqa: ANN401
    return callback.get("class_path") if hasattr(callback, "get") else type(callback).__name__


def _number_of_devices(trainer: Mapping[str, Any]) -> int:
    devices = trainer.get("devices", 1)
    number = len(devices) if isinstance(devices, list) else devices
    known = int(number) if str(number).isdigit() else 1  # auto: not known here
    return known * int(trainer.get("num_nodes") or 1)


class _Table:
    """What the training table tells, if there is one already."""

    def __init__(self, data: DistillDataModule) -> None:
        self._columns: Mapping[str, Any] = {}
        path = data.metadata_path
        if path and Path(path).exists():
            data.setup("fit")
            assert data.train_set is not None
            self._columns = data.train_set.columns

    @property
    def rows(self) -> int | None:
        """Number of its rows."""
        return len(self._columns["height"]) if self._columns else None

    @property
    def sizes(self) -> dict[tuple[int, int], int]:
        """How many rows have each height and width; those without a size are left out."""
        if not self._columns:
            return {}
        pairs = zip(self._columns["height"], self._columns["width"], strict=True)
        return dict(Counter((int(h), int(w)) for h, w in pairs if h and w))

    def largest(self, column: str, default: Any) -> Any:  # noqa: ANN401
        """Return the largest value of a column; `default` without a table."""
        return type(default)(self._columns[column].max()) if self._columns else default


def _run(
    trainer: Mapping[str, Any], data: DistillDataModule, rows: int | None, devices: int
) -> Run:
    """Return how long the training is."""
    from lit_distill.planning.plan import Run

    accumulate = trainer.get("accumulate_grad_batches") or 1
    limit = trainer.get("max_steps")
    limits = [] if limit in (None, -1) else [int(limit)]
    epochs = trainer.get("max_epochs")
    if rows is not None and epochs not in (None, -1):
        batches = math.ceil(rows * data.repeat / (data.batch_size * devices))
        limits.append(math.ceil(batches / accumulate) * int(epochs))
    if not limits:
        return Run(rows)
    return Run(rows, min(limits), min(limits) * accumulate)
