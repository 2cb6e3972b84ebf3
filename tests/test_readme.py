"What README and docs/do.md show must run as it stands."

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kdnb.data import Batches, load_data
from kdnb.models import create_model

ROOT = Path(__file__).resolve().parents[1]
README, DO = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/do.md"))


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_data("digits")
    shape = dict(in_channels=1, image_size=8, mean=data.mean, std=data.std)
    student, teacher = create_model("mlp_8", **shape, seed=0), create_model("mlp_32", **shape, seed=1)
    batches = Batches(data.train, 64)
    x, y = next(iter(batches))
    names = {
        "torch": torch,
        "F": F,
        "student": student,
        "teacher": teacher,
        "batches": batches,
        "data": data,
        "y": y,
    }
    names |= {"student_logits": student(x), "teacher_logits": teacher(x)}
    blocks = re.findall(r"^```python\n(.*?)^```", README + DO, flags=re.M | re.S)
    own = [block for block in blocks if "photos" in block]      # see the next test
    assert len(blocks) == 3 and len(own) == 1
    for block in blocks:
        if block not in own: exec(block, names)
    assert names["loss"].isfinite() and len(names["history"]) == 20 and Path("run.pt").exists()


def photos(home):
    "Pictures of mixed sizes in three classes; digits are what is at hand."
    images = load_data("digits").train
    for part, start in (("train", 0), ("test", 8)):
        for kind in range(3):
            folder = home / part / f"class{kind}"
            folder.mkdir(parents=True)
            for k, pixels in enumerate(images.x[images.y == kind][start : start + 8]):
                picture = Image.fromarray(pixels[0].numpy()).convert("RGB").resize((32 + 3 * k, 40), 3)
                picture.save(folder / f"{k:03}.jpg")


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    "The section's commands and code, on few pictures and for two steps; README shows the same commands."
    timm = pytest.importorskip("timm")
    section, front = (page[page.index("## Distil your own") :].split("\n## ")[0] for page in (DO, README))
    commands, same = (re.findall(r"^\$ (kdnb .*?)(?: +#.*)?$", text.replace("\\\n    ", ""), flags=re.M)
                      for text in (section, front))
    assert commands == same and [c.split()[1] for c in commands] == ["run", "predict", "export"]
    photos(tmp_path / "photos")
    weights = timm.create_model("resnet18", num_classes=3).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "teacher.pt")
    monkeypatch.chdir(tmp_path)

    def call(command):
        words = command.replace("kdnb", f"{sys.executable} -m kdnb.runner", 1)
        done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = call(commands[0] + " -p epochs 1 -p max_steps 2 -p batch_size 8 -p sweep_epochs 1")
    assert "kd_accuracy" in said and Path("runs").is_dir()
    assert len(re.findall(r"photos/test/class\d/003.jpg: class\d \(\d+%\)", call(commands[1]))) == 3
    call(commands[2])
    assert Path("student.onnx").stat().st_size > 10_000
    (home,) = Path("students").iterdir()
    (block,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
    exec(block.replace("KIND", home.name).replace("steps=20", "steps=2"), {})


def test_commands_exist():
    text = subprocess.run(
        [sys.executable, "-m", "kdnb.runner", "--help"], capture_output=True, text=True, check=True
    ).stdout
    words = "list|run|sweep|results|compare|copy|doctor|predict|export"
    for command in re.findall(rf"kdnb ({words})\b", README + DO):
        assert command in text
    for target in re.findall(r"(?:`|^\$ )make (\w+)", README, flags=re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M), target


def test_other_libraries_page_is_true_of_kdnb():
    "Whatever kdnb's column claims has a witness that is there; each no is explained; methods have a step."
    page = (ROOT / "docs/other-libraries.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`kdnb\.(\w+\.\w+)`", (ROOT / "docs/names.md").read_text(encoding="utf-8")))
    commands = subprocess.run([sys.executable, "-m", "kdnb.runner", "--help"], capture_output=True, text=True)
    table, rest = page[page.index("| | kdnb ") :].split("\n\n", 1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert all(len(row) == 8 and all(row) for row in rows), [row[0] for row in rows if len(row) != 8]
    ours = {row[0]: row[1] for row in rows}
    for what, cell in ours.items():
        witnesses = re.findall("`([^`]+)`", cell)
        assert witnesses or cell in ("no", "not yet", "none"), f"{what}: {cell}"
        for witness in witnesses:
            command = re.fullmatch(r"kdnb (\w+)", witness)
            there = command[1] in commands.stdout if command else (ROOT / witness).exists()
            assert there or witness in names, f"{what}: there is no {witness}"
    methods = [re.findall(r"`(\w+)\.(\w+)`", cell)[0] for cell in list(ours.values())[:13] if cell != "no"]
    steps = [getattr(import_module(f"kdnb.{room}"), name).step for room, name in methods]
    assert len(steps) == 11
    explained = re.findall(r"^- \*\*(.+?)\*\*", rest.split("\n## ")[0], flags=re.M)
    assert explained == [what for what, cell in ours.items() if cell == "no"] + ["not yet"]
    extras = set(re.findall(r"^(\w+)_requirements", (ROOT / "settings.ini").read_text(), flags=re.M))
    assert set(re.findall(r"^\| `kdnb\[(\w+)\]", rest, flags=re.M)) == extras - {"dev", "docs", "lab"}
    assert ("unreleased" in (ROOT / "CHANGELOG.md").read_text()) == (ours["last release"] == "none")


def test_readme_is_short_and_its_speed_rows_are_measured():
    assert len(README.splitlines()) <= 130
    rows = re.findall(r"^\| .* \| [\d.; ]+ \| .*\|$", README[README.index("## Speed") :], flags=re.M)
    known = (ROOT / "docs/speed.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 5 and set(rows) <= {*known}
