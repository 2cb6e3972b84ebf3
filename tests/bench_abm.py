"""How fast ABM is, beside the published solver's iteration, and transition curves beside the published code.

`python tests/bench_abm.py [-k WORDS] [--rounds N] [--markdown]`; see stopwatch.py. Networks have random
weights: what they answer does not change the work.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from stopwatch import bare, check_weights, compare, in_bf16, main, network, noise, normalised, row, wide
from torch import nn

from kdnb.abm import ABM, Generator, transition_curves
from kdnb.models import features

# ---- solver.py, utils/loaders.py


class Published:
    """The published iteration: the teacher is asked once for ten student steps, without gradients.

    Its loader makes the images anew for every step, and each student step goes back through them into the
    generator; `careful` makes them once, as constants: all that is needed.
    """

    def __init__(self, student, teacher, generator, batch_size, careful=False):
        self.student, self.teacher, self.generator = student.train(), teacher.eval(), generator.train()
        self.batch_size, self.careful = batch_size, careful
        self.optimizer = torch.optim.Adam(student.parameters(), 2e-3)
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), 1e-3)

    def images(self, z, first=False):
        with torch.set_grad_enabled(first or not self.careful):
            return self.generator(z)

    def update(self, net, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5)
        optimizer.step()

    def step(self):
        z = torch.randn(self.batch_size, 100, dtype=next(self.generator.parameters()).dtype)
        x = self.images(z, first=True)
        (logits, _), (answers, _) = features(self.student, x), features(self.teacher, x)
        gap = -apart(logits, answers)
        self.update(self.generator, self.generator_optimizer, gap)
        for k in range(10):
            if not (k and self.careful):
                x = self.images(z)
            if not k:
                with torch.no_grad():
                    answers, theirs = features(self.teacher, x)
            logits, ours = features(self.student, x)
            loss = apart(logits, answers)
            for name in ours:
                loss = loss + 250 * (attention(ours[name]) - attention(theirs[name])).pow(2).mean()
            self.update(self.student, self.optimizer, loss)
        with torch.no_grad():
            sure = [torch.softmax(v, dim=1).max(1)[0].mean() for v in (answers, logits)]
        return [float(v) for v in (gap, loss, *sure)]


def apart(logits, answers):
    return F.kl_div(F.log_softmax(logits, dim=1), F.softmax(answers, dim=1))


def attention(maps):
    return F.normalize(maps.pow(2).mean(1).view(maps.size(0), -1))


def sides(teacher_name, student_name, size, kind=torch.float32):
    "Ours twice, the published one, and that with images made once: all from the same weights."
    nets = network(student_name), network(teacher_name), Generator(seed=0)

    def parts():
        return [copy.deepcopy(net).to(kind) for net in nets]

    ours = [ABM(*parts(), steps=10**6, variant="official", batch_size=size) for _ in range(2)]
    theirs = []
    for careful in (False, True):
        student, teacher, generator = parts()
        theirs.append(Published(bare(student), bare(teacher), generator, size, careful))
    return *ours, *theirs


def check(teacher_name, student_name):
    "One iteration in float64: all weights."
    mine, _, *peers = sides(teacher_name, student_name, 6, torch.float64)
    for side in (mine, *peers):
        torch.manual_seed(0)
        side.step()
        # Adam moves a bias that batch norm takes away by what rounding leaves of its gradient
        check_weights(mine.student, side.student, rtol=1e-5, atol=1e-6)
        check_weights(mine.generator, side.generator, biases=False, rtol=1e-5, atol=1e-6)


def iteration_row(teacher_name, student_name, batch_size):
    mine, brief, published, careful = sides(teacher_name, student_name, batch_size)
    for side in (mine, brief):
        for net in (side.student, side.teacher, side.generator):
            wide(net)
    peers = {
        "the published iteration, float32": published.step,
        "the same, images made once, float32": careful.step,
    }
    what = f"`ABM.step`, {teacher_name} teaches {student_name}, {batch_size} images"
    compare(what, {"": mine.step, "bfloat16": in_bf16(brief)}, peers)


@row
def iteration():
    "ABM iteration, wrn_40_2 teaches wrn_16_1, resnet26 teaches resnet8, beside the published solver."
    check("resnet14", "resnet8")
    check("wrn_16_1", "wrn_10_1")
    iteration_row("wrn_40_2", "wrn_16_1", 32)
    iteration_row("resnet26", "resnet8", 64)


# ---- utils/transition_curves.py


def published_curves(model, other, x, read, steps):
    "Image by image, class by class; each step goes back into everything in the network that leads."
    own, theirs = (torch.zeros(len(x), 9, steps, dtype=x.dtype) for _ in range(2))
    for i in range(len(x)):
        for c in range(9):
            point = x[i : i + 1].detach().clone().requires_grad_()
            to = (read[i : i + 1] + c + 1) % 10
            for k in range(steps):
                logits = model(point)
                with torch.no_grad():
                    watching = other(point)
                loss = F.cross_entropy(logits, to)
                model.zero_grad()
                loss.backward()
                point.data -= 1.0 * point.grad.data
                point.grad.data.zero_()
                with torch.no_grad():
                    own[i, c, k] = torch.softmax(logits, dim=1)[0, to]
                    theirs[i, c, k] = torch.softmax(watching, dim=1)[0, to]
    return own, theirs


def curves_row(model_name, other_name, steps=10, images=4):
    nets = [network(name, normalised=True) for name in (model_name, other_name)]
    x = noise(400, 32)
    with torch.no_grad():
        x = x[nets[0](x).argmax(1) == nets[1](x).argmax(1)][:images]
        read = nets[0](x).argmax(1)

    def peer(kind, n=images):
        plain = [bare(net).to(kind) for net in nets]
        return partial(published_curves, *plain, normalised(nets[0], x[:n].to(kind)), read[:n], steps)

    def ours(kind=torch.float32, n=images, **choices):
        mine = [copy.deepcopy(net).to(kind) for net in nets]
        return partial(transition_curves, *mine, x[:n].to(kind), steps=steps, **choices)

    for kind, limit in ((torch.float32, 1e-3), (torch.float64, 1e-8)):
        found = ours(kind, 1)()
        order = (read[:1, None] + 1 + torch.arange(9)) % 10
        at = (found.targets[:, None] == order[..., None]).long().argmax(2)
        for mine, theirs in zip((found.own, found.other), peer(kind, 1)(), strict=True):
            mine = mine.gather(1, at[..., None].expand_as(mine))
            assert (mine - theirs).abs().max() < limit, (kind, (mine - theirs).abs().max())

    def brief(job=ours()):  # noqa: B008
        with torch.autocast("cpu", torch.bfloat16):
            return job()

    what = f"transition curves, led by {model_name}, {other_name} watching"
    jobs = {"": ours(), "`fast=False`": ours(fast=False), "bfloat16": brief}
    note = f"{9 * images} walks of {steps} steps"
    compare(what, jobs, {"the published code, float32": peer(torch.float32)}, note)


@row
def curves():
    "Transition curves, wide and small networks, float32 and bfloat16, beside the published code."
    curves_row("wrn_16_1", "wrn_40_2")
    curves_row("resnet8", "resnet26")


if __name__ == "__main__":
    main(__doc__)
