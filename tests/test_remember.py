"A frozen teacher's logits are looked up where they are its answer, and nowhere else."

import copy
from functools import partial

import pytest
import torch
from conftest import same, state
from torch import nn

from kdnb import learning
from kdnb.afd import DML
from kdnb.ard import ARD
from kdnb.attacks import pgd
from kdnb.bss import BSS
from kdnb.checks import full
from kdnb.data import Batches, Images
from kdnb.features import AT
from kdnb.kd import KD, kd_loss
from kdnb.learning import freeze, frozen_logits, remembering
from kdnb.models import create_model
from kdnb.tfkd import AdversarialTfKD, TfKD
from kdnb.training import fit


def pictures(n=96, channels=1, size=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=draw)
    return Images(x, torch.randint(0, 10, (n,), generator=draw), tuple("0123456789"))


def net(seed, name="mlp_32", channels=1, size=8):
    return create_model(name, in_channels=channels, image_size=size, seed=seed)


class Asked:
    "A frozen teacher, and how many images each of its calls saw."

    def __init__(self, teacher=None):
        self.net, self.calls = freeze(teacher or net(1)), []
        inner = self.net.forward

        def forward(x, *more):
            self.calls.append(len(x))
            return inner(x, *more)

        self.net.forward = forward

    def __call__(self, x, grows):
        "Its logits, which are right; whether it was asked is as said."
        before = len(self.calls)
        found = frozen_logits(self.net, x)
        made = self.calls[before:]
        assert bool(made) == grows
        with torch.no_grad():
            assert found.allclose(full(self.net(x)), rtol=1e-5, atol=1e-6)
        self.calls[before:] = made
        assert not found.requires_grad
        return found


def whole(batches, asked, epoch=0, grows=False, first=False):
    for k, (x, _) in enumerate(batches.epoch(epoch)):
        asked(x, grows or (first and k == 0))


def weights(method):
    return state(method.student)


