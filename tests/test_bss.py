"`kdnb.bss`: the attack in closed form, who is chosen, what each term weighs, boundaries compared, bad input."

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import Two, stream
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdnb.bss import (
    BSS,
    Boundary,
    Samples,
    ang_sim,
    boundary_similarity,
    bss_attack,
    bss_loss,
    bss_weights,
    find_boundary,
    mag_sim,
    sample_target,
    select_base,
)
from kdnb.data import Batches, load_data
from kdnb.kd import kd_loss
from kdnb.models import create_model
from kdnb.training import Supervised, fit

FREE = dict(low=-math.inf, high=math.inf)


def linear(classes=3, inputs=5, seed=0):
    "f(x) = Wx + b in float64."
    net = nn.Linear(inputs, classes).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(classes, inputs, generator=stream(seed), dtype=torch.float64))
        net.bias.copy_(torch.randn(classes, generator=stream(seed + 1), dtype=torch.float64))
    return net


def points(n=40, inputs=5, seed=2):
    return torch.randn(n, inputs, generator=stream(seed), dtype=torch.float64)


def height(net, x, base, target):
    with torch.no_grad():
        out = net(x)
    return (out.gather(1, base[:, None]) - out.gather(1, target[:, None]))[:, 0]


def start(net, x):
    "Points, the classes that net reads there, and the next class as target."
    with torch.no_grad():
        base = net(x).argmax(1)
    return x, base, (base + 1) % net(x[:1]).shape[1]


def digit_net(name="resnet8", seed=0):
    return create_model(name, num_classes=10, in_channels=1, image_size=8, seed=seed)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", val_fraction=0.2)


@pytest.fixture(scope="module")
def teacher(digits):
    "A small network that classifies digits, with batch norm."
    net = digit_net(seed=9)
    fit(Supervised(net, lr=0.1), Batches(digits.train, 64, seed=0), epochs=4, progress="off")
    return net.eval()


# ---------------------------------------------------------------- the attack


@pytest.mark.parametrize(("eta", "eps"), [(0.1, 1e-4), (0.3, 1e-4), (0.05, 0.5)])
def test_one_step_on_a_linear_model(eta, eps):
    net = linear()
    x, base, target = start(net, points())
    before = height(net, x, base, target)
    moved = bss_attack(net, x, base, target, eta=eta, eps=eps, steps=1, **FREE)
    steepness = (net.weight[base] - net.weight[target]).norm(dim=1).detach()
    wanted = before - eta * (before + eps) * steepness
    assert torch.allclose(height(net, moved.x, base, target), wanted, atol=1e-12)
    assert torch.allclose((moved.x - x).norm(dim=1), eta * (before + eps), atol=1e-12)


def test_boundary_rule_lands_within_its_overshoot():
    net = linear(classes=2)
    x, base, target = start(net, points())
    before = height(net, x, base, target)
    moved = bss_attack(net, x, base, target, rule="boundary", eta=1.02, eps=1e-4, **FREE)
    after = height(net, moved.x, base, target)
    assert moved.success.all() and (moved.iterations == 1).all()
    assert torch.allclose(after, before - 1.02 * (before + 1e-4), atol=1e-12)
    exact = bss_attack(net, x, base, target, rule="boundary", eta=1.0, eps=1e-6, **FREE)
    assert torch.allclose(height(net, exact.x, base, target), torch.full_like(before, -1e-6), atol=1e-12)
    shortest = before / (net.weight[base] - net.weight[target]).norm(dim=1)
    assert torch.allclose((exact.x - x).norm(dim=1), shortest, rtol=1e-3, atol=1e-5)


def test_lengths_are_measured_in_units():
    "A model that divides by std, asked in pixels, is the bare model asked in normalised pixels."
    std = torch.rand(5, generator=stream(3), dtype=torch.float64) + 0.5
    net = linear()
    scaled = nn.Sequential(net)
    scaled.register_forward_pre_hook(lambda module, inputs: inputs[0] / std)
    x, base, target = start(net, points())
    plain = bss_attack(net, x, base, target, steps=3, eta=0.05, **FREE)
    pixels = bss_attack(scaled, x * std, base, target, steps=3, eta=0.05, unit=std, **FREE)
    assert torch.allclose(plain.x, pixels.x / std, atol=1e-12)
    assert plain.iterations.equal(pixels.iterations) and plain.success.equal(pixels.success)


def test_unit_is_the_std_of_the_models_first_layer():
    net = create_model("mlp_8", in_channels=2, image_size=2, mean=(0.4, 0.5), std=(0.2, 0.3), seed=0).eval()
    x = torch.rand(30, 2, 2, 2, generator=stream(0))
    x, base, target = start(net, x)
    own = bss_attack(net, x, base, target, eta=0.02)
    told = bss_attack(net, x, base, target, eta=0.02, unit=torch.tensor([0.2, 0.3]).view(1, 2, 1, 1))
    other = bss_attack(net, x, base, target, eta=0.02, unit=1.0)
    assert own.x.equal(told.x) and not own.x.equal(other.x)


