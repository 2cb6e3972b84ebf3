"""How fast attacks are: `python tests/bench_attacks.py [--quick] [ROUNDS]`, one thread, one process.

Each row times two ways to do the same work in turns and prints the median ratio with its quartiles; that both
reach the same verdicts is asserted first (folding batch norm changes last bits: 1 % may differ). Evaluations
attack briefly trained networks on handwritten digits, with eps so chosen that a third of them survives; where
nothing may fall early, weights are random and images are noise. Needs kdnb[eval] and torchattacks==3.5.1.
"""

import argparse
import copy
from functools import partial

import torch
import torch.nn.functional as F
import torchattacks
from bench_training import begin, clock, compare, report
from pyautoattack import AutoAttack
from torch import nn

from kdnb.ard import ARD
from kdnb.attacks import pgd
from kdnb.data import Batches, Images, load_data
from kdnb.evaluation import autoattack, still_right
from kdnb.models import create_model, fold_batchnorm
from kdnb.training import Supervised, fit


def noise(n, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    colour, grain = (torch.rand(n, 3, s, s, generator=g) for s in (1, size))
    return ((0.6 * colour + 0.4 * grain) * 255).round() / 255


def network(name, size):
    "Random weights, shaken statistics, and yet every class is somebody's answer."
    model, g = create_model(name, seed=0).eval(), torch.Generator().manual_seed(1)
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


def task(name, n, size, epochs=3):
    "A network that learned digits, enlarged to size x size; n test images and its own answers."
    digits, larger = load_data("digits"), {}
    for part in ("train", "test"):
        images = getattr(digits, part)
        x = F.interpolate(images.x.float(), size).round().byte().repeat(1, 3, 1, 1)
        larger[part] = Images(x, images.y, images.classes)
    model = create_model(name, seed=0)
    fit(Supervised(model, lr=0.05), Batches(larger["train"], 128), epochs=epochs, progress="off")
    x = larger["test"].x[:n].float() / 255
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    return model, Images(larger["test"].x[:n], y, digits.test.classes), x, y


def radius(model, images, share=1 / 3):
    "The eps that leaves this share of the images under PGD-10, by bisection."
    low, high = 0.0, 0.3
    for _ in range(10):
        eps = (low + high) / 2
        left = still_right(model, images, partial(pgd, eps=eps, steps=10, early_stop=True)).double().mean()
        low, high = (eps, high) if left > share else (low, eps)
    return eps


def check_same(ours, peer):
    assert (ours != peer).double().mean() <= 0.01, (ours, peer)


# ---- PGD: an evaluation, and the bare loop


def bench_evaluation(name, n, size, rounds, target="", precision="fp32"):
    model, images, x, y = task(name, n, size)
    eps, verdicts = radius(model, images), {}
    attack = partial(pgd, eps=eps, step_size=eps / 4, steps=20, early_stop=True)
    theirs = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=20)

    def ours():
        verdicts["ours"] = still_right(model, images, attack, batch_size=n, seed=0, precision=precision)

    def peer():
        torch.manual_seed(0)
        x_adv = theirs(x, y)
        with torch.no_grad():
            verdicts["peer"] = model(x_adv).argmax(1) == y

    ours(), peer()
    check_same(verdicts["ours"], verdicts["peer"])
    left = verdicts["ours"].sum().item()
    what = f"PGD-20, {name}, {size} px, {left} of {n} survive{', bf16 first' * (precision == 'bf16')}"
    compare(what, ours, peer, rounds, target=target)


def bench_bare(name, n, rounds, precision=None, target=""):
    "Nothing falls, or may stop early: what a training attack does."
    model, x = network(name, 32), noise(n, 32)
    y = model(x).argmax(1)
    folded = fold_batchnorm(model).to(memory_format=torch.channels_last)
    start = (x + torch.empty_like(x).uniform_(-8 / 255, 8 / 255)).clamp(0, 1)
    wide = start.contiguous(memory_format=torch.channels_last)
    attack = partial(pgd, eps=8 / 255, step_size=2 / 255, steps=10, start=wide)
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)

    def ours():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return attack(folded, x, y)

    def peer():
        return theirs(x, y)

    def loss(x_adv):
        with torch.no_grad():
            return F.cross_entropy(model(x_adv), y).item()

    torch.manual_seed(0)
    a, b = loss(ours()), loss(peer())
    assert abs(a / b - 1) < 0.05, (a, b)
    compare(f"PGD-10, {name}, {precision or 'fp32'}", ours, peer, rounds, target=target)


# ---- AutoAttack


def theirs_autoattack(model, x, y, eps, tier):
    suite = AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=0, device=torch.device("cpu"))
    if tier == "lite":
        suite.attacks_to_run, suite.apgd_targeted.n_target_classes = ["apgd-ce", "apgd-t"], 3
    return suite.run_standard_evaluation(x, y, batch_size=len(x))[0]


