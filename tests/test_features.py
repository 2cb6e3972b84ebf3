"`kdnb.features`: what each loss sees, both forms by independent formulas, two stages, bad input."

import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import Two, same
from hypothesis import given
from hypothesis import strategies as st

from kdnb.data import Batches
from kdnb.features import (
    AT,
    FSP,
    FeatureKD,
    FitNet,
    attention_loss,
    attention_map,
    fsp_loss,
    fsp_matrix,
    hint_loss,
    hint_regressor,
    match_layers,
    to_smallest,
)
from kdnb.kd import kd_loss
from kdnb.models import create_model, features
from kdnb.training import Supervised, fit

seeds, sizes = st.integers(0, 10**6), st.integers(1, 5)


def maps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- hints


@given(seeds, sizes, sizes, sizes)
def test_hint_loss_in_both_reductions(seed, channels, height, width):
    a, b = (maps(3, channels, height, width, seed=s) for s in (seed, seed + 1))
    torch.testing.assert_close(hint_loss(a, b), F.mse_loss(a, b))
    by_hand = sum(0.5 * float(((a[i] - b[i]) ** 2).sum()) for i in range(3)) / 3
    assert hint_loss(a, b, reduction="half_sum").item() == pytest.approx(by_hand, rel=1e-12)


def test_hint_loss_by_hand_and_its_gradients():
    a = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 4.0]]]], requires_grad=True)
    b = torch.zeros(2, 1, 1, 2, requires_grad=True)
    assert hint_loss(a, b).item() == 21 / 4 and hint_loss(a, b, reduction="half_sum").item() == 21 / 4
    ours, theirs = torch.autograd.grad(hint_loss(a, b), (a, b))  # nothing is detached in secret
    assert ours.equal(a.detach() / 2) and theirs.equal(-ours)


def test_regressor_translates_only_the_student():
    a, b = maps(2, 3, 4, 4).float(), maps(2, 5, 2, 2, seed=1).float()
    regressor = hint_regressor(a, b, seed=0)
    torch.testing.assert_close(hint_loss(a, b, regressor), F.mse_loss(regressor(a), b))


@pytest.mark.parametrize(
    ("ours", "theirs", "kernel"),
    [
        ((2, 3, 8, 8), (2, 5, 8, 8), (1, 1)),
        ((2, 3, 8, 8), (2, 5, 4, 4), (5, 5)),
        ((1, 4, 7, 5), (3, 2, 6, 1), (2, 5)),
        ((2, 3, 2, 2), (2, 5, 4, 4), (1, 1)),
        ((2, 3, 2, 6), (2, 5, 5, 4), (1, 3)),
    ],
)
def test_regressor_shapes(ours, theirs, kernel):
    regressor = hint_regressor(torch.zeros(ours), torch.zeros(theirs))
    convolution = next(m for m in regressor.modules() if isinstance(m, torch.nn.Conv2d))
    assert convolution.kernel_size == kernel and convolution.padding == (0, 0)
    assert regressor(torch.zeros(ours)).shape == (ours[0], *theirs[1:])


def test_the_regressors_seed_is_its_own():
    a, b = torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 4, 4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second, other = (hint_regressor(a, b, seed=s).weight for s in (0, 0, 1))
    assert torch.get_rng_state().equal(before)
    assert first.equal(second) and not first.equal(other)
    drawn = hint_regressor(a, b).weight
    assert not torch.get_rng_state().equal(before)
    torch.manual_seed(7)
    assert drawn.equal(hint_regressor(a, b).weight)


# ---------------------------------------------------------------- attention


