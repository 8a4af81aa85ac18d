"""The files of a data set of pairs: images, latents, copies of input pictures, metadata.csv."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lit_distill.data.filesystem import THREADS, open_file, sha256_of
from lit_distill.data.images import Picture, image_size
from lit_distill.data.latents_file import latents_content
from lit_distill.data.table_output import csv_content
from lit_distill.data.whole_files import remove_temporary_files, write_file
from lit_distill.errors import InputError
from lit_distill.teacher.finished import NOTE_KEY, is_finished_image, is_finished_latents
from lit_distill.teacher.prompts import Pair
from lit_distill.teacher.teacher import Teacher

METADATA_FILE = "metadata.csv"

FOLDERS = ("images", "latents", "inputs")


class PairWriter:
    """Writes a data set of pairs to a folder.

    Every file appears only when it is complete and on the disk. Finished files are kept, damaged
    ones are replaced, and those of somebody else are never touched.

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
        self._finished: set[int] = set()

    def with_input_paths(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return pairs with their pictures replaced by paths in the data set."""
        return [
            pair._replace(call={name: self.inputs.get(v, v) for name, v in pair.call.items()})
            for pair in pairs
        ]

    def unfinished(self) -> list[Pair]:
        """Return the pairs whose image or latents are missing or damaged.

        Files are read, but each only once: those of a pair that was finished are not read again.

        Raises:
            InputError: If an image of somebody else is in the way.
        """

        def is_finished(pair: Pair) -> bool:
            image, latents = pair.files(self.out)
            return is_finished_image(image, pair) and is_finished_latents(latents)

        unknown = [pair for pair in self.pairs if pair.number not in self._finished]
        with ThreadPoolExecutor(THREADS) as pool:
            finished = list(pool.map(is_finished, unknown))
        self._finished |= {p.number for p, done in zip(unknown, finished, strict=True) if done}
        return [pair for pair, done in zip(unknown, finished, strict=True) if not done]

    def damaged(self) -> list[str]:
        """Return the files of unfinished pairs that exist and are not whole."""
        found = []
        for pair in self.unfinished():
            image, latents = pair.files(self.out)
            found += [image] if image.is_file() and not is_finished_image(image, pair) else []
            found += [latents] if latents.is_file() and not is_finished_latents(latents) else []
        return [path.relative_to(self.out).as_posix() for path in found]

    def has_pairs(self) -> bool:
        """Return whether the folder holds what a data set consists of, whoever has written it."""
        return (self.out / METADATA_FILE).exists() or any(
            path.is_file() for folder in FOLDERS[:2] for path in (self.out / folder).glob("[!.]*")
        )

    def create_folders(self, *names: str) -> None:
        """Create the data set's folder, and folders in it.

        Raises:
            OSError: If a folder can't be created.
        """
        try:
            for name in ("", *names):
                (self.out / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"{self.out} can't be written: {error.strerror}") from error

    def remove_temporary_files(self) -> None:
        """Remove what a killed run has left; only for the process that holds the folder."""
        for folder in ("", *FOLDERS):
            remove_temporary_files(self.out / folder)

    def check_texts(self) -> None:
        """Check before anything is generated that the table can be written.

        Raises:
            InputError: If a text can't be stored; names its row.
        """
        csv_content(pd.DataFrame(self._texts()), "prompts")

    def check_metadata(self, recorded: str | None) -> None:
        """Check that an existing table may be replaced.

        Args:
            recorded: SHA-256 of the table that was written to this folder, if known.

        Raises:
            InputError: If it is somebody else's, or was changed since.
        """
        path = self.out / METADATA_FILE
        if not path.exists() or (path.is_file() and sha256_of(path) == recorded):
            return
        if self.unfinished() or path.read_bytes() != self._metadata():
            raise InputError(
                f"{path} is not as `generate` writes it; nothing is overwritten: move it away to "
                "have it written again, or write to another folder"
            )

    def copy_inputs(self) -> None:
        """Copy the pictures that come with the prompts into the data set."""
        for picture, name in self.inputs.items():
            if not _is_input(self.out / name):
                with open_file(picture) as stream:
                    write_file(self.out / name, stream.read())

    def write_pair(self, pair: Pair, image: Any, tensors: dict[str, Tensor]) -> None:  # noqa: ANN401
        """Write the image, or the frames, and the latents of a pair.

        Args:
            pair: The pair, as returned by `with_input_paths`.
            image: A `PIL.Image.Image`, or a list of frames.
            tensors: The tensors of the file of latents, by name.
        """
        image_path, latents_path = pair.files(self.out)
        if not is_finished_latents(latents_path):
            _write(latents_path, latents_content(tensors))
        if not is_finished_image(image_path, pair):
            facts = asdict(self.teacher)
            facts |= {"prompt": pair.prompt, "seed": pair.seed, "call": pair.call}
            note = PngInfo()
            note.add_itxt(NOTE_KEY, json.dumps(facts, ensure_ascii=False))
            # A video is an animated PNG: lossless, a single file, shown by any browser.
            first, *rest = image if isinstance(image, list) else [image]
            animation = {"save_all": True, "append_images": rest, "duration": 62} if rest else {}
            data = io.BytesIO()
            first.save(data, format="PNG", pnginfo=note, **animation)
            _write(image_path, data.getvalue())

    def write_metadata(self) -> str:
        """Write the table of all pairs and return its SHA-256."""
        content = self._metadata()
        write_file(self.out / METADATA_FILE, content)
        return hashlib.sha256(content).hexdigest()

    def _metadata(self) -> bytes:
        teacher, pairs = self.teacher, self.pairs
        files = [pair.files(self.out) for pair in pairs]
        # An image of several frames is no target for training; its exact latents are.
        with Image.open(files[0][0]) as first:
            kind = "video" if getattr(first, "is_animated", False) else "image"

        def size(pair: Pair, image: Path) -> tuple[int | str, int | str]:
            # The pipeline's default size is written, too: reading the table then opens no image.
            return teacher.size(pair) or (("", "") if kind == "video" else image_size(image))

        sizes = [size(pair, image) for pair, (image, _) in zip(pairs, files, strict=True)]
        texts = self._texts()
        columns = {
            kind: [image.relative_to(self.out).as_posix() for image, _ in files],
            "prompt": texts.pop("prompt"),
            "seed": [pair.seed for pair in pairs],
            "rand_device": teacher.rand_device,
            "num_inference_steps": teacher.student_num_inference_steps,
            "cfg_scale": f"{teacher.student_cfg_scale:g}",
            "latents": [latents.relative_to(self.out).as_posix() for _, latents in files],
            "height": [height for height, _ in sizes],
            "width": [width for _, width in sizes],
            "teacher_model": texts.pop("teacher_model"),
            "teacher_num_inference_steps": teacher.num_inference_steps,
            "teacher_cfg_scale": f"{teacher.cfg_scale:g}",
            **texts,
        }
        return csv_content(pd.DataFrame(columns), METADATA_FILE)

    def _texts(self) -> dict[str, Any]:
        """Return the columns of the table that hold what users have written."""
        columns = self.teacher.call_columns.items()
        pairs = self.with_input_paths(self.pairs)
        return {
            "prompt": [pair.prompt for pair in pairs],
            "teacher_model": [self.teacher.model] * len(pairs),
            **{column: [pair.call[argument] for pair in pairs] for argument, column in columns},
        }


def _write(path: Path, content: bytes) -> None:
    """Write a file of a pair.

    Raises:
        OSError: If it can't be written; names the file, the reason and the remedy.
    """
    try:
        write_file(path, content)
    except OSError as error:
        text = f"{error.strerror}; finished pairs are kept, run the same command again to resume"
        raise OSError(error.errno, text) from error


def _is_input(path: Path) -> bool:
    """Return whether a copy of a picture is there and whole: its name is that of its content."""
    return path.is_file() and sha256_of(path).startswith(path.stem)


def _input_paths(pairs: Sequence[Pair]) -> dict[Picture, str]:
    pictures = {v for pair in pairs for v in pair.call.values() if isinstance(v, Picture)}
    paths = {}
    for picture in sorted(pictures):
        with open_file(picture) as stream:
            digest = hashlib.sha256(stream.read()).hexdigest()[:16]
        paths[picture] = f"inputs/{digest}{picture.suffix()}"
    return paths
