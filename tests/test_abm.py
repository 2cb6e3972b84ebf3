"`kdnb.abm`: the generator, whose gradient goes where, what is drawn when, curves written out, bad input."

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Two, state, stream
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdnb.abm import (
    ABM,
    CollapseAlarm,
    Generator,
    abm_student_loss,
    generator_loss,
    mean_transition_error,
    transition_curves,
)
from kdnb.features import attention_loss
from kdnb.models import create_model, features, num_params
from kdnb.training import fit

SHAPE = dict(num_classes=4, in_channels=1, image_size=8)
STAGE1 = dict(student_layers="stage1", teacher_layers="stage1")


def pair(student="resnet8", teacher="resnet8"):
    nets = [create_model(name, **SHAPE, seed=i) for i, name in enumerate((student, teacher))]
    with torch.no_grad():
        for m in nets[1].modules():  # a teacher whose statistics are not those of a newborn
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.uniform_(-0.2, 0.2, generator=stream(7))
                m.running_var.uniform_(0.7, 1.3, generator=stream(8))
    return nets


def method(student="resnet8", teacher="resnet8", z_size=5, **choices):
    student, teacher = pair(student, teacher)
    usual = dict(steps=10, batch_size=8, student_steps=3)
    return ABM(student, teacher, Generator(z_size, 1, 8, seed=3), **usual | choices)


def moved(before, module):
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


# ---------------------------------------------------------------- the generator


def test_generator_has_the_published_number_of_parameters():
    assert num_params(Generator()) == 1_051_145


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28), (1, 8), (3, 16)])
def test_generator_gives_standardised_images_of_the_wanted_shape(channels, size):
    z = torch.randn(64, 100, generator=stream(0))
    x = Generator(100, channels, size, seed=0)(z)
    assert x.shape == (64, channels, size, size)
    std, mean = torch.std_mean(x, (0, 2, 3))
    assert mean.abs().max() < 1e-3
    assert (std - 1).abs().max() < 1e-2


def test_generator_written_out():
    made, z = Generator(5, 1, 8, seed=0), torch.randn(16, 5, generator=stream(0))
    convs = [m for m in made.layers if isinstance(m, nn.Conv2d)]

    def norm(x):  # fresh weights are 1, biases 0
        return F.batch_norm(x, None, None, training=True)

    x = norm(made.linear(z).view(16, 128, 2, 2))
    for conv in convs[:2]:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = F.leaky_relu(norm(conv(x)), 0.2)
    torch.testing.assert_close(made(z), norm(convs[2](x)), rtol=1e-4, atol=1e-5)


