"""provenance.json: how the pairs of a folder were generated, recorded and compared on resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_distill.adapters.lora_files import read_lora
from lit_distill.data.filesystem import open_file
from lit_distill.data.whole_files import write_file
from lit_distill.encoding.fingerprint import fingerprint
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.hooks import read_schedule
from lit_distill.pipelines.model_digest import model_digest
from lit_distill.teacher.pair_writer import FOLDERS, METADATA_FILE, PairWriter
from lit_distill.teacher.prompts import Pair
from lit_distill.teacher.teacher import Teacher

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


PROVENANCE_FILE = "provenance.json"

PIPELINE_KEY = "drawn_with"
"""Key of the facts about the loaded pipeline, `pipeline_facts`."""

METADATA_KEY = "metadata_sha256"
"""Key of the SHA-256 of the table that was written."""

PACKAGES = ("lit-distill", "torch", "diffusers", "transformers", "lightning")


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """Return how the pairs of a folder or URL were generated; None if that is not recorded.

    Raises:
        InputError: If the record is damaged.
    """
    try:
        with open_file(f"{folder}/{PROVENANCE_FILE}") as stream:
            provenance = json.loads(stream.read().decode())
        if not isinstance(provenance, dict):
            raise InputError("not an object")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{folder}/{PROVENANCE_FILE} is damaged: {error}. It records how the pairs of this "
            "folder were generated: restore it from a copy; without one, remove it for "
            "`check` and `test`, and generate into another folder"
        ) from error
    return provenance


def recorded_teacher(provenance: dict[str, Any], **changes: Any) -> Teacher:  # noqa: ANN401
    """Return the teacher of a provenance file, with some settings changed.

    Raises:
        InputError: If settings are missing or of the wrong type.
    """
    names = {field.name for field in fields(Teacher)}
    try:
        return Teacher(**{k: v for k, v in provenance.items() if k in names} | changes)
    except TypeError as error:
        raise InputError(f"{PROVENANCE_FILE} holds no teacher's settings: {error}") from error


def record_settings(writer: PairWriter, *, write: bool) -> None:
    """Record the teacher and the pairs of a data set, or compare them with what is recorded.

    Args:
        writer: The data set.
        write: Whether this process writes; the others only compare.

    Raises:
        InputError: If the folder holds pairs with other settings, naming the differences, or files
            that `generate` did not write.
        OSError: If the folder can't be written.
    """
    teacher, out = writer.teacher, writer.out
    rows = [[*pair, teacher.size(pair)] for pair in writer.with_input_paths(writer.pairs)]
    facts = asdict(teacher) | {
        "rows": len(rows),
        "rows_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }
    versions = {name: version(name) for name in PACKAGES}
    recorded = read_provenance(out)
    _check_ours(writer, recorded)
    # A folder without pairs is not compared: the settings of a first attempt may have failed.
    recorded = recorded if writer.has_pairs() else None
    if recorded is not None:
        _compare(out, recorded, facts)
        before = recorded.get("versions")
        if before != versions:
            rank_zero_warn(f"{out} was started with {before}, now {versions}: bits may differ")
    if write:
        writer.create_folders(*FOLDERS[: 3 if writer.inputs else 2])
        if recorded is None:
            _write_provenance(out, facts | {"versions": versions})


def _check_ours(writer: PairWriter, recorded: dict[str, Any] | None) -> None:
    """Check that what a folder holds was written by `generate`.

    Raises:
        InputError: If it was not; names what is there.
    """
    out = writer.out
    if recorded is None and writer.has_pairs():
        names = [n for n in (METADATA_FILE, *FOLDERS[:2]) if (out / n).exists()]
        raise InputError(
            f"{out} holds {', '.join(names)}, but no {PROVENANCE_FILE}: they were not written by "
            "`generate`; nothing is overwritten: write to another folder"
        )
    if recorded is not None and "rows_sha256" not in recorded:
        raise InputError(
            f"{out / PROVENANCE_FILE} was not written by `generate`; nothing is overwritten: write "
            "to another folder"
        )


def record_metadata(out: Path, sha256: str) -> None:
    """Record which table was written, so that a changed one is never overwritten."""
    recorded = read_provenance(out) or {}
    if recorded.get(METADATA_KEY) != sha256:
        _write_provenance(out, recorded | {METADATA_KEY: sha256})


def record_pipeline(out: Path, facts: dict[str, Any]) -> None:
    """Record the facts about the loaded pipeline, or compare them with those recorded.

    Raises:
        InputError: If the recorded pipeline was another one; names the differences.
    """
    recorded = read_provenance(out) or {}
    if PIPELINE_KEY in recorded:
        before = recorded[PIPELINE_KEY]
        # Earlier versions recorded fewer facts.
        _compare(out, before, {name: fact for name, fact in facts.items() if name in before})
    else:
        _write_provenance(out, recorded | {PIPELINE_KEY: facts})


def pipeline_facts(
    teacher: Teacher, pipe: DiffusionPipeline, examples: Sequence[Pair]
) -> dict[str, Any]:
    """Return what a loaded pipeline samples with, as plain JSON.

    Args:
        teacher: The settings of the teacher.
        pipe: Its pipeline, `teacher.load()`.
        examples: One pair of each size.

    Returns:
        The scheduler's class and configuration; for each size, the timesteps and sigmas that the
        pipeline sets; digests of the denoisers and of the LoRA.
    """
    config = {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_"}
    schedules = {}
    for pair in examples:
        size = teacher.size(pair)
        name = "default" if size is None else f"{size[0]}x{size[1]}"
        # Six digits, since the last ones depend on the device and on versions.
        schedules[name] = {
            kind: [float(f"{value:.6g}") for value in values.tolist()]
            for kind, values in read_schedule(pipe, partial(teacher.sample, pipe, [pair])).items()
        }
    facts = {
        "scheduler": {"class": type(pipe.scheduler).__name__, "config": config},
        "schedules": schedules,
        "model_digests": _model_digests(teacher, pipe),
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def _model_digests(teacher: Teacher, pipe: DiffusionPipeline) -> dict[str, str]:
    """Return a digest of each denoiser and, if there is one, of the LoRA fused into them.

    The sums of weights and LoRA don't count, since their last bits depend on the machine. Nor do
    quantised weights, whose digests would be those of the library's layout.
    """
    if teacher.quantization:
        return {}
    lora = read_lora(teacher.lora, pipe) if teacher.lora else {}
    digests = {
        name: model_digest(network, without={f"{module}.weight" for module in lora.get(name, {})})
        for name, network in denoisers(pipe).items()
    }
    if lora:
        plain = {k: {n: tuple(f) for n, f in weights.items()} for k, weights in lora.items()}
        digests["lora"] = fingerprint(plain)
    return digests


def _write_provenance(out: Path, provenance: dict[str, Any]) -> None:
    text = json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
    write_file(out / PROVENANCE_FILE, text.encode())


def _compare(out: Path, recorded: dict[str, Any], facts: dict[str, Any]) -> None:
    differences = [
        f"{name} was {_shorten(recorded.get(name))}, now {_shorten(value)}"
        for name, value in facts.items()
        if recorded.get(name) != value
    ]
    if differences:
        raise InputError(
            f"{out} holds pairs made with other settings ({'; '.join(differences)}); write to "
            "another folder, or delete this one"
        )


def _shorten(value: Any) -> str:  # noqa: ANN401
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
