"""Open a notebook in JupyterLab in a headless browser, run all its cells, check, take pictures.

    python tests/lab_run.py nbs/10_kd.ipynb shot.png

Not part of `make test`: it needs the extra `lab` and a Chromium on the PATH. It works on a copy of the
notebook's folder, because saving in JupyterLab rewrites metadata. Exit code 1 when a cell failed or did
not run, no figure appeared, or the page asked for anything beyond this machine.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # draw every cell, also those out of sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # no pop-up
}


def chromium():
    "The browser on the PATH, or None."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_lab(folder, own, port):
    "A JupyterLab on `folder` with settings and workspaces of its own; returns when it answers."
    for name, values in SETTINGS.items():
        path = own / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    env = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "ws"),
    }
    with open(own / "log", "w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                "--ServerApp.ip=127.0.0.1",
                f"--ServerApp.port={port}",
                "--IdentityProvider.token=t",
                f"--ServerApp.root_dir={folder}",
            ],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    for _ in range(200):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=t", timeout=1).close()
            return server
        except OSError:
            time.sleep(0.3)
    server.terminate()
    raise SystemExit((own / "log").read_text()[-3000:])


def run_all(url, port, shots, limit, width, height):
    "Press Run All Cells, wait, photograph, save. Returns addresses asked for outside this machine."
    from playwright.sync_api import sync_playwright

    outside = []

    def note(request):
        if f"127.0.0.1:{port}" not in request.url and not request.url.startswith(("data:", "blob:")):
            outside.append(request.url)

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("request", note)
        page.goto(url)
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        # "Idle" in the status bar comes only with a kernel; the toolbar's circle says idle before.
        page.get_by_text(re.compile(r"\| Idle$")).first.wait_for(timeout=60_000)
        page.get_by_role("menuitem", name="Edit", exact=True).click()
        page.get_by_text("Clear Outputs of All Cells", exact=True).click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        end = time.time() + limit
        while True:
            prompts = [t.strip() for t in page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()]
            if prompts[0] != "[ ]:" and "[*]:" not in prompts:
                break
            if time.time() > end:
                raise SystemExit(f"not done after {limit} s: {prompts}")
            time.sleep(0.5)
        page.keyboard.press("Control+s")
        page.wait_for_selector(".jp-mod-current.jp-mod-dirty", state="detached")
        time.sleep(2)  # math and figures settle, the file is written
        photograph(page, shots)
        browser.close()
    return outside


def photograph(page, shots):
    "One picture per screenful, from the top of the notebook to its end: NAME.png, NAME-2.png, ..."
    pane = page.locator(".jp-NotebookPanel:visible .jp-WindowedPanel-outer").first
    top, number, step = -1, 0, pane.evaluate("e => e.clientHeight - 60")
    pane.evaluate("e => e.scrollTop = 0")
    while (now := pane.evaluate("e => e.scrollTop")) > top:
        top, number = now, number + 1
        time.sleep(0.5)
        page.screenshot(path=shots if number == 1 else shots.with_stem(f"{shots.stem}-{number}"))
        pane.evaluate(f"e => e.scrollTop += {step}")
    print(f"{number} pictures: {shots}")


def judge(path):
    "What is wrong in the saved file (the page's own look is no proof)."
    code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code" and c["source"]]
    outputs = [o for c in code for o in c["outputs"]]
    figures = sum(kind.startswith("image/") for o in outputs for kind in o.get("data", {}))
    wrong = [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
    wrong += ["not run: " + "".join(c["source"])[:70] for c in code if not c["execution_count"]]
    print(f"{path.name}: {len(code)} cells, {figures} figures")
    return wrong + ([] if figures else ["no figure"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("shot", type=Path, help="the picture, a .png")
    parser.add_argument("--limit", type=int, default=300, help="seconds for all cells")
    parser.add_argument("--size", default="1280x1000", help="of the window, in pixels")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temp:
        own, port = Path(temp), free_port()
        copy = Path(
            shutil.copytree(
                args.notebook.resolve().parent,
                own / "nbs",
                ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"),
            )
        )
        server = start_lab(copy, own, port)
        try:
            url = f"http://127.0.0.1:{port}/lab/tree/{args.notebook.name}?token=t&reset"
            outside = run_all(url, port, args.shot.resolve(), args.limit, *map(int, args.size.split("x")))
        finally:
            server.terminate()
            server.wait(20)
        wrong = judge(copy / args.notebook.name) + [f"outside request: {u}" for u in outside]
    print("\n".join(wrong) or "no error")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
