"""Builds the site from the committed notebooks, which are never run here: `make docs`.

    python docs/site.py runs/site       # runs/site/html is the site, runs/site/colab the notebooks for Colab
"""

import base64
import copy
import json
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import pages
from pages import HOME, ROOT, notebook, title

ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
REPO = "{user}/{repo}".format(**ini["DEFAULT"])
NAMES = [p.stem for p in sorted((ROOT / "nbs").glob("*.ipynb"))]
LESSONS = [n for n in NAMES if n >= "1"]
COLAB = f"https://colab.research.google.com/github/{REPO}/blob/colab"
INSTALL = f'%pip install -q "kdnb[run,eval] @ git+https://github.com/{REPO}"'


def text(cell):
    return "".join(cell["source"])


def cell(kind, source, **about):
    return {"cell_type": kind, "metadata": {}, "source": source, "id": "site"} | about


def pictures(name):
    "{number of the section: its pictures as PNG bytes}, and the alt text of each."
    found, section = {}, 0
    for c in notebook(name)["cells"]:
        if c["cell_type"] == "markdown":
            heads = re.findall(r"(?m)^## (\d+)\.", text(c))
            section = int(heads[-1]) if heads else section
        for out in c.get("outputs", []):
            if png := out.get("data", {}).get("image/png"):
                alt = out.get("metadata", {}).get("image/png", {}).get("alt", "")
                found.setdefault(section, []).append((base64.b64decode("".join(png)), alt))
    return found


def folded(c):
    "Set-up that a reader of the page may skip: parameters, imports, helpers."
    if "parameters" in c["metadata"].get("tags", []):
        return True
    lines = [line for line in text(c).splitlines() if line.strip()]
    code = [line for line in lines if line[0] not in ' #")@']
    return bool(code) and all(re.match(r"(from|import) |def _|class _|_\w+ = ", line) for line in code)


def page_of(name):
    "The notebook as the site shows it."
    nb = copy.deepcopy(notebook(name))
    links = (f"[This page as a notebook](https://github.com/{REPO}/blob/main/nbs/{name}.ipynb) · "
             f"[Open in Colab]({COLAB}/{name}.ipynb) · "
             f"<a href=\"../notebooks/{name}.ipynb\" download>Download</a>")
    if ROOT.joinpath("kdnb", f"{name[3:]}.py").exists():
        links += f" · [API of kdnb.{name[3:]}](../api/{name[3:]}.md)"
    cells = []
    for c in nb["cells"]:
        if c["cell_type"] == "code":
            if folded(c):
                c["metadata"]["tags"] = ["hide-input"]
            c["source"] = re.sub(r"(?m)^#\|.*\n?", "", text(c)).strip("\n")
            if not c["source"]:
                continue
            for out in c["outputs"]:
                about = out.get("metadata", {}).get("image/png")
                if about:
                    c["metadata"]["mystnb"] = {"image": {"alt": about["alt"], "width": f"{about['width']}px"}}
        cells.append(c)
    first = text(cells[0])
    nb["cells"] = [cell("markdown", first + "\n\n" + links), *cells[1:]]
    return nb


def picture_of(name, section, folder):
    "Markdown of a section's first picture, written as a file; nothing if it has none."
    found = pictures(name).get(section)
    if not found:
        return ""
    png, alt = found[0]
    (folder / f"{name}-{section}.png").write_bytes(png)
    return f"```{{image}} pictures/{name}-{section}.png\n:alt: {alt}\n:width: 100%\n```\n"


def learn_page(folder):
    lines = ["# Learn", "", "Each lesson explains a paper or a few, implements them, tests them and",
             "runs their experiment, in a few minutes on a laptop. In this order each stands",
             "on what came before.", ""]
    for name in LESSONS:
        head, words = title(name)
        lines += [f"## [{head}](lessons/{name}.ipynb)", "", words, "", picture_of(name, 2, folder)]
    lines += ["## Shared building blocks", "", "What all lessons use, explained in the same way.", "",
              "| notebook | what it explains |", "| --- | --- |"]
    lines += [f"| [{title(n)[0]}](lessons/{n}.ipynb) | {title(n)[1]} |" for n in NAMES if n < "1"]
    hidden = "\n".join(f"lessons/{n}" for n in [*LESSONS, *(n for n in NAMES if n < "1")])
    return "\n".join(lines) + f"\n\n```{{toctree}}\n:hidden:\n\n{hidden}\n```\n"


