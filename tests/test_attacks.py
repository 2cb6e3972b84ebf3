"""Attacks against what is known without them: closed forms, torchattacks, the ball, and a model that must not
change. A broken attack looks like a robust network, so nearly every test here is about failing quietly.
"""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import same, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdnb.attacks import attack_name, bim, cw, fgsm, frozen, pgd, project
from kdnb.models import create_model, fold_batchnorm

EPS = 8 / 255


def pictures(n=16, channels=3, size=16, seed=0):
    "Noise on a colour: no two alike."
    colour, noise = (torch.rand(n, channels, s, s, generator=stream(seed)) for s in (1, size))
    return 0.6 * colour + 0.4 * noise


def labels(n=16, classes=10, seed=1):
    return torch.randint(0, classes, (n,), generator=stream(seed))


def linear(pixels, classes, scale=1.0, seed=0):
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()
    for p in model.parameters():
        p.data = scale * torch.randn(p.shape, generator=stream(seed), dtype=torch.double)
    return model


def shake(model, seed=0):
    "Statistics and weights of batch norm as after some training."
    g = stream(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3, generator=g)
            m.running_var.uniform_(0.5, 2, generator=g)
            m.weight.data.uniform_(0.5, 1.5, generator=g)
            m.bias.data.normal_(0, 0.2, generator=g)
    return model


def convnet(name="resnet8", seed=0):
    "Random weights, and yet every class is somebody's answer, by a small margin."
    model = shake(create_model(name, seed=seed)).eval()
    with torch.no_grad():
        spread, mean = torch.std_mean(model(pictures(64, size=32 if name[:3] == "mlp" else 16, seed=9)), 0)
        model.linear.bias.sub_(mean).div_(spread)
        model.linear.weight.div_(spread[:, None])
    return model


def answers(model, x):
    with torch.no_grad(), frozen(model):
        return model(x).argmax(1)


def lengths(delta, norm="l2"):
    delta = delta.flatten(1)
    return delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)


