"""Writes the table of docs/families.md from what tests/pipelines/test_families.py proves."""

from pathlib import Path

from families_expected import FOUND
from tiny_pipelines import CALL_KWARGS, FAMILIES, build

from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.guidance import Family, family_of

DOC = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table: begin (tests/helpers/families_table.py) -->\n", "<!-- table: end -->\n"


def table() -> str:
    lines = ["| family | pipeline | denoiser | draws | line in the table | set by preflight |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in FAMILIES:
        pipe = build(name)
        models = ", ".join(dict.fromkeys(type(d).__name__ for d in denoisers(pipe).values()))
        kind = "edits" if "image" in CALL_KWARGS[name] else "images"
        kind = "videos" if "num_frames" in CALL_KWARGS[name] else kind
        line = "-" if family_of(pipe) == Family() else "scale"
        found = ", ".join(f"`{key}`" for key in FOUND.get(name, {})) or "-"
        lines.append(f"| {name} | {type(pipe).__name__} | {models} | {kind} | {line} | {found} |")
    return "\n".join(lines) + "\n"


def split(text: str) -> tuple[str, str, str]:
    head, _, rest = text.partition(BEGIN)
    body, _, tail = rest.partition(END)
    return head, body, tail


if __name__ == "__main__":
    head, _, tail = split(DOC.read_text(encoding="utf-8"))
    DOC.write_text(head + BEGIN + table() + END + tail, encoding="utf-8")
