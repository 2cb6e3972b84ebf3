"Every preset starts: its networks, schedules and switches, two steps of each training, on digits."

import subprocess
import sys
from pathlib import Path

import pytest

from kdnb.runs import notebooks, read_parameters

PARAMS = Path(__file__).parent.parent / "nbs" / "params"


@pytest.mark.parametrize("preset", sorted(p.stem for p in PARAMS.glob("*.yaml")))
def test_preset_runs_two_steps(preset, tmp_path):
    name, kind = preset.split(".")
    values = {"data": "digits", "device": "cpu", "max_steps": 2, "checkpoints": "", "results": str(tmp_path)}
    small = {"test_images": 16, "val_images": 8, "eval_steps": 2, "steps": 2, "batch_size": 32}
    small |= {"autoattack_images": 2, "autoattack_tier": "lite"}
    declared = read_parameters(notebooks()[name])
    values |= {key: value for key, value in small.items() if key in declared}
    words = [word for key, value in values.items() for word in ("-p", key, str(value))]
    out = tmp_path / "out.ipynb"
    done = subprocess.run(
        [sys.executable, "-m", "kdnb.runner", "run", name, "-f", kind, "-o", str(out), *words],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert out.exists() and (tmp_path / f"{name}.jsonl").read_text().count("\n") == 1