def test_who_has_left_never_moves_again():
    net = linear(classes=4)
    x, base, target = start(net, points(80))
    ends = [bss_attack(net, x, base, target, eta=0.15, steps=k, **FREE) for k in range(1, 9)]
    assert len({int(n) for n in ends[-1].iterations}) > 2
    for before, after in zip(ends, ends[1:], strict=False):
        rests = before.logits.argmax(1) != base
        assert before.x[rests].equal(after.x[rests]) and before.iterations[rests].equal(
            after.iterations[rests]
        )
        assert (after.iterations[~rests] == before.iterations[~rests] + 1).all()


def test_success_is_the_target_class_and_nothing_else():
    net = linear(classes=6, inputs=3, seed=4)
    x, base, target = start(net, points(300, inputs=3))
    found = bss_attack(net, x, base, target, eta=0.2, **FREE)
    answer = net(found.x).argmax(1)
    assert found.success.equal(answer == target)
    assert (height(net, found.x, base, target)[found.success] < 0).all()
    third = (answer != base) & (answer != target)
    assert third.any() and not found.success[third].any() and found.logits.equal(net(found.x).detach())


def test_rows_of_another_class_fail_and_rest():
    net = linear()
    x, base, _ = start(net, points())
    wrong, target = (base + 1) % 3, base
    found = bss_attack(net, x, wrong, target, **FREE)
    assert not found.success.any() and found.x.equal(x) and not found.iterations.any()


def test_zero_gradient_gives_no_nan():
    class Flat(nn.Module):
        def forward(self, x):
            return 0 * x[:, :3] + torch.tensor([3.0, 1.0, 0.0])

    x, base, target = torch.rand(4, 3), torch.zeros(4).long(), torch.ones(4).long()
    for rule in ("paper", "boundary"):
        found = bss_attack(Flat(), x, base, target, rule=rule)
        assert found.x.equal(x) and not found.success.any() and (found.iterations == 10).all()


def one_by_one(net, x, base, target, rule, eta, eps, steps):
    "The rule, spelled out for a single image."
    with torch.no_grad():
        if net(x).argmax() != base:
            return x
    for _ in range(steps):
        point = x.clone().requires_grad_()
        out = net(point)[0]
        gap = out[base] - out[target]
        (slope,) = torch.autograd.grad(gap, point)
        length = slope.norm() ** (2 if rule == "boundary" else 1)
        x = (x - eta * (gap.detach() + eps) * slope / length).clamp(0, 1)
        with torch.no_grad():
            if net(x).argmax() != base:
                break
    return x


@pytest.mark.parametrize(("rule", "eta"), [("paper", 0.05), ("paper", 0.3), ("boundary", 1.02)])
def test_batch_equals_one_by_one(rule, eta, digits, teacher):
    net = copy.deepcopy(teacher).double()
    x = digits.test.floats(slice(0, 40)).double()
    x, base, target = start(net, x)
    many = bss_attack(net, x, base, target, rule=rule, eta=eta)
    for i in range(len(x)):
        alone = one_by_one(net, x[i : i + 1], base[i], target[i], rule, eta, 1e-4, 10)
        assert torch.allclose(many.x[i : i + 1], alone, atol=1e-9)
    assert many.success.any() and (many.iterations >= 1).all()


