"""Rules about the tree itself: what may import what, what a notebook holds, what is documented."""

import ast
import base64
import builtins
import configparser
import io
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tokenize
from importlib import import_module
from pathlib import Path
from typing import get_args

import nbformat
import pytest
import yaml

from kdnb.runs import Lesson, plan_run

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))
NOTEBOOKS = {p.stem: p for p in sorted((ROOT / "nbs").glob("*.ipynb"))}
PAPERS = [name for name in NOTEBOOKS if name >= "1"]
HEAVY = {
    "matplotlib",
    "sklearn",
    "scipy",
    "torchvision",
    "papermill",
    "ray",
    "tqdm",
    "IPython",
    "yaml",
    "PIL",
    "tensorboard",
    "wandb",
    "mlflow",
    "nbformat",
    "nbclient",
    "pyautoattack",
    "timm",
    "onnx",
    "onnxruntime",
    "onnxscript",
}
AUTHORING = {"nbdev", "fastcore", "execnb", "ghapi"}
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "int | str": int | str}
# "(B, K) raw scores", "scalar, nats", "any shape"
SHAPE = re.compile(r"\([^()]*\b[A-Z]\b[^()]*\)|\bscalar\b|\bshape\b")
# a folder of somebody's machine
MACHINE = re.compile(r"(?<![\w.~])/(home|root|tmp|work|Users)/|\b[A-Z]:\\\\?Users\b")

each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)
LESSONS = [n for n in PAPERS if '"## 7' in NOTEBOOKS[n].read_text(encoding="utf-8").split('"parameters"')[0]]
each_lesson = pytest.mark.parametrize("name", LESSONS)
each_paper = pytest.mark.parametrize("name", PAPERS)


# ---------------------------------------------------------------- reading the tree


def load(name):
    return json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))


def sources(name, kind="code"):
    return ["".join(c["source"]) for c in load(name)["cells"] if c["cell_type"] == kind and c["source"]]


def directives(source):
    return {line[2:].split(":")[0].split()[0] for line in source.splitlines() if re.match(r"#\|\s*\w", line)}


def is_exported(source):
    return bool(directives(source) & {"export", "exports", "exporti"})


def code_lines(source):
    "Lines that hold something, `#|` directives aside."
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def statement_lines(source):
    "How many lines hold code: blank lines, comments and docstrings cost nothing."
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in quiet]
    lines = {n for t in tokens if t.string.strip() for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            lines -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return len(lines)


def module_of(name):
    "The module that a notebook exports, or None."
    found = [m for s in sources(name) for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", s, flags=re.M)]
    assert len(found) <= 1, f"{name}: more than one default_exp: {found}"
    return found[0] if found else None


MODULES = {module_of(name): name for name in NOTEBOOKS if module_of(name)}
each_module = pytest.mark.parametrize("module", MODULES)


def parse(source):
    "The syntax tree of a cell, IPython's own lines taken out."
    if source.lstrip().startswith("%%"):
        return ast.parse("")
    return ast.parse("\n".join(re.sub(r"^(\s*)[%!?].*", r"\1pass", line) for line in source.splitlines()))


def module_source(module):
    return (ROOT / "kdnb" / f"{module}.py").read_text(encoding="utf-8")


def number(name):
    return int(name[:2])


def floor(name):
    """00_checks is the ground; 00-02 data, models, attacks; 03_learning; 03-05 training, evaluation, runs;
    06 the runner, which stands on runs and which no notebook needs; 1x and 2x papers; 3x comparisons."""
    if name in LOW: return LOW[name]
    return 0 if number(name) <= 2 else 1 if number(name) <= 5 else max(2, number(name) // 10 + 1)


LOW = {"00_checks": -1, "03_learning": 0.5, "05_verdicts": 1.5, "06_workers": 1.5}


def imports(tree):
    "(module or None, name or None, node) of every import; `None` as module means the package itself."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["kdnb" if node.level else "", node.module]))
            yield from ((base, alias.name, node) for alias in node.names)


def public(module):
    "The `__all__` that nbdev wrote."
    for node in ast.parse(module_source(module)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def run(*command, **kw):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **kw)


def nbdev(command, folder, *args):
    "Run an nbdev command in `folder`, with that folder's settings.ini alone."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    env["XDG_CONFIG_HOME"] = str(folder / ".config")
    done = run(SCRIPTS / command, *args, cwd=folder, env=env)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"


# ---------------------------------------------------------------- numbers, names, modules


@each_notebook
def test_name_is_number_and_name(name):
    assert re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", name), f"{name}.ipynb: notebooks are named NN_name.ipynb"


def test_numbers_and_modules_are_unique():
    # they stand below the room of their number
    below = ("00_checks", "00_checkpoint", "03_learning", "05_trackers", "05_verdicts", "06_workers")
    numbers = [number(n) for n in NOTEBOOKS if n not in below]
    assert len(set(numbers)) == len(numbers), f"a number twice: {list(NOTEBOOKS)}"
    exported = [m for m in map(module_of, NOTEBOOKS) if m]
    assert len(set(exported)) == len(exported), f"two notebooks export one module: {sorted(exported)}"


def test_package_holds_exactly_what_notebooks_export():
    found = {p.stem for p in (ROOT / "kdnb").glob("*.py")} - {"__init__", "_modidx"}
    extra, absent = found - set(MODULES), set(MODULES) - found
    assert not extra and not absent, f"without a notebook: {extra}; not exported: {absent}"


def test_version_is_the_same_everywhere():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    init = (ROOT / "kdnb/__init__.py").read_text()
    version = ini["DEFAULT"]["version"]
    assert init.strip() == f'__version__ = "{version}"', "kdnb/__init__.py holds the version alone"
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


# ---------------------------------------------------------------- the notebooks and the package agree


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the notebooks, cleaned and exported anew."
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "nbs").mkdir()
    (folder / "kdnb").mkdir()
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copy(ROOT / "kdnb/__init__.py", folder / "kdnb")
    for path in NOTEBOOKS.values():
        shutil.copy(path, folder / "nbs")
    nbdev("nbdev_clean", folder)
    nbdev("nbdev_export", folder)
    return folder


