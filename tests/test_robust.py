"Adversarial training: losses in closed form, steps against the algorithm written out, resuming, bad input."

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdnb.attacks import fgsm, pgd
from kdnb.data import Batches, load_data
from kdnb.evaluation import robust_accuracy
from kdnb.models import create_model
from kdnb.robust import PGDAT, TRADES, attacked, ready_attack, robust_validation, trades_loss
from kdnb.training import Supervised, accuracy, fit

torch.set_num_threads(1)
inner = partial(pgd, eps=0.1, step_size=0.03, steps=4)
kl = partial(inner, objective="kl", start="gaussian")
shapes = st.tuples(st.integers(1, 6), st.integers(2, 12))
seeds = st.integers(0, 2**31)


def draw(seed, shape):
    g = torch.Generator().manual_seed(seed)
    a, b = (4 * torch.randn(2, *shape, generator=g, dtype=torch.double)).unbind(0)
    return a, b, torch.randint(0, shape[1], shape[:1], generator=g)


def conv(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def mlp(seed=0):
    return create_model("mlp_24", in_channels=1, image_size=8, seed=seed)


# ---------------------------------------------------------------- the loss


@given(seeds, shapes, st.floats(0, 20))
def test_value_is_the_sum_over_classes(seed, shape, beta):
    clean, adv, y = draw(seed, shape)
    p, q = clean.softmax(1), adv.softmax(1)
    natural = -p.gather(1, y[:, None]).log().mean()
    boundary = (p * (p.log() - q.log())).sum(1).mean()
    by_hand, by_mean = natural + beta * boundary, natural + beta * boundary / shape[1]
    assert torch.isclose(trades_loss(adv, clean, y, beta), by_hand, rtol=1e-8)
    assert torch.isclose(trades_loss(adv, clean, y, beta, "mean"), by_mean, rtol=1e-8)


@given(seeds, shapes, st.floats(0, 20))
def test_gradients_are_the_closed_forms(seed, shape, beta):
    clean, adv, y = draw(seed, shape)
    loss = trades_loss(adv.requires_grad_(), clean.requires_grad_(), y, beta)
    to_clean, to_adv = torch.autograd.grad(loss, (clean, adv))
    p, q = clean.softmax(1), adv.softmax(1)
    gap = p.log() - q.log()
    pull = p * (gap - (p * gap).sum(1, keepdim=True))
    assert to_adv.allclose(beta * (q - p) / len(y), atol=1e-9)
    assert to_clean.allclose((p - F.one_hot(y, shape[1]) + beta * pull) / len(y), atol=1e-9)


def test_gradient_against_finite_differences():
    clean, adv, y = draw(0, (3, 5))
    clean, adv = (clean / 4).requires_grad_(), (adv / 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: trades_loss(b, a, y, 3.0), (clean, adv))


@given(seeds, shapes)
def test_no_second_term_where_both_agree_and_labels_stay_out_of_it(seed, shape):
    clean, adv, y = draw(seed, shape)
    assert torch.isclose(trades_loss(clean + 3, clean, y, 50.0), F.cross_entropy(clean, y), rtol=1e-8)
    other = (y + 1) % shape[1]
    second = [trades_loss(adv, clean, labels, 2.0) - F.cross_entropy(clean, labels) for labels in (y, other)]
    assert torch.isclose(*second, atol=1e-9)
    assert torch.isclose(second[0], 2 * F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="batchmean"))


# ---------------------------------------------------------------- what the steps reduce to


@pytest.mark.parametrize("net", [mlp, conv, lambda: nn.Sequential(conv(), nn.Dropout(0.3))])
def test_no_radius_is_supervised_training_to_the_bit(net):
    x, y = batch()
    idle = partial(inner, eps=0.0)
    methods = PGDAT(net(), attack=idle, lr=0.1, weight_decay=5e-4), Supervised(net(), lr=0.1)
    for method in methods:
        torch.manual_seed(1)
        for _ in range(3):
            method.step(x, y)
    assert same(methods[0].student, methods[1].student)