@given(seeds, st.floats(1e-3, 1e3), st.floats(1, 4))
def test_attention_forgets_scale_sign_and_channels(seed, scale, power):
    m = maps(2, 4, 3, 5, seed=seed)
    expected = attention_map(m, power)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    for other in (scale * m, -m, m[:, order], m.repeat(1, 2, 1, 1)):
        torch.testing.assert_close(attention_map(other, power), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(attention_map(m.flip(3), power), expected)  # it knows where


@given(seeds, st.sampled_from([1.0, 2.0, 3.0, 4.0]))
def test_attention_by_an_explicit_loop(seed, power):
    m = maps(2, 3, 2, 3, seed=seed)
    for image, row in zip(m, attention_map(m, power), strict=True):
        q = [sum(abs(float(image[c, i, j])) ** power for c in range(3)) for i in range(2) for j in range(3)]
        length = sum(v * v for v in q) ** 0.5
        assert row.tolist() == pytest.approx([v / length for v in q], rel=1e-9)


@given(seeds)
def test_both_forms_of_attention(seed):
    ours = [maps(3, 4, 5, 5, seed=seed), maps(3, 2, 3, 2, seed=seed + 1)]
    theirs = [maps(3, 6, 5, 5, seed=seed + 2), maps(3, 2, 3, 2, seed=seed + 3)]
    norm = square = 0.0
    for a, b in zip(ours, theirs, strict=True):
        qa, qb = (m.pow(2).sum(1).flatten(1) for m in (a, b))
        gap = qa / qa.norm(dim=1, keepdim=True) - qb / qb.norm(dim=1, keepdim=True)
        norm, square = norm + gap.norm(dim=1).mean(), square + gap.pow(2).sum(1).mean() / gap.shape[1]
    torch.testing.assert_close(attention_loss(ours, theirs, form="norm"), norm)
    torch.testing.assert_close(attention_loss(ours, theirs), square)
    named = [{"p": pair[0], "q": pair[1]} for pair in (ours, theirs)]
    assert attention_loss(*named).equal(attention_loss(ours, theirs))


@pytest.mark.parametrize("form", ["norm", "mean_square"])
def test_equal_maps_cost_nothing_and_pull_nowhere(form):
    m = maps(3, 4, 5, 5)
    leaf = m.clone().requires_grad_()
    loss = attention_loss([leaf], [m], form)
    loss.backward()
    assert loss.item() == 0 and leaf.grad.eq(0).all()
    # one image that agrees must not spoil the gradient of another
    other = m.clone()
    other[0] = maps(4, 5, 5, seed=9)
    leaf = m.clone().requires_grad_()
    attention_loss([leaf], [other], form).backward()
    assert leaf.grad.isfinite().all() and leaf.grad[0].abs().max() > 0 and leaf.grad[1:].eq(0).all()


@pytest.mark.parametrize("form", ["norm", "mean_square"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_dead_maps_give_no_nan(form, power):
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    assert attention_map(dead, power).eq(0).all()
    for theirs in (torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4)):
        (gradient,) = torch.autograd.grad(attention_loss([dead], [theirs], form, power), dead)
        assert gradient.isfinite().all()


@given(seeds, st.sampled_from(["norm", "mean_square"]))
def test_attention_pools_the_larger_map(seed, form):
    a, b = maps(2, 3, 8, 4, seed=seed), maps(2, 5, 4, 4, seed=seed + 1)
    small = F.avg_pool2d(a, (2, 1))
    torch.testing.assert_close(attention_loss([a], [b], form), attention_loss([small], [b], form))
    torch.testing.assert_close(attention_loss([b], [a], form), attention_loss([b], [small], form))
    assert to_smallest(a, b)[1] is b and to_smallest(b, b)[0] is b
    crossed = to_smallest(maps(2, 3, 8, 2), maps(2, 3, 4, 4), maps(2, 1, 9, 9))
    assert [m.shape[2:] for m in crossed] == [(4, 2)] * 3


def test_gradient_of_the_norm_form():
    a, b = maps(2, 3, 2, 2).requires_grad_(), maps(2, 3, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: attention_loss([a], [b], "norm"), (a, b))


# ---------------------------------------------------------------- flow


@given(seeds, sizes, sizes)
def test_fsp_matrix_by_an_explicit_loop(seed, first, last):
    a, b = maps(2, first, 3, 4, seed=seed), maps(2, last, 3, 4, seed=seed + 1)
    found = fsp_matrix(a, b)
    assert found.shape == (2, first, last)
    for n in range(2):
        for i in range(first):
            for j in range(last):
                places = [(s, t) for s in range(3) for t in range(4)]
                expected = sum(float(a[n, i, s, t] * b[n, j, s, t]) for s, t in places) / 12
                assert found[n, i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_fsp_pools_the_larger_map():
    a, b = maps(2, 3, 8, 8), maps(2, 5, 4, 4, seed=1)
    torch.testing.assert_close(fsp_matrix(a, b), fsp_matrix(F.max_pool2d(a, 2), b))
    torch.testing.assert_close(fsp_matrix(b, a), fsp_matrix(b, F.max_pool2d(a, 2)))


@given(seeds)
def test_fsp_loss_is_a_mean_over_pairs_and_forgets_places(seed):
    ours, theirs = ([maps(2, c, 4, 4, seed=seed + k + c) for c in (2, 3, 4)] for k in (0, 10))
    parts = [fsp_matrix(*ours[k : k + 2]) - fsp_matrix(*theirs[k : k + 2]) for k in (0, 1)]
    expected = (parts[0].pow(2).mean() + parts[1].pow(2).mean()) / 2
    torch.testing.assert_close(fsp_loss(ours, theirs), expected)
    assert fsp_loss(theirs, theirs) == 0
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    moved = [m.flatten(2)[:, :, order].view_as(m) for m in ours]
    torch.testing.assert_close(fsp_loss(moved, theirs), expected)


# ---------------------------------------------------------------- methods


def net(seed=0, name="resnet8"):
    return create_model(name, in_channels=1, image_size=8, seed=seed)


def batch(digits):
    return digits.train.floats()[:16], digits.train.y[:16]


STEM = dict(student_layers="stem", teacher_layers="stem")
SOFT = dict(soft=partial(kd_loss, temperature=4.0), alpha=0.9)
METHODS = {
    "FitNet": lambda s, t, x, **kw: FitNet(s, t, x, seed=0, **kw),
    "AT": lambda s, t, x, **kw: AT(s, t, beta=60.0, **kw),
    "AT norm": lambda s, t, x, **kw: AT(s, t, form="norm", beta=1.0, **kw),
    "FSP": lambda s, t, x, **kw: FSP(s, t, **kw),
}
each_method = pytest.mark.parametrize("name", METHODS)


@each_method
def test_the_teacher_is_untouched(name, digits):
    teacher, (x, y) = net(1, "resnet14").train(), batch(digits)
    before = copy.deepcopy(teacher.state_dict())
    student = net()
    start = copy.deepcopy(student.state_dict())
    method = METHODS[name](student, teacher, x, **SOFT, lr=0.05)
    assert same(student.state_dict(), start)  # making a method changes nothing yet
    found = method.step(x, y)
    assert same(before, teacher.state_dict()) and not same(start, student.state_dict())
    assert not any(m.training for m in teacher.modules()) and all(m.training for m in student.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert list(found) == ["loss", "hard", "soft", "transfer"]
    assert all(v.isfinite() and not v.requires_grad for v in found.values())
    expected = 0.1 * found["hard"] + 0.9 * found["soft"] + method.beta * found["transfer"]
    torch.testing.assert_close(found["loss"], expected)


@each_method
def test_step_is_sgd_on_the_written_loss(name, digits):
    "Rebuilt from the parts: no hidden factor, no forgotten part."
    (x, y), teacher = batch(digits), net(1, "resnet14").eval()
    method = METHODS[name](net(), teacher, x, lr=0.01, weight_decay=0.0, **SOFT)
    twin = copy.deepcopy(method.student)
    layers = ["stage2"] if name == "FitNet" else ["stage1", "stage2", "stage3"]
    with torch.no_grad():
        teacher_logits, theirs = features(teacher, x, layers)
    logits, ours = features(twin, x, layers)
    if name == "FitNet":
        regressor = hint_regressor(ours["stage2"].detach(), theirs["stage2"], seed=0)
        extra = 10.0 * F.mse_loss(regressor(ours["stage2"]), theirs["stage2"])
    elif name == "FSP":
        extra = fsp_loss(ours, theirs)
    else:
        extra = (1.0 if "norm" in name else 60.0) * attention_loss(
            ours, theirs, "norm" if "norm" in name else "mean_square"
        )
    (0.1 * F.cross_entropy(logits, y) + 0.9 * kd_loss(logits, teacher_logits, 4.0) + extra).backward()
    expected = [p.detach() - 0.01 * p.grad for p in twin.parameters()]
    method.step(x, y)
    for got, want in zip(method.student.parameters(), expected, strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-3, atol=1e-5)


def test_without_maps_it_is_plain_training(digits):
    batches = Batches(digits.train.subset(torch.arange(96)), 32)
    plain, untaught = Supervised(net(), lr=0.05), AT(net(), net(1), beta=0.0, lr=0.05)
    for method in (plain, untaught):
        fit(method, batches, epochs=2, progress="off")
    assert same(plain.student.state_dict(), untaught.student.state_dict())


@pytest.mark.parametrize("name", ["FitNet", "FSP"])
def test_the_first_stage_does_not_know_the_labels(name, digits):
    x, y = batch(digits)
    students, start = [], net().state_dict()
    for labels in (y, (y + 1) % 10):
        method = METHODS[name](net(), net(1, "resnet14"), x, pretrain_epochs=1, **SOFT, lr=0.05)
        for _ in range(3):
            found = method.step(x, labels)
            torch.testing.assert_close(found["loss"], method.beta * found["transfer"])
        students.append(method.student.state_dict())
    assert same(*students)
    still = {k for k, p in net().named_parameters() if students[0][k].equal(start[k])}
    assert {"linear.weight", "linear.bias"} <= still and "stage1.0.body.0.weight" not in still
    behind = {k for k in dict(net().named_parameters()) if k.startswith("stage3")}
    assert (behind <= still) == (name == "FitNet")  # not even weight decay
    joint = METHODS[name](net(), net(1, "resnet14"), x, lr=0.05)
    other = METHODS[name](net(), net(1, "resnet14"), x, lr=0.05)
    joint.step(x, y), other.step(x, (y + 1) % 10)
    assert not same(joint.student.state_dict(), other.student.state_dict())


@pytest.mark.parametrize("name", ["FitNet", "FSP"])
@pytest.mark.parametrize("soft", [{}, SOFT], ids=["labels", "answers"])
def test_the_second_stage_does_not_know_the_maps(name, soft, digits):
    "It is supervised training or KD from where the first one ended, with fresh momentum."
    part = digits.train.subset(torch.arange(64))
    x = part.floats()[:8]
    method = METHODS[name](net(), net(1, "resnet14"), x, pretrain_epochs=2, lr=0.05, **soft)
    history = fit(method, Batches(part, 32), epochs=3, progress="off")
    assert history["transfer"][0] > history["transfer"][1] > 0 == history["transfer"][2]
    assert history["soft"][1] == 0 and (history["soft"][2] > 0) == bool(soft)
    first = METHODS[name](net(), net(1, "resnet14"), x, pretrain_epochs=2, lr=0.05, **soft)
    fit(first, Batches(part, 32), epochs=2, progress="off")
    teacher = net(1, "resnet14")
    by_hand = FeatureKD(first.student, teacher, fsp_loss, beta=0.0, lr=0.05, **soft)
    for x, y in Batches(part, 32).epoch(2):
        by_hand.step(x, y)
    assert same(method.student.state_dict(), by_hand.student.state_dict())


def test_the_regressor_learns_in_the_first_stage_only(digits):
    part = digits.train.subset(torch.arange(64))
    method = METHODS["FitNet"](net(), net(1), part.floats()[:8], pretrain_epochs=1, lr=0.05)
    states = []
    for epoch in range(2):
        states.append(copy.deepcopy(method.transfer.regressor.state_dict()))
        method.start_epoch(epoch)
        for x, y in Batches(part, 32).epoch(epoch):
            method.step(x, y)
        method.end_epoch(epoch)
    states.append(method.transfer.regressor.state_dict())
    assert not same(states[0], states[1]) and same(states[1], states[2])


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("name", ["FitNet", "FSP", "AT"])
def test_resume_is_bit_identical(name, stop, digits, tmp_path):
    "Before, at and behind the border of the two stages (4 steps), in the middle of an epoch or not."
    part = digits.train.subset(torch.arange(64))

    def new():
        stages = {} if name == "AT" else {"pretrain_epochs": 2}
        x = part.floats()[:8]
        return METHODS[name](net(), net(1, "resnet14"), x, lr=0.02, **SOFT, **stages)

    batches, path, common = Batches(part, 32), tmp_path / "run.pt", dict(epochs=4, progress="off")
    whole, first, second = new(), new(), new()
    fit(whole, batches, **common)
    fit(first, batches, **common, checkpoint=path, max_steps=stop)
    fit(second, batches, **common, checkpoint=path)
    assert same(whole.student.state_dict(), second.student.state_dict())
    if name == "FitNet":
        assert same(whole.transfer.state_dict(), second.transfer.state_dict())
        parts = torch.load(path, weights_only=True)["parts"]
        assert "regressor.weight" in parts["transfer"]
    fit(second, batches, **common, checkpoint=path)  # a finished one may be asked for again


@each_method
def test_bf16(name, digits):
    part = digits.train.subset(torch.arange(64))
    method = METHODS[name](net(), net(1, "resnet14"), part.floats()[:8], lr=0.02, **SOFT)
    history = fit(method, Batches(part, 32), epochs=2, precision="bf16", progress="off")
    assert all(value == value and abs(value) < 1e4 for value in history["loss"] + history["transfer"])
    exact = METHODS[name](net(), net(1, "resnet14"), part.floats()[:8], lr=0.02, **SOFT)
    x, y = batch(digits)
    found = [METHODS[name](net(), net(1, "resnet14"), x, **SOFT) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        rough = found[0].step(x, y)["transfer"]
    exact = found[1].step(x, y)["transfer"]
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.05)


@each_method
def test_it_learns(name, digits):
    teacher = net(1)
    few = digits.train.subset(torch.arange(300))
    fit(Supervised(teacher, lr=0.05), Batches(digits.train, 64), epochs=4, progress="off")
    stages = {"pretrain_epochs": 2} if name in ("FitNet", "FSP") else {}
    method = METHODS[name](net(), teacher, few.floats()[:8], lr=0.05, **stages)
    fit(method, Batches(few, 32), epochs=10, progress="off")
    with torch.no_grad():
        right = (method.student.eval()(digits.val.floats()).argmax(1) == digits.val.y).float().mean()
    assert right > 0.8


def test_any_loss_on_maps_makes_a_method(digits):
    x, y = batch(digits)
    seen = []

    def transfer(ours, theirs):
        seen.append((list(ours), list(theirs)))
        return (ours["stem"].mean() - theirs["stem"].mean()) ** 2

    found = FeatureKD(net(), net(1), transfer, beta=2.0, **STEM).step(x, y)
    assert seen == [(["stem"], ["stem"])]
    torch.testing.assert_close(found["loss"], found["hard"] + 2 * found["transfer"])


# ---------------------------------------------------------------- networks of two kinds

RGB, CLASSES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 1, 2])
STRANGERS = [
    ("resnet8", "timm:resnet18", "stage1 layer1 stage2 layer2 stage3 layer3"),
    ("mobilenet_v2", "wrn_40_2", "stage2 stage1 stage3 stage2 stage4 stage3"),
    ("torchvision:resnet18", "torchvision:resnet50", "relu relu layer1 layer1 layer2 layer2 layer3 layer3"),
]
each_two = pytest.mark.parametrize(("student", "teacher", "pairs"), STRANGERS, ids=[s for s, *_ in STRANGERS])


def two(student, teacher):
    return [create_model(name, num_classes=4, seed=k) for k, name in enumerate((student, teacher))]


@each_two
def test_natural_stages_pair_from_the_smallest_map_upwards(student, teacher, pairs):
    nets = two(student, teacher)
    before, random = [copy.deepcopy(n.state_dict()) for n in nets], torch.get_rng_state()
    found = match_layers(*nets, RGB)
    assert " ".join(f"{a} {b}" for a, b in zip(*found, strict=True)) == pairs
    assert random.equal(torch.get_rng_state()) and all(m.training for n in nets for m in n.modules())
    assert all(same(n.state_dict(), old) for n, old in zip(nets, before, strict=True))
    with torch.no_grad():
        assert same(features(nets[0].eval(), RGB, list(found[0]))[1], found[0])


@each_two
@pytest.mark.parametrize("name", ["FitNet", "AT", "AT norm"])
def test_strangers_teach(name, student, teacher, pairs):
    method = METHODS[name](*two(student, teacher), RGB, lr=1e-3)
    begun = copy.deepcopy(method.student.state_dict())
    for _ in range(2):
        found = method.step(RGB, CLASSES)
    assert found["loss"].isfinite() and found["transfer"] > 0
    assert not same(begun, method.student.state_dict())


@each_two
def test_flow_of_strangers_is_refused_with_a_choice(student, teacher, pairs):
    with pytest.raises(ValueError, match="FSP needs pairs of layers with as many channels") as error:
        FSP(*two(student, teacher)).step(RGB, CLASSES)
    text, names = str(error.value), pairs.split()
    assert "\n" not in text and f"paired were {names[0]} " in text and f" with {names[1]} " in text
    assert "to choose from, student: " in text and "; teacher: " in text
    alike = re.findall(r"(\S+) with (\S+) \(\d+\)", text.partition("; of equal channels are ")[2])
    assert alike
    ours, theirs = map(list, zip(*alike, strict=True))
    if len(alike) > 1:  # the way out
        named = dict(student_layers=ours, teacher_layers=theirs)
        assert FSP(*two(student, teacher), **named).step(RGB, CLASSES)["transfer"] > 0


def test_flow_of_named_layers_as_wide():
    "64 and 128 channels, as two of a teacher that is wider elsewhere."
    named = dict(student_layers=["layer1", "layer2"], teacher_layers=["stage1", "stage2"])
    method = FSP(*two("torchvision:resnet18", "resnet18"), lr=1e-3, **named)
    assert all(method.step(RGB, CLASSES)["loss"].isfinite() for _ in range(2))


def test_hints_by_name():
    named = dict(student_layers="stage3", teacher_layers="layer1.0")
    method = FitNet(*two("resnet8", "timm:resnet18"), RGB, **named)
    assert method.layers == [["stage3"], ["layer1.0"]] and method.step(RGB, CLASSES)["transfer"] > 0
    assert FitNet(net(), net(1, "resnet14"), X).layers == [["stage2"], ["stage2"]]


def test_tokens_are_refused_but_a_loss_of_your_own_may_take_them():
    nets = two("resnet8", "timm:vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="name the layers.*tokens"):
        AT(*nets).step(RGB, CLASSES)
    named = dict(student_layers="stage3", teacher_layers="blocks.5")
    for refused in (lambda: AT(*nets, **named).step(RGB, CLASSES), lambda: FitNet(*nets, RGB, **named)):
        with pytest.raises(ValueError, match="stage3 64 x 8 x 8 with blocks.5 5 x 192") as error:
            refused()
        assert "tokens (B, N, D) need FeatureKD with a transfer of your own" in str(error.value)

    def folded(ours, theirs):  # four patches behind the class token
        tokens = theirs["blocks.5"][:, 1:].mT.unflatten(2, (2, 2))
        return attention_loss(ours, [tokens])

    found = FeatureKD(*nets, folded, beta=10.0, **named).step(RGB, CLASSES)
    assert found["transfer"] > 0


# ---------------------------------------------------------------- bad input

A = torch.zeros(2, 3, 4, 4)
B = torch.zeros(2, 5, 4, 4)
X, Y = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])


def any_loss(ours, theirs):
    return torch.zeros(())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: hint_loss(A, B), r"a regressor.*got shape \(2, 3, 4, 4\) and shape \(2, 5, 4, 4\)"),
        (lambda: hint_loss(A, A, reduction="sum"), "reduction must be mean or half_sum, got 'sum'"),
        (lambda: attention_map(A[0]), r"maps must be \(B, D, H, W\), got shape \(3, 4, 4\)"),
        (lambda: attention_map(A, 0.5), "power must be >= 1, got 0.5"),
        (lambda: attention_loss([A], [A], "l2"), "form must be norm or mean_square, got 'l2'"),
        (lambda: attention_loss([A], [A, A]), "as many student maps as teacher maps, got 1 and 2"),
        (lambda: attention_loss([], []), "got 0 and 0"),
        (lambda: fsp_loss([A], [A]), "FSP needs at least 2 layers, got 1"),
        (lambda: fsp_loss([A, A], [A, B]), "with as many channels, got"),
        (lambda: FeatureKD(net(), net(1), any_loss, beta=-1.0), "beta must be >= 0, got -1.0"),
        (lambda: FeatureKD(net(), net(1), any_loss, beta=float("nan")), "beta must be >= 0, got nan"),
        (lambda: AT(net(), net(1), alpha=1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: AT(net(), net(1), alpha=0.5), "alpha > 0 needs soft"),
        (lambda: AT(net(), net(1), form="l2"), "form must be norm or mean_square, got 'l2'"),
        (
            lambda: FSP(net(), net(1), pretrain_epochs=-1),
            "pretrain_epochs must be a whole number >= 0, got -1",
        ),
        (lambda: FSP(net(), net(1), beta="1"), "beta must be a number >= 0, got '1'"),
        (lambda: AT(net(), net(1), alpha=float("nan")), r"alpha must lie in \[0, 1\], got nan"),
        (lambda: AT(net(), net(1), lr=float("nan")), "lr must be > 0, got nan"),
        (lambda: attention_map(A, float("nan")), "power must be >= 1, got nan"),
        (lambda: FSP(net(), net(1), pretrain_epochs=1.5), "must be a whole number >= 0, got 1.5"),
        (lambda: FSP(net(), net(1), beta=0.0, pretrain_epochs=1), "pretrain_epochs needs beta > 0"),
        (lambda: FitNet(net(), net(1), X, student_layers="stage9", teacher_layers="stage2"), "stage9"),
        (lambda: AT(net(), net(1), student_layers=["stage1"]), r"pairs.*got \['stage1'\] and None"),
        (lambda: AT(net(), net(1), **{k: ["stem"] * 2 for k in STEM}), "none twice, got .*'stem', 'stem'"),
        (lambda: FSP(net(), net(1), **STEM).step(X, Y), "at least 2 layers, got 1; .* stem 16 x 8 x 8"),
    ],
)
def test_bad_input_is_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_attention_of_a_faint_or_a_strong_map():
    maps = torch.rand(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    for power in (2.0, 4.0):
        wanted = attention_map(maps, power)
        for scale in (1e-12, 1e5, 1e12):
            found = attention_map(scale * maps, power)
            assert torch.allclose(found, wanted, atol=1e-5) and torch.allclose(
                found.norm(dim=1), torch.ones(3)
            )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda flat, maps: attention_map(flat),
        lambda flat, maps: hint_regressor(flat, maps),
        lambda flat, maps: fsp_matrix(maps, flat),
        lambda flat, maps: fsp_matrix(maps[0], maps),
    ],
)
def test_what_is_no_map_is_named(wrong):
    with pytest.raises(ValueError, match=r"maps must be \(B, D, H, W\), got shape"):
        wrong(torch.rand(2, 3), torch.rand(2, 3, 4, 4))


