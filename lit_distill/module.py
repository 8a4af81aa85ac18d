"""Direct Distillation as a LightningModule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

import lit_distill
from lit_distill.backbone import Backbone
from lit_distill.batches import Batch
from lit_distill.card import training_facts
from lit_distill.checkpointing import Checkpointing, check_mode
from lit_distill.checkpoints import AtomicCheckpointIO, check_state
from lit_distill.codec import LatentCodec
from lit_distill.data import DistillDataModule
from lit_distill.families import DTYPES, denoisers
from lit_distill.heldout import HeldOut
from lit_distill.losses import DistillLoss, LatentMSE
from lit_distill.metrics import default_metrics
from lit_distill.readiness import check_rows, make_ready
from lit_distill.resume import Run, StopOnSignal
from lit_distill.schedule import WarmupCosine
from lit_distill.steps import OptimizerStep, gradient_norm
from lit_distill.trajectory import Trajectory

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class DirectDistill(pl.LightningModule):
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
            torchmetrics class whose update asks for what lit_distill.evaluation offers. Null: psnr,
            ssim, sharpness and diversity. {}: nothing, which saves decoding the images.
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
        if torch_dtype not in DTYPES:
            raise ValueError(
                f"model.torch_dtype must be one of {', '.join(DTYPES)}, got {torch_dtype!r}"
            )
        if checkpointing != "auto" or offload_activations:
            check_mode(checkpointing, offload_activations)
        if teacher_lora and teacher_model:
            raise ValueError(
                "model.teacher_lora and model.teacher_model: set one; to teach with a model and a "
                "LoRA, fuse the LoRA into the model first"
            )
        if quantization and lora is None and not init_lora:
            raise ValueError(
                "model.quantization: quantised weights can't be trained, and model.lora is null "
                "(full training); set model.lora, for example {r: 32}"
            )
        if quantization and teacher_lora:
            raise ValueError(
                "model.quantization and model.teacher_lora: a LoRA can't be fused into quantised "
                "weights; fuse it before, and name the merged folder as the pretrained model"
            )
        if lora_per_step is not None:
            _check_lora_per_step(lora_per_step, lora is not None or init_lora, grad_steps)
        if sigmas is not None and not (sigmas and _falling([*sigmas, 0.0])):
            raise ValueError(f"model.sigmas must be positive and falling, got {sigmas}")
        if trajectory and grad_steps is not None:
            raise ValueError(
                "model.trajectory and model.grad_steps: set one; with trajectory no gradient "
                "goes through more than one step"
            )
        self.init_lora = init_lora
        if rollout_batch_size is not None and rollout_batch_size < 1:
            raise ValueError(f"model.rollout_batch_size must be >= 1, got {rollout_batch_size}")
        self.hparams.update(freeze=list(freeze or []), train_mode=list(train_mode or []))
        self.loss = loss or LatentMSE()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.call_kwargs = call_kwargs or {}
        self.held_out = HeldOut(default_metrics() if metrics is None else metrics)
        self._loaded = False
        self.backbone = Backbone(self.hparams, init_lora)
        self._step = OptimizerStep()
        self._run = Run()

    @property
    def pipe(self) -> DiffusionPipeline:
        """The student's pipeline, once `configure_model` has run."""
        return self.backbone.pipe

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
                self.backbone.load()
            else:
                device = self.trainer.strategy.root_device
                self.backbone.load(self._device_mesh["data_parallel"], device)
            self.backbone.encode(data, self._trainer)
            # Before anything wraps the denoisers: DDP must not wait for frozen parameters.
            if data is not None:
                make_ready(self.backbone, data, self.trainer)
            if self.hparams["compile"]:
                self.backbone.compile()
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
            self.backbone.take_vae(self.device)
        else:
            self.backbone.place(self.device)
        if self._run.seed is None:
            self._run.seed = self.trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        for name, module in self.denoisers.named_modules():
            if name.endswith("lora_dropout"):
                module.train()

    def on_train_start(self) -> None:
        """Go on with this run's settings where loading a checkpoint has changed them; say so."""
        self._step = OptimizerStep()
        for name, configured, saved in self._run.keep_settings():
            rank_zero_warn(
                f"the optimizer's or schedule's {name}={configured!r} differs from the "
                f"checkpoint's {saved!r}; going on with {configured!r}"
            )

    def on_validation_start(self) -> None:
        """Place the pipeline, the VAE among it, which pictures need."""
        self.backbone.take_vae(self.device)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self) -> None:
        """Let go of the VAE again, unless the loss looks through it."""
        if not self.loss.needs_codec:
            self.backbone.release_vae(self.device)

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

    def codec(self, batch: Batch) -> LatentCodec:
        """Return the codec of the batch's resolution; learned on first use."""
        return self.backbone.codec(batch)

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
        return self.backbone.online_target(batch)

    def student_rollout(self, batch: Batch) -> Tensor:
        """Return the student's final latents, (B, ...), differentiable where gradients are on."""
        return self.backbone.rollout(
            batch,
            cfg_scale=batch["cfg_scale"],
            grad_steps=self.hparams["grad_steps"],
            checkpointing=self.hparams["checkpointing"],
            offload=self.hparams["offload_activations"],
        )

    def student_trajectory(self, batch: Batch) -> Trajectory:
        """Return the student's states after every step; each differentiable in its own step."""
        return self.backbone.trajectory(
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
        return self.backbone.online_trajectory(batch).at(sigmas)

    def draw(
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
            return self.backbone.draw(
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
        with self.backbone.undistilled() if lora or not fresh else ExitStack():
            yield

    def release_undistilled(self) -> None:
        """Free the second denoiser: it is not kept while training."""
        self.backbone.release_undistilled()

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

    def on_validation_epoch_start(self) -> None:
        """Start the clock."""
        self.held_out.start()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Compare the student and the undistilled pipeline with the teacher on held-out rows.

        Returns:
            ``draws``, a `lit_distill.evaluation.Draws`, and ``new``, the positions of
            rows that no process had before.
        """
        return self.held_out.step(self, batch)

    def on_validation_epoch_end(self) -> None:
        """Log val_gap_closed, val_latent_mse, val_loss, val_seconds and val_<metric>."""
        self.held_out.finish(self, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Do as in validation."""
        return self.held_out.step(self, batch)

    def on_test_epoch_end(self) -> None:
        """Log test_gap_closed, test_latent_mse, test_loss, test_seconds and test_<metric>."""
        self.held_out.finish(self, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Any]:
        """Return the student's images of the batch, B `PIL.Image.Image`."""
        return self.draw(batch)[1]

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
            "undistilled_mse": self.held_out.undistilled_mse,
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
        self.held_out.undistilled_mse = dict(notes["undistilled_mse"])
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


def _check_lora_per_step(count: int, lora: Any, grad_steps: int | None) -> None:  # noqa: ANN401
    if count < 1:
        raise ValueError(f"model.lora_per_step must be >= 1, got {count}")
    if not lora:
        raise ValueError(
            "model.lora_per_step: model.lora is null (full training); set it, for example {r: 32}"
        )
    if grad_steps is not None and grad_steps < count:
        raise ValueError(
            f"model.grad_steps is {grad_steps}: the LoRAs of the steps before the last "
            f"{grad_steps} of model.lora_per_step ({count}) would never train; leave one out"
        )


def _falling(values: list[float]) -> bool:
    return all(left > right for left, right in itertools.pairwise(values))
