"""What test_training trains in one process and, under torchrun, in two: `two_processes.py WEIGHTS.pt`.

In float64: attacks follow signs, and rounding turns the sign of a slope that is nearly 0. No process draws
for itself: attacks start at fixed points, BSS takes the likeliest class, ABM's noise is shared out. What
cannot agree: random starts, sampled classes, noise, dropout; BSS's choice among images, where it has one."""

import os
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed.nn.functional as together
from torch import distributed as dist
from torch import nn

from kdnb import training
from kdnb.abm import ABM
from kdnb.afd import AFD, DML
from kdnb.ard import ARD
from kdnb.attacks import pgd
from kdnb.bss import BSS
from kdnb.checkpoint import stateful, world
from kdnb.data import Batches, Images, load_data, own_share
from kdnb.features import AT, FSP, FitNet
from kdnb.kd import KD
from kdnb.robust import PGDAT, TRADES
from kdnb.tfkd import AdversarialTfKD, TfKD
from kdnb.training import Supervised, fit

RANK = int(os.environ.get("RANK", 0))


class Net(nn.Sequential):
    "A small convnet; its stages are named, their maps of equal width."

    def __init__(self, seed, norm=False):
        torch.manual_seed(seed)
        def stage(channels):
            conv = nn.Conv2d(channels, 6, 3, padding=1, bias=not norm)
            return nn.Sequential(conv, *[nn.BatchNorm2d(6)] * norm, nn.Tanh())
        head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 10))
        super().__init__()
        for name, part in {"stage1": stage(1), "stage2": stage(6), "head": head}.items():
            self.add_module(name, part)
        self.double()


class Synced(nn.BatchNorm2d):
    "What SyncBatchNorm computes on GPUs, by sums over all processes on the CPU."

    def forward(self, x):
        if not self.training or world() == 1: return super().forward(x)
        count = world() * x.numel() // x.shape[1]
        means = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, square = together.all_reduce(means) / world()
        var = square - mean.square()
        if self.track_running_stats:
            self.num_batches_tracked += 1
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def as_on_gpus(run, *inputs, share=training._share_statistics):
    share(SimpleNamespace(device=torch.device("cuda")), *inputs)


class Noise(nn.Module):
    "A generator without batch norm."

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.z_size, self.linear = 4, nn.Linear(4, 64).double()

    def forward(self, z): return self.linear(z).view(-1, 1, 8, 8).sigmoid()


class SharedNoise(ABM):
    "Draws the noise of the whole run in every process, and takes its share."

    def _noise(self):
        self.drawn = getattr(self, "drawn", 0) + 1
        draw = torch.Generator().manual_seed(self.drawn)
        z = torch.randn(self.batch_size, 4, generator=draw, dtype=torch.float64)
        return z[own_share(0, self.batch_size)]


def walk(model, x, y, **plan):
    "PGD without a draw: it starts at x, or beside it where it must not start there."
    start = x + 0.01 * (40 * x + 1).sin() if plan.get("objective") == "kl" else "zero"
    return pgd(model, x, y, **dict(eps=0.1, steps=3, start=start) | plan)


def student(norm=False): return Net(RANK, norm)    # the second process starts elsewhere: `fit` sees to it


def teacher(): return Net(9)


def hint():
    example = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    layer = dict(student_layers=["stage2"], teacher_layers=["stage2"])
    return FitNet(student(), teacher(), example, seed=RANK, lr=0.1, **layer)


def game(**settings):
    return AFD([student(), Net(8)], torch.zeros(2, 1, 8, 8), seed=RANK, feature_lr=1e-3, lr=0.1, **settings)


def boundary():
    # the boundary term is a mean over a process's samples: all images are chosen, none is dropped
    plan = dict(variant="official", attack_size=16, target="likeliest")
    return BSS(trained(), trained(), epochs=4, lr=1e-3, **plan)


def without_data():
    return SharedNoise(student(), teacher(), Noise(), steps=3, batch_size=16, student_steps=2, **MAPS)


MAPS = dict.fromkeys(["student_layers", "teacher_layers"], ["stage1", "stage2"])
UPHILL = partial(walk, objective="kl")
METHODS = {
    "Supervised": lambda: Supervised(student(), lr=0.1, clip=0.5),
    "KD": lambda: KD(student(), teacher(), lr=0.1),
    "FitNet": hint,
    "AT": lambda: AT(student(), teacher(), **MAPS, beta=100.0, lr=0.1),
    "FSP": lambda: FSP(student(), teacher(), **MAPS, beta=100.0, lr=0.1),
    "PGDAT": lambda: PGDAT(student(), attack=walk, lr=0.1),
    "TRADES": lambda: TRADES(student(), attack=UPHILL, lr=0.1),
    "BSS": boundary,
    "ABM": without_data,
    "ARD": lambda: ARD(student(), teacher(), attack=walk, alpha=0.5, lr=0.1),
    "DML": lambda: DML([student(), Net(8), Net(7)], lr=0.1),
    "AFD": partial(game, discriminator="none"),
    "TfKD": lambda: TfKD(student(), lr=0.1),
    "AdversarialTfKD": lambda: AdversarialTfKD(student(), teacher(), mode="self", attack=walk, lr=0.1),
    # batch norm, with the statistics of the whole batch; those of AFD's discriminators too
    "Supervised, batch norm": lambda: Supervised(student(norm=True), lr=0.1),
    "TRADES, batch norm": lambda: TRADES(student(norm=True), attack=UPHILL, lr=0.1),
    "AFD, batch norm": game,
}


def trained():
    "A network that is right on all of `images()`, far from its borders."
    net, images = Net(9), pictures()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(100):
        loss = nn.functional.cross_entropy(net(images.floats(slice(None)).double()), images.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def pictures():
    data = load_data("digits").train
    return Images(data.x[:48], data.y[:48], data.classes)


def train(name, checkpoint=None):
    "The weights of all networks after three steps on batches of 16, in this process or in two."
    norm = "batch norm" in name
    plan = dict(progress="lines", device="cpu", sync_batchnorm=norm, checkpoint=checkpoint)
    if name == "ABM": plan |= dict(steps=3, epoch_steps=3)
    else: plan |= dict(batches=Batches(pictures(), 16, seed=0), epochs=1)
    with patch.multiple(training, _Synced=Synced, _share_statistics=as_on_gpus):
        if checkpoint: fit(METHODS[name](), max_steps=2, **plan)    # interrupted, and resumed by another one
        fit(method := METHODS[name](), **plan)
    networks = [part for part in stateful(method).values() if isinstance(part, nn.Module)]
    kinds = {type(m) for net in networks for m in net.modules()}
    assert Synced not in kinds and (nn.BatchNorm2d in kinds) == norm, "put back"
    return [net.state_dict() for net in networks if [*net.parameters()]]    # ABM's alarm sees the own images


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: train(name, f"{sys.argv[1]}.ckpt" if name == "KD" else None) for name in METHODS}
    assert world() == 2 and dist.get_backend() == "gloo"
    if not RANK: torch.save(found, sys.argv[1])