@pytest.mark.parametrize("net", [mlp, conv])
def test_no_beta_is_supervised_training(net):
    x, y = batch()
    trades = TRADES(net(), attack=kl, beta=0.0, lr=0.1, weight_decay=5e-4)
    plain = Supervised(net(), lr=0.1)
    for _ in range(3):
        trades.step(x, y), plain.step(x, y)
    for p, q in zip(trades.student.parameters(), plain.student.parameters(), strict=True):
        assert p.equal(q)


@settings(max_examples=20)
@given(seeds, st.floats(0.01, 0.2))
def test_a_linear_network_is_trained_on_its_margin(seed, eps):
    "The inner maximum in closed form: the margin less eps times the l1 norm of the weights' difference."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x, y = 0.3 + 0.4 * torch.rand(24, 1, 4, 4), torch.randint(0, 2, (24,))
    weight, bias = net[1].weight.detach().clone(), net[1].bias.detach()
    w = weight[1] - weight[0]
    margin = (2 * y - 1) * (x.flatten(1) @ w + bias[1] - bias[0]) - eps * w.abs().sum()
    method = PGDAT(net, attack=partial(pgd, eps=eps, steps=10), lr=0.5, momentum=0.0, weight_decay=0.0)
    assert torch.isclose(method.step(x, y)["loss"], F.softplus(-margin).mean(), atol=1e-5)
    signs = (2 * y - 1)[:, None] * (x.flatten(1) - eps * (2 * y - 1)[:, None] * w.sign())
    gradient = -(torch.sigmoid(-margin)[:, None] * signs).mean(0)  # in w; weights 1 and 0 get + and - of it
    assert (net[1].weight.detach() - weight)[1].allclose(-0.5 * gradient, atol=1e-5)


def shift(model, x, y):
    "A stand-in for an attack, without randomness."
    return (x + 0.05 * (x > 0.5)).clamp(0, 1)


