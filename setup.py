"""Everything that can change is in settings.ini; here it only becomes a package."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
settings = ini["DEFAULT"]
LIB = settings["lib_path"]
EXTRAS = ["run", "eval", "track", "wandb", "mlflow", "timm", "onnx", "ray", "docs", "dev", "lab"]


def words(key):
    "A settings.ini value as a list of words."
    return settings.get(key, "").split()


class BuildPy(build_py):
    "Copy the notebooks, their presets and recorded results into the wheel, as kdnb/notebooks/."

    def run(self):
        super().run()
        if self.editable_mode:  # a checkout reads nbs/ itself
            return
        source, target = ROOT / settings["nbs_path"], Path(self.build_lib) / LIB / "notebooks"
        shutil.rmtree(target, ignore_errors=True)
        for pattern in ("*.ipynb", "START.md", "params/*.yaml", "results/*.jsonl", "results/*.yaml"):
            for path in sorted(source.glob(pattern)):
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    keywords=words("keywords"),
    license="MIT",
    license_files=["LICENSE"],
    packages=[LIB],
    python_requires=">=" + settings["min_python"],
    install_requires=words("requirements"),
    extras_require={name: words(name + "_requirements") for name in EXTRAS},
    entry_points={"console_scripts": words("console_scripts"), "nbdev": [f"{LIB}={LIB}._modidx:d"]},
    cmdclass={"build_py": BuildPy},
    zip_safe=False,
)
