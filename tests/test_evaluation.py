"Evaluation against pyautoattack and hand-made cases; masks that must be seen; nothing left behind."

import copy
import json
import logging
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kdnb.evaluation as evaluation
from kdnb import checks
from kdnb.attacks import attack_name, fgsm, pgd
from kdnb.data import Batches, Images
from kdnb.evaluation import (
    Verdict,
    agreement,
    autoattack,
    calibration_bins,
    calibration_error,
    evaluate,
    masking_alarms,
    robust_accuracy,
    still_right,
)
from kdnb.learning import update
from kdnb.models import create_model
from kdnb.training import Supervised, accuracy, fit

EPS = 0.1


class Hardened(Supervised):
    def step(self, x, y):
        return super().step(pgd(self.student, x, y, eps=EPS, steps=5), y)


def trained(digits, method, name="mlp_64_64", epochs=15):
    shape = dict(in_channels=1, image_size=8, mean=digits.mean, std=digits.std)
    model = create_model(name, **shape, seed=0)
    fit(method(model, lr=0.05), Batches(digits.train, 64), epochs=epochs, progress="off")
    return model


@pytest.fixture(scope="module")
def natural(digits):
    return trained(digits, Supervised)


@pytest.fixture(scope="module")
def robust(digits):
    return trained(digits, Hardened)


@pytest.fixture(scope="module")
def conv(digits):
    "With batch norm, in training mode, on purpose."
    return trained(digits, Supervised, "resnet8", 3).train()


@pytest.fixture(scope="module")
def few(digits):
    return digits.test.subset(torch.arange(40))


# ---------------------------------------------------------------- autoattack


def directly(model, images, eps, norm):
    "pyautoattack as its README calls it: which images are left."
    from pyautoattack import AutoAttack

    suite = AutoAttack(model.eval(), norm=norm, eps=eps, seed=0, version="standard")
    with torch.random.fork_rng(devices=[]):
        _, labels = suite.run_standard_evaluation(images.floats(), images.y)
    return labels == images.y


@pytest.fixture
def silent_peer():
    logger = logging.getLogger("auto-attack")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.mark.parametrize("norm, peer, eps", [("linf", "Linf", EPS), ("l2", "L2", 0.6)])
def test_standard_equals_pyautoattack(natural, few, silent_peer, norm, peer, eps):
    wanted = directly(natural, few, eps, peer)
    for fast in (False, True) if norm == "linf" else (True,):
        assert autoattack(natural, few, eps=eps, norm=norm, fast=fast).robust.equal(wanted)
    assert 0 < wanted.sum() < accuracy(natural, few) * len(few)


def test_fast_changes_no_verdict(conv, few, monkeypatch):
    "Batch norm is folded and broken images are dropped. And lite is a part of standard."
    monkeypatch.setitem(evaluation._TIERS, "standard", (("apgd-ce", "apgd-t"), 3))
    monkeypatch.setitem(evaluation._TIERS, "lite", (("apgd-ce", "apgd-t"), 1))
    slow, fast = (autoattack(conv, few, eps=0.12, batch_size=25, fast=f) for f in (False, True))
    lite = autoattack(conv, few, eps=0.12, batch_size=25, tier="lite")
    assert slow == fast and {"", "apgd-ce"} <= {*fast.broken_by}
    assert bool((lite.robust | ~fast.robust).all())  # what lite breaks, standard breaks


def test_broken_by_is_consistent(natural, few):
    verdict = autoattack(natural, few, eps=EPS, tier="lite")
    right = natural.eval()(few.floats()).argmax(1) == few.y
    assert [b == "clean" for b in verdict.broken_by] == (~right).tolist()
    assert verdict.clean == accuracy(natural, few)
    assert set(verdict.broken_by) <= {"", "clean", "apgd-ce", "apgd-t"}
    assert verdict.survivors["apgd-t"] == verdict.broken_by.count("") == int(verdict.robust.sum())
    assert verdict.accuracy == verdict.robust.double().mean().item()
    assert verdict.accuracy <= robust_accuracy(natural, few, partial(pgd, eps=EPS, steps=20))


