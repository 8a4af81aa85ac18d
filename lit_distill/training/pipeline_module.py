"""A diffusers pipeline in Lightning's hands, whatever it is taught."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

import lit_distill
from lit_distill.data.batch import Batch
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.latent_codec import LatentCodec
from lit_distill.training.autoconfigure import autoconfigure
from lit_distill.training.checkpoint_io import AtomicCheckpointIO, check_state
from lit_distill.training.facts import training_facts
from lit_distill.training.losses import DistillLoss
from lit_distill.training.resume import ResumeState, StopOnSignal
from lit_distill.training.settings import check_rows
from lit_distill.training.student import Student
from lit_distill.training.validation import Validator

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class PipelineModule(pl.LightningModule):
    """Loads, places, validates, saves and resumes the pipeline that `DirectDistill` teaches.

    Attributes:
        student: The pipeline, and all that is done to it.
        loss: What decides whether the VAE stays on the device.
        held_out: What validation and test do.
        init_lora: File or folder of the LoRA to go on from.
    """

    student: Student
    loss: DistillLoss
    validator: Validator
    init_lora: str | None

    def __init__(self) -> None:
        super().__init__()
        self._loaded = False
        self._run = ResumeState()

    @property
    def pipe(self) -> DiffusionPipeline:
        """The student's pipeline, once `configure_model` has run."""
        return self.student.pipe

    # Set-up

    def configure_callbacks(self) -> list[pl.Callback]:
        """Stop in good order when told to."""
        return [StopOnSignal()]

    def setup(self, stage: str) -> None:
        """Have checkpoints written whole and read safely, and refuse weights in bfloat16.

        Raises:
            ValueError: If the trainer's precision would train in half precision.
        """
        precision = self.trainer.precision
        if precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision is {precision}, in which most steps round to nothing; use "
                "bf16-mixed (trained weights are float32, model.torch_dtype sets the arithmetic)"
            )
        self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self._run.begin()

    def configure_model(self) -> None:
        """Load the pipeline, freeze it and make the student trainable; once."""
        if hasattr(self, "denoisers"):
            return
        data = self._fit_data()
        if data is not None:
            check_rows(self.hparams, data)
        # Lightning makes the accelerator the default device here, and schedulers that are built
        # there can't compute their schedules, for which they use numpy.
        with torch.device("cpu"):
            if self._device_mesh is None:
                self.student.load()
            else:
                device = self.trainer.strategy.root_device
                self.student.load(self._device_mesh["data_parallel"], device)
            self.student.encode(data, self._trainer)
            # Before anything wraps the denoisers: DDP must not wait for frozen parameters.
            if data is not None:
                autoconfigure(self.student, data, self.trainer)
            if self.hparams["compile"]:
                self.student.compile()
        self.denoisers = nn.ModuleDict(denoisers(self.pipe))

    def _fit_data(self) -> DistillDataModule | None:
        """Return the data of the training that is about to begin, if it is of this package."""
        trainer = self._trainer
        data = getattr(trainer, "datamodule", None)
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        return data if fitting and isinstance(data, DistillDataModule) else None

    def on_fit_start(self) -> None:
        """Place the pipeline and switch on the dropout of adapters, if they have any."""
        if self.loss.needs_codec:
            self.student.take_vae(self.device)
        else:
            self.student.place(self.device)
        if self._run.seed is None:
            self._run.seed = self.trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        for name, module in self.denoisers.named_modules():
            if name.endswith("lora_dropout"):
                module.train()

    def on_train_start(self) -> None:
        """Go on with this run's settings where loading a checkpoint has changed them; say so."""
        for name, configured, saved in self._run.keep_settings():
            rank_zero_warn(
                f"the optimizer's or schedule's {name}={configured!r} differs from the "
                f"checkpoint's {saved!r}; going on with {configured!r}"
            )

    def on_validation_start(self) -> None:
        """Place the pipeline, the VAE among it, which pictures need."""
        self.student.take_vae(self.device)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self) -> None:
        """Let go of the VAE again, unless the loss looks through it."""
        if not self.loss.needs_codec:
            self.student.release_vae(self.device)

    # Sampling

    def codec(self, batch: Batch) -> LatentCodec:
        """Return the codec of the batch's resolution; learned on first use."""
        return self.student.codec(batch)

    def sample(
        self,
        batch: Batch,
        *,
        num_inference_steps: int | None = None,
        cfg_scale: float | None = None,
        undistilled: bool = False,
        pipe: DiffusionPipeline | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Draw a batch's prompts and seeds as `pipe()` does.

        Args:
            batch: The rows.
            num_inference_steps: Steps; default: the rows' own.
            cfg_scale: Guidance; default: the rows' own.
            undistilled: Draw with the pretrained weights instead of the student's.
            pipe: Draw with this pipeline instead.

        Returns:
            Final latents (B, ...) and B images.
        """
        with self.undistilled() if undistilled else ExitStack():
            return self.student.sample(
                batch,
                pipe,
                num_inference_steps=num_inference_steps or batch["num_inference_steps"],
                cfg_scale=batch["cfg_scale"] if cfg_scale is None else cfg_scale,
            )

    @contextmanager
    def undistilled(self) -> Iterator[None]:
        """Let the pipeline draw with its pretrained weights: adapters off, or a second denoiser.

        In full training the pretrained denoiser is loaded again, at first use after a step.
        """
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        fresh = fitting and self.global_step == 0 and not self._loaded
        lora = self.hparams["lora"] is not None
        # Before the first step of full training the student is the pretrained denoiser.
        with self.student.undistilled() if lora or not fresh else ExitStack():
            yield

    def release_undistilled(self) -> None:
        """Free the second denoiser: it is not kept while training."""
        self.student.release_undistilled()

    def decode(self, latents: Tensor, batch: Batch) -> Tensor:
        """Return the images of the batch's final latents, (B, 3, H, W), float32, range [0, 1].

        Raises:
            ValueError: If the pipeline's latents can't be decoded, which metrics {} does without.
        """
        try:
            codec = self.codec(batch)
        except ValueError as error:
            raise ValueError(f"{error}; or validate without images: model.metrics: {{}}") from error
        return codec.decode(latents)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Any]:
        """Return the student's images of the batch, B `PIL.Image.Image`."""
        return self.sample(batch)[1]

    # Checkpoints hold what trains

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what trains, by its name in a checkpoint."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override] # noqa: ANN401
        """Return the trainable tensors only."""
        full = super().state_dict(*args, **kwargs)
        return {name: full[name] for name in self.trained()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load trainable tensors.

        Raises:
            ValueError: If they are not exactly this module's, naming what differs.
        """
        if strict:
            check_state(state_dict, self.trained(), "the checkpoint")
        self._loaded = True
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what a resumed run and an export need beside Lightning's own notes."""
        checkpoint["lit_distill"] = {
            "version": lit_distill.__version__,
            "undistilled_mse": self.validator.undistilled_mse,
            "facts": training_facts(self.trainer) | {"init_lora": self.init_lora},
            **self._run.notes(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the notes, and report settings that differ from the checkpoint's.

        Raises:
            ValueError: If the checkpoint can't be resumed from.
        """
        self._loaded = True
        notes = checkpoint["lit_distill"]
        self.validator.undistilled_mse = dict(notes["undistilled_mse"])
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            if "optimizer_states" not in checkpoint:
                raise ValueError(
                    "the checkpoint holds weights only (ModelCheckpoint.save_weights_only): "
                    "training can't go on from it"
                )
            self._run.resume(notes)
        saved = checkpoint["hyper_parameters"]
        for name, value in self.hparams.items():
            # Metrics may be objects on one side; they change nothing of the student.
            if name in saved and saved[name] != value and name != "metrics":
                rank_zero_warn(
                    f"model.{name}={value!r} differs from the checkpoint's {saved[name]!r}; "
                    f"going on with {value!r}"
                )