def test_stays_in_the_box_and_leaves_the_model(digits, teacher):
    net = copy.deepcopy(teacher).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = digits.test.floats(slice(0, 30)), digits.test.y[:30]
    found = bss_attack(net, x, y, (y + 1) % 10, eta=3.0)
    assert found.x.min() >= 0 and found.x.max() <= 1 and not found.x.requires_grad
    assert net.training and all(v.equal(before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_no_images():
    net = linear()
    none = torch.zeros(0).long()
    found = bss_attack(net, points(0), none, none)
    assert found.x.shape == (0, 5) and found.success.shape == (0,)


# ---------------------------------------------------------------- bases and targets


def test_select_base_by_hand():
    teacher_logits = torch.tensor([[4.0, 0, 0], [4, 0, 0], [4, 0, 0], [0, 4, 0], [4, 0, 0]])
    student_logits = torch.tensor([[4.0, 0, 0], [4, 3, 0], [4, 0, 2], [4, 0, 0], [0, 4, 0]])
    y = torch.zeros(5).long()
    assert select_base(student_logits, teacher_logits, y, 64).tolist() == [0, 1, 2]
    assert select_base(student_logits, teacher_logits, y, 2).tolist() == [1, 2]
    assert select_base(student_logits, teacher_logits, y, 1).tolist() == [1]
    assert select_base(student_logits, teacher_logits, torch.full((5,), 2), 2).tolist() == []
    assert select_base(student_logits[:1], teacher_logits[:1], y[:1], 3).tolist() == [0]


@given(st.integers(0, 1000), st.integers(1, 40))
def test_select_base_properties(seed, limit):
    g = stream(seed)
    s, t = torch.randn(30, 4, generator=g), torch.randn(30, 4, generator=g)
    y = torch.where(torch.rand(30, generator=g) < 0.7, t.argmax(1), 0)
    both = (s.argmax(1) == y) & (t.argmax(1) == y)
    for how in ("gap", "random"):
        rows = select_base(s, t, y, limit, how)
        assert both[rows].all() and len(rows) == min(limit, int(both.sum())) == len(set(rows.tolist()))
    gap = (t.softmax(1) - s.softmax(1)).square()
    gap[torch.arange(30), y] = 0
    rows = select_base(s, t, y, limit)
    left = both.clone()
    left[rows] = False
    if left.any():
        assert gap.sum(1)[rows].min() >= gap.sum(1)[left].max() - 1e-6


def test_target_frequencies():
    q = torch.tensor([0.6, 0.2, 0.15, 0.05])
    draws = sample_target(q.log().expand(100_000, 4), torch.zeros(100_000).long(), generator=stream(0))
    counts = torch.bincount(draws, minlength=4).double()
    expected = torch.tensor([0.0, 0.5, 0.375, 0.125], dtype=torch.float64) * 100_000
    assert counts[0] == 0
    chi_square = ((counts - expected)[1:] ** 2 / expected[1:]).sum()
    assert chi_square < 13.8  # 2 degrees of freedom, p = .001


@given(st.integers(0, 1000))
def test_target_is_never_the_base(seed):
    g = stream(seed)
    logits = 200 * torch.randn(20, 5, generator=g)  # so sure that all other probabilities underflow
    base = torch.where(
        torch.rand(20, generator=g) < 0.5, logits.argmax(1), torch.randint(0, 5, (20,), generator=g)
    )
    for how in ("sampled", "likeliest", "uniform"):
        assert (sample_target(logits, base, how) != base).all()
    second = logits.scatter(1, base[:, None], -math.inf).argmax(1)
    assert sample_target(logits, base, "likeliest").equal(second)


def test_uniform_targets():
    draws = sample_target(
        torch.tensor([[9.0, 5, 0, 0]]).expand(9000, 4), torch.ones(9000).long(), "uniform", stream(0)
    )
    counts = torch.bincount(draws, minlength=4)
    assert counts[1] == 0 and (counts[[0, 2, 3]] - 3000).abs().max() < 200


# ---------------------------------------------------------------- losses and weights


def test_loss_is_entropy_where_both_agree():
    t = torch.randn(8, 10, generator=stream(0), dtype=torch.float64)
    s = t.clone().requires_grad_()
    loss = bss_loss(s, t)
    p = (t / 3).softmax(1)
    assert loss.item() == pytest.approx(-(p * p.log()).sum(1).mean().item()) and loss > 0.5
    (gradient,) = torch.autograd.grad(loss, s)
    assert gradient.abs().max() < 1e-15
    assert bss_loss(t, t, form="kl").item() == pytest.approx(0, abs=1e-12)


def test_loss_forms():
    s, t = (torch.randn(8, 10, generator=stream(k), dtype=torch.float64) for k in (0, 1))
    s.requires_grad_()
    ce, kl = bss_loss(s, t, 2.0), bss_loss(s, t, 2.0, "kl")
    assert 4 * kl.item() == pytest.approx(kd_loss(s, t, 2.0).item())
    (a,), (b,) = torch.autograd.grad(ce, s), torch.autograd.grad(kl, s)
    assert torch.allclose(a, b)
    assert torch.allclose(a, ((s / 2).softmax(1) - (t / 2).softmax(1)) / (2 * 8))
    assert ce.item() == pytest.approx(F.cross_entropy(s / 2, (t / 2).softmax(1)).item())


def test_half_precision_counts_in_full():
    s, t = (3 * torch.randn(8, 10, generator=stream(k)).bfloat16() for k in (0, 1))
    assert bss_loss(s, t).item() == bss_loss(s.float(), t.float()).item()
    base = torch.zeros(8, dtype=torch.int64)
    drawn = [sample_target(v, base, generator=stream(0)) for v in (t, t.float())]
    assert drawn[0].equal(drawn[1])


def test_loss_of_nothing_is_zero():
    s = torch.zeros(0, 10, requires_grad=True)
    loss = bss_loss(s, torch.zeros(0, 10))
    loss.backward()
    assert loss == 0 and s.grad.shape == (0, 10)


def test_weights_at_known_epochs():
    found = {e: bss_weights(e, 80) for e in range(1, 81)}
    assert found[1] == pytest.approx((3.9625, 2 * (1 - 1 / 60)))
    assert found[40][0] == pytest.approx(2.5) and found[80][0] == 1
    assert found[30][1] == pytest.approx(1.0)
    assert all(found[e][1] == pytest.approx(0, abs=1e-12) for e in range(60, 81)) and found[59][1] > 0


# ---------------------------------------------------------------- the method


def test_step_is_the_sum_of_its_terms(digits, teacher):
    torch.manual_seed(0)
    x, y = digits.train.floats(slice(0, 200)), digits.train.y[:200]
    student, seen = digit_net(seed=1), {}

    def spy(model, x, base, target):
        seen.update(samples=bss_attack(model, x, base, target), base=base, mode=model.training, target=target)
        return seen["samples"]

    method = BSS(student, teacher, epochs=80, attack=spy, attack_size=24, fold=False, lr=1e-6)
    method.start_epoch(29)
    copied = copy.deepcopy(student)
    found = method.step(x, y)
    with torch.no_grad():
        s, t = copied(x), teacher(x)
        kept = seen["samples"].success
        boundary = bss_loss(copied(seen["samples"].x[kept]), teacher(seen["samples"].x[kept]))
    assert 1 <= kept.sum() <= len(kept) <= 24 and seen["base"].equal(y[select_base(s, t, y, 24)])
    assert not seen["mode"] and (seen["target"] != seen["base"]).all()
    hard, soft = F.cross_entropy(s, y), bss_loss(s, t)
    assert found["boundary"].item() == pytest.approx(boundary.item(), rel=1e-4)
    alpha, beta = bss_weights(30, 80)
    assert found["loss"].item() == pytest.approx((hard + alpha * soft + beta * boundary).item(), rel=1e-4)
    assert found["landed"].item() == pytest.approx(kept.float().mean().item())


@pytest.mark.parametrize("fold", [False, True])
def test_teacher_is_untouched(fold, digits, teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.requires_grad_(True)
    method = BSS(digit_net(seed=1), teacher, epochs=4, fold=fold, attack_size=8)
    folded = not any(isinstance(m, nn.BatchNorm2d) for m in method.teacher.modules())
    asked = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    method.step(digits.train.floats(slice(0, 32)), digits.train.y[:32])
    assert folded is fold and (method.teacher is teacher) is not fold
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items())
    assert all(v.equal(asked[k]) for k, v in method.teacher.state_dict().items())
    for net in (teacher, method.teacher):
        assert not net.training and not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_choices_reach_their_functions(monkeypatch, digits, teacher):
    import kdnb.bss

    asked = {}

    def spy(name, call):
        def told(*args, **options):
            asked[name] = args[-1]
            return call(*args, **options)

        return told

    method = BSS(digit_net(seed=1), teacher, epochs=4, attack_size=8, base="random", target="uniform")
    for name, call in (("select_base", select_base), ("sample_target", sample_target)):
        monkeypatch.setattr(kdnb.bss, name, spy(name, call))
    method.step(digits.train.floats(slice(0, 200)), digits.train.y[:200])
    assert asked == {"select_base": "random", "sample_target": "uniform"}


def test_random_bases_differ():
    logits = torch.eye(10)
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        drawn.append(set(select_base(logits, logits, torch.arange(10), 5, "random").tolist()))
    assert drawn[0] != drawn[1]


def test_step_is_sgd_on_the_written_loss(digits, teacher):
    x, y = digits.train.floats(slice(0, 64)), digits.train.y[:64]
    chosen = dict(temperature=2.0, form="kl", lr=0.05, momentum=0.5, weight_decay=0.01)
    method = BSS(digit_net(seed=1), teacher, epochs=4, fold=False, attack=None, **chosen)
    by_hand = digit_net(seed=1).train()
    alpha, _ = bss_weights(1, 4)
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.05, 0.5, weight_decay=0.01)
    for _ in range(2):
        method.step(x, y)
        logits = by_hand(x)
        with torch.no_grad():
            answers = teacher(x)
        (F.cross_entropy(logits, y) + alpha * kd_loss(logits, answers, 2.0) / 4).backward()
        optimizer.step(), optimizer.zero_grad()
    for ours, wanted in zip(method.student.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_one_lone_sample_is_left_out(count, teacher, digits):
    "Batch normalisation in training mode has no statistics of one sample of one pixel."
    x, y = digits.train.floats(slice(0, 32)), digits.train.y[:32]

    def few(model, x, base, target):
        arrived = torch.arange(len(base)) < count
        return Samples(x, arrived, base, model(x).detach())

    student = digit_net(seed=9)
    fit(Supervised(student, lr=0.1), Batches(digits.train, 64, seed=0), epochs=1, progress="off")
    found = BSS(student, teacher, epochs=4, attack=few).step(x, y)
    assert (found["boundary"] > 0).item() is (count > 1) and found["landed"] > 0


def test_a_label_that_is_no_class_is_never_a_base():
    "Cross-entropy leaves -100 out; so does the choice of bases."
    rows = select_base(torch.eye(5), torch.eye(5), torch.tensor([0, 1, 2, 3, -100]), 3).tolist()
    assert len(rows) == 3 and 4 not in rows


def test_folded_teacher_answers_alike(digits, teacher):
    x, y = digits.train.floats(slice(0, 32)), digits.train.y[:32]
    rows = []
    for fold in (False, True):
        torch.manual_seed(0)
        rows.append(BSS(digit_net(seed=1), teacher, epochs=4, fold=fold, attack_size=8).step(x, y))
    assert rows[0].keys() == rows[1].keys()
    assert all(rows[0][k].item() == pytest.approx(rows[1][k].item(), rel=1e-3, abs=1e-5) for k in rows[0])


@pytest.mark.parametrize("case", ["no attack", "faded", "nobody is right"])
def test_without_samples_the_term_is_zero(case, digits, teacher):
    x, y = digits.train.floats(slice(0, 32)), digits.train.y[:32]
    calls = []

    def spy(*args):
        calls.append(args)
        return bss_attack(*args)

    method = BSS(digit_net(seed=1), teacher, epochs=80, attack=None if case == "no attack" else spy)
    if case == "faded":
        method.start_epoch(60)
    if case == "nobody is right":
        y = (teacher(x).argmax(1) + 1) % 10
    found = method.step(x, y)
    assert not calls and found["boundary"] == 0 and found["loss"].isfinite()


def test_failed_samples_are_dropped_or_kept(digits, teacher):
    x, y = digits.train.floats(slice(0, 32)), digits.train.y[:32]

    def failing(model, x, base, target):
        return Samples(x, torch.zeros_like(base, dtype=torch.bool), base, model(x).detach())

    losses = {}
    for variant in ("paper", "official"):
        losses[variant] = BSS(digit_net(seed=1), teacher, epochs=4, variant=variant, attack=failing).step(
            x, y
        )
    assert losses["paper"]["boundary"] == 0 and losses["official"]["boundary"] > 0
    assert losses["paper"]["landed"] == losses["official"]["landed"] == 0


def test_official_variant_cuts_where_its_code_cuts():
    told = {}

    def bss_attack(model, x, base, target, **limits):  # the switch goes by this name
        told.update(limits)
        return Samples(x, torch.zeros_like(base, dtype=torch.bool), base, model(x).detach())

    def limits(teacher):
        student = create_model("mlp_8", in_channels=1, image_size=2, seed=1)
        method = BSS(student, teacher, epochs=4, variant="official", attack=bss_attack)
        method.attack(method.teacher, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), torch.tensor([1, 0]))
        return float(told["low"]), float(told["high"])

    net = create_model("mlp_8", in_channels=1, image_size=2, mean=[0.5], std=[0.1], seed=0)
    assert limits(net) == pytest.approx((0.25, 0.75))
    assert limits(nn.Sequential(nn.Flatten(), nn.Linear(4, 10))) == (-2.5, 2.5)
    assert BSS(digit_net(), digit_net(), epochs=4).attack is globals()["bss_attack"]


@pytest.mark.parametrize(
    ("variant", "every", "kept"), [("paper", 1, True), ("official", 1, False), ("official", 2, True)]
)
def test_momentum_at_a_drop_of_the_rate(variant, every, kept, digits, teacher):
    drop = partial(torch.optim.lr_scheduler.StepLR, step_size=every)
    method = BSS(digit_net(seed=1), teacher, epochs=4, variant=variant, schedule=drop)
    method.step(digits.train.floats(slice(0, 32)), digits.train.y[:32])
    assert method.optimizer.state
    method.schedule.step()
    method.start_epoch(1)
    assert bool(method.optimizer.state) is kept


def test_resume_is_bit_identical(tmp_path, digits, teacher):
    part = digits.train.subset(torch.arange(96))

    def run(max_steps=0, checkpoint=None):
        method = BSS(digit_net(seed=1), teacher, epochs=3, attack_size=8)
        fit(
            method,
            Batches(part, 32, seed=0),
            epochs=3,
            seed=0,
            progress="off",
            checkpoint=checkpoint,
            max_steps=max_steps,
        )
        return method.student.state_dict()

    whole = run()
    run(max_steps=4, checkpoint=tmp_path / "half.pt")
    resumed = run(checkpoint=tmp_path / "half.pt")
    assert all(v.equal(resumed[k]) for k, v in whole.items())


def test_the_same_method_resumes_its_own_checkpoint(tmp_path, digits, teacher):
    "What changes from epoch to epoch is no part of what a checkpoint must agree with."
    part = digits.train.subset(torch.arange(96))
    method = BSS(digit_net(seed=1), teacher, epochs=3, attack_size=8)
    plan = dict(epochs=3, seed=0, progress="off", checkpoint=tmp_path / "half.pt")
    fit(method, Batches(part, 32, seed=0), max_steps=4, **plan)
    assert len(fit(method, Batches(part, 32, seed=0), **plan)) == 3


def test_bfloat16(digits, teacher):
    method = BSS(digit_net(seed=1), teacher, epochs=4, attack_size=8)
    with torch.autocast("cpu", torch.bfloat16):
        found = method.step(digits.train.floats(slice(0, 32)), digits.train.y[:32])
    assert all(v.isfinite() for v in found.values())


def test_samples_move_the_students_boundary(digits, teacher):
    "Few images: with samples the student's boundaries are more like the teacher's in direction."
    few, x, y = digits.train.subset(torch.arange(100)), digits.val.floats(slice(0, 60)), digits.val.y[:60]
    of_teacher, alike = find_boundary(teacher, x, y), {}
    for attack in (None, bss_attack):
        method = BSS(digit_net(seed=1), teacher, epochs=25, attack=attack, attack_size=16, lr=0.05)
        fit(method, Batches(few, 50, seed=0), epochs=25, seed=0, progress="off")
        alike[attack] = boundary_similarity(find_boundary(method.student.eval(), x, y), of_teacher)
    assert alike[bss_attack]["ang_sim"] > alike[None]["ang_sim"] + 0.02


# ---------------------------------------------------------------- boundaries compared


def shifts(n=6, seed=0):
    return torch.randn(n, 2, 3, generator=stream(seed), dtype=torch.float64)


@given(st.floats(0.01, 100))
def test_similarity_identities(c):
    a = shifts()
    ones = torch.ones(6, dtype=torch.float64)
    assert torch.allclose(mag_sim(a, c * a), min(c, 1 / c) * ones) and torch.allclose(ang_sim(a, c * a), ones)
    assert torch.allclose(mag_sim(a, -a), ones) and torch.allclose(ang_sim(a, -a), -ones)
    b = shifts(seed=1)
    assert torch.allclose(mag_sim(a, b), mag_sim(b, a)) and torch.allclose(ang_sim(a, b), ang_sim(b, a))
    assert (mag_sim(a, b) <= 1).all() and (ang_sim(a, b).abs() <= 1).all()


def test_angles_stay_in_range():
    a = torch.randn(2000, 50, generator=stream(0))
    assert ang_sim(a, a).max() <= 1 and ang_sim(a, -a).min() >= -1 and ang_sim(1e-25 * a, a).abs().max() <= 1


def test_similarity_of_nothing_is_no_nan():
    a, zero = shifts(), torch.zeros_like(shifts())
    assert mag_sim(a, zero).equal(torch.zeros(6).double()) and ang_sim(a, zero).equal(torch.zeros(6).double())
    assert mag_sim(zero, zero).equal(torch.ones(6).double()) and ang_sim(zero, zero).equal(
        torch.zeros(6).double()
    )


def test_boundaries_of_linear_models():
    "The shortest path to a plane: its length and its direction are known."
    net = linear(classes=3)
    x, base, _ = start(net, points())
    found = find_boundary(net, x, base, eta=1.0, eps=1e-9, batch_size=7, **FREE)
    assert not found.success[torch.arange(len(x)), base].any()
    for k in range(3):
        rows = found.success[:, k]
        normal = (net.weight[base] - net.weight[k]).detach()[rows]
        wanted = (
            -normal * (height(net, x, base, torch.full_like(base, k))[rows] / normal.square().sum(1))[:, None]
        )
        assert rows.any() and torch.allclose(found.shift[rows, k], wanted, atol=1e-6)


def test_a_network_is_like_itself_and_doubling_weights_changes_nothing(digits, teacher):
    net = copy.deepcopy(teacher)
    x, y = digits.test.floats(slice(0, 30)), digits.test.y[:30]
    own = find_boundary(net, x, y)
    same = boundary_similarity(own, own)
    assert (
        same["mag_sim"] == pytest.approx(1)
        and same["ang_sim"] == pytest.approx(1)
        and 0.2 < same["ways"] <= 1
    )
    with torch.no_grad():
        net.linear.weight.mul_(2), net.linear.bias.mul_(2)
    sharper = boundary_similarity(own, find_boundary(net, x, y))
    assert sharper["mag_sim"] > 0.99 and sharper["ang_sim"] > 0.99
    untrained = digit_net("mlp_16", seed=3).eval()
    theirs = find_boundary(untrained, x, untrained(x).argmax(1))
    assert boundary_similarity(find_boundary(net, x, net(x).argmax(1)), theirs)["ang_sim"] < 0.3


def test_only_attacks_that_succeed_on_both_count():
    shift = torch.zeros(2, 3, 4)
    shift[0, 1], shift[1, 2] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 2.0, 0, 0])
    a = Boundary(shift, torch.tensor([[False, True, False], [False, False, True]]))
    b = Boundary(-shift / 2, torch.tensor([[False, True, False], [False, False, False]]))
    assert boundary_similarity(a, b) == pytest.approx({"mag_sim": 0.5, "ang_sim": -1, "ways": 0.25})


