"""Taking a student home: files that other tools load, each loaded back before it counts."""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_distill.adapters.inject import adapters_disabled, make_trainable
from lit_distill.adapters.lora import LoRA, add_loras, differences
from lit_distill.adapters.lora_files import METADATA_KEY, read_lora, to_state
from lit_distill.adapters.lora_formats import file_name, layout_of
from lit_distill.adapters.weights import (
    extract_lora,
    fuse_lora,
    load_base_pipeline,
    load_into_adapters,
    lora_config_fields,
)
from lit_distill.compute.step_adapters import step_names, switch_adapter_callback
from lit_distill.data.batch import collate_calls, open_pictures
from lit_distill.data.images import Picture
from lit_distill.export.load_student import FACTS_FILE, student_pipeline
from lit_distill.export.model_card import model_card, student_facts
from lit_distill.pipelines.components import denoisers, silent_diffusers
from lit_distill.pipelines.loading import DTYPES, load_pipeline
from lit_distill.pipelines.rollout import sample
from lit_distill.training.checkpoint_io import read_checkpoint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


ExportFormat = Literal["diffusers", "comfyui", "kohya", "diffsynth", "peft", "merged"]

SAMPLES_FILE = "samples.png"

# Largest root mean square difference, over the root mean square of what is expected.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class ExportError(RuntimeError):
    """What was written does not come back as it was; the message names what differs."""


