"""How fast BSS is, beside the published attack and training step, and a plain loop.

`python tests/bench_bss.py [-k WORDS] [--rounds N] [--markdown]`; see stopwatch.py.

What a walk costs depends on how many steps it takes, so the rows say it. Teachers have random weights; their
logits are scaled until a walk takes about as many steps as with the published teacher (92.6 % on CIFAR-10:
1.1 steps) and with a weak one (9).
"""

import copy
from functools import cache, partial

import torch
import torch.nn.functional as F
from stopwatch import bare, check_weights, compare, in_bf16, main, network, noise, normalised, row, wide

from kdnb.bss import BSS, bss_attack, bss_weights, sample_target
from kdnb.models import Normalize, fold_batchnorm
from kdnb.training import Supervised

STEPS = 10


def limits(model):
    "Where the published code cuts pixels."
    mean, std = Normalize.of(model)
    return dict(low=mean - 2.5 * std, high=mean + 2.5 * std)


@cache
def teacher(steps):
    "resnet26, its logits scaled until the paper's walk takes so many steps."
    x, low, high = wide(noise(32, 32)), 0.05, 20.0
    for _ in range(8):
        scale = (low * high) ** 0.5
        model = network("resnet26", normalised=True)
        with torch.no_grad():
            model.linear.weight.mul_(scale)
            model.linear.bias.mul_(scale)
            logits = model(x)
        quick = wide(fold_batchnorm(model))
        walk = bss_attack(quick, x, logits.argmax(1), drawn(logits), steps=STEPS, **limits(model))
        low, high = (scale, high) if walk.iterations.float().mean() > steps else (low, scale)
    return model


def drawn(logits):
    return sample_target(logits, logits.argmax(1), generator=torch.Generator().manual_seed(0))


# ---- attack_BSS.py, and a plain loop


def published_attack(model, x, target):
    "In normalised pixels; each step goes back into all, the teacher's weights too, until everybody has left."
    x_adv = x.clone().requires_grad_()
    for step in range(STEPS):
        x_adv.grad = None
        scores = model(x_adv)
        if not step:
            base = scores.detach().max(1)[1]
        height = scores.gather(1, base[:, None]) - scores.gather(1, target[:, None])
        (-height).sum().backward()
        moving = 0.3 * (base == scores.detach().max(1)[1]).float()[:, None, None, None]
        if moving.sum() == 0:
            break
        length = x_adv.grad.flatten(1).norm(dim=1)[:, None, None, None]
        shift = moving * (height.detach()[:, :, None, None] + 1e-4) * x_adv.grad / length
        moved = x + (x_adv.detach() + shift - x)
        x_adv = moved.clamp(-2.5, 2.5).requires_grad_()
    return x_adv.detach()


def plain_loop(model, x, base, target, rule):
    "The same with the gradient of the pixels alone; whoever has arrived is masked, not left out."
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        scores = model(x)
        moving = scores.argmax(1) == base
        if not moving.any():
            break
        height = (scores.gather(1, base[:, None]) - scores.gather(1, target[:, None]))[:, 0]
        (slope,) = torch.autograd.grad(height.sum(), x)
        length = slope.flatten(1).norm(dim=1) ** (2 if rule == "boundary" else 1)
        size = moving * (1.02 if rule == "boundary" else 0.3) * (height.detach() + 1e-4) / length
        x = (x.detach() - size.view(-1, 1, 1, 1) * slope).clamp(-2.5, 2.5)
    return x.detach()


def attack_rows(model, what, rule):
    x = noise(64, 32)
    with torch.no_grad():
        logits = model(x)
    base, target = logits.argmax(1), drawn(logits)
    rest = dict(rule=rule, steps=STEPS)

    def peers_on(plain, there, n):
        peers = {"a plain loop, float32": partial(plain_loop, plain, there[:n], base[:n], target[:n], rule)}
        if rule == "boundary":
            return peers
        published = partial(published_attack, plain, there[:n], target[:n])
        return {"the published attack, float32": published} | peers

    double = copy.deepcopy(model).double()
    exact = bss_attack(double, x[:6].double(), base[:6], target[:6], **rest, **limits(double)).x
    for peer in peers_on(bare(double), normalised(double, x.double()), 6).values():
        torch.testing.assert_close(normalised(double, exact), peer(), rtol=1e-6, atol=1e-6)
    peers = peers_on(bare(model), normalised(model, x), 64)
    ours = partial(bss_attack, wide(fold_batchnorm(model)), wide(x), base, target, **rest, **limits(model))

    def brief():
        with torch.autocast("cpu", torch.bfloat16):
            return ours()

    there, found = normalised(model, x), ours()
    wanted, steps = peers["a plain loop, float32"]() - there, found.iterations.float().mean()
    off = (normalised(model, found.x) - there - wanted).flatten(1).norm(dim=1)
    near = off <= 0.02 * wanted.flatten(1).norm(dim=1) + 1e-3
    assert near.float().mean() >= 0.9, off  # in float32 rounding may add a step
    assert (brief().success.float().mean() - found.success.float().mean()).abs() <= 0.2
    note = f"{steps:.1f} steps a walk"
    jobs = {"": ours, "bfloat16": brief}
    compare(f"BSS attack, {rule} rule, 64 images, resnet26, {what}", jobs, peers, note)


SURE, WEAK = "a sure teacher", "a weak teacher"


@row
def attack():
    "BSS attack, paper's rule, sure and weak teacher, beside the published attack and a plain loop."
    attack_rows(teacher(1.1), SURE, "paper")
    attack_rows(teacher(9), WEAK, "paper")