# ---------------------------------------------------------------- bad input

NET = linear()
X = points(2)
B, K = torch.tensor([0, 1]), torch.tensor([1, 2])
Z = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: bss_attack(NET, X, B, torch.tensor([1, 1])), "target must differ from base, row 1 does not"),
        (
            lambda: bss_attack(NET, X, B, K[:1]),
            r"base and target and images must be \(B,\), B images, got shape \(2,\) and shape \(1,\)",
        ),
        (lambda: bss_attack(NET, X, B, K, eta=0.0), "eta must be > 0, got 0.0"),
        (lambda: bss_attack(NET, X, B, K, eta=math.nan), "eta must be > 0, got nan"),
        (lambda: bss_attack(NET, X, B, K, eps=-1.0), "eps must be >= 0, got -1.0"),
        (lambda: bss_attack(NET, X, B, K, steps=0), "steps must be a whole number >= 1, got 0"),
        (lambda: bss_attack(NET, X, B, K, steps=2.5), "steps must be a whole number >= 1, got 2.5"),
        (lambda: bss_attack(NET, X, B, K, rule="deepfool"), "rule must be paper or boundary, got 'deepfool'"),
        (lambda: bss_attack(NET, X, B, K + 1), r"target must lie in \[0, 3\), got 2 to 3"),
        (lambda: bss_attack(nn.Flatten(0), X, B, K), r"logits of shape \(2, K\), got shape \(10,\)"),
        (lambda: bss_attack(NET, X.long(), B, K), "x must hold finite floats, got torch.int64"),
        (lambda: bss_attack(NET, X * math.nan, B, K), "x must hold finite floats, got NaN or inf"),
        (lambda: sample_target(Z[:, :1], torch.zeros(2).long()), "K must be a whole number >= 2, got 1"),
        (lambda: bss_loss(Z, Z, math.nan), "temperature must be > 0, got nan"),
        (lambda: find_boundary(NET, X, B[:1]), r"N images, got shape \(1,\) and shape \(2,\)"),
        (lambda: select_base(Z, Z, B, 0), "limit must be a whole number >= 1, got 0"),
        (lambda: select_base(Z, Z, B, how="best"), "how must be gap or random, got 'best'"),
        (lambda: select_base(Z, torch.zeros(2, 4), B), r"must have the same shape \(B, K\), got"),
        (lambda: sample_target(Z, B, "first"), "how must be sampled, likeliest or uniform, got 'first'"),
        (lambda: sample_target(Z, B + 2), r"base must lie in \[0, 3\), got 2 to 3"),
        (lambda: bss_loss(Z, Z, 0.0), "temperature must be > 0, got 0.0"),
        (lambda: bss_loss(Z, Z, form="mse"), "form must be ce or kl, got 'mse'"),
        (lambda: bss_loss(Z, torch.zeros(2, 4)), r"same shape \(B, K\), got shape \(2, 3\) and"),
        (lambda: bss_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), r"same shape \(B, K\), got shape"),
        (lambda: BSS(linear(), NET, epochs=4, lr=math.nan), "lr must be > 0, got nan"),
        (lambda: BSS(linear(), NET, epochs=4, temperature="3"), "temperature must be a number > 0, got '3'"),
        (lambda: BSS(linear(), NET, epochs=2.5), "epochs must be a whole number >= 1, got 2.5"),
        (lambda: find_boundary(NET, X, B, batch_size=0), "batch_size must be a whole number >= 1, got 0"),
        (lambda: bss_attack(NET, X, B, K, eps=math.nan), "eps must be >= 0, got nan"),
        (lambda: bss_attack(NET, X, B, K, unit=math.nan), "unit must be > 0, got nan"),
        (lambda: bss_attack(NET, X, B, K, low=math.nan), "low must be <= high, got nan and 1.0"),
        (lambda: bss_weights(0, 80), r"epoch must be a whole number in \[1, 80\], got 0"),
        (
            lambda: BSS(linear(), NET, epochs=4, variant="code"),
            "variant must be paper or official, got 'code'",
        ),
        (lambda: BSS(linear(), NET, epochs=0), "epochs must be a whole number >= 1, got 0"),
        (lambda: BSS(linear(), NET, epochs=4, attack_size=0), "attack_size must be a whole number >= 1"),
        (lambda: BSS(linear(), NET, epochs=4, temperature=-1.0), "temperature must be > 0, got -1.0"),
        (lambda: mag_sim(shifts(), shifts(3)), r"must have the same shape \(N, ...\)"),
        (lambda: select_base(Z, Z, B[:1]), r"must hold one label a row, got shape \(1,\) and shape \(2,\)"),
        (lambda: find_boundary(NET, X[:0], B[:0]), "number_of_images must be a whole number >= 1, got 0"),
        (
            lambda: boundary_similarity(Boundary(Z, Z > 0), Boundary(Z, Z > 0)),
            "no attack succeeded on both networks",
        ),
        (
            lambda: boundary_similarity(Boundary(Z, Z > 0), Boundary(Z, torch.zeros(2, 4) > 0)),
            r"must be of the same \(N, K\), got shape \(2, 3\) and shape \(2, 4\)",
        ),
    ],
)
def test_bad_input_is_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- what is there changes nothing


