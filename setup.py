"""What an index shows of README.md: its links into the repository by address, the rest as it is."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/lit-distill/lit-distill/blob/main/"
readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")

setup(
    long_description=re.sub(r"\]\((?!https?://|#)", f"]({REPOSITORY}", readme),
    long_description_content_type="text/markdown",
)
