"""How fast ABM is: `python tests/bench_abm.py [ROUNDS]`, one thread, one process, a few minutes.

Each row times two ways to do the same work in turns and prints the median ratio with its quartiles; that both
compute the same is asserted first. Networks have random weights: what they answer does not change the work.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from bench_attacks import network, noise
from bench_training import begin, compare, in_bf16, rounds_asked
from torch import nn

from kdnb.abm import ABM, Generator, transition_curves
from kdnb.features import attention_loss
from kdnb.models import features, fold_batchnorm


class OfficialLoop:
    "The published solver's iteration: the teacher is asked once, without gradients, for ten student steps."

    def __init__(self, student, teacher, generator, batch_size, beta=250.0):
        self.student, self.teacher, self.generator = student.train(), teacher.eval(), generator.train()
        self.batch_size, self.beta = batch_size, beta
        self.optimizer = torch.optim.Adam(student.parameters(), 2e-3)
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), 1e-3)

    def update(self, net, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5)
        optimizer.step()
        return loss.detach()

    def step(self):
        x = self.generator(z := torch.randn(self.batch_size, 100))
        gap = self.update(self.generator, self.generator_optimizer, -kl(self.student(x), self.teacher(x)))
        with torch.no_grad():
            x = self.generator(z)
            answers, theirs = features(self.teacher, x)
        losses = []
        for _ in range(10):
            logits, ours = features(self.student, x)
            loss = kl(logits, answers) + self.beta * attention_loss(ours, theirs)
            losses.append(self.update(self.student, self.optimizer, loss))
        return {"generator": gap, "loss": torch.stack(losses).mean()}


def kl(logits, answers):
    return F.kl_div(logits.log_softmax(1), answers.softmax(1), reduction="batchmean") / logits.shape[1]


def bench_iteration(rounds, teacher_name, student_name, batch_size, target=""):
    teacher, student, generator = network(teacher_name, 32), network(student_name, 32), Generator(seed=0)
    copies = [copy.deepcopy(net) for net in (student, teacher, generator)]
    plain = OfficialLoop(*copies, batch_size)
    abm = ABM(student, teacher, generator, steps=10**6, variant="official", batch_size=batch_size)
    found = []
    for method in (abm, plain):
        torch.manual_seed(0)
        found.append(method.step())
    for name in ("generator", "loss"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=2e-2, atol=1e-4)
    for net in (abm.student, abm.teacher, abm.generator):
        net.to(memory_format=torch.channels_last)

    what = f"ABM iteration, {teacher_name} > {student_name}, {batch_size} images"
    compare(what, abm.step, plain.step, rounds)
    compare("the same in bfloat16 / float32", in_bf16(abm), plain.step, rounds, target=target)


def one_at_a_time(model, other, x, classes, steps):
    "Curves image by image and class by class, gradients into everything, as the definition reads."
    std = model.normalize.std
    own, theirs = [], []
    for image, j in zip(x, classes, strict=True):
        point = image[None]
        for _ in range(steps):
            point = point.detach().requires_grad_()
            log_p = model(point).log_softmax(1)
            own.append(log_p[0, j].exp().item())
            theirs.append(other(point).softmax(1)[0, j].item())
            (-log_p[0, j]).backward()
            point = point - std**2 * point.grad
    return (torch.tensor(p, dtype=x.dtype).view(len(x), steps) for p in (own, theirs))


def bench_curves(rounds, model_name, other_name, images=6, steps=10):
    model = network(model_name, 32)
    other = copy.deepcopy(model) if other_name == model_name else network(other_name, 32)
    x = noise(400, 32)
    with torch.no_grad():
        x = x[model(x).argmax(1) == other(x).argmax(1)][:images]
        read = model(x).argmax(1)
    images = len(x)
    wanted = (torch.arange(10) != read[:, None]).nonzero()
    job = partial(one_at_a_time, model, other, x[wanted[:, 0]], wanted[:, 1], steps)
    precise = [copy.deepcopy(net).double() for net in (model, other)]
    for nets, dtype, limit in (((model, other), torch.float32, 1e-3), (precise, torch.float64, 1e-9)):
        some = x[:2].to(dtype)
        curves = transition_curves(*nets, some, steps=steps)
        peers = one_at_a_time(*nets, some[wanted[:18, 0]], wanted[:18, 1], steps)
        for ours, theirs in zip((curves.own, curves.other), peers, strict=True):
            assert (ours.flatten(0, 1) - theirs).abs().max() < limit
    quick = [fold_batchnorm(net).to(memory_format=torch.channels_last) for net in (model, other)]
    wide = x.contiguous(memory_format=torch.channels_last)
    what = f"curves, {model_name} / {other_name}, {images} images, {steps} steps"
    compare(what, partial(transition_curves, model, other, x, steps=steps), job, rounds)
    ours = partial(transition_curves, *quick, wide, steps=steps)
    compare("the same, folded, channels last", ours, job, rounds, target=">= 4.8")


if __name__ == "__main__":
    begin()
    rounds = rounds_asked()
    bench_iteration(rounds, "wrn_40_2", "wrn_16_1", 32, target=">= 5")
    bench_iteration(rounds, "resnet26", "resnet8", 64)
    bench_curves(rounds, "wrn_16_1", "wrn_40_2")
    bench_curves(rounds, "resnet8", "resnet26")