ATTACKS = {
    "fgsm": fgsm,
    "bim": partial(bim, steps=2),
    "pgd": partial(pgd, steps=2, restarts=2),
    "pgd-kl": partial(pgd, steps=2, objective="kl", start="gaussian"),
    "pgd-l2": partial(pgd, steps=2, norm="l2", eps=0.5),
    "cw-linf": partial(cw, norm="linf", steps=2),
    "cw-l2": partial(cw, steps=3, searches=2),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


# ---------------------------------------------------------------- closed forms


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.floats(1e-3, 0.2), st.sampled_from(["zero", "random", "gaussian"]))
def test_linear_models_lose_exactly_what_paper_says(seed, eps, start):
    "Two classes: the margin falls by eps |w|_1 in linf and by eps |w|_2 in l2, where nothing is clamped."
    model, x = linear(27, 2, seed=seed % 1000), 0.3 + 0.4 * pictures(4, 3, 3, seed).double()
    y = answers(model, x)
    w = model[1].weight[1] - model[1].weight[0]
    for norm, cost in (("linf", w.norm(1)), ("l2", w.norm(2))):
        x_adv = pgd(model, x, y, eps=eps, norm=norm, start=start, step_size=eps, steps=25)
        with torch.no_grad():
            z = model(x) - model(x_adv)
        lost = (z.gather(1, y[:, None]) - z.gather(1, 1 - y[:, None]))[:, 0]
        torch.testing.assert_close(lost, (eps * cost).detach().expand(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("targeted", [False, True])
def test_sign_of_the_step(targeted):
    model, x = linear(12, 2), torch.full((3, 3, 2, 2), 0.5, dtype=torch.double)
    y = torch.tensor([0, 1, 0])
    gain = model[1].weight[1 - y] - model[1].weight[y]
    delta = (0.1 * gain.sign() * (-1 if targeted else 1)).view_as(x)
    for objective in ("ce", "margin"):
        x_adv = fgsm(model, x, y, eps=0.1, targeted=targeted, objective=objective)
        assert x_adv.allclose(x + delta, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("targeted", [False, True])
def test_cw_finds_the_exact_distance(scale, classes, targeted):
    model, x = linear(48, classes, scale), 0.4 + 0.2 * pictures(32, 3, 4).double()
    model[1].bias.data = -0.5 * model[1].weight.data.sum(1)  # all boundaries pass through the middle
    with torch.no_grad():
        z, y, w = model(x), answers(model, x), model[1].weight
    gaps = (z.gather(1, y[:, None]) - z) / (w[y][:, None] - w[None]).norm(dim=2)
    gaps[torch.arange(32), y] = torch.inf
    exact, nearest = gaps.min(1)
    if targeted and classes > 2:  # the region of one class is no half space: its distance is at least this
        found = cw(model, x, nearest, targeted=True)
    else:
        found = cw(model, x, 1 - y if targeted else y, targeted=targeted)
    inside = exact < 0.3  # so near that 0 and 1 play no part
    ratio = lengths(found - x) / exact
    assert inside.sum() > 10
    assert ratio.min() > 1 - 1e-6 and (answers(model, found) != y)[inside].all()
    if classes == 2 or targeted:
        assert ratio[inside].max() < 1.01
    else:  # it follows the wrong class of largest logit, which now and then is not the nearest
        assert (ratio[inside] < 1.01).double().mean() > 0.9


def test_cw_reaches_its_margin_or_leaves_x():
    model, x = linear(48, 2, 3.0), 0.4 + 0.2 * pictures(32, 3, 4).double()
    y = answers(model, x)
    sure = cw(model, x, y, kappa=2.0)
    with torch.no_grad():
        z = model(sure)
    margin = z.scatter(1, y[:, None], -torch.inf).amax(1) - z.gather(1, y[:, None])[:, 0]
    assert margin.min() >= 2.0
    assert (lengths(sure - x) > lengths(cw(model, x, y) - x)).all()
    distance = lengths(cw(model, x, y) - x)
    limit = distance.median().item()
    near = cw(model, x, y, eps=limit)
    assert near[distance > limit].equal(x[distance > limit])
    assert (answers(model, near) != y).equal(distance <= limit)


def test_cw_of_what_cannot_or_need_not_be_fooled():
    stubborn, x = linear(48, 3), pictures(4, 3, 4).double()
    stubborn[1].weight.data.zero_()
    y = answers(stubborn, x)
    assert cw(stubborn, x, y, steps=5).equal(x)
    model = linear(48, 3)
    assert cw(model, x, (answers(model, x) + 1) % 3, steps=5).equal(x)  # wrong already


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25])
def test_steps_are_full_however_small_the_gradient(norm, scale):
    model, x = linear(12, 2).float(), torch.full((3, 3, 2, 2), 0.5)
    model[1].weight.data *= scale
    x_adv = pgd(model, x, labels(3, 2), norm=norm, eps=0.1, start="zero", objective="margin")
    torch.testing.assert_close(lengths(x_adv - x, norm), torch.full((3,), 0.1), rtol=1e-3, atol=0)


# ---------------------------------------------------------------- torchattacks


GRID = 256  # pixels, eps and steps are multiples of 1/256: all arithmetic on them is exact


@pytest.fixture
def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchattacks", reason="an oracle; pip install --no-deps torchattacks")


def on_grid(seed=0):
    model = convnet()
    x = (pictures(seed=seed) * GRID).round() / GRID
    return model, x, answers(model, x)


def test_fgsm_and_bim_are_torchattacks_bit_by_bit(peer):
    model, x, y = on_grid()
    assert fgsm(model, x, y, eps=8 / GRID).equal(peer.FGSM(model, eps=8 / GRID)(x, y))
    theirs = peer.BIM(model, eps=8 / GRID, alpha=2 / GRID, steps=10)(x, y)
    assert bim(model, x, y, eps=8 / GRID, step_size=2 / GRID, steps=10).equal(theirs)


def test_pgd_is_torchattacks_bit_by_bit_from_the_same_start(peer, monkeypatch):
    model, x, y = on_grid()
    shift = torch.randint(-8, 9, x.shape, generator=stream(5)) / GRID
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.copy_(shift))
    theirs = peer.PGD(model, eps=8 / GRID, alpha=2 / GRID, steps=10, random_start=True)(x, y)
    monkeypatch.undo()
    ours = pgd(model, x, y, eps=8 / GRID, step_size=2 / GRID, steps=10, start=x + shift)
    assert ours.equal(theirs) and not ours.equal(x)


@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_is_torchattacks_from_the_same_seed(peer, targeted):
    "Off the grid the two round differently, by a unit in the last place."
    model, x, y = convnet(), pictures(), labels()
    attack = peer.PGD(model, eps=EPS, alpha=2 / 255, steps=10, random_start=True)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    torch.manual_seed(3)
    theirs = attack(x, y)
    torch.manual_seed(3)
    ours = pgd(model, x, y, eps=EPS, step_size=2 / 255, steps=10, targeted=targeted)
    different = ((ours - theirs).abs() > 1e-6).double().mean()
    assert different < 1e-3  # a gradient of nearly 0 may change its sign
    assert answers(model, ours).equal(answers(model, theirs))


