"""Direct Distillation as a LightningModule."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric

from lit_distill.adapters.inject import enable_adapter_dropout
from lit_distill.compute.activation_checkpointing import Checkpointing
from lit_distill.compute.sharding import replicate
from lit_distill.data.batch import Batch
from lit_distill.evaluation.metrics import default_metrics
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.latent_codec import LatentCodec
from lit_distill.training.facts import training_facts
from lit_distill.training.losses import DistillLoss, LatentMSE
from lit_distill.training.models import StudentAndTeacher
from lit_distill.training.objectives.base import Losses, Objective
from lit_distill.training.objectives.regression import Regression
from lit_distill.training.optimizer_step import OptimizerStep, clip_gradients, total_loss
from lit_distill.training.optimizers import configure_optimizers, step_on_plateau
from lit_distill.training.plain import plain_setting
from lit_distill.training.resumable_module import ResumableModule
from lit_distill.training.resume import is_fitting
from lit_distill.training.same_inputs import check_base
from lit_distill.training.saved_classes import COMPONENTS
from lit_distill.training.settings import Settings, check_precision
from lit_distill.training.setup import set_up_student
from lit_distill.training.student_loader import StudentLoader
from lit_distill.training.teacher_buffer import TeacherBuffer
from lit_distill.training.undistilled import UndistilledWeights
from lit_distill.training.validation import Validator

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class DirectDistill(ResumableModule):
    """Teaches a pipeline's denoiser to match, in few steps, its own samples of many guided steps.

    A training step samples with the student from the teacher's noise, differentiably end to end,
    and regresses the teacher's result: ``loss(student_rollout(batch), teacher_target(batch))``.
    Frozen weights have `torch_dtype`; trainable weights and the optimizer's state are float32. The
    arithmetic is in `torch_dtype`, exactly as when the exported student samples.

    Args:
        pretrained_model_name_or_path: Hub id or folder of any diffusers pipeline, or "tiny-digits".
        revision: Branch, tag or commit of the hub repository.
        torch_dtype: Data type of the frozen weights: float32, bfloat16 or float16.
        lora: Fields of peft.LoraConfig (r, lora_alpha, target_modules, ...); null trains the whole
            denoiser. Defaults: target_modules are all attention and MLP linears of the repeated
            blocks, and lora_alpha equals r.
        init_lora: LoRA to start from, a file or folder in the layout of diffusers, peft, ComfyUI,
            kohya or DiffSynth-Studio. It decides rank, alpha and target modules.
        lora_per_step: Number of the student's steps, each of which gets a separate LoRA; must equal
            the rows' num_inference_steps. Takes as many denoiser calls as one LoRA (null), and as
            many times its weights. Exported in format diffusers only.
        teacher_lora: LoRA of the teacher, in any of these layouts. It is fused into the weights
            before the student's LoRA is added, so that both start from it.
        teacher_model: Hub id or folder of another pipeline with the same latent space, used as the
            online teacher; null: the student's pretrained weights.
        scheduler: Fields of the scheduler's configuration that differ between student and teacher,
            such as {shift_terminal: null}, without which Qwen-Image has no one-step schedule. They
            are exported with the student.
        sigmas: The student's noise levels, one for each step, falling, as the pipeline's call takes
            them (before the scheduler shifts them); null: the pipeline's default. The export's card
            includes them in the call.
        checkpointing: What the backward pass recomputes instead of storing: none, block (the
            denoiser's blocks), selective (the blocks but for their attention), step (each denoiser
            call but the last) or nested (call and blocks: memory flat in steps). auto: the fastest
            for which the device has memory, measured before training and reported in the log.
        offload_activations: Keep the blocks' inputs in pinned host memory; block and selective.
        grad_steps: Back-propagate through the last grad_steps steps only; null: through all.
        objective: What the student is trained towards: Regression (null, Direct Distillation),
            Trajectory, DistributionMatching, Consistency, Adversarial, a WeightedSum of them, or
            your own Objective.
        loss: A DistillLoss, which measures what the objective compares; null: LatentMSE.
        optimizer: Optimizer of the trainable parameters.
        lr_scheduler: Learning rate schedule, stepped after every optimizer step; null: constant.
        teacher_num_inference_steps: Steps of the online teacher, for rows without a target.
        teacher_cfg_scale: Guidance of the online teacher, 1 = off.
        teacher_reuse: How often training uses what the online teacher generates. With 1 every row
            is generated whenever it comes, with its own seed. With more, batches of new pairs, each
            with a new seed, alternate with batches of pairs from a buffer.
        teacher_buffer: Number of pairs in this buffer, on each process; checkpoints hold them.
        call_kwargs: Fixed arguments of the pipeline's call, for teacher and student alike.
        freeze: Patterns of parameters that are not trained, such as
            "transformer.transformer_blocks.59.txt_mlp.*".
        train_mode: Patterns of modules that are put into training mode, except their dropout. For
            modules that compute without gradients in evaluation mode (HiDream's experts).
        rollout_batch_size: Samples that are generated together; null: the whole batch. 1 is for
            pipelines that pad prompts of different length without masking the padding.
        preflight: Check before training, with a few denoiser calls, that the pipeline can be
            distilled. Where the settings prevent it, checkpointing, freeze, train_mode and
            rollout_batch_size are changed, with a warning. A result in data.cache_dir of the same
            model and settings is used again; always: check in any case.
        compile: Compile the denoiser's repeated blocks with torch.compile.
        attention_backend: Attention backend, by its name in diffusers' dispatcher: native,
            _native_cudnn, _native_flash, flash, _flash_3, ...; null: diffusers' default. Applies to
            the whole process.
        quantization: Frozen weights in fewer bits, for LoRA only: quant_backend and quant_kwargs of
            diffusers' PipelineQuantizationConfig, for the denoisers, such as {quant_backend:
            bitsandbytes_4bit, quant_kwargs: {load_in_4bit: true, bnb_4bit_quant_type: nf4}} or
            {quant_backend: torchao, quant_kwargs: {quant_type: Int8WeightOnlyConfig}}.
        metrics: Metrics on held-out rows besides the latent error, by name: any torchmetrics class
            whose update takes what lit_distill.evaluation.evaluator lists. Null: psnr, ssim,
            sharpness and diversity. {}: none, so that no images are decoded.
    """

    def __init__(
        self,
        pretrained_model_name_or_path: str | None = None,
        revision: str | None = None,
        torch_dtype: str = "bfloat16",
        lora: dict[str, Any] | None = None,
        init_lora: str | None = None,
        lora_per_step: int | None = None,
        teacher_lora: str | None = None,
        teacher_model: str | None = None,
        scheduler: dict[str, Any] | None = None,
        sigmas: list[float] | None = None,
        checkpointing: Checkpointing | Literal["auto"] = "block",
        offload_activations: bool = False,
        grad_steps: int | None = None,
        objective: Objective | None = None,
        loss: DistillLoss | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-4, weight_decay=0.0
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
        teacher_num_inference_steps: int = 50,
        teacher_cfg_scale: float = 4.0,
        teacher_reuse: int = 1,
        teacher_buffer: int = 256,
        call_kwargs: dict[str, Any] | None = None,
        freeze: list[str] | None = None,
        train_mode: list[str] | None = None,
        rollout_batch_size: int | None = None,
        preflight: bool | Literal["always"] = True,
        compile: bool = False,
        attention_backend: str | None = None,
        quantization: dict[str, Any] | None = None,
        metrics: dict[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        # Plain types only: anything else fails to load with weights_only.
        self.save_hyperparameters(ignore=list(COMPONENTS))
        # Metrics of the command line are text, which a checkpoint can keep; objects it can't.
        if any(isinstance(metric, Metric) for metric in (self.hparams["metrics"] or {}).values()):
            self.hparams["metrics"] = None
        self.hparams.update({n: plain_setting(v, f"model.{n}") for n, v in self.hparams.items()})
        lists = {"freeze": list(freeze or []), "train_mode": list(train_mode or [])}
        self._use(Settings.select({**self.hparams, **lists, "init_lora": init_lora}))
        self.loss, self.objective = loss or LatentMSE(), objective or Regression()
        self.objective.check(self.settings)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.loader = StudentLoader(self.settings, companion=self.objective.needs_companion)
        self.validator = Validator(default_metrics() if metrics is None else metrics)
        self._step = OptimizerStep()

    def _use(self, settings: Settings) -> None:
        """Use these settings, and have checkpoints record them."""
        self.settings = settings
        self.hparams.update(settings.hyperparameters())

    @property
    def pipe(self) -> DiffusionPipeline:
        """The student's pipeline, once `configure_model` has run."""
        return self.student.pipe

    # Set-up

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callbacks that stop on a signal and that save the online teacher's pairs."""
        return [*super().configure_callbacks(), TeacherBuffer(lambda: self.models, self.resume)]

    def setup(self, stage: str) -> None:
        """Refuse a precision in which trained weights would not be float32."""
        check_precision(self.trainer.precision)
        super().setup(stage)

    def configure_model(self) -> None:
        """Load the pipeline and make the student trainable, once; settle the settings."""
        if hasattr(self, "denoisers"):
            return
        mesh = None if self._device_mesh is None else self._device_mesh["data_parallel"]
        options = {"always_guided": self.objective.needs_base}
        self.student, self.placement = set_up_student(self.loader, self._trainer, mesh, **options)
        self._use(self.student.settings)
        self.models = StudentAndTeacher(self.student, self.loss, lambda: self.global_step)
        self.objective.build(self.pipe)
        if mesh is not None:
            replicate(self.objective)
        load = self.loader.base if self.settings.lora is None else None
        self._undistilled = UndistilledWeights(self.pipe, load)
        self.denoisers = nn.ModuleDict(denoisers(self.pipe))

    def on_fit_start(self) -> None:
        """Place the pipeline and enable the adapters' dropout, if they have any."""
        self._step = OptimizerStep()
        self.placement.place(self.device, vae=self.loss.needs_codec)
        super().on_fit_start()
        enable_adapter_dropout(self.denoisers)

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Return the optimizer of the trainable parameters and its schedule."""
        return configure_optimizers(self, self.optimizer, self.lr_scheduler, self.objective)

    # Teacher and student

    def teacher_target(self, batch: Batch) -> Tensor:
        """Return the teacher's final latents, (B, ...), float32, in the space of `student_rollout`.

        The stored latents; else the encoded image; else the online teacher generates them, for
        which full training leaves none (an error).
        """
        return self.models.teacher_target(batch)

    def student_rollout(self, batch: Batch) -> Tensor:
        """Return the student's final latents, (B, ...), differentiable where gradients are on."""
        return self.models.student_rollout(batch)

    def compare(self, latents: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each sample, (B,), float32."""
        return self.models.compare(latents, target, batch)

    def losses(self, batch: Batch) -> Losses:
        """Return the training losses of a batch, with their graph: see `Losses`."""
        return self.objective.losses(self.models, batch)

    # Optimizer steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean training loss of the batch, and add what trains beside the student."""
        self.resume.seed_batch(self.global_rank)
        self.models.random.start(self.resume.seed or 0, self.resume.batches)
        batch = self.models.pairs(batch, self.objective)
        losses = self.losses(batch)
        self._step.add(batch["num_inference_steps"], batch["row"], losses)
        return total_loss(losses, [*self.trained().values(), *self.companions().values()])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step's loss and the gradient's norm; stop if the norm is not finite."""
        self._step.log(self)
        self.resume.updating = True

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer is configured to, with fused optimizers too."""
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Held-out rows

    def on_validation_start(self) -> None:
        """Place the pipeline, including the VAE, which images need, and start the clock."""
        self.placement.place(self.device, vae=True, offload=self.offload)
        self.validator.start()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self) -> None:
        """Release the VAE again, unless the loss needs it."""
        if not self.loss.needs_codec:
            self.placement.release_vae()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Compare student and undistilled pipeline with the teacher: see `Validator.step`."""
        return self.validator.step(self, batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log val_gap_closed, val_latent_mse, val_loss, val_seconds and val_<metric>."""
        metrics = self.validator.log(self, "val")
        if is_fitting(self._trainer) and not self.trainer.sanity_checking:
            step_on_plateau(self.resume.scheduler, metrics)
        self.release_undistilled()

    def on_test_epoch_end(self) -> None:
        """Log test_gap_closed, test_latent_mse, test_loss, test_seconds and test_<metric>."""
        self.validator.log(self, "test")
        self.release_undistilled()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Any]:
        """Return the student's images of the batch, B `PIL.Image.Image`."""
        return self.sample(batch)[1]

    # Sampling

    def codec(self, batch: Batch) -> LatentCodec:
        """Return the codec of the batch's resolution; learned at first use."""
        return self.student.codec(batch)

    def sample(
        self,
        batch: Batch,
        *,
        undistilled: bool = False,
        **options: Any,  # noqa: ANN401
    ) -> tuple[Tensor, list[Any]]:
        """Return final latents (B, ...) and B images, sampled as `pipe()` does.

        `undistilled` uses the pretrained weights instead of the student's; `options` are
        num_inference_steps, cfg_scale (default: those of the rows) or another pipe.
        """
        with self.undistilled() if undistilled else nullcontext():
            return self.student.sample(batch, **options)

    def undistilled(self) -> AbstractContextManager[None]:
        """Let the pipeline use its pretrained weights: adapters off, or a second denoiser.

        In full training the second denoiser is loaded at its first use after a step. Before, the
        student is the pretrained denoiser.
        """
        initial = is_fitting(self._trainer) and self.global_step == 0 and not self.state_loaded
        same = initial and self.settings.lora is None
        return nullcontext() if same else self._undistilled.active()

    def release_undistilled(self) -> None:
        """Free the second denoiser: it is not kept while training."""
        self._undistilled.release()

    def decode(self, latents: Tensor, batch: Batch) -> Tensor:
        """Return the images of the batch's final latents, (B, 3, H, W), float32, range [0, 1]."""
        return self.student.decode(latents, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what a resumed run and an export need beside what Lightning saves."""
        super().on_save_checkpoint(checkpoint)
        facts = training_facts(self.trainer) | {"init_lora": self.settings.init_lora}
        records = {"undistilled_mse": self.validator.undistilled_mse, "facts": facts}
        records["base_digest"] = self.student.base_digest
        checkpoint["lit_distill"].update(records)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over a checkpoint's records."""
        check_base(checkpoint, self.hparams, self.student.base_digest)
        super().on_load_checkpoint(checkpoint)
        self.validator.undistilled_mse = dict(checkpoint["lit_distill"]["undistilled_mse"])