def export_student(
    checkpoint: str | Path | dict[str, Any],
    out_dir: str | Path,
    format: ExportFormat = "diffusers",
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    device: str | torch.device = "cpu",
    push_to_hub: str | None = None,
) -> Path:
    """Write the student of a checkpoint in a form that others load, and load it back.

    The pipeline is loaded a second time, what was written is read by the target's own reader, and
    the checkpoint's first held-out row is drawn again: it must be the student's image. Beside the
    weights lie ``README.md``, a model card in the hub's format, and ``samples.png``.

    =========== =======================================================================
    diffusers   pytorch_lora_weights.safetensors for ``pipe.load_lora_weights(out_dir)``
    comfyui     comfyui_lora.safetensors, in the names and with the alpha ComfyUI reads
    kohya       kohya_lora.safetensors, as sd-scripts and musubi-tuner write it
    diffsynth   diffsynth_lora.safetensors, as DiffSynth-Studio writes it
    peft        adapter_model.safetensors and adapter_config.json for ``PeftModel``
    merged      a pipeline folder for ``DiffusionPipeline.from_pretrained(out_dir)``
    =========== =======================================================================

    A pipeline with two denoisers gets two LoRA files. A student with a LoRA for every step
    (model.lora_per_step) is written in format diffusers only, as step_1.safetensors, ...; the card
    shows the call that switches them. After training with a teacher's LoRA the
    files hold the sum of both, for the plain base model. A fully trained denoiser is always
    written as merged.

    Args:
        checkpoint: Path of a Lightning checkpoint (.ckpt) of `DirectDistill`, or its content.
        out_dir: Folder to write to; made if missing.
        format: One of those above.
        dtype: Data type of the tensors: float32, bfloat16 or float16. Default: float32 for a
            LoRA, as it was trained; that of the base model for merged.
        max_shard_size: Largest file of format merged.
        device: Where the rows are drawn.
        push_to_hub: Hub repository (``user/name``) to upload the folder to; made if missing.

    Returns:
        The folder written to.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint can't be used, or can't be written in this format.
        ExportError: If what was written does not come back as it was.
    """
    if format not in get_args(ExportFormat):
        raise ValueError(f"format must be one of {', '.join(get_args(ExportFormat))}: {format!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    content = checkpoint if isinstance(checkpoint, dict) else read_checkpoint(checkpoint)
    if content["hyper_parameters"]["lora"] is None:
        if format not in ("diffusers", "merged"):
            raise ValueError(f"format {format} is for a LoRA; the whole denoiser was trained here")
        format = "merged"
    if content["hyper_parameters"].get("lora_per_step") and format != "diffusers":
        raise ValueError(
            f"format {format}: this student has a LoRA for every step (model.lora_per_step), and "
            "what reads this format draws all steps with one; use format diffusers, or train "
            "with model.lora_per_step: null"
        )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # Nothing appears that was not loaded back. Adapters are initialised at random before they are
    # filled, which a training run that goes on must not see.
    with TemporaryDirectory(dir=out_dir, prefix=".") as draft, torch.random.fork_rng(devices=[]):
        _Export(content, Path(draft), format, dtype, device).run(max_shard_size)
        for path in Path(draft).iterdir():
            _move(path, out_dir / path.name)
    if push_to_hub is not None:
        upload(out_dir, push_to_hub)
    return out_dir


def _move(path: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    path.replace(target)


def upload(folder: Path, repo_id: str) -> None:
    """Upload an export to the hub, into a repository that is made if missing."""
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
    message = "Export of lit_distill"
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)


class _Export:
    """One export on its way: what was asked for, and what the student drew."""

    def __init__(
        self,
        content: dict[str, Any],
        out: Path,
        format: str,
        dtype: str | None,
        device: str | torch.device,
    ) -> None:
        self.hyper: dict[str, Any] = content["hyper_parameters"]
        self.content = content
        self.out = out
        self.format = format
        self.device = device
        self.steps = step_names(self.hyper.get("lora_per_step") or 0)
        merged = self.hyper["torch_dtype"] if format == "merged" else "float32"
        self.dtype = DTYPES[dtype or merged]
        # Readers cast a LoRA to the base model's type.
        both = (self.dtype, DTYPES[self.hyper["torch_dtype"]])
        self.tolerance = max(TOLERANCES[dtype] for dtype in both)

    def run(self, max_shard_size: str) -> None:
        student = student_pipeline(self.content).to(self.device)
        self.facts = student_facts(self.content, student)
        examples = self.facts["examples"]
        expected = [self._draw(student, row) for row in examples]
        self.columns = [[image for _, image in expected]]
        # By the adapter's name; None: the only one.
        names: list[str | None] = [*self.steps] or [None]
        own = {name: extract_lora(student, name) for name in names}
        whole, scheduler = own, student.scheduler
        if any(own.values()):
            whole = {name: self._with_teachers(lora, student) for name, lora in own.items()}
            with adapters_disabled(torch.nn.ModuleList(denoisers(student).values())):
                self.columns.insert(0, [self._draw(student, row)[1] for row in examples])
        if self.format != "merged":
            for name, lora in whole.items():
                self._write_lora(student, lora, name)
        del student  # before it comes a second time
        if self.format == "merged":
            self._write_merged(own[None], scheduler, max_shard_size)
        fresh = self._read_back(whole)
        self._check_scheduler(fresh, scheduler)
        self._check_draw(fresh, expected[0][0])
        self._write_card(fresh)

    def _draw(
        self,
        pipe: DiffusionPipeline,
        row: dict[str, Any],
        **options: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Any]:
        """Draw one of the checkpoint's rows; of a video, the first frame is kept."""
        size = {side: row[side] for side in ("height", "width") if row[side]}
        there = torch.cuda.is_available() or row["rand_device"] == "cpu"
        generator = torch.Generator(row["rand_device"] if there else "cpu")
        latents, images = sample(
            pipe,
            prompt=[row["prompt"]],
            generator=[generator.manual_seed(row["seed"])],
            num_inference_steps=row["num_inference_steps"],
            cfg_scale=row["cfg_scale"],
            **size,
            **self.facts["call_kwargs"],
            **_conditions(row),
            **options,
        )
        image = images[0]
        while isinstance(image, list):
            image = image[0]
        return latents.float().cpu(), image

    def _with_teachers(self, lora: LoRA, student: DiffusionPipeline) -> LoRA:
        """Return the student's LoRA plus its teacher's, which plain base weights lack."""
        if self.hyper.get("teacher_lora"):
            return add_loras(read_lora(self.hyper["teacher_lora"], student), lora)
        return lora

    # Writing

    def _write_merged(self, lora: LoRA, scheduler: Any, max_shard_size: str) -> None:  # noqa: ANN401
        if lora:
            pipe = load_base_pipeline(self.hyper, torch_dtype=self.dtype)
            fuse_lora(pipe, lora)
        else:
            pipe = student_pipeline(self.content, self.dtype)
        pipe.scheduler = scheduler
        pipe.save_pretrained(self.out, max_shard_size=max_shard_size)
        facts = self.facts | {"torch_dtype": _name(self.dtype)}
        text = json.dumps(facts, indent=2, ensure_ascii=False)
        (self.out / FACTS_FILE).write_text(text + "\n", encoding="utf-8")

    def _write_lora(self, student: DiffusionPipeline, lora: LoRA, name: str | None) -> None:
        for component, weights in lora.items():
            denoiser = denoisers(student)[component]
            layout = layout_of(self.format, component, denoiser)
            state = to_state(weights, layout, denoiser)
            # An alpha is a number, not a weight: bfloat16 has no 257.
            state = {k: t if t.ndim == 0 else t.to(self.dtype) for k, t in state.items()}
            path = self._lora_path(component, student, name)
            path.parent.mkdir(exist_ok=True)
            if self.format == "diffusers":
                self._write_diffusers(student, component, state, path)
            else:
                self._save(state, path)
            if self.format == "peft":
                self._write_peft_config({component: weights}, student, path.parent)

    def _lora_path(self, component: str, pipe: DiffusionPipeline, name: str | None = None) -> Path:
        several = len(denoisers(pipe)) > 1
        if self.format == "peft":
            folder = self.out / component if several else self.out
            return folder / "adapter_model.safetensors"
        stem = "pytorch_lora_weights" if self.format == "diffusers" else f"{self.format}_lora"
        return self.out / file_name(name or stem, component, denoisers(pipe))

    def _save(self, state: dict[str, Tensor], path: str | Path) -> None:
        facts = json.dumps(self.facts, ensure_ascii=False)
        save_file(state, path, metadata={"format": "pt", METADATA_KEY: facts})

    def _write_diffusers(
        self, pipe: DiffusionPipeline, component: str, state: dict[str, Tensor], path: Path
    ) -> None:
        """Write through the pipeline's own writer, which knows one denoiser: the first."""
        writer = getattr(pipe, "save_lora_weights", None)
        first = next(iter(denoisers(pipe)))
        if writer is None or f"{first}_lora_layers" not in inspect.signature(writer).parameters:
            raise ValueError(
                f"{type(pipe).__name__} has no LoRA writer for its {first}; use format peft or "
                "merged"
            )
        bare = {key.removeprefix(f"{component}."): tensor for key, tensor in state.items()}
        layers = {f"{first}_lora_layers": bare}
        writer(path.parent, weight_name=path.name, save_function=self._save, **layers)

    def _write_peft_config(self, lora: LoRA, pipe: DiffusionPipeline, folder: Path) -> None:
        from peft import LoraConfig

        folded = {c: {n: f.folded() for n, f in weights.items()} for c, weights in lora.items()}
        config = LoraConfig(**lora_config_fields(folded, pipe))
        config.base_model_name_or_path = self.facts["base_model"]
        config.inference_mode = True
        config.save_pretrained(folder)

    # Reading back

    def _read_back(self, loras: dict[str | None, LoRA]) -> DiffusionPipeline:
        """Return a fresh pipeline into which the target's reader has loaded the export.

        Raises:
            ExportError: If the reader refuses it, or modules don't get the student's update.
        """
        if self.format == "merged":
            self.facts["verified"] = {"reader": "DiffusionPipeline.from_pretrained"}
            return load_pipeline(self.out, torch_dtype=self.dtype).to(self.device)
        fresh = load_pipeline(
            self.facts["base_model"],
            revision=self.hyper.get("revision"),
            torch_dtype=self.hyper["torch_dtype"],
        )
        reader = self._reader(fresh)
        try:
            for name, lora in loras.items():
                reader(fresh, lora, name)
        except Exception as error:
            raise ExportError(
                f"{_reader_name(reader)} refuses what was written as {self.format}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.facts["verified"] = {"reader": _reader_name(reader)}
        each = [differences(extract_lora(fresh, n), loras[n], self.tolerance) for n in loras]
        if found := list(itertools.chain(*each)):
            more = [f"... and {len(found) - 5} more"] if len(found) > 5 else []
            lines = ["modules differ after loading back:", *found[:5], *more]
            raise ExportError("\n  ".join(lines))
        return fresh.to(self.device)

    def _reader(self, pipe: DiffusionPipeline) -> Any:  # noqa: ANN401
        if self.format == "peft":
            return self._peft
        name, denoiser = next(iter(denoisers(pipe).items()))
        reads = (
            layout_of(self.format, name, denoiser).diffusers_reads and self.format != "diffsynth"
        )
        return self._diffusers if reads else self._inverse_names

    def _diffusers(self, pipe: DiffusionPipeline, lora: LoRA, name: str | None) -> None:
        """Reader: diffusers' load_lora_weights."""
        with silent_diffusers():  # it remarks on text encoders that have no LoRA
            for index, component in enumerate(lora):
                path = self._lora_path(component, pipe, name)
                options = {"adapter_name": name, "weight_name": path.name}
                place = {f"load_into_{component}": True} if index else {}
                pipe.load_lora_weights(path.parent, **options, **place)

    def _peft(self, pipe: DiffusionPipeline, lora: LoRA, _: str | None) -> None:
        """Reader: peft's PeftModel.from_pretrained."""
        from peft import PeftModel

        for component in lora:
            folder = self._lora_path(component, pipe).parent
            PeftModel.from_pretrained(denoisers(pipe)[component], folder)

    def _inverse_names(self, pipe: DiffusionPipeline, lora: LoRA, _: str | None) -> None:
        """Reader: the table of names, inverted (diffusers has no reader of this)."""
        found = read_lora(self.out, pipe)
        make_trainable(pipe, lora_config_fields(found, pipe))
        load_into_adapters(pipe, found)

    def _check_scheduler(self, fresh: DiffusionPipeline, scheduler: Any) -> None:  # noqa: ANN401
        """Give the export its own scheduler_config.json where the base model's is another."""
        if dict(fresh.scheduler.config) != dict(scheduler.config):
            self.facts["own_scheduler"] = True
            scheduler.save_pretrained(self.out)
            fresh.scheduler = type(scheduler).from_pretrained(self.out)

    def _check_draw(self, fresh: DiffusionPipeline, expected: Tensor) -> None:
        options = (
            {"callback_on_step_end": switch_adapter_callback(self.steps)} if self.steps else {}
        )
        if self.steps:
            fresh.set_adapters(self.steps[0])
        found, _ = self._draw(fresh, self.facts["examples"][0], **options)
        difference = ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
        self.facts["verified"]["difference"] = difference
        if not difference <= self.tolerance:
            raise ExportError(
                f"what was written as {self.format} draws another image than the student: its "
                f"latents differ by {difference:.1e} (root mean square, relative), more than the "
                f"rounding that is to be expected ({self.tolerance:.0e})"
            )

    def _write_card(self, pipe: DiffusionPipeline) -> None:
        from diffusers.utils import make_image_grid

        images = [image for row in zip(*self.columns, strict=True) for image in row]
        factor = max(1, 128 // max(images[0].size))
        large = [image.resize([side * factor for side in image.size], 0) for image in images]
        grid = make_image_grid(large, rows=len(self.columns[0]), cols=len(self.columns))
        grid.save(self.out / SAMPLES_FILE)
        text = model_card(self.facts, self.format, pipe, SAMPLES_FILE)
        (self.out / "README.md").write_text(text, encoding="utf-8")


def _conditions(row: dict[str, Any]) -> dict[str, Any]:
    """Return the call arguments that a row brings: pictures and texts, or a number."""
    pictures = {name: Picture(path) for name, path in row.get("pictures", {}).items()}
    return collate_calls([open_pictures(row.get("call", {}) | pictures)])


def _reader_name(reader: Any) -> str:  # noqa: ANN401
    return str(reader.__doc__).removeprefix("Reader: ").removesuffix(".")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