def test_generator_undoes_the_networks_normalisation():
    plain, ours = Generator(seed=0), Generator(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], seed=0)
    z = torch.randn(16, 100, generator=stream(0))
    net = create_model("resnet8", mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    torch.testing.assert_close(net.normalize(ours(z)), plain(z), rtol=1e-5, atol=1e-5)


def test_generator_seed_is_its_own():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (Generator(5, 1, 8, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.linear.weight, b.linear.weight) and not torch.equal(a.linear.weight, c.linear.weight)


@pytest.mark.parametrize("size", [0, 2, 30])
def test_generator_refuses_sizes_it_cannot_reach(size):
    with pytest.raises(ValueError, match=f"image_size must be .*, got {size}"):
        Generator(image_size=size)


@pytest.mark.parametrize("choices", [dict(z_size=0), dict(channels=0), dict(z_size=5.0)])
def test_generator_refuses_sizes_that_are_none(choices):
    with pytest.raises(ValueError, match=f"{[*choices][0]} must be a whole number"):
        Generator(**choices)


# ---------------------------------------------------------------- losses


def test_kl_is_of_the_teacher_to_the_student():
    half, most = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert abs_close(abm_student_loss(most, half, beta=0), 0.5108)
    assert abs_close(abm_student_loss(half, most, beta=0), 0.3681)
    assert abs_close(generator_loss(most, half), -0.5108)


def abs_close(value, wanted):
    return abs(value.item() - wanted) < 1e-4


@given(st.integers(0, 1000))
def test_losses_against_probabilities_written_out(seed):
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64, generator=stream(seed)) * 3
    t, s = teacher.softmax(1), student.softmax(1)
    kl = (t * (t / s).log()).sum(1).mean()
    torch.testing.assert_close(generator_loss(student, teacher), -kl)
    torch.testing.assert_close(generator_loss(student, teacher, "mean"), -kl / 5)
    assert kl > 0
    torch.testing.assert_close(generator_loss(student + 3, student), kl * 0)


def test_student_loss_is_kl_plus_beta_attention():
    logits = torch.randn(2, 6, 5, generator=stream(0))
    maps = [[torch.randn(6, d, 4, 4, generator=stream(d + i)) for d in (3, 5)] for i in (0, 1)]
    for form in ("norm", "mean_square"):
        wanted = abm_student_loss(*logits, beta=0) + 7 * attention_loss(*maps, form)
        torch.testing.assert_close(abm_student_loss(*logits, *maps, beta=7, form=form), wanted)


def test_attention_forms_are_what_the_papers_equation_and_the_code_say():
    ours, theirs = (torch.randn(6, d, 4, 4, generator=stream(d)) for d in (3, 5))
    f, g = (F.normalize(m.square().mean(1).flatten(1), dim=1) for m in (ours, theirs))
    zero = torch.zeros(6, 2)
    paper = abm_student_loss(zero, zero, [ours], [theirs], 1.0)
    code = abm_student_loss(zero, zero, [ours], [theirs], 1.0, form="mean_square")
    torch.testing.assert_close(paper, (f - g).norm(dim=1).mean())
    torch.testing.assert_close(code, (f - g).square().sum(1).mean() / 16)
    assert abm_student_loss(zero, zero, [ours], [-3 * ours[:, [2, 0, 1]]], 1.0) < 1e-6


def test_the_generators_gradient_goes_through_both_networks():
    student, teacher = (torch.randn(4, 3, generator=stream(i), requires_grad=True) for i in (0, 1))
    generator_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad.abs().sum() > 0


# ---------------------------------------------------------------- who moves, when


def test_who_moves_in_which_step():
    abm, seen = method(student_steps=1), {}

    def look(when):
        seen[when] = {n: state(getattr(abm, n)) for n in ("student", "teacher", "generator")}

    abm.generator_optimizer.register_step_post_hook(lambda *_: look("between"))
    look("before")
    abm.step()
    look("after")

    def moved_weights(net, start, end):
        names = [k for k, _ in getattr(abm, net).named_parameters()]
        return {k for k in names if not torch.equal(seen[start][net][k], seen[end][net][k])}, set(names)

    for net, start, end in (("student", "before", "between"), ("generator", "between", "after")):
        assert not moved_weights(net, start, end)[0]
    for net, start, end in (("generator", "before", "between"), ("student", "between", "after")):
        some, every = moved_weights(net, start, end)
        # a bias in front of batch norm has rounding errors for a gradient: it may stand still
        assert len(some) >= len(every) - 3
    assert all(torch.equal(v, seen["after"]["teacher"][k]) for k, v in seen["before"]["teacher"].items())


def test_without_generator_steps_the_generator_stands_still():
    abm = method(generator_steps=0)
    before = state(abm.generator)
    found = abm.step()
    assert not moved(before, abm.generator) & {k for k, _ in abm.generator.named_parameters()}
    assert "generator" not in found and found["loss"] > 0


def test_nobody_keeps_a_gradient_and_the_teacher_never_has_one():
    abm = method()
    abm.step()
    for net in (abm.student, abm.teacher, abm.generator):
        assert all(p.grad is None for p in net.parameters())
    assert not any(p.requires_grad for p in abm.teacher.parameters())
    assert all(p.requires_grad for p in abm.student.parameters())


def test_modes_and_the_students_batch_counts():
    abm = method(student_steps=4, generator_steps=2)
    for _ in range(3):
        abm.step()
    assert abm.student.training and abm.generator.training and not abm.teacher.training
    counts = [m.num_batches_tracked.item() for m in abm.student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(counts) == {3 * (4 + 2)}  # the generator's steps count too, as in the official code


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_one_iteration_is_the_algorithm_written_out(variant):
    "Against the paper's loop: everything generated, answered and differentiated anew in each step."
    abm = method(variant=variant, fold=False, beta=3.0)
    student, teacher, generator = (copy.deepcopy(m) for m in (abm.student, abm.teacher, abm.generator))
    official = variant == "official"
    reduction, form = ("mean", "mean_square") if official else ("batchmean", "norm")
    chosen = dict(reduction=reduction, form=form)
    ours = torch.optim.Adam(student.parameters(), 2e-3)
    theirs = torch.optim.Adam(generator.parameters(), 1e-3 if official else 2e-3)
    torch.manual_seed(5)
    z = torch.randn(8, 5)
    torch.manual_seed(5)
    found = abm.step()

    x = generator(z)
    loss = generator_loss(student(x), teacher(x), chosen["reduction"])
    theirs.zero_grad()
    loss.backward()
    if official:
        nn.utils.clip_grad_norm_(generator.parameters(), 5)
    theirs.step()
    torch.testing.assert_close(found["generator"], loss.detach())
    losses = []
    for _ in range(3):
        x = generator(z)
        (logits, maps), (answers, their_maps) = features(student, x), features(teacher, x)
        loss = abm_student_loss(logits, answers, maps, their_maps, 3.0, **chosen)
        ours.zero_grad()
        loss.backward()
        if official:
            nn.utils.clip_grad_norm_(student.parameters(), 5)
        ours.step()
        losses.append(loss.detach())
    torch.testing.assert_close(found["loss"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)
    for net, wanted in ((abm.student, student), (abm.generator, generator)):
        for (name, p), q in zip(net.named_parameters(), wanted.parameters(), strict=True):
            if "bias" not in name:  # in front of batch norm a bias has rounding errors for a gradient
                torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("layers", [{}, dict(student_layers=["stem.0"], teacher_layers=["stem.0"])])
def test_folding_the_teacher_changes_nothing_but_last_bits(layers):
    found = []
    for fold in (True, False):
        torch.manual_seed(0)
        found.append(method(fold=fold, **layers).step())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-5)


def test_the_teacher_is_folded_where_it_can_be():
    def norms(abm):
        return sum(isinstance(m, nn.BatchNorm2d) for m in abm.teacher.modules())

    assert norms(method()) == norms(method(**STAGE1, beta=0)) == 0
    assert norms(method(**STAGE1)) == 0 < norms(method(fold=False))


def test_sure_is_whose_it_says():
    abm = method(student_steps=1)
    nn.init.zeros_(abm.teacher.linear.weight)
    nn.init.zeros_(abm.teacher.linear.bias)
    found = abm.step()
    assert found["teacher_sure"].item() == pytest.approx(0.25) and found["student_sure"] > 0.26


def test_small_steps_do_what_they_are_for():
    student, teacher = (net.eval() for net in pair())
    generator = Generator(5, 1, 8, seed=3).eval()
    z = torch.randn(64, 5, generator=stream(1))

    def kl():
        with torch.no_grad():
            x = generator(z)
            return -generator_loss(student(x), teacher(x)).item()

    def descend(net, loss):
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 1e-3 * p.grad

    before = kl()
    x = generator(z)
    descend(generator, generator_loss(student(x), teacher(x)))
    after = kl()
    assert after > before
    x = generator(z).detach()
    descend(student, abm_student_loss(student(x), teacher(x).detach(), beta=0))
    assert kl() < after


# ---------------------------------------------------------------- rates, noise, switches


@pytest.mark.parametrize(("variant", "rates"), [("paper", (2e-3, 2e-3)), ("official", (2e-3, 1e-3))])
def test_both_rates_follow_half_a_cosine(variant, rates):
    abm = method(variant=variant, steps=6, student_steps=2)
    for k in [*range(7), 6]:  # and there they stay
        for optimizer, rate in zip((abm.optimizer, abm.generator_optimizer), rates, strict=True):
            wanted = rate * (1 + math.cos(math.pi * k / 6)) / 2
            assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted, abs=1e-12)
        abm.step()


VARIANTS = [
    ({}, math.inf),
    (dict(variant="official", clip=math.inf), math.inf),
    (dict(variant="official"), 5.0),
    (dict(variant="official", clip=2.0), 2.0),
]


@pytest.mark.parametrize(("choices", "clip"), VARIANTS)
def test_clip_of_a_variant(choices, clip):
    assert method(**choices).clip == clip


def test_updates_are_counted():
    abm = method(student_steps=4, generator_steps=2)
    for _ in range(3):
        abm.step()
    for optimizer, wanted in ((abm.optimizer, 12), (abm.generator_optimizer, 6)):
        assert {int(s["step"]) for s in optimizer.state.values()} == {wanted}


@pytest.mark.parametrize(("fresh", "draws"), [(False, 1), (True, 3)])
def test_noise_is_drawn_as_documented(fresh, draws):
    abm = method(fresh=fresh)
    seen = []
    abm.generator.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    torch.manual_seed(9)
    abm.step()
    left = torch.get_rng_state()
    torch.manual_seed(9)
    wanted = [torch.randn(8, 5) for _ in range(draws)]
    assert torch.equal(left, torch.get_rng_state())
    # the generator's step and the first student step share their noise
    expected = [wanted[0], *wanted] if fresh else [wanted[0]] * 2
    assert len(seen) == len(expected)
    for z, w in zip(seen, expected, strict=True):
        assert torch.equal(z, w)


def test_clipping_bounds_the_whole_gradient():
    lengths = []
    abm = method(variant="official", clip=1e-4, steps=4)

    def note(optimizer, *_):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]  # as the step used them
        lengths.append(torch.cat([g.flatten() for g in grads]).norm().item())

    for optimizer in (abm.optimizer, abm.generator_optimizer):
        optimizer.register_step_post_hook(note)
    abm.step()
    assert len(lengths) == 4 and max(lengths) <= 1.01e-4 and min(lengths) > 0.5e-4


