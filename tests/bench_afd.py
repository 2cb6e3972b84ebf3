"""How fast AFD is: `python tests/bench_afd.py [ROUNDS]`, one thread, one process, a few minutes.

The first rows time two ways to do the same work in turns and print the median ratio with its quartiles; that
both compute the same is asserted first, in float64. (Ours also computes what the log shows.) The last rows
compare different work: what discriminators cost, and an iteration beside its parts.
"""

import copy
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from bench_attacks import noise
from bench_training import begin, clock, compare, in_bf16, report, rounds_asked

from kdnb.afd import AFD, DML
from kdnb.learning import update
from kdnb.models import create_model, features

BATCH = 64


def two(name, size=32):
    return [create_model(name, image_size=size, seed=k) for k in (0, 1)]


def batch(size=32, dtype=torch.float32):
    y = torch.randint(10, (BATCH,), generator=torch.Generator().manual_seed(2))
    return noise(BATCH, size).to(dtype), y


class ThreePasses:
    """The paper's losses as they read: a pass over the batch for each of the three.

    As it reads: a network's losses are taken back through all they were computed from, then all gradients but
    its own are dropped. Careful: peers are constants, and the losses of both networks go back together.
    """

    def __init__(self, networks, discriminators, order, beta, careful=False):
        self.networks, self.discriminators, self.order, self.beta = networks, discriminators, order, beta
        self.careful = careful
        self.weights = [list(net.parameters()) for net in networks]
        self.critics = [list(d.parameters()) for d in discriminators]
        self.optimizer = torch.optim.SGD(sum(self.weights, []), 0.1, 0.9, weight_decay=1e-4, fused=True)
        bodies = [p for net in networks for name, p in net.named_parameters() if "linear" not in name]
        self.feature_optimizer = torch.optim.Adam(bodies, 2e-5, weight_decay=0.1, fused=True)
        self.discriminator_optimizer = torch.optim.Adam(
            sum(self.critics, []), 2e-5, weight_decay=0.1, fused=True
        )

    def forget(self):
        for p in sum(self.weights + self.critics, []):
            p.grad = None

    def gradients(self, owners, losses):
        "Of each loss for the weights of its owner: a list, weight by weight."
        self.forget()
        if self.careful:
            sum(losses).backward()
            return [p.grad for weights in owners for p in weights]
        found = []
        for weights, loss in zip(owners, losses, strict=True):
            loss.backward(retain_graph=True)
            found += [p.grad for p in weights]
            self.forget()
        return found

    def move(self, optimizer, owners, gradients):
        self.forget()
        for p, g in zip(sum(owners, []), gradients, strict=True):
            p.grad = g
        optimizer.step()

    def passes(self, x):
        both = [features(net, x, "stage3") for net in self.networks]
        return [logits for logits, _ in both], [maps["stage3"] for _, maps in both]

    def constant(self, v):
        return v.detach() if self.careful else v

    def logit_loss(self, logits, k, y):
        target = (self.constant(logits[1 - k]) / 3).softmax(1)
        soft = F.kl_div((logits[k] / 3).log_softmax(1), target, reduction="batchmean")
        return F.cross_entropy(logits[k], y) + 9 * soft

    def judge_loss(self, maps, k):
        d = self.discriminators[k]
        real, fake = d(self.constant(maps[1 - k])), d(self.constant(maps[k]))
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
    "Ours; as it reads; careful."
    beta = 1e-3 if order == "joint" else 1.0
    networks = [net.to(dtype) for net in two(name, size)]
    ours = AFD(networks, batch(size, dtype)[0], order=order, beta=beta, seed=0)
    for d in ours.discriminators:
        d.to(dtype)
    parts = networks, ours.discriminators
    return ours, *(ThreePasses(*copy.deepcopy(parts), order, beta, careful) for careful in (False, True))


def check(order):
    "All compute the same: three steps in float64, all weights."
    found = methods_of("resnet8", order, torch.float64, 16)
    for method in found:
        for _ in range(3):
            method.step(*batch(16, torch.float64))
    modules = [m.networks + m.discriminators for m in found]
    for ours, *peers in zip(*[[p for m in part for p in m.parameters()] for part in modules], strict=True):
        for peer in peers:
            torch.testing.assert_close(ours, peer, rtol=1e-6, atol=1e-8)


def bench_iteration(rounds, name, order, target=""):
    check(order)
    ours, peer, careful = methods_of(name, order)
    x, y = batch()
    step, plain = partial(ours.step, x, y), partial(peer.step, x, y)
    compare(f"AFD iteration, {order} / three passes", step, plain, rounds, target=target)
    compare("the same / three careful passes", step, partial(careful.step, x, y), rounds)
    quick = copy.deepcopy(ours.networks)
    for net in quick:
        net.to(memory_format=torch.channels_last)
    quick = AFD(quick, x, order=order, beta=ours.beta, seed=0)
    wide = x.contiguous(memory_format=torch.channels_last)
    compare("bfloat16, channels last / ours in float32", in_bf16(quick, wide, y), step, rounds)


def bench_discriminators(rounds, name):
    "What the discriminators cost: three networks, in a circle and one discriminator against all pairs."
    networks = [create_model(name, seed=k) for k in range(3)]
    x, y = batch()
    every = partial(AFD(copy.deepcopy(networks), x, scheme="pairs", seed=0).step, x, y)
    for what, choices in {"a circle": {}, "one discriminator": dict(discriminator="one")}.items():
        ours = AFD(copy.deepcopy(networks), x, seed=0, **choices)
        compare(f"3 x {name}: {what} / all pairs", partial(ours.step, x, y), every, rounds)


def bench_parts(rounds, name):
    "One AFD iteration beside its parts, each run by itself, and beside DML: images a second."
    x, y = batch()
    afd, dml = AFD(two(name), x, seed=0), DML(two(name))
    constants = [features(net, x)[1]["stage3"].detach() for net in afd.networks]

    def forward():
        return [features(net, x) for net in afd.networks]

    def logits():  # forward and backward
        dml.step(x, y)

    def judge():
        afd._discriminator_step(constants)

    def maps():  # forward and backward
        update(afd.feature_optimizer, sum(afd._feature_losses([m["stage3"] for _, m in forward()])))

    jobs = {"AFD": lambda: afd.step(x, y), "DML": logits, "forward": forward, "D-step": judge, "G-step": maps}
    for job in jobs.values():
        job()
    turns = [{what: clock(job) for what, job in jobs.items()} for _ in range(rounds)]
    for turn in turns:
        turn["sum"] = turn["DML"] + turn["D-step"] + turn["G-step"]
    report("shared / its parts (DML, D-, G-step) one by one", [t["sum"] / t["AFD"] for t in turns], ">= 1")
    report("shared / DML", [t["DML"] / t["AFD"] for t in turns])
    rates = {what: BATCH / statistics.median(t[what] for t in turns) for what in turns[0]}
    print("images a second:", ", ".join(f"{what} {rate:.0f}" for what, rate in rates.items()))


if __name__ == "__main__":
    begin()
    rounds = rounds_asked()
    print("2 x resnet20, 64 images of 32 x 32")
    bench_iteration(rounds, "resnet20", "shared", target=">= 2.5")
    bench_iteration(rounds, "resnet20", "fresh")
    bench_iteration(rounds, "resnet20", "joint", target=">= 4")
    bench_discriminators(rounds, "resnet20")
    bench_parts(rounds, "resnet20")
