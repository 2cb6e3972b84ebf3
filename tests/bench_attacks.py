"""How fast attacks are, beside torchattacks, pyautoattack and the published steps of ARD and RSLAD.

`python tests/bench_attacks.py [-k WORDS] [--rounds N] [--markdown]`; see stopwatch.py.

Evaluations attack briefly trained networks on handwritten digits, with eps so chosen that a third of the
images survives; where nothing may fall early, weights are random and images are noise. Both sides reach the
same verdicts (folding batch norm changes last bits: 1 % may differ). Needs kdnb[eval], torchattacks==3.5.1.
"""

import copy
from functools import cache, partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchattacks
from pyautoattack import AutoAttack
from stopwatch import bare, check_weights, compare, in_bf16, main, network, noise, row, wide

from kdnb import evaluation
from kdnb.ard import ARD
from kdnb.attacks import pgd
from kdnb.data import Batches, Images, load_data
from kdnb.evaluation import autoattack, still_right
from kdnb.models import create_model, fold_batchnorm
from kdnb.training import Supervised, fit

# ---- networks that learned digits


def enlarged(part, size):
    "Digits as size x size RGB."
    images = getattr(load_data("digits"), part)
    x = F.interpolate(images.x.float(), size).round().byte().repeat(1, 3, 1, 1)
    return Images(x, images.y, images.classes)


@cache
def task(name, n, size, epochs=3):
    "A network that learned digits; n test images, its own answers; the eps that leaves a third under PGD-10."
    model = create_model(name, seed=0)
    fit(Supervised(model, lr=0.05), Batches(enlarged("train", size), 128), epochs=epochs, progress="off")
    test = enlarged("test", size)
    x = test.x[:n].float() / 255
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    images = Images(test.x[:n], y, test.classes)
    return model, images, x, y, radius(model, images)


def radius(model, images, share=1 / 3):
    "By bisection."
    low, high = 0.0, 0.3
    for _ in range(10):
        eps = (low + high) / 2
        left = still_right(model, images, partial(pgd, eps=eps, steps=10, early_stop=True)).double().mean()
        low, high = (eps, high) if left > share else (low, eps)
    return eps


def check_same(verdicts):
    "Ours and each peer's, and how it is said."
    ours = verdicts["ours"]
    for theirs in verdicts.values():
        assert (ours != theirs).double().mean() <= 0.01, verdicts
    differ = sum((ours != v).sum().item() for v in verdicts.values())
    return f"{ours.sum()} of {len(ours)} survive, {differ} verdicts differ"


# ---- PGD: an evaluation, and the bare loop


def evaluation_row(name, n, size):
    model, images, x, y, eps = task(name, n, size)
    verdicts, plain = {}, bare(model)
    attack = partial(pgd, eps=eps, step_size=eps / 4, steps=20, early_stop=True)
    theirs = torchattacks.PGD(plain, eps=eps, alpha=eps / 4, steps=20)

    def ours(precision="fp32"):
        verdicts["ours"] = still_right(model, images, attack, batch_size=n, seed=0, precision=precision)

    def peer():
        torch.manual_seed(0)
        x_adv = theirs(x, y)
        with torch.no_grad():
            verdicts["peer"] = plain(x_adv).argmax(1) == y

    ours()
    peer()
    note = check_same(verdicts)
    peers = {"torchattacks' PGD": peer}
    variants = {"": ours, "bf16 first": partial(ours, "bf16")}
    compare(f"PGD-20 evaluation, {name}, {size} px", variants, peers, note, warm=True)


@row
def pgd_evaluation():
    "PGD-20 evaluation, resnet8, resnet20, resnet18, beside torchattacks."
    evaluation_row("resnet8", 256, 32)
    evaluation_row("resnet20", 256, 32)
    evaluation_row("resnet18", 64, 16)


