"Prints what pytest should run for what changed since the last commit: structure, and each change's tests."

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def main():
    files = {"tests/test_structure.py"}
    for path in git("diff", "--name-only", "HEAD") + git("ls-files", "--others", "--exclude-standard"):
        if re.match(r"tests/test_\w+\.py$", path): files.add(path)
        if path.startswith(("README", "docs/", "nbs/results/")): files.add("tests/test_docs.py")
        if path == "README.md": files.add("tests/test_readme.py")
        if found := re.match(r"(?:nbs/(?:params/)?\d\d_|kdnb/)(\w+)\.", path):
            files.add(f"tests/test_{found[1]}.py")
        if path.startswith("nbs/params/"): files.add("tests/test_presets.py")
    print(*sorted(f for f in files if (ROOT / f).exists()))


if __name__ == "__main__":
    main()