def test_l2_pgd_is_torchattacks(peer):
    model, x, y = convnet(), pictures(), labels()
    theirs = peer.PGDL2(model, eps=0.5, alpha=0.1, steps=5, random_start=False)(x, y)
    ours = pgd(model, x, y, eps=0.5, step_size=0.1, steps=5, norm="l2", start="zero")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_cw_is_never_much_longer_than_torchattacks(peer):
    model, x = convnet(), pictures(12)
    y = answers(model, x)
    theirs, ours = peer.CW(model, c=10, steps=100, lr=0.01)(x, y), cw(model, x, y)
    found = answers(model, theirs) != y
    assert found.sum() > 8 and (answers(model, ours) != y).all()
    assert (lengths(ours - x) <= 1.05 * lengths(theirs - x))[found].all()


# ---------------------------------------------------------------- the ball, for any input

plans = st.fixed_dictionaries(
    {
        "eps": st.one_of(st.just(0.0), st.floats(1e-6, 3.0)),
        "steps": st.integers(1, 4),
        "norm": st.sampled_from(["linf", "l2"]),
        "start": st.sampled_from(["random", "zero", "gaussian", "anywhere"]),
        "restarts": st.integers(1, 2),
        "objective": st.sampled_from(["ce", "margin", "kl", "own"]),
        "step_size": st.one_of(st.none(), st.floats(0, 2)),
        "early_stop": st.booleans(),
        "targeted": st.booleans(),
    }
)


def inside(x_adv, x, eps, norm):
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1  # false for NaN
    assert lengths(x_adv - x, norm).max() <= eps * (1 + 1e-5) + 1e-6


@given(plans, st.integers(0, 2**31), st.integers(1, 5), st.integers(-4, 4))
def test_pgd_stays_in_the_ball(plan, seed, n, exponent):
    plan = dict(plan)
    own = plan["objective"] == "kl"
    if plan["norm"] == "linf":
        plan["eps"] = min(plan["eps"], 1.0)
    if own and plan["start"] == "zero":
        plan["start"] = "gaussian"
    plan["targeted"] &= not own
    if plan["start"] == "anywhere":
        plan["start"] = 3 * torch.randn(n, 1, 3, 3, generator=stream(seed + 1))
    if plan["objective"] == "own":
        plan["objective"] = lambda logits, y: -logits.logsumexp(1)
    model, x = linear(9, 4, 10.0**exponent).float(), pictures(n, 1, 3, seed)
    x = torch.where(pictures(n, 1, 3, seed + 2) < 0.3, x.round(), x)  # some black, some white
    before = x.clone()
    x_adv = pgd(model, x, labels(n, 4, seed), **plan)
    inside(x_adv, x, plan["eps"], plan["norm"])
    assert x.equal(before) and (plan["eps"] > 0 or x_adv.equal(x))


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(-4, 4), st.booleans())
def test_cw_stays_in_range(seed, n, exponent, targeted):
    model, x = linear(9, 4, 10.0**exponent).float(), pictures(n, 1, 3, seed)
    x, y = torch.where(pictures(n, 1, 3, seed + 2) < 0.3, x.round(), x), labels(n, 4, seed)
    x_adv = cw(model, x, y, steps=10, searches=2, targeted=targeted)
    inside(x_adv, x, 3.0, "l2")
    won = (answers(model, x_adv) == y) == targeted
    assert (won | (x_adv == x).flatten(1).all(1)).all()


@given(st.floats(0, 2), st.sampled_from(["linf", "l2"]), st.integers(0, 2**31))
def test_projection_is_the_nearest_point_of_the_ball(eps, norm, seed):
    x, far = pictures(4, 1, 4, seed).double(), 5 * torch.randn(4, 1, 4, 4, generator=stream(seed)).double()
    near = project(far, x, eps, norm)
    inside(near, x, eps, norm)
    torch.testing.assert_close(project(near, x, eps, norm), near, rtol=0, atol=1e-9)


@each_attack
def test_eps_zero_returns_x(attack):
    x, model = pictures(4), convnet()
    if attack is ATTACKS["cw-l2"]:
        assert cw(model, x, answers(model, x), eps=0.0, steps=3).equal(x)
    else:
        out = attack(model, x, labels(4), eps=0.0)
        assert out.equal(x) and out.data_ptr() != x.data_ptr()


@each_attack
def test_no_images_no_work(attack):
    assert attack(convnet(), pictures(0), labels(0)).shape == (0, 3, 16, 16)


# ---------------------------------------------------------------- the model is left as found