def torchattacks_autoattack(model, x, y, eps, tier):
    "torchattacks' own AutoAttack gives FAB a tenth of the iterations; here it gets all hundred."
    classes = 10 if tier == "standard" else 4
    attacks = [
        torchattacks.APGD(model, eps=eps, steps=100, loss="ce", seed=0),
        torchattacks.APGDT(model, eps=eps, steps=100, n_classes=classes, seed=0),
    ]
    if tier == "standard":
        fab = torchattacks.FAB(model, eps=eps, steps=100, multi_targeted=True, n_classes=10, seed=0)
        attacks += [fab, torchattacks.Square(model, eps=eps, n_queries=5000, seed=0)]
    return torchattacks.MultiAttack(attacks)(x, y)


def bench_autoattack(name, n, size, tier, rounds, target=""):
    model, images, x, y = task(name, n, size)
    eps, verdicts = radius(model, images), {}

    def ours():
        verdicts["ours"] = autoattack(model, images, eps=eps, tier=tier, batch_size=n).robust

    def peer(attack, key):
        x_adv = attack(model, x.clone(), y, eps, tier)
        with torch.no_grad():
            verdicts[key] = model(x_adv).argmax(1) == y

    peers = {"pyautoattack": theirs_autoattack, "torchattacks": torchattacks_autoattack}
    times = {key: [] for key in ("ours", *peers)}
    for _ in range(rounds):
        times["ours"].append(clock(ours))
        for key, attack in peers.items():
            times[key].append(clock(partial(peer, attack, key)))
    check_same(verdicts["ours"], verdicts["pyautoattack"])
    for key in peers:
        ratios = [a / b for a, b in zip(times[key], times["ours"], strict=True)]
        differ = (verdicts[key] != verdicts["ours"]).sum().item()
        what = f"AutoAttack {tier}, {name}, {size} px / {key}"
        more = f"   ({verdicts['ours'].sum()} of {n} survive, {differ} verdicts differ)"
        report(what, ratios * (2 if rounds == 1 else 1), target, more=more)


# ---- ARD: a training step


class OfficialStep:
    "ARD's published step: train mode, two answers of the student, the attack takes pixel gradients alone."

    def __init__(self, student, teacher):
        self.student, self.teacher = student.train(), teacher.eval().requires_grad_(False)
        self.optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=2e-4)

    def step(self, x, y):
        x_adv = (x + torch.empty_like(x).uniform_(-8 / 255, 8 / 255)).clamp(0, 1)
        for _ in range(10):
            x_adv.requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(self.student(x_adv), y), [x_adv])
            moved = x_adv.detach() + 2 / 255 * slope.sign()
            x_adv = torch.min(torch.max(moved, x - 8 / 255), x + 8 / 255).clamp(0, 1)
        self.optimizer.zero_grad()
        answers, teacher, clean = self.student(x_adv), self.teacher(x), self.student(x)
        soft = nn.KLDivLoss()(F.log_softmax(answers / 30, 1), F.softmax(teacher / 30, 1))
        loss = 900 * soft + 0.0 * F.cross_entropy(clean, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def bench_ard(rounds):
    student, teacher = create_model("resnet8", seed=0), network("resnet20", 32)
    x, y = noise(128, 32), torch.randint(0, 10, (128,), generator=torch.Generator().manual_seed(0))
    make = partial(copy.deepcopy, student)
    peer = OfficialStep(make(), copy.deepcopy(teacher))
    same = ARD(make(), copy.deepcopy(teacher), variant="official")
    paper = ARD(make(), copy.deepcopy(teacher), fold=True)
    torch.manual_seed(0)
    loss = same.step(x, y)["loss"]
    torch.manual_seed(0)
    torch.testing.assert_close(loss, peer.step(x, y), rtol=1e-3, atol=0)
    for what, method in (("the same", same), ("variant 'paper', folded", paper)):
        method.student.to(memory_format=torch.channels_last)
        wide = x.contiguous(memory_format=torch.channels_last)
        target = ">= 2.4" if method is paper else ""
        compare(
            f"ARD step, resnet8, {what}",
            partial(method.step, wide, y),
            partial(peer.step, x, y),
            rounds,
            target=target,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small networks, one round: does it run?")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    begin()
    if args.quick:
        bench_evaluation("resnet8", 32, 16, rounds)
        bench_autoattack("resnet8", 8, 16, "lite", rounds)
        bench_ard(rounds)
    else:
        bench_evaluation("resnet8", 256, 32, rounds, ">= 4.5")
        bench_evaluation("resnet8", 256, 32, rounds, precision="bf16")
        bench_evaluation("resnet20", 256, 32, rounds)
        bench_evaluation("resnet18", 64, 16, rounds)
        bench_bare("resnet20", 64, rounds)
        bench_bare("resnet18", 32, rounds)
        bench_bare("resnet18", 32, rounds, "bf16", ">= 2.1")
        bench_bare("mobilenet_v2", 32, rounds, target=">= 2")
        bench_ard(2 * rounds)
        bench_autoattack("resnet20", 64, 32, "lite", 2)
        bench_autoattack("resnet18", 16, 16, "lite", 2)
        bench_autoattack("resnet20", 16, 16, "standard", 1)
