"Kill and resume, two processes against one, compiled and tracked training: what a notebook cell cannot show."

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kdnb.data import Batches, load_data
from kdnb.kd import KD
from kdnb.models import create_model
from kdnb.training import Supervised, TensorBoard, fit

# The script that the tests kill, resume and run in two processes: it distils on digits and saves the student.
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
if torch.distributed.is_initialized() and torch.distributed.get_rank(): sys.exit()
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


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_sigkill_at_any_moment_resumes_to_the_same_bits(script, tmp_path):
    whole, cut, checkpoint = tmp_path / "whole.pt", tmp_path / "cut.pt", tmp_path / "run.ckpt"
    process = run(script, whole)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    kills, random = 0, torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
    for _ in range(8):
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


def test_two_processes_equal_one_on_the_same_global_batch(script, tmp_path):
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    process = run(script, one, dropout=0.0)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        run(
            script,
            two,
            tmp_path / "two.ckpt",
            seed=rank,
            dropout=0.0,  # rank 1 starts from other weights
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    texts = [p.communicate(timeout=300)[0] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], texts
    a, b = weights(one), weights(two)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a), max((a[k] - b[k]).abs().max() for k in a)
    assert "epoch 6/6" in texts[0] and "epoch" not in texts[1]  # one process reports


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