class Mixed(nn.Module):
    "Training and frozen parts, with and without gradients, batch norm, dropout, a buffer of its own."

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Linear(8, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls = self.calls + 1  # replaces the buffer, as some modules do
        return self.out(self.two(self.one(x)))


def mixed():
    torch.manual_seed(0)
    model = Mixed().train()
    model.two.eval()
    model.two[0].weight.requires_grad_(False)
    model(pictures()).square().sum().backward()
    return model


def state(model):
    values = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    grads = {k: (p.requires_grad, p.grad is None or (p.grad.data_ptr(), p.grad.clone()))
             for k, p in model.named_parameters()}
    return values, grads, {k: m.training for k, m in model.named_modules()}


@each_attack
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_model_is_left_exactly_as_found(attack, mode):
    model = mixed()
    before = state(model)
    attack(model, pictures(), labels(), mode=mode)
    assert same(before, state(model))


@each_attack
def test_also_when_it_breaks(attack):
    class Breaks(Mixed):
        left = 2

        def forward(self, x):
            self.left -= 1
            if not self.left:
                raise RuntimeError("out of memory")
            return super().forward(x)

    model = Breaks()
    before = state(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        attack(model, pictures(), labels(), mode="train")
        attack(model, pictures(), labels(), mode="train")
    assert same(before, state(model))


def test_hands_off_means_hands_off():
    "As official codes: running statistics move once a step, and by nothing else."
    model = mixed()
    before, flags = model.one[1].num_batches_tracked.item(), state(model)[2]
    pgd(model, pictures(), labels(), steps=3, mode="found")
    assert model.one[1].num_batches_tracked == before + 3
    assert flags == state(model)[2]
    assert not model.two[0].weight.requires_grad and model.out.weight.requires_grad


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_backward_pass_may_be_waiting(mode):
    "A graph made before the attack still works after it, with the same gradients."
    gradients = []
    for attack in (None, partial(pgd, steps=1, mode=mode)):
        torch.manual_seed(0)
        model = mixed()
        model.zero_grad()
        loss = F.cross_entropy(model(pictures()), labels())
        if attack:
            attack(model, pictures(), labels())
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_only_input_gradients_are_computed():
    class Watch(TorchDispatchMode):
        masks = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                self.masks.append(tuple(args[-1]))
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        pgd(convnet().train(), pictures(2), labels(2), steps=1)
    assert watch.masks and set(watch.masks) == {(True, False, False)}


@pytest.mark.parametrize("switches", [{}, {"restarts": 2}, {"norm": "l2"}, {"objective": "kl"}], ids=str)
def test_the_loop_never_waits_for_the_device(switches):
    "Reading a number from the device is one operation, whatever it looks like in Python."

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    counts = []
    for steps in (1, 7):
        with Reads() as reads:
            pgd(convnet(), pictures(2), labels(2), steps=steps, **switches)
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 10


# ---------------------------------------------------------------- switches


@pytest.mark.parametrize("model", [convnet(), convnet("mlp_64")], ids=["conv", "mlp"])
@pytest.mark.parametrize("switches", [{}, {"norm": "l2", "eps": 0.1}, {"restarts": 3}], ids=str)
def test_early_stop_changes_nothing_for_the_others(model, switches):
    conv = hasattr(model, "stage3")
    x = pictures(64, size=16 if conv else 32)
    plan = dict(eps=1 / 255, steps=8) | switches
    y = answers(model, x)
    slow, fast = (pgd(model, x, y, early_stop=e, generator=stream(7), **plan) for e in (False, True))
    left = answers(model, fast) == y
    assert 5 < left.sum() < 60, "an empty test: choose another eps"
    assert left.equal(answers(model, slow) == y)
    if conv:
        assert slow[left].equal(fast[left])  # bit by bit
    else:  # a product of matrices may round differently when it gets smaller
        torch.testing.assert_close(slow[left], fast[left], rtol=0, atol=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.booleans(), st.sampled_from(["linf", "l2"]))
def test_another_start_never_makes_it_worse(seed, targeted, norm):
    model = create_model("mlp_16", in_channels=1, image_size=4, seed=seed).eval()
    x, y, g = pictures(8, 1, 4, seed), labels(8, 10, seed), partial(stream, seed)
    plan = dict(eps=0.1, steps=3, norm=norm, targeted=targeted)
    won, value = torch.zeros(8, dtype=torch.bool), torch.full((8,), -torch.inf)
    for restarts in (1, 2, 5):
        x_adv = pgd(model, x, y, restarts=restarts, generator=g(), **plan)
        with torch.no_grad():
            loss = F.cross_entropy(model(x_adv), y, reduction="none") * (-1 if targeted else 1)
        now = (answers(model, x_adv) == y) == targeted
        assert (now | ~won).all() and (loss >= value - 1e-6)[~now].all()
        won, value = now, loss


def test_kl_from_labels_is_kl_from_the_own_answer():
    model, x, y = convnet(), pictures(), labels()
    with torch.no_grad():
        own = model(x)
    plan = dict(objective="kl", start="gaussian", steps=4)
    a, b = (pgd(model, x, aim, generator=stream(0), **plan) for aim in (y, own))
    assert a.equal(b)
    with torch.no_grad():
        moved = F.kl_div(model(a).log_softmax(1), own.softmax(1), reduction="none").sum(1)
        noise = model(pgd(model, x, y, step_size=0.0)).log_softmax(1)
    still = F.kl_div(noise, own.softmax(1), reduction="batchmean")
    assert (moved > 0).all() and moved.mean() > 10 * still


def test_kl_from_a_teacher():
    "RSLAD: raise KL(teacher || student(x_adv)); whether it fools is judged by the teacher's choice."
    teacher, model, x = convnet(seed=1), convnet(), pictures()
    with torch.no_grad():
        reference = teacher(x)
    x.requires_grad_()
    kl = F.kl_div(model(x).log_softmax(1), reference.softmax(1), reduction="sum")
    (gradient,) = torch.autograd.grad(kl, x)
    x = x.detach()
    assert fgsm(model, x, reference, objective="kl").equal((x + EPS * gradient.sign()).clamp(0, 1))
    start = pgd(model, x, reference, objective="kl", steps=1, early_stop=True, generator=stream(0))
    asked = pgd(model, x, reference.argmax(1), steps=1, early_stop=True, generator=stream(0))
    rest = (start == asked).flatten(1).all(1)
    assert rest[answers(model, asked) != reference.argmax(1)].any()  # both rest where they fool


def test_own_objective_gets_what_was_passed():
    model, x, y = convnet(), pictures(), labels()
    def worst(logits, given):
        assert given.equal(y)
        return F.cross_entropy(logits, given, reduction="none")
    assert pgd(model, x, y, objective=worst, generator=stream(0)).equal(pgd(model, x, y, generator=stream(0)))


def test_capped_margin_rests_when_it_is_reached():
    model, x = linear(48, 3, 3.0), 0.4 + 0.2 * pictures(8, 3, 4).double()
    y = answers(model, x)
    strong = lengths(cw(model, x, y, norm="linf", eps=0.2, start="zero") - x)
    enough = cw(model, x, y, norm="linf", eps=0.2, kappa=0.5, start="zero")
    assert (answers(model, enough) != y).all()
    assert (lengths(enough - x) < strong).all()


def test_start_does_not_depend_on_memory_layout():
    x, model = pictures(), convnet()
    for norm in ("linf", "l2"):
        plan = dict(steps=1, step_size=0.0, norm=norm)
        a = pgd(model, x, labels(), generator=stream(1), **plan)
        b = pgd(model, x.contiguous(memory_format=torch.channels_last), labels(), generator=stream(1), **plan)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_every_random_start_is_another_one():
    x, model, y = pictures(), convnet(), labels()
    torch.manual_seed(0)
    a, b = pgd(model, x, y), pgd(model, x, y)
    torch.manual_seed(0)
    assert not a.equal(b) and a.equal(pgd(model, x, y))


@each_attack
def test_works_where_nobody_wanted_gradients(attack):
    model, x = convnet(), pictures(8)
    y = answers(model, x)
    torch.manual_seed(0)
    plain = attack(model, x, y)
    torch.manual_seed(0)
    with torch.no_grad():
        assert attack(model, x, y).equal(plain)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = attack(model, x, y)
    assert coarse.dtype == torch.float32 and coarse.isfinite().all()
    assert not coarse.equal(x) or attack is ATTACKS["cw-l2"]  # whose few steps may find nothing


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_any_whole_labels(kind):
    model, x, y = convnet(), pictures(), labels()
    assert bim(model, x, y.to(kind)).equal(bim(model, x, y))


def test_a_point_is_an_image_too():
    model = nn.Linear(2, 3)
    x = torch.rand(7, 2)
    for attack in ATTACKS.values():
        inside(attack(model, x, labels(7, 3)), x, 2.0, "l2")


# ---------------------------------------------------------------- folding batch norm


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn_16_1", "mobilenet_v2", "resnet50"])
def test_folded_models_answer_the_same(name):
    model, x = convnet(name), pictures(4)
    folded = fold_batchnorm(model.train())
    assert model.training and not any(m.training for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) < len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])


