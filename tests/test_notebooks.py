"""Every notebook runs from its first cell to its last, by papermill, with no network and no data at hand."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {p.stem: p for p in sorted((ROOT / "nbs").glob("*.ipynb"))}
OUT = ROOT / "runs" / "test"  # executed copies stay here, to be looked at
JOBS = int(os.environ.get("JOBS", 2))
CELL_LIMIT, NOTEBOOK_LIMIT = 600, 1200  # seconds

# Python imports a module of this name at every start, so kernels are shut off too.
SITECUSTOMIZE = """
import socket

here = (None, "", "127.0.0.1", "::1", "localhost", b"localhost", "0.0.0.0", "::")

def guard(name):
    plain = getattr(socket.socket, name)
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in here:
            raise OSError(f"no network in tests: {address}")
        return plain(self, address)
    setattr(socket.socket, name, connect)

guard("connect"), guard("connect_ex")
look_up = socket.getaddrinfo
def getaddrinfo(host, *args, **kw):
    if host not in here:
        raise OSError(f"no network in tests: {host}")
    return look_up(host, *args, **kw)
socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    "An environment for processes that must do without network, data sets and a user's settings."
    folder = tmp_path_factory.mktemp("offline")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    dead = dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return (
        os.environ
        | dead
        | {
            "PYTHONPATH": path,
            "KDNB_DATA": str(folder / "no-data"),
            "IN_TEST": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
    )


def execute(path, env):
    "Run one notebook in processes of its own: (seconds, exit code, end of its log)."
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "papermill",
        path,
        OUT / path.name,
        "--cwd",
        ROOT / "nbs",
        "-k",
        "python3",
        "--no-progress-bar",
        "--execution-timeout",
        CELL_LIMIT,
    ]
    try:
        done = subprocess.run(
            [str(c) for c in command],
            env=env,
            timeout=NOTEBOOK_LIMIT,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        code, log = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        code, log = 124, f"longer than {NOTEBOOK_LIMIT} s"
    return time.perf_counter() - start, code, log[-4000:]


def state():
    "Path, time and size of everything under nbs/."
    files = [p for p in (ROOT / "nbs").rglob("*") if p.is_file() and ".ipynb_checkpoints" not in p.parts]
    return {str(p.relative_to(ROOT)): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


@pytest.fixture(scope="module")
def results(offline):
    "All notebooks at once, JOBS side by side; a test waits for its own."
    OUT.mkdir(parents=True, exist_ok=True)
    before = state()
    with ThreadPoolExecutor(JOBS) as pool:
        yield before, {name: pool.submit(execute, path, offline) for name, path in NOTEBOOKS.items()}


def test_network_is_shut_off(offline):
    for code in (
        "socket.create_connection(('example.org', 80), timeout=5)",
        "socket.socket().connect(('192.0.2.1', 80))",
        "socket.socket().connect_ex(('192.0.2.1', 80))",
    ):
        command = [sys.executable, "-c", f"import socket; {code}"]
        done = subprocess.run(command, env=offline, capture_output=True, text=True)
        assert done.returncode and "no network in tests" in done.stderr, done.stderr


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(results, name, capsys):
    seconds, code, log = results[1][name].result()
    with capsys.disabled():
        print(f"\n  {name:<16} {seconds:6.1f} s  {'ok' if code == 0 else f'exit {code}'}  ", end="")
    assert code == 0, f"{name}:\n{log}"


def test_runs_leave_the_checkout_alone(results):
    before, runs = results
    for run in runs.values():
        run.result()
    after = state()
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, f"running the notebooks changed {changed}"