def test_names():
    for options, name in (
        (dict(eps=8 / 255), "autoattack-lite-linf-8/255"),
        (dict(eps=0.5, norm="l2"), "autoattack-lite-l2-0.5"),
        (dict(eps=0.1), "autoattack-lite-linf-0.1"),
    ):
        images = Images(torch.zeros(2, 1, 2, 2), torch.ones(2), K4)
        verdict = autoattack(Linear(4), images, tier="lite", **options)
        assert verdict.name == name and verdict.accuracy == 0 and verdict.broken_by == ("clean",) * 2
        assert attack_name(partial(pgd, **options)) == name.replace("autoattack-lite", "pgd10")


K4 = tuple("abcd")


class Linear(nn.Module):
    "Always says class 0."

    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(4, classes)
        with torch.no_grad():
            self.linear.weight.mul_(0.01)
            self.linear.bias.copy_(2 * F.one_hot(torch.tensor(0), classes))

    def forward(self, x):
        return self.linear(x.flatten(1))


class Mortal(nn.Module):
    def __init__(self, model, calls):
        super().__init__()
        self.model, self.calls = model, calls

    def forward(self, x):
        self.calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt
        return self.model(x)


def test_resumes_after_a_kill_to_the_same_verdict(natural, few, tmp_path):
    run = partial(autoattack, images=few, eps=EPS, tier="lite", batch_size=10)
    wanted, path, seen = run(natural), tmp_path / "deep" / "aa.json", set()
    for calls in (150, 550):
        with pytest.raises(KeyboardInterrupt):
            run(Mortal(natural, calls), checkpoint=path)
        seen.add(path.read_text())
    assert len(seen) > 1
    assert run(natural, checkpoint=path) == wanted
    assert run(Mortal(natural, 20), checkpoint=path) == wanted  # all done: nothing is attacked again
    assert [p.name for p in path.parent.iterdir()] == ["aa.json"]


def test_a_foreign_checkpoint_is_refused(natural, robust, few, tmp_path):
    path = tmp_path / "aa.json"
    run = partial(autoattack, tier="lite", checkpoint=path)
    wanted = run(natural, few, eps=EPS)
    before = path.read_text()
    for key, call in {
        "eps": lambda: run(natural, few, eps=0.2),
        "norm": lambda: run(natural, few, eps=EPS, norm="l2"),
        "tier": lambda: run(natural, few, eps=EPS, tier="standard"),
        "seed": lambda: run(natural, few, eps=EPS, seed=1),
        "batch_size": lambda: run(natural, few, eps=EPS, batch_size=7),
        "model": lambda: run(robust, few, eps=EPS),
        "images": lambda: run(natural, few.subset(torch.arange(20)), eps=EPS),
    }.items():
        one_line(call, rf"aa.json belongs to another evaluation: its {key} is .*; delete it or use another")
    assert path.read_text() == before and run(natural, few, eps=EPS) == wanted
    flipped = before.replace("[-1, ", "[1, ").replace("[0, ", "[-1, ")
    for text in ("", before[:-20], "[]", '{"stage": 1}', flipped, "[" * 10**5, '{"sha256": 1}'):
        path.write_text(text)
        one_line(lambda: run(natural, few, eps=EPS), "aa.json is no checkpoint of autoattack, cut short")


def test_few_classes(monkeypatch):
    monkeypatch.setitem(evaluation._TIERS, "standard", (("apgd-t", "fab-t"), 9))
    images = Images(torch.rand(12, 1, 2, 2), torch.zeros(12), K4)
    assert autoattack(Linear(4), images, eps=0.01).robust.all()  # nine wrong classes do not exist
    three = Images(torch.rand(12, 1, 2, 2), torch.zeros(12), K4[:3])
    one_line(lambda: autoattack(Linear(3), three), "at least 4 classes, got 3")


# ---------------------------------------------------------------- nothing left behind


