"Kill and resume, two processes against one, compiled and tracked training: what a notebook cell cannot show."

import errno
import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import two_processes
from conftest import same
from torch.utils.data import DataLoader, TensorDataset

from kdnb import training
from kdnb.attacks import pgd
from kdnb.checkpoint import _unpacked
from kdnb.data import Batches, Images, load_data
from kdnb.kd import KD
from kdnb.learning import per_step, update
from kdnb.models import create_model
from kdnb.robust import PGDAT
from kdnb.trackers import TensorBoard
from kdnb.training import Supervised, accuracy, fit, predict

# The script that the tests kill and resume: it distils on digits and saves the student.
SCRIPT = """
import sys
from functools import partial
import torch
from torch.optim.lr_scheduler import MultiStepLR
from kdnb.data import Batches, load_data
from kdnb.kd import KD
from kdnb.models import create_model
from kdnb.training import fit

out, checkpoint, steps, seed = sys.argv[1], sys.argv[2] or None, int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
data = load_data("digits")
shape = dict(in_channels=1, image_size=8, mean=data.mean, std=data.std)
dropout = torch.nn.Dropout(float(sys.argv[5]))
student = torch.nn.Sequential(create_model("mlp_64_64", seed=seed, **shape), dropout)
teacher = create_model("mlp_32", seed=1, **shape)
method = KD(student, teacher, lr=0.05, schedule=partial(MultiStepLR, milestones=[2, 4], gamma=0.3))
batches = Batches(data.train, 64, augment="crop", padding=1, seed=0)
keep = dict(checkpoint=checkpoint, checkpoint_steps=steps)
fit(method, batches, epochs=6, validate=data.val, progress="lines", **keep)
torch.save(student.state_dict(), out)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def run(script, out, checkpoint="", steps=0, seed=0, dropout=0.3, **popen):
    words = [sys.executable, str(script), str(out), str(checkpoint), str(steps), str(seed), str(dropout)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)


def weights(path):
    return torch.load(path, weights_only=True)


def test_sigkill_at_any_moment_resumes_to_the_same_bits(script, tmp_path):
    whole, cut, checkpoint = tmp_path / "whole.pt", tmp_path / "cut.pt", tmp_path / "run.ckpt"
    process = run(script, whole)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    kills, random = 0, torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
    for _ in range(4):
        # a checkpoint every 3 steps; killed a random moment after the file first appears or changes
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = run(script, cut, checkpoint, steps=3, seed=kills)  # other initial weights each time
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.002)
        time.sleep(0.1 * torch.rand(1, generator=random).item())
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        assert process.returncode == -signal.SIGKILL
    else:
        process = run(script, cut, checkpoint, steps=3, seed=99)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    assert kills >= 1, "the run ended before it could be killed"
    assert same(weights(whole), weights(cut))


def test_two_processes_equal_one_on_the_same_global_batch(tmp_path):
    "Every method; the second process starts from other weights, and one process reports."
    file = tmp_path / "two.pt"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, two_processes.__file__, file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 1/1") == len(two_processes.METHODS) + 1  # one run was cut in two
    two = weights(file)
    for name in two_processes.METHODS:
        for a, b in zip(two[name], two_processes.train(name), strict=True):
            far = {k: (a[k] - b[k]).abs().max().item() for k in a if not a[k].equal(b[k])}
            assert all(v < 1e-9 for v in far.values()), (name, far)


def test_sync_batchnorm_needs_gpus(monkeypatch):
    data, net = digits_net("resnet8")
    monkeypatch.setattr(training, "world", lambda: 2)
    monkeypatch.setattr(training.dist, "get_rank", lambda: 0)
    with pytest.raises(ValueError, match="^sync_batchnorm needs GPUs, got cpu$"):
        fit(Supervised(net), Batches(data.train), epochs=1, sync_batchnorm=True)


def test_sync_batchnorm_is_taken_back():
    "The same objects of the same classes; in one process nothing is converted at all."
    data, net = digits_net("resnet8")
    def kinds(): return [(m, type(m), {*vars(m)}) for m in net.modules()]
    found = kinds()
    with ExitStack() as undo:
        training._share_statistics(SimpleNamespace(device=torch.device("cuda")), [net, net], undo)
        synced = [m for m in net.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
        assert len(synced) == sum(kind is torch.nn.BatchNorm2d for _, kind, _ in found) > 0
    assert kinds() == found
    fit(Supervised(net), Batches(data.train, 256), epochs=1, max_steps=1, progress="off", sync_batchnorm=True)
    assert kinds() == found


def digits_net(name="mlp_16", seed=0):
    data = load_data("digits")
    return data, create_model(name, in_channels=1, image_size=8, mean=data.mean, std=data.std, seed=seed)


@pytest.mark.parametrize("missing", ["parts", "tail", "everything"])
def test_a_damaged_checkpoint_is_one_line_and_stays(tmp_path, missing):
    data, net = digits_net()
    file = tmp_path / "run.pt"

    def train():
        fit(Supervised(net), Batches(data.train, 64), epochs=1, checkpoint=file, progress="off")

    train()
    whole = file.read_bytes()
    file.write_bytes({"parts": whole[:100], "tail": whole[:-50], "everything": b""}[missing])
    left = file.read_bytes()
    with pytest.raises(ValueError, match="not a complete checkpoint") as error:
        train()
    assert "\n" not in str(error.value) and file.read_bytes() == left


def test_all_networks_and_optimisers_are_saved_whatever_they_are_called(tmp_path):
    class Two:
        def __init__(self, seed):
            torch.manual_seed(seed)
            self.student, self.critic = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
            self.first, self.second = (
                torch.optim.Adam(n.parameters(), 0.01) for n in (self.student, self.critic)
            )

        def step(self, x, y):
            for o in (self.first, self.second):
                o.zero_grad()
            loss = self.critic(self.student(torch.rand(8, 2)).relu()).square().mean()  # draws its own data
            loss.backward()
            for o in (self.first, self.second):
                o.step()
            return {"loss": loss.detach()}

    whole, cut = Two(0), Two(0)
    fit(whole, steps=60, progress="off")
    fit(cut, steps=60, max_steps=23, checkpoint=tmp_path / "c", progress="off")
    again = Two(5)
    fit(again, steps=60, checkpoint=tmp_path / "c", progress="off")
    assert same(whole.critic.state_dict(), again.critic.state_dict())
    assert same(whole.student.state_dict(), again.student.state_dict())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    data, net = digits_net()
    teacher, batches, file = digits_net(seed=1)[1], Batches(data.train, 64), tmp_path / "run.pt"
    fit(KD(net, teacher, temperature=4.0), batches, epochs=1, checkpoint=file, progress="off")
    with pytest.raises(ValueError, match="its temperature is 4.0, not 8.0"):
        fit(KD(net, teacher, temperature=8.0), batches, epochs=1, checkpoint=file, progress="off")


class MovesInStep(Supervised):
    def step(self, x, y):
        found = super().step(x, y)
        self.schedule.step()
        return found


class MovesAtTheEnd(Supervised):
    def end_epoch(self, epoch): self.schedule.step()


@pytest.mark.parametrize("stop", [0, 2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "of", "moves"),
    [(Supervised, lambda s: s, 2), (Supervised, per_step, 6), (MovesInStep, lambda s: s, 6),
     (MovesAtTheEnd, lambda s: s, 2)],
)  # fmt: skip
def test_a_schedule_is_moved_on_once(kind, of, moves, stop, tmp_path):
    "By `fit` after an epoch (of 3 steps) or a step, by the method itself; also in a run that was stopped."
    half = of(partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5))
    again = dict(epochs=2, checkpoint=tmp_path / "run.pt", checkpoint_steps=1)
    batches = Batches(IMAGES.first(48), 16)
    if stop: quick(kind(small(), schedule=half), batches, max_steps=stop, **again)
    method = kind(small(), schedule=half)
    quick(method, batches, **again)
    assert method.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**moves)


def test_a_schedule_made_of_others_is_moved_on():
    def chained(optimizer):
        steps = [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma) for gamma in (0.5, 0.2)]
        return torch.optim.lr_scheduler.ChainedScheduler(steps)

    for kind in (Supervised, MovesInStep, MovesAtTheEnd):
        method = kind(small(), schedule=chained)
        quick(method, Batches(IMAGES.first(16), 16), epochs=2)
        assert method.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2)


def test_an_optimiser_of_ones_own_resumes_to_the_same_bits(tmp_path):
    own = dict(optimizer=partial(torch.optim.AdamW, lr=0.01), clip=0.5)
    whole, file = Supervised(small(), **own), tmp_path / "run.pt"
    quick(whole, epochs=2)
    quick(Supervised(small(), **own), epochs=2, max_steps=3, checkpoint=file)
    resumed = Supervised(small(1), **own)
    quick(resumed, epochs=2, checkpoint=file)
    assert same(whole.student.state_dict(), resumed.student.state_dict())
    with pytest.raises(ValueError, match="another run: its clip is 0.5, not 0.6"):
        quick(Supervised(small(), **own | {"clip": 0.6}), epochs=2, checkpoint=file)
    with pytest.raises(ValueError, match="optimizer must make a torch optimiser from parameters, got "):
        Supervised(small(), optimizer=lambda parameters: None)


def test_the_gradient_is_cut_to_its_longest_length():
    x, y = IMAGES.floats(), IMAGES.y
    lengths = []
    for clip in (1e-3, 1e9):
        method = Supervised(small(), lr=1.0, momentum=0, weight_decay=0, clip=clip)
        before = torch.nn.utils.parameters_to_vector(method.student.parameters()).clone()
        method.step(x, y)
        after = torch.nn.utils.parameters_to_vector(method.student.parameters())
        lengths.append((after - before).norm().item())
    assert lengths[0] == pytest.approx(1e-3, rel=1e-3) and lengths[1] > 0.01


def test_the_same_method_may_resume_after_its_schedule_moved(tmp_path):
    data, net = digits_net()
    method = Supervised(net, schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5))
    batches, file = Batches(data.train, 64), tmp_path / "run.pt"
    fit(method, batches, epochs=2, checkpoint=file, progress="off")
    before = [p.clone() for p in net.parameters()]
    assert len(fit(method, batches, epochs=2, checkpoint=file, progress="off")) == 2
    assert all(p.equal(q) for p, q in zip(before, net.parameters(), strict=True))


def test_time_of_earlier_sittings_is_kept(tmp_path):
    data, net = digits_net()
    batches, file = Batches(data.train, 64), tmp_path / "run.pt"
    first = fit(Supervised(net), batches, epochs=2, checkpoint=file, progress="off")
    again = fit(Supervised(net), batches, epochs=2, checkpoint=file, progress="off")
    assert first.earlier_seconds == 0.0 and again.earlier_seconds == first.rows[-1]["seconds"] > 0


def test_a_trial_run_stops_after_exactly_so_many_steps():
    data, net = digits_net()
    method, count = Supervised(net), []
    step = method.step
    method.step = lambda x, y: count.append(1) or step(x, y)
    for limit in (3, 18, 20):  # 18 is one epoch
        count.clear()
        fit(method, Batches(data.train, 67), epochs=3, max_steps=limit, progress="off")
        assert len(count) == limit


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_learns_the_same_and_leaves_no_trace():
    data, net = digits_net()
    plain = digits_net()[1]
    for model, compiled in ((net, True), (plain, False)):
        fit(Supervised(model, lr=0.05), Batches(data.train, 64), epochs=2, compile=compiled, progress="off")
    assert net._compiled_call_impl is None
    assert all(
        torch.allclose(p, q, atol=1e-3) for p, q in zip(net.parameters(), plain.parameters(), strict=True)
    )


def test_bf16_distillation_learns():
    data, student = digits_net("resnet8")
    teacher = digits_net("mlp_16", seed=1)[1]
    fit(Supervised(teacher, lr=0.1), Batches(data.train, 64), epochs=10, progress="off")
    method = KD(student, teacher, lr=0.05)
    history = fit(
        method, Batches(data.train, 64), epochs=3, validate=data.val, precision="bf16", progress="off"
    )
    assert history.rows[-1]["val_accuracy"] > 0.8
    assert all(p.dtype is torch.float32 for p in student.parameters())


def test_tensorboard_writes_every_row(tmp_path):
    data, net = digits_net()
    batches, tracker = Batches(data.train, 64), TensorBoard(tmp_path)
    fit(Supervised(net), batches, epochs=2, validate=data.val, trackers=[tracker], progress="off")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss", "val_accuracy", "lr"} <= set(events.Tags()["scalars"]) and len(
        events.Scalars("loss")
    ) == 2


def test_lines_in_a_log_file(tmp_path):
    code = (
        "from kdnb.data import *; from kdnb.models import *; from kdnb.training import *\n"
        "d, net = load_data('digits'), create_model('mlp_8', in_channels=1, image_size=8)\n"
        "fit(Supervised(net), Batches(d.train, 64), epochs=2, validate=d.val)"
    )
    text = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert [line[:9] for line in text.stdout.splitlines()] == ["epoch 1/2", "epoch 2/2"] and not text.stderr


# ---------------------------------------------------------------- what belongs to a run


PIXELS = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = Images(PIXELS, torch.arange(48) % 4, "abcd")


def small(seed=0, name="mlp_8", **more):
    return create_model(name, 4, 1, 8, seed=seed, **more)


def quick(method, batches=None, epochs=1, **more):
    batches = Batches(IMAGES, 16) if batches is None else batches
    return fit(method, batches, epochs=epochs, progress="off", **more)


def cosine(n):
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n)


def other_images():
    x = IMAGES.x.clone()
    x[7, 0, 3, 3] ^= 1
    return Images(x, IMAGES.y, IMAGES.classes)


def attacked_by(**keywords):
    return PGDAT(small(), attack=partial(pgd, **{"eps": 0.1, "step_size": 0.05, "steps": 1, **keywords}))


def with_part(**parts):
    method = Supervised(small())
    vars(method).update(parts)
    return method


def frozen_backbone(seed):
    student = small(seed)
    next(student.parameters()).requires_grad_(False)
    return Supervised(student)


@pytest.mark.parametrize(
    "first, second, words",
    [
        (lambda: KD(small(), small(1)), lambda: KD(small(), small(2)), "teacher's frozen weights"),
        (lambda: frozen_backbone(0), lambda: frozen_backbone(1), "student's frozen weights"),
        (attacked_by, lambda: attacked_by(step_size=0.1), "attack.step_size is 0.05, not 0.1"),
        (attacked_by, lambda: attacked_by(start="zero"), "attack.start"),
        (attacked_by, lambda: attacked_by(objective="kl"), "attack.objective"),
        (lambda: with_part(s={"a": 1}), lambda: with_part(s={"a": 2}), "s.a is 1, not 2"),
        (lambda: with_part(s=[1, "b"]), lambda: with_part(s=[1, "c"]), "its s is"),
        (lambda: with_part(s=lambda z: 2 * z), lambda: with_part(s=lambda z: 3 * z), "s.numbers"),
        (lambda: with_part(s=torch.ones(2)), lambda: with_part(s=torch.zeros(2)), "its s is"),
        (lambda: Supervised(small()), lambda: Supervised(small(), schedule=cosine(3)), "initial_lr"),
        (lambda: Supervised(small()), lambda: Supervised(torch.nn.DataParallel(small())), "student"),
        (lambda: Supervised(small()), lambda: Supervised(torch.compile(small())), "student"),
    ],
)
def test_a_checkpoint_of_another_method_is_refused(tmp_path, first, second, words):
    quick(first(), checkpoint=tmp_path / "c")
    assert len(quick(first(), checkpoint=tmp_path / "c")) == 1
    method = second()
    before = {k: v.clone() for k, v in method.student.state_dict().items()}
    with pytest.raises(ValueError, match=f"belongs to another run: .*{re.escape(words)}") as error:
        quick(method, checkpoint=tmp_path / "c")
    assert "\n" not in str(error.value) and same(before, method.student.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"batches": Batches(other_images(), 16)},
        {"batches": Batches(IMAGES, 16, seed=1)},
        {"validate": other_images()},
        {"select": "loss"},
        {"batches": [(IMAGES.floats(), IMAGES.y)] * 3},
    ],
)
def test_a_checkpoint_of_other_data_is_refused(tmp_path, change):
    quick(Supervised(small()), validate=IMAGES, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="belongs to another run"):
        quick(Supervised(small()), **{"validate": IMAGES, "checkpoint": tmp_path / "c", **change})


def test_a_foreign_data_set_of_other_images_is_refused(tmp_path):
    def loader(images):
        return DataLoader(TensorDataset(images.floats(), images.y), 16)

    quick(Supervised(small()), loader(IMAGES), checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="its batches.dataset.tensors.0 is"):
        quick(Supervised(small()), loader(other_images()), checkpoint=tmp_path / "c")


def test_another_schedule_goes_on_as_asked_and_says_so(tmp_path):
    quick(Supervised(small(), schedule=cosine(2)), epochs=2, checkpoint=tmp_path / "c")
    with pytest.warns(UserWarning, match="its schedule.T_max is 2, not 10"):
        history = quick(Supervised(small(), schedule=cosine(10)), epochs=10, checkpoint=tmp_path / "c")
    whole = quick(Supervised(small(), schedule=cosine(10)), epochs=10)
    assert history["lr"][2:] == pytest.approx(whole["lr"][2:])


def test_a_flipped_bit_and_malformed_contents_are_one_line(tmp_path):
    file = tmp_path / "c"
    quick(Supervised(small()), checkpoint=file)
    whole = file.read_bytes()
    damaged = [bytearray(whole) for _ in range(12)]
    for k, data in enumerate(damaged):
        data[(2 * k + 1) * len(data) // 24] ^= 1 << k % 8
    for content in ({}, {"identity": 3, "moved": {}}, [1], "text", {**torch.load(file), "parts": {}}):
        torch.save(content, buffer := io.BytesIO())
        damaged.append(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    for data in damaged:
        file.write_bytes(data)
        method = Supervised(small(3))
        with pytest.raises(ValueError, match="^c is not a complete checkpoint") as error:
            quick(method, checkpoint=file)
        assert "\n" not in str(error.value)


def test_more_done_than_asked_is_said(tmp_path):
    quick(Supervised(small()), epochs=3, checkpoint=tmp_path / "c")
    for less in ({"epochs": 2}, {"epochs": 3, "max_steps": 4}):
        with pytest.raises(ValueError, match="further than was asked for: 3 epochs, 9 steps are done"):
            quick(Supervised(small()), checkpoint=tmp_path / "c", **less)


def older(file):
    "The same checkpoint as it was once written: rows as dicts, streams of Python and NumPy as plain numbers."
    saved = torch.load(file)
    saved["history"] = _unpacked(saved["history"])
    for states in saved["random"]:
        for name in ("python", "numpy"):
            states[name] = tuple(v.tolist() if isinstance(v, torch.Tensor) else v for v in states[name])
        states["python"] = states["python"][0], tuple(states["python"][1]), states["python"][2]
    torch.save(saved, buffer := io.BytesIO())
    file.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


class Draws(Supervised):
    "Draws from the streams of Python and NumPy."

    def step(self, x, y):
        return super().step((x + 0.01 * random.random() + 0.01 * numpy.random.rand()).float(), y)


@pytest.mark.parametrize("age", [lambda file: None, older])
def test_rows_and_streams_are_the_same_after_a_checkpoint(tmp_path, age):
    file, seen = tmp_path / "c", []

    def metrics():      # names and types that change, and numbers of every kind
        seen.append(len(seen) + 1)
        odd = {"big": 2**70, "good": True, "none": float("nan")} if len(seen) % 2 else {}
        return {"count": len(seen), "mixed": len(seen) if len(seen) == 1 else 0.5, **odd}

    def rows(history):
        times = ("seconds", "samples_per_s")
        return [[(k, type(v), k not in times and repr(v)) for k, v in row.items()] for row in history.rows]

    whole = quick(Draws(small()), epochs=4, validate=metrics)
    seen.clear()
    first = quick(Draws(small()), epochs=2, validate=metrics, checkpoint=file)
    age(file)
    resumed = quick(Draws(small(3)), epochs=4, validate=metrics, checkpoint=file)
    assert first.rows[0]["seconds"] == resumed.rows[0]["seconds"]
    assert rows(resumed) == rows(whole)


def test_a_later_checkpoint_takes_no_longer_for_the_rows_before_it(tmp_path):
    sizes, batches = [], Batches(IMAGES.first(16), 16)
    for epochs in (3, 60):
        quick(Supervised(small()), batches, epochs=epochs, checkpoint=tmp_path / f"{epochs}")
        with zipfile.ZipFile(tmp_path / f"{epochs}") as file:       # what is pickled number by number
            sizes.append(next(i.file_size for i in file.infolist() if i.filename.endswith("data.pkl")))
    assert sizes[1] < sizes[0] + 100


def test_a_full_disk_keeps_the_last_good_file(tmp_path, monkeypatch):
    file = tmp_path / "run.pt"
    quick(Supervised(small()), checkpoint=file)
    good = file.read_bytes()

    def full_disk(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"run.pt could not be written: .*No space left") as error:
        quick(Supervised(small()), epochs=2, checkpoint=file)
    assert "\n" not in str(error.value) and len(error.value.history) == 1 + 1
    assert file.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["run.pt"]


# ---------------------------------------------------------------- to the same bits


class Noisy(Supervised):
    "Draws from a stream of its own, counts, and updates every second step with the gradient of both."

    def __init__(self, student):
        super().__init__(student, lr=0.05)
        self.stream, self.count, self.mean = torch.Generator().manual_seed(1), 0, torch.zeros(1)
        student.zero_grad()

    def step(self, x, y):
        self.count += 1
        self.mean = 0.9 * self.mean + x.mean()
        noise = torch.rand(x.shape, generator=self.stream) * self.mean
        loss = torch.nn.functional.cross_entropy(self.student(torch.nn.functional.dropout(x + noise)), y)
        loss.backward()
        if self.count % 2 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"loss": loss}


class Bright(TensorDataset):
    "A data set that draws."

    def __getitem__(self, k):
        x, y = super().__getitem__(k)
        return x * torch.rand(1), y


def loaders():
    def make(**more):
        return DataLoader(Bright(IMAGES.floats(), IMAGES.y), 8, **more)

    return {
        "shuffled": lambda: make(shuffle=True),
        "own generator": lambda: make(shuffle=True, generator=torch.Generator().manual_seed(5)),
        "workers": lambda: make(shuffle=True, num_workers=1),
        "list": lambda: [(IMAGES.floats(slice(k, k + 8)), IMAGES.y[k : k + 8]) for k in range(0, 48, 8)],
        "batches": lambda: Batches(IMAGES, 8),
    }


@pytest.mark.parametrize("kind", loaders())
@pytest.mark.parametrize("stop", [3, 6, 9])
def test_every_source_and_state_resumes_to_the_same_bits(tmp_path, kind, stop):
    make = loaders()[kind]
    whole, again = Noisy(small()), Noisy(small(5))
    history = quick(whole, make(), epochs=3)
    quick(Noisy(small()), make(), epochs=3, max_steps=stop, checkpoint=tmp_path / "c")
    torch.rand(3)
    resumed = quick(again, make(), epochs=3, checkpoint=tmp_path / "c")
    assert same(whole.student.state_dict(), again.student.state_dict()) and again.count == 18
    assert history["loss"] == resumed["loss"]


def test_persistent_workers_are_refused_with_a_checkpoint(tmp_path):
    batches = DataLoader(TensorDataset(IMAGES.floats(), IMAGES.y), 16, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent_workers"):
        quick(Supervised(small()), batches, checkpoint=tmp_path / "c")


def test_fit_leaves_the_global_streams_as_they_were():
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    quick(Supervised(small()))
    assert torch.rand(3).equal(expected)


# ---------------------------------------------------------------- what cannot train


class Fixed:
    def __init__(self, *answers):
        self.student, self.answers, self.count = small(), answers, -1

    def step(self, x, y):
        self.count += 1
        return self.answers[min(self.count, len(self.answers) - 1)]


LOSS = {"loss": torch.tensor(1.0)}


@pytest.mark.parametrize(
    "answers",
    [
        *((answer,) for answer in (None, torch.tensor(1.0), {}, {"loss": 1.0}, {"loss": torch.ones(1)})),
        (LOSS, {"other": LOSS["loss"]}),
        (LOSS, LOSS, LOSS, {**LOSS, "other": LOSS["loss"]}),
    ],
)
def test_a_step_returns_named_scalars_the_same_each_time(answers):
    with pytest.raises(ValueError, match="step must return"):
        quick(Fixed(*answers), epochs=2)


def with_pixel(value, batch=2):
    found = [(IMAGES.floats(slice(k, k + 16)).clone(), IMAGES.y[k : k + 16]) for k in (0, 16, 32)]
    found[batch][0][3, 0, 2, 2] = value
    return found


def with_label(value, batch=2):
    found = [(x, y.clone()) for x, y in with_pixel(0.5)]
    found[batch][1][1] = value
    return found


@pytest.mark.parametrize(
    "more, words",
    [
        ({"batches": []}, "no batches"),
        ({"batches": iter(DataLoader(TensorDataset(PIXELS, IMAGES.y), 16)), "epochs": 2}, "only once"),
        ({"batches": (b for b in with_pixel(0.5))}, "must have a length"),
        ({"batches": [{"x": 1}]}, "a batch must be two tensors"),
        ({"batches": [(IMAGES.x, IMAGES.y)]}, "images must be floats in"),
        *(({"batches": with_pixel(v, 0)}, "at step 1") for v in (1.1, -0.1, float("nan"))),
        *(({"batches": with_pixel(v, 2)}, "at step 3") for v in (1.1, -0.1, float("nan"))),
        *(({"batches": with_label(v, 0)}, r"labels must lie in \[0, 4\)") for v in (4, -1, -100)),
        *(({"batches": with_label(v, 2)}, r"labels must lie in \[0, 4\)") for v in (4, -1, -100)),
        ({"batches": Batches(Images(IMAGES.x, IMAGES.y + 1, "abcde"), 16)}, r"labels must lie in \[0, 4\)"),
        ({"epochs": 1.5}, "epochs must be a whole number >= 0, got 1.5"),
        ({"epochs": None}, "epochs must be a whole number"),
        ({"max_steps": -1}, "max_steps must be a whole number >= 0"),
        ({"checkpoint_steps": 0.5}, "checkpoint_steps must be a whole number >= 0"),
        ({"epoch_steps": 0}, "epoch_steps must be a whole number >= 1"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"precision": "fp16"}, "precision must be fp32 or bf16, got 'fp16'"),
        ({"select": "val_acc", "validate": IMAGES}, "unknown metric 'val_acc'; nearest: val_accuracy"),
        ({"select": "val_acc", "validate": lambda: {"val_rob": 0.5}}, "unknown metric 'val_acc'"),
        ({"validate": lambda: 0.5}, "validate must return a dict of numbers"),
    ],
)
def test_what_cannot_train_is_refused(more, words):
    with pytest.raises(ValueError, match=words) as error:
        quick(Supervised(small()), **more)
    assert "\n" not in str(error.value)


def test_pixels_may_be_off_by_rounding():
    quick(Supervised(small()), with_pixel(1 + 5e-7))


@pytest.mark.parametrize("foreign", [False, True])
def test_a_last_batch_of_one_image_is_refused_with_batch_norm(foreign):
    seventeen = IMAGES.subset(torch.arange(17))
    batches = Batches(seventeen, 16, drop_last=False)
    if foreign:
        batches = DataLoader(TensorDataset(seventeen.floats(), seventeen.y), 16)
    with pytest.raises(ValueError, match="drop_last"):
        quick(Supervised(small(name="resnet8")), batches)
    quick(Supervised(small()), batches)  # without BatchNorm it may be


def test_half_precision_students_are_refused_and_double_ones_work():
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match="train student.float"):
            quick(Supervised(small().to(dtype)))
    method = Supervised(small().double())
    quick(method)
    assert all(p.dtype is torch.float64 for p in method.student.parameters())


# ---------------------------------------------------------------- cut short


def test_an_epoch_cut_short_has_its_row_and_goes_on_to_the_same_bits(tmp_path):
    rows, whole, cut = [], Supervised(small()), Supervised(small())
    full = quick(whole, epochs=2, validate=IMAGES)
    options = {"epochs": 2, "validate": IMAGES, "checkpoint": tmp_path / "c", "trackers": [rows.append]}
    for _ in range(2):  # asked twice, it answers the same
        part = quick(cut, max_steps=4, **options)
        assert part["step"] == [3, 4] and part["val_accuracy"][1] >= 0 and part.rows[-1] == rows[-1]
    assert rows[-1]["loss"] == rows[-2]["loss"] and len(rows) == 3
    resumed = quick(Supervised(small(4)), **options)
    assert resumed["loss"] == full["loss"] and resumed["step"] == [3, 6]


def test_steps_need_not_be_a_multiple(tmp_path):
    class Still(Fixed):
        pass

    for steps, expected in ((2, [2]), (7, [3, 6, 7]), (6, [3, 6])):
        history = fit(Still(LOSS), steps=steps, epoch_steps=3, progress="off")
        assert history["step"] == expected and history["loss"] == [1.0] * len(expected)
    more = {"epoch_steps": 3, "progress": "off", "checkpoint": tmp_path / "c"}
    fit(Still(LOSS), steps=7, **more)
    assert fit(Still(LOSS), steps=10, **more)["step"] == [3, 6, 9, 10]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_stops_a_run_carries_the_history(error):
    method, step = Supervised(small()), Supervised.step

    def stop(x, y):
        if len(calls) == 7:
            raise error
        calls.append(1)
        return step(method, x, y)

    calls, method.step = [], stop
    with pytest.raises(error) as caught:
        quick(method, epochs=5)
    assert caught.value.history["epoch"] == [1, 2]


def test_a_loader_that_every_process_would_read_alike_is_refused(monkeypatch):
    monkeypatch.setattr(training, "world", lambda: 2)
    data = TensorDataset(IMAGES.floats(), IMAGES.y)
    run = SimpleNamespace(batches=DataLoader(data, 16), epochs=1, checkpoint=None)
    with pytest.raises(ValueError, match="DistributedSampler"):
        training._check_batches(run, 3)
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=0)
    run.batches = DataLoader(data, 8, sampler=sampler)
    training._check_batches(run, 3)


# ---------------------------------------------------------------- networks that are not plain


class Wrapped(torch.nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = small(), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


@pytest.mark.parametrize("wrap", [lambda z: (z, z), lambda z: {"logits": z}, lambda z: z.flatten()])
def test_other_outputs_than_logits_are_named(wrap):
    for action in (lambda m: accuracy(m, IMAGES), lambda m: quick(Supervised(m))):
        with pytest.raises(ValueError, match=r"the model must return logits of shape \(\d+, K\), got"):
            action(Wrapped(wrap))


class Parameterless(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :4]


def test_accuracy_of_models_without_parameters_and_of_half_models():
    assert 0 <= accuracy(Parameterless(), IMAGES) <= 1
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        logits = predict(small().to(dtype), IMAGES)
        assert logits.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert torch.allclose(logits.float(), predict(small(), IMAGES), atol=0.05)
    for more in ({"batch_size": 0}, {"batch_size": 2.5}):
        with pytest.raises(ValueError, match="batch_size must be a whole number >= 1"):
            predict(small(), IMAGES, **more)


def test_clipping_comes_before_the_step():
    net = torch.nn.Linear(2, 1, bias=False)
    before = net.weight.detach().clone()
    update(torch.optim.SGD(net.parameters(), 1.0), 100 * net.weight.sum(), clip=1.0)
    assert (net.weight - before).norm().item() == pytest.approx(1.0, rel=1e-4)


def test_a_torn_first_checkpoint_is_swept_away(tmp_path):
    "A kill in the middle of the very first save leaves a part and no checkpoint."
    data, net = digits_net()
    torn = tmp_path / "run.pt.123.part"
    torn.write_bytes(b"half")
    fit(Supervised(net), Batches(data.train, 64), epochs=1, checkpoint=tmp_path / "run.pt", progress="off")
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


# ---------------------------------------------------------------- the guide


def guides_methods():
    text = (Path(__file__).parents[1] / "docs" / "write-a-method.md").read_text(encoding="utf-8")
    names = {"student": small(), "teacher": small(1)}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S): exec(block, names)
    return names


@pytest.mark.parametrize("name", ["method", "Averaged", "Accumulated", "MixedKD", "Committee"])
def test_methods_of_the_guide_learn_and_resume(name, tmp_path):
    known = guides_methods()

    def make(seed):
        if name == "method":
            more = dict(optimizer=partial(torch.optim.AdamW, lr=1e-3), schedule=per_step(known["warm_up"]))
            return KD(small(seed), small(1), clip=1.0, **more)
        others = {"MixedKD": [small(1)], "Committee": [[small(1), small(2)]]}.get(name, [])
        return known[name](small(seed), *others)

    whole, file = make(0), tmp_path / "run.pt"
    history = quick(whole, epochs=3)
    assert history["loss"][-1] < history["loss"][0]
    quick(make(0), epochs=3, max_steps=7, checkpoint=file)
    resumed = make(5)
    quick(resumed, epochs=3, checkpoint=file)
    assert same(whole.student.state_dict(), resumed.student.state_dict())
    if name == "Averaged": assert same(whole.average.state_dict(), resumed.average.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_networks_keep_their_layout(layout):
    nets = [small(k, "resnet8").to(memory_format=layout) for k in range(2)]
    quick(KD(*nets, lr=0.01), Batches(IMAGES.first(32), 16))
    for net in nets:
        weights = [p for p in net.parameters() if p.ndim == 4]
        assert all(p.is_contiguous(memory_format=layout) for p in weights)
