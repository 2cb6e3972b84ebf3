"The room for experiments: arms, rules and names, and the lesson that the guide writes."

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import IPython
import nbformat
import pytest
import torch
from conftest import same, stream
from PIL import Image

from kdnb import checks, runner
from kdnb import experiment as room
from kdnb.data import Data, Images
from kdnb.experiment import Experiment
from kdnb.kd import KD
from kdnb.models import create_model, load_model, save_model
from kdnb.runner import predict_images
from kdnb.runs import Lesson, load_cards, notebooks
from kdnb.training import Supervised, accuracy

GUIDE = Path(__file__).parent.parent / "docs" / "write-a-lesson.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder of lessons that holds the guide's."
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.S)
    cells = [
        nbformat.v4.new_markdown_cell("# An example\n> Of the guide."),
        *map(nbformat.v4.new_code_cell, blocks),
    ]
    cells[1].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    home = tmp_path_factory.mktemp("lessons")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), home / "99_example.ipynb")
    return home


def kdnb(folder, *words):
    command = [sys.executable, "-m", "kdnb.runner", *words]
    env = {**os.environ, "KDNB_NOTEBOOKS": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=600)


def test_the_guides_lesson_runs_with_what_an_arm_needs(folder):
    done = kdnb(
        folder, "run", "99_example", "-p", "arms", "match", "-p", "results", "cards", "-o", "out.ipynb"
    )
    assert done.returncode == 0, done.stderr
    (card,) = load_cards("99_example", folder / "cards")
    assert set(card["metrics"]) == {"teacher | accuracy", "logits | accuracy"}
    assert card["metrics"]["logits | accuracy"] > 0.8


def test_a_lesson_runs_on_pictures_that_are_not_square(folder):
    pixels = torch.randint(256, (40, 12, 30, 3), generator=stream(0), dtype=torch.uint8)
    for k, picture in enumerate(pixels):
        path = folder / "shots" / ("test", "train")[k % 4 > 0] / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(path)
    words = "-p data folder:./shots -p image_size 8x12 -p batch_size 8 -p results wide -o wide.ipynb".split()
    done = kdnb(folder, "run", "99_example", "-p", "arms", "match", *words)
    assert done.returncode == 0, done.stderr
    (card,) = load_cards("99_example", folder / "wide")
    assert card["parameters"]["image_size"] == "8x12"
    save_model(create_model("mlp_4", 2, image_size=(8, 12), seed=0), folder / "net")
    assert predict_images(folder / "net", [path])[0][1] in ("0", "1")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("arms", "match mach", "unknown arm 'mach'; nearest: match"),
        ("student", "resnet9", "unknown model 'resnet9'"),
        ("data", "digitz", "unknown data 'digitz'"),
        ("precision", "fp16", "precision must be fp32 or bf16, got 'fp16'"),
        ("augment", "flip", "augment must be none, crop or crop_flip, got 'flip'"),
        ("lr_drops", "0.5 2", "lr_drops must lie in (0, 1), got 2.0"),
        ("lr_drops", "half", "lr_drops must be a number in (0, 1), got 'half'"),
        ("image_size", "24x", "image_size must be a whole number >= 0, or two of them"),
        ("max_steps", "-1", "max_steps must be a whole number >= 0, got -1"),
        ("batch_size", "5000", "batch_size must be a whole number in [1, 1078]"),
        ("results", "out.file/cards", "results must be a folder that can be written"),
        ("checkpoints", "/dev/null/kept", "checkpoints must be a folder that can be written"),
        ("lr_milestones", "3 4", "lr_milestones is now lr_drops: shares of the epochs"),
    ],
)
def test_what_breaks_a_rule_starts_nothing(folder, name, value, words):
    (folder / "out.file").write_text("")
    before = sorted(p.name for p in folder.iterdir())
    done = kdnb(folder, "run", "99_example", "-p", name, value, "-o", "new.ipynb")
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == before


def test_an_output_that_cannot_be_written_starts_nothing(folder):
    done = kdnb(folder, "run", "99_example", "-o", "/dev/null/out.ipynb")
    assert done.returncode == 2 and "can be written" in done.stderr, done.stderr


def experiment(**changes):
    "The room's own toy, with other values."
    declared = Lesson("07_experiment").parameters
    values = {name: default for name, (_, default, _) in declared.items()} | changes
    kinds = {name: kind for name, (kind, _, _) in declared.items()}
    return Experiment("07_experiment", {"__annotations__": kinds, **values})