@pytest.mark.parametrize(
    "run",
    [
        lambda m, i: still_right(m, i, partial(pgd, eps=EPS)),
        lambda m, i: still_right(m, i, partial(pgd, eps=EPS), fast=False),
        lambda m, i: autoattack(m, i, eps=EPS, tier="lite"),
        lambda m, i: autoattack(m, i, eps=EPS, tier="fab only", fast=False),
        lambda m, i: masking_alarms(m, i, eps=EPS),
        lambda m, i: evaluate(m, i, [partial(fgsm, eps=EPS)]),
    ],
)
def test_model_and_random_numbers_are_as_before(conv, few, run, capfd, monkeypatch):
    monkeypatch.setitem(evaluation._TIERS, "fab only", (("fab-t",), 1))  # it calls backward()
    few = few.subset(torch.arange(10))
    next(conv.parameters()).requires_grad_(False)
    next(conv.modules()).stem.eval()
    conv.linear.bias.grad = torch.ones(10)
    kept = {k: v.clone() for k, v in conv.state_dict().items()}
    flags = [m.training for m in conv.modules()], [p.requires_grad for p in conv.parameters()]
    hooks, state = sum(len(m._forward_pre_hooks) for m in conv.modules()), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(conv, few)
    assert state.equal(torch.get_rng_state())
    assert all(v.equal(kept[k]) for k, v in conv.state_dict().items())
    assert flags == ([m.training for m in conv.modules()], [p.requires_grad for p in conv.parameters()])
    assert hooks == sum(len(m._forward_pre_hooks) for m in conv.modules())
    assert [n for n, p in conv.named_parameters() if p.grad is not None] == ["linear.bias"]
    assert conv.linear.bias.grad.equal(torch.ones(10))
    assert capfd.readouterr() == ("", "")
    next(conv.parameters()).requires_grad_(True), conv.train()
    conv.linear.bias.grad = None


def test_a_network_that_is_always_wrong(natural, few):
    "Nothing is left to attack: no attack may be called, and every number is 0."
    hopeless = Images(few.x, (few.y + 1) % 10, few.classes)
    with torch.no_grad():
        wrong = natural(hopeless.floats()).argmax(1) != hopeless.y
    hopeless = hopeless.subset(wrong.nonzero()[:, 0])
    assert len(hopeless) > 10
    assert robust_accuracy(natural, hopeless, lambda *_: pytest.fail("nothing to attack")) == 0
    found = autoattack(natural, hopeless, eps=0.1, tier="lite")
    assert found.accuracy == found.clean == 0 and set(found.broken_by) == {"clean"}
    assert not masking_alarms(natural, hopeless, eps=0.1, steps=2, queries=2)["zero_gradients"].fired


def test_the_seed_decides_and_nothing_else(natural, few):
    attack = partial(pgd, eps=EPS, steps=2)
    seen = []

    def spy(model, x, y):
        seen.append(attack(model, x, y))
        return seen[-1]

    for outside, seed in ((0, 0), (5, 0), (5, 1)):
        torch.manual_seed(outside)
        robust_accuracy(natural, few, spy, seed=seed)
    assert seen[0].equal(seen[1]) and not seen[1].equal(seen[2])


# ---------------------------------------------------------------- robust accuracy


def test_an_attack_is_believed_only_by_the_model_itself(conv, few):
    "What fools the copy alone does not count, and what is wrong to begin with is not attacked."
    targets, sizes = [], []

    def attack(model, x, y):
        targets.append(model), sizes.append(len(x))
        return x

    right = still_right(conv, few, attack, batch_size=16)
    assert targets[0] is not conv and sum(sizes) == right.sum() and max(sizes) <= 16
    still_right(conv, few, attack, fast=False)
    assert targets[-1] is conv

    def break_the_copy(model, x, y):
        model.linear.weight.data.zero_()
        return x

    assert still_right(conv, few, break_the_copy).equal(right)


def test_fast_and_slow_agree(conv, few):
    attack = partial(pgd, eps=0.08, steps=20)
    assert still_right(conv, few, attack).equal(still_right(conv, few, attack, fast=False))
    kept = partial(pgd, eps=0.08, steps=2, mode="train")  # needs the batch norm that a copy lacks
    assert still_right(conv, few, kept).equal(still_right(conv, few, kept, fast=False))


