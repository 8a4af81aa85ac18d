"""Quantisation of the denoisers' frozen weights, with diffusers' quantizers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from lit_distill.errors import InputError


def quantization_config(fields: dict[str, Any], denoisers: Iterable[str]) -> Any:  # noqa: ANN401
    """Return the ``quantization_config`` with which a pipeline loads its denoisers quantised.

    Args:
        fields: ``quant_backend``, a name that diffusers knows (``bitsandbytes_4bit``, ``torchao``,
            ...), and ``quant_kwargs``, the arguments of that backend's configuration in diffusers.
            torchao's ``quant_type`` is given by name: ``Int8WeightOnlyConfig``.
        denoisers: Names of the pipeline's components to quantise, such as ``transformer``.

    Returns:
        A `diffusers.PipelineQuantizationConfig`.

    Raises:
        ValueError: If a field, the backend or one of its arguments is unknown.
        ImportError: If the backend's library is not installed.
    """
    from diffusers import PipelineQuantizationConfig
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    _refuse_unknown("field", fields, ("quant_backend", "quant_kwargs"))
    backend, arguments = fields.get("quant_backend"), dict(fields.get("quant_kwargs") or {})
    _refuse_unknown("quant_backend", [backend], AUTO_QUANTIZATION_CONFIG_MAPPING)
    config_class = AUTO_QUANTIZATION_CONFIG_MAPPING[backend]
    # Some classes accept any argument and only log those that they ignore.
    accepted = set(inspect.signature(config_class).parameters) - {"kwargs"}
    _refuse_unknown("quant_kwargs", arguments, accepted)
    if backend == "torchao":
        arguments["quant_type"] = _torchao_type(arguments.get("quant_type"))
    try:
        # One configuration for all components would have to suit transformers' models, too.
        mapping = {key: config_class(**arguments) for key in denoisers}
        return PipelineQuantizationConfig(quant_mapping=mapping)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.quantization: {error}") from error


def _refuse_unknown(kind: str, given: Any, accepted: Any) -> None:  # noqa: ANN401
    for value in given:
        if value not in accepted:
            raise InputError(
                f"model.quantization: unknown {kind} {value!r}; accepted: "
                + ", ".join(sorted(accepted))
            )


def _torchao_type(name: str | None) -> Any:  # noqa: ANN401
    try:
        from torchao import quantization
    except ImportError as error:
        raise ImportError(
            "model.quantization: quant_backend torchao needs the package torchao: "
            "pip install 'lit-distill[quant]'"
        ) from error
    types = [name for name in dir(quantization) if name.endswith("Config")]
    _refuse_unknown("quant_type of torchao", [name], types)
    return getattr(quantization, str(name))()
