"`kdnb.tfkd`: the published virtual teacher, losses in closed form, what each method asks of whom, bad input."

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import same, stream
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdnb.attacks import pgd
from kdnb.data import Batches
from kdnb.kd import kd_loss
from kdnb.models import create_model
from kdnb.robust import PGDAT
from kdnb.tfkd import (
    AdversarialTfKD,
    TfKD,
    equivalent_smoothing,
    gradient_heatmap,
    label_smoothing_loss,
    tf_kd_reg_loss,
    tf_kd_self_loss,
    virtual_teacher,
)
from kdnb.training import fit


def logits(n=6, classes=10, seed=0, scale=3.0):
    return scale * torch.randn(n, classes, generator=stream(seed), dtype=torch.float64)


def labels(n=6, classes=10, seed=1):
    return torch.randint(0, classes, (n,), generator=stream(seed))


# ---------------------------------------------------------------- the virtual teacher

PUBLISHED = [  # K, a, temperature -> correct, each wrong
    (10, 0.9, 2, 0.14770, 0.09470),
    (10, 0.9, 4, 0.12185, 0.09757),
    (10, 0.9, 10, 0.10829, 0.09908),
    (10, 0.9, 20, 0.10407, 0.09955),
    (10, 0.9, 30, 0.10270, 0.09970),
    (10, 0.99, 20, 0.10454, 0.09950),
    (100, 0.99, 20, 0.010502, 0.009995),
    (100, 0.99, 40, 0.010248, 0.009997),
    (1000, 0.99, 20, 0.001050, 0.001000),
]


@pytest.mark.parametrize(("classes", "a", "temperature", "correct", "wrong"), PUBLISHED)
def test_figure_5(classes, a, temperature, correct, wrong):
    row = virtual_teacher(torch.tensor([3]), classes, a, temperature)[0]
    assert row[3].item() == pytest.approx(correct, abs=1e-5 if classes < 1000 else 1e-6)
    assert row[4].item() == pytest.approx(wrong, abs=1e-5 if classes < 1000 else 1e-6)


@given(
    st.integers(2, 50),
    st.floats(0.01, 0.99),
    st.floats(0.1, 100),
    st.integers(0, 49),
    st.sampled_from(["probs", "logits"]),
)
def test_virtual_teacher_knows_the_label(classes, above, temperature, label, softening):
    a, y = 1 / classes + (1 - 1 / classes) * above, torch.tensor([label % classes])
    row = virtual_teacher(y, classes, a, temperature, softening)[0]
    assert row.sum().item() == pytest.approx(1, abs=1e-5) and (row >= 0).all()
    others = torch.cat([row[: y.item()], row[y.item() + 1 :]])
    assert (row[y] >= others).all() and (others - others[0]).abs().max() < 1e-6
    colder = virtual_teacher(y, classes, a, temperature / 2, softening)[0]
    assert colder[y] >= row[y] - 1e-6
    if temperature > 50 and softening == "probs":
        assert (row - 1 / classes).abs().max() < 0.03 / classes + 0.02


def test_two_ways_to_soften_differ():
    y = torch.tensor([0])
    plain = torch.tensor([0.9] + [0.1 / 9] * 9)
    torch.testing.assert_close(virtual_teacher(y, 10, 0.9, 1.0, "logits")[0], plain)
    assert virtual_teacher(y, 10, 0.9, 1.0, "probs")[0, 0] < 0.22
    sure = virtual_teacher(y, 10, 1.0, 2.0)[0, 0].item()
    assert sure == pytest.approx(math.exp(0.5) / (math.exp(0.5) + 9), abs=1e-6)
    assert virtual_teacher(y, 10, 1.0, 2.0, "logits")[0].equal(torch.eye(10)[0])


# ---------------------------------------------------------------- losses in closed form