def test_checkpoints_are_named_by_what_is_trained():
    kept = Path(experiment(checkpoints="a").keep("KD")).name
    assert Path(experiment(checkpoints="b", results="c", threads=2).keep("KD")).name == kept
    for other in ({"lr": 0.1}, {"seed": 1}, {"student": "mlp_8"}):
        assert Path(experiment(checkpoints="a", **other).keep("KD")).name != kept
    assert experiment().keep("KD") is None


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(room, "_MOST", 6)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("model", "channels", "size", "batch_size", "threads"),
    [
        ("mlp_400_400", 1, 8, 64, 1),       # 12 million multiply-adds a batch
        ("resnet14", 1, 8, 64, 1),          # 104
        ("mlp_1200_1200", 1, 28, 128, 1),   # 306
        ("resnet8", 1, 28, 64, 2),          # 585
        ("resnet8", 3, 32, 32, 1),          # 392
        ("resnet8", 3, 32, 64, 3),          # 783
        ("resnet8", 3, 32, 128, 6),         # 1567
        ("resnet20", 3, 32, 128, 6),        # 5191: no more than there are
    ],
)
def test_a_thread_for_every_250_million_multiply_adds(
    monkeypatch, many_cores, model, channels, size, batch_size, threads
):
    images = Images(torch.zeros(200, channels, size, size), torch.arange(200) % 10, tuple("0123456789"))
    data = Data("toy", images, images, images, (0.0,) * channels, (1.0,) * channels, "")
    monkeypatch.setattr(room, "load_data", lambda *a, **k: data)
    run = experiment(teacher=model, batch_size=batch_size, epochs=1)
    assert torch.get_num_threads() == 1
    assert run.data is data and torch.get_num_threads() == threads
    for own in (1, 5):
        assert experiment(teacher=model, batch_size=batch_size, threads=own).data is data
        assert torch.get_num_threads() == own
    monkeypatch.setattr(room, "_MOST", 1)      # as by OMP_NUM_THREADS=1
    assert experiment(teacher=model, batch_size=batch_size).data is data and torch.get_num_threads() == 1


@pytest.mark.parametrize("name", [n for n in notebooks() if n[0] in "12"])
def test_lessons_on_digits_keep_one_thread(many_cores, digits, name):
    values = {key: default for key, (_, default, _) in Lesson(name).parameters.items()}
    assert values["threads"] == 0 and values["data"] == "digits" and room._models(name, values)
    assert room._threads(room._models(name, values), digits, values["batch_size"]) == 1


def test_a_group_and_what_an_arm_needs():
    run = experiment(arms="pupil", max_steps=2)
    made = []

    def maker(word, *needs):
        def make():
            made.append(word)
            for need in needs:
                run.network(need)
            return Supervised(run.new("student"), **run.recipe())

        return make

    two = [("first", maker("first")), ("second", maker("second"))]
    run.plan(
        {
            "teacher": ("teacher", maker("teacher")),
            "pupil": ("pupil", maker("pupil", "teacher", "two")),
            "two": lambda: two,
            "left": ("left", maker("left")),
        }
    )
    run.train_arms()
    assert made == ["pupil", "teacher", "first", "second"]
    assert [*run.networks] == ["teacher", "first", "second", "pupil"]
    assert run.network("two") is run.networks["second"]


def test_jitter_shifts_images_of_one_training_alone(monkeypatch):
    run, seen = experiment(), []
    monkeypatch.setattr(room, "fit", lambda method, batches, **_: seen.append(batches))
    for jitter in (0, 2):
        run.train("KD", Supervised(run.new("student")), jitter=jitter)
    assert [(b.augment, b.padding) for b in seen] == [("none", 0), ("crop", 2)]


def test_rows_and_columns():
    run = experiment()
    run.note("KD", {"accuracy": 0.5, "pgd20-linf-0.1": 0.2})
    run.note("alone", {"accuracy": 0.4})
    assert run.column("accuracy") == {"KD": 0.5, "alone": 0.4} and run.column("pgd") == {"KD": 0.2}
    assert run.card()["metrics"] == run.metrics and run.metrics["KD | accuracy"] == 0.5


# ---------------------------------------------------------------- doors


def two_arms(run):
    teacher = ("teacher", lambda: Supervised(run.new("teacher"), **run.recipe()))
    student = ("KD", lambda: KD(run.new("student"), run.network("teacher"), **run.recipe()))
    run.plan({"teacher": teacher, "kd": student})
    run.train_arms()
    return run


def test_a_student_leaves_and_comes_back_as_a_teacher(tmp_path, capsys):
    run = two_arms(experiment(epochs=1, save=str(tmp_path)))
    run.note("KD", {"accuracy": accuracy(run.networks["KD"], run.data.test)})
    run.results()
    (home,) = tmp_path.iterdir()
    assert sorted(p.name for p in home.glob("*.safetensors")) == ["KD.safetensors", "teacher.safetensors"]
    student = load_model(home / "KD.safetensors")
    assert accuracy(student, run.data.test) == student.card["accuracy"]["test"]
    assert student.card["dataset"]["sha256"] == run.data.sha256 and len(student.card["classes"]) == 10
    again = two_arms(experiment(epochs=1, teacher="mlp_32", teacher_weights=str(home / "KD.safetensors")))
    assert list(again.histories) == ["KD"] and "KD.safetensors reads" in capsys.readouterr().out
    assert same(again.networks["teacher"].state_dict(), run.networks["KD"].state_dict())
    assert again.card()["extra"]["given teacher"]["test"] == student.card["accuracy"]["test"]


