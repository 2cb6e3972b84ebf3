"""Writes what is computed: docs/names.md, nbs/results/README.md and the table of verdicts in README.md.

    python docs/pages.py            # --check says whether they are up to date, and writes nothing
"""

import ast
import base64
import json
import re
import sys
from functools import cache
from pathlib import Path

HOME = Path(__file__).resolve().parent
ROOT = HOME.parent
FLOORS = {
    "Ground": ["checks", "checkpoint", "data", "models", "attacks"],
    "First floor: learning, training, evaluation, runs": [
        "learning", "training", "evaluation", "trackers", "runs", "verdicts", "workers", "runner"],
    "Second floor: experiments, and lessons that others stand on": ["experiment", "kd", "features", "robust"],
    "Third floor: the five papers": ["bss", "abm", "ard", "afd", "tfkd"],
}
LESSONS = ["10_kd", "20_bss", "21_abm", "22_ard", "23_afd", "24_tfkd"]


@cache
def notebook(name):
    "As the file has it; callers change a copy."
    return json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))


def title(name):
    "(title, the sentence under it) of a notebook."
    lines = "".join(notebook(name)["cells"][0]["source"]).splitlines()
    return lines[0].lstrip("# "), next(line for line in lines if line.startswith(">")).lstrip("> ")


def public(module):
    "{public name: its docstring}, in the order of the source."
    tree = ast.parse((ROOT / "kdnb" / f"{module}.py").read_text(encoding="utf-8"))
    names = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
    found = {n.name: ast.get_docstring(n) or "" for n in tree.body if hasattr(n, "name")}
    return {name: found[name] for name in names if name in found}


def names_page():
    lines = ["# Public names", "", "Written by `python docs/pages.py`. Rooms import from lower floors."]
    for floor, modules in FLOORS.items():
        lines += ["", f"## {floor}", "", "| name | what it does |", "| --- | --- |"]
        for module in modules:
            for name, words in public(module).items():
                line = re.sub(r"([|\\])", r"\\\1", words.split("\n")[0])
                lines.append(f"| `kdnb.{module}.{name}` | {line} |")
    return "\n".join(lines) + "\n"


def recorded(name):
    "Cards that are part of kdnb; a reader's own runs stay out."
    from kdnb.runs import load_cards

    return load_cards(name, ROOT / "nbs/results")


def results_page():
    from kdnb.runs import results_table
    from kdnb.verdicts import verdicts

    lines = ["# Results", "", "Written by `python docs/pages.py` from the run cards beside this page; "
             "`kdnb results NAME` prints the same tables. All recorded runs were made on a CPU, and are "
             "smaller than the papers'. Each row says on which data, for how many seeds, and how long a run "
             "took. `cifar10-jpeg` is CIFAR-10 with its images stored as JPEG."]
    for name in [p.stem for p in sorted((ROOT / "nbs/results").glob("*.jsonl"))]:
        lines += ["", f"## {title(name)[0]}", ""]
        cards = recorded(name)
        claims = verdicts(name, cards)
        if claims.rows:
            lines += ["**Claims**; ± is a 95 % interval over seeds:", "", claims.show("github"), ""]
        table = results_table(name, cards).show("markdown")
        lines += [re.sub(r"(?m)^#+ .*\n+", "", table).strip()]
    return re.sub(r"(?<=[|\w]) {2,}| {2,}(?=\|)", " ", re.sub(r"-{3,}", "---", "\n".join(lines))) + "\n"


def front_table():
    "A row a lesson: its first claim, what was published, what we measured, the verdict."
    from kdnb.verdicts import verdicts

    lines = ["| lesson | claim | published | ours | verdict |", "| --- | --- | --- | --- | --- |"]
    for name in LESSONS:
        row = verdicts(name, recorded(name)).rows[0]
        cells = [" ".join(row[k].split()) for k in ("claim", "published", "ours", "verdict")]
        lines.append(f"| [`{name}`](nbs/{name}.ipynb) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def front_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(?<=<!-- verdicts -->\n)(\|.*\n)*", lambda _: front_table(), text)


PLANE = '"training points"'      # in the cell that draws it


def plane_picture():
    "The picture of README: drawn by 20_bss, its one figure of section 6 with three panels of the plane."
    for cell in notebook("20_bss")["cells"]:
        for out in cell.get("outputs", []) if PLANE in "".join(cell["source"]) else []:
            if "image/png" in out.get("data", {}):
                return base64.b64decode("".join(out["data"]["image/png"]))
    raise SystemExit(f"no cell of 20_bss draws {PLANE}")


PAGES = {"docs/plane.png": plane_picture, "docs/names.md": names_page,
         "nbs/results/README.md": results_page, "README.md": front_page}

if __name__ == "__main__":
    old = []
    for file, page in PAGES.items():
        path, whole = ROOT / file, page()
        whole = whole.encode() if isinstance(whole, str) else whole
        if not path.exists() or path.read_bytes() != whole:
            old.append(file)
            if "--check" not in sys.argv[1:]:
                path.write_bytes(whole)
    if old and "--check" in sys.argv[1:]:
        sys.exit(f"out of date: {', '.join(old)}; python docs/pages.py writes them")
