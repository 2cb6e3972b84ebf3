"Every preset starts: its networks, schedules and switches, two steps of each training, on digits."

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdnb.runs import Lesson

PARAMS = Path(__file__).parent.parent / "nbs" / "params"
PRESETS = sorted(p.stem for p in PARAMS.glob("*.yaml"))


def start(preset, folder):
    "Run it, with little to attack and to measure."
    name, kind = preset.split(".")
    values = {"data": "digits", "device": "cpu", "max_steps": 2, "checkpoints": "", "results": str(folder)}
    values["lr"] = 0.001  # a weight made for 100 classes diverges on ten at the recorded rate
    small = {"test_images": 16, "val_images": 8, "eval_steps": 2, "attack_steps": 2, "batch_size": 32}
    small |= {"autoattack_images": 2, "autoattack_tier": "lite", "boundary_images": 4}
    small |= {"curve_images": 4, "curve_steps": 3}
    declared = Lesson(name).parameters
    values |= {key: value for key, value in small.items() if key in declared}
    words = [word for key, value in values.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "kdnb.runner", "run", name, "--experiment", "-f", kind]
    command += ["-o", str(folder / "out.ipynb"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def started(tmp_path_factory, request):
    "All that were asked for, JOBS side by side; a test waits for its own."
    asked = [item.callspec.params["preset"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(int(os.environ.get("JOBS", 2))) as pool:
        folders = {preset: tmp_path_factory.mktemp(preset) for preset in asked}
        yield {p: (folder, pool.submit(start, p, folder)) for p, folder in folders.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_runs_two_steps(preset, started):
    folder, run = started[preset]
    done = run.result()
    assert done.returncode == 0, done.stderr
    card = folder / f"{preset.split('.')[0]}.jsonl"
    assert (folder / "out.ipynb").exists() and card.read_text().count("\n") == 1