def test_without_attention_any_two_networks_will_do():
    abm = method("mlp_16", "resnet8", beta=0)
    assert all(v.isfinite() for v in abm.step().values())
    wide = method("resnet8", "wrn_10_1", beta=0)
    assert all(v.isfinite() for v in wide.step().values())


def test_named_layers_are_compared():
    torch.manual_seed(0)
    whole = method(beta=5.0).step()["loss"]
    torch.manual_seed(0)
    one = method(beta=5.0, **STAGE1).step()["loss"]
    assert one < whole


# ---------------------------------------------------------------- fit: no data, stopped and resumed


def test_resumed_to_the_same_bits(tmp_path):
    def train(folder, **more):
        abm = method(steps=8, fresh=True)
        history = fit(abm, steps=8, epoch_steps=4, seed=1, progress="off", **more)
        return abm, history

    straight, history = train(tmp_path)
    for stop in (3, 4, 7):
        file = dict(checkpoint=tmp_path / f"{stop}.pt")
        train(tmp_path, max_steps=stop, **file)
        resumed, again = train(tmp_path, **file)
        for part in ("student", "generator", "alarm"):
            assert not moved(state(getattr(straight, part)), getattr(resumed, part)), (stop, part)
        assert again["loss"] == history["loss"]
    assert len(history) == 2