@each_notebook
def test_notebook_is_clean(fresh, name):
    same = (fresh / "nbs" / f"{name}.ipynb").read_bytes() == NOTEBOOKS[name].read_bytes()
    assert same, f"nbdev_clean changes {name}.ipynb: run `make export`"


@pytest.mark.parametrize("module", [*MODULES, "_modidx"])
def test_export_is_in_sync(fresh, module):
    same = (fresh / "kdnb" / f"{module}.py").read_text() == module_source(module)
    assert same, f"kdnb/{module}.py is not what the notebooks export: run `make export`"


@pytest.mark.parametrize("keep", [True, False], ids=["with-settings", "without-the-key"])
def test_parameters_tag_survives_cleaning(tmp_path, keep):
    """Without the tag papermill would silently run the defaults.

    The second case shows that the key in settings.ini is what keeps it.
    """
    settings = (ROOT / "settings.ini").read_text()
    if not keep:
        settings = re.sub(r"^allowed_cell_metadata_keys.*\n", "", settings, flags=re.M)
    (tmp_path / "settings.ini").write_text(settings)
    (tmp_path / "nbs").mkdir()
    copies = [Path(shutil.copy(NOTEBOOKS[name], tmp_path / "nbs")) for name in PAPERS]
    cell = nbformat.v4.new_code_cell("seed: int = 0  # any", metadata={"tags": ["parameters"], "other": 1})
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    copies.append(tmp_path / "nbs/90_own.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), copies[-1])
    nbdev("nbdev_clean", tmp_path)
    for path in copies:
        kept = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
        assert len(kept) == keep, f"{path.name}: {len(kept)} cells tagged parameters after nbdev_clean"
    assert "other" not in nbformat.read(copies[-1], 4).cells[0].metadata, "nbdev_clean did nothing here"


def test_lint():
    done = run(SCRIPTS / "ruff", "check", "--quiet", "--output-format=concise", "--no-cache", ".", cwd=ROOT)
    assert done.returncode == 0, "\n" + done.stdout + done.stderr


ACTS = {"train_mode", "freeze", "fit", "update", "move"}     # they change what they are given


@pytest.mark.parametrize("module", MODULES)
def test_one_thing_a_line(module):
    "No tuple as a statement; what changes a network is not packed into an assignment of several names."
    for node in ast.walk(ast.parse(module_source(module))):
        assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple)), ast.unparse(node)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            calls = {getattr(n.func, "id", "") for n in ast.walk(node.value) if isinstance(n, ast.Call)}
            assert not ACTS & calls, ast.unparse(node)


# ---------------------------------------------------------------- imports