def test_folding_leaves_what_is_not_certain():
    relu, norm = nn.ReLU(), nn.BatchNorm2d(3)

    class Doubled(nn.Sequential):  # a forward of its own
        def forward(self, x):
            return 2 * super().forward(x) + self[0](x)

    watched = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    watched[0].register_forward_hook(lambda module, inputs, out: None)
    model = nn.Sequential(
        relu, nn.Conv2d(3, 3, 3), relu, norm,  # the same ReLU twice: conv and norm are not neighbours
        nn.Conv2d(3, 3, 1), norm,              # and the same norm twice
        Doubled(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), watched,
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), nn.Flatten(),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_var is not None:
            m.running_mean.normal_(generator=stream(0)), m.running_var.uniform_(0.5, 2, generator=stream(1))
    model.eval()
    before, x = {k: v.clone() for k, v in model.state_dict().items()}, pictures(4)
    folded = fold_batchnorm(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-4)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 5
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_attacking_the_folded_model_gives_the_same_verdicts():
    model, x = convnet(), pictures(64)
    y = answers(model, x)
    attack = partial(pgd, eps=1.5 / 255, steps=10)
    a, b = (attack(m, x, y, generator=stream(0)) for m in (model, fold_batchnorm(model)))
    assert ((a - b).abs() > 1e-6).double().mean() < 1e-2
    assert answers(model, a).equal(answers(model, b)) and 5 < (answers(model, a) == y).sum() < 60


