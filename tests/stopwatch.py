"""What the benchmarks share: how rows are chosen, timed and printed.

    python tests/bench_bss.py [-k WORDS] [--rounds N] [--markdown] [--list]

A row times two or more ways to do the same work in turns, in one process on one thread, and prints the ratio
of their times: the median over the rounds, with quartiles. That all compute the same is asserted first.
Ratios travel from machine to machine, seconds do not. Peers that pip can install are imported; published
codes are written anew as they stand, with every forward and backward pass that they make and no other.
"""

import argparse
import contextlib
import copy
import datetime
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdnb.models import Normalize, create_model

ROUNDS, PATIENCE = 3, 5.0  # rounds of a row; seconds for each of them, else two are enough
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10, as the published codes have it

_rows = []
_table = argparse.Namespace(rounds=ROUNDS, markdown=False, peak=1.0)


def row(function):
    "A decorator: this function prints rows; -k searches its name and the first line of its docstring."
    _rows.append(function)
    return function


def main(doc, head=None):
    "Run the chosen functions of the file that calls it; `head` names the columns of a table of another kind."
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("-k", default="", metavar="WORDS", help="only rows that hold all these words")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each row, at most")
    parser.add_argument("--markdown", action="store_true", help="rows as README has them")
    parser.add_argument("--list", action="store_true", help="names, without running anything")
    parser.parse_args(namespace=_table)
    chosen = [f for f in _rows if all(word in _words(f) for word in _table.k.lower().split())]
    if _table.list:
        for function in chosen:
            print(f"{function.__name__:24} {function.__doc__.splitlines()[0]}")
    elif chosen:
        _begin(head)
        for function in chosen:
            function()


def _words(function):
    file = Path(function.__code__.co_filename).stem
    return f"{file} {function.__name__} {function.__doc__.splitlines()[0]}".lower()


def _begin(head=None):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    a = torch.randn(1024, 1024)
    _table.peak = 2 * 1024**3 / min(clock(lambda: a @ a) for _ in range(10))
    machine = f"{_processor()}, {os.cpu_count()} cores, one thread"
    print(
        f"PyTorch {torch.__version__}, {machine}, {_table.peak / 1e9:.0f} GFLOP/s in float32 products, "
        f"{datetime.date.today()}"
    )
    if head or _table.markdown:
        head = head or ("work", "against", "ratio [quartiles]")
        print("")
        cells(*head)
        cells(*["---"] * len(head))
    else:
        print(f"{'work':58} {'against':44} {'ratio':>6} [quartiles]")


def _processor():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


# ---- time


def clock(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def race(jobs, repeat=1, warm=False):
    "Seconds of each job of a dict, in turns, after one call of each to warm up, unless they are warm."
    for job in jobs.values() if not warm else ():
        job()
    times, start = {name: [] for name in jobs}, time.perf_counter()
    for done in range(_table.rounds):
        if done >= 2 and time.perf_counter() - start > PATIENCE * _table.rounds:
            break
        for name, job in jobs.items():
            times[name].append(clock(lambda job=job: [job() for _ in range(repeat)]))
    return times


def report(work, peer, ratios, note=""):
    low, middle, high = statistics.quantiles(list(ratios) * (2 if len(ratios) == 1 else 1), n=4)
    ratio = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    if _table.markdown:
        cells(f"{work}{f' ({note})' if note else ''}", peer, ratio)
    else:
        print(f"{work:58} {peer:44} {middle:6.2f} [{low:.2f}, {high:.2f}]  {note}", flush=True)


def compare(work, ours, peers, note="", repeat=1, flops=0, warm=False):
    "One row for each way of ours (a dict, what: job) and each peer (the same), all timed in the same rounds."
    jobs = {("ours", k): v for k, v in ours.items()} | {("peer", k): v for k, v in peers.items()}
    times = race(jobs, repeat, warm)
    for what in ours:
        mine = times["ours", what]
        share = f"{flops * repeat / statistics.median(mine) / _table.peak:.0%} of peak" if flops else ""
        for peer in peers:
            ratios = [p / o for o, p in zip(mine, times["peer", peer], strict=True)]
            report(f"{work}{what and ', '}{what}", peer, ratios, ", ".join(filter(None, (note, share))))


def cells(*texts):
    "A row as README has it."
    print(f"| {' | '.join(texts)} |", flush=True)


def say(text):
    "A line that is no row."
    print(f"\n{text}\n" if _table.markdown else text, flush=True)


def flops_of(job):
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


# ---- networks and images


def noise(n, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    colour, grain = (torch.rand(n, 3, s, s, generator=g) for s in (1, size))
    return ((0.6 * colour + 0.4 * grain) * 255).round() / 255


def network(name, size=32, normalised=False, **choices):
    "Random weights, shaken statistics, and yet every class is somebody's answer."
    pixels = dict(mean=MEAN, std=STD) if normalised else {}
    model, g = create_model(name, seed=0, **pixels, **choices).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for v, low, high in ((m.running_mean, -0.2, 0.2), (m.running_var, 0.7, 1.3)):
                    v.uniform_(low, high, generator=g)
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        spread, mean = torch.std_mean(model(noise(64, size, 9)), 0)
        last.bias.sub_(mean).div_(spread)
        last.weight.div_(spread[:, None])
    return model


def bare(model):
    "A copy as the published codes have it: it takes images that are normalised already."
    model = copy.deepcopy(model)
    model.normalize = nn.Identity()
    return model


def normalised(model, x):
    "(x - mean) / std, in the default layout."
    mean, std = Normalize.of(model)
    return ((x - mean) / std).contiguous()


def wide(v):
    "Images or a network with channels last."
    if isinstance(v, nn.Module):
        return v.to(memory_format=torch.channels_last)
    return v.contiguous(memory_format=torch.channels_last)


def in_bf16(method, *data):
    "A step in bfloat16, as `fit` makes it."

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            method.step(*data)

    return step


def check_weights(ours, peer, biases=True, **tolerance):
    "The same weights after the same steps; a bias that a batch norm takes away again may be anything."
    for (name, a), (_, b) in zip(ours.named_parameters(), peer.named_parameters(), strict=True):
        if biases or a.ndim > 1:
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