def test_a_teacher_that_does_not_fit_or_knows_nothing(tmp_path):
    file = tmp_path / "w.pt"
    torch.save({"state_dict": create_model("mlp_9", 10, 1, 8, seed=0).state_dict()}, file)
    with pytest.raises(ValueError, match="does not fit"):
        two_arms(experiment(teacher="mlp_8", teacher_weights=str(file)))
    with pytest.warns(UserWarning, match="near chance: are its classes in this order .*normalised once"):
        two_arms(experiment(teacher="mlp_9", teacher_weights=str(file), epochs=1, max_steps=2))


def test_adamw_and_a_tracker_by_their_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = two_arms(experiment(epochs=3, optimizer="adamw", lr=0.01, tracker="tensorboard"))
    assert all(type(m.optimizer) is torch.optim.AdamW for m in run.methods.values())
    assert accuracy(run.networks["KD"], run.data.test) > 0.8
    assert len(list(Path("runs/tensorboard/07_experiment").iterdir())) == 2


class Wandb:
    "What `kdnb.trackers.WandB` uses of wandb."

    def __init__(self): self.runs = []

    def init(self, **about):
        run = SimpleNamespace(about=about, rows=[], log=lambda row, step: run.rows.append((step, row)))
        run.finish = lambda: run.about.update(finished=True)
        self.runs.append(run)
        return run


def test_weights_and_biases_gets_a_run_for_every_arm(monkeypatch):
    stub = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(checks, "find_spec", lambda name: True)
    two_arms(experiment(epochs=2, tracker="wandb"))
    assert [run.about["name"] for run in stub.runs] == ["teacher, seed 0", "KD, seed 0"]
    assert all(run.about["finished"] and len(run.rows) == 2 and "loss" in run.rows[0][1] for run in stub.runs)


class MlflowClient:
    "What `kdnb.trackers.MLflow` uses of mlflow."

    said = []

    def get_experiment_by_name(self, name): return None
    def create_experiment(self, name): return f"id of {name}"
    def create_run(self, home, run_name): return SimpleNamespace(info=SimpleNamespace(run_id=run_name))
    def log_param(self, run, key, value): self.said.append((run, key))
    def log_metric(self, run, key, value, step): self.said.append((run, key, step))
    def set_terminated(self, run): self.said.append((run, "end"))


def test_mlflow_gets_a_run_for_every_arm(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=MlflowClient))
    monkeypatch.setattr(checks, "find_spec", lambda name: True)
    run = two_arms(experiment(epochs=1, tracker="mlflow"))
    step = run.histories["KD"]["step"][-1]
    wanted = {("KD, seed 0", "loss", step), ("KD, seed 0", "lr"), ("teacher, seed 0", "end")}
    assert wanted <= {*MlflowClient.said}


def test_a_tracker_that_is_not_there(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"wandb is not installed: pip install 'kdnb\[wandb\]'"):
        experiment(tracker="wandb")
    with pytest.raises(ValueError, match="tracker must be '', tensorboard, wandb or mlflow, got 'wandbb'"):
        experiment(tracker="wandbb")


def test_a_run_tells_how_far_it_is(tmp_path, monkeypatch):
    file, told = tmp_path / "progress", []
    monkeypatch.setenv("KDNB_PROGRESS", str(file))
    monkeypatch.setattr(Path, "write_text", lambda path, text, encoding: told.append((path, text)))
    two_arms(experiment(epochs=2))
    assert [path for path, _ in told] == [file] * 4
    assert told[0][1].startswith("0 of 2 arms done; teacher: epoch 1 of 2, about ")
    assert told[3][1] == "1 of 2 arms done; KD: epoch 2 of 2, about 0 s left"


def test_a_terminal_shows_how_far_a_run_is(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True, write=told.append, flush=int))
    with runner._progress(every=0.01):
        file = Path(os.environ["KDNB_PROGRESS"])
        for text in ("1 of 2 arms done", "2 of 2 arms done"):
            file.write_text(text, encoding="utf-8")
            end = time.monotonic() + 30
            while text not in "".join(told) and time.monotonic() < end: time.sleep(0.01)
    assert "".join(told).split("\n") == ["", "1 of 2 arms done", "", "2 of 2 arms done", ""]
    assert not file.exists() and "KDNB_PROGRESS" not in os.environ


def test_a_notebook_shows_how_far_it_is(monkeypatch):
    told, shown = [], []
    line = SimpleNamespace(update=lambda data, raw: told.append(data["text/plain"]))
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=1))
    monkeypatch.setattr(IPython.display, "display", lambda *args, **options: shown.append(args) or line)
    two_arms(experiment(epochs=2))
    assert len(shown) == 1 and told[-1] == "2 arms done" and len(told) == 5
    assert told[2].startswith("1 of 2 arms done; KD: epoch 1 of 2, about ")
