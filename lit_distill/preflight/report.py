"""What preflight found: one finding for each check, and the settings that avoid the avoidable."""

from __future__ import annotations

from dataclasses import dataclass, field
from textwrap import TextWrapper
from typing import Any, Literal, NamedTuple

from lit_distill.compute.activation_checkpointing import MODES_BY_MEMORY, Checkpointing

Verdict = Literal["ok", "avoidable", "failed"]


class PreflightError(RuntimeError):
    """The pipeline failed a check; the message names check, observation and remedy."""


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        check: What should hold.
        verdict: ``"ok"``, ``"avoidable"`` by the setting in `remedy`, or ``"failed"``.
        observed: What was observed.
        remedy: What to do about it.
    """

    check: str
    verdict: Verdict
    observed: str
    remedy: str = ""


@dataclass
class Report:
    """The results of all checks.

    Attributes:
        pipeline: Name of the pipeline's class.
        findings: One entry for each check.
        settings: Arguments of `DirectDistill` that avoid the avoidable: ``checkpointing``,
            ``freeze``, ``train_mode``, ``rollout_batch_size``.
        keep_gradient: Checkpointing modes that were tried and do not change the gradient: the one
            that training uses, or all of them if it is to be chosen (auto).
    """

    pipeline: str
    findings: list[Finding] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    keep_gradient: tuple[Checkpointing, ...] = MODES_BY_MEMORY

    def raise_failures(self) -> None:
        """Raise an error if any check failed that no setting avoids.

        Raises:
            PreflightError: Naming every failed check, what was observed and what to do.
        """
        failed = [finding for finding in self.findings if finding.verdict == "failed"]
        if failed:
            lines = [f"{self.pipeline} did not pass preflight:"]
            lines += [f"  {f.check}: {f.observed}. {f.remedy}".rstrip() for f in failed]
            raise PreflightError("\n".join(lines))

    def __str__(self) -> str:
        lines = [f"{self.pipeline}:"]
        for finding in self.findings:
            lines += _wrapped(f"  {finding.verdict:9}  ", f"{finding.check}: {finding.observed}")
            if finding.remedy:
                lines += _wrapped(" " * 13, finding.remedy)
        return "\n".join(lines)


def _wrapped(start: str, text: str) -> list[str]:
    """Return a text as lines of a terminal, indented as it starts."""
    wrapper = TextWrapper(79, start, " " * len(start))
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.wrap(text)