def test_the_same_method_resumes_its_own_checkpoint(tmp_path):
    abm = method(steps=8)
    file = tmp_path / "one.pt"
    fit(abm, steps=8, epoch_steps=4, max_steps=4, checkpoint=file, progress="off")
    assert len(fit(abm, steps=8, epoch_steps=4, checkpoint=file, progress="off")) == 2


CHANGES = [dict(beta=1.0), dict(fresh=True), dict(variant="official"), dict(lr=1e-3), dict(steps=20)]
CHANGES += [STAGE1, dict(fold=False), dict(z_size=6)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_other_choices_is_refused(tmp_path, change):
    file = tmp_path / "one.pt"
    fit(method(), steps=10, max_steps=1, checkpoint=file, progress="off")
    with pytest.raises(ValueError, match="another run"):
        fit(method(**change), steps=10, checkpoint=file, progress="off")


def test_bfloat16_and_history():
    abm = method(steps=4)
    history = fit(abm, steps=4, epoch_steps=2, precision="bf16", progress="off")
    assert {"loss", "generator", "teacher_sure", "student_sure", "classes", "spread"} <= set(history.rows[-1])
    assert all(0.25 <= v <= 1 for n in ("teacher_sure", "student_sure") for v in history[n])
    assert all(1 <= v <= 4 for v in history["classes"])


# ---------------------------------------------------------------- the alarm


class Constant(nn.Module):
    "The same image, whatever the noise."

    z_size = 5

    def __init__(self):
        super().__init__()
        self.image = nn.Parameter(torch.rand(1, 1, 8, 8, generator=stream(0)))

    def forward(self, z):
        return self.image.expand(len(z), -1, -1, -1) + 0 * z.sum()


def test_the_alarm_stops_a_generator_of_one_image():
    choices = dict(steps=60, batch_size=4, student_steps=1)
    abm, rows = ABM(*pair(), Constant(), **choices), []
    with pytest.raises(RuntimeError, match="collapsed.*alarm=False"):
        fit(abm, steps=60, epoch_steps=20, progress="off", trackers=[rows.append])
    assert len(rows) == 2  # after 20 and 40 batches it was too early to tell
    quiet = ABM(*pair(), Constant(), **choices, alarm=False)
    assert len(fit(quiet, steps=60, epoch_steps=20, progress="off")) == 3


def answers(classes, K=4):
    return 5 * F.one_hot(torch.as_tensor(classes), K).float()


def test_the_alarm_knows_one_class_from_several():
    x = torch.rand(4, 1, 8, 8, generator=stream(0))
    silent, one, two = (CollapseAlarm(4, patience=0) for _ in range(3))
    silent.check()  # nothing seen yet
    found = two.add(x, answers([0, 0, 1, 1]))
    assert found["classes"].item() == pytest.approx(2) and found["spread"].item() > 0.5
    two.check()
    found = one.add(x, answers([2] * 4))
    assert found["classes"].item() == pytest.approx(1)
    with pytest.raises(RuntimeError, match="1.0 of 4 classes"):
        one.check()


def test_the_alarm_looks_at_many_batches():
    "One class a batch, but each time another one, is no collapse."
    x = torch.rand(4, 1, 8, 8, generator=stream(0))
    alarm = CollapseAlarm(4, patience=0)
    for k in range(40):
        found = alarm.add(x, answers([k % 4] * 4))
    assert found["classes"] > 3.9
    for _ in range(400):  # and it forgets
        found = alarm.add(x, answers([0] * 4))
    with pytest.raises(RuntimeError, match="collapsed"):
        alarm.check()


def test_the_alarm_knows_copies_from_images():
    x = torch.rand(4, 1, 8, 8, generator=stream(0))
    alarm = CollapseAlarm(4, patience=0)
    assert alarm.add(x[:1].expand(4, -1, -1, -1), answers([0, 1, 2, 3]))["spread"] < 1e-3
    with pytest.raises(RuntimeError, match="collapsed"):
        alarm.check()


def test_the_alarms_thresholds():
    x = torch.rand(200, 1, 8, 8, generator=stream(0))
    for ones, rings in ((4, True), (8, False)):  # entropy .098 and .168; a tenth of log 4 is .139
        alarm = CollapseAlarm(4, patience=0)
        alarm.add(x, answers([1] * ones + [0] * (200 - ones)))
        if rings:
            with pytest.raises(RuntimeError, match="collapsed"):
                alarm.check()
        else:
            alarm.check()
    alike = torch.rand(1, 1, 8, 8, generator=stream(0)) + 0.03 * torch.randn(4, 1, 8, 8, generator=stream(1))
    alarm = CollapseAlarm(4, patience=0)
    assert 0.05 < alarm.add(alike, answers([0, 1, 2, 3]))["spread"] < 0.2
    alarm.check()


def test_a_run_goes_on_without_its_alarm(tmp_path):
    file = dict(checkpoint=tmp_path / "one.pt", progress="off")
    fit(method(), steps=10, max_steps=1, **file)
    quiet = method(alarm=False)
    fit(quiet, steps=10, max_steps=2, **file)
    assert quiet.alarm.batches == 2


# ---------------------------------------------------------------- transition curves


def linear(classes=3, inputs=5, seed=0):
    net = nn.Linear(inputs, classes).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(classes, inputs, generator=stream(seed), dtype=torch.float64))
        net.bias.zero_()
    return net