@row
def pgd_training():
    "PGD-10, nothing falls, resnet20, resnet18, mobilenet_v2, float32 and bfloat16, beside torchattacks."
    for name, n in (("resnet20", 64), ("resnet18", 32), ("mobilenet_v2", 32)):
        model, x = network(name), noise(n, 32)
        plain = bare(model)
        y = model(x).argmax(1)
        folded = wide(fold_batchnorm(model))
        start = wide((x + torch.empty_like(x).uniform_(-8 / 255, 8 / 255)).clamp(0, 1))
        attack = partial(pgd, folded, wide(x), y, eps=8 / 255, step_size=2 / 255, steps=10, start=start)
        peer = partial(torchattacks.PGD(plain, eps=8 / 255, alpha=2 / 255, steps=10), x, y)

        def brief(attack=attack):
            with torch.autocast("cpu", torch.bfloat16):
                return attack()

        def loss(x_adv, plain=plain, y=y):
            with torch.no_grad():
                return F.cross_entropy(plain(x_adv), y).item()

        torch.manual_seed(0)
        wanted = loss(peer())
        for job in (attack, brief):
            assert abs(loss(job()) / wanted - 1) < 0.05, (name, loss(job()), wanted)
        jobs = {"": attack, "bfloat16": brief} if name != "mobilenet_v2" else {"": attack}
        compare(f"PGD-10, nothing falls, {name}", jobs, {"torchattacks' PGD, float32": peer})


# ---- AutoAttack


def theirs_autoattack(model, x, y, eps, tier):
    suite = AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=0, device=torch.device("cpu"))
    if tier == "lite":
        suite.attacks_to_run, suite.apgd_targeted.n_target_classes = ["apgd-ce", "apgd-t"], 3
    if tier == "apgd-ce":
        suite.attacks_to_run = ["apgd-ce"]
    return suite.run_standard_evaluation(x, y, batch_size=len(x))[0]


def torchattacks_autoattack(model, x, y, eps, tier):
    "torchattacks' own AutoAttack gives FAB a tenth of the iterations; here it gets all hundred."
    attacks = [
        torchattacks.APGD(model, eps=eps, steps=100, loss="ce", seed=0),
        torchattacks.APGDT(model, eps=eps, steps=100, n_classes=10, seed=0),
        torchattacks.FAB(model, eps=eps, steps=100, multi_targeted=True, n_classes=10, seed=0),
        torchattacks.Square(model, eps=eps, n_queries=5000, seed=0),
    ]
    return torchattacks.MultiAttack(attacks)(x, y)


def autoattack_row(what, name, n, size, tier):
    model, images, x, y, eps = task(name, n, size)
    verdicts, plain = {}, bare(model)
    tiers = evaluation._TIERS | {"apgd-ce": (("apgd-ce",), 9)}

    def ours():
        with patch.dict(evaluation._TIERS, tiers):
            verdicts["ours"] = autoattack(model, images, eps=eps, tier=tier, batch_size=n).robust

    def peer(attack, key):
        x_adv = attack(plain, x.clone(), y, eps, tier)
        with torch.no_grad():
            verdicts[key] = plain(x_adv).argmax(1) == y

    peers = {"pyautoattack": partial(peer, theirs_autoattack, "pyautoattack")}
    if tier == "standard":
        job = partial(peer, torchattacks_autoattack, "torchattacks")
        peers["torchattacks, its FAB at a hundred iterations"] = job
    for job in (ours, peers["pyautoattack"]):
        job()
    compare(f"{what}, {name}, {size} px", {"": ours}, peers, check_same(verdicts), warm=True)


@row
def apgd():
    "APGD-CE, 100 iterations, resnet8, beside pyautoattack."
    autoattack_row("APGD-CE, 100 iterations", "resnet8", 64, 32, "apgd-ce")


@row
def autoattack_lite():
    "AutoAttack lite, resnet20 and resnet18, beside pyautoattack."
    autoattack_row("AutoAttack lite", "resnet20", 32, 32, "lite")
    autoattack_row("AutoAttack lite", "resnet18", 16, 16, "lite")


@row
def autoattack_standard():
    "AutoAttack standard, resnet20, beside pyautoattack and torchattacks."
    autoattack_row("AutoAttack standard", "resnet20", 8, 16, "standard")


# ---- training steps with an attack inside


class Step:
    def __init__(self, student, teacher):
        self.student, self.teacher = student.train(), teacher.eval()
        self.optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=2e-4)


