"""Time and memory of loading a large table of pairs.

    python benchmarks/metadata.py --rows 1000000

This writes a CSV with sizes, and (empty) image files in folders of 10,000, to a temporary folder.
It loads the table in a new process as `fit` does, and writes benchmarks/results/metadata.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "metadata.json"
FOLDER = 10_000


def make(root: Path, rows: int) -> Path:
    """Write the table and its files."""
    path = root / "metadata.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        columns = "image,prompt,seed,rand_device,num_inference_steps,cfg_scale,height,width"
        writer.writerow(columns.split(","))
        for number in range(rows):
            name = f"images/{number // FOLDER:04d}/{number:07d}.png"
            if number % FOLDER == 0:
                (root / name).parent.mkdir(parents=True)
            os.close(os.open(root / name, os.O_CREAT | os.O_WRONLY))
            prompt = f"picture {number} of a red fox that sleeps on a mossy stone, soft light"
            writer.writerow([name, prompt, number, "cpu", 4, 1, 1328, 1328])
    return path


def load(path: str) -> dict[str, float]:
    """Load the table and return seconds and the largest growth of the process in MiB."""
    from lit_distill.data.datamodule import DistillDataModule

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, worked = time.perf_counter(), time.process_time()
    data = DistillDataModule(path)
    data.setup("fit")
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert data.train_set is not None
    return {
        "rows": len(data.train_set),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "memory_growth_mib": round((after - before) / 1024),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--load", help="measure this table and print the result")
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(given.load)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            table = make(Path(folder), given.rows)
            print(f"made {given.rows} rows", file=sys.stderr)
            command = [sys.executable, __file__, "--load", str(table)]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(found.stdout.splitlines()[-1]) | {
            "load_average_1min": round(os.getloadavg()[0], 1),
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        }
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2))
