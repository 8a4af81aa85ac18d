"""The files of a data set of pairs: images, latents, copies of input pictures, metadata.csv."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from torch import Tensor

from lit_distill.data.filesystem import files_exist, open_file
from lit_distill.data.images import Picture, image_size
from lit_distill.teacher.prompts import Pair
from lit_distill.teacher.teacher import Teacher

METADATA_FILE = "metadata.csv"

FOLDERS = ("images", "latents", "inputs")


class PairWriter:
    """Writes a data set of pairs to a folder.

    Every file appears only when it is complete, and existing files are kept.

    Args:
        teacher: The settings that the pairs are generated with.
        pairs: All pairs of the data set.
        out: The folder.

    Attributes:
        inputs: The pictures that come with the prompts -> their paths in the data set, named by
            content.
    """

    def __init__(self, teacher: Teacher, pairs: list[Pair], out: Path) -> None:
        self.teacher = teacher
        self.pairs = pairs
        self.out = out
        self.inputs = _input_paths(pairs)

    def with_input_paths(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return pairs with their pictures replaced by paths in the data set."""
        return [
            pair._replace(call={name: self.inputs.get(v, v) for name, v in pair.call.items()})
            for pair in pairs
        ]

    def unfinished(self) -> list[Pair]:
        """Return the pairs whose image or latents are missing."""
        paths = [str(path) for pair in self.pairs for path in pair.files(self.out)]
        exist = files_exist(paths)
        return [
            pair
            for pair, *both in zip(self.pairs, exist[::2], exist[1::2], strict=True)
            if not all(both)
        ]

    def create_folders(self) -> None:
        """Create the folders and delete temporary files of a run that was killed.

        Raises:
            OSError: If a folder can't be created.
        """
        try:
            for folder in FOLDERS[: 3 if self.inputs else 2]:
                (self.out / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"{self.out} can't be written: {error.strerror}") from error
        for folder in ("", *FOLDERS):
            for temporary in (self.out / folder).glob(".*.tmp"):
                temporary.unlink(missing_ok=True)

    def copy_inputs(self) -> None:
        """Copy the pictures that come with the prompts into the data set."""
        for picture, name in self.inputs.items():
            if not (self.out / name).is_file():
                with open_file(picture) as stream:
                    write_atomically(self.out / name, stream.read())

    def write_pair(self, pair: Pair, image: Any, tensors: dict[str, Tensor]) -> None:  # noqa: ANN401
        """Write the image, or the frames, and the latents of a pair.

        Args:
            pair: The pair, as returned by `with_input_paths`.
            image: A `PIL.Image.Image`, or a list of frames.
            tensors: The tensors of the file of latents, by name.
        """
        image_path, latents_path = pair.files(self.out)
        if not latents_path.is_file():
            contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            write_atomically(latents_path, save(contiguous))
        if not image_path.is_file():
            facts = asdict(self.teacher)
            facts |= {"prompt": pair.prompt, "seed": pair.seed, "call": pair.call}
            note = PngInfo()
            note.add_itxt("lit_distill", json.dumps(facts, ensure_ascii=False))
            # A video is an animated PNG: lossless, a single file, shown by any browser.
            first, *rest = image if isinstance(image, list) else [image]
            animation = {"save_all": True, "append_images": rest, "duration": 62} if rest else {}
            data = io.BytesIO()
            first.save(data, format="PNG", pnginfo=note, **animation)
            write_atomically(image_path, data.getvalue())

    def write_metadata(self) -> Path:
        """Write the table of all pairs and return its path."""
        path = self.out / METADATA_FILE
        write_atomically(path, self._metadata().encode())
        return path

    def _metadata(self) -> str:
        teacher, pairs = self.teacher, self.pairs
        files = [pair.files(self.out) for pair in pairs]
        # An image of several frames is no target for training; its exact latents are.
        with Image.open(files[0][0]) as first:
            kind = "video" if getattr(first, "is_animated", False) else "image"

        def size(pair: Pair, image: Path) -> tuple[int | str, int | str]:
            # The pipeline's default size is written, too: reading the table then opens no image.
            return teacher.size(pair) or (("", "") if kind == "video" else image_size(image))

        sizes = [size(pair, image) for pair, (image, _) in zip(pairs, files, strict=True)]
        table = pd.DataFrame(
            {
                kind: [image.relative_to(self.out).as_posix() for image, _ in files],
                "prompt": [pair.prompt for pair in pairs],
                "seed": [pair.seed for pair in pairs],
                "rand_device": teacher.rand_device,
                "num_inference_steps": teacher.student_num_inference_steps,
                "cfg_scale": f"{teacher.student_cfg_scale:g}",
                "latents": [latents.relative_to(self.out).as_posix() for _, latents in files],
                "height": [height for height, _ in sizes],
                "width": [width for _, width in sizes],
                "teacher_model": teacher.model,
                "teacher_num_inference_steps": teacher.num_inference_steps,
                "teacher_cfg_scale": f"{teacher.cfg_scale:g}",
                **{
                    column: [pair.call[argument] for pair in self.with_input_paths(pairs)]
                    for argument, column in teacher.call_columns.items()
                },
            }
        )
        return str(table.to_csv(index=False))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that appears only when it is complete.

    Raises:
        OSError: If it can't be written; names the file and the reason.
    """
    # The process number prevents several ranks from writing to the same temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        reason = f"{path} can't be written: {error.strerror}; finished pairs are kept"
        raise OSError(error.errno, f"{reason}, run the same command again to resume") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _input_paths(pairs: Sequence[Pair]) -> dict[Picture, str]:
    pictures = {v for pair in pairs for v in pair.call.values() if isinstance(v, Picture)}
    paths = {}
    for picture in sorted(pictures):
        with open_file(picture) as stream:
            digest = hashlib.sha256(stream.read()).hexdigest()[:16]
        paths[picture] = f"inputs/{digest}{Path(picture).suffix.lower()}"
    return paths