@each_module
def test_module_imports_only_lower_floors(module):
    for base, imported, node in imports(ast.parse(module_source(module))):
        if base.split(".")[0] != "kdnb" or (base, imported) == ("kdnb", None):
            continue  # `import kdnb` alone loads nothing
        where = f"kdnb/{module}.py line {node.lineno}"
        assert imported, f"{where}: `import {base}`; import explicit names: from kdnb.x import y"
        if (base, imported) != ("kdnb", "__version__"):
            other = base.removeprefix("kdnb").lstrip(".")
            assert other in MODULES, f"{where}: {base} is no exported module; import names, not modules"
            low, high = floor(MODULES[other]), floor(MODULES[module])
            assert low < high, f"{where}: floor {high} imports {other} of floor {low}; only lower floors"


@each_notebook
def test_lesson_imports_only_earlier_notebooks(name):
    for source in sources(name):
        for base, imported, _ in imports(parse(source)):
            other = base.removeprefix("kdnb").lstrip(".") if base.startswith("kdnb.") else imported
            if base.split(".")[0] == "kdnb" and other in MODULES:
                early = number(MODULES[other]) <= number(name)
                drawing = imported in ("begin", "show")
                assert early or drawing, f"{name} uses {other}, which a later notebook explains"


@each_notebook
def test_no_star_and_no_authoring_imports(name):
    trees = [parse(s) for s in sources(name)]
    if module_of(name):
        trees.append(ast.parse(module_source(module_of(name))))
    for base, imported, _ in (item for tree in trees for item in imports(tree)):
        assert imported != "*", f"{name}: from {base} import *"
        assert base.split(".")[0] not in AUTHORING, f"{name}: {base} is for authors, not for running"
    assert not any("nbdev_export(" in s for s in sources(name)), f"{name}: remove the nbdev_export() cell"


@each_module
def test_heavy_imports_are_inside_functions(module):
    tree = ast.parse(module_source(module))
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    at_top = {base.split(".")[0] for base, _, node in imports(tree) if node not in inside}
    assert not at_top & HEAVY, f"kdnb/{module}.py imports {at_top & HEAVY} at the top"


@each_module
def test_import_stays_light(module):
    "In a fresh process nothing heavy is loaded beyond torch; checks, runs and runner do not even need that."
    light = module in ("checks", "runs", "runner")
    before = "import sys" if light else "import sys, torch"
    code = f"{before}; old = set(sys.modules); import kdnb.{module}; print(*(set(sys.modules) - old))"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {m.split(".")[0] for m in done.stdout.split()}
    heavy = loaded & (HEAVY | AUTHORING | ({"torch"} if light else set()))
    assert not heavy, f"import kdnb.{module} loads {sorted(heavy)}"


# ---------------------------------------------------------------- what a notebook holds


@each_notebook
def test_title_cell(name):
    first = load(name)["cells"][0]
    lines = [line for line in "".join(first["source"]).splitlines() if line.strip()]
    starts = [line[:2] for line in lines]
    right = first["cell_type"] == "markdown" and starts == ["# ", "> "]
    assert right, f"{name}: the first cell is `# Title` and `> one sentence`"


@each_notebook
def test_notebook_is_valid(name):
    nb = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(nb)
    assert nb.metadata.get("kernelspec", {}).get("name") == "python3", f"{name}: kernelspec is not python3"


def exactly(kind):
    return get_args(kind) or (kind,)


