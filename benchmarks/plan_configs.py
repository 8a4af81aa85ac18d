"""Plans the configurations for cards and writes the figures into their heads.

    python benchmarks/plan_configs.py [NAME ...]

Each config's figures are those of `lit-distill plan` with the published model's configuration files
in tests/planning/published. They are also written to results/plan_configs.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from planned_configs import RECORD, configs, planned, with_head


def main() -> None:
    """Plan the named configurations, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as qwen_image_24; default: all")
    names = parser.parse_args().names
    for path in configs():
        if names and path.stem not in names:
            continue
        found = planned(path)
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        record[path.stem] = found
        text = json.dumps(dict(sorted(record.items())), indent=2) + "\n"
        RECORD.write_text(text, encoding="utf-8")
        path.write_text(with_head(path, found), encoding="utf-8")


if __name__ == "__main__":
    main()
