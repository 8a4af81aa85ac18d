"""The settings of a LoRA file, from peft's adapter_config.json or diffusers' metadata.

Settings that make an adapter more than two factors and an alpha are refused by name: without them
the file would be read, but as another update than the one that was trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lit_distill.data.text import decode, parse_json, shorten
from lit_distill.errors import InputError

CONFIG_FILE = "adapter_config.json"

_METADATA_KEY = "lora_adapter_metadata"
"""diffusers' metadata key of the settings."""

_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_dropout", "rank_pattern"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config"),
}
"""Fields of `peft.LoraConfig` that the weights do not depend on once they are trained."""

_READ = {"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"}

_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the base model's weights as they are."""

_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\\[-_]|\\d\+?|\[0-9\]\+?|\.[*+])*\$?")
"""Patterns that are matched: names with wildcards, which can't take more than a moment."""

_MAX_WILDCARDS = 2


class LoraSettings(NamedTuple):
    """What a LoRA file records beside its weights.

    Attributes:
        alpha: Alpha of all modules without one in `patterns`; None: not recorded.
        patterns: Expressions for ends of module names, with the alpha of these modules.
        rank_stabilized: Whether alpha is divided by the square root of the rank.
    """

    alpha: float | None = None
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()
    rank_stabilized: bool = False

    def alpha_of(self, module: str, rank: int) -> float | None:
        """Return the alpha of a module as a scale times the rank; None if it is not recorded."""
        if self.alpha is None:
            return None
        matching = (alpha for pattern, alpha in self.patterns if pattern.fullmatch(module))
        return next(matching, self.alpha) * (math.sqrt(rank) if self.rank_stabilized else 1.0)


def read_settings(path: Path, metadata: Mapping[str, str], component: str) -> LoraSettings:
    """Return the settings of a LoRA file.

    Args:
        path: The file. One of peft's, adapter_model.safetensors, has its settings beside it.
        metadata: Metadata of the file.
        component: Name of the denoiser in the pipeline.

    Raises:
        InputError: If they are missing or damaged, or the adapter is not a plain LoRA.
    """
    if path.name == "adapter_model.safetensors":
        config = path.with_name(CONFIG_FILE)
        if not config.is_file():
            raise InputError(
                f"{path} needs peft's adapter_config.json beside it, which has its alpha"
            )
        fields = _parse_object(config.read_bytes(), str(config))
        if fields.get("lora_alpha") is None:
            raise InputError(f"{config} has no lora_alpha")
        return _settings(fields, str(config))
    where = f"metadata {_METADATA_KEY} of {path}"
    stored = _parse_object(metadata.get(_METADATA_KEY, "{}").encode(), where)
    prefix = f"{component}."
    return _settings(
        {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}, where
    )


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = parse_json(decode(data))
    except ValueError as error:
        raise InputError(f"{where} is not JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a JSON object, got {shorten(value)}")
    return value


def _settings(fields: dict[str, Any], where: str) -> LoraSettings:
    _check_plain_lora(fields, where)
    patterns = fields.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{where}: alpha_pattern must be an object, got {shorten(patterns)}")
    alpha = fields.get("lora_alpha")
    return LoraSettings(
        None if alpha is None else _finite(alpha, "lora_alpha", where),
        tuple(
            (_compile(key, where), _finite(value, f"alpha_pattern[{shorten(key)}]", where))
            for key, value in patterns.items()
        ),
        fields.get("use_rslora") is True,
    )


def _check_plain_lora(fields: dict[str, Any], where: str) -> None:
    kind = fields.get("peft_type", "LORA")
    if fields.get("use_dora"):
        kind = "DoRA"
    if kind not in ("LORA", None):
        raise InputError(
            f"{where}: this kind of adapter is not supported: {shorten(kind)}; only plain LoRA is"
        )
    init = fields.get("init_lora_weights")
    if not isinstance(init, str | bool | None) or init not in _PLAIN_INITS:
        raise InputError(
            f"{where}: init_lora_weights is {shorten(init)}, which has changed the base model's "
            "weights, too. Convert it to a plain LoRA: peft's save_pretrained with "
            "path_initial_model_for_weight_conversion"
        )
    if fields.get("use_rslora") not in (None, True, False):
        raise InputError(f"{where}: use_rslora must be true or false")
    others = {k: v for k, v in fields.items() if k not in _WITHOUT_EFFECT | _READ}
    if fields.get("bias", "none") not in ("none", None):
        others["bias"] = fields["bias"]
    for name, value in others.items():
        if value:
            raise InputError(
                f"{where}: {shorten(name)} is {shorten(value)}, which is not supported; only plain "
                "LoRA is"
            )


def _finite(value: Any, name: str, where: str) -> float:  # noqa: ANN401
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) < 1e30:
        raise InputError(f"{where}: {name} must be a finite number, got {shorten(value)}")
    return float(value)


def _compile(pattern: str, where: str) -> re.Pattern[str]:
    """Return peft's meaning of a pattern: it matches the end of a name after a dot, or all of it.

    Raises:
        InputError: If it is an expression that could take for ever, or none at all.
    """
    simple = len(pattern) <= 10_000 and all(
        _PATTERN.fullmatch(part) and len(re.findall(r"[*+]", part)) <= _MAX_WILDCARDS
        for part in pattern.split("|")
    )
    if not simple:
        raise InputError(
            f"{where}: alpha_pattern has the expression {shorten(pattern)}; only names with "
            rf"wildcards (\d+, .*, at most {_MAX_WILDCARDS}) are read, joined by |"
        )
    return re.compile(rf"(.*\.)?({pattern})")
