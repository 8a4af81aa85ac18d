"""Reports of preflight on disk: the same pipeline with the same settings is checked once."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, get_args

from lit_distill.compute.activation_checkpointing import Checkpointing
from lit_distill.data.whole_files import write_file
from lit_distill.errors import InputError
from lit_distill.preflight.report import Finding, Report, Verdict

FOLDER = "preflight-v1"
"""Folder of the reports, inside the folder that the user names."""


class RememberedReport:
    """A report in a file that is named after all that it depends on.

    Processes that write it at the same time write the same: each file appears whole.

    Args:
        folder: Folder in which the folder of the reports is created.
        digest: Digest of all that the report depends on.
    """

    def __init__(self, folder: str | Path, digest: str) -> None:
        self.path = Path(folder) / FOLDER / f"{digest}.json"

    def read(self) -> Report | None:
        """Return the report; None if there is none, or, with a warning, if it is damaged."""
        try:
            content = json.loads(self.path.read_bytes())
            if content["sha256"] != _sha256(content["report"]):
                raise InputError("its checksum does not match")
            return _report(content["report"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            warnings.warn(
                f"{self.path} can't be used ({error}): preflight runs again", stacklevel=2
            )
            return None

    def write(self, report: Report) -> None:
        """Store a report in which nothing has failed."""
        plain = {
            "pipeline": report.pipeline,
            "findings": [list(finding) for finding in report.findings],
            "settings": report.settings,
            "keep_gradient": list(report.keep_gradient),
        }
        content = {"written_by": "lit_distill", "sha256": _sha256(plain), "report": plain}
        write_file(self.path, (json.dumps(content, indent=1) + "\n").encode())


def _sha256(plain: Any) -> str:  # noqa: ANN401
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _report(plain: dict[str, Any]) -> Report:
    """Return the report of what `RememberedReport.write` has stored.

    Raises:
        InputError: If it has a verdict or mode that is unknown.
    """
    findings = [Finding(*entries) for entries in plain["findings"]]
    modes = tuple(plain["keep_gradient"])
    known = {f.verdict for f in findings} <= set(get_args(Verdict))
    if not known or not set(modes) <= set(get_args(Checkpointing)):
        raise InputError("it holds an unknown verdict or checkpointing mode")
    return Report(str(plain["pipeline"]), findings, dict(plain["settings"]), modes)
