"""Images of any prompts while training: teacher, undistilled pipeline and student side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

from lit_distill.data.batch import Batch
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.data.dataset import PairDataset
from lit_distill.errors import InputError
from lit_distill.evaluation.contact_sheet import contact_sheet
from lit_distill.training.direct_distill import DirectDistill
from lit_distill.training.ema import averaged_weights
from lit_distill.training.first_row import untargeted_batch
from lit_distill.training.image_callbacks import log_to_loggers, run_folder, write_png


class SampleImages(Callback):
    """Shows images of your prompts while training; they need no pairs.

    A sheet with a row for each prompt and seed, and the columns teacher, undistilled and student,
    goes to TensorBoard and Weights & Biases (tag ``samples``), and to ``samples/step_<n>.png`` in
    the folder of the run: before the first step, every `every_n_steps`, and at the end. Teacher and
    undistilled pipeline are sampled once, at the start. Size, steps, guidance and other arguments
    of the call are those of the first training row. With `EMA` the averaged weights are shown.
    Where full training resumes, its pretrained weights are gone, so only the student is shown.

    Args:
        prompts: The prompts; null: no images.
        every_n_steps: Optimizer steps between two sheets.
        seeds: Seeds of the noise; each prompt is sampled from all of them.

    Raises:
        InputError: If there is no prompt, one is empty, or a number is out of range.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        every_n_steps: int = 250,
        seeds: list[int] = [0],  # noqa: B006 (never changed; shown by --help)
    ) -> None:
        if prompts is not None and not (prompts and all(prompt.strip() for prompt in prompts)):
            raise InputError(f"sample.prompts must be texts that are not empty, got {prompts!r}")
        if every_n_steps < 1:
            raise InputError(f"sample.every_n_steps must be >= 1, got {every_n_steps}")
        if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
            raise InputError(f"sample.seeds must be integers >= 0 and < 2^63, got {seeds}")
        self.prompts = prompts
        self.every_n_steps = every_n_steps
        self.seeds = list(seeds)
        self._rows: PairDataset | None = None
        self._columns: dict[str, list[Image.Image]] = {}
        self._shown: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Add the prompts to the data, whose prompts are encoded before training.

        Raises:
            InputError: If the data is not a `DistillDataModule`.
        """
        self._rows, self._columns, self._shown = None, {}, None
        if stage != "fit" or self.prompts is None:
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, DistillDataModule) or data.train_set is None:
            raise InputError(
                "sample.prompts: the size and steps of the images are those of the first row of a "
                f"DistillDataModule, but the data is {type(data).__name__}"
            )
        first = data.train_set.record(0) | {"image": "", "latents": ""}
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        rows = [
            first | {"prompt": prompt, "seed": seed, "row": number}
            for number, (prompt, seed) in enumerate(pairs, 1)
        ]
        data.sample_set = self._rows = PairDataset(pd.DataFrame(rows))

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Show the samples before the run's first step, and after every `every_n_steps`.

        Here the last step is complete and recorded: if sampling fails, it can be saved.
        """
        if self._shown is None or trainer.global_step % self.every_n_steps == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the samples of the trained student."""
        self._show(trainer, pl_module)

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Sample and log, once for a step.

        All processes sample, since sharded weights need all of them, and none has to wait for
        another longer than usual. The first process logs.
        """
        assert isinstance(module, DirectDistill)
        if self._rows is None or self._shown == trainer.global_step:
            return
        with _sampling(trainer, module):
            if self._shown is None:
                self._columns = self._baselines(module)
            with averaged_weights(trainer, module):
                student = self._images(lambda batch: module.sample(batch)[1])
        self._shown = trainer.global_step
        if trainer.is_global_zero:
            columns = {**self._columns, "student": student}
            rows = zip(self._labels(), zip(*columns.values(), strict=True), strict=True)
            sheet = contact_sheet(list(columns), [(label, list(images)) for label, images in rows])
            log_to_loggers(trainer, "samples", sheet)
            folder = run_folder(trainer) / "samples"
            write_png(folder / f"step_{trainer.global_step:06d}.png", sheet)

    def _baselines(self, module: DirectDistill) -> dict[str, list[Image.Image]]:
        """Return the images of teacher and undistilled pipeline."""
        pretrained_is_gone = module.settings.lora is None and module.state_loaded
        if pretrained_is_gone:
            return {}
        # Before the first step a denoiser that is trained as a whole still is its own teacher. The
        # copy frees another model of the teacher, if it loads one, when it is gone.
        teacher = replace(module.models.teacher, has_adapters=True)
        return {
            "teacher": self._images(teacher.images),
            "undistilled": self._images(lambda b: module.sample(b, undistilled=True)[1]),
        }

    def _images(self, sample: Callable[[Batch], list[Any]]) -> list[Image.Image]:
        """Return an image of every row, sampled one by one; of a video its first frame."""
        assert self._rows is not None
        records = (self._rows.record(index) for index in range(len(self._rows)))
        images = [sample(untargeted_batch(record))[0] for record in records]
        return [image[0] if isinstance(image, list) else image for image in images]

    def _labels(self) -> list[str]:
        assert self._rows is not None
        records = [self._rows.record(index) for index in range(len(self._rows))]
        with_seeds = len(self.seeds) > 1
        return [r["prompt"] + (f" (seed {r['seed']})" if with_seeds else "") for r in records]


@contextmanager
def _sampling(trainer: pl.Trainer, module: DirectDistill) -> Iterator[None]:
    """Sample as validation does, and leave everything for training as it was."""
    modes = {each: each.training for each in module.denoisers.modules()}
    devices = [module.device] if module.device.type == "cuda" else []
    module.placement.place(module.device, vae=True)
    module.denoisers.eval()
    try:
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
        ):
            yield
    finally:
        for each, training in modes.items():
            each.training = training
        if not module.loss.needs_codec:
            module.placement.release_vae()