# ---------------------------------------------------------------- what is there changes nothing


def leftover(*modules):
    "A gradient as a foreign loop leaves it behind."
    for p in (p for m in modules for p in m.parameters()):
        p.grad = torch.full_like(p, 3.0)


@each_method
def test_leftover_gradients_never_enter(name, digits):
    (x, y), ends = batch(digits), []
    for left in (False, True):
        student, teacher = net(), net(1, "resnet14")
        if left:
            leftover(student, teacher)
        method = METHODS[name](student, teacher, x, lr=0.05, **SOFT)
        if left:
            leftover(student, *[m for m in [method.transfer] if isinstance(m, torch.nn.Module)])
        method.step(x, y), method.step(x, y)
        ends.append(student.state_dict())
    assert same(*ends)


@each_method
def test_a_batch_norm_that_its_owner_froze_stays(name, digits):
    (x, y), student = batch(digits), net()
    still = student.stem[1].eval().requires_grad_(False)
    before = copy.deepcopy(still.state_dict())
    METHODS[name](student, net(1, "resnet14"), x).step(x, y)
    assert not still.training and student.training and same(before, still.state_dict())


@each_method
def test_networks_that_share_modules_are_refused(name, digits):
    x, student, teacher = batch(digits)[0], net(), net(1)
    with pytest.raises(ValueError, match="student and teacher share stem.0.weight"):
        METHODS[name](student, student, x)
    teacher.stem = student.stem
    with pytest.raises(ValueError, match="student and teacher share stem.0.weight"):
        METHODS[name](student, teacher, x)