def leftover(*modules):
    "A gradient as a foreign loop leaves it behind."
    for p in (p for m in modules for p in m.parameters()):
        p.grad = torch.full_like(p, 3.0)


def test_leftover_gradients_never_enter(digits, teacher):
    x, y, ends = digits.train.floats(slice(0, 32)), digits.train.y[:32], []
    for left in (False, True):
        torch.manual_seed(0)
        student, other = digit_net(seed=1), copy.deepcopy(teacher).requires_grad_()
        if left:
            leftover(student, other)
        method = BSS(student, other, epochs=4, attack_size=8)
        method.step(x, y), method.step(x, y)
        ends.append(student.state_dict())
    assert all(v.equal(ends[1][k]) for k, v in ends[0].items())


def test_a_batch_norm_that_its_owner_froze_stays(digits, teacher):
    student = digit_net(seed=1)
    still = student.stem[1].eval().requires_grad_(False)
    before = copy.deepcopy(still.state_dict())
    BSS(student, teacher, epochs=4).step(digits.train.floats(slice(0, 32)), digits.train.y[:32])
    assert not still.training and student.training
    assert all(v.equal(before[k]) for k, v in still.state_dict().items())


def test_networks_that_share_modules_are_refused():
    student, other = digit_net(), digit_net(seed=1)
    other.stage1 = student.stage1
    for theirs in (student, other):
        with pytest.raises(ValueError, match="student and teacher share"):
            BSS(student, theirs, epochs=4)