@pytest.mark.parametrize("forwards", ["official", "two", "joint"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_trades_step_is_the_algorithm_written_out(forwards, reduction):
    x, y = batch()
    options = dict(forwards=forwards, reduction=reduction, beta=4.0, lr=0.1, momentum=0.0)
    method = TRADES(conv(), attack=shift, **options)
    net = conv().train()
    x_adv = shift(net, x, y)
    if forwards == "joint":
        clean, adv = net(torch.cat([x, x_adv])).split(len(x))
        reference = clean
    else:
        clean, adv = net(x), net(x_adv)
        reference = net(x) if forwards == "official" else clean
    kl_sum = (reference.softmax(1) * (reference.log_softmax(1) - adv.log_softmax(1))).sum() / len(x)
    loss = F.cross_entropy(clean, y) + 4.0 * kl_sum / (10 if reduction == "mean" else 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=2e-4)
    loss.backward()
    optimizer.step()
    assert torch.isclose(method.step(x, y)["loss"], loss, rtol=1e-5)
    for (name, a), b in zip(method.student.state_dict().items(), net.state_dict().values(), strict=True):
        assert a.allclose(b, atol=1e-6), name


# ---------------------------------------------------------------- what the attack may touch


def steps_seen(student):
    return next(m for m in student.modules() if isinstance(m, nn.BatchNorm2d)).num_batches_tracked.item()


@pytest.mark.parametrize("mode, extra", [(None, 0), ("eval", 0), ("train", 0), ("found", 1)])
def test_only_mode_found_moves_the_running_averages(mode, extra):
    x, y = batch()
    method = PGDAT(conv(), attack=inner, attack_mode=mode, lr=0.1)
    method.step(x, y)
    seen = steps_seen(method.student)
    assert seen == 1 if not extra else seen > 4  # each of the four gradient steps, and the images trained on
    assert method.student.training and all(m.training for m in method.student.modules())


@pytest.mark.parametrize("forwards, times", [("official", 3), ("two", 2), ("joint", 1)])
def test_how_often_a_trades_step_feeds_batchnorm(forwards, times):
    method = TRADES(conv(), attack=kl, forwards=forwards, lr=0.1)
    method.step(*batch())
    assert steps_seen(method.student) == times


@pytest.mark.parametrize("make", [partial(PGDAT, attack=inner), partial(TRADES, attack=kl)])
def test_the_attack_sees_the_student_before_the_step_and_leaves_no_gradient(make):
    x, y = batch()
    method, seen = make(conv(), lr=0.1), []
    attack = method.attack

    def spy(model, x, y):
        before = copy.deepcopy(model)
        x_adv = attack(model, x, y)
        assert model is method.student and same(before, model)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert not x_adv.requires_grad and (x_adv - x).abs().max() <= 0.1 + 1e-6
        seen.append(len(x_adv))
        return x_adv

    method.attack = spy
    losses = method.step(x, y)
    assert seen == [32] and not any(v.requires_grad for v in losses.values())
    assert all(p.grad is None for p in method.student.parameters())


def test_attack_in_double_precision_agrees_folded_and_not():
    x, y = batch()
    x = x.double()
    students = [conv().double() for _ in range(2)]
    for student in students:  # running averages away from their initial values
        student(x)
    images = []
    for student, fold in zip(students, (False, True), strict=True):
        torch.manual_seed(0)
        images.append(attacked(PGDAT(student, attack=inner, fold=fold, lr=0.1), x, y))
    assert images[0].allclose(images[1], atol=1e-6) and same(*students)
    assert (images[0] - x).abs().max() > 0.05


def test_fold_attacks_a_copy_without_batchnorm():
    seen = []
    def spy(model, x, y):
        seen.append(any(isinstance(m, nn.BatchNorm2d) for m in model.modules()))
        return x
    for make in (PGDAT, TRADES):
        for fold in (False, True):
            make(conv(), attack=spy, fold=fold, lr=0.1).step(*batch())
    assert seen == [True, False, True, False]


def test_folded_training_learns_as_well():
    data = load_data("digits")
    ends = []
    for fold in (False, True):
        method = PGDAT(conv(), attack=inner, fold=fold, lr=0.05)
        fit(method, Batches(data.train, 64), epochs=2, progress="off")
        ends.append(robust_accuracy(method.student, data.val, inner))
    assert min(ends) > 0.3 and abs(ends[0] - ends[1]) < 0.1


def test_attack_may_oppose_logits_instead_of_labels():
    x, y = batch()
    student, teacher = mlp(0), mlp(1)
    method = PGDAT(student, attack=partial(inner, objective="kl"), lr=0.1)
    with torch.no_grad():
        target = teacher(x)
        before = F.kl_div(student(x).log_softmax(1), target.softmax(1), reduction="batchmean")
        x_adv = attacked(method, x, target)
        assert F.kl_div(student(x_adv).log_softmax(1), target.softmax(1), reduction="batchmean") > before


@pytest.mark.parametrize("make", [partial(PGDAT, attack=inner), partial(TRADES, attack=kl)])
def test_bf16_steps_reach_every_parameter(make):
    "A cast cached without a graph inside the attack would silently stop the training of its weight."
    net = create_model("resnet8", in_channels=1, image_size=8, seed=0)
    before = [p.detach().clone() for p in net.parameters()]
    x, y = batch(64)
    fit(make(net, lr=0.1), [(x, y)], epochs=1, precision="bf16", progress="off")
    assert all(not p.equal(q) for p, q in zip(net.parameters(), before, strict=True))


# ---------------------------------------------------------------- validation, fit, resume


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", val_fraction=0.3)


def test_robust_validation_names_and_repeats_itself(digits):
    model = mlp()
    model.train()
    check = robust_validation(model, digits.val, inner, seed=4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = check()
    assert torch.get_rng_state().equal(state) and model.training
    torch.manual_seed(99)
    assert check() == first and check.attack_name == "pgd4-linf-0.1"
    assert list(first) == ["val_accuracy", "val_robust_accuracy"]
    assert first["val_accuracy"] == accuracy(model, digits.val)
    assert first["val_robust_accuracy"] == robust_accuracy(model, digits.val, inner, seed=4)
    assert first["val_robust_accuracy"] <= first["val_accuracy"]


def test_fit_keeps_the_epoch_of_the_best_robust_accuracy(digits):
    student = mlp()
    check = robust_validation(student, digits.val, inner)
    method = PGDAT(student, attack=inner, lr=0.1)
    history = fit(method, Batches(digits.train, 64), epochs=4, validate=check,
                  select="val_robust_accuracy", progress="off")
    best = max(history["val_robust_accuracy"])
    assert history["val_robust_accuracy"][history.best_epoch - 1] == best
    student.load_state_dict(history.best_state)
    assert check()["val_robust_accuracy"] == best


@pytest.mark.parametrize("make", [partial(PGDAT, attack=inner), partial(TRADES, attack=kl)])
def test_a_resumed_run_ends_in_the_same_bits(make, digits, tmp_path):
    "The random starts of the attack are part of the state."
    def run(**options):
        student = nn.Sequential(mlp(), nn.Dropout(0.1))
        check = robust_validation(student, digits.val, inner)
        fit(make(student, lr=0.05), Batches(digits.train, 64, seed=1), epochs=3, validate=check,
            select="val_robust_accuracy", progress="off", **options)
        return student

    whole = run()
    for stop in (5, 17, 0):  # in the first epoch, in the second, to the end
        parts = run(checkpoint=tmp_path / "run.pt", checkpoint_steps=3, max_steps=stop)
    assert same(whole, parts)


def test_a_checkpoint_of_another_attack_is_refused(digits, tmp_path):
    keep = dict(epochs=1, checkpoint=tmp_path / "run.pt", max_steps=2, progress="off")
    fit(PGDAT(mlp(), attack=inner, lr=0.05), Batches(digits.train, 64), **keep)
    with pytest.raises(ValueError, match="belongs to another run"):
        fit(PGDAT(mlp(), attack=partial(inner, eps=0.2), lr=0.05), Batches(digits.train, 64), **keep)


@pytest.mark.parametrize("make", [PGDAT, TRADES])
def test_the_schedule_moves_once_an_epoch(make, digits):
    halve = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    method = make(mlp(), attack=shift, lr=0.08, schedule=halve)
    history = fit(method, Batches(digits.train, 64), epochs=3, progress="off")
    assert history["lr"] == [0.08, 0.04, 0.02]


def test_training_against_attacks_helps_against_attacks(digits):
    recipe, left = dict(lr=0.05, weight_decay=2e-4), {}
    attack = partial(pgd, eps=0.15, steps=10)
    nearby = partial(attack, objective="kl", start="gaussian")
    scale = dict(in_channels=1, image_size=8, mean=digits.mean, std=digits.std)
    for make in (Supervised, partial(PGDAT, attack=attack), partial(TRADES, attack=nearby)):
        student = create_model("mlp_100", **scale, seed=0)
        method = make(student, **recipe)
        fit(method, Batches(digits.train, 64), epochs=12, progress="off")
        assert accuracy(student, digits.val) > 0.85
        left[type(method).__name__] = robust_accuracy(student, digits.val, attack)
    assert min(left["PGDAT"], left["TRADES"]) > left["Supervised"] + 0.2, left


# ---------------------------------------------------------------- bad input

zeros = torch.zeros(2, 3)
labels = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: trades_loss(zeros, zeros, labels, beta=-1), "beta must be >= 0, got -1"),
        (lambda: trades_loss(zeros, torch.zeros(2, 4), labels), "same shape"),
        (lambda: trades_loss(zeros, zeros, labels, reduction="sum"), "batchmean or mean, got 'sum'"),
        (lambda: TRADES(mlp(), beta=-0.5), "beta must be >= 0, got -0.5"),
        (lambda: TRADES(mlp(), reduction="none"), "batchmean or mean, got 'none'"),
        (lambda: TRADES(mlp(), forwards="three"), "official, two or joint, got 'three'"),
        (lambda: PGDAT(mlp(), attack_mode="evaluation"), "eval, train, found or None, got 'evaluation'"),
        (lambda: PGDAT(mlp(), attack_mode="found", fold=True), "fold=True needs .* eval mode, got 'found'"),
        (lambda: ready_attack(partial(fgsm, mode="train"), None, True), "got 'train'"),
        (lambda: PGDAT(mlp(), lr=0), "lr must be > 0, got 0"),
        (lambda: PGDAT(mlp(), attack=partial(inner, eps=-0.1)).step(*batch()), "eps must be >= 0, got -0.1"),
        (lambda: PGDAT(mlp(), attack=inner).step(2 * batch()[0], batch()[1]), r"\[0, 1\]"),
    ],
)
def test_bad_input_is_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_a_refused_method_leaves_the_student_alone():
    student = mlp().eval()
    with pytest.raises(ValueError):
        PGDAT(student, attack_mode="no")
    assert not student.training