@pytest.mark.parametrize("softening", ["probs", "logits"])
def test_gradients_of_reg(softening):
    "Paper: (p_tau - p^d_tau) / (tau N); official: (p - p^d_tau) / N * multiplier / K."
    z, y = logits().requires_grad_(), labels()
    target = virtual_teacher(y, 10, 0.9, 20.0, softening).double()
    common = dict(alpha=1.0, temperature=20.0, correct_prob=0.9, softening=softening)
    (paper,) = torch.autograd.grad(tf_kd_reg_loss(z, y, **common), z)
    torch.testing.assert_close(paper, ((z / 20).softmax(1) - target) / (20 * 6), rtol=1e-6, atol=1e-9)
    (code,) = torch.autograd.grad(tf_kd_reg_loss(z, y, variant="official", multiplier=50.0, **common), z)
    torch.testing.assert_close(code, (z.softmax(1) - target) / 6 * 50 / 10, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:reduction")
def test_official_values_as_the_published_code_computes_them():
    "The published loop written out: a table filled row by row, softmax of it / T, KLDivLoss as it comes."
    z, y, K, a, T, alpha, multiplier = logits(), labels(), 10, 0.99, 20.0, 0.1, 100.0
    table = torch.full((6, K), (1 - a) / (K - 1), dtype=torch.float64)
    for i in range(6):
        table[i, y[i]] = a
    soft = nn.KLDivLoss()(F.log_softmax(z, 1), F.softmax(table / T, 1)) * multiplier
    theirs = (1 - alpha) * F.cross_entropy(z, y) + alpha * soft
    ours = tf_kd_reg_loss(
        z, y, alpha=alpha, temperature=T, correct_prob=a, variant="official", multiplier=multiplier
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    t = logits(seed=2)
    soft = nn.KLDivLoss()(F.log_softmax(z / 6, 1), F.softmax(t / 6, 1)) * 36 * 50
    theirs = 0.05 * F.cross_entropy(z, y) + 0.95 * soft
    ours = tf_kd_self_loss(z, t, y, alpha=0.95, temperature=6.0, variant="official", multiplier=50.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


def test_self_is_distillation():
    z, t, y = logits(), logits(seed=2), labels()
    ours = tf_kd_self_loss(z, t, y, alpha=0.3, temperature=4.0)
    torch.testing.assert_close(ours, 0.7 * F.cross_entropy(z, y) + 0.3 * kd_loss(z, t, 4.0))
    torch.testing.assert_close(tf_kd_self_loss(z, z, y, alpha=0.3), 0.7 * F.cross_entropy(z, y))


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_alpha_at_its_ends(variant):
    z, y = logits(), labels()
    torch.testing.assert_close(tf_kd_reg_loss(z, y, alpha=0.0, variant=variant), F.cross_entropy(z, y))
    torch.testing.assert_close(
        tf_kd_self_loss(z, logits(seed=2), y, alpha=0.0, variant=variant), F.cross_entropy(z, y)
    )
    other = tf_kd_self_loss(z, logits(seed=2), (y + 1) % 10, alpha=1.0, variant=variant)
    torch.testing.assert_close(other, tf_kd_self_loss(z, logits(seed=2), y, alpha=1.0, variant=variant))


@given(st.floats(0, 1), st.integers(2, 20))
def test_label_smoothing_in_both_conventions(eps, classes):
    z, y = logits(classes=classes), labels(classes=classes)
    torch.testing.assert_close(label_smoothing_loss(z, y, eps), F.cross_entropy(z, y, label_smoothing=eps))
    target = torch.full_like(z, eps / (classes - 1)).scatter_(1, y[:, None], 1 - eps)
    torch.testing.assert_close(label_smoothing_loss(z, y, eps, share="wrong"), F.cross_entropy(z, target))


def test_kd_from_a_uniform_teacher_is_label_smoothing():
    z, y = logits(), labels()
    uniform = torch.full_like(z, 0.1)
    mixed = 0.7 * F.cross_entropy(z, y) + 0.3 * F.kl_div(z.log_softmax(1), uniform, reduction="batchmean")
    torch.testing.assert_close(mixed, label_smoothing_loss(z, y, 0.3) - 0.3 * math.log(10))


@pytest.mark.parametrize("multiplier", [1.0, 50.0, 100.0])
@pytest.mark.parametrize(
    ("classes", "alpha", "temperature"), [(10, 0.1, 20.0), (100, 0.95, 40.0), (7, 0.5, 1.0)]
)
def test_the_official_reg_loss_is_label_smoothing(classes, alpha, temperature, multiplier):
    common = dict(alpha=alpha, temperature=temperature, multiplier=multiplier)
    eps, factor = equivalent_smoothing(classes, **common)
    gaps = []
    for seed in range(3):
        z, y = logits(classes=classes, seed=seed), labels(classes=classes, seed=seed)
        official = tf_kd_reg_loss(z, y, variant="official", **common)
        gaps.append(official - factor * label_smoothing_loss(z, y, eps))
    assert max(gaps) - min(gaps) < 1e-5  # a constant
    y = labels(classes=classes)
    z = logits(classes=classes).requires_grad_()
    (a,) = torch.autograd.grad(tf_kd_reg_loss(z, y, variant="official", **common), z)
    (b,) = torch.autograd.grad(factor * label_smoothing_loss(z, y, eps), z)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_with_a_temperature_on_both_sides_it_is_not():
    "No eps and factor make the gradient of the paper's loss that of label smoothing."
    y = torch.zeros(2, dtype=torch.long)
    z = torch.tensor([[4.0, 1.0, 0.0], [4.0, 0.0, 1.0]]).requires_grad_()
    (g,) = torch.autograd.grad(tf_kd_reg_loss(z, y, alpha=1.0, temperature=20.0), z)
    (s,) = torch.autograd.grad(label_smoothing_loss(z, y, 1.0), z)
    ratio = (g / s)[0]
    assert ratio.max() / ratio.min() > 1.5


# ---------------------------------------------------------------- methods


def mlp(seed=0, name="mlp_16"):
    return create_model(name, in_channels=1, image_size=8, seed=seed)


def batch(digits):
    return digits.train.floats()[:32], digits.train.y[:32]


def after_a_step(method, digits):
    method.step(*batch(digits))
    return method.student.state_dict()


class Spy(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.seen, self.training_flags = net, [], []

    def forward(self, x):
        self.seen.append(x.clone()), self.training_flags.append(self.training)
        return self.net(x)


def test_the_teacher_sees_clean_images_and_learns_nothing(digits):
    spy, student = Spy(mlp(1)), Spy(mlp())
    method = AdversarialTfKD(student, spy, mode="self")
    before = copy.deepcopy(spy.state_dict())
    x, y = batch(digits)
    method.step(x, y)
    assert len(spy.seen) == 1 and spy.seen[0].equal(x) and spy.training_flags == [False]
    assert same(before, spy.state_dict()) and all(p.grad is None for p in spy.parameters())
    assert not student.seen[-1].equal(x) and (student.seen[-1] - x).abs().max() <= 8 / 255 + 1e-6


@pytest.mark.parametrize("mode", ["reg", "self"])
def test_without_radius_the_adversarial_form_is_the_clean_one(mode, digits):
    teacher = {"teacher": mlp(5)} if mode == "self" else {}
    clean = after_a_step(TfKD(mlp(), mode=mode, **teacher), digits)
    moved = after_a_step(AdversarialTfKD(mlp(), mode=mode, attack=partial(pgd, eps=0.0), **teacher), digits)
    assert same(clean, moved)
    real = after_a_step(AdversarialTfKD(mlp(), mode=mode, **teacher), digits)
    assert not same(clean, real)


def test_alpha_0_under_attack_is_adversarial_training(digits):
    torch.manual_seed(0)
    ours = after_a_step(AdversarialTfKD(mlp(), alpha=0.0, weight_decay=2e-4), digits)
    torch.manual_seed(0)
    seven = partial(pgd, eps=8 / 255, step_size=1.85 * 8 / 255 / 7, steps=7)
    theirs = after_a_step(PGDAT(mlp(), attack=seven, weight_decay=2e-4), digits)
    assert same(ours, theirs)


@pytest.mark.parametrize("mode", ["reg", "self"])
def test_resume_is_bit_identical(mode, digits, tmp_path):
    def new():
        return AdversarialTfKD(mlp(), *([mlp(5)] if mode == "self" else []), mode=mode, lr=0.02)

    batches, path = Batches(digits.train.subset(torch.arange(200)), 50), tmp_path / "run.pt"
    whole, first, second = new(), new(), new()
    fit(whole, batches, epochs=3, progress="off")
    fit(first, batches, epochs=3, progress="off", checkpoint=path, max_steps=6)
    fit(second, batches, epochs=3, progress="off", checkpoint=path)
    assert same(whole.student.state_dict(), second.student.state_dict())


def test_it_learns(digits):
    student = mlp(name="mlp_64")
    fit(TfKD(student, lr=0.05), Batches(digits.train, 64), epochs=8, progress="off")
    with torch.no_grad():
        right = (student.eval()(digits.val.floats()).argmax(1) == digits.val.y).float().mean()
    assert right > 0.9


# ---------------------------------------------------------------- heat maps


def test_heatmap_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).train()
    net[1].weight.requires_grad_(False)
    x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1])
    flat = x.flatten(1)
    hidden = flat @ net[1].weight.T + net[1].bias
    out = hidden.relu() @ net[3].weight.T + net[3].bias
    pull = (out.softmax(1) - F.one_hot(y, 2)) / 5
    top = pull.T @ hidden.relu()
    bottom = ((pull @ net[3].weight) * (hidden > 0)).T @ flat
    found = gradient_heatmap(net, [(x, y)])
    assert found["3"]["3"] == pytest.approx(top.abs().mean().item(), rel=1e-5)
    assert found["1"]["1"] == pytest.approx(bottom.abs().mean().item(), rel=1e-5)
    assert net.training and not net[1].weight.requires_grad and net[3].weight.grad is None


def test_heatmap_of_a_resnet():
    net = create_model("resnet18", seed=0)
    found = gradient_heatmap(net, [(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))])
    assert sum(len(v) for v in found.values()) == 21
    assert all(value > 0 for stage in found.values() for value in stage.values())
    assert [len(found[f"stage{k}"]) for k in (1, 2, 3, 4)] == [4, 5, 5, 5]


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_heatmap_under_spectral_norm(normed):
    "The gradient of the weight that is used, batch by batch; nothing of the norm's own moves."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), normed(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2)).train()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    batches = [(torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1])) for _ in range(2)]
    net(batches[0][0])
    net.eval()(batches[0][0])
    for i in (1, 3):
        for key in ("weight", "bias"):
            getattr(plain[i], key).data = getattr(net[i], key).detach().clone()
    before = {k: v.clone() for k, v in net.train().state_dict().items()}
    found, wanted = gradient_heatmap(net, batches), gradient_heatmap(plain, batches)
    assert [found[i][i] for i in "13"] == pytest.approx([wanted[i][i] for i in "13"], rel=1e-5)
    assert same(before, net.state_dict()) and net.training and all(p.grad is None for p in net.parameters())


