"""How fast BSS is: `python tests/bench_bss.py [ROUNDS]`, one thread, one process, a few minutes.

Each row times two ways to do the same work in turns and prints the median ratio with its quartiles; that both
compute the same is asserted first. The networks learned handwritten digits, enlarged to 32 x 32. Needs what
`bench_attacks.py` needs.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from bench_attacks import task
from bench_training import begin, compare, in_bf16, rounds_asked

from kdnb.bss import BSS, bss_attack, bss_loss, bss_weights, sample_target, select_base
from kdnb.models import fold_batchnorm

STEPS = 10


def one_at_a_time(model, x, base, target, rule, eta):
    "The rule, image by image, until each has left its class."
    ends = []
    for i in range(len(x)):
        point = x[i : i + 1]
        for _ in range(STEPS):
            point = point.detach().requires_grad_()
            scores = model(point)[0]
            if scores.argmax() != base[i]:
                break
            height = scores[base[i]] - scores[target[i]]
            height.backward()
            length = point.grad.norm() ** (2 if rule == "boundary" else 1)
            point = (point - eta * (height.detach() + 1e-4) * point.grad / length).clamp(0, 1)
        ends.append(point.detach())
    return torch.cat(ends)


def plain_batch(model, x, base, target, rule, eta):
    "The rule on the whole batch: ten backward passes into everything, whoever has arrived is masked."
    x_adv = x.clone()
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        scores = model(x_adv)
        height = (scores.gather(1, base[:, None]) - scores.gather(1, target[:, None]))[:, 0]
        height.sum().backward()
        moving = scores.argmax(1) == base
        length = x_adv.grad.flatten(1).norm(dim=1) ** (2 if rule == "boundary" else 1)
        size = moving * eta * (height.detach() + 1e-4) / length.clamp_min(1e-12)
        x_adv = (x_adv.detach() - size.view(-1, 1, 1, 1) * x_adv.grad).clamp(0, 1)
    return x_adv


def bench_attack(rounds):
    model, _, x, y = task("resnet26", 64, 32)
    with torch.no_grad():
        target = sample_target(model(x), y, generator=torch.Generator().manual_seed(0))
    quick = fold_batchnorm(model).to(memory_format=torch.channels_last)
    wide = x.contiguous(memory_format=torch.channels_last)
    for rule, eta in (("paper", 0.3), ("boundary", 1.02)):
        ours = partial(bss_attack, quick, wide, y, target, rule=rule, eta=eta, steps=STEPS)
        found, steps = ours().x, ours().iterations.float().mean()
        exact = bss_attack(model, x, y, target, rule=rule, eta=eta, steps=STEPS).x
        for peer in (one_at_a_time, plain_batch):
            theirs = peer(model, x, y, target, rule, eta)
            # float32 rounding may let a walk take one step more or fewer
            same = (exact - theirs).flatten(1).norm(dim=1) < 1e-3 + 1e-2 * (theirs - x).flatten(1).norm(dim=1)
            assert same.float().mean() >= 0.95, same
            near = (found - exact).flatten(1).norm(dim=1) < 1e-3 + 0.05 * (exact - x).flatten(1).norm(dim=1)
            assert near.float().mean() >= 0.9, near
            what = f"BSS, {rule} rule, {steps:.1f} steps / {peer.__name__}"
            job = partial(peer, model, x, y, target, rule, eta)
            official = (rule, peer) == ("paper", plain_batch)
            compare(what, ours, job, rounds, target=">= 4.5" if official else "")

        def in_bf16(ours=ours):
            with torch.autocast("cpu", torch.bfloat16):
                ours()

        compare(f"the same in bfloat16 / {peer.__name__}", in_bf16, job, rounds)


class PlainStep:
    "A training step as a plain loop has it: everything in float32, the teacher asked for each loss."

    def __init__(self, student, teacher, size):
        self.student, self.teacher, self.size = student, teacher, size
        self.optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=1e-4)
        self.alpha, self.beta = bss_weights(1, 80)

    def step(self, x, y):
        logits, answers = self.student(x), self.teacher(x)
        soft = (answers.detach() / 3).softmax(1)
        loss = F.cross_entropy(logits, y) + self.alpha * F.cross_entropy(logits / 3, soft)
        rows = select_base(logits, answers, y, self.size)
        target = double_loop(answers[rows].detach(), y[rows])
        x_adv = plain_batch(self.teacher, x[rows], y[rows], target, "paper", 0.3)
        soft = (self.teacher(x_adv).detach() / 3).softmax(1)
        loss = loss + self.beta * F.cross_entropy(self.student(x_adv) / 3, soft)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def double_loop(logits, base):
    "A class for each image: sorted probabilities summed up, compared one by one."
    probs = logits.softmax(1)
    chosen = []
    for row, b in zip(probs, base, strict=True):
        u, total = torch.rand(1), torch.zeros(1)
        for k in row.argsort(descending=True):
            if k == b:
                continue
            pick = k
            total = total + row[k] / (1 - row[b])
            if u < total:
                break
        chosen.append(pick)
    return torch.stack(chosen)


def bench_step(rounds):
    teacher, _, x, y = task("resnet26", 256, 32)
    student = task("resnet8", 1, 32)[0].train()
    plain = PlainStep(copy.deepcopy(student), copy.deepcopy(teacher), 64)
    check = BSS(copy.deepcopy(student), copy.deepcopy(teacher), epochs=80, attack=None, lr=0.1)
    found = check.step(x, y)
    with torch.no_grad():
        logits, answers = copy.deepcopy(student)(x), teacher(x)
        wanted = F.cross_entropy(logits, y) + bss_weights(1, 80)[0] * bss_loss(logits, answers)
    torch.testing.assert_close(found["loss"], wanted, rtol=1e-3, atol=0)
    method = BSS(copy.deepcopy(student), teacher, epochs=80, variant="official", attack_size=64)
    for net in (method.student, method.teacher):
        net.to(memory_format=torch.channels_last)
    wide = x.contiguous(memory_format=torch.channels_last)

    peer = partial(plain.step, x, y)
    compare("BSS step, resnet26 > resnet8, 64 of 256", partial(method.step, wide, y), peer, rounds)
    compare("the same in bfloat16 / float32", in_bf16(method, wide, y), peer, rounds, target=">= 3")


def bench_targets(rounds):
    logits = 3 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    base = logits.argmax(1)
    many, rows = (draw(logits.repeat(200, 1), base.repeat(200)) for draw in (sample_target, double_loop))
    shares = [F.one_hot(t.view(200, 64), 10).double().mean(0) for t in (many, rows)]
    assert (shares[0] - shares[1]).abs().max() < 0.25 and (many != base.repeat(200)).all()
    ours = partial(sample_target, logits, base)
    theirs = partial(double_loop, logits, base)
    compare("targets of 64 images / a double loop", ours, theirs, rounds, target=">= 5")


if __name__ == "__main__":
    begin()
    rounds = rounds_asked()
    bench_attack(rounds)
    bench_step(rounds)
    bench_targets(rounds)