def in_bf16(attack):
    def low(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return attack(model, x, y)

    return low


def twice(model, x, y):
    "An attack of one's own, which keeps all images to the end."
    x_adv = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
    return (x + EPS * slope.sign()).clamp(0, 1)


@pytest.mark.parametrize(
    "attack",
    [
        partial(pgd, eps=0.08, steps=10, early_stop=True),
        partial(pgd, eps=0.08, steps=10),
        partial(pgd, eps=0.08, steps=5, early_stop=True, restarts=3),
        partial(pgd, eps=0.6, norm="l2", steps=10, early_stop=True),
        twice,
    ],
    ids=["early stop", "to the end", "restarts", "l2", "one's own"],
)
@pytest.mark.parametrize("batch_size", [40, 16])
def test_a_bf16_search_breaks_no_less(conv, few, attack, batch_size):
    "What either attack breaks is broken, nothing else; the second begins where the only one would."
    seen, left = [], partial(still_right, conv, few, batch_size=batch_size)

    def watched(model, x, y):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_rng_state(), attack(model, x, y), x))
        return seen[-1][2]

    low, high = left(in_bf16(attack)), left(attack)
    both = left(watched, precision="bf16")
    assert both.equal(low & high) and both.sum() <= high.sum() and 0 < high.sum() < len(few)
    assert [autocast for autocast, *_ in seen] == [True, False] * (len(seen) // 2)
    assert all(a[1].equal(b[1]) for a, b in zip(seen[::2], seen[1::2], strict=True))
    if getattr(attack, "keywords", {}).get("norm") != "l2":
        assert all((x_adv - x).abs().amax() <= EPS + 1e-6 for *_, x_adv, x in seen)
    assert all(0 <= x_adv.amin() and x_adv.amax() <= 1 for *_, x_adv, _ in seen)


class Fickle(nn.Module):
    "Under autocast it answers something else."

    def __init__(self, model, under):
        super().__init__()
        self.model, self.under, self.rows = model, under, [0, 0]

    def forward(self, x):
        low = torch.is_autocast_enabled("cpu")
        self.rows[low] += len(x)
        return self.under(self.model(x)) if low else self.model(x)


@pytest.mark.parametrize("early_stop", [False, True])
def test_a_bf16_that_lies_costs_time_and_no_verdict(natural, few, early_stop):
    attack = partial(pgd, eps=EPS, steps=5, early_stop=early_stop)
    wanted = still_right(natural, few, attack, fast=False)
    for under in (lambda z: z.flip(1), lambda z: 0 * z, lambda z: z.detach() + 0 * z):
        model = Fickle(natural, under)
        assert still_right(model, few, attack, fast=False, precision="bf16").equal(wanted)
        assert robust_accuracy(model, few, attack, precision="bf16") == wanted.double().mean().item()


@pytest.mark.parametrize("early_stop", [False, True])
def test_what_bf16_broke_is_not_attacked_again(natural, few, early_stop):
    attack, model = partial(pgd, eps=EPS, steps=5, early_stop=early_stop), Fickle(natural, lambda z: z)
    still_right(model, few, attack, fast=False)
    plain, model.rows = model.rows[0], [0, 0]
    left = still_right(model, few, attack, fast=False, precision="bf16").sum().item()
    judged = len(few) + 2 * round(accuracy(natural, few) * len(few))
    again = model.rows[0] - judged
    assert 5 * left <= again <= 5 * left + 10 < plain - 10


def test_early_stop_breaks_no_less(natural, robust, digits):
    "An image that rests where it first fools may be one that PGD would have led back: not the same verdict."
    images, fewer = digits.test.subset(torch.arange(200)), 0
    for model in (natural, robust):
        for objective in ("ce", "margin"):
            attack = partial(pgd, eps=EPS, step_size=EPS / 2, steps=10, objective=objective)
            late, early = (still_right(model, images, partial(attack, early_stop=e)) for e in (False, True))
            assert bool((late | ~early).all())
            fewer += (late & ~early).sum().item()
    assert fewer


def test_closed_form_on_a_linear_model():
    "Of two classes, an image at distance d in linf from the border falls at eps > d and not before."
    model = Linear(2)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.linear.weight.copy_(torch.randn(2, 4, generator=g))
        model.linear.bias.zero_()
    x = 0.3 + 0.4 * torch.rand(200, 1, 2, 2, generator=g)
    images = Images(x, torch.zeros(200), ("a", "b"))
    logits = model(images.floats())
    images = Images(images.x, logits.argmax(1), images.classes)
    gap = (logits[:, 0] - logits[:, 1]).abs() / (model.linear.weight[0] - model.linear.weight[1]).norm(1)
    for eps in (0.02, 0.05, 0.1):
        clear = (gap - eps).abs() > 1e-5
        found = still_right(model, images, partial(pgd, eps=eps, steps=20))
        assert found[clear].equal((gap > eps)[clear])
        assert found.double().mean() == robust_accuracy(model, images, partial(fgsm, eps=eps))


def test_inside_autocast_and_no_grad(natural, few):
    wanted, modes = autoattack(natural, few, eps=EPS, tier="lite"), set()

    def spy(x):
        modes.add((torch.is_autocast_enabled("cpu"), x.dtype))
        return x

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert autoattack(Masked(natural, spy), few, eps=EPS, tier="lite") == wanted
        still_right(Masked(natural, spy), few, lambda model, x, y: x.bfloat16())
        masking_alarms(natural, few, eps=EPS)
    assert modes == {(False, torch.float32)}


# ---------------------------------------------------------------- calibration and agreement


def test_calibration_by_hand():
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.28, 0.72], [0.45, 0.55]]).log()
    y = torch.tensor([0, 1, 1, 0])
    sure, right, share = calibration_bins(logits, y)
    assert share.tolist() == [0, 0, 0, 0, 0, 0.25, 0, 0.25, 0, 0.5]
    assert right.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0.5]
    assert torch.allclose(sure[[5, 7, 9]], torch.tensor([0.55, 0.72, 0.9], dtype=torch.double))
    error = 0.5 * (0.9 - 0.5) + 0.25 * (1 - 0.72) + 0.25 * 0.55
    assert abs(calibration_error(logits, y) - error) < 1e-6
    one_bin = (0.9 + 0.9 + 0.72 + 0.55) / 4 - 0.5
    assert abs(calibration_error(logits, y, bins=1) - one_bin) < 1e-6


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(2, 8), st.integers(1, 20))
@settings(max_examples=50)
def test_calibration_properties(seed, n, k, bins):
    g = torch.Generator().manual_seed(seed)
    logits, y = 3 * torch.randn(n, k, generator=g), torch.randint(k, (n,), generator=g)
    sure, right, share = calibration_bins(logits, y, bins)
    assert len(sure) == len(right) == len(share) == bins
    assert abs(share.sum() - 1) < 1e-9 and 0 <= calibration_error(logits, y, bins) <= 1 + 1e-9
    assert abs((right * share).sum() - (logits.argmax(1) == y).double().mean()) < 1e-9
    gap = abs((sure - right) @ share)  # one bin is the smallest error there is
    assert calibration_error(logits, y, bins) >= gap - 1e-9
    hot = 1e4 * F.one_hot(y, k).float()
    assert calibration_error(hot, y, bins) == 0
    assert abs(calibration_error(hot, (y + 1) % k, bins) - 1) < 1e-9
    other = torch.randn(n, k, generator=g)
    assert agreement(logits, logits) == agreement(logits, 2 * logits + 1) == 1
    assert agreement(logits, other) == agreement(other, logits)
    assert agreement(hot, F.one_hot((y + 1) % k, k)) == 0