def results_page(folder):
    "The recorded tables, each lesson's with its picture."
    head, *parts = re.split(r"(?m)^## ", pages.results_page())
    known = {title(n)[0]: n for n in LESSONS}
    lines = [head]
    for part in parts:
        name = known[part.splitlines()[0]]
        picture = picture_of(name, 8, folder) or picture_of(name, 7, folder)
        first, rest = part.split("\n", 1)
        lines.append(f"## {first}\n\nThe lesson: [{first}](lessons/{name}.ipynb)\n\n{picture}\n{rest}")
    return "\n".join(lines)


def api_page(module):
    head = f"# kdnb.{module}\n\n"
    lesson = next(n for n in NAMES if n[3:] == module)
    return head + (f"Explained in [{title(lesson)[0]}](../lessons/{lesson}.ipynb).\n\n"
                   f"```{{eval-rst}}\n.. automodule:: kdnb.{module}\n"
                   "   :members:\n   :member-order: bysource\n```\n")


def write(folder):
    "All sources of the site."
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("lessons", "api", "pictures", "_static", "extra/notebooks"):
        (folder / part).mkdir(parents=True)
    for name in ("conf.py", "plane.png"):
        shutil.copy(HOME / name, folder)
    for name in ("site.css", "logo.svg"):
        shutil.copy(HOME / name, folder / "_static")
    for path in HOME.glob("*.md"):
        said = path.read_text(encoding="utf-8")
        said = re.sub(r"\]\((?:\.\./)?nbs/(\w+)\.ipynb\)", r"](lessons/\1.ipynb)", said)
        (folder / path.name).write_text(said.replace("<!-- verdicts -->", site_table()), encoding="utf-8")
    for name in NAMES:
        shutil.copy(ROOT / "nbs" / f"{name}.ipynb", folder / "extra/notebooks")
        (folder / "lessons" / f"{name}.ipynb").write_text(json.dumps(page_of(name)), encoding="utf-8")
    modules = [m for floor in pages.FLOORS.values() for m in floor]
    for module in modules:
        (folder / "api" / f"{module}.md").write_text(api_page(module), encoding="utf-8")
    toc = "\n".join(f"api/{m}" for m in modules)
    names = (HOME / "names.md").read_text(encoding="utf-8").replace("# Public names", "# API", 1)
    names = re.sub(r"Written by.*", "Every public name; rooms import from lower floors only.", names)
    names = re.sub(r"`kdnb\.(\w+)\.(\w+)`", r"[kdnb.\1.\2](#kdnb.\1.\2)", names)
    (folder / "names.md").write_text(f"{names}\n```{{toctree}}\n:hidden:\n\n{toc}\n```\n", encoding="utf-8")
    (folder / "learn.md").write_text(learn_page(folder / "pictures"), encoding="utf-8")
    (folder / "results.md").write_text(results_page(folder / "pictures"), encoding="utf-8")


def site_table():
    return re.sub(r"\[`\w+`\]\(nbs/(\w+)\.ipynb\)", lambda m: f"[{title(m[1])[0]}](lessons/{m[1]}.ipynb)",
                  pages.front_table())


def write_colab(folder):
    "The notebooks, each with a first cell that installs kdnb."
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        nb = copy.deepcopy(notebook(name))
        nb["cells"].insert(0, cell("code", INSTALL, id="install", execution_count=None, outputs=[]))
        (folder / f"{name}.ipynb").write_text(json.dumps(nb, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    from sphinx.cmd.build import main

    out = Path(sys.argv[1])
    write(out / "source")
    write_colab(out / "colab")
    strict = ["-W", "--keep-going", "-q", "-j", "2", "-b", "html"]
    sys.exit(main([*strict, str(out / "source"), str(out / "html")]))