@each_paper
def test_one_parameters_cell_of_literals(name):
    cells = [c for c in load(name)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1 and cells[0]["cell_type"] == "code", f"{name}: {len(cells)} parameters cells"
    source, names = "".join(cells[0]["source"]), []
    for line in filter(str.strip, source.splitlines()):
        rule = f"{name}: `{line}`: one `name: int|float|str|bool = literal  # meaning` per line"
        body = ast.parse(line).body
        assert len(body) == 1 and isinstance(body[0], ast.AnnAssign), rule
        kind, value = TYPES.get(ast.unparse(body[0].annotation)), body[0].value
        assert kind and re.search(r"\s#\s*\S", line), rule
        assert type(ast.literal_eval(value)) in exactly(kind), f"{rule}; the value is no {kind}"
        names.append(body[0].target.id)
    assert len(set(names)) == len(names), f"{name}: a parameter appears twice"
    missing = {"preset", "seed", "device", "root", "results"} - set(names)
    assert not missing, f"{name}: every paper notebook has the parameters {sorted(missing)}"


HOUSE = "augment precision compile device threads seed checkpoints results save tracker max_steps".split()
DATA = "preset data root download image_size val_fraction train_images".split()


@each_lesson
def test_parameters_have_one_vocabulary(name):
    found = Lesson(name).parameters
    assert [*found][: len(DATA)] == DATA, f"{name}: begins with {DATA}"
    assert [*found][-len(HOUSE) :] == HOUSE, f"{name}: ends with {HOUSE}"
    assert {"arms", "batch_size", "optimizer", "lr", "weight_decay"} <= {*found}, f"{name}: a word is missing"


def outside(kind):
    "Values of which every rule refuses one."
    words = ["neither this nor that", "-1", "2 x"]
    return words if kind is str else words + [-1] if kind == int | str else [-1, 0, kind(2), kind(10**9)]


@each_lesson
def test_every_rule_is_kept(name):
    free = {"preset", "root", "checkpoints", "results", "save", "arms", "pairs", "teacher_weights"}
    free |= {"student_layers", "teacher_layers"}  # asked elsewhere, or free
    for key, (kind, _, words) in Lesson(name).parameters.items():
        if kind is bool or key in free or words.startswith(("a model", "models", "a layer", "where to")):
            continue
        refused = 0
        for value in outside(kind) if key != "data" else []:
            try:
                plan_run(name, parameters={key: value})
            except ValueError as error:
                assert key in str(error), f"{name}: {key}: {error}"
                refused += 1
        assert refused or key == "data", f"{name}: {key}: the comment begins with no rule: {words}"


def halves(name):
    "(code of the lesson, code of the experiment): from the parameters to section 9 it is the experiment's."
    cells, inside, lesson, experiment = load(name)["cells"], False, [], []
    for cell in cells:
        source = "".join(cell["source"])
        inside |= "parameters" in cell["metadata"].get("tags", [])
        inside &= not (cell["cell_type"] == "markdown" and re.search(r"(?m)^## 9\b", source))
        if cell["cell_type"] == "code":
            (experiment if inside else lesson).append(source)
    return lesson, experiment


def strangers(name, cells):
    "Names that a half of a notebook uses, and neither makes, imports nor finds in the exported module."
    tree = ast.parse("\n".join(ast.unparse(parse(s)) for s in cells))
    exported = vars(import_module(f"kdnb.{module_of(name)}")) if module_of(name) else {}
    used, made = set(), {*dir(builtins), *exported, "display", "get_ipython"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        made |= {node.arg} if isinstance(node, ast.arg) else set()
        made |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) else set()
        if isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(a.asname or a.name).split(".")[0] for a in node.names}
    return used - made


@each_lesson
def test_lesson_and_experiment_stand_by_themselves(name):
    for half, cells in zip(("lesson", "experiment"), halves(name), strict=True):
        for stranger in strangers(name, cells):
            where = next(s for s in cells if re.search(rf"\b{stranger}\b", s))
            raise AssertionError(f"{name}: the {half} uses {stranger}, which it does not make:\n{where}")


@each_lesson
def test_the_question_comes_first(name):
    before = itertools.takewhile(lambda c: "## 1." not in "".join(c["source"]), load(name)["cells"])
    lines = sum(len(code_lines("".join(c["source"]))) for c in before if c["cell_type"] == "code")
    assert lines <= 15, f"{name}: {lines} code lines before section 1, at most 15"


SECTIONS = """1. The problem
2. The idea in one picture
3. The maths
4. The code next to the maths
5. Where paper and code differ
6. A toy that shows it
7. The experiment
8. The paper's table beside ours
9. What the critics say
10. Summary, exercises, references"""


@each_lesson
def test_lessons_are_laid_out_alike(name):
    "Title `BSS: boundary supporting samples`; What you will see; the same ten sections."
    text = "\n".join(sources(name, "markdown"))
    assert re.match(r"# [A-Z][\w, -]*: \w", text), f"{name}: the title is `# ACRONYM: what it stands for`"
    first, *found = re.findall(r"(?m)^## (.*)$", text)
    assert first == "What you will see", f"{name}: it opens with `## {first}`"
    if name < "3":
        assert found == SECTIONS.splitlines(), f"{name}: other sections: {found}"


def told(name):
    "The cells of sections 1 to 6."
    cells = load(name)["cells"]
    heads = ["".join(c["source"]) if c["cell_type"] == "markdown" else "" for c in cells]
    first, last = (next(i for i, s in enumerate(heads) if f"## {n}. " in s) for n in (1, 7))
    return cells[first:last]