@pytest.mark.parametrize("form", ["ce", "kl"])
def test_the_loss_under_autocast_and_compiled(form):
    s, t = (3 * torch.randn(8, 10, generator=stream(k)) for k in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert bss_loss(s.bfloat16(), t.bfloat16(), 30.0, form).equal(
            bss_loss(s.bfloat16().float(), t.bfloat16().float(), 30.0, form)
        )
    torch._dynamo.reset()
    compiled = torch.compile(bss_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, t, 3.0, form), bss_loss(s, t, 3.0, form))


@pytest.mark.parametrize("measure", [mag_sim, ang_sim])
def test_similarities_are_at_least_float32_and_compile(measure):
    a, b = (torch.randn(6, 2, 3, generator=stream(k)).bfloat16() for k in (0, 1))
    assert measure(a, b).equal(measure(a.float(), b.float()))
    torch._dynamo.reset()
    compiled = torch.compile(measure, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), measure(a, b))
    assert measure(a * math.nan, b).isnan().all()  # NaN is like nothing


@pytest.mark.parametrize("form", ["ce", "kl"])
def test_a_masked_class_counts_nothing(form):
    s, t = (torch.randn(8, 10, generator=stream(k), dtype=torch.float64) for k in (0, 1))
    wanted = bss_loss(s[:, 1:], t[:, 1:], form=form)
    s[:, 0] = t[:, 0] = -math.inf
    s.requires_grad_()
    loss = bss_loss(s, t, form=form)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    assert s.grad.isfinite().all()