# ---------------------------------------------------------------- alarms


class Masked(nn.Module):
    def __init__(self, model, before=lambda x: x, scale=1.0):
        super().__init__()
        self.model, self.before, self.scale = model, before, scale

    def forward(self, x):
        return self.scale * self.model(self.before(x))


def fired(model, images, **options):
    return {n for n, alarm in masking_alarms(model, images, eps=EPS, **options).items() if alarm.fired}


@pytest.mark.parametrize(
    "name, seed", [*((name, seed) for name in ("natural", "robust") for seed in range(3)), ("conv", 0)]
)
def test_alarms_are_silent_on_honest_models(request, digits, name, seed):
    images = digits.test.subset(torch.arange(200))
    assert not fired(request.getfixturevalue(name), images, seed=seed)


def test_alarms_are_silent_in_l2_and_for_transfer(natural, robust, digits):
    images = digits.test.subset(torch.arange(200))
    signs = masking_alarms(robust, images, eps=0.6, norm="l2", surrogate=natural)
    assert not any(alarm.fired for alarm in signs.values())


@pytest.mark.parametrize(
    "mask, wanted",
    [
        (dict(scale=1e4), {"zero_gradients", "black_box_beats_white_box", "unbounded_eps_survived"}),
        (dict(before=lambda x: (4 * x).round() / 4), {"zero_gradients", "black_box_beats_white_box"}),
        (dict(before=lambda x: x + 0.05 * torch.sin(300 * x)), {"one_step_beats_many"}),
        (dict(before=lambda x: x + 0.2 * torch.randn_like(x)), {"random_answers"}),
    ],
)
def test_alarms_fire_on_masked_models(natural, digits, mask, wanted):
    images = digits.test.subset(torch.arange(200))
    assert wanted <= fired(Masked(natural, **mask), images)