@row
def boundary():
    "BSS attack that lands on the boundary, beside a plain loop."
    attack_rows(teacher(1.1), SURE, "boundary")


# ---- train_BSS_distillation.py


def published_targets(logits, rows, sampled=True):
    "Sorted and summed up at once, then compared one by one, with a look at the device for each."
    chosen = logits.sort(dim=1, descending=True)[1][:, 1][rows].detach()
    scores, classes = F.softmax(logits, 1)[rows].detach().sort(dim=1, descending=True)
    scores, classes = scores[:, 1:], classes[:, 1:]
    if not sampled:
        return chosen
    seed = (scores.sum(dim=1) * torch.rand(len(rows))).unsqueeze(1)
    summed = scores.cumsum(dim=1)
    for k in range(len(rows)):
        for c in range(summed.shape[1]):
            if (summed[k, c] >= seed[k]).cpu().numpy():
                chosen[k] = classes[k, c]
                break
    return chosen


class PublishedStep:
    "Epoch 1 of 80; the teacher answers with a graph that only the attack uses."

    def __init__(self, student, teacher, lr, sampled=True):
        self.student, self.teacher, self.sampled = student.train(), teacher.eval(), sampled
        self.optimizer = torch.optim.SGD(student.parameters(), lr, 0.9, weight_decay=1e-4)
        self.alpha, self.beta = bss_weights(1, 80)
        self.total = self.correct = self.loss = 0

    def step(self, x, y):
        self.optimizer.zero_grad()
        logits = self.student(x)
        loss = F.cross_entropy(logits, y)
        answers = self.teacher(x)
        loss = loss + self.alpha * self.apart(logits, answers)
        right = [z.sort(dim=1, descending=True)[1][:, 0] == y for z in (answers, logits)]
        both = right[0] & right[1]
        if both.sum():
            rows = both.nonzero().squeeze(1)
            if len(rows) > 64:
                gap = (F.softmax(answers[rows], 1).detach() - F.softmax(logits[rows], 1).detach()) ** 2
                gap = gap.sum(dim=1) - gap.gather(1, y[rows].unsqueeze(1)).squeeze()
                rows = rows[gap.sort(descending=True)[1][:64]]
            target = published_targets(answers, rows, self.sampled)
            x_adv = published_attack(self.teacher, x[rows], target)
            theirs = self.teacher(x_adv)
            loss = loss + self.beta * self.apart(self.student(x_adv), theirs)
        loss.backward()
        self.optimizer.step()
        self.loss += loss.item()
        self.correct += logits.detach().max(1)[1].eq(y).cpu().float().sum()
        self.total += len(y)
        return loss.detach()

    @staticmethod
    def apart(logits, answers):
        soft = F.softmax(answers / 3, 1).detach() * F.log_softmax(logits / 3, 1)
        return -soft.sum() / len(logits)


@row
def step():
    "BSS step, resnet26 teaches resnet8, sure and weak teacher, beside the published step."
    for steps, what in ((1.1, SURE), (9, WEAK)):
        model, x = teacher(steps), noise(256, 32)
        with torch.no_grad():
            y = model(x).argmax(1)
        pupil = network("resnet8", normalised=True)
        lesson = Supervised(pupil, lr=0.05)  # until both are right on 64 of 256
        for _ in range(25):
            lesson.step(x, y)
        made = lambda kind=torch.float32, m=model, s=pupil: [copy.deepcopy(n).to(kind) for n in (s, m)]  # noqa: E731
        rest, slow = dict(epochs=80, variant="official"), dict(lr=1e-6)  # so that rounds are alike

        mine = BSS(*made(torch.float64), **rest, target="likeliest", lr=0.01)
        theirs = PublishedStep(*map(bare, made(torch.float64)), lr=0.01, sampled=False)
        mine.step(x[:16].double(), y[:16])
        theirs.step(normalised(mine.student, x[:16].double()), y[:16])
        check_weights(mine.student, theirs.student, rtol=1e-6, atol=1e-7)

        sides = [BSS(*made(), **rest, **slow) for _ in range(2)]
        for side in sides:
            wide(side.student)
            wide(side.teacher)
        found = []
        walk = sides[0].attack
        sides[0].attack = lambda *a, walk=walk, found=found: found.append(walk(*a)) or found[-1]
        sides[0].step(x, y)
        sides[0].attack = walk
        taken = found[0].iterations.float()
        jobs = {"": partial(sides[0].step, wide(x), y), "bfloat16": in_bf16(sides[1], wide(x), y)}
        peer = PublishedStep(*map(bare, made()), **slow)
        peers = {"the published step, float32": partial(peer.step, normalised(model, x), y)}
        note = f"{len(taken)} of 256 attacked, {taken.mean():.1f} steps a walk"
        compare(f"`BSS.step`, resnet26 teaches resnet8, {what}", jobs, peers, note)


@row
def targets():
    "BSS targets of 64 images, beside the published double loop."
    logits = 3 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    base, rows = logits.argmax(1), torch.arange(64)
    many, one = base.repeat(200), [published_targets(logits, rows) for _ in range(200)]
    found = sample_target(logits.repeat(200, 1), many), torch.cat(one)
    shares = [F.one_hot(t.view(200, 64), 10).double().mean(0) for t in found]
    assert (shares[0] - shares[1]).abs().max() < 0.25 and all((t != many).all() for t in found)
    peer = {"the published double loop": partial(published_targets, logits, rows)}
    compare("BSS targets of 64 images", {"": partial(sample_target, logits, base)}, peer, repeat=20)


if __name__ == "__main__":
    main(__doc__)
