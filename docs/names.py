"Writes names.md: every public name of kdnb, by floor, with the first line of its docstring."

import ast
import re
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent
FLOORS = {
    "Ground": ["checks", "checkpoint", "data", "models", "attacks"],
    "First floor: learning, training, evaluation, runs": [
        "learning", "training", "evaluation", "trackers", "runs", "verdicts", "workers", "runner"],
    "Second floor: experiments, and lessons that others stand on": ["experiment", "kd", "features", "robust"],
    "Third floor: the five papers": ["bss", "abm", "ard", "afd", "tfkd"],
}


def rows(module):
    "`name` and first line of the docstring, in the order of the source."
    tree = ast.parse((HOME.parent / "kdnb" / f"{module}.py").read_text(encoding="utf-8"))
    names = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
    found = {n.name: ast.get_docstring(n) or "" for n in tree.body if hasattr(n, "name")}
    for name in names:
        if name in found:
            line = re.sub(r"([|\\])", r"\\\1", found[name].split("\n")[0])
            yield f"| `kdnb.{module}.{name}` | {line} |"


def page():
    "The whole page."
    lines = ["# Public names", "", "Written by `python docs/names.py`. Rooms import from lower floors."]
    for floor, modules in FLOORS.items():
        lines += ["", f"## {floor}", "", "| name | what it does |", "| --- | --- |"]
        lines += [row for module in modules for row in rows(module)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit((HOME / "names.md").read_text(encoding="utf-8") != page())
    (HOME / "names.md").write_text(page(), encoding="utf-8")