class Trades(Supervised):
    def step(self, x, y):
        x_adv = pgd(self.student, x, y, eps=EPS, steps=5, objective="kl", start="gaussian")
        z, z_adv = self.student(x).log_softmax(1), self.student(x_adv).log_softmax(1)
        loss = F.nll_loss(z, y) + 6 * F.kl_div(z_adv, z, reduction="batchmean", log_target=True)
        update(self.optimizer, loss)
        return {"loss": loss.detach()}


@pytest.fixture(scope="module")
def trades(digits):
    return trained(digits, Trades, epochs=20)


def test_a_small_lead_gets_a_second_chance(trades, digits, monkeypatch):
    "On this honest network blind trial is ahead of three steps by 5 %, but not of fifteen on the margin."
    images, name = digits.test.subset(torch.arange(200)), "black_box_beats_white_box"
    fair = masking_alarms(trades, images, eps=0.2, steps=3)
    monkeypatch.setattr(evaluation, "_second_chance", lambda model, x, y, **options: x)
    strict = masking_alarms(trades, images, eps=0.2, steps=3)
    assert not any(alarm.fired for alarm in fair.values()) and strict[name].fired
    leads = [signs[name].evidence["only_black_box"] for signs in (fair, strict)]
    assert leads[0] + 0.02 < leads[1] < 0.1


def test_alarms_are_silent_on_trades(trades, digits):
    images = digits.test.subset(torch.arange(200))
    for eps in (0.1, 0.15, 0.2):
        assert not any(alarm.fired for alarm in masking_alarms(trades, images, eps=eps).values())


def test_a_large_lead_gets_none(natural, digits, monkeypatch):
    monkeypatch.setattr(evaluation, "_second_chance", lambda *_, **__: pytest.fail("not asked for"))
    images = digits.test.subset(torch.arange(100))
    assert "black_box_beats_white_box" in fired(Masked(natural, scale=1e4), images)


def test_the_second_chance_is_the_better_of_two(natural, few):
    x, y = few.floats(), few.y
    right = natural.eval()(x).argmax(1) == y
    x, y = x[right], y[right]
    plan = dict(eps=EPS, steps=100, restarts=3)
    torch.manual_seed(0)
    ends = [pgd(natural, x, y, objective=o, **plan) for o in ("margin", "ce")]
    torch.manual_seed(0)
    both = evaluation._second_chance(natural, x, y, EPS, "linf", 20)
    left = [natural(a).argmax(1) == y for a in (*ends, both)]
    assert left[2].equal(left[0] & left[1]) and 0 < left[2].sum() < len(y)


def test_transfer_fires_where_random_search_is_too_weak(natural, robust, digits):
    images = digits.test.subset(torch.arange(200))
    steep = Masked(natural, scale=1e4)
    assert "black_box_beats_white_box" not in fired(steep, images, queries=1, slack=0.1)
    assert "black_box_beats_white_box" in fired(steep, images, queries=1, slack=0.1, surrogate=natural)


def test_autoattack_sees_through_a_mask(natural, few):
    steep, attack = Masked(natural, scale=1e4), partial(pgd, eps=EPS, steps=20)
    verdict = autoattack(steep, few, eps=EPS, tier="lite")
    assert robust_accuracy(steep, few, attack) > accuracy(steep, few) - 0.1
    assert verdict.accuracy < robust_accuracy(natural, few, attack) + 0.03
    assert verdict.broken_by.count("apgd-t") > verdict.broken_by.count("apgd-ce")


# ---------------------------------------------------------------- evaluate


def test_evaluate_is_ready_for_a_card(natural, few, tmp_path):
    from kdnb.runs import results_table, run_card

    attacks = [partial(fgsm, eps=EPS), partial(pgd, eps=EPS, steps=20), lambda model, x, y: x]
    metrics = evaluate(natural, few, attacks, autoattack="lite", alarms=True, eps=EPS)
    assert all(type(v) is float for v in metrics.values())
    assert [*metrics][:5] == ["accuracy", "ece", "fgsm-linf-0.1", "pgd20-linf-0.1", "<lambda>"]
    assert metrics["<lambda>"] == metrics["accuracy"] == accuracy(natural, few)
    assert metrics["autoattack-lite-linf-0.1"] == autoattack(natural, few, eps=EPS, tier="lite").accuracy
    assert sum(k.startswith("alarm_") for k in metrics) == 5
    parameters = dict(preset="default", seed=0)
    card = run_card("10_kd", parameters, metrics, dataset={"name": "digits"}, started=0.0, seconds=1)
    assert card["metrics"] == json.loads(json.dumps(metrics))
    assert set(metrics) <= {row["quantity"] for row in results_table("10_kd", [card]).rows}
    assert [*evaluate(natural, few)] == ["accuracy", "ece"]