# ---------------------------------------------------------------- names


def test_names():
    def mine(model, x, y):
        return x

    names = {
        "pgd20-linf-8/255": partial(pgd, eps=8 / 255, steps=20),
        "pgd20-l2-0.5": partial(pgd, eps=0.5, norm="l2", steps=20),
        "pgd20-margin-linf-8/255": partial(pgd, steps=20, objective="margin", early_stop=True),
        "fgsm-linf-8/255": fgsm,
        "pgd20x5-linf-8/255": partial(partial(pgd, restarts=5, steps=7), steps=20),
        "cw30-linf-8/255": partial(cw, norm="linf"),
        "cw30-linf-0.3": partial(cw, norm="linf", eps=0.3),
        "cw100-l2": cw,
        "cw50-l2-0.5": partial(cw, steps=50, eps=0.5),
        "bim10-linf-0.031": partial(bim, eps=0.031),
        "pgd10-kl-train-linf-8/255": partial(pgd, objective="kl", mode="train"),
        "pgd10-targeted-linf-8/255": partial(pgd, targeted=True),
        "pgd10-mine-linf-8/255": partial(pgd, objective=mine),
        "mine": partial(mine),
    }
    assert {name: attack_name(attack) for name, attack in names.items()} == {name: name for name in names}


# ---------------------------------------------------------------- bad input gets one clear line


class Softmax(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x).softmax(1)


