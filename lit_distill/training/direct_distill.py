"""Direct Distillation as a LightningModule."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torchmetrics import Metric

from lit_distill.compute.activation_checkpointing import Checkpointing
from lit_distill.data.batch import Batch
from lit_distill.evaluation.metrics import default_metrics
from lit_distill.pipelines.trajectory import Trajectory
from lit_distill.training.losses import DistillLoss, LatentMSE
from lit_distill.training.lr_scheduler import WarmupCosine
from lit_distill.training.optimizer_step import OptimizerStep, gradient_norm
from lit_distill.training.pipeline_module import PipelineModule
from lit_distill.training.settings import check_settings
from lit_distill.training.student import Student
from lit_distill.training.validation import Validator


class DirectDistill(PipelineModule):
    """Teaches a pipeline's denoiser to draw in few steps what it draws in many with guidance.

    A step draws with the student, differentiably end to end, from the teacher's own noise, and
    regresses the teacher's result: ``loss(student_rollout(batch), teacher_target(batch))``.
    Frozen weights have `torch_dtype`, trainable ones and the optimizer's state float32; the
    arithmetic is in `torch_dtype`, exactly as when the exported student draws.

    Args:
        pretrained_model_name_or_path: Hub id or folder of any diffusers pipeline, or "tiny-digits".
        revision: Branch, tag or commit of the hub repository.
        torch_dtype: Data type of the frozen weights: float32, bfloat16 or float16.
        lora: Fields of peft.LoraConfig (r, lora_alpha, target_modules, ...); null trains the whole
            denoiser. Without target_modules all attention and MLP linears of the repeated blocks
            are adapted; without lora_alpha it equals r.
        init_lora: LoRA to go on from, a file or folder in the layout of diffusers, peft, ComfyUI,
            kohya or DiffSynth-Studio. It decides rank, alpha and target modules.
        lora_per_step: Number of the student's steps, each of which gets a LoRA of its own; the
            rows' num_inference_steps must be this. As many denoiser calls as with one LoRA (null),
            and as many times its weights. Exported in format diffusers only.
        teacher_lora: LoRA, in any of these layouts, that the teacher has: it is fused into the
            weights before the student's is added, so that both start from it.
        teacher_model: Hub id or folder of another pipeline with the same latent space, to be the
            online teacher; null: the student's own pretrained weights.
        scheduler: Fields of the scheduler's configuration in which the student's differs from the
            teacher's, such as {shift_terminal: null}, without which Qwen-Image has no one-step
            schedule. They travel with the export.
        sigmas: The student's noise levels, one a step, falling, as the pipeline's call takes them
            (before the scheduler shifts them); null: the pipeline's own choice. Part of the call
            that the export's card tells.
        trajectory: Match the teacher's states after every step, from the student's own state before
            it, instead of only the last through all steps. Rows need the states: lit-distill
            generate --store_trajectory true, or the online teacher.
        checkpointing: What the backward pass recomputes instead of storing: none, block (the
            denoiser's blocks), selective (these but for their attention), step (each denoiser call
            but the last) or nested (call and blocks: memory flat in steps). auto: the fastest for
            which the device has memory, measured before training and said in the log.
        offload_activations: Keep the blocks' inputs in the host's pinned memory, with block and
            selective.
        grad_steps: Back-propagate through the last grad_steps steps only; null: through all.
        loss: A DistillLoss; null: LatentMSE.
        optimizer: Optimizer of the trainable parameters.
        lr_scheduler: Learning rate schedule, stepped after every optimizer step; null: constant.
        teacher_num_inference_steps: Steps of the online teacher, which targets rows that have
            neither image nor latents.
        teacher_cfg_scale: Guidance of the online teacher, 1 = off.
        call_kwargs: Fixed arguments of the pipeline's call, for teacher and student alike.
        freeze: Patterns of parameters that are not trained, such as
            "transformer.transformer_blocks.59.txt_mlp.*".
        train_mode: Patterns of modules that are put into training mode, but for their dropout, for
            those (HiDream's experts) that compute without gradients in evaluation mode.
        rollout_batch_size: Samples that are drawn together; null: the whole batch. 1 is for
            pipelines that pad prompts of different length without masking the padding.
        preflight: Check before training, by a few small draws, that the pipeline can be distilled;
            checkpointing, freeze, train_mode and rollout_batch_size are changed, with a warning,
            where it can't be with what is set.
        compile: Compile the denoiser's repeated blocks with torch.compile.
        attention_backend: How attention is computed, by its name in diffusers' dispatcher: native,
            _native_cudnn, _native_flash, flash, _flash_3, ...; null: as diffusers chooses.
            For the whole process.
        quantization: Frozen weights in fewer bits, for LoRA only: quant_backend and quant_kwargs of
            diffusers' PipelineQuantizationConfig, for the denoisers, such as {quant_backend:
            bitsandbytes_4bit, quant_kwargs: {load_in_4bit: true, bnb_4bit_quant_type: nf4}} or
            {quant_backend: torchao, quant_kwargs: {quant_type: Int8WeightOnlyConfig}}.
        metrics: What is measured on held-out rows besides the latent error, by name: any
            torchmetrics class whose update takes what lit_distill.evaluation.evaluator lists. Null:
            psnr, ssim, sharpness and diversity. {}: nothing, which saves decoding the images.
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
        trajectory: bool = False,
        checkpointing: Checkpointing | Literal["auto"] = "block",
        offload_activations: bool = False,
        grad_steps: int | None = None,
        loss: DistillLoss | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-4, weight_decay=0.0
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
        teacher_num_inference_steps: int = 50,
        teacher_cfg_scale: float = 4.0,
        call_kwargs: dict[str, Any] | None = None,
        freeze: list[str] | None = None,
        train_mode: list[str] | None = None,
        rollout_batch_size: int | None = None,
        preflight: bool = True,
        compile: bool = False,
        attention_backend: str | None = None,
        quantization: dict[str, Any] | None = None,
        metrics: dict[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        # Plain types only: anything else fails to load with weights_only.
        # init_lora only says where to begin: a checkpoint holds the weights and settings itself.
        self.save_hyperparameters(ignore=["loss", "optimizer", "lr_scheduler", "init_lora"])
        # Of the command line this is its text, which the checkpoint keeps; objects it can't.
        if any(isinstance(metric, Metric) for metric in (self.hparams["metrics"] or {}).values()):
            self.hparams["metrics"] = None
        check_settings(self.hparams, init_lora)
        self.init_lora = init_lora
        self.hparams.update(freeze=list(freeze or []), train_mode=list(train_mode or []))
        self.loss = loss or LatentMSE()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.call_kwargs = call_kwargs or {}
        self.validator = Validator(default_metrics() if metrics is None else metrics)
        self.student = Student(self.hparams, init_lora)
        self._step = OptimizerStep()

    # Set-up

    def on_train_start(self) -> None:
        """Begin to collect losses anew."""
        self._step = OptimizerStep()
        super().on_train_start()

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Return the optimizer of the trainable parameters and its schedule."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        self._run.configure(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, WarmupCosine) and scheduler.num_training_steps is None:
            scheduler.num_training_steps = int(self.trainer.estimated_stepping_batches)
        self._run.configure(optimizer, scheduler)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # Teacher and student

    @torch.no_grad()
    def teacher_target(self, batch: Batch) -> Tensor:
        """Return the teacher's final latents for the batch.

        The stored exact latents; else the encoded image; else those that the online teacher
        draws now with its own steps and guidance: `teacher_model`, or else the same weights with
        adapters off.

        Returns:
            (B, ...), float32, in the space of `student_rollout`.

        Raises:
            ValueError: If a row has neither image nor latents and the whole denoiser is trained,
                so that no teacher is left in it.
        """
        if batch["latents"] is not None:
            return batch["latents"].float()
        if batch["encoded"] is not None:
            return self.codec(batch).pack(batch["encoded"])
        if batch["image"] is not None:
            return self.codec(batch).encode(batch["image"])
        return self.student.online_target(batch)

    def student_rollout(self, batch: Batch) -> Tensor:
        """Return the student's final latents, (B, ...), differentiable where gradients are on."""
        return self.student.rollout(
            batch,
            cfg_scale=batch["cfg_scale"],
            grad_steps=self.hparams["grad_steps"],
            checkpointing=self.hparams["checkpointing"],
            offload=self.hparams["offload_activations"],
        )

    def student_trajectory(self, batch: Batch) -> Trajectory:
        """Return the student's states after every step; each differentiable in its own step."""
        return self.student.trajectory(
            batch,
            cfg_scale=batch["cfg_scale"],
            checkpointing=self.hparams["checkpointing"],
            offload=self.hparams["offload_activations"],
        )

    @torch.no_grad()
    def teacher_trajectory(self, batch: Batch, sigmas: Tensor) -> Trajectory:
        """Return the teacher's states at the student's noise levels, stored or drawn now.

        Args:
            batch: The rows.
            sigmas: The student's noise levels after each step, (K,).

        Raises:
            ValueError: If the rows hold no states, or those of another schedule.
        """
        stored, levels = batch["trajectory"], batch["sigmas"]
        if stored is not None and levels is not None and batch["latents"] is not None:
            same = levels.shape[1] == len(sigmas) - 1
            if not same or not torch.allclose(levels.cpu(), sigmas[:-1], rtol=1e-3):
                raise ValueError(
                    f"row {batch['row'][0]}: the teacher's states are at sigmas "
                    f"{[round(x, 4) for x in levels[0].tolist()]}, the student's steps at "
                    f"{[round(x, 4) for x in sigmas[:-1].tolist()]}: make the pairs with the "
                    "model.scheduler, model.sigmas and number of steps that you train with"
                )
            states = [*stored.float().transpose(0, 1), batch["latents"].float()]
            return Trajectory(torch.stack(states), sigmas)
        if any(batch[kind] is not None for kind in ("latents", "encoded", "image")):
            raise ValueError(
                f"model.trajectory: row {batch['row'][0]} has no states of the teacher between its "
                "steps; make the pairs with `lit-distill generate --store_trajectory true`"
            )
        return self.student.online_trajectory(batch).at(sigmas)

    def compare(self, latents: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each sample, (B,), float32.

        Raises:
            ValueError: If the target is not of the shape that the pipeline draws.
        """
        if latents.shape != target.shape:
            raise ValueError(
                f"row {batch['row'][0]}: the target's latents are {tuple(target.shape[1:])}, but "
                f"the pipeline draws {tuple(latents.shape[1:])} at size {batch['size']} "
                "(height, width); were they made by another pipeline or at another size?"
            )
        codec = self.codec(batch) if self.loss.needs_codec else None
        loss: Tensor = self.loss(latents.float(), target.float(), codec)
        return loss

    # Steps

    def losses(self, batch: Batch) -> Tensor:
        """Return the training loss of each sample, (B,), float32, with its graph."""
        if not self.hparams["trajectory"]:
            target = self.teacher_target(batch)
            return self.compare(self.student_rollout(batch), target, batch)
        student = self.student_trajectory(batch)
        teacher = self.teacher_trajectory(batch, student.sigmas)
        pairs = zip(student.states, teacher.states, strict=True)
        return torch.stack([self.compare(own, target, batch) for own, target in pairs]).mean(0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of the student's rollout against the teacher's target."""
        self._run.seed_batch(self.global_rank)
        losses = self.losses(batch)
        self._step.add(batch["num_inference_steps"], batch["row"], losses.detach())
        return losses.mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the loss of the whole optimizer step, over all processes, and the gradient's norm.

        Raises:
            FloatingPointError: If the norm is not finite, naming step, rows and losses.
        """
        norm = gradient_norm(self.trained().values())
        # A loss scaler skips such steps by itself.
        if not (torch.isfinite(norm) or self._scales_gradients()):
            self._step.refuse(self.global_step, norm.item())
        logged, rows = self._step.finish()
        self.log("grad_norm", norm, batch_size=rows)
        for name, mean in logged.items():
            sync = self.trainer.world_size > 1
            bar = name == "train_loss"
            self.log(name, mean, prog_bar=bar, sync_dist=sync, batch_size=rows)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer is told to, with fused optimizers too.

        Lightning refuses those under every mixed precision, but only float16 scales gradients.
        """
        if gradient_clip_val and not self._scales_gradients():
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            plugin = self.trainer.precision_plugin
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _scales_gradients(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    # Held-out rows

    def on_validation_epoch_start(self) -> None:
        """Start the clock."""
        self.validator.start()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Compare the student and the undistilled pipeline with the teacher on held-out rows.

        Returns:
            ``draws``, an `EvaluationBatch`, and ``new``, the positions of
            rows that no process had before.
        """
        return self.validator.step(self, batch)

    def on_validation_epoch_end(self) -> None:
        """Log val_gap_closed, val_latent_mse, val_loss, val_seconds and val_<metric>."""
        self.validator.finish(self, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Do as in validation."""
        return self.validator.step(self, batch)

    def on_test_epoch_end(self) -> None:
        """Log test_gap_closed, test_latent_mse, test_loss, test_seconds and test_<metric>."""
        self.validator.finish(self, "test")
