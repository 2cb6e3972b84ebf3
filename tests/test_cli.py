"""The `kdnb` command and what it stands on, tried from outside on a toy lesson."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from kdnb import __version__ as version
from kdnb import workers
from kdnb.runner import _output_name, _parser, compare_runs, main, plot_results, run_notebook, sweep
from kdnb.runs import (
    Lesson,
    _numbers,
    load_cards,
    plan_run,
    protocol_name,
    results_table,
    run_card,
    run_parameters,
    save_card,
)

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = """preset: str = "default"  # name of the experiment
seed: int = 0  # any number
device: str = "cpu"  # where it runs
root: str = ""  # folder of the data
results: str = ""  # folder of the cards; "" keeps none
data: str = "digits"  # the "#" here is meant
steps: int = 20  # > 0
lr: float = 0.1  # learning rate
fast: bool = False  # skip nothing"""
SETUP = """%config InlineBackend.figure_format = "png"
import time
from kdnb.runs import results_table, run_card, run_parameters, save_card
parameters, started = run_parameters(globals()), time.time()
half = steps / 2
print("said by the setup cell")
if lr <= 0:
    raise ValueError(f"lr must be > 0, got {lr}")
if lr == 2:
    raise OSError("no such\\nfolder")"""
EXPERIMENT = """accuracy = 0.9 + lr * seed / steps
print(preset, seed, data, steps, lr, fast)
if accuracy > 1:
    raise ArithmeticError("better than\\nperfect")"""
LAST = """card = run_card("90_toy", parameters, {"kd_accuracy": accuracy, "_half": half}, started=started,
                dataset={"name": data, "sha256": "ab", "train": 9})
save_card(card, results)
results_table("90_toy", this_run=card)"""