STEP = dict(lr=0.05)
METHODS = {
    "KD": lambda: KD(net(0), net(1), **STEP),
    "KD of convnets": lambda: KD(net(0, "resnet8"), net(1, "resnet8"), **STEP),
    "ARD": lambda: ARD(net(0), net(1), attack=partial(pgd, eps=0.1, step_size=0.05, steps=2), **STEP),
    "ARD, attacked": lambda: ARD(net(0), net(1), teacher_sees="adversarial", inner="teacher", **STEP,
                                 attack=partial(pgd, eps=0.1, step_size=0.05, steps=2)),
    "BSS": lambda: BSS(net(0), net(1), epochs=3, **STEP),
    "Tf-KD": lambda: TfKD(net(0), net(1), mode="self", **STEP),
    "Tf-KD, attacked": lambda: AdversarialTfKD(net(0), net(1), mode="self", **STEP,
                                               attack=partial(pgd, eps=0.1, step_size=0.05, steps=2)),
    "DML": lambda: DML([net(0), net(2), net(1)], scheme="offline", **STEP),
    "maps, then answers": lambda: AT(net(0, "resnet8"), net(1, "resnet8"), soft=kd_loss, alpha=0.5,
                                     pretrain_epochs=1, **STEP),
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_the_same(name, precision):
    found = []
    for remember in (False, True):
        method = METHODS[name]()
        plan = dict(epochs=3, progress="off", precision=precision, remember=remember)
        history = fit(method, Batches(pictures(), 32, seed=0), **plan)
        found.append((history["loss"], weights(method)))
    (slow, a), (fast, b) = found
    if precision == "fp32":
        assert slow == pytest.approx(fast, rel=1e-6)
        assert all(a[k].allclose(b[k], rtol=1e-5, atol=1e-6) for k in a)
    else:
        assert slow == pytest.approx(fast, rel=2e-2)


def test_a_teacher_is_asked_once_about_each_image():
    asked = Asked()
    method = KD(net(0), asked.net, **STEP)
    fit(method, Batches(pictures(100), 32), epochs=5, progress="off")
    assert asked.calls == [2, 32, 32, 32, 32] + [2] * 4, "two images at the start of each epoch"
    for plan in (dict(remember=False), dict(epochs=1), dict(max_steps=2)):
        asked.calls.clear()
        fit(method, Batches(pictures(100), 32), **dict(epochs=5, progress="off") | plan)
        assert set(asked.calls) == {32}, plan


@pytest.mark.parametrize("sees, more", [("clean", 0), ("adversarial", 9)])
def test_a_teacher_is_asked_about_every_attacked_image(sees, more):
    asked, attack = Asked(), partial(pgd, eps=0.1, step_size=0.05, steps=1)
    method = ARD(net(0), asked.net, attack=attack, teacher_sees=sees, **STEP)
    fit(method, Batches(pictures(), 32), epochs=3, progress="off")
    assert sorted(asked.calls) == [2] * 3 + [32] * (3 + more)


def test_the_last_batch_may_be_smaller():
    asked, batches = Asked(), Batches(pictures(70), 32, drop_last=False)
    with remembering(batches):
        whole(batches, asked, first=True)


def test_off_is_the_path_of_before():
    method = KD(net(0), net(1), **STEP)
    fit(method, Batches(pictures(), 32), epochs=3, progress="off", remember=False)
    bare, batches = KD(net(0), net(1), **STEP), Batches(pictures(), 32)
    for epoch in range(3):
        for x, y in batches.epoch(epoch):
            bare.step(x, y)
    assert same(weights(method), weights(bare))


# ---------------------------------------------------------------- other images


@pytest.fixture
def memory():
    "Enters the context for a test."
    entered = []

    def enter(batches, **more):
        entered.append(remembering(batches, **more))
        entered[-1].__enter__()
        return batches

    yield enter
    for context in reversed(entered):
        context.__exit__(None, None, None)


CHANGES = {
    "a copy": torch.clone,
    "a deep copy": copy.deepcopy,
    "attacked": lambda x: pgd(net(3), x, torch.zeros(len(x)).long(), eps=0.1, step_size=0.05, steps=1),
    "in place": lambda x: x.mul_(0.5),
    "in place, by a view": lambda x: (x[0].zero_(), x)[1],
    "in place, by a detached one": lambda x: (x.detach().mul_(0.5), x)[1],
    "a part": lambda x: x[:5],
    "turned": lambda x: x.flip(3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_or_a_changed_batch_is_asked_about(memory, change):
    asked, source = Asked(), memory(Batches(pictures(), 32)).epoch(0)
    asked(next(source)[0], True)
    x, _ = next(source)
    asked(CHANGES[change](x), True)


def test_a_batch_of_before_is_asked_about(memory):
    asked, source = Asked(), memory(Batches(pictures(), 32)).epoch(0)
    first, _ = next(source)
    asked(first, True)
    second, _ = next(source)
    asked(first, True)
    asked(second, False)


def test_batches_of_two_sets_in_turns(memory):
    ours, others = memory(Batches(pictures(), 32)), Batches(pictures(seed=1), 32)
    asked = Asked()
    for k, ((x, _), (z, _)) in enumerate(zip(ours.epoch(0), others.epoch(0), strict=True)):
        asked(x, k == 0)
        asked(z, True)
        asked(x, False)


def test_two_readers_of_one_set(memory):
    batches, asked = memory(Batches(pictures(), 32)), Asked()
    for k, ((x, _), (z, _)) in enumerate(zip(batches.epoch(0), batches.epoch(1), strict=True)):
        asked(x, True)      # no longer the last one
        asked(z, k == 0)


def test_a_subset_is_a_set_of_its_own():
    images, asked = pictures(), Asked()
    for part in (images, images.subset(torch.arange(95, 19, -1)), images.first(64)):
        batches = Batches(part, 32)
        with remembering(batches):
            whole(batches, asked, first=True)


@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_swapped_images_are_asked_about(memory, how):
    batches, asked, other = memory(Batches(pictures(), 32)), Asked(), Batches(pictures(seed=1), 32)
    whole(batches, asked, first=True)
    if how == "replaced":
        batches.pixels = other.pixels
    else:
        batches.pixels[:48] = other.pixels[:48]
    whole(batches, asked, 1, first=True)     # all of them again
    batches.pixels = batches.pixels.flip(0)
    x, _ = next(batches.epoch(1))
    asked(x, True)
    batches.pixels = other.pixels
    whole(batches, asked, 1, grows=True)     # images that change faster than that pays are not remembered


def test_what_a_subclass_makes_of_a_batch_is_asked_about(memory):
    class Noisy(Batches):
        def epoch(self, epoch, start=0):
            for x, y in super().epoch(epoch, start):
                yield (x.mul_(0.5) if epoch else x + 0.1), y

    batches, asked = memory(Noisy(pictures(), 32)), Asked()
    for epoch in range(2):
        whole(batches, asked, epoch, grows=True)


# ---------------------------------------------------------------- another teacher


def through_data(teacher):
    next(teacher.parameters()).data.mul_(1.5)


def loaded(teacher):
    teacher.load_state_dict(net(5).state_dict())


def in_place(teacher):
    with torch.no_grad():
        [*teacher.parameters()][-1].add_(1.0)


def a_parameter(teacher):
    layer = next(m for m in teacher.modules() if isinstance(m, nn.Linear))
    layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)


def a_module(teacher):
    name = next(name for name, m in teacher.named_modules() if isinstance(m, nn.ReLU))
    teacher.set_submodule(name, nn.Tanh().eval())


@pytest.mark.parametrize("change", [through_data, loaded, in_place, a_parameter, a_module])
def test_a_teacher_that_changed_is_asked_anew(memory, change):
    batches, asked = memory(Batches(pictures(), 32)), Asked()
    whole(batches, asked, first=True)
    change(asked.net)
    whole(batches, asked, 1, first=True)


def test_a_number_of_the_teacher_that_changed(memory):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = net(1), 1.0

        def forward(self, x): return self.scale * self.inner(x)

    batches, teacher = memory(Batches(pictures(), 32)), Scaled()
    asked = Asked(teacher)
    whole(batches, asked, first=True)
    teacher.scale = 0.5
    whole(batches, asked, 1, first=True)


def test_a_hidden_network_that_changed_is_noticed_at_the_next_epoch(memory):
    hidden = [net(1).eval()]

    class Wrapped(nn.Module):
        def forward(self, x): return hidden[0](x)

    batches, asked = memory(Batches(pictures(), 32)), Asked(Wrapped())
    whole(batches, asked, first=True)
    hidden[0] = net(2).eval()
    whole(batches, asked, 1, first=True)


def test_a_teacher_that_changes_at_every_step_is_asked_every_time(memory):
    batches, asked = memory(Batches(pictures(), 32)), Asked()
    for epoch in range(2):
        for x, _ in batches.epoch(epoch):
            asked(x, True)
            in_place(asked.net)
    assert sum(asked.calls) < 96 * 6


def test_the_second_of_two_teachers_is_asked_every_time(memory):
    batches, first, second = memory(Batches(pictures(), 32)), Asked(), Asked(net(2))
    for k, (x, _) in enumerate(batches.epoch(0)):
        first(x, k == 0)
        second(x, True)


class Restless(nn.Module):
    "A network that does something else at each call, in evaluation mode too."

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = net(1), kind
        self.norm = nn.BatchNorm2d(1, track_running_stats=False)

    def forward(self, x):
        if self.kind == "norm": x = self.norm(x)
        if self.kind == "noise": x = x + 0.1 * torch.rand_like(x)
        return self.inner(x)


@pytest.mark.parametrize("kind", ["norm", "noise", "hook", "training", "learns"])
def test_an_answer_that_depends_on_more_than_the_image_is_not_remembered(memory, kind):
    batches, teacher = memory(Batches(pictures(), 32)), freeze(Restless(kind))
    seen = []
    if kind == "hook": teacher.inner.register_forward_hook(lambda *_: seen.append(1))
    if kind == "training": teacher.inner.train()
    if kind == "learns": next(teacher.parameters()).requires_grad_(True)
    for x, _ in batches.epoch(0):
        torch.manual_seed(0)
        found = frozen_logits(teacher, x)
        torch.manual_seed(0)
        with torch.no_grad():
            assert found.equal(teacher(x)), "and random streams are where they were"
    if kind == "hook": assert len(seen) == 6


def test_a_table_too_large_is_not_kept(memory):
    class Wide(nn.Module):
        def forward(self, x): return x.new_zeros(1, 1).expand(len(x), 3 * 10**6)

    batches, asked = memory(Batches(pictures(), 32)), Asked(Wide())
    whole(batches, asked, grows=True)


def test_precisions_are_not_mixed(memory):
    batches, asked = memory(Batches(pictures(), 32)), Asked()
    for k, (x, _) in enumerate(batches.epoch(0)):
        exact = asked(x, k == 0)
        with torch.autocast("cpu", torch.bfloat16):
            before = len(asked.calls)
            half = frozen_logits(asked.net, x)
            assert len(asked.calls) > before and half.dtype == torch.float32 and not half.equal(exact)


# ---------------------------------------------------------------- runs


def droplet(remember, stop=0, file=None, seed=0, epochs=4):
    student = nn.Sequential(net(seed), nn.Dropout(0.3))
    method = KD(student, net(1, "resnet8"), **STEP)
    plan = dict(progress="off", checkpoint=file, max_steps=stop, remember=remember)
    return fit(method, Batches(pictures(100), 24, seed=1), epochs=epochs, **plan)["loss"], weights(method)


@pytest.mark.parametrize("remember", [None, True])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_has_the_same_bits(tmp_path, remember, stop):
    whole, file = droplet(remember), tmp_path / "run.pt"
    droplet(remember, stop, file)
    assert same(whole, droplet(remember, file=file, seed=9))


def test_a_run_that_is_made_longer_has_the_same_bits(tmp_path):
    file = tmp_path / "run.pt"
    droplet(None, file=file, epochs=1)
    assert same(droplet(None), droplet(None, file=file, seed=9))


def test_checkpoints_hold_nothing_of_it(tmp_path):
    sizes = []
    for remember in (True, False):
        file = tmp_path / f"{remember}.pt"
        droplet(remember, file=file)
        sizes.append(torch.load(file, weights_only=True))
    a, b = sizes
    assert a["identity"] == b["identity"] and a.keys() == b.keys() and a["moved"].keys() == b["moved"].keys()


def test_a_process_looks_up_its_share(monkeypatch, memory):
    from kdnb import data

    def share(first, count, rank=1, world=2): return slice(first + rank * count // world,
                                                          first + (rank + 1) * count // world)

    for module in (data, learning):
        monkeypatch.setattr(module, "own_share", share)
    batches, asked = memory(Batches(pictures(), 32)), Asked()
    for k, (x, _) in enumerate(batches.epoch(0)):
        assert len(x) == 16
        asked(x, k == 0)
    assert max(asked.calls) == 16


def test_a_batch_that_goes_on_elsewhere_is_known(memory):
    teacher = net(1).double()
    method = KD(net(0).double(), Asked(teacher).net, **STEP)
    asked = Asked(method.teacher)
    fit(method, Batches(pictures(), 32), epochs=3, progress="off")
    assert sum(asked.calls) == 2 + 96 + 2 * 2
    batches = memory(Batches(pictures(), 32))
    x, _ = next(batches.epoch(0))
    asked = Asked(net(1).double())
    batches.moved(x.clone(), z := x.double())   # not the one that was given
    asked(z, True)
    assert asked.calls == [32]


def test_compiled_networks_answer_the_same():
    found = []
    for compile_ in (False, True):
        method = KD(net(0), net(1), **STEP)
        history = fit(method, Batches(pictures(), 32), epochs=2, progress="off", compile=compile_)
        found.append(history["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)



@pytest.mark.parametrize("batches, got", [
    (Batches(pictures(), 32, augment="crop", padding=1), "got crop"),
    ([(torch.rand(4, 1, 8, 8), torch.zeros(4).long())], "got a list"),
    (None, "got a NoneType"),
])  # fmt: skip
def test_what_cannot_be_remembered_is_refused(batches, got):
    steps = dict(steps=2) if batches is None else dict(epochs=2)
    with pytest.raises(ValueError, match=f"remember=True needs .*{got}"):
        fit(KD(net(0), net(1), **STEP), batches, remember=True, progress="off", **steps)


def test_a_choice_of_three():
    with pytest.raises(ValueError, match="remember must be None, True or False, got 'yes'"):
        fit(KD(net(0), net(1), **STEP), Batches(pictures(), 32), epochs=2, remember="yes")


def test_lists_and_augmented_batches_are_asked_about(memory):
    asked, images = Asked(), pictures()
    listed = [*Batches(images, 32)]
    with remembering(listed):
        for x, _ in listed: asked(x, True)
    for augment in ("crop", "crop_flip"):
        batches = Batches(images, 32, augment=augment, padding=1)
        with remembering(batches):
            whole(batches, asked, grows=True)


def test_a_run_within_a_run_has_its_own():
    asked, batches, inner = Asked(), Batches(pictures(), 32), Batches(pictures(seed=1), 32)
    with remembering(batches):
        whole(batches, asked, first=True)
        with remembering(inner, False):
            whole(batches, asked, 0, grows=True)
        with remembering(inner):
            whole(inner, Asked(), first=True)
        whole(batches, asked, 0)
    whole(batches, asked, 0, grows=True)


def test_batches_of_inference_mode_are_asked_about(memory):
    batches, asked = memory(Batches(pictures(), 32)), Asked()
    with torch.inference_mode():
        for x, _ in batches.epoch(0):
            asked(x, True)
    assert batches.given[0] is None
