"""How time grows with size: exponents, each beside that of the work that is needed.

`python tests/bench_growth.py [-k WORDS] [--rounds N] [--markdown]`; see stopwatch.py.

An exponent is the slope of log(seconds) over log(size), seconds being the least of the rounds. Beside it
stands the slope of the counted work (walks, epochs, images, networks). Below that, what a call costs in any
case still shows; above it, something grows that need not.
"""

import copy
import math
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from stopwatch import cells, main, noise, race, row

from kdnb.abm import transition_curves
from kdnb.afd import AFD
from kdnb.bss import find_boundary
from kdnb.data import Batches, Images
from kdnb.models import create_model
from kdnb.training import Supervised, fit


def slope(sizes, values):
    "Of a straight line through the logarithms."
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(v) for v in values]).slope


def growth(work, size, jobs, needed, unit):
    "jobs: size -> job; needed: size -> how much work that is, in `unit`."
    say_growth(work, size, {n: min(seconds) for n, seconds in race(jobs).items()}, needed, unit)


def say_growth(work, size, times, needed, unit):
    per = ", ".join(f"{1000 * t / needed[n]:.3g}" for n, t in times.items())
    found, wanted = slope(times, times.values()), slope(needed, needed.values())
    sizes = ", ".join(map(str, times))
    cells(f"{work} over {size} ({sizes})", f"{found:.2f}", f"{wanted:.2f}, {unit}", per)


HEAD = "work over size", "exponent of time", "of the work needed", "milliseconds for each unit of it"


# ---- walks to K - 1 classes


CLASSES = (10, 100, 1000)


def with_classes(K, seed=0):
    return create_model("resnet8", num_classes=K, image_size=8, seed=seed).eval()


@row
def boundaries():
    "find_boundary (bss) over the number of classes."
    jobs, x = {}, noise(4, 8)
    for K in CLASSES:
        model = with_classes(K)
        with torch.no_grad():
            base = model(x).argmax(1)
        # steps too short to arrive, so that every walk takes four of them
        jobs[K] = partial(find_boundary, model, x, base, steps=4, eta=1e-6)
    growth("`find_boundary`, 4 images", "classes", jobs, {K: K - 1 for K in CLASSES}, "walks")


@row
def curves():
    "transition_curves (abm) over the number of classes."
    x = noise(4, 8)
    jobs = {K: partial(transition_curves, with_classes(K), with_classes(K), x, steps=4) for K in CLASSES}
    growth("`transition_curves`, 4 images", "classes", jobs, {K: K - 1 for K in CLASSES}, "walks")


# ---- networks that all learn from each other


@row
def networks():
    "AFD, all pairs and a circle, over the number of networks."
    x, y = noise(32, 16), torch.arange(32) % 10
    nets, sizes = [create_model("resnet8", image_size=16, seed=k) for k in range(6)], (2, 3, 4, 6)
    jobs = {
        (scheme, K): partial(AFD(copy.deepcopy(nets[:K]), x, scheme=scheme, seed=0).step, x, y)
        for scheme in ("cyclic", "pairs")
        for K in sizes
    }
    times = {job: min(seconds) for job, seconds in race(jobs).items()}
    circle, pairs = ({K: times[scheme, K] for K in sizes} for scheme in ("cyclic", "pairs"))
    # K networks have K links in a circle, K (K - 1) in pairs: so much is a link, so much a network
    link = (pairs[4] - circle[4]) / 8
    network = circle[4] / 4 - link
    say_growth("`AFD.step`, in a circle", "networks", circle, {K: K for K in sizes}, "networks")
    needed = {K: K + link / network * K * (K - 1) for K in sizes}
    share = f"networks and pairs ({link / network:.2f} of one)"
    say_growth("`AFD.step`, all pairs", "networks", pairs, needed, share)


# ---- training: what is kept, what is set up


@row
def checkpoints():
    "fit with a checkpoint after every epoch, over epochs."
    images = Images(torch.zeros(32, 1, 8, 8, dtype=torch.uint8), torch.arange(32) % 10, tuple("0123456789"))

    def train(epochs, kept):
        with tempfile.TemporaryDirectory() as folder:
            method = Supervised(create_model("mlp_16", in_channels=1, image_size=8, seed=0), lr=0.01)
            path = Path(folder) / "c" if kept else None
            fit(method, Batches(images, 32), epochs=epochs, checkpoint=path, progress="off")

    sizes = (10, 40, 160, 640)
    for words, kept in (("a checkpoint each", True), ("no checkpoint", False)):
        jobs = {n: partial(train, n, kept) for n in sizes}
        growth(f"`fit`, one batch an epoch, {words}", "epochs", jobs, {n: n for n in sizes}, "epochs")


@row
def batches():
    "Batches: set-up over the number of images."
    sizes = (1000, 4000, 16000, 64000)
    every = torch.zeros(max(sizes), 3, 32, 32, dtype=torch.uint8)
    y = torch.zeros(max(sizes), dtype=torch.int64)
    for augment in ("none", "crop_flip"):
        jobs = {n: partial(Batches, Images(every[:n], y[:n], ("0",)), 128, augment=augment) for n in sizes}
        growth(f"`Batches`, augment={augment}", "images", jobs, {n: n for n in sizes}, "images")


if __name__ == "__main__":
    main(__doc__, HEAD)
