"""The packages, and what an index shows of README.md: its links into the repository by address."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

REPOSITORY = "https://github.com/lit-distill/lit-distill/"
readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(r"(!\[[^\]]*\])\((?!https?://)", rf"\1({REPOSITORY}raw/main/", readme)

setup(
    # configs/ is installed inside the package, for `lit-distill init`.
    packages=[*find_namespace_packages(include=["lit_distill*"]), "lit_distill.configs"],
    package_dir={"lit_distill.configs": "configs"},
    long_description=re.sub(r"\]\((?!https?://|#)", f"]({REPOSITORY}blob/main/", readme),
    long_description_content_type="text/markdown",
)