# ---------------------------------------------------------------- bad input


def one_line(call, words):
    with pytest.raises((ValueError, ImportError), match=words) as error:
        call()
    assert "\n" not in str(error.value)


class Answer(nn.Module):
    "Says the same for every image."

    def __init__(self, row):
        super().__init__()
        self.row = nn.Parameter(torch.tensor(row))

    def forward(self, x):
        return self.row.expand(len(x), *self.row.shape) + 0 * x.sum()


NAN = torch.tensor([[0.0, 1.0], [2.0, float("nan")], [0.0, 0.0]])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, i: robust_accuracy(m, i, "pgd"), "attack must be .*, got 'pgd'"),
        (lambda m, i: robust_accuracy(m, i, pgd, batch_size=0), "batch_size must be a whole .*, got 0"),
        (lambda m, i: robust_accuracy(m, i.subset(torch.arange(0)), pgd), "no images"),
        (lambda m, i: robust_accuracy(lambda x: x, i, pgd), "must be an nn.Module"),
        (lambda m, i: robust_accuracy(m, i.floats(), pgd), "must be kdnb.data.Images"),
        (lambda m, i: robust_accuracy(m, i, partial(pgd, eps=-1)), "eps must be .*>= 0, got -1"),
        (lambda m, i: robust_accuracy(m, i, lambda m, x, y: x + 1), r"lie in \[0, 1\], got 1 to 2"),
        (lambda m, i: robust_accuracy(m, i, lambda m, x, y: x / 0), r"lie in \[0, 1\], got nan"),
        (lambda m, i: robust_accuracy(m, i, lambda m, x, y: x[:1]), r"1, 8, 8\), got shape \(1,"),
        (lambda m, i: robust_accuracy(m, i, lambda m, x, y: None), "got a NoneType"),
        (lambda m, i: robust_accuracy(Answer([0.0] * 7), i, pgd), r"each of 10 classes, got shape \(40, 7\)"),
        (lambda m, i: robust_accuracy(Answer([float("nan")] * 10), i, pgd), "NaN or infinite"),
        (lambda m, i: autoattack(m, i, eps=-0.1), "eps must be >= 0, got -0.1"),
        (lambda m, i: autoattack(m, i, eps=float("nan")), "eps must be >= 0, got nan"),
        (lambda m, i: autoattack(m, i, norm="Linf"), "norm must be linf or l2, got 'Linf'"),
        (lambda m, i: autoattack(m, i, tier="plus"), "tier must be standard or lite, got 'plus'"),
        (lambda m, i: autoattack(Answer([0.0] * 7), i), "each of 10 classes"),
        (lambda m, i: masking_alarms(m, i, eps=0), "eps must be > 0, got 0"),
        (lambda m, i: masking_alarms(m, i, norm="l1"), "norm must be linf or l2, got 'l1'"),
        (lambda m, i: evaluate(m, i, [pgd, pgd]), "two attacks have the same name"),
        (lambda m, i: evaluate(m, i, autoattack="full"), "tier must be standard or lite, got 'full'"),
        (lambda m, i: calibration_bins(torch.zeros(3, 2), torch.zeros(4)), r"y must be 3 labels, got shape"),
        (lambda m, i: calibration_bins(torch.zeros(0, 2), torch.zeros(0)), "logits must not be empty"),
        (lambda m, i: calibration_bins(torch.zeros(3, 2), torch.zeros(3), 0), "bins must be .*, got 0"),
        (lambda m, i: agreement(torch.zeros(3, 2), torch.zeros(3, 4)), r"shape \(3, 2\) and shape \(3, 4\)"),
        (lambda m, i: agreement(torch.zeros(3), torch.zeros(3)), r"logits \(N, K\)"),
        (lambda m, i: calibration_bins(torch.zeros(3, 2), torch.arange(3)), r"in \[0, 2\), got 0 to 2"),
        (lambda m, i: calibration_error(NAN, torch.zeros(3)), "logits hold NaN or infinite values"),
        (lambda m, i: agreement(torch.zeros(3, 2), NAN), "logits_b hold NaN or infinite values"),
        (lambda m, i: agreement(NAN, torch.zeros(3, 2)), "logits_a hold NaN"),
        (lambda m, i: robust_accuracy(m, i, pgd, precision="fp16"), "precision must be fp32 or bf16, got"),
        (lambda m, i: robust_accuracy(m, i, pgd, batch_size=2.5), "batch_size must be a whole .*, got 2.5"),
        (lambda m, i: evaluate(m, i, batch_size="9"), "batch_size must be a whole number >= 1, got '9'"),
        (lambda m, i: evaluate(m, i, seed=None), "seed must be a whole number, got None"),
        (lambda m, i: autoattack(m, i, eps=8), r"got 8; did you mean 8/255\?"),
        (lambda m, i: evaluate(m, i, eps=8.0), r"got 8.0; did you mean 8/255\?"),
        (lambda m, i: autoattack(m, i, tier=None), "tier must be standard or lite, got None"),
        (lambda m, i: masking_alarms(m, i, slack=float("nan")), r"slack must lie in \[0, 1\], got nan"),
        (lambda m, i: masking_alarms(m, i, steps=0), "steps must be a whole number >= 1, got 0"),
        (lambda m, i: masking_alarms(m, i, queries=None), "queries must be a whole number >= 1, got None"),
        (lambda m, i: masking_alarms(m, i, surrogate="m"), "surrogate must be an nn.Module, got 'm'"),
        (lambda m, i: evaluate(nn.Linear(8, 10).half(), i), "float16 does not take torch.float32 images"),
    ],
)
def test_bad_input_is_one_line(natural, few, call, words):
    one_line(lambda: call(natural, few), words)


