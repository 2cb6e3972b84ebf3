"Properties of the distillation loss that must hold for any logits, and what the method must leave alone."

import pytest
import torch
import torch.nn.functional as F
from conftest import batch
from hypothesis import given
from hypothesis import strategies as st

from kdnb.kd import KD, kd_loss
from kdnb.models import create_model
from kdnb.training import Supervised

shapes = st.tuples(st.integers(1, 6), st.integers(2, 12))
temperatures = st.floats(0.5, 40)
seeds = st.integers(0, 2**31)


def draw(seed, shape, n=2, scale=5.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, *shape, generator=g, dtype=torch.double)).unbind(0)


@given(seeds, shapes, temperatures)
def test_zero_at_equality_and_positive_elsewhere(seed, shape, temperature):
    s, t = draw(seed, shape)
    assert kd_loss(t, t.clone(), temperature).abs() < 1e-10
    assert kd_loss(s, t, temperature) > 0


@given(seeds, shapes, temperatures, st.floats(-50, 50), st.floats(-50, 50))
def test_blind_to_a_constant_in_the_logits(seed, shape, temperature, a, b):
    s, t = draw(seed, shape)
    assert torch.isclose(kd_loss(s + a, t + b, temperature), kd_loss(s, t, temperature), rtol=1e-8, atol=1e-9)


@given(seeds, shapes, temperatures)
def test_value_is_the_sum_over_classes(seed, shape, temperature):
    s, t = draw(seed, shape)
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    by_hand = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    assert torch.isclose(kd_loss(s, t, temperature), by_hand, rtol=1e-8)
    assert torch.isclose(kd_loss(s, t, temperature, "mean") * shape[1], by_hand, rtol=1e-8)


@given(seeds, shapes, temperatures)
def test_gradient_is_the_closed_form_for_both_sides(seed, shape, temperature):
    s, t = (v.requires_grad_() for v in draw(seed, shape))
    loss = kd_loss(s, t, temperature)
    to_student, to_teacher = torch.autograd.grad(loss, (s, t))
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    assert to_student.allclose(temperature * (q - p) / len(s), atol=1e-9)
    gap = p.log() - q.log()
    assert to_teacher.allclose(temperature * p * (gap - (p * gap).sum(1, keepdim=True)) / len(s), atol=1e-9)


def test_gradient_against_finite_differences():
    s, t = (v.requires_grad_() for v in draw(0, (3, 5), scale=1.0))
    assert torch.autograd.gradcheck(lambda a, b: kd_loss(a, b, 3.0), (s, t))


@given(seeds)
def test_order_of_arguments(seed):
    "KL(teacher || student): at T = 1, cross-entropy with the teacher's answer less the teacher's entropy."
    s, t = draw(seed, (4, 6))
    cross = F.cross_entropy(s, t.softmax(1))
    entropy = F.cross_entropy(t, t.softmax(1))
    assert torch.isclose(kd_loss(s, t, 1.0), cross - entropy, atol=1e-9)
    assert not torch.isclose(kd_loss(s, t, 1.0), kd_loss(t, s, 1.0), rtol=1e-6)


@given(seeds)
def test_hot_limit_is_logit_matching(seed):
    s, t = draw(seed, (4, 6), scale=1.0)
    gap = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    assert torch.isclose(kd_loss(s, t, 1e4), gap.square().sum(1).mean() / (2 * 6), rtol=1e-2)


def net(seed=0, classes=10):
    return create_model("mlp_12", num_classes=classes, in_channels=1, image_size=8, seed=seed)


@given(st.floats(0, 1), st.floats(0.5, 20))
def test_loss_is_linear_in_alpha(alpha, temperature):
    x, y = batch()
    losses = KD(net(0), net(1), alpha=alpha, temperature=temperature).step(x, y)
    assert torch.isclose(losses["loss"], (1 - alpha) * losses["hard"] + alpha * losses["soft"], rtol=1e-5)
    z = net(0)(x)
    assert torch.isclose(losses["hard"], F.cross_entropy(z, y), rtol=1e-5)
    assert torch.isclose(losses["soft"], kd_loss(z, net(1)(x), temperature), rtol=1e-4, atol=1e-6)


def test_alpha_zero_is_supervised_training_and_the_teacher_is_untouched():
    x, y = batch()
    teacher = torch.nn.Sequential(net(1), torch.nn.BatchNorm1d(10), torch.nn.Dropout(0.5))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    a, b = KD(net(), teacher, alpha=0.0, lr=0.1), Supervised(net(), lr=0.1)
    for _ in range(3):
        a.step(x, y), b.step(x, y)
    assert all(p.equal(q) for p, q in zip(a.student.parameters(), b.student.parameters(), strict=True))
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules()) and a.student.training


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0), "temperature must be > 0, got 0"),
        (lambda: kd_loss(torch.zeros(2, 3), torch.zeros(2, 4)), "same shape"),
        (
            lambda: kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), reduction="sum"),
            "batchmean or mean, got 'sum'",
        ),
        (lambda: KD(net(), net(), alpha=1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: KD(net(), net(), temperature=-1), "temperature must be > 0, got -1"),
        (lambda: KD(net(), net(), lr=0), "lr must be > 0, got 0"),
        (lambda: KD(net(), net(classes=5)).step(*batch()), "same shape"),
    ],
)
def test_bad_input_is_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)
