"""How fast AFD is, beside the paper's three passes; there is no published code.

`python tests/bench_afd.py [-k WORDS] [--rounds N] [--markdown]`; see stopwatch.py.

The peer is the paper as a careful reader writes it: a pass over the batch for each of the three losses,
peers' answers and maps constant, the losses of both networks going back together. (Ours also computes what
the log shows.) The last rows compare other work: what discriminators cost, an iteration beside its parts.
"""

import copy
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from stopwatch import check_weights, compare, in_bf16, main, noise, race, report, row, say, wide

from kdnb.afd import AFD, DML
from kdnb.learning import update
from kdnb.models import create_model, features

BATCH = 64
WORK = "`AFD.step`, two resnet20, 64 images"


def two(name, size=32):
    return [create_model(name, image_size=size, seed=k) for k in (0, 1)]


def batch(size=32, dtype=torch.float32):
    y = torch.randint(10, (BATCH,), generator=torch.Generator().manual_seed(2))
    return noise(BATCH, size).to(dtype), y


class ThreePasses:
    "The paper's losses as they read, each with a pass of its own."

    def __init__(self, networks, discriminators, order, beta):
        self.networks, self.discriminators, self.order, self.beta = networks, discriminators, order, beta
        self.weights = [p for net in networks for p in net.parameters()]
        self.critics = [p for d in discriminators for p in d.parameters()]
        self.optimizer = torch.optim.SGD(self.weights, 0.1, 0.9, weight_decay=1e-4)
        bodies = [p for net in networks for name, p in net.named_parameters() if "linear" not in name]
        self.feature_optimizer = torch.optim.Adam(bodies, 2e-5, weight_decay=0.1)
        self.discriminator_optimizer = torch.optim.Adam(self.critics, 2e-5, weight_decay=0.1)

    def gradients(self, weights, losses):
        for p in self.weights + self.critics:
            p.grad = None
        sum(losses).backward()
        return [p.grad for p in weights]

    def move(self, optimizer, weights, gradients):
        for p in self.weights + self.critics:
            p.grad = None
        for p, g in zip(weights, gradients, strict=True):
            p.grad = g
        optimizer.step()

    def passes(self, x):
        both = [features(net, x, "stage3") for net in self.networks]
        return [logits for logits, _ in both], [maps["stage3"] for _, maps in both]

    def logit_loss(self, logits, k, y):
        target = (logits[1 - k].detach() / 3).softmax(1)
        soft = F.kl_div((logits[k] / 3).log_softmax(1), target, reduction="batchmean")
        return F.cross_entropy(logits[k], y) + 9 * soft

    def judge_loss(self, maps, k):
        real, fake = (self.discriminators[k](maps[j].detach()) for j in (1 - k, k))
        return (1 - real).square().mean() + fake.square().mean()

    def step(self, x, y):
        logits, _ = self.passes(x)
        first = self.gradients(self.weights, [self.logit_loss(logits, k, y) for k in (0, 1)])
        if self.order == "fresh":
            self.move(self.optimizer, self.weights, first)
        _, maps = self.passes(x)
        judge = self.gradients(self.critics, [self.judge_loss(maps, k) for k in (0, 1)])
        self.move(self.discriminator_optimizer, self.critics, judge)
        _, maps = self.passes(x)
        fooled = [(1 - d(m)).square().mean() for d, m in zip(self.discriminators, maps, strict=True)]
        second = self.gradients(self.weights, [self.beta * loss for loss in fooled])
        if self.order == "joint":
            second = [g if h is None else g + h for g, h in zip(first, second, strict=True)]
            return self.move(self.optimizer, self.weights, second)
        if self.order == "shared":
            self.move(self.optimizer, self.weights, first)
        self.move(self.feature_optimizer, self.weights, second)


def methods_of(name, order, dtype=torch.float32, size=32):
    "Ours, and the three passes, from the same weights."
    beta = 1e-3 if order == "joint" else 1.0
    networks = [net.to(dtype) for net in two(name, size)]
    ours = AFD(networks, batch(size, dtype)[0], order=order, beta=beta, seed=0)
    for d in ours.discriminators:
        d.to(dtype)
    return ours, ThreePasses(*copy.deepcopy((networks, ours.discriminators)), order, beta)


def check(order):
    "Both compute the same: three steps in float64, all weights."
    found = methods_of("resnet8", order, torch.float64, 16)
    for method in found:
        for _ in range(3):
            method.step(*batch(16, torch.float64))
    for mine, theirs in zip(*(m.networks + m.discriminators for m in found), strict=True):
        check_weights(mine, theirs, rtol=1e-6, atol=1e-8)


@row
def iteration():
    "AFD step, two resnet20, shared, fresh, joint, float32 and bfloat16, beside three passes."
    for order in ("shared", "fresh", "joint"):
        check(order)
        ours, peer = methods_of("resnet20", order)
        x, y = batch()
        step, plain = partial(ours.step, x, y), partial(peer.step, x, y)
        copies = [wide(net) for net in copy.deepcopy(ours.networks)]
        quick = AFD(copies, x, order=order, beta=ours.beta, seed=0)
        jobs = {"": step, "bfloat16, channels last": in_bf16(quick, wide(x), y)}
        compare(f'{WORK}, order="{order}"', jobs, {"the paper's three passes, float32": plain})


@row
def discriminators():
    "AFD step, three resnet20: a circle, one discriminator, beside all pairs."
    networks = [create_model("resnet20", seed=k) for k in range(3)]
    x, y = batch()
    every = partial(AFD(copy.deepcopy(networks), x, scheme="pairs", seed=0).step, x, y)
    choices = {"in a circle": {}, "a circle, one discriminator for all": dict(discriminator="one")}
    made = {what: AFD(copy.deepcopy(networks), x, seed=0, **choice) for what, choice in choices.items()}
    jobs = {what: partial(ours.step, x, y) for what, ours in made.items()}
    compare("`AFD.step`, three resnet20", jobs, {"all pairs": every})


@row
def parts():
    "AFD step, two resnet20, beside its parts one by one, and beside DML."
    x, y = batch()
    afd, dml = AFD(two("resnet20"), x, seed=0), DML(two("resnet20"))
    constants = [features(net, x)[1]["stage3"].detach() for net in afd.networks]

    def forward():
        return [features(net, x) for net in afd.networks]

    def judge():
        afd._discriminator_step(constants)

    def maps():  # forward and backward
        update(afd.feature_optimizer, sum(afd._feature_losses([m["stage3"] for _, m in forward()])))

    jobs = {"AFD": partial(afd.step, x, y), "DML": partial(dml.step, x, y), "forward": forward}
    times = race(jobs | {"D-step": judge, "G-step": maps})
    turns = [dict(zip(times, turn, strict=True)) for turn in zip(*times.values(), strict=True)]
    summed = [(t["DML"] + t["D-step"] + t["G-step"]) / t["AFD"] for t in turns]
    report(WORK, "its parts one by one (DML, D-step, G-step)", summed)
    report(WORK, "DML", [t["DML"] / t["AFD"] for t in turns])
    rates = {what: BATCH / statistics.median(seconds) for what, seconds in times.items()}
    say("images a second: " + ", ".join(f"{what} {rate:.0f}" for what, rate in rates.items()))


if __name__ == "__main__":
    main(__doc__)