class Gives(nn.Module):
    def __init__(self, model, wrap):
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, x):
        return self.wrap(self.model(x))


DOORS = {
    "evaluate": evaluate,
    "robust_accuracy": lambda m, i, **more: robust_accuracy(m, i, pgd, **more),
    "autoattack": lambda m, i, **more: autoattack(m, i, tier="lite", **more),
    "masking_alarms": lambda m, i, **more: masking_alarms(m, i, steps=2, queries=2, **more),
}
each_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@each_door
def test_networks_that_are_not_plain(natural, few, door):
    wraps = {"a tuple": lambda z: (z, z), "a dict": lambda z: {"logits": z}, "shape": lambda z: z[:, 0]}
    for got, wrap in wraps.items():
        words = rf"must return logits of shape \(40, K\), got {got}"
        one_line(partial(door, Gives(natural, wrap), few), words)


@each_door
def test_torchscript_works_as_it_is(natural, few, door):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(natural.eval(), few.floats())
    assert door(script, few, fast=False) == door(natural, few, fast=False)
    if door is not evaluate:
        one_line(lambda: door(script, few), "TorchScript network cannot be folded.*fast=False")


@each_door
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_models_of_another_precision(conv, few, door, kind):
    door(copy.deepcopy(conv).to(kind), few.subset(torch.arange(5)))


@each_door
def test_inside_inference_mode_as_outside(natural, few, door):
    few = few.subset(torch.arange(9))
    wanted = door(natural, few)
    with torch.inference_mode():
        assert door(natural, few) == wanted


def test_a_masked_class_is_no_nan(natural, few):
    mask = torch.zeros(10).index_fill(0, torch.tensor(3), -torch.inf)
    found = evaluate(Gives(natural, lambda z: z + mask), few, [partial(pgd, eps=EPS, steps=2)])
    assert all(v == v for v in found.values())


def test_missing_extra_is_said_before_any_work(natural, few, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    path = tmp_path / "aa.json"
    one_line(lambda: autoattack(natural, few, checkpoint=path), r"pip install 'kdnb\[eval\]'")
    one_line(lambda: evaluate(natural, few, [pgd], autoattack="lite"), r"pip install 'kdnb\[eval\]'")
    assert not path.exists() and evaluate(natural, few)  # the rest works without


def test_probabilities_are_warned_about(natural, few):
    with pytest.warns(UserWarning, match="probabilities"):
        robust_accuracy(nn.Sequential(natural, nn.Softmax(1)), few, lambda model, x, y: x)


def test_verdict_by_hand():
    verdict = Verdict("autoattack-linf-0.1", ("clean", "a", "b"), ("", "b", "clean", ""))
    assert verdict.survivors == {"clean": 3, "a": 3, "b": 2}
    assert (verdict.clean, verdict.accuracy) == (0.75, 0.5)
    assert verdict.robust.tolist() == [True, False, False, True]