def points(n=40, inputs=5, seed=2):
    return torch.randn(n, inputs, generator=stream(seed), dtype=torch.float64)


def agreeing(name="resnet8"):
    "Two networks alike, but not the same."
    student = pair(teacher=name)[1]
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(torch.randn(p.shape, generator=stream(1)), alpha=0.02)
    return student, teacher


def one_at_a_time(model, other, x, steps, step_size, labels=None):
    "The definition, image by image and class by class."
    curves = []
    for n, image in enumerate(x):
        i = model(image[None]).argmax().item()
        if other(image[None]).argmax().item() != i:
            continue
        left_out = i if labels is None else labels[n].item()
        for j in range(model(image[None]).shape[1]):
            if j == left_out:
                continue
            point = image[None].clone()
            for _ in range(steps):
                point = point.detach().requires_grad_()
                probs = model(point).softmax(1)
                curves.append((probs[0, j].item(), other(point).softmax(1)[0, j].item()))
                F.nll_loss(probs.log(), torch.tensor([j])).backward()
                point = point - step_size * point.grad
    return torch.tensor(curves, dtype=torch.float64).view(-1, model(x[:1]).shape[1] - 1, steps, 2)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
@pytest.mark.parametrize("with_labels", [False, True])
def test_curves_equal_one_at_a_time(batch_size, with_labels):
    model, other, x = linear(), linear(seed=1), points()
    labels = torch.randint(3, (40,), generator=stream(4)) if with_labels else None
    curves = transition_curves(model, other, x, labels, steps=6, step_size=0.3, batch_size=batch_size)
    wanted = one_at_a_time(model, other, x, 6, 0.3, labels)
    torch.testing.assert_close(curves.own, wanted[..., 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(curves.other, wanted[..., 1], rtol=0, atol=1e-12)


def test_curves_equal_one_at_a_time_on_networks():
    model, other = (net.eval() for net in agreeing())
    x = torch.rand(12, 1, 8, 8, generator=stream(5))
    curves = transition_curves(model, other, x, steps=5, unit=1.0)
    wanted = one_at_a_time(model, other, x, 5, 1.0).float()
    torch.testing.assert_close(torch.stack([curves.own, curves.other], -1), wanted, rtol=0, atol=2e-5)


def test_curves_begin_with_the_clean_answer_and_rise():
    model, other, x = linear(), linear(seed=1), points()
    curves = transition_curves(model, other, x, steps=20, step_size=0.01)
    clean = model(x[curves.rows]).softmax(1).gather(1, curves.targets)
    torch.testing.assert_close(curves.own[..., 0], clean)
    clean = other(x[curves.rows]).softmax(1).gather(1, curves.targets)
    torch.testing.assert_close(curves.other[..., 0], clean)
    assert (curves.own.diff(dim=-1) >= 0).all()
    read = model(x).argmax(1)
    assert torch.equal(curves.rows, (read == other(x).argmax(1)).nonzero()[:, 0])
    assert (curves.targets != read[curves.rows, None]).all()
    assert curves.own.shape == (len(curves.rows), 2, 20)


def test_a_network_and_itself_do_not_differ():
    model, x = linear(), points()
    assert mean_transition_error(transition_curves(model, model, x, steps=5)) == 0
    curves = transition_curves(model, linear(seed=1), x, steps=5)
    assert 0 < mean_transition_error(curves) <= 1
    wanted = (curves.own - curves.other).abs().mean().item()
    assert mean_transition_error(curves) == pytest.approx(wanted)
    assert curves.errors.shape == (len(curves.rows),)


def test_the_error_depends_on_whose_gradient_is_followed():
    a, b = linear(), linear(seed=1)
    there, back = (transition_curves(*nets, points(), steps=9) for nets in ((a, b), (b, a)))
    assert mean_transition_error(there) != mean_transition_error(back)


def test_steps_are_taken_in_the_networks_own_units():
    "A network that normalises its images is led as the same network is led without, on normalised images."
    std, mean = [0.25], [0.5]
    inner = create_model("resnet8", **SHAPE, seed=0).eval()
    outer = create_model("resnet8", **SHAPE, seed=0, mean=mean, std=std).eval()
    x = torch.rand(6, 1, 8, 8, generator=stream(5))
    a = transition_curves(outer, outer, x, steps=4)
    b = transition_curves(inner, inner, (x - 0.5) / 0.25, steps=4)
    torch.testing.assert_close(a.own, b.own, rtol=1e-4, atol=1e-5)


def test_the_unit_is_that_of_the_network_that_is_followed():
    a, b = (create_model("resnet8", **SHAPE, seed=0, std=[s]).eval() for s in (0.25, 0.5))
    x = torch.rand(20, 1, 8, 8, generator=stream(5))
    found, wanted, wrong = (transition_curves(a, b, x, steps=3, unit=u).own for u in (None, 0.25, 0.5))
    assert torch.equal(found, wanted) and not torch.equal(found, wrong)


def test_curves_leave_the_networks_as_they_were():
    student, teacher = agreeing()
    before = [state(student), state(teacher)]
    curves = transition_curves(student, teacher, torch.rand(20, 1, 8, 8, generator=stream(5)), steps=2)
    assert student.training and not moved(before[0], student) and not moved(before[1], teacher)
    assert not curves.own.requires_grad and not curves.other.requires_grad
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


class Views(nn.Module):
    "A network that can read pixels in the usual layout only."

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 2, 3), nn.Linear(2 * 6 * 6, 4)

    def forward(self, x):
        return self.linear(self.conv(x).view(len(x), -1))


def view_only():
    torch.manual_seed(0)
    return Views(), Views()


@pytest.mark.parametrize("nets", [agreeing, lambda: agreeing("wrn_16_1"), view_only])
def test_fast_curves_are_the_curves(nets):
    model, other = nets()
    x = torch.rand(20, 1, 8, 8, generator=stream(5))
    before = [(state(net), net.training, net.requires_grad_(True)) for net in (model, other)]
    fast, plain = (transition_curves(model, other, x, steps=5, fast=fast) for fast in (True, False))
    assert torch.equal(fast.rows, plain.rows) and torch.equal(fast.targets, plain.targets)
    for name in ("own", "other"):
        torch.testing.assert_close(getattr(fast, name), getattr(plain, name), rtol=0, atol=1e-5)
    for weights, training, net in before:
        assert not moved(weights, net) and net.training == training and not net._forward_pre_hooks
        assert all(p.requires_grad and p.grad is None for p in net.parameters())
        assert all(b.is_contiguous() for b in net.state_dict().values())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(variant="code"), "variant.*'code'"),
        (dict(beta=-1.0), "beta.*-1"),
        (dict(steps=0), "steps.*0"),
        (dict(student_steps=0), "student_steps.*0"),
        (dict(generator_steps=-1), "generator_steps.*-1"),
        (dict(batch_size=1), "batch_size.*1"),
        (dict(clip=0.0), "clip.*0"),
        (dict(lr=0.0), "lr.*0"),
        (dict(lr=math.inf), "lr.*inf"),
        (dict(steps=2.5), "steps must be a whole number.*2.5"),
        (dict(student_steps=2.5), "student_steps must be a whole number.*2.5"),
        (dict(beta=math.nan), "beta.*nan"),
        (dict(generator_lr=-1.0), "generator_lr.*-1"),
        (dict(clip=math.nan), "clip must be > 0, got nan"),
        (dict(lr="fast"), "lr must be a number > 0, got 'fast'"),
        (dict(beta=None), "beta must be a number >= 0, got None"),
        (dict(steps=True), "steps must be a whole number >= 1, got True"),
        (dict(student_layers="stage9", teacher_layers="stage1"), "stage9"),
        (dict(student_layers=["stage1"]), "in pairs, none twice, got .*stage1.* and None"),
    ],
)
def test_bad_choices_are_one_clear_line(choices, message):
    with pytest.raises(ValueError, match=message) as error:
        method(**choices)
    assert "\n" not in str(error.value)