class OfficialARD(Step):
    "main.py: train mode, the attack takes pixel gradients alone; the clean loss weighs 0, and goes back too."

    def step(self, x, y):
        self.teacher.requires_grad_(False)
        self.optimizer.zero_grad()
        x_adv = x.detach() + torch.zeros_like(x).uniform_(-8 / 255, 8 / 255)
        for _ in range(10):
            x_adv.requires_grad_()
            loss = F.cross_entropy(self.student(x_adv), y, reduction="sum")
            (slope,) = torch.autograd.grad(loss, [x_adv])
            x_adv = x_adv.detach() + 2 / 255 * slope.detach().sign()
            x_adv = torch.min(torch.max(x_adv, x - 8 / 255), x + 8 / 255).clamp(0, 1)
        answers, teacher, clean = self.student(x_adv), self.teacher(x), self.student(x)
        soft = torch.nn.KLDivLoss()(F.log_softmax(answers / 30, 1), F.softmax(teacher / 30, 1))
        loss = 1.0 * 30 * 30 * soft + (1 - 1.0) * F.cross_entropy(clean, y)
        loss.backward()
        self.optimizer.step()
        return loss.item()


class OfficialRSLAD(Step):
    "resnet18_rslad_cifar10.py, rslad_loss.py: eval mode inside, KLs to the teacher's clean answer."

    def step(self, x, y):
        self.student.train()
        self.optimizer.zero_grad()
        with torch.no_grad():
            teacher = self.teacher(x)
        self.student.eval()
        x_adv = x.detach() + 0.001 * torch.randn(x.shape, dtype=x.dtype)
        for _ in range(10):
            x_adv.requires_grad_()
            terms = F.kl_div(self.student(x_adv).log_softmax(1), teacher.softmax(1), reduction="none")
            (slope,) = torch.autograd.grad(terms.sum(), [x_adv])
            x_adv = x_adv.detach() + 2 / 255 * slope.detach().sign()
            x_adv = torch.min(torch.max(x_adv, x - 8 / 255), x + 8 / 255).clamp(0, 1)
        self.student.train()
        x_adv = x_adv.clamp(0, 1)
        self.optimizer.zero_grad()
        answers = self.student(x_adv)
        self.student.train()
        clean, target = self.student(x), teacher.softmax(1)
        apart = [-z.log_softmax(1) * target + torch.log(target + 1e-5) * target for z in (answers, clean)]
        loss = 5 / 6 * apart[0].mean() + 1 / 6 * apart[1].mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def attack_step_rows(work, peer, variants):
    "Each variant (what: settings of ARD, whether it is the peer's rule): weights first, then the clock."
    student, teacher = network("resnet8"), network("resnet20")
    x = 0.05 + 0.9 * noise(128, 32)  # no start is cut
    y = torch.randint(0, 10, (128,), generator=torch.Generator().manual_seed(0))

    def parts(kind=torch.float32):
        return copy.deepcopy(student).to(kind), copy.deepcopy(teacher).to(kind)

    def steps(method):
        torch.manual_seed(0)
        for _ in range(2):
            method.step(x[:16].double(), y[:16])
        return method.student

    exact = steps(peer(*(bare(net) for net in parts(torch.float64))))
    jobs = {}
    for what, (settings, same) in variants.items():
        if same:
            check_weights(steps(ARD(*parts(torch.float64), **settings)), exact, rtol=1e-6, atol=1e-8)
        for bf16 in (False, True):
            method = ARD(*parts(), **settings)
            wide(method.student)
            wide(method.teacher)
            job = in_bf16(method, wide(x), y) if bf16 else partial(method.step, wide(x), y)
            jobs[", ".join(filter(None, (what, "bfloat16" * bf16)))] = job
    theirs = partial(peer(*(bare(net) for net in parts())).step, x, y)
    compare(work, jobs, {"the published step, float32": theirs})


@row
def ard():
    "ARD step, resnet20 teaches resnet8, official variant; the paper's, folded; beside the published step."
    variants = {
        "official variant": (dict(variant="official"), True),
        "the paper's, folded": (dict(fold=True), False),
    }
    attack_step_rows("`ARD.step`, resnet8, batch 128", OfficialARD, variants)


@row
def rslad():
    "RSLAD step, resnet20 teaches resnet8, folded and not, beside the published step."
    attack = partial(pgd, eps=8 / 255, step_size=2 / 255, steps=10, start="gaussian")
    rule = dict(inner="teacher", clean_target="teacher", temperature=1.0, alpha=5 / 6, reduction="mean")
    variants = {what: (rule | dict(attack=attack, fold=bool(what)), True) for what in ("", "folded")}
    attack_step_rows("RSLAD step, resnet8, batch 128", OfficialRSLAD, variants)


if __name__ == "__main__":
    main(__doc__)