@each_lesson
def test_a_number_or_a_figure_comes_soon(name):
    lines = 0
    for cell in told(name):
        lines += len(code_lines("".join(cell["source"]))) if cell["cell_type"] == "code" else 0
        if cell.get("outputs"): break
    assert lines <= 15, f"{name}: {lines} code lines before the first figure or number, at most 15"


@each_lesson
def test_prose_between_code(name):
    for kind, group in itertools.groupby(told(name), key=lambda c: c["cell_type"]):
        group = ["".join(c["source"]) for c in group]
        few = kind != "code" or len(group) <= 3
        assert few, f"{name}: {len(group)} code cells in a row, at most 3:\n{group[0][:200]}"


@each_notebook
def test_no_leftovers_of_a_run(name):
    nb = load(name)
    assert "papermill" not in nb["metadata"], f"{name}: papermill's metadata is left"
    for cell in nb["cells"]:
        tags = cell["metadata"].get("tags")
        assert tags != [], f"{name}: papermill's empty tags are left: run `make export`"
        assert "injected-parameters" not in (tags or []), f"{name}: a cell of injected parameters is left"


@each_notebook
def test_parameters_alone_decide(name):
    for source in sources(name):
        assert not re.search(r"#\|\s*eval\s*:\s*false", source), f"{name}: #| eval: false"
        found = re.search(r"\bif\s+(not\s+)?CI\b|['\"]CI['\"]", source)
        assert not found, f"{name}: {found and found[0]}; a notebook does not ask where it runs"


def test_presets_fit_their_notebooks():
    "Also catches YAML's `1e-3`, which is a string."
    for path in sorted((ROOT / "nbs/params").glob("*")):
        name, preset, suffix = path.name.split(".")
        assert name in PAPERS and suffix == "yaml", f"{path.name}: presets are named NN_name.PRESET.yaml"
        kinds = {key: kind for key, (kind, _, _) in Lesson(name).parameters.items()}
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert values.get("preset") == preset, f"{path.name}: holds preset: {values.get('preset')}"
        assert set(values) <= set(kinds), f"{path.name}: unknown {sorted(set(values) - set(kinds))}"
        for key, value in values.items():
            right = type(value) in exactly(kinds[key]) + (int,) * (kinds[key] is float)
            assert right, f"{path.name}: {key}: {value!r} is no {kinds[key]}"


def test_results_are_one_card_per_line():
    for path in sorted((ROOT / "nbs/results").glob("*.jsonl")):
        assert path.stem in NOTEBOOKS, f"{path.name}: no notebook {path.stem}"
        for line in path.read_text(encoding="utf-8").splitlines():
            assert isinstance(json.loads(line), dict), f"{path.name}: a line is no card"


# ---------------------------------------------------------------- budgets


@each_module
def test_exported_size(module):
    name = MODULES[module]
    size = sum(statement_lines(s) for s in sources(name) if is_exported(s))
    limit = 250 if name in PAPERS else 450  # machinery below 10 has more parts, each small
    assert size <= limit, f"{name}: {size} exported code lines, at most {limit}"
    names = public(module)
    most = {"checks": 18, "models": 17}.get(module, 14)  # rules of a few lines; doors to other libraries
    assert 2 <= len(names) <= most, f"{name}: {len(names)} public names, 2 to {most} allowed: {names}"


@each_notebook
def test_cells_are_small(name):
    cells = [c for c in load(name)["cells"] if "parameters" not in c["metadata"].get("tags", [])]
    cells = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    sizes = sorted(len(code_lines(s)) for s in cells if code_lines(s))
    share, middle = sum(n <= 18 for n in sizes) / len(sizes), statistics.median(sizes)
    most, least = (6, 0.9) if name in PAPERS else (8, 0.8)
    assert middle <= most, f"{name}: the median code cell has {middle} lines, at most {most}"
    assert share >= least, (
        f"{name}: {share:.0%} of the code cells have <= 18 lines, {least:.0%} should; {sizes[-8:]}"
    )
    assert sizes[-1] <= 40, f"{name}: a code cell of {sizes[-1]} lines, at most 40"


@each_notebook
def test_file_and_figures_are_small(name):
    size = NOTEBOOKS[name].stat().st_size
    assert size <= 500_000, f"{name}: {size:,} bytes, at most 500,000"
    for cell in load(name)["cells"]:
        bundles = [o.get("data", {}) for o in cell.get("outputs", [])]
        bundles += cell.get("attachments", {}).values()
        for kind, data in (item for bundle in bundles for item in bundle.items()):
            if kind.startswith("image/"):
                text = "".join(data)
                size = len(text) if kind == "image/svg+xml" else len(base64.b64decode(text))
                assert size <= 60_000, f"{name}: a figure of {size:,} bytes, at most 60,000"