def test_unfit_networks_are_refused():
    student, teacher = pair()
    with pytest.raises(ValueError, match="student and teacher share stem.0.weight"):
        ABM(student, student, Generator(5, 1, 8), steps=3)
    with pytest.raises(ValueError, match="z_size"):
        ABM(student, teacher, nn.Flatten(), steps=3)


def test_networks_of_different_classes_are_refused():
    a = create_model("resnet8", **SHAPE)
    b = create_model("resnet8", **SHAPE | dict(num_classes=5))
    with pytest.raises(ValueError, match=r"same shape \(B, K\).*4.*5"):
        ABM(a, b, Generator(5, 1, 8), steps=3)


def test_networks_of_different_images_are_refused():
    a = create_model("resnet8", **SHAPE)
    b = create_model("resnet8", **SHAPE | dict(in_channels=3))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        ABM(a, b, Generator(5, 1, 8), steps=3)
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        ABM(a, copy.deepcopy(a), Generator(5, 3, 8), steps=3)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("resnet8", "timm:resnet18"),
        ("mobilenet_v2", "wrn_40_2"),
        ("torchvision:resnet18", "torchvision:resnet50"),
    ],
)
def test_attention_between_strangers(student, teacher):
    nets = [create_model(name, num_classes=4, seed=k) for k, name in enumerate((student, teacher))]
    abm = ABM(*nets, Generator(5, 3, 32, seed=0), steps=2, batch_size=2, student_steps=1)
    assert len(abm.layers[0]) == len(abm.layers[1]) >= 3
    before = state(abm.student)
    assert all(abm.step()["loss"].isfinite() for _ in range(2)) and moved(before, abm.student)