def test_heatmap_of_a_layer_that_takes_no_part():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    net[1].register_module("unused", nn.Linear(2, 2))
    found = gradient_heatmap(net, [(torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1]))])
    assert found["1"]["unused"] == 0 and found["1"]["1"] > 0


# ---------------------------------------------------------------- precision, doors


def test_virtual_teacher_in_double_precision_is_exact():
    row = virtual_teacher(Y, 4, 0.7, 2.0, dtype=torch.float64)[0]
    up, low = math.exp(0.35), math.exp(0.05)
    wanted = torch.tensor([up] + [low] * 3, dtype=torch.float64) / (up + 3 * low)
    torch.testing.assert_close(row, wanted, rtol=1e-14, atol=0)
    assert virtual_teacher(Y, 4).dtype == torch.float32


def test_a_refused_method_leaves_the_student_alone():
    student = mlp().eval()
    with pytest.raises(ValueError, match="attack_mode"):
        AdversarialTfKD(student, attack_mode="test")
    assert not student.training


# ---------------------------------------------------------------- bad input

ZERO = torch.zeros(2, 4)
Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: virtual_teacher(Y, 4, 0.25), r"correct_prob must lie in \(0.25, 1\], got 0.25"),
        (lambda: virtual_teacher(Y, 4, 1.1), "correct_prob must lie in"),
        (lambda: virtual_teacher(Y, 1), "num_classes must be a whole number >= 2, got 1"),
        (lambda: virtual_teacher(Y + 3, 4), r"labels must lie in \[0, 4\), got 3 to 4"),
        (lambda: virtual_teacher(Y, 4, temperature=0), "temperature must be > 0, got 0"),
        (lambda: virtual_teacher(Y, 4, softening="log"), "softening must be probs or logits, got 'log'"),
        (lambda: tf_kd_reg_loss(ZERO, Y, alpha=1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: tf_kd_reg_loss(ZERO, Y, temperature=-1), "temperature must be > 0, got -1"),
        (lambda: tf_kd_reg_loss(ZERO, Y, variant="code"), "variant must be paper or official, got 'code'"),
        (lambda: tf_kd_reg_loss(ZERO, Y, multiplier=0), "multiplier must be > 0, got 0"),
        (lambda: tf_kd_self_loss(ZERO, torch.zeros(2, 5), Y), r"same shape .* \(2, 4\) and shape \(2, 5\)"),
        (lambda: tf_kd_self_loss(ZERO, ZERO, Y, alpha=-0.1), r"alpha must lie in \[0, 1\], got -0.1"),
        (lambda: label_smoothing_loss(ZERO, Y, 1.2), r"eps must lie in \[0, 1\], got 1.2"),
        (lambda: label_smoothing_loss(ZERO, Y, share="none"), "share must be all or wrong, got 'none'"),
        (lambda: TfKD(mlp(), mode="self"), "mode 'self' needs a teacher"),
        (lambda: TfKD(mlp(), mlp(1)), "mode 'reg' takes no teacher"),
        (lambda: TfKD(mlp(), mode="other"), "mode must be reg or self, got 'other'"),
        (lambda: TfKD(mlp(), temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: TfKD(mlp(), alpha=2.0), r"alpha must lie in \[0, 1\], got 2.0"),
        (lambda: TfKD(mlp(), correct_prob=0.0), "correct_prob must lie in"),
        (lambda: AdversarialTfKD(mlp(), attack_mode="test"), "attack_mode must be eval"),
        (lambda: TfKD(mlp(), correct_prob=math.nan), "correct_prob must lie in .*, got nan"),
        (lambda: TfKD(mlp(), mlp(1), mode="self", softening="log"), "softening must be probs or logits"),
        (lambda: gradient_heatmap(mlp(), []), "there are no batches"),
        (lambda: gradient_heatmap(nn.Flatten(), [(ZERO, Y)]), "no convolution and no linear layer"),
        (lambda: gradient_heatmap(nn.Linear(4, 4), [(ZERO[None], Y)]), "must return logits"),
    ],
)
def test_bad_input_is_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)