class Says(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.sum().expand(self.shape)


MODEL, X, Y = convnet(), pictures(4), labels(4)
SPOILED, P = X.clone(), X[:, 0, 0, :4]
SPOILED[0, 0, 0, 0] = math.nan
WRONG = {
    "pixels": (lambda: pgd(MODEL, 255 * X, Y), r"pixels must lie in \[0, 1\], got .* to 2\d\d"),
    "negative pixels": (lambda: fgsm(MODEL, X - 0.5, Y), r"pixels must lie in \[0, 1\]"),
    "nan": (lambda: pgd(MODEL, SPOILED, Y), r"pixels must lie in \[0, 1\], got nan"),
    "eps": (lambda: pgd(MODEL, X, Y, eps=-0.1), "eps must be >= 0, got -0.1"),
    "infinite eps": (lambda: pgd(MODEL, X, Y, eps=math.inf), "eps must be >= 0, got inf"),
    "nan eps": (lambda: fgsm(MODEL, X, Y, eps=math.nan), "eps must be >= 0, got nan"),
    "eps of cw": (lambda: cw(MODEL, X, Y, eps=-1.0), "eps must be >= 0, got -1.0"),
    "steps": (lambda: pgd(MODEL, X, Y, steps=0), "steps must be a whole number >= 1, got 0"),
    "half a step": (lambda: bim(MODEL, X, Y, steps=2.5), "steps must be a whole number >= 1, got 2.5"),
    "steps of cw": (lambda: cw(MODEL, X, Y, steps=0), "steps must be a whole number >= 1, got 0"),
    "searches": (lambda: cw(MODEL, X, Y, searches=0), "searches must be a whole number >= 1, got 0"),
    "step size": (lambda: pgd(MODEL, X, Y, step_size=-1), "step_size must be >= 0, got -1"),
    "restarts": (lambda: pgd(MODEL, X, Y, restarts=0), "restarts must be a whole number >= 1, got 0"),
    "kappa": (lambda: cw(MODEL, X, Y, kappa=-1), "kappa must be >= 0, got -1"),
    "levels": (lambda: pgd(MODEL, X, Y, eps=8), r"eps must lie in \[0, 1\], got 8; did you mean 8/255\?"),
    "levels of cw": (lambda: cw(MODEL, X, Y, eps=2, norm="linf"), "did you mean 2/255"),
    "text": (lambda: pgd(MODEL, X, Y, eps="8/255"), "eps must be a number >= 0"),
    "no number": (lambda: fgsm(MODEL, X, Y, eps=None), "eps must be a number >= 0, got None"),
    "bool": (lambda: pgd(MODEL, X, Y, steps=True), "steps must be a whole number >= 1, got True"),
    "nan step": (lambda: pgd(MODEL, X, Y, step_size=math.nan), "step_size must be >= 0, got nan"),
    "nan kappa": (lambda: cw(MODEL, X, Y, kappa=math.nan), "kappa must be >= 0, got nan"),
    "kappa in linf": (lambda: cw(MODEL, X, Y, kappa="1", norm="linf"), "kappa must be a number"),
    "nan start": (lambda: pgd(MODEL, X, Y, start=SPOILED), "start must be finite"),
    "another start": (lambda: pgd(MODEL, X, Y, start=X[:2]), r"same shape, got shape \(2, 3, 16, 16\)"),
    "eps of project": (lambda: project(X, X, math.nan), "eps must be >= 0, got nan"),
    "a bit white": (lambda: pgd(MODEL, X.clamp(min=1 + 2e-6), Y), r"got 1\.000002 to 1\.000002"),
    "tuple": (lambda: pgd(Gives(lambda z: (z, z)), X, Y), r"logits of shape \(4, K\), got a tuple; wrap"),
    "dict": (lambda: cw(Gives(lambda z: dict(logits=z)), X, Y), "got a dict; wrap"),
    "half weights": (lambda: pgd(nn.Linear(4, 3).half(), P, Y), "float16 does not take torch.float32"),
    "wide images": (lambda: pgd(nn.Linear(4, 3), P.double(), Y), "float32 does not take torch.float64"),
    "inference": (lambda: in_inference(lambda: pgd(MODEL, X, Y)), "outside torch.inference_mode"),
    "made there": (lambda: cw(in_inference(lambda: nn.Linear(9, 3)), X[:, 0, :1, :9], Y), "inference_mode"),
    "company": (lambda: bim(company(), X, Y, early_stop=True), "track_running_stats=False an answer depends"),
    "norm": (lambda: pgd(MODEL, X, Y, norm="linv"), "norm must be linf or l2, got 'linv'"),
    "norm of cw": (lambda: cw(MODEL, X, Y, norm=2), "norm must be linf or l2, got 2"),
    "norm of project": (lambda: project(X, X, 0.1, "l1"), "norm must be linf or l2, got 'l1'"),
    "objective": (lambda: pgd(MODEL, X, Y, objective="dlr"), "must be ce, margin or kl, got 'dlr'"),
    "start": (lambda: pgd(MODEL, X, Y, start="randon"), "must be random, zero or gaussian, got 'randon'"),
    "mode": (lambda: pgd(MODEL, X, Y, mode="test"), "mode must be eval, train or found, got 'test'"),
    "mode of frozen": (lambda: frozen(MODEL, "test").__enter__(), "mode must be eval, train or found"),
    "labels": (lambda: pgd(MODEL, X, Y + 9), r"labels must lie in \[0, 10\), got \d+ to \d+"),
    "negative labels": (lambda: cw(MODEL, X, Y - 9), r"labels must lie in \[0, 10\), got -\d+"),
    "labels at eps 0": (lambda: pgd(MODEL, X, Y + 9, eps=0.0), r"labels must lie in \[0, 10\)"),
    "few labels": (lambda: pgd(MODEL, X, Y[:3]), r"y must be 4 whole labels, .* of shape \(3,\)"),
    "soft labels": (lambda: pgd(MODEL, X, Y.float()), "y must be 4 whole labels"),
    "bytes": (lambda: pgd(MODEL, (255 * X).byte(), Y), "x must be float32 in .* got torch.uint8 of shape"),
    "half": (lambda: pgd(MODEL, X.bfloat16(), Y), "x must be float32 in .* got torch.bfloat16"),
    "numpy": (lambda: pgd(MODEL, X.numpy(), Y), "x must be float32 in .* got ndarray"),
    "one row": (lambda: pgd(Says((3, 10)), X, Y), r"logits of shape \(4, K\), got .* \(3, 10\)"),
    "maps": (lambda: fgsm(Says((4, 10, 2)), X, Y), r"logits of shape \(4, K\), got .* \(4, 10, 2\)"),
    "reference": (lambda: pgd(MODEL, X, torch.randn(4, 7), objective="kl"), r"same shape, got .*4, 7"),
    "ce of logits": (lambda: pgd(MODEL, X, torch.randn(4, 10)), "objective 'ce' needs labels"),
    "margin of logits": (lambda: cw(MODEL, X, torch.randn(4, 10)), "objective 'margin' needs labels"),
    "kl at rest": (lambda: bim(MODEL, X, Y, objective="kl"), "objective 'kl' is flat at x itself"),
    "kl one step": (lambda: fgsm(MODEL, X, Y, objective="kl"), "objective 'kl' is flat at x itself"),
    "kl targeted": (lambda: pgd(MODEL, X, Y, objective="kl", targeted=True), "has no target"),
    "mean loss": (lambda: pgd(MODEL, X, Y, objective=F.cross_entropy), "one number for each of 4 images"),
    "no gradient": (lambda: pgd(nn.Sequential(MODEL, Detach()), X, Y), "no gradient from the logits to x"),
    "early stop": (lambda: pgd(MODEL, X, Y, mode="train", early_stop=True), "early_stop needs mode 'eval'"),
    "found": (lambda: pgd(mixed(), X, Y, mode="found", early_stop=True), "early_stop needs mode 'eval'"),
    "l2 switches": (lambda: cw(MODEL, X, Y, restarts=3), "cw with norm='l2' has no restarts"),
    "model": (lambda: pgd(lambda x: x, X, Y), "model must be an nn.Module, got function"),
}


class Gives(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inside, self.wrap = convnet(), wrap

    def forward(self, x):
        return self.wrap(self.inside(x))


def in_inference(call):
    with torch.inference_mode():
        return call()


def company():
    return nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(768, 10))


class Detach(nn.Module):
    def forward(self, x):
        return x.detach()


@pytest.mark.parametrize("wrong, words", WRONG.values(), ids=WRONG)
def test_bad_input_gets_one_clear_line(wrong, words):
    before = state(MODEL)
    with pytest.raises(ValueError, match=words) as raised:
        wrong()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 160
    assert same(before, state(MODEL))


@each_attack
def test_rounding_is_cut(attack):
    x = torch.where(X > 0.5, X, 1.0)
    torch.manual_seed(0)
    exact = attack(MODEL, x, Y)
    torch.manual_seed(0)
    assert attack(MODEL, torch.where(x == 1, 1 + 5e-7, x), Y).equal(exact)


@each_attack
def test_images_made_in_inference_mode_are_images(attack):
    x, y = in_inference(lambda: (X.clone(), Y.clone()))
    torch.manual_seed(0)
    exact = attack(MODEL, X, Y)
    torch.manual_seed(0)
    assert attack(MODEL, x, y).equal(exact)


@each_attack
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("images", [torch.float32, torch.float64])
def test_images_keep_their_floats_whatever_the_model_has(attack, kind, images):
    "Zoo networks take images of any kind of float."
    x_adv = attack(convnet().to(kind), X.to(images), Y)
    assert x_adv.dtype == images and x_adv.isfinite().all()
    assert pgd(MODEL, X, Y, start=X.double(), steps=1).dtype == torch.float32


def test_attacks_in_float64_narrow_nothing():
    "In float64 throughout: a start that differs by 1e-12 is another start."
    model, x = linear(48, 3), pictures(4, 3, 4).double()
    for norm in ("linf", "l2"):
        ends = [pgd(model, x, Y % 3, start=x + d, eps=0.1, step_size=1e-9, norm=norm) for d in (0, 1e-12)]
        gap = (ends[0] - ends[1]).abs().max()
        assert 1e-13 < gap < 1e-11


def test_a_masked_class_counts_for_nothing():
    reference = torch.randn(4, 10, generator=stream(3))
    reference[:, 2] = -torch.inf
    x_adv = pgd(MODEL, X, reference, objective="kl", eps=0.1)
    assert x_adv.isfinite().all() and not x_adv.equal(X)


def test_torchscript_is_attacked_as_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(MODEL, X)
    for mode in ("eval", "train", "found"):
        assert bim(script, X, Y, mode=mode).shape == X.shape
    assert bim(script, X, Y).allclose(bim(MODEL, X, Y), atol=1e-5)


@each_attack
def test_probabilities_are_warned_about(attack):
    with pytest.warns(UserWarning, match="probabilities") as caught:
        attack(Softmax(MODEL), X, Y)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(MODEL, X, Y)
