"""The built wheel is complete without a checkout near: library, command, notebooks, presets, results."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ["*.ipynb", "START.md", "params/*.yaml", "results/*.jsonl", "results/*.yaml"]
CARRIED = sorted(p.relative_to(ROOT / "nbs").as_posix() for g in PATTERNS for p in (ROOT / "nbs").glob(g))
PAPERS = [name.removesuffix(".ipynb") for name in CARRIED if name.endswith(".ipynb") and name >= "1"]


def run(*command, **kw):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "2"}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, **kw)


def must(*command, **kw):
    done = run(*command, **kw)
    assert done.returncode == 0, f"{command}: {(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """The `bin` folder of an environment that has the wheel and, behind it, the requirements of this one.

    The wheel is built from the source archive, so that one is complete too. A `.pth` line adds a folder
    without reading the `.pth` files in it: an editable kdnb of this environment stays invisible.
    """
    folder = tmp_path_factory.mktemp("wheel")
    must(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT)
    venv.create(folder / "env", symlinks=os.name == "posix")
    scripts = folder / "env" / Path(sysconfig.get_path("scripts")).name
    (wheel,) = (folder / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python"]
    must(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = (folder / "env").rglob("site-packages")
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "requirements.pth").write_text("\n".join(here))
    return scripts


def test_every_module_imports(away, tmp_path):
    code = """if True:
        import importlib, pkgutil, sys, kdnb
        names = [m.name for m in pkgutil.iter_modules(kdnb.__path__) if m.name != "_modidx"]
        for name in names:
            importlib.import_module(f"kdnb.{name}")
        print(kdnb.__path__[0], *names, sep="\\n")"""
    where, *names = must(away / "python", "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(away.parent) and not Path(where).is_relative_to(ROOT), where
    assert set(names) == {p.stem for p in (ROOT / "kdnb").glob("*.py")} - {"__init__", "_modidx"}


def test_notebooks_presets_and_results_are_carried(away):
    (folder,) = away.parent.rglob("kdnb/notebooks")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == CARRIED
    for name in CARRIED:
        assert (folder / name).read_bytes() == (ROOT / "nbs" / name).read_bytes(), f"{name} is an old copy"


def test_command_lists_the_papers(away, tmp_path):
    listed = must(away / "kdnb", "list", cwd=tmp_path)
    assert all(name in listed for name in PAPERS), listed


def test_command_refuses_an_unknown_parameter(away, tmp_path):
    done = run(away / "kdnb", "run", "10_kd", "-p", "temprature", "2", "-o", "out.ipynb", cwd=tmp_path)
    assert done.returncode == 2 and "temperature" in done.stdout + done.stderr, done
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_first_lesson_runs_from_an_empty_folder(away, tmp_path):
    "Its experiment, briefly; test_notebooks.py runs the whole."
    short = ["--experiment", "-p", "epochs", "2", "-p", "sweep_epochs", "1"]
    must(away / "kdnb", "run", "10_kd", *short, "-o", "out.ipynb", cwd=tmp_path, timeout=600)
    assert (tmp_path / "out.ipynb").exists()