def test_a_step_in_bfloat16_counts_its_losses_in_full(digits, teacher):
    method = BSS(digit_net(seed=1), teacher, epochs=4, attack_size=8)
    with torch.autocast("cpu", torch.bfloat16):
        found = method.step(digits.train.floats(slice(0, 32)), digits.train.y[:32])
    assert all(v.dtype == torch.float32 for v in found.values())


def test_float64_stays_float64(digits, teacher):
    "Images in float32, as data gives them, and in float64."
    net, x, y = copy.deepcopy(teacher).double(), digits.test.floats(slice(0, 8)), digits.test.y[:8]
    found = [find_boundary(net, v, y) for v in (x, x.double())]
    assert all(f.shift.dtype == torch.float64 and f.success.any() for f in found)
    assert found[0].shift.equal(found[1].shift)
    losses = BSS(digit_net(seed=1).double(), net, epochs=4).step(x, y)
    assert all(losses[k].dtype == torch.float64 for k in ("loss", "hard", "soft", "boundary"))


def test_a_model_that_gives_more_than_logits_is_refused(digits, teacher):
    x, y = digits.train.floats(slice(0, 32)), digits.train.y[:32]
    for call in (
        lambda: BSS(Two(digit_net()), teacher, epochs=4).step(x, y),
        lambda: BSS(digit_net(), Two(copy.deepcopy(teacher)), epochs=4).step(x, y),
        lambda: find_boundary(Two(teacher), x, y),
        lambda: bss_attack(Two(teacher), x, y, (y + 1) % 10),
    ):
        with pytest.raises(ValueError, match="the model must return logits of shape .*, got a tuple; wrap"):
            call()


def test_an_attack_reads_the_device_once_before_its_steps(monkeypatch):
    "What is in order costs one look at the labels, not one a rule."
    looks, real = [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: looks.append(self) or real(self))
    bss_attack(NET, X, B, K, steps=1)
    assert len(looks) == 1


def test_attack_size_is_of_the_whole_run(monkeypatch, digits, teacher):
    sizes = []

    def spy(model, x, base, target):
        sizes.append(len(x))
        return bss_attack(model, x, base, target)

    method = BSS(copy.deepcopy(teacher).requires_grad_(), teacher, epochs=4, attack=spy, attack_size=8)
    x, y = digits.train.floats(slice(0, 64)), digits.train.y[:64]
    method.step(x, y)
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    method.step(x, y)
    assert sizes == [8, 4]
    with pytest.raises(ValueError, match="7 images cannot be shared by 2 processes"):
        BSS(copy.deepcopy(teacher).requires_grad_(), teacher, epochs=4, attack_size=7).step(x, y)
