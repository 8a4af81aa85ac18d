"""The pipeline that is taught, and all that is done to it before and around training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_distill.adapters.inject import adapters_disabled
from lit_distill.data.batch import NO_TARGET, Batch, collate, open_pictures, split_batch
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.encoding.collate import EncodingCollateError
from lit_distill.encoding.encode_ahead import encode_ahead
from lit_distill.encoding.encode_once import EncodeOnce, encoded_image
from lit_distill.encoding.store import EncodingStore
from lit_distill.pipelines.components import (
    call_parameters,
    denoisers,
    override_scheduler_config,
    use_attention,
    weightless_copy,
)
from lit_distill.pipelines.latent_codec import LatentCodec
from lit_distill.pipelines.loading import load_pipeline
from lit_distill.pipelines.rollout import rollout, sample
from lit_distill.pipelines.trajectory import Trajectory, trajectory
from lit_distill.preflight.probe import other_prompt, preflight_size, trial_arguments
from lit_distill.training.student_loader import StudentLoader

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.distributed.device_mesh import DeviceMesh


Drawn = TypeVar("Drawn", Tensor, Trajectory)


class Student:
    """The student's pipeline. No module itself: encoders and VAE stay out of checkpoints and DDP.

    Args:
        settings: Hyperparameters of `DirectDistill`. What a LoRA to go on from, and preflight,
            decide is written into them.
        init_lora: File or folder of the LoRA to go on from.

    Attributes:
        loader: Loads it.
        pipe: The pipeline, once it is loaded.
    """

    pipe: DiffusionPipeline

    def __init__(self, settings: MutableMapping[str, Any], init_lora: str | None = None) -> None:
        self.settings = settings
        self.loader = StudentLoader(settings, init_lora)
        self._sharded = False
        self._codecs: dict[tuple[int, int] | None, LatentCodec] = {}
        self._base: dict[str, nn.Module] = {}
        self._teacher: DiffusionPipeline | None = None
        self._vae: nn.Module | None = None  # where the pipeline has only its shell

    # Before training

    def load(self, mesh: DeviceMesh | None = None, device: torch.device | None = None) -> None:
        """Load the pipeline, freeze it, and make the student trainable.

        Args:
            mesh: Processes that share the denoisers (FSDP2), if any.
            device: Where a process's share goes.
        """
        if mesh is None:
            pipe = self.loader.whole()
        else:
            assert device is not None
            pipe = self.loader.sharded(mesh, device)
        self._sharded = mesh is not None
        if self.settings["attention_backend"]:
            use_attention(pipe, self.settings["attention_backend"])
        if self.settings["sigmas"] and "sigmas" not in call_parameters(pipe):
            raise ValueError(
                f"model.sigmas: {type(pipe).__name__}'s call takes no sigmas; choose the student's "
                "schedule by fields of its scheduler instead (model.scheduler)"
            )
        self.pipe = pipe
        self._teacher_scheduler = pipe.scheduler
        pipe.scheduler = override_scheduler_config(pipe, self.settings["scheduler"])

    def encode(self, data: DistillDataModule | None, trainer: pl.Trainer | None) -> None:
        """Have prompts and pictures encoded only once; with a cache all of them now.

        Args:
            data: The rows to train on, if training is about to begin.
            trainer: Its trainer.
        """
        if data is None or data.cache_dir is None:
            EncodeOnce(self.pipe)
            return
        assert trainer is not None
        device = trainer.strategy.root_device
        own = denoisers(self.pipe)
        if self.settings["quantization"]:
            # bitsandbytes has put them on the GPU already, where the encoders need the room now.
            for denoiser in own.values():
                denoiser.to("cpu")
        for name, component in self.pipe.components.items():
            if isinstance(component, nn.Module) and name not in own:
                component.to(device)
        once = EncodeOnce(self.pipe, EncodingStore(data.cache_dir))
        sets = [each for each in (data.train_set, data.val_set) if each is not None]
        encode_ahead(
            once,
            sets,
            self.call,
            self.settings["teacher_cfg_scale"],
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            barrier=trainer.strategy.barrier,
        )
        example = self.example(data)
        prompt = example.pop("prompt")
        for prompts in ([prompt], [prompt, other_prompt(prompt)]):
            with suppress(EncodingCollateError):  # which preflight is going to find
                once.populate(cfg_scale=1.0, **trial_arguments(prompts, **example))
        once.store.flush()
        for each in sets:
            each.encoded = partial(encoded_image, once.store, once.namespace)
        self._vae = once.release(device)

    @staticmethod
    def first(data: DistillDataModule) -> Batch:
        """Return the first training row, without its target."""
        assert data.train_set is not None
        row = data.train_set.record(0)
        return collate([row | {"call": open_pictures(row["call"])} | NO_TARGET])

    def example(self, data: DistillDataModule) -> dict[str, Any]:
        """Return the first training row as arguments of `preflight`, at a small size."""
        batch = self.first(data)
        call = self.call(batch) | {"prompt": batch["prompt"][0]}
        del call["generator"]
        if batch["size"] is not None:
            call |= dict(zip(("height", "width"), preflight_size(*batch["size"]), strict=True))
        return call | {"num_inference_steps": batch["num_inference_steps"]}

    def compile(self) -> None:
        """Compile the denoisers' repeated blocks."""
        from lit_distill.compute.compilation import compile_blocks  # diffusers is slow to import

        compile_blocks(denoisers(self.pipe).values())

    # Where it is

    @property
    def device(self) -> torch.device:
        """Where the denoisers are."""
        denoiser = next(iter(denoisers(self.pipe).values()))
        device: torch.device = next(denoiser.parameters()).device
        return device

    def place(self, device: torch.device) -> None:
        """Move all components to the device, those too that Lightning does not know."""
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module):
                component.to(device)

    def take_vae(self, device: torch.device) -> None:
        """Put a released VAE back into the pipeline, for pictures; and place all."""
        if self._vae is not None:
            self.pipe.__dict__["vae"] = self._vae
        self.place(device)

    def release_vae(self, device: torch.device) -> None:
        """Let go of the VAE again, if it was released before training."""
        if self._vae is not None:
            self.pipe.__dict__["vae"] = weightless_copy(self._vae, device)
            self._vae.cpu()

    def own_dtype(self) -> Any:  # noqa: ANN401
        """Keep a trainer's autocast out where the denoiser computes in half precision itself."""
        compiled = self.settings["compile"] and not self._sharded
        if self.settings["torch_dtype"] == "float32" or compiled:
            return ExitStack()
        return torch.autocast(self.device.type, enabled=False)

    # Sampling

    def call(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for a batch, but for steps and guidance."""
        size = dict(zip(("height", "width"), batch["size"] or (), strict=False))
        device = batch["rand_device"]
        generators = [torch.Generator(device).manual_seed(seed) for seed in batch["seed"]]
        given = {"prompt": batch["prompt"], "generator": generators, **size}
        return {**(self.settings["call_kwargs"] or {}), **given, **batch["call"]}

    def student_call(self, batch: Batch, num_inference_steps: int) -> dict[str, Any]:
        """Return the arguments of `call`, steps, and the student's own sigmas if it has these."""
        own = self.settings["sigmas"]
        given = {"sigmas": list(own)} if own and len(own) == num_inference_steps else {}
        return self.call(batch) | {"num_inference_steps": num_inference_steps} | given

    def rollout(self, batch: Batch, **options: Any) -> Tensor:  # noqa: ANN401
        """Return the student's final latents, (B, ...).

        As many samples at a time are drawn as the pipeline draws rightly.

        Args:
            batch: The rows.
            **options: Further arguments of `lit_distill.rollout`.
        """
        return torch.cat(self._student(batch, rollout, options))

    def trajectory(self, batch: Batch, **options: Any) -> Trajectory:  # noqa: ANN401
        """Return the student's states after every step; otherwise as `rollout`."""
        return _joined(self._student(batch, trajectory, options))

    def _student(
        self, batch: Batch, draw: Callable[..., Drawn], options: dict[str, Any]
    ) -> list[Drawn]:
        steps = batch["num_inference_steps"]
        with self.own_dtype():
            parts = self._parts(batch)
            return [draw(self.pipe, **self.student_call(part, steps), **options) for part in parts]

    def _parts(self, batch: Batch) -> list[Batch]:
        return split_batch(batch, self.settings["rollout_batch_size"])

    def sample(
        self,
        batch: Batch,
        pipe: DiffusionPipeline | None = None,
        **options: Any,  # noqa: ANN401
    ) -> tuple[Tensor, list[Any]]:
        """Draw as `pipe()` does; return final latents (B, ...) and B images.

        Args:
            batch: The rows.
            pipe: Draw with this pipeline instead.
            **options: Further arguments of `lit_distill.pipelines.rollout.sample`.
        """
        steps = options.pop("num_inference_steps")
        drawn = []
        with self.own_dtype():
            for part in self._parts(batch):
                call = self.student_call(part, steps)
                if pipe is not None:  # whose schedule is its own
                    call = self.call(part) | {"num_inference_steps": steps}
                drawn.append(sample(pipe or self.pipe, **call, **options))
        return torch.cat([part for part, _ in drawn]), [one for _, part in drawn for one in part]

    def codec(self, batch: Batch) -> LatentCodec:
        """Return the codec of the batch's resolution; learned on first use."""
        size = batch["size"]
        if size not in self._codecs:
            call = self.call(split_batch(batch, 1)[0])
            del call["generator"]
            try:
                with self.own_dtype():
                    self._codecs[size] = LatentCodec(self.pipe, **call)
            except ValueError as error:
                raise ValueError(f"row {batch['row'][0]}: {error}") from error
        return self._codecs[size]

    def online_target(self, batch: Batch) -> Tensor:
        """Return the final latents that the online teacher draws now, (B, ...), float32.

        Raises:
            ValueError: If the whole denoiser is trained, so that no teacher is left in it.
        """
        return torch.cat(self._online(batch, rollout)).float()

    def online_trajectory(self, batch: Batch) -> Trajectory:
        """Return the states of the online teacher, which draws the batch now.

        Raises:
            ValueError: As `online_target`, or if its scheduler is no Euler one.
        """
        return _joined(self._online(batch, trajectory))

    def _online(self, batch: Batch, draw: Callable[..., Drawn]) -> list[Drawn]:
        if self.settings["lora"] is None and not self.settings["teacher_model"]:
            raise ValueError(
                f"row {batch['row'][0]} has neither image nor latents, and full training leaves no "
                "teacher to draw one: make pairs first with `lit-distill generate`"
            )
        options = {"num_inference_steps": self.settings["teacher_num_inference_steps"]}
        options["cfg_scale"] = self.settings["teacher_cfg_scale"]
        own, self.pipe.scheduler = self.pipe.scheduler, self._teacher_scheduler
        try:
            with adapters_disabled(nn.ModuleDict(denoisers(self.pipe))), self.own_dtype():
                pipe = self._teacher_pipeline()
                return [draw(pipe, **self.call(part), **options) for part in self._parts(batch)]
        finally:
            self.pipe.scheduler = own

    def _teacher_pipeline(self) -> DiffusionPipeline:
        """Return the pipeline that draws the online teacher's targets; loaded at first use."""
        if not self.settings["teacher_model"]:
            return self.pipe
        if self._teacher is None:
            teacher = load_pipeline(
                self.settings["teacher_model"], torch_dtype=self.settings["torch_dtype"]
            )
            EncodeOnce(teacher)
            self._teacher = teacher.to(self.device)
        return self._teacher

    @contextmanager
    def undistilled(self) -> Iterator[None]:
        """Let the pipeline draw with its pretrained weights: adapters off, or a second denoiser."""
        if self.settings["lora"] is not None:
            with adapters_disabled(nn.ModuleDict(denoisers(self.pipe))):
                yield
            return
        if not self._base:
            self._base = denoisers(self.loader.base())
            for denoiser in self._base.values():
                denoiser.to(self.device).requires_grad_(False)
        own = denoisers(self.pipe)
        self.pipe.__dict__.update(self._base)
        try:
            yield
        finally:
            self.pipe.__dict__.update(own)

    def release_undistilled(self) -> None:
        """Free the second denoiser: it is not kept while training."""
        self._base.clear()


def _joined(parts: list[Trajectory]) -> Trajectory:
    return Trajectory(torch.cat([part.states for part in parts], 1), parts[0].sigmas)
