"ARD: the loss against closed forms, the switches, what the teacher sees, what a step costs BatchNorm."

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import batch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdnb.ard import ARD, ard_loss, ard_schedule
from kdnb.attacks import attack_name, pgd
from kdnb.data import Batches, load_data
from kdnb.kd import KD, kd_loss
from kdnb.learning import sgd
from kdnb.models import create_model
from kdnb.training import fit

ATTACK = partial(pgd, eps=0.1, step_size=0.03, steps=3)


def digits_net(name="resnet8", seed=0):
    return create_model(name, in_channels=1, image_size=8, seed=seed)


def logits(seed, b=5, k=7):
    return 3 * torch.randn(b, k, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the loss


@given(st.integers(0, 99), st.sampled_from([0.5, 1.0, 5.0, 30.0]))
def test_gradient_is_the_closed_form(seed, temperature):
    adv, teacher = logits(seed).requires_grad_(), logits(seed + 100)
    (found,) = torch.autograd.grad(ard_loss(adv, teacher, temperature=temperature), adv)
    wanted = temperature * ((adv / temperature).softmax(1) - (teacher / temperature).softmax(1)) / len(adv)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 99), st.floats(0, 1))
def test_alpha_weighs_teacher_against_labels(seed, alpha):
    adv, teacher, clean = (logits(seed + i) for i in (0, 100, 200))
    y = torch.randint(0, 7, (5,), generator=torch.Generator().manual_seed(seed))
    found = ard_loss(adv, teacher, clean, y, 4.0, alpha, label_temperature=1.0)
    wanted = alpha * kd_loss(adv, teacher, 4.0) + (1 - alpha) * F.cross_entropy(clean, y)
    torch.testing.assert_close(found, wanted)


def test_alpha_one_never_looks_at_labels_and_alpha_zero_never_at_the_attack():
    adv, teacher, clean = (logits(i).requires_grad_() for i in range(3))
    y = torch.arange(5)
    loss = ard_loss(adv, teacher)
    assert loss == ard_loss(adv, teacher, clean, y) == ard_loss(adv, teacher, clean, y.flip(0))
    loss = ard_loss(adv, teacher, clean, y, 1.0, alpha=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(clean, y))
    loss.backward()
    assert adv.grad.abs().max() == 0 and clean.grad.abs().max() > 0


def test_paper_softens_the_label_term_and_the_official_code_does_not():
    adv, teacher, clean = (logits(i) for i in range(3))
    y = torch.arange(5)
    paper = ard_loss(adv, teacher, clean, y, 8.0, 0.5)
    official = ard_loss(adv, teacher, clean, y, 8.0, 0.5, label_temperature=1.0)
    gap = F.cross_entropy(clean, y) - F.cross_entropy(clean / 8, y)
    torch.testing.assert_close(official - paper, 0.5 * gap)


def test_mean_reduction_is_smaller_by_the_number_of_classes():
    adv, teacher = logits(0), logits(1)
    torch.testing.assert_close(7 * ard_loss(adv, teacher, reduction="mean"), ard_loss(adv, teacher))


# ---------------------------------------------------------------- the schedule


def rates(variant, epochs=200):
    optimizer = sgd(nn.Linear(2, 2), lr=0.1)
    schedule, seen = ard_schedule(optimizer, variant=variant), []
    for _ in range(epochs):
        seen.append(round(optimizer.param_groups[0]["lr"], 9))
        optimizer.step()
        schedule.step()
    return seen


def test_only_the_papers_rate_reaches_a_thousandth():
    assert rates("paper") == [0.1] * 100 + [0.01] * 50 + [0.001] * 50
    assert rates("official") == [0.1] * 100 + [0.01] * 100


# ---------------------------------------------------------------- the method


@pytest.mark.parametrize("net", ["mlp_16", "resnet8"])
def test_without_an_attacker_it_is_distillation_bit_by_bit(net):
    x, y = batch()
    settings = dict(temperature=5.0, alpha=1.0, lr=0.1, weight_decay=1e-4)
    teacher = digits_net(net, 9)
    kd = KD(digits_net(net), teacher, **settings)
    ard = ARD(digits_net(net), teacher, attack=partial(pgd, eps=0.0), **settings)
    for _ in range(3):
        kd.step(x, y)
        ard.step(x, y)
    other = ard.student.state_dict()
    assert all(torch.equal(v, other[k]) for k, v in kd.student.state_dict().items())


class Spy(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x):
        self.seen.append((x, self.training, torch.is_grad_enabled()))
        return self.net(x)


@pytest.mark.parametrize("inner", ["labels", "teacher"])
@pytest.mark.parametrize("sees", ["clean", "adversarial"])
def test_what_the_teacher_sees(sees, inner):
    x, y = batch()
    choices = dict(attack=ATTACK, teacher_sees=sees, inner=inner, alpha=0.5)
    method = ARD(digits_net(), Spy(digits_net(seed=1)), **choices)
    spy = method.teacher
    before = copy.deepcopy(spy.net.state_dict())
    method.step(x, y)
    clean = [torch.equal(seen, x) for seen, _, _ in spy.seen]
    assert all(clean) == (sees == "clean")
    assert not any(training or grad for _, training, grad in spy.seen)
    assert all(torch.equal(v, before[k]) for k, v in spy.net.state_dict().items())
    assert all(p.grad is None for p in spy.parameters())