@each_notebook
def test_figures_are_sharp_and_described(name):
    "What `show` does: twice the pixels of its width, and a text for who cannot see it."
    for cell in load(name)["cells"]:
        for out in cell.get("outputs", []):
            if picture := out.get("data", {}).get("image/png"):
                about, start = out["metadata"].get("image/png", {}), "".join(cell["source"])[:60]
                pixels = int.from_bytes(base64.b64decode("".join(picture))[16:20], "big")
                assert len(about.get("alt", "")) >= 30, f"{name}: no alt text of the figure under `{start}`"
                assert pixels >= 2 * about["width"], f"{name}: a blurred figure under `{start}`"


# ---------------------------------------------------------------- outputs


@each_notebook
def test_outputs_hold_no_trouble(name):
    for cell in load(name)["cells"]:
        start = "".join(cell["source"])[:60]
        for out in cell.get("outputs", []):
            assert out["output_type"] != "error", f"{name}: an error under `{start}`"
            assert out.get("name") != "stderr", f"{name}: stderr under `{start}`: {out['text'][:3]}"
            assert "\r" not in "".join(out.get("text", "")), f"{name}: a progress bar under `{start}`"


def project_files():
    "What git tracks or would add."
    done = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / f for f in done.stdout.split("\0") if f and (ROOT / f).is_file()]


def texts(nb):
    "All that a reader sees of a notebook, but figures."
    for cell in nb["cells"]:
        yield "".join(cell["source"])
        for out in cell.get("outputs", []):
            data = out.get("data", {}) | {"text": out.get("text", "")}
            yield from ("".join(v) for k, v in data.items() if not k.startswith(("image/", "application/")))


def test_no_machine_paths():
    for path in project_files():
        if path == Path(__file__).resolve():
            continue  # the rule itself
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path.suffix == ".ipynb":  # not the base64 of figures
            text = "\n".join(texts(json.loads(text)))
        found = MACHINE.search(text)
        assert not found, f"{path.relative_to(ROOT)}: a path of a machine: {text[found.start() :][:60]!r}"


# ---------------------------------------------------------------- documentation


def undocumented(source, names):
    "What the public names of a module's source leave unsaid, one line per gap."
    comments = {
        t.start[0]: t.string
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    gaps = []
    for node in ast.parse(source).body:
        if getattr(node, "name", None) not in names:
            continue
        if not ast.get_docstring(node):
            gaps.append(f"{node.name}: no docstring")
        functions = (
            [node]
            if isinstance(node, ast.FunctionDef)
            else [
                n
                for n in node.body
                if isinstance(n, ast.FunctionDef)
                and (not n.name.startswith("_") or n.name in ("__init__", "__call__"))
            ]
        )
        for f in functions:
            where = f.name if f is node else f"{node.name}.{f.name}"
            words = "" if f is node else ast.get_docstring(f) or ""  # of a method the docstring may say it
            for arg in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]:
                if arg.annotation and re.search(r"\bTensor\b", ast.unparse(arg.annotation)):
                    if not SHAPE.search(comments.get(arg.end_lineno, "") + words):
                        gaps.append(f"{where}: tensor `{arg.arg}`: say its shape in the comment behind it")
            if f.returns and ast.unparse(f.returns).endswith("Tensor"):
                if not SHAPE.search(comments.get(f.returns.end_lineno, "") + words):
                    gaps.append(f"{where}: returned tensor: say its shape in the comment behind it")
    return gaps


@each_module
def test_public_names_are_documented(module):
    gaps = undocumented(module_source(module), public(module))
    assert not gaps, f"kdnb/{module}.py:\n" + "\n".join(gaps)


def test_documentation_rule_sees_gaps():
    good = 'def f(\n    x: Tensor,  # (B, K) scores\n) -> Tensor:  # scalar, nats\n    "Doc."\n'
    assert undocumented(good, ["f"]) == []
    assert len(undocumented(good.replace("(B, K) ", "").replace('    "Doc."', "    pass"), ["f"])) == 2
    assert len(undocumented("class C:\n    'Doc.'\n    def step(self, x: Tensor): pass\n", ["C"])) == 1