LOSSES = {
    "hint_loss": lambda a, b: hint_loss(a[0], b[0]),
    "half_sum": lambda a, b: hint_loss(a[0], b[0], reduction="half_sum"),
    "attention_map": lambda a, b: attention_map(a[0]).sum(),
    "attention_loss": attention_loss,
    "norm": lambda a, b: attention_loss(a, b, "norm"),
    "fsp_matrix": lambda a, b: fsp_matrix(a[0], a[1]).square().sum(),
    "fsp_loss": fsp_loss,
}


def two_lists(dtype=torch.float32):
    return [[maps(3, c, n, n, seed=s + c).to(dtype) for c, n in ((2, 4), (3, 2))] for s in (0, 9)]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_at_least_float32_and_compile(name):
    loss = LOSSES[name]
    ours, theirs = two_lists(torch.bfloat16)
    wanted = loss([m.float() for m in ours], [m.float() for m in theirs])
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(ours, theirs).equal(wanted)  # float32, and not a bit less
        assert loss(*two_lists(torch.float64)).dtype == torch.float64
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*two_lists()), loss(*two_lists()))


@each_method
def test_float64_stays_float64(name, digits):
    (x, y), (student, teacher) = batch(digits), (net().double(), net(1).double())
    found = METHODS[name](student, teacher, x.double(), **SOFT).step(x.double(), y)
    assert all(v.dtype == torch.float64 for v in found.values())


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("who", [0, 1])
def test_a_model_that_gives_more_than_logits_is_refused(who, beta, digits):
    x, y = batch(digits)
    nets = [Two(net(k)) if k == who else net(k) for k in (0, 1)]
    with pytest.raises(ValueError, match=r"logits of shape \(16, K\), got a tuple; wrap"):
        FeatureKD(*nets, lambda a, b: a["0"].sum(), beta=beta, **SOFT).step(x, y)