UPDATES = [("paper", 1.0, 1), ("paper", 0.5, 2), ("official", 1.0, 5)]


@pytest.mark.parametrize("variant, alpha, updates", UPDATES)
def test_how_often_batchnorm_moves(variant, alpha, updates):
    "The official code: in each of the steps (3 here), on x_adv and on x, even if the latter weighs nothing."
    method = ARD(digits_net(), digits_net(seed=1), attack=ATTACK, variant=variant, alpha=alpha)
    method.step(*batch())
    counts = {int(m.num_batches_tracked) for m in method.student.modules() if isinstance(m, nn.BatchNorm2d)}
    assert counts == {updates}


def test_rslad_opposes_and_imitates_the_teacher():
    x, y = batch()
    teacher = digits_net(seed=1)
    rslad = dict(inner="teacher", clean_target="teacher", temperature=1.0, alpha=5 / 6)
    method = ARD(digits_net("mlp_16"), teacher, attack=partial(ATTACK, start="zero"), **rslad)
    assert "-kl-" in method.attack_name
    student = copy.deepcopy(method.student).eval()
    with torch.no_grad(): wanted = teacher(x)
    x_adv = pgd(student, x, wanted, eps=0.1, step_size=0.03, steps=3, start="zero", objective="kl")
    by_hand = 5 / 6 * kd_loss(student(x_adv), wanted, 1.0) + kd_loss(student(x), wanted, 1.0) / 6
    torch.testing.assert_close(method.step(x, y)["loss"], by_hand.detach(), rtol=1e-4, atol=1e-5)


def test_labels_do_not_reach_rslad():
    x, y = batch()
    rslad = dict(inner="teacher", clean_target="teacher", temperature=1.0, alpha=0.5)
    states = []
    for labels in (y, y.flip(0)):
        torch.manual_seed(0)
        method = ARD(digits_net(), digits_net(seed=1), attack=ATTACK, **rslad)
        method.step(x, labels)
        states.append(method.student.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_folded_target_gives_the_same_step():
    x, y = batch()
    losses = []
    for fold in (False, True):
        method = ARD(digits_net(), digits_net(seed=1), attack=partial(ATTACK, start="zero"), fold=fold)
        losses.append(method.step(x, y)["loss"])
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_resume_is_bit_identical(tmp_path):
    data = load_data("digits")
    part = data.train.subset(torch.arange(200))

    def run(max_steps=0, checkpoint=None):
        schedule = partial(ard_schedule, milestones=(1,))
        method = ARD(digits_net(), digits_net(seed=1), attack=ATTACK, schedule=schedule)
        stop = dict(checkpoint=checkpoint, max_steps=max_steps)
        fit(method, Batches(part, 50), epochs=2, seed=3, progress="off", **stop)
        return method.student.state_dict()

    whole = run()
    run(max_steps=3, checkpoint=tmp_path / "half.pt")
    resumed = run(checkpoint=tmp_path / "half.pt")
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("switches, words", [
    ({"temperature": 0}, "temperature must be > 0"),
    ({"alpha": 1.5}, "alpha must lie in"),
    ({"variant": "offical"}, "variant must be paper or official"),
    ({"inner": "student"}, "inner must be labels or teacher"),
    ({"teacher_sees": "x"}, "teacher_sees must be clean or adversarial"),
    ({"clean_target": "x"}, "clean_target must be labels or teacher"),
    ({"attack_mode": "test"}, "attack_mode must be"),
    ({"reduction": "sum"}, "reduction must be batchmean or mean"),
    ({"variant": "official", "fold": True}, "fold=True needs"),
    ({"lr": 0}, "lr must be > 0"),
])  # fmt: skip
def test_bad_switches_are_refused_at_once(switches, words):
    with pytest.raises(ValueError, match=words) as error:
        ARD(digits_net("mlp_8"), digits_net("mlp_8"), **switches)
    assert "\n" not in str(error.value)


def test_bad_losses_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        ard_loss(logits(0), logits(1, k=6))
    with pytest.raises(ValueError, match="alpha < 1 needs clean_logits and y"):
        ard_loss(logits(0), logits(1), alpha=0.5)
    with pytest.raises(ValueError, match="label_temperature must be > 0"):
        ard_loss(logits(0), logits(1), label_temperature=0)
    with pytest.raises(ValueError, match=r"adv_logits and clean_logits must have the same shape \(B, K\)"):
        ard_loss(logits(0), logits(1), logits(2)[None], torch.arange(5), alpha=0.5)


@pytest.mark.parametrize("wrong", [dict(variant="code"), dict(factor=math.nan), dict(milestones=(1, 2.5))])
def test_bad_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{[*wrong][0]} must be"):
        ard_schedule(sgd(nn.Linear(1, 1), 0.1), **wrong)


def test_the_attack_in_training_has_a_name():
    assert attack_name(partial(pgd, eps=8 / 255, steps=10)) == "pgd10-linf-8/255"