def test_what_has_no_maps_is_refused_only_with_attention():
    a, b = create_model("resnet8", **SHAPE), create_model("mlp_16", **SHAPE)
    with pytest.raises(ValueError, match=r"\(B, D, H, W\).*stage3 64 x 2 x 2 with stage1 16; to choose from"):
        ABM(a, b, Generator(5, 1, 8), steps=3)
    ABM(a, b, Generator(5, 1, 8), steps=3, beta=0, batch_size=4)


def test_building_a_method_leaves_the_networks_as_they_were():
    student, teacher = pair()
    before, random = state(student), torch.get_rng_state()
    ABM(student, teacher, Generator(5, 1, 8, seed=0), steps=3)
    assert not moved(before, student) and torch.equal(random, torch.get_rng_state())


def test_attention_without_maps_is_refused():
    with pytest.raises(ValueError, match="maps of both"):
        abm_student_loss(torch.zeros(2, 3), torch.zeros(2, 3))


def test_losses_refuse_unlike_logits():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        generator_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="reduction.*'sum'"):
        generator_loss(torch.zeros(2, 3), torch.zeros(2, 3), "sum")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(steps=0), "steps.*0"),
        (dict(step_size=0.0), "step_size.*0"),
        (dict(batch_size=0), "batch_size.*0"),
        (dict(step_size=math.nan), "step_size must be > 0, got nan"),
        (dict(unit=math.nan), "unit must be > 0, got nan"),
        (dict(steps=1.5), "steps must be a whole number >= 1, got 1.5"),
    ],
)
def test_curves_refuse_bad_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        transition_curves(linear(), linear(), points(), **choices)


