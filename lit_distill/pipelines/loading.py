"""Loads a diffusers pipeline by hub id, folder, or the name of an embedded pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.errors import InputError
from lit_distill.pipelines.components import select_denoisers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


TINY_DIGITS, TINY_WORDS = "tiny-digits", "tiny-words"
"""Names of the embedded pipelines, accepted wherever a hub id or a folder is."""

EMBEDDED = {TINY_DIGITS: "tiny", TINY_WORDS: "words"}
"""Their folders in `lit_distill/assets`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    torch_dtype: torch.dtype | str = torch.float32,
    **components: Any,  # noqa: ANN401
) -> DiffusionPipeline:
    """Load a pipeline as `DiffusionPipeline.from_pretrained` does, or an embedded one.

    Args:
        name_or_path: Hub id, folder in diffusers' layout, or one of the embedded pipelines:
            ``"tiny-digits"``, a `QwenImagePipeline` that generates 32x32 handwritten digits, or
            ``"tiny-words"``, one that draws four-letter words, with ``height=32, width=64``.
        revision: Branch, tag or commit of the hub repository.
        torch_dtype: Data type of the weights: a `torch.dtype`, or one of ``"float32"``,
            ``"bfloat16"``, ``"float16"``.
        **components: Components to use instead of those of the pipeline.

    Returns:
        The pipeline on the CPU, every component in evaluation mode.

    Raises:
        InputError: If `torch_dtype` is not one of the names above.
        ImportError: If the pipeline needs a package that is not installed.
        OSError: If the pipeline is neither a folder nor available from the hub.
    """
    from diffusers import DiffusionPipeline

    if isinstance(torch_dtype, str):
        if torch_dtype not in DTYPES:
            raise InputError(f"torch_dtype must be one of {', '.join(DTYPES)}, got {torch_dtype!r}")
        torch_dtype = DTYPES[torch_dtype]
    source = pipeline_source(name_or_path)
    options = {"revision": revision, "dtype": torch_dtype, **components}
    with _missing_packages_named(name_or_path, revision):
        try:
            pipe = DiffusionPipeline.from_pretrained(source, **options)
        except (OSError, ValueError):
            variant = _only_variant(source, revision)
            if variant is None:
                raise
            pipe = DiffusionPipeline.from_pretrained(source, variant=variant, **options)
    _read_default_size(pipe)
    return pipe


def _read_default_size(pipe: DiffusionPipeline) -> None:
    """Set the size that the pipeline generates by default, if a component's configuration has it.

    QwenImage's and other classes have one default for all checkpoints. A small model says
    otherwise by the field ``_default_sample_size``, in latent pixels; diffusers ignores the field
    and saves it again.
    """
    for component in pipe.components.values():
        config = getattr(component, "config", None)
        size = config.get("_default_sample_size") if isinstance(config, Mapping) else None
        if size is not None:
            pipe.default_sample_size = size


@contextmanager
def _missing_packages_named(name_or_path: str | Path, revision: str | None) -> Iterator[None]:
    """Replace the errors of pipelines whose tokenizer needs a package by one that names it.

    diffusers loads a stand-in for a class whose packages are missing, which fails in other ways;
    transformers asks for tiktoken where SentencePiece is missing.
    """
    try:
        yield
    except Exception as error:
        text = str(error).lower()
        missing = {p for p in _required_packages(name_or_path, revision) if find_spec(p) is None}
        if find_spec("sentencepiece") is None and ("sentencepiece" in text or "tiktoken" in text):
            missing.add("sentencepiece")
        if not missing:
            raise
        packages = " ".join(sorted(missing))
        if missing == {"sentencepiece"}:
            packages = "'lit-distill[tokenizers]'"
        raise ImportError(
            f"{name_or_path} needs {', '.join(sorted(missing))}, which is not installed; "
            f"pip install {packages}"
        ) from error


def _required_packages(name_or_path: str | Path, revision: str | None) -> set[str]:
    """Return the packages whose absence keeps diffusers from importing the pipeline's class."""
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(
            pipeline_source(name_or_path), revision=revision
        )
    except (OSError, ValueError):  # the caller has the better error
        return set()
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    return set(kind.__dict__.get("_backends", ())) if isinstance(kind, type) else set()


def _only_variant(source: str, revision: str | None) -> str | None:
    """Return the variant (fp16, ...) of the weights if a pipeline has weights of one variant only.

    `DiffusionPipeline.from_pretrained` looks for weights without a variant.
    """
    if Path(source).is_dir():
        names = [path.name for path in Path(source).rglob("*.safetensors")]
    else:
        from huggingface_hub import list_repo_files

        names = []
        with suppress(Exception):  # no such repository, or no network: diffusers' error is raised
            names = [Path(name).name for name in list_repo_files(source, revision=revision)]
            names = [name for name in names if name.endswith(".safetensors")]
    matches = [re.search(r"\.(\w+?)(-\d+-of-\d+)?\.safetensors$", name) for name in names]
    variants = {match[1] if match else None for match in matches}
    return variants.pop() if len(variants) == 1 else None


def pipeline_source(name_or_path: str | Path) -> str:
    """Return the hub id or folder of a pipeline; of an embedded one its folder in the package."""
    name = str(name_or_path)
    if name in EMBEDDED:
        return str(files("lit_distill").joinpath("assets", EMBEDDED[name]))
    return name


def denoiser_classes(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Return the classes of the denoisers that `load_pipeline` would load, by name."""
    import diffusers

    source = pipeline_source(name_or_path)
    index = diffusers.DiffusionPipeline.load_config(source, revision=revision)
    names = {key: str(entry[1]) for key, entry in index.items() if isinstance(entry, list)}
    classes = {key: getattr(diffusers, name, None) for key, name in names.items()}
    models = {k: v for k, v in classes.items() if diffusers.ModelMixin in getattr(v, "__mro__", ())}
    return select_denoisers(models)