def notebook(path, *sources, tagged=1):
    "Write a lesson; its first `tagged` code cells are tagged `parameters`."
    cells = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# A toy lesson\n> So."}]
    for i, source in enumerate(sources):
        tags = {"tags": ["parameters"]} if i < tagged else {}
        cells.append(
            {
                "cell_type": "code",
                "id": f"c{i}",
                "metadata": tags,
                "source": source,
                "outputs": [],
                "execution_count": None,
            }
        )
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A folder to stand in, with lessons in its nbs/."
    home = tmp_path / "nbs"
    (home / "params").mkdir(parents=True)
    notebook(home / "90_toy.ipynb", PARAMETERS, SETUP, EXPERIMENT, LAST)
    notebook(home / "91_untagged.ipynb", PARAMETERS, SETUP, tagged=0)
    notebook(home / "92_twice.ipynb", PARAMETERS, PARAMETERS, SETUP, tagged=2)
    notebook(home / "93_computed.ipynb", "steps: int = 4 * 5  # > 0", SETUP)
    asleep = "import pathlib; pathlib.Path('asleep').touch(); time.sleep(60)"
    notebook(home / "94_slow.ipynb", PARAMETERS, SETUP, asleep, LAST)
    presets = {
        "long": "preset: long\nresults: results\nsteps: 2000\n",
        "text": "lr: 1e-3\n",
        "typo": "stepz: 3\n",
        "list": "- 1\n",
        "broken": "lr: [1\n",
    }
    for name, text in presets.items():
        (home / f"params/90_toy.{name}.yaml").write_text(text)
    monkeypatch.setenv("KDNB_NOTEBOOKS", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = "from kdnb.runner import main; raise SystemExit(main())"


def kdnb(*words, code=COMMAND):
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(done, words):
    assert done.returncode == 2, done
    assert done.stdout == "", done
    assert re.fullmatch(r"kdnb: [^\n]+\n", done.stderr), f"not one line: {done.stderr!r}"
    assert words in done.stderr, done.stderr


# ---------------------------------------------------------------- bad input: one line, nothing touched


@pytest.mark.parametrize(
    "words, line",
    [
        ("rum toy", "invalid choice: 'rum'"),
        ("list 90_tyo", "unknown notebook '90_tyo'; nearest: 90_toy"),
        ("results 90_tyo", "unknown notebook '90_tyo'; nearest: 90_toy"),
        ("run tyo -o out.ipynb", "unknown notebook 'tyo'; nearest: toy"),
        ("run toy -f lnog -o out.ipynb", "unknown preset 'lnog'; nearest: long"),
        ("run toy -f none.yaml -o out.ipynb", "none.yaml"),
        ("run toy -f list -o out.ipynb", "90_toy.list.yaml must hold lines like"),
        ("run toy -f broken -o out.ipynb", "90_toy.broken.yaml is no YAML"),
        ("run toy -f typo -o out.ipynb", "unknown parameter 'stepz'; nearest: steps"),
        (
            "run toy -f text -o out.ipynb",
            "lr must be float, got '1e-3' (YAML takes 1e-3 for text: write 1.0e-3)",
        ),
        ("run toy -p stepz 5 -o out.ipynb", "unknown parameter 'stepz'; nearest: steps"),
        ("run toy -p steps 2.5 -o out.ipynb", "steps must be int, got 2.5"),
        ("run toy -p steps True -o out.ipynb", "steps must be int, got True"),
        ("run toy -p steps many -o out.ipynb", "steps must be int, got 'many'"),
        ("run toy -p lr fast -o out.ipynb", "lr must be float, got 'fast'"),
        ("run toy -p lr 1e999 -o out.ipynb", "lr must be float, got inf"),
        ("run toy -p fast true -o out.ipynb", "fast must be bool, got 'true' (write True or False)"),
        ("run toy -p fast 1 -o out.ipynb", "fast must be bool, got 1"),
        ("run toy -p lr -o out.ipynb", "argument -p: expected 2 arguments"),
        ("run toy -p lr -1e-3 -o out.ipynb", "90_toy: lr must be > 0, got -0.001"),
        ("run toy -p lr 2 -o out.ipynb", "90_toy: OSError: no such folder"),
        ("run untagged -o out.ipynb", "91_untagged cannot be run: 0 of its cells are tagged `parameters`"),
        ("run twice -o out.ipynb", "92_twice cannot be run: 2 of its cells are tagged `parameters`"),
        ("run computed -o out.ipynb", "93_computed: the parameter `steps: int = 4 * 5 # > 0` must read"),
        ("run toy -o out.txt", "must be a file that ends in .ipynb, got out.txt"),
        ("run toy -o nbs/90_toy.ipynb", "would overwrite the lesson 90_toy.ipynb"),
        ("run toy -o nbs/params/../90_toy.ipynb", "would overwrite the lesson 90_toy.ipynb"),
        ("run toy -o nbs/92_twice.ipynb", "would overwrite the lesson 92_twice.ipynb"),
        ("run toy -o link.ipynb", "would overwrite the lesson 90_toy.ipynb"),
        ("run toy -o hard.ipynb", "would overwrite the lesson 90_toy.ipynb"),
        ("run toy -o elsewhere/90_toy.ipynb", "would overwrite the lesson 90_toy.ipynb"),
        ("run toy -o folder.ipynb", "must be a file that ends in .ipynb, got folder.ipynb"),
        ("run toy -p lr 0 -o new/folder/out.ipynb", "lr must be > 0, got 0"),
        ("sweep toy", "required: -g"),
        ("sweep toy -g stepz=1,2", "unknown parameter 'stepz'; nearest: steps"),
        ("sweep toy -g seed=1,two", "seed must be int, got 'two'"),
        ("sweep toy -g seed=", "seed must be int, got ''"),
        ("sweep toy -g seed=1 -j 0", "jobs must be a whole number >= 1, got 0"),
        ("sweep toy -g lr=0.1,-1", "90_toy: lr must be > 0, got -1"),
        ("sweep toy -g seed=1 --ray -j 2", "jobs must be 1, got 2"),
        ("sweep toy -g seed=1 --gpus 0.5", "pass ray too, got 1 and 0.5"),
        ("sweep toy -g seed=1 --ray --gpus 1.5", "gpus must be a whole number >= 1, got 1.5"),
        ("sweep toy -g seed=1,1", "the grid holds one run twice"),
        ("sweep toy -g lr=1,1.0", "the grid holds one run twice"),
        ("sweep toy -g seed=1 -g seed=2", "'seed' is set twice"),
        ("sweep toy -g seed=1 -p seed 2", "'seed' is set twice"),
        ("run toy -p lr 1 -p lr 2 -o out.ipynb", "'lr' is set twice"),
        ("run toy -p steps 010 -o out.ipynb", "steps must be int, got '010'"),
        ("run toy -p zzzzqqqq 1 -o out.ipynb", "unknown parameter 'zzzzqqqq'; known: preset, seed"),
        ("results toy --format markdwon", "unknown format 'markdwon'; nearest: markdown"),
        ("results toy --format cvs --plot a.svg", "unknown format 'cvs'; nearest: csv"),
        ("results toy --preset lnog", "unknown preset 'lnog'; nearest: long"),
        ("results toy --rows kd_acuracy", "unknown row 'kd_acuracy'; nearest: kd_accuracy"),
        ("results toy --rows (", "row must be a name or a regular expression, got '('"),
        ("results toy --columns our5", "unknown column 'our5'; nearest: ours"),
        ("results toy --plot a.pdf", "unknown kind of picture '.pdf'; nearest: .png"),
        ("results untagged --plot a.svg", "91_untagged: no recorded runs yet, so nothing to plot"),
        ("compare toy", "the following arguments are required: RUN"),
        ("compare tyo:long toy:long", "unknown notebook 'tyo'; nearest: toy"),
        ("compare toy:lnog toy:long", "unknown run 'toy:lnog'; nearest: toy:long"),
        ("compare untagged toy:long", "untagged: no recorded runs yet"),
        ("compare : toy:long", "a run reads LESSON:PRESET:SEED or is a file, got ':'"),
        ("compare toy:long:7 toy:long", "unknown seed '7'; known: 0, 1"),
        ("compare toy toy:long", "toy is more than one: long, on digits; default, on digits"),
        ("compare old/90_tyo.jsonl toy:long", "unknown file 'old/90_tyo.jsonl'; nearest: old/90_toy.jsonl"),
        ("compare out.ipynb toy:long", "out.ipynb is no executed notebook"),
        ("copy mine", "nothing was copied: 1 files are there already, such as mine/90_toy.ipynb"),
        ("copy nbs --force", "nothing was copied"),
    ],
)
def test_bad_input(toy, words, line):
    (toy / "out.ipynb").write_text("an earlier result")
    (toy / "mine").mkdir()
    (toy / "mine/90_toy.ipynb").write_text("my notes")
    (toy / "folder.ipynb").mkdir()
    (toy / "link.ipynb").symlink_to(toy / "nbs/90_toy.ipynb")
    os.link(toy / "nbs/90_toy.ipynb", toy / "hard.ipynb")
    (toy / "elsewhere").symlink_to(toy / "nbs")
    for i in range(3): save_card(card(i) if i == 2 else card(i, preset="long", steps=2000), "runs")
    shutil.copytree(toy / "runs", toy / "old")
    before = tree(toy)
    refused(kdnb(*words.split()), line)
    assert tree(toy) == before and not (toy / "new").exists()


def test_without_papermill(toy):
    code = "import sys; sys.modules['papermill'] = None; " + COMMAND
    before = tree(toy)
    refused(kdnb("run", "toy", code=code), "papermill is not installed: pip install 'kdnb[run]'")
    assert tree(toy) == before


def test_list_starts_at_once(toy):
    code = (
        "import sys; from kdnb.runner import main; main(); "
        "print(*{'torch', 'papermill', 'yaml', 'matplotlib', 'numpy'} & {*sys.modules}, file=sys.stderr)"
    )
    done = kdnb("list", code=code)
    assert done.stderr == "\n", f"loaded: {done.stderr}"
    assert re.search(r"^90_toy +A toy lesson .*\blong\b", done.stdout, flags=re.M), done.stdout
    shown = kdnb("list", "90_toy").stdout
    assert re.search(r"^ +steps +int +20 +> 0$", shown, flags=re.M), shown
    assert re.search(r"^ +data +str +'digits' +the \"#\" here is meant$", shown, flags=re.M), shown
    assert all(kdnb(*words).returncode == 0 for words in (["--help"], ["run", "--help"]))
    assert kdnb("--version").stdout == f"kdnb {version}\n"


def test_every_option_has_a_help_text():
    def actions(parser):
        for action in parser._actions:
            if isinstance(action.choices, dict):
                for sub in action.choices.values(): yield from actions(sub)
            else:
                yield action
    assert [a.dest for a in actions(_parser()) if not a.help] == []


def test_setup_is_checked_elsewhere(toy):
    "The caller's process keeps its folder, its modules and its output clean."
    before = os.getcwd(), dict(os.environ), set(sys.modules)
    with pytest.raises(ValueError, match="lr must be > 0, got -1"):
        run_notebook("toy", parameters={"lr": -1})
    assert (os.getcwd(), dict(os.environ)) == before[:2]
    assert "papermill" not in set(sys.modules) - before[2]


# ---------------------------------------------------------------- runs


def malloc():
    return {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_"))}


@pytest.mark.skipif(workers.platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize("own", [{}, {"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}])
def test_kernels_keep_their_memory_unless_told_otherwise(toy, monkeypatch, own):
    told = "import json, os; open('told', 'a').write(json.dumps(dict(os.environ)) + chr(10))"
    notebook(toy / "nbs/95_told.ipynb", PARAMETERS, told)
    for name in malloc(): monkeypatch.delenv(name)
    for name, value in own.items(): monkeypatch.setenv(name, value)
    run_notebook("told", output=toy / "a.ipynb", log=lambda line: None)
    assert malloc() == own      # never in the caller's process
    check, kernel = map(json.loads, (toy / "nbs/told").read_text().splitlines())
    assert {k: v for k, v in check.items() if k.startswith(("MALLOC_", "GLIBC_"))} == own
    heap = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1099511627776"}
    assert {k: v for k, v in kernel.items() if k.startswith(("MALLOC_", "GLIBC_"))} == (own or heap)


def test_a_sweep_checks_each_run_once(toy):
    notebook(toy / "nbs/95_told.ipynb", PARAMETERS, "open('told', 'a').write(f'{seed} ')")
    assert {*sweep("told", {"seed": [1, 2]}, log=lambda line: None).values()} == {"done"}
    assert sorted((toy / "nbs/told").read_text().split()) == ["1", "1", "2", "2"]     # check, and run


def test_same_as_papermill(toy):
    "kdnb run and papermill's own command: the same cells, outputs and card."
    ours = kdnb("run", "90_toy", "-f", "long", "-p", "seed", "3", "-p", "lr", "1", "-o", "a/{ours}.ipynb")
    assert ours.returncode == 0, ours
    words = "nbs/90_toy.ipynb plain.ipynb --cwd nbs -f nbs/params/90_toy.long.yaml -p seed 3 -p lr 1"
    command = [sys.executable, "-m", "papermill", *words.split()]
    plain = subprocess.run(command, capture_output=True, text=True)
    assert plain.returncode == 0, plain
    a, b = (json.loads((toy / p).read_text())["cells"] for p in ("a/{ours}.ipynb", "plain.ipynb"))
    assert ["".join(c["source"]) for c in a] == ["".join(c["source"]) for c in b]

    def said(cells):
        return [["".join(o["text"]) for o in c.get("outputs", []) if "text" in o] for c in cells]

    assert said(a) == said(b) and said(a)[-2] == ["long 3 digits 2000 1 False\n"]
    first, second = load_cards("90_toy", toy / "nbs/results")
    for made in (first, second):
        assert made.pop("seconds") < 60
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", made.pop("started"))
    assert first == second
    assert first["parameters"] == {
        "preset": "long",
        "seed": 3,
        "device": "cpu",
        "results": "results",
        "data": "digits",
        "steps": 2000,
        "lr": 1,
        "fast": False,
    }
    assert first["metrics"] == {"kd_accuracy": 0.9 + 3 / 2000, "_half": 1000}
    # what the command printed: the table that the notebook shows, and where it lies
    assert "90_toy: the paper's numbers beside ours" in ours.stdout
    line = r"^this run: long, on digits, lr=1.0 +kd_accuracy +90.15 +1 "
    assert re.search(line, ours.stdout, flags=re.M), ours.stdout
    assert ours.stdout.rstrip().endswith("the executed notebook: a/{ours}.ipynb"), ours.stdout
    assert sorted(p.name for p in toy.glob("a/*")) == ["{ours}.ipynb"]


def test_default_output_and_text_parameters(toy):
    "An int may stand for a float; the digits of a text parameter stay text."
    done = kdnb("run", "toy", "-p", "data", "10", "-p", "seed", "-2")
    assert done.returncode == 0, done
    cells = json.loads((toy / "runs/90_toy.default.data=10.seed-2.ipynb").read_text())["cells"]
    assert 'data = "10"' in "".join(cells[2]["source"])
    assert [p.relative_to(toy).as_posix() for p in toy.rglob("*.jsonl")] == ["runs/90_toy.jsonl"], "its card"
    (made,) = load_cards("90_toy")
    assert (made["seed"], made["parameters"]["results"]) == (-2, "runs")
    again = sweep("toy", {"seed": [-2]}, parameters={"data": "10"}, log=str)
    assert again == {"90_toy.default.data=10.seed-2.ipynb": "skipped"}, "run, sweep, results: one workflow"
    shown = kdnb("results", "toy").stdout
    assert re.search(r"^default, on 10, data=10 +kd_accuracy +89.00 +1 ", shown, flags=re.M), shown


def test_failed_run(toy):
    (toy / "out.ipynb").write_text("an earlier result")
    done = kdnb("run", "toy", "-p", "seed", "3", "-p", "lr", "1.0", "-o", "out.ipynb")
    assert done.returncode == 1, done
    assert done.stderr == (
        "kdnb: 90_toy failed in cell [4]: ArithmeticError: better than perfect; see out.failed.ipynb\n"
    )
    assert (toy / "out.ipynb").read_text() == "an earlier result"
    assert "better than" in (toy / "out.failed.ipynb").read_text() and not (toy / "out.part.ipynb").exists()
    assert kdnb("run", "toy", "-o", "out.ipynb").returncode == 0
    assert (toy / "out.ipynb").read_text() != "an earlier result" and not (toy / "out.failed.ipynb").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c(toy):
    command = [sys.executable, "-m", "kdnb.runner", "run", "slow", "-o", "out.ipynb"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores Ctrl-C
    child = subprocess.Popen(command, preexec_fn=heard, **pipes)
    end = time.time() + 60
    while not list(toy.rglob("asleep")) and child.poll() is None and time.time() < end:
        time.sleep(0.1)
    assert list(toy.rglob("asleep"))
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=50)
    assert (child.returncode, said) == (130, "kdnb: stopped\n")
    assert sorted(p.name for p in toy.glob("out*")) == ["out.failed.ipynb"]


def states(text):
    "What a sweep says of each run, without its count."
    return dict(re.sub(r" \(\d+ of \d+.*\)$", "", line).split(": ", 1) for line in text.splitlines())


def test_sweep(toy):
    words = "sweep toy -f long -p steps 20 -g seed=1,2,3 -g lr=0.5,1 -j 2".split()
    done = kdnb(*words)
    assert done.returncode == 1 and done.stderr == "", done
    state = states(done.stdout)
    bad = "90_toy.long.steps=20.lr=1.seed3.ipynb"
    assert len(state) == 6 and {k for k, v in state.items() if v == "done"} == set(state) - {bad}
    assert state[bad].startswith("failed: 90_toy failed in cell [4]: ArithmeticError: better than perfect")
    there = {p.name for p in (toy / "runs").iterdir()}
    assert there == set(state) - {bad} | {bad.replace(".ipynb", ".failed.ipynb")}
    assert sorted((c["seed"], c["parameters"]["lr"]) for c in load_cards("90_toy", "nbs/results")) == [
        (1, 0.5),
        (1, 1),
        (2, 0.5),
        (2, 1),
        (3, 0.5),
    ]
    before = tree(toy / "runs")
    again = kdnb(*words[:-2])
    state = states(again.stdout)
    assert again.returncode == 1 and {k for k, v in state.items() if v == "skipped"} == set(state) - {bad}
    assert {k: v for k, v in tree(toy / "runs").items() if "failed" not in k} == {
        k: v for k, v in before.items() if "failed" not in k
    }
    all_there = "sweep toy -f long -p steps 20 -p lr 0.5 -g seed=1,2"
    assert kdnb(*all_there.split()).returncode == 0
    shown = kdnb("results", "toy").stdout
    rows = re.search(r"^long, on digits, steps=20, lr=0.5 +kd_accuracy +95.00 ± 2.50 +3 ", shown, flags=re.M)
    assert rows, shown


def test_sweep_of_what_records_nothing_records_beside_its_output(toy):
    said = []
    for state in ("done", "skipped"):
        report = sweep("toy", {"seed": [7]}, folder="mine", log=said.append)
        assert report == {"90_toy.default.seed7.ipynb": state}
    assert [c["seed"] for c in load_cards("90_toy", "mine")] == [7]
    name = "90_toy.default.seed7.ipynb"
    assert said == [f"{name}: done (1 of 1)", f"{name}: skipped (1 of 1)"]


# ---------------------------------------------------------------- Ray


@pytest.mark.skipif(not find_spec("ray") or not Path("/proc").exists(), reason="needs Ray, and Linux")
def test_sweep_on_ray_outlives_a_killed_worker(toy):
    "The first attempt of seed 1 kills the task's process, two above the kernel; the cards come home."
    kill = """import os, pathlib, signal
attempts = pathlib.Path("attempts"); tried = attempts.exists()
if seed == 1:
    attempts.write_text(attempts.read_text() + "x" if tried else "x")
    if not tried:
        run = os.getppid()
        task = int(pathlib.Path(f"/proc/{run}/stat").read_text().rpartition(")")[2].split()[1])
        assert b"ray::" in pathlib.Path(f"/proc/{task}/cmdline").read_bytes()
        os.kill(task, signal.SIGKILL)
        time.sleep(60)"""
    notebook(toy / "nbs/90_toy.ipynb", PARAMETERS, SETUP, kill, EXPERIMENT, LAST)
    said, cpus, heard = [], max(1, os.cpu_count() // 2), signal.getsignal(signal.SIGTERM)  # two at once
    (toy / "runs").mkdir()
    (toy / "runs/90_toy.long.seed0.failed.ipynb").write_text("of an earlier sweep")
    report = sweep("toy", {"seed": [0, 1, 2, 3]}, preset="long", ray="", cpus=cpus, log=said.append)
    assert set(report.values()) == {"done"} and len(said) == 4, report
    assert (toy / "nbs/attempts").read_text() == "xx", "once killed, once tried again"
    cards = load_cards("90_toy", toy / "nbs/results")
    assert sorted(c["seed"] for c in cards) == [0, 1, 2, 3]
    assert {c["parameters"]["results"] for c in cards} == {"results"}
    assert {p.name for p in (toy / "runs").iterdir()} == set(report)
    assert signal.getsignal(signal.SIGTERM) is heard and not sys.modules["ray"].is_initialized()
    assert "skipped" in sweep("toy", {"seed": [3]}, preset="long", ray="", log=str).values()


@pytest.mark.skipif(not find_spec("ray"), reason="needs Ray")
def test_no_ray_cluster_answers(toy, monkeypatch, capsys):
    monkeypatch.setattr(workers, "_ANSWER", 3)
    before = tree(toy)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        assert main(["sweep", "toy", "-g", "seed=1,2", "--ray", address]) == 2
    out, error = capsys.readouterr()
    line = f"kdnb: no Ray cluster answers at '{address}': nothing in 3 s; [^\n]+\n"
    assert out == "" and re.fullmatch(line, error), error
    assert tree(toy) == before


def test_copy(toy):
    done = kdnb("copy", "a/mine")
    assert done.returncode == 0 and "a/mine" in done.stdout, done
    assert tree(toy / "a/mine") == tree(toy / "nbs")
    (toy / "a/mine/90_toy.ipynb").write_text("my notes")
    refused(kdnb("copy", "a/mine"), "nothing was copied")
    assert (toy / "a/mine/90_toy.ipynb").read_text() == "my notes"
    assert kdnb("copy", "a/mine", "--force").returncode == 0
    assert tree(toy / "a/mine") == tree(toy / "nbs")


# ---------------------------------------------------------------- cards


def card(seed=0, started=0.0, *, metrics=None, dataset=None, seconds=60, **parameters):
    values = {
        "preset": "default",
        "seed": seed,
        "device": "cpu",
        "data": "digits",
        "steps": 20,
        "lr": 0.1,
        "fast": False,
    } | parameters
    return run_card(
        "90_toy",
        values,
        metrics or {"kd_accuracy": 0.5},
        seconds=seconds,
        started=started,
        dataset=dataset or {"name": "digits", "sha256": "ab"},
    )


def test_card_holds_what_it_must():
    made = card(
        3, 86400.0, root="/data/me", results="/data/me/results", student="~/me/net.pt", teacher="C:\\me\\t"
    )
    assert made["parameters"] == card(3)["parameters"] | {
        "results": "results",
        "student": "net.pt",
        "teacher": "t",
    }
    assert (made["started"], made["seconds"], made["seed"]) == ("1970-01-02T00:00:00Z", 60, 3)
    assert {"device", "threads", "python", "torch", "kdnb", "commit", "samples_per_s"} <= set(made)
    assert card(data="folder:/data/me/cifar10-jpeg/")["parameters"]["data"] == "folder:cifar10-jpeg"
    assert card(data="folder:cifar10-jpeg")["parameters"]["data"] == "folder:cifar10-jpeg"
    assert json.loads(json.dumps(made)) == made and "me" not in re.findall(r"\w+", json.dumps(made))


@pytest.mark.parametrize(
    "wrong",
    [
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": float("inf")}},
        {"metrics": {"loss": [1.0]}},
        {"metrics": {"kd_accuracy": 98.7}},
        {"metrics": {"at_pgd20-linf-8/255": 44.5}},
        {"metrics": {"ARD, robust teacher | cw30-l2-0.5": 44.5}},
        {"metrics": {"loss": "1"}},
        {"dataset": {"sha256": "ab"}},
        {"lr": float("nan")},
    ],
)
def test_card_refuses(wrong):
    with pytest.raises(ValueError):
        card(**wrong)


def test_run_parameters():
    space = {}
    exec(PARAMETERS + "\nimport os\nhalf = steps / 2\n_seed: int = 3\nnames: list = []\nlr = 1", space)
    found = run_parameters(space)
    assert found == {
        "preset": "default",
        "seed": 0,
        "device": "cpu",
        "root": "",
        "results": "",
        "data": "digits",
        "steps": 20,
        "lr": 1.0,
        "fast": False,
    }
    assert type(found["lr"]) is float, "1 and 1.0 are one learning rate"
    plain = {"In": [], "exit": print, "a": 1, "b": "x", "_": 4, "__name__": "x"}
    assert run_parameters(plain) == {"a": 1, "b": "x"}


def test_read_parameters(toy):
    found = Lesson("90_toy").parameters
    assert list(found) == [line.split(":")[0] for line in PARAMETERS.splitlines()]
    assert found["lr"] == (float, 0.1, "learning rate") and found["fast"] == (bool, False, "skip nothing")


WRITER = """
import sys
from kdnb.runs import save_card
who, folder = sys.argv[1:]
for i in range(60):
    card = {"notebook": "90_toy", "preset": "default", "seed": i, "parameters": {}, "metrics": {"loss": 1.0},
            "dataset": {"name": "digits"}, "device": who, "seconds": 1, "started": "x", "extra": "y" * 20_000}
    save_card(card, folder)
"""


def test_save_card_beside_other_processes(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen([*command, str(i), str(tmp_path / "new")], env=env) for i in range(5)]
    assert [w.wait(60) for w in writers] == [0] * 5
    cards = load_cards("90_toy", tmp_path / "new")
    found = sorted((int(c["device"]), c["seed"]) for c in cards)
    assert found == [(who, i) for who in range(5) for i in range(60)]
    assert len((tmp_path / "new/90_toy.jsonl").read_text().splitlines()) == 300, "no blank lines either"


def test_save_and_load(tmp_path):
    assert save_card(card(), "") is None
    path = save_card(card(1, 5.0), tmp_path)
    save_card(card(1, 5.0), tmp_path)
    assert len(load_cards("90_toy", tmp_path)) == 2, "nothing is replaced"
    path.write_text(path.read_text() + '{"notebook"')
    with pytest.warns(UserWarning, match=rf"{tmp_path.name}/90_toy.jsonl: its last line is torn"):
        assert len(load_cards("90_toy", tmp_path)) == 2
    with pytest.warns(UserWarning, match="is now in 90_toy.torn"):
        save_card(card(2), tmp_path)
    assert len(load_cards("90_toy", tmp_path)) == 3
    assert (tmp_path / "90_toy.torn").read_text() == '{"notebook"\n'
    path.write_text(path.read_text().rstrip())  # as an editor leaves it
    save_card(card(3), tmp_path)
    assert len(load_cards("90_toy", tmp_path)) == 4
    path.write_text('{"notebook"\n' + path.read_text())
    with pytest.raises(ValueError, match="line 1 is no run card"):
        load_cards("90_toy", tmp_path)
    path.write_text('{"notebook": "90_toy"}\n')
    with pytest.raises(ValueError, match="line 1 is no run card: no preset, seed, "):
        load_cards("90_toy", tmp_path)
    assert load_cards("90_toy", tmp_path / "nowhere") == []


@pytest.mark.parametrize("broken", [lambda: 3, lambda: OSError(28, "No space left on device")])
def test_save_card_on_a_full_disk(tmp_path, monkeypatch, broken):
    path = save_card(card(), tmp_path)
    before, opened = path.read_bytes(), open

    class Full:
        def __init__(self, file): self.file = file
        def __getattr__(self, name): return getattr(self.file, name)
        def __enter__(self): return self
        def __exit__(self, *_): self.file.close()
        def write(self, line):
            self.file.write(line[:3])
            if isinstance(broken(), OSError): raise broken()
            return broken()

    monkeypatch.setattr("kdnb.runs.open", lambda *a, **kw: Full(opened(*a, **kw)), raising=False)
    with pytest.raises(OSError, match="90_toy.jsonl could not be written"):
        save_card(card(1), tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "wrong, line",
    [
        ({"metrics": [1]}, "metrics must be dict"),
        ({"metrics": {"loss": "1"}}, "metric loss must be a number, got '1'"),
        ({"metrics": {"loss": float("nan")}}, "metric loss must be a number, got nan"),
        ({"seed": "0"}, "seed must be int, got '0'"),
        ({"seed": True}, "seed must be int, got True"),
        ({"seconds": None}, "seconds must be int or float"),
        ({"started": 3}, "started must be str"),
        ({"dataset": {"name": 3}}, "dataset name must be str"),
        ({"commit": ["a"]}, "commit must be str or None"),
        ({"parameters": "x" * 500}, "parameters must be dict, got 'xxx"),
    ],
)
def test_cards_of_wrong_types(tmp_path, wrong, line):
    (tmp_path / "90_toy.jsonl").write_text(json.dumps(card() | wrong) + "\n")
    with pytest.raises(ValueError, match=f"line 1 is no run card: {re.escape(line)}") as said:
        load_cards("90_toy", tmp_path)
    assert len(str(said.value)) < 250


def test_checkpoints_are_named_by_the_protocol(toy):
    "Who runs it and where does not count; what is computed does, and paths count in full."
    def key(**changes):
        return protocol_name("90_toy", {"preset": "default", "seed": 0} | changes)[2]
    assert re.fullmatch("[0-9a-f]{8}", key())
    elsewhere = dict(results="/a/b", checkpoints="/c", threads=4, device="cuda", seed=3, root="/d")
    assert key(**elsewhere) == key() == key(lr=0.1)
    others = [key(lr=0.2), key(steps=3), key(data="folder:/v1/imgs"), key(data="folder:/v2/imgs"), key()]
    assert len({*others}) == 5 and key(lr=1) == key(lr=1.0)


def test_html_stays_out_of_the_table(toy):
    wicked = card(metrics={"<img src=x onerror=alert(1)>": 1.0, "two\nlines | accuracy": 0.5})
    wicked["device"] = "<b>cpu</b>"
    paper = {"default": {"source": "<script>"}}
    table = results_table("90_toy", [wicked], paper=paper)
    shown = table._repr_markdown_()
    assert "&lt;img" in shown and not re.search("<(?!br>)", shown)
    assert "two lines" in str(table) and "two\nlines" not in str(table)


_PAIRS = zip("abcdefgh", "bcdefghi", strict=True)
BOMB = "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in _PAIRS)


@pytest.mark.parametrize(
    "text, line",
    [
        (BOMB, "aliases are not allowed"),
        ("lr: " + "[" * 3000, "nested more than 4 deep"),
        ("".join(f"k{i}: 1\n" for i in range(300_000)), "larger than 64 KiB"),
        ("lr: 0.1\nlr: 0.2\n", "'lr' is set twice"),
        ("steps: 010\n", "'010' is not read as a decimal number"),
        ("steps: 1:30\n", "'1:30' is not read as a decimal number"),
        ("data: [" + "x, " * 9000 + "]\n", "data must be str, got ['x', 'x'"),
        ("x" * 9000, "must hold lines like `seed: 1`, got 'xxx"),
        ("data: \x00\n", "is no YAML"),
        ("data: 2020-99-99\n", "is no YAML"),
    ],
)
def test_hostile_yaml(toy, text, line):
    (toy / "bad.yaml").write_text(text)
    start = time.time()
    with pytest.raises(ValueError, match=re.escape(line)) as said:
        plan_run("toy", "bad.yaml")
    assert time.time() - start < 5 and len(str(said.value)) < 300


def test_names_of_runs(toy):
    "Two runs never share a name; short ones say what differs, and none is long."
    def name(**parameters):
        return _output_name(*plan_run("toy", None, parameters)[::2])
    assert name(seed=2, lr=0.5) == "90_toy.default.lr=0.5.seed2.ipynb"
    texts = ["1 2", "1.2", "1,2", "folder:/v1/imgs", "folder:/v2/imgs", "x, lr=2", "x=y", "é", "x" * 300]
    names = [name(data=text) for text in texts] + [name(data="x", lr=2.0)]
    assert len({*names}) == len(names) and max(map(len, names)) + len(".failed") < 100
    cards = [card(data="folder:/v1/imgs")]
    save_card(cards[0], "mine")
    def like(data):
        asked = plan_run("toy", None, {"data": data})[2] | {"results": "x"}
        return len(load_cards("90_toy", "mine", like=asked))
    assert (like("folder:/v1/imgs"), like("folder:/v2/imgs")) == (1, 0)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGINT])
def test_sweep_leaves_no_run_behind(toy, number):
    wait = "import os, pathlib; pathlib.Path(f'asleep{seed}').write_text(str(os.getpid())); time.sleep(90)"
    notebook(toy / "nbs/94_slow.ipynb", PARAMETERS, SETUP, wait, LAST)
    def heard():
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(each, signal.SIG_DFL)
    words = "sweep slow -g seed=1,2,3 -j 2".split()
    child = subprocess.Popen([sys.executable, "-m", "kdnb.runner", *words], preexec_fn=heard,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 90
    while time.time() < end and len([p for p in (toy / "nbs").glob("asleep*") if p.read_text()]) < 2:
        time.sleep(0.2)
    kernels = [int(p.read_text()) for p in (toy / "nbs").glob("asleep*")]
    assert len(kernels) == 2
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    if number != signal.SIGKILL: assert (child.returncode, said) == (130, "kdnb: stopped\n")
    end = time.time() + 40
    def alive(pid):
        try: return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError: return False
    while any(map(alive, kernels)) and time.time() < end: time.sleep(0.2)
    assert not any(map(alive, kernels)) and len(list((toy / "nbs").glob("asleep*"))) == 2
    assert not list(toy.rglob("*.jsonl"))


def test_cards_like_a_run(tmp_path):
    "Protocol and seed; who ran it, and where, does not count."
    for i, made in enumerate([card(0), card(1), card(0, lr=0.2), card(0, device="cuda:0"), card(0, extra=1)]):
        save_card(made | {"started": str(i)}, tmp_path)

    def like(**changes):
        return [
            int(c["started"]) for c in load_cards("90_toy", tmp_path, like=card()["parameters"] | changes)
        ]

    assert (like(), like(seed=1), like(lr=0.2), like(lr=0.3)) == ([0, 3], [1], [2], [])
    assert like(results="/data/me", root="/data") == like()


def test_cards_come_from_three_places(toy):
    "Those that kdnb brings, ./results and ./runs; none twice, also when one is the other."
    for i, folder in enumerate(["nbs/results", "results", "runs"]):
        save_card(card(i), folder)
    assert [c["seed"] for c in load_cards("90_toy")] == [0, 1, 2]
    os.chdir("nbs")
    assert [c["seed"] for c in load_cards("90_toy")] == [0]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit(tmp_path):
    (tmp_path / "nbs/results").mkdir(parents=True)
    shutil.copytree(ROOT / "kdnb", tmp_path / "kdnb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def ask(*words):
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit():
        return ask(sys.executable, "-c", "import kdnb.runs; print(kdnb.runs._commit())")

    def git(*words):
        return ask("git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words)

    assert commit() == "None", "no repository"
    git("init")
    assert commit() == "None", "no commit yet"
    git("add", "."), git("commit", "-m", "first")
    head = git("rev-parse", "--short", "HEAD")
    assert commit() == head
    (tmp_path / "nbs/results/90_toy.jsonl").write_text("{}\n")
    assert commit() == head, "results do not count"
    (tmp_path / "kdnb/new.py").write_text("")
    assert commit() == head + "+"
    (tmp_path / "settings.ini").unlink()
    assert commit() == "None", "an installed package inside somebody's repository"


# ---------------------------------------------------------------- the table


def row(table, protocol, quantity="kd_accuracy"):
    (found,) = [r for r in table.rows if (r["protocol"], r["quantity"]) == (protocol, quantity)]
    return found


def test_table_arithmetic(toy):
    values = {0: 0.97, 1: 0.974, 2: 0.981}
    metrics = {s: {"kd_accuracy": v, "loss": 0.1 * s, "_hidden": 1.0} for s, v in values.items()}
    cards = [card(s, 10.0 * s, metrics=m, seconds=60 * (s + 1)) for s, m in metrics.items()]
    cards.insert(0, card(1, 99.0, metrics={"kd_accuracy": 0.968, "loss": 0.3}))  # later than the other seed 1
    found = row(results_table("90_toy", cards, paper={}), "default, on digits")
    # by hand: 97.0, 96.8, 98.1: mean 97.3; deviations -.3, -.5, .8; squares .09 + .25 + .64 = .98; / 2; root
    assert found["mean"] == pytest.approx(97.3, abs=1e-12) and found["std"] == pytest.approx(0.7, abs=1e-12)
    assert (found["n"], found["seeds"], found["paper"]) == (3, [0, 1, 2], None)
    assert found["minutes"] == pytest.approx((1 + 1 + 3) / 3) and found["date"] == "1970-01-01"
    text = str(results_table("90_toy", cards, paper={}))
    line = r"^default, on digits +kd_accuracy +97.30 ± 0.70 +3 .* 1.7 +1970-01-01$"
    assert re.search(line, text, flags=re.M), text
    assert re.search(r"^ +loss +0.17 ± 0.15 +3$", text, flags=re.M), text
    assert "_hidden" not in text
    one = results_table("90_toy", cards[:1], paper={})
    alone = row(one, "default, on digits")
    assert (alone["std"], alone["n"]) == (None, 1) and "±" not in str(one).split("ours:")[0]


def test_table_groups_by_protocol(toy):
    "Seed, device and folders do not part runs; parameters and data do; a younger parameter has its default."
    young = card(5)
    del young["parameters"]["fast"]
    old = card(2, preset="long", steps=2000)
    del old["parameters"]["steps"]  # the preset sets it today, but this run cannot have had it
    cards = [
        card(0),
        card(1, device="cuda:0", results="x", threads=4),
        young,
        card(2, lr=0.2),
        card(3, fast=True),
        card(0, preset="long", steps=2000),
        card(1, preset="long"),
        old,
        card(4, dataset={"name": "digits", "sha256": "other"}),
        card(4, dataset={"name": "mnist", "sha256": "ab"}),
    ]
    table = results_table("90_toy", cards, paper={})
    sizes = [(r["protocol"], r["n"]) for r in table.rows]
    assert sorted(sizes) == sorted(
        [
            ("default, on digits", 3),
            ("default, on digits", 1),
            ("default, on mnist", 1),
            ("default, on digits, lr=0.2", 1),
            ("default, on digits, fast=True", 1),
            ("long, on digits", 1),
            ("long, on digits, steps=20", 2),
        ]
    )
    assert sum(n for _, n in sizes) == len(cards), "no run is left out"


def test_table_beside_the_paper(toy):
    paper = {"long": {"source": "Somebody 2015, table 1", "other_accuracy": 98.9, "kd_accuracy": 98.73}}
    cards = [
        card(0, metrics={"loss": 1.0, "kd_accuracy": 0.5}),
        card(0, preset="long", steps=2000, metrics={"loss": 123456.0, "kd_accuracy": 0.98}),
        card(0, preset="long", steps=9),
    ]
    mine = card(8, preset="long", steps=2000, metrics={"kd_accuracy": 0.25})
    table = results_table("90_toy", cards, this_run=mine, paper=paper)
    labels = [r["protocol"] for r in table.rows]
    assert labels[0] == "long, on digits" and labels[-1] == "this run: long, on digits"
    first = [r for r in table.rows if r["protocol"] == "long, on digits"]
    assert [(r["quantity"], r["paper"], r["n"]) for r in first] == [  # the paper's come first, all of them
        ("other_accuracy", 98.9, 0),
        ("kd_accuracy", 98.73, 1),
        ("loss", None, 1),
    ]
    asked = row(table, "this run: long, on digits")
    assert (asked["mean"], asked["paper"]) == (25, 98.73)
    others = [r for r in table.rows if "steps=9" in r["protocol"] or "default" in r["protocol"]]
    assert len(others) == 3 and all(r["paper"] is None for r in others), "another experiment, not the paper's"
    text, markdown = str(table), table._repr_markdown_()
    assert re.search(r"^ +kd_accuracy +98.73 +98.00 +1$", text, flags=re.M) and "1.235e+05" in text
    assert "paper: Somebody 2015, table 1" in text and "paper: Somebody 2015, table 1" in markdown
    lines = markdown.split("\n\n")[1].splitlines()
    assert len(lines) == len(table.rows) + 2 and {line.count("|") for line in lines} == {9}
    assert "| kd_accuracy | 98.73 | 98.00 | 1 |" in re.sub(" +", " ", markdown)
    (toy / "nbs/results").mkdir()
    (toy / "nbs/results/90_toy.paper.yaml").write_text("long: {source: Shipped, kd_accuracy: 98.73}\n")
    assert "paper: Shipped" in str(results_table("90_toy", cards))
    assert "paper: Shipped" not in str(results_table("90_toy", cards[:1])), "nothing of it is shown"


# ---------------------------------------------------------------- grids: quantities called "row | column"


def cells_of(line):
    "Of a line of a text table, whose columns are two spaces apart or more."
    return re.split(r" {2,}", line.rstrip())


def blocks(table):
    "The tables of a results table as text: lists of lines, rules left out."
    parts = str(table).split("\n\n")[1:-1]
    return [[line for line in part.splitlines() if line.strip("- ")] for part in parts]


PGD = "pgd20-linf-8/255"


def grid_card(seed=0, small=0.5, **kw):
    metrics = {
        "small | accuracy": small,
        f"small | {PGD}": small / 2,
        "small | ece": 0.1 + seed / 10,
        "large | accuracy": 0.9,
        f"large | {PGD}": 0.6,
    }
    return card(seed, metrics=metrics | kw.pop("more", {}), **kw)


def test_grid(toy):
    cards = [grid_card(s, v, seconds=60) for s, v in enumerate([0.5, 0.7])]
    table = results_table("90_toy", cards, paper={})
    (grid,) = blocks(table)
    head, small, large = map(cells_of, grid)
    assert head == ["protocol", "row", "accuracy", PGD, "ece", "n", "device", "minutes", "date"]
    both = {r["quantity"]: r for r in table.rows}
    percent = both["small | accuracy"], both[f"small | {PGD}"]
    assert [r["mean"] for r in percent] == pytest.approx([60, 30]), "percent, attacks too"
    assert both["small | ece"]["mean"] == pytest.approx(0.15), "no percent"
    assert small[:2] == ["default, on digits", "small"]
    assert small[2:4] == [f"{r['mean']:.2f} ± {r['std']:.2f}" for r in percent]
    assert small[5] == "2" and small[7:] == ["1.0", "1970-01-01"]
    # the protocol, the device and so on are said once; the columns stay; nobody measured large's ece
    assert large == ["", "large", "90.00 ± 0.00", "60.00 ± 0.00"]
    assert grid[0].index(PGD) == grid[1].index(small[3]) == grid[2].index(large[3])
    assert len(table.rows) == 5 and all(r["seeds"] == [0, 1] for r in table.rows)


def test_grid_beside_the_paper(toy):
    numbers = {"large | accuracy": 95.2, f"small | {PGD}": 31.0, "huge | accuracy": 98.0, "small | ece": 0.2}
    paper = {"default": {"source": "Somebody 2020", **numbers}}
    cards = [grid_card(0), grid_card(1, steps=9)]
    table = results_table("90_toy", cards, paper=paper)
    (grid,) = blocks(table)
    assert [cells_of(line)[1] for line in grid[1:]] == ["large", "small", "huge", "small", "large"]
    small = next(line for line in grid if cells_of(line)[1] == "small")
    assert "25.00 (paper 31.00)" in small and "0.1 (paper 0.2)" in small
    huge = next(line for line in grid if cells_of(line)[1] == "huge")
    assert cells_of(huge)[2:] == ["(paper 98.00)", "0"], "a number of the paper alone"
    assert str(table).count("(paper") == 4, "another protocol is not the paper's"
    assert "paper: Somebody 2020" in str(table)


def test_grid_below_the_plain_table(toy):
    "The plain table is the one that it would be without the grid; Markdown says the same as text."
    more = {"kd_accuracy": 0.5, "loss": 0.25}
    mixed = results_table("90_toy", [grid_card(0, more=more)], paper={})
    plain, grid = blocks(mixed)
    assert [plain] == blocks(results_table("90_toy", [card(0, metrics=more)], paper={}))
    assert [grid] == blocks(results_table("90_toy", [grid_card(0)], paper={}))
    assert {r["quantity"] for r in mixed.rows} == {*grid_card()["metrics"], *more}
    for lines, part in zip((plain, grid), mixed._repr_markdown_().split("\n\n")[1:], strict=False):
        rows = part.splitlines()
        assert len({row.count("|") for row in rows}) == 1, "as many cells in each row"
        said = [[c.strip() for c in row.strip("|").split("|")] for row in [rows[0], *rows[2:]]]
        assert [[c for c in row if c] for row in said] == [[c for c in cells_of(x) if c] for x in lines]


def test_grid_keeps_what_differs_apart(toy):
    other = {"name": "digits", "sha256": "other"}
    cards = [
        grid_card(0),
        grid_card(1, more={"large | fgsm-linf-8/255": 0.3}),
        grid_card(2, more={"only once | accuracy": 0.3}),
        grid_card(3, 0.1, dataset=other),
        grid_card(4, 0.2, steps=9),
    ]
    (grid,) = blocks(results_table("90_toy", cards, this_run=grid_card(5, 0.3), paper={}))
    lines = [cells_of(line) for line in grid[1:]]
    assert [line[0] for line in lines if line[0]] == [
        "default, on digits",
        "default, on digits",
        "default, on digits, steps=9",
        "this run: default, on digits",
    ]
    assert [line[1] for line in lines] == ["small", "large", "only once"] + ["small", "large"] * 3
    assert cells_of(grid[0])[2:6] == ["accuracy", PGD, "ece", "fgsm-linf-8/255"], "of first appearance"
    # the number of seeds is said again where it changes: "1-3" where the cells of a line differ
    assert [lines[i][-4] if lines[i][0] else lines[i][-1] for i in range(3)] == ["3", "1-3", "1"]


def test_table_without_cards(toy, capsys):
    assert main(["results", "toy"]) == 0
    assert "no recorded runs yet" in capsys.readouterr().out
    assert "no recorded runs yet" in results_table("90_toy")._repr_markdown_()


# ---------------------------------------------------------------- what people take away


def test_forms_say_the_same(toy):
    paper = {"default": {"source": "Somebody & others 2020", "small | accuracy": 80.5, "kd_accuracy": 98.0}}
    cards = [grid_card(s, v, more={"kd_accuracy": v}) for s, v in enumerate([0.5, 0.7])]
    table = results_table("90_toy", cards, paper=paper)
    records = json.loads(table.show("json"))
    assert records == table.rows and len(records) == 6
    small = next(r for r in records if (r["row"], r["column"]) == ("small", "accuracy"))
    assert small["mean"] == pytest.approx(60) and (small["n"], small["seeds"]) == (2, [0, 1])
    fields = "notebook protocol row column paper mean std n seeds device minutes date commits sha256".split()
    rows = list(csv.DictReader(table.show("csv").splitlines()))
    assert {*fields} <= {*rows[0]} and len(rows) == 6
    assert [float(r["mean"]) for r in rows] == [r["mean"] for r in records] and rows[0]["seeds"] == "0 1"
    latex = table.show("latex")
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == latex.count(r"\end{tabular}") == 2
    assert r"kd\_accuracy" in latex and r"60.00 $\pm$ 14.14 (paper 80.50)" in latex
    assert all(line[:1] == "%" for line in latex.splitlines() if "±" in line)
    assert results_table("90_toy").show("json") == "[]" and results_table("90_toy").show("csv") == ""


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 300])
def test_text_fits_the_terminal(toy, width):
    "It wraps or becomes blocks; no number is lost or torn."
    cards = [grid_card(s, v, more={"kd_accuracy": v}) for s, v in enumerate([0.5, 0.7])]
    paper = {"default": {"source": "Somebody 2020, table 1", "small | accuracy": 80.5, "kd_accuracy": 98.0}}
    table = results_table("90_toy", cards, paper=paper)
    text = table.show(width=width)
    assert max(map(len, text.splitlines())) <= width
    assert all(_numbers(r)[0] in text for r in table.rows)
    def words(text): return {word for word in text.split() if word.strip("-")}
    assert words(text) == words(table.show())


def test_parts_of_a_table(toy):
    for i in range(2): save_card(grid_card(i, more={"kd_accuracy": 0.5}), "runs")
    save_card(card(0, preset="long", steps=2000), "runs")
    def rows(*words):
        done = kdnb("results", "toy", "--format", "json", *words)
        return [(r["preset"], r["row"], r["column"]) for r in json.loads(done.stdout)]
    assert rows("--preset", "long") == [("long", "kd_accuracy", "ours")]
    assert rows("--rows", "^s", "--columns", "accuracy,e.e") == [
        ("default", "small", "accuracy"), ("default", "small", "ece")]
    assert rows("--columns", "linf") == [("default", name, PGD) for name in ("small", "large")]
    assert json.loads(kdnb("results", "--format", "json").stdout) == json.loads(
        kdnb("results", "toy", "--format", "json").stdout), "of all lessons"


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_plot(toy, kind):
    paper = {"default": {"source": "Somebody", "small | accuracy": 80.5, "huge | accuracy": 95.0}}
    cards = [grid_card(0), grid_card(1), grid_card(2, steps=9)]
    plot_results(results_table("90_toy", cards, paper=paper), toy / f"a.{kind}")
    data = (toy / f"a.{kind}").read_bytes()
    assert b"90_toy: accuracy" in data and b"huge None, std None, paper 95.0" in data and len(data) < 200_000
    assert not list(toy.glob("*.part"))


def test_compare(toy):
    "By hand: differences 1, 2, 3 points; mean 2, deviation 1, Student's quantile at two degrees 4.3027."
    metrics = {"kd_accuracy": 0.5, "loss": 1.0, "_hidden": 1}
    for seed in range(4): save_card(card(seed, metrics=metrics), "runs")
    for seed, gain in enumerate([0.01, 0.02, 0.03]):
        save_card(card(seed, lr=0.2, metrics={"kd_accuracy": 0.5 + gain, "ece": 0.1}), "mine")
    found = compare_runs("toy:default", "mine/90_toy.jsonl")
    assert found["parameters"] == {"lr": (0.1, 0.2)} and found["seeds"] == ([0, 1, 2, 3], [0, 1, 2])
    (made,) = found["metrics"].values()
    half = 4.302653 / 3**0.5
    wanted = {"mean": 2, "low": 2 - half, "high": 2 + half, "n": 3}
    assert made == pytest.approx(wanted, abs=1e-5)
    done = kdnb("compare", "toy:default", "mine/90_toy.jsonl:default, on digits, lr=0.2")
    assert done.returncode == 0 and "lr: 0.1 -> 0.2" in done.stdout
    assert re.search(r"^kd_accuracy +\+2 +-0.484 +\+4.48 +3$", done.stdout, flags=re.M), done.stdout
    done = kdnb("compare", "toy:default:3", "mine/90_toy.jsonl")
    assert "they have no seed in common, so nothing is compared; seeds: 3 and 0, 1, 2" in done.stdout
    alone = compare_runs("toy:default:1", "mine/90_toy.jsonl")["metrics"]["kd_accuracy"]
    assert (alone["low"], alone["high"], alone["n"]) == (None, None, 1) and alone["mean"] == pytest.approx(2)


def test_compare_executed_notebooks(toy):
    a = run_notebook("toy", parameters={"seed": 1, "steps": 40}, log=str)
    b = run_notebook("toy", preset="long", parameters={"seed": 1}, output="b.ipynb", folder="mine", log=str)
    found = compare_runs(str(a), str(b))
    assert found["parameters"] == {"preset": ("default", "long"), "steps": (40, 2000)}
    assert found["metrics"]["kd_accuracy"]["mean"] == pytest.approx(100 * (0.1 / 2000 - 0.1 / 40))


def test_first_contact(capsys):
    "Without a command: the lessons and what to type next; `doctor`: ten lines for a bug report."
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "10_kd" in said and "00_data" not in said and "kdnb copy lessons" in said
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["kdnb", "python", "torch"] and len(lines) == 10