def test_curves_refuse_what_cannot_be_compared():
    model, x = linear(), points()
    opposite = copy.deepcopy(model)
    with torch.no_grad():
        opposite.weight.neg_()
    with pytest.raises(ValueError, match="agree on none of"):
        transition_curves(model, opposite, x[model(x).argmax(1) != opposite(x).argmax(1)])
    with pytest.raises(ValueError, match="logits"):
        transition_curves(model, linear(classes=4), x)
    with pytest.raises(ValueError, match="labels"):
        transition_curves(model, model, x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        transition_curves(model, model, x, torch.full((40,), 3))
    with pytest.raises(ValueError, match="number_of_images must be a whole number >= 1, got 0"):
        transition_curves(model, model, x[:0])
    with pytest.raises(ValueError, match="NaN"):
        transition_curves(model, model, x * math.nan)
    with pytest.raises(ValueError, match="K must be a whole number >= 2, got 1"):
        transition_curves(linear(classes=1), linear(classes=1), x)


# ---------------------------------------------------------------- what is there changes nothing


def leftover(*modules):
    "A gradient as a foreign loop leaves it behind."
    for p in (p for m in modules for p in m.parameters()):
        p.grad = torch.full_like(p, 3.0)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_leftover_gradients_never_enter(variant):
    ends = []
    for left in (False, True):
        student, teacher = pair()
        generator = Generator(5, 1, 8, seed=3)
        if left:
            leftover(student, teacher, generator)
        torch.manual_seed(0)
        abm = ABM(student, teacher, generator, steps=4, batch_size=8, student_steps=2, variant=variant)
        abm.step(), abm.step()
        ends.append(abm)
    for net in ("student", "generator", "teacher"):
        assert not moved(state(getattr(ends[0], net)), getattr(ends[1], net))


@pytest.mark.parametrize("net", ["student", "generator"])
def test_a_batch_norm_that_its_owner_froze_stays(net):
    student, teacher = pair()
    nets = {"student": student, "generator": Generator(5, 1, 8, seed=3)}
    still = next(m for m in nets[net].modules() if isinstance(m, nn.BatchNorm2d))
    still.eval().requires_grad_(False)
    before = state(still)
    ABM(student, teacher, nets["generator"], steps=4, batch_size=8, student_steps=2).step()
    assert not still.training and nets[net].training and not moved(before, still)


def test_networks_that_share_modules_are_refused():
    student, teacher = pair()
    teacher.stage1 = student.stage1
    with pytest.raises(ValueError, match="student and teacher share stage1"):
        ABM(student, teacher, Generator(5, 1, 8), steps=3)


# ---------------------------------------------------------------- several processes


def test_clipping_comes_after_what_fit_does_to_gradients():
    "`fit` averages over processes in a hook that it adds later; here one that makes gradients long."
    lengths, abm = [], method(variant="official", clip=1e-2, steps=4)

    def lengthen(optimizer, *_):
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            p.grad.mul_(1000)

    def note(optimizer, *_):
        grads = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
        lengths.append(torch.cat(grads).norm().item())

    for optimizer in (abm.optimizer, abm.generator_optimizer):
        optimizer.register_step_pre_hook(lengthen), optimizer.register_step_post_hook(note)
    abm.step()
    assert lengths == pytest.approx([1e-2] * 4, rel=1e-3)
    assert len(abm.optimizer._optimizer_step_pre_hooks) == 1  # ours is gone again


def test_batch_size_is_of_the_whole_run(monkeypatch):
    abm, seen = method(batch_size=8, fresh=True, student_steps=1), []
    abm.generator.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    abm.step()
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    abm.step()
    assert set(seen[: len(seen) // 2]) == {8} and set(seen[len(seen) // 2 :]) == {4}
    with pytest.raises(ValueError, match="9 images cannot be shared by 2 processes"):
        method(batch_size=9).step()


# ---------------------------------------------------------------- precision, compiled losses, other networks

LOSSES = {
    "generator": lambda s, t, a, b: generator_loss(s, t),
    "student": lambda s, t, a, b: abm_student_loss(s, t, beta=0),
    "norm": lambda s, t, a, b: abm_student_loss(s, t, [a], [b], 7.0),
    "mean_square": lambda s, t, a, b: abm_student_loss(s, t, [a], [b], 7.0, "mean", "mean_square"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_at_least_float32_and_compile(name):
    loss, shapes = LOSSES[name], ((6, 5), (6, 5), (6, 3, 4, 4), (6, 2, 4, 4))
    exact = [torch.randn(s, generator=stream(k), dtype=torch.float64) for k, s in enumerate(shapes)]
    rough = [v.bfloat16() for v in exact]
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(*rough).equal(loss(*[v.float() for v in rough]))
        assert loss(*exact).dtype == torch.float64
    torch._dynamo.reset()
    single = [v.float() for v in exact]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*single), loss(*single))


def test_a_step_in_bfloat16_counts_its_losses_in_full():
    abm = method(beta=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(v.dtype == torch.float32 for v in abm.step().values())


def test_a_masked_class_counts_nothing():
    s, t = torch.randn(2, 6, 5, generator=stream(0), dtype=torch.float64)
    q = t[:, 1:].softmax(1)
    wanted = (q * (q.log() - s.log_softmax(1)[:, 1:])).sum(1).mean()
    t[:, 0] = -math.inf
    torch.testing.assert_close(abm_student_loss(s, t, beta=0), wanted)


def test_float64_stays_float64():
    student, teacher = (net.double() for net in pair())
    abm = ABM(student, teacher, Generator(5, 1, 8).double(), steps=3, batch_size=8, student_steps=1)
    found = abm.step()
    assert found["loss"].dtype == found["generator"].dtype == torch.float64
    x = torch.rand(20, 1, 8, 8, generator=stream(5))
    for images in (x, x.double()):
        assert transition_curves(student, student, images, steps=3).own.dtype == torch.float64
    images = [transition_curves(student, student, v, steps=3).own for v in (x, x.double())]
    assert images[0].equal(images[1])


@pytest.mark.parametrize("who", [0, 1])
def test_a_model_that_gives_more_than_logits_is_refused(who):
    nets, x = pair(), torch.rand(4, 1, 8, 8, generator=stream(5))
    nets[who] = Two(nets[who])
    for call in (
        lambda: ABM(*nets, Generator(5, 1, 8), steps=3, beta=0),
        lambda: ABM(*nets, Generator(5, 1, 8), steps=3),
        lambda: transition_curves(*nets, x, steps=2),
    ):
        with pytest.raises(ValueError, match="the model must return logits of shape .*, got a tuple; wrap"):
            call()


def test_a_model_that_gives_more_in_training_only_is_refused():
    class Aux(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return (self.inner(x), None) if self.training else self.inner(x)

    student, teacher = pair()
    with pytest.raises(ValueError, match=r"logits of shape \(8, K\), got a tuple; wrap"):
        ABM(Aux(student), teacher, Generator(5, 1, 8), steps=3, beta=0, batch_size=8).step()


def test_losses_refuse_sequences():
    s = torch.zeros(2, 7, 3)
    for loss in (generator_loss, lambda a, b: abm_student_loss(a, b, beta=0)):
        with pytest.raises(ValueError, match=r"same shape \(B, K\), got shape \(2, 7, 3\)"):
            loss(s, s)
